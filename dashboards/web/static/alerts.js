// The alert list: the worst first, then in order of opening.

import { severityBadge, stateOf } from "./badge.js";
import { choice, fill, h, keepingFocus } from "./dom.js";
import { SEVERITIES, count, ranges, shorten, whole } from "./words.js";

const MOST_SHOWN = 100;
const SHOWN_HEADS = 8;

export class AlertList {
  /** `onselect(alert)`: the reader wants its evidence. */
  constructor({ onselect }) {
    this.onselect = onselect;
    this.severity = "all";
    this.onlyOpen = false;
    this.most = MOST_SHOWN;
    this.severities = choice("severity", (value) => this.filter({ severity: value }));
    this.open = h("input", { type: "checkbox", onchange: () => this.filter({ onlyOpen: this.open.checked }) });
    this.list = h("ol", { class: "alerts" });
    this.more = h("button", { type: "button", class: "plain", onclick: () => this.filter({ most: Infinity }) });
    this.note = h("p", { class: "quiet" });
    this.filters = h(
      "div",
      { class: "controls" },
      this.severities.element,
      h("label", { class: "choice" }, this.open, h("span", {}, "open only")),
    );
    this.element = h("div", { class: "alert-list" }, this.filters, this.list, this.more, this.note);
  }

  filter(change) {
    Object.assign(this, change);
    this.show(this.alerts, this.selected, this.words);
  }

  /** `alerts` as `worstAlertsFirst` orders them; `words` say what there is to say where there are none. */
  show(alerts, selected, words) {
    const given = [alerts, selected, words, this.severity, this.onlyOpen, this.most];
    if (this.given && given.every((part, i) => part === this.given[i])) return;
    Object.assign(this, { alerts, selected, words, given });
    this.filters.hidden = alerts.length < 2;
    const present = SEVERITIES.filter((s) => alerts.some((a) => a.severity === s));
    if (this.severity !== "all" && !present.includes(this.severity)) this.severity = "all";
    const all = [["all", `all (${whole(alerts.length)})`]];
    this.severities.show(
      [...all, ...present.map((s) => [s, `${s} (${whole(alerts.filter((a) => a.severity === s).length)})`])],
      this.severity,
    );
    const known = alerts.filter(
      (a) => (this.severity === "all" || a.severity === this.severity) && !(this.onlyOpen && a.closed !== null),
    );
    const shown = known.slice(0, this.most);
    keepingFocus(this.list, () =>
      fill(
        this.list,
        shown.map((alert) => this.item(alert)),
      ),
    );
    this.element.style.setProperty("--rows", shown.length);
    this.list.hidden = !shown.length;
    this.more.hidden = known.length <= shown.length;
    this.more.textContent = `show all ${whole(known.length)} alerts`;
    this.note.hidden = shown.length > 0;
    this.note.textContent = alerts.length ? "No alert is like that." : words;
  }

  item(alert) {
    const isSelected = alert.key === this.selected;
    const where = alert.layer ? h("span", { title: alert.layer }, shorten(alert.layer, 30)) : "the whole run";
    const heads = alert.heads.length ? headsText(alert.heads) : null;
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: "alert",
          "data-focus": alert.key,
          "aria-current": isSelected ? "true" : null,
          onclick: () => this.onselect(alert),
        },
        h("span", { class: "alert-title" }, severityBadge(alert.severity), " ", alert.title),
        h(
          "span",
          { class: "alert-facts" },
          h("span", {}, alert.kind.replaceAll("_", " ")),
          h("span", {}, where),
          heads && h("span", {}, heads),
          h("span", {}, `since step ${whole(alert.opened)}`),
          h("span", { class: alert.closed === null ? "is-open" : null }, stateOf(alert)),
        ),
        alert.advice ? h("span", { class: "alert-advice" }, alert.advice.replaceAll("`", "")) : null,
      ),
    );
  }
}

/** Alerts in the order of the list. */
export function worstAlertsFirst(alerts) {
  const rank = (alert) =>
    SEVERITIES.includes(alert.severity) ? SEVERITIES.indexOf(alert.severity) : SEVERITIES.length;
  return [...alerts].sort((a, b) => rank(a) - rank(b) || a.opened - b.opened);
}

function headsText(heads) {
  if (heads.length === 1) return `head ${heads[0]}`;
  return heads.length > SHOWN_HEADS ? count(heads.length, "head") : `heads ${ranges(heads)}`;
}
