// The runs side by side: one line each, the worst first.

import { alertCounts, liveBadge, verdictBadge } from "./badge.js";
import { fill, h, keepingFocus } from "./dom.js";
import { runLine } from "./theme.js";
import { DASH, number, percent, place, shorten, times, whole } from "./words.js";

const ORDER = { trouble: 0, watch: 1, sound: 2, unknown: 3 };
const MOST_SHOWN = 60;
const WORTH_SEARCHING = 12;
const MOST_AT_EASE = 6; // more runs get one line each

const COLUMNS = [
  { label: "run", of: (c) => c.name, text: true },
  { label: "verdict", of: (c) => ORDER[c.verdict] ?? 3 },
  { label: "final loss", of: (c) => c.final_loss, show: loss },
  { label: "lowest entropy", of: (c) => c.lowest_share?.value, show: (c) => extreme(c.lowest_share, percent) },
  {
    label: "growth of σ_QK",
    of: (c) => c.sigma_growth && -c.sigma_growth.value,
    show: (c) => extreme(c.sigma_growth, times),
  },
  {
    label: "largest logit",
    of: (c) => c.largest_logit && -c.largest_logit.value,
    show: (c) => extreme(c.largest_logit, number),
  },
  {
    label: "alerts",
    of: (c) => c.alerts && -(1e6 * c.alerts.severe + 1e3 * c.alerts.warning + c.alerts.info),
    show: alerts,
  },
];

export class RunsTable {
  /** `onselect(id)`: a run to look at; `oncompare(id, isOn)`: one to draw beside the others. */
  constructor({ onselect, oncompare }) {
    Object.assign(this, { onselect, oncompare });
    this.sorted = 1;
    this.wanted = "";
    this.most = MOST_SHOWN;
    this.body = h("tbody", {});
    this.heads = COLUMNS.map((column, i) =>
      h(
        "th",
        { scope: "col" },
        h("button", { type: "button", class: "sort", onclick: () => this.sort(i) }, column.label),
      ),
    );
    this.search = h("input", {
      type: "search",
      placeholder: "find a run",
      "aria-label": "find a run",
      oninput: () => this.find(),
    });
    this.more = h("button", { type: "button", class: "plain", onclick: () => this.showAll() });
    this.element = h(
      "div",
      { class: "runs" },
      this.search,
      h(
        "div",
        { class: "wide" },
        h(
          "table",
          { class: "runs-table" },
          h("caption", { class: "hidden" }, "Runs of the folder; a name opens its run below"),
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col", class: "swatch-cell" }, h("span", { class: "hidden" }, "compare")),
              this.heads,
            ),
          ),
          this.body,
        ),
      ),
      this.more,
    );
  }

  /** `compared`: ids in the order of their colours. */
  show(cards, selected, compared) {
    Object.assign(this, { cards, selected, compared });
    const known = this.cards.filter((card) => `${card.name} ${card.id}`.toLowerCase().includes(this.wanted));
    const column = COLUMNS[this.sorted];
    const sorted = [...known].sort((a, b) => compare(column.of(a), column.of(b)) || compare(a.id, b.id));
    const shown = sorted.slice(0, this.most);
    if (selected !== null && !shown.some((c) => c.id === selected))
      shown.push(...sorted.filter((c) => c.id === selected));
    this.heads.forEach((head, i) =>
      i === this.sorted ? head.setAttribute("aria-sort", "ascending") : head.removeAttribute("aria-sort"),
    );
    this.element.classList.toggle("compact", cards.length > MOST_AT_EASE);
    this.search.hidden = cards.length < WORTH_SEARCHING;
    this.more.hidden = sorted.length <= shown.length;
    this.more.textContent = `show all ${whole(sorted.length)} runs`;
    keepingFocus(this.body, () =>
      fill(
        this.body,
        shown.map((card) => this.row(card)),
      ),
    );
  }

  row(card) {
    const isSelected = card.id === this.selected;
    const at = this.compared.indexOf(card.id);
    const canCompare = this.cards.length > 1 && !card.problem && !card.pending;
    const box = h("input", {
      type: "checkbox",
      checked: at >= 0,
      "data-focus": `compare ${card.id}`,
      "aria-label": `compare ${card.name}`,
      onchange: (event) => this.oncompare(card.id, event.target.checked),
    });
    const swatch = h("span", { class: "swatch", style: at >= 0 ? `background:${runLine(at).color}` : null });
    const name = h(
      "button",
      {
        type: "button",
        class: "run-name",
        "data-focus": `run ${card.id}`,
        "aria-current": isSelected ? "true" : null,
        onclick: () => this.onselect(card.id),
      },
      card.name,
    );
    const above = card.id === "." ? "" : card.id.slice(0, Math.max(0, card.id.lastIndexOf("/") + 1));
    const path = above ? h("small", { class: "path", title: card.id }, above) : null;
    const words = card.problem || card.words || "";
    return h(
      "tr",
      { class: isSelected ? "selected" : null },
      h("td", { class: "swatch-cell" }, canCompare ? h("label", {}, box, swatch) : null),
      h("th", { scope: "row" }, name, " ", liveBadge(card), path),
      h(
        "td",
        { class: "verdict-cell" },
        verdictBadge(card),
        " ",
        h("small", { class: "clamped", title: words }, words),
      ),
      COLUMNS.slice(2).map((column) => h("td", {}, card.problem || card.pending ? DASH : column.show(card))),
    );
  }

  sort(i) {
    this.sorted = i;
    this.show(this.cards, this.selected, this.compared);
  }

  find() {
    this.wanted = this.search.value.toLowerCase();
    this.show(this.cards, this.selected, this.compared);
  }

  showAll() {
    this.most = Infinity;
    this.show(this.cards, this.selected, this.compared);
  }
}

/** The order in which the table stands at first: the worst run first. */
export function worstFirst(cards) {
  return [...cards].sort(
    (a, b) => COLUMNS[1].of(a) - COLUMNS[1].of(b) || compare(COLUMNS[6].of(a), COLUMNS[6].of(b)) || compare(a.id, b.id),
  );
}

function compare(a, b) {
  const [lacksA, lacksB] = [a === null || a === undefined, b === null || b === undefined];
  if (lacksA || lacksB) return lacksA - lacksB;
  return a < b ? -1 : a > b ? 1 : 0;
}

function loss(card) {
  if (card.broken_loss !== null)
    return [number(card.final_loss), h("small", { class: "bad" }, `not finite at step ${whole(card.broken_loss)}`)];
  return number(card.final_loss);
}

function extreme(found, words) {
  if (!found) return DASH;
  const where = place(shorten(found.layer, 22), found.head, found.call);
  return [
    words(found.value),
    h("small", { title: place(found.layer, found.head, found.call) }, `${where}, step ${whole(found.step)}`),
  ];
}

function alerts(card) {
  const some = alertCounts(card);
  return [
    some,
    some === "none" ? null : h("small", {}, card.open_alerts ? `${whole(card.open_alerts)} open` : "all closed"),
  ];
}
