// Figures and names in words, as entropy_monitor/phrases.py writes them.

export const DASH = "–";
export const SEVERITIES = ["severe", "warning", "info"];
export const VERDICTS = { sound: "sound", watch: "worth a look", trouble: "in trouble", unknown: "unknown" };

/** A figure to three significant digits; a dash for what is not known. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return DASH;
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (value !== 0 && !(size >= 1e-3 && size < 1e6)) return value.toExponential(1).replace("e+", "e");
  if (size >= 100) return whole(Math.round(value));
  return String(Number(value.toPrecision(3)));
}

/** A share in percent. */
export function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return DASH;
  const value = 100 * share;
  if (value === 0) return "0 %";
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${Math.abs(value) < 9.95 ? value.toFixed(1) : value.toFixed(0)} %`;
}

/** A ratio, such as 12.4×. */
export function times(ratio) {
  if (ratio === null || ratio === undefined || Number.isNaN(ratio)) return DASH;
  return ratio < 100 ? `${ratio.toFixed(1)}×` : `${whole(Math.round(ratio))}×`;
}

/** A whole number with commas. */
export function whole(value) {
  return value === null || value === undefined ? DASH : String(value).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

/** A value of a column, with its unit. */
export function reading(value, column) {
  if (column.scale === "share") return percent(value);
  const text = number(value);
  return column.unit && text !== DASH ? `${text} ${column.unit}` : text;
}

/** `3 alerts`, `1 alert`. */
export function count(many, what) {
  return `${whole(many)} ${what}${many === 1 ? "" : "s"}`;
}

/** Ascending whole numbers as ranges: 0–3, 7. */
export function ranges(numbers) {
  const parts = [];
  for (let i = 0; i < numbers.length;) {
    let end = i;
    while (end + 1 < numbers.length && numbers[end + 1] === numbers[end] + 1) end++;
    if (end - i > 1) parts.push(`${numbers[i]}–${numbers[end]}`);
    else parts.push(...numbers.slice(i, end + 1));
    i = end + 1;
  }
  return parts.join(", ");
}

/** A long name cut from the left, where names of layers are all alike. */
export function shorten(name, most) {
  const letters = Array.from(name);
  return letters.length <= most ? name : `…${letters.slice(letters.length - most + 1).join("")}`;
}

/** Names cut to a length so that they still differ: from the left or, where that hides the difference, to what differs. */
export function shortNames(names, most) {
  const cut = names.map((name) => shorten(name, most));
  if (new Set(cut).size === new Set(names).size) return cut;
  const parts = names.map((name) => name.split("."));
  const shortest = Math.min(...parts.map((own) => own.length));
  const shared = (at) => parts.every((own) => own.at(at) === parts[0].at(at));
  let [front, back] = [0, 0];
  while (front < shortest && shared(front)) front++;
  while (back < shortest - front && shared(-1 - back)) back++;
  return parts.map((own) =>
    shorten(`${front ? "…" : ""}${own.slice(front, own.length - back).join(".")}${back ? "…" : ""}`, most),
  );
}

/** Text that plotly, which reads some HTML in its texts, draws as it is. */
export function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** What an alert is called in a sentence: `head 3 of blocks.0.attn`. */
export function place(layer, head, call) {
  return `${layer}, head ${head}${call ? `, call ${call}` : ""}`;
}
