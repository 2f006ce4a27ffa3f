// Small signs that stand in several places.

import { h } from "./dom.js";
import { VERDICTS, count, whole } from "./words.js";

/** A run's verdict, as a coloured word. */
export function verdictBadge(card) {
  const verdict = card.verdict in VERDICTS ? card.verdict : "unknown";
  const text = card.problem ? "cannot be read" : card.pending ? "reading…" : VERDICTS[verdict];
  return h("span", { class: `badge ${verdict}` }, text);
}

/** An alert's severity, as a coloured word. */
export function severityBadge(severity) {
  const known = ["severe", "warning", "info"].includes(severity) ? severity : "info";
  return h("span", { class: `badge ${known}` }, severity);
}

/** That a run is still going on. */
export function liveBadge(card) {
  return card.is_live ? h("span", { class: "badge live" }, "live") : null;
}

/** `open`, or `closed at step 120`. */
export function stateOf(alert) {
  return alert.closed === null ? "open" : `closed at step ${whole(alert.closed)}`;
}

/** How many alerts a run has, the worst first: `7 severe, 1 warning`. */
export function alertCounts(card) {
  const parts = ["severe", "warning", "info"].filter((s) => card.alerts && card.alerts[s]);
  if (!parts.length) return "none";
  return parts.map((s) => (s === "warning" ? count(card.alerts[s], s) : `${whole(card.alerts[s])} ${s}`)).join(", ");
}
