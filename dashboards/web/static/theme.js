// Light and dark: the colours stand in the style sheet, and charts read them there.

// Okabe and Ito's palette without its yellow and black, which colour-blind readers can tell apart; lighter on black.
const LINES = ["blue", "orange", "green", "pink", "sky", "gold"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const VIRIDIS = [
  "#440154",
  "#482878",
  "#3e4a89",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
];
const KEY = "entropy-monitor-theme";
const CHOICES = ["auto", "light", "dark"];

/** Viridis from dark to light, as plotly takes it. */
export const SCALE = VIRIDIS.map((colour, i) => [i / (VIRIDIS.length - 1), colour]);

/** One colour a layer, the first dark and the last light, without those ends that the page swallows. */
export function depthColours(many) {
  const [low, high] = isDark() ? [0.28, 1] : [0, 0.85];
  return Array.from({ length: many }, (_, i) => viridis(low + (high - low) * (many > 1 ? i / (many - 1) : 0.3)));
}

function viridis(share) {
  const at = share * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const [from, to] = [VIRIDIS[i], VIRIDIS[i + 1]].map((c) => [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)));
  return `rgb(${from.map((value, k) => Math.round(value + (to[k] - value) * (at - i))).join(",")})`;
}

/** The same colour, `alpha` opaque. */
export function faded(colour, alpha) {
  const parts = colour.startsWith("#")
    ? [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16))
    : colour.match(/\d+/g).slice(0, 3);
  return `rgba(${[...parts, alpha].join(",")})`;
}

/** A run's colour and dash by its place among those compared. */
export function runLine(i) {
  return {
    color: colour(LINES[i % LINES.length]),
    dash: DASHES[Math.floor(i / LINES.length) % DASHES.length],
  };
}

/** A colour of the style sheet, by its name there. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** A severity's colour on charts. */
export function severityColour(severity) {
  return colour(`mark-${["severe", "warning"].includes(severity) ? severity : "info"}`);
}

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The reader's choice, kept by the browser where it may be. */
export function chosenTheme() {
  try {
    const kept = localStorage.getItem(KEY);
    return CHOICES.includes(kept) ? kept : "auto";
  } catch {
    return "auto"; // storage is switched off
  }
}

export function chooseTheme(choice) {
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  try {
    localStorage.setItem(KEY, choice);
  } catch {
    // it holds for this visit
  }
}

/** Call `redraw` when light becomes dark or dark light. */
export function onThemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
