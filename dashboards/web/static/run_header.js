// What a run came to, in words, before anything is drawn; and what there is to say where nothing can be.

import { alertCounts, liveBadge, verdictBadge } from "./badge.js";
import { fill, h } from "./dom.js";
import { count, whole } from "./words.js";

export class RunHeader {
  constructor() {
    this.title = h("h2", { id: "run-title" });
    this.words = h("p", { class: "lead" });
    this.facts = h("p", { class: "quiet" });
    this.problems = h("div", { class: "problems", role: "note" });
    this.empty = h("p", { class: "empty" });
    this.elements = [this.title, this.words, this.facts, this.problems, this.empty];
  }

  /** `card`: of the list of runs; of a run that can be read, `overview` says the rest. */
  show(card, overview) {
    fill(this.title, card.name, " ", verdictBadge(card), " ", liveBadge(card));
    this.words.textContent = (overview && overview.words) || "";
    this.facts.textContent = overview ? factsOf(card, overview) : "";
    const problems = overview ? overview.problems : [];
    this.problems.hidden = !problems.length;
    const listed = problems.map((text) => h("li", {}, text));
    fill(this.problems, h("strong", {}, "Not everything could be read"), h("ul", {}, listed));
    const text = whyEmpty(card, overview);
    this.empty.hidden = !text;
    this.empty.textContent = text;
  }
}

function factsOf(card, { model, layers, heads, measured, first_step: first, last_step: last }) {
  const facts = [
    model,
    layers.length ? `${count(layers.length, "layer")}, ${count(heads, "head")}` : null,
    first === null ? null : `steps ${whole(first)} to ${whole(last)}`,
    `${count(measured, "step")} measured`,
    `alerts: ${alertCounts(card)}`,
  ];
  return facts.filter(Boolean).join(" · ");
}

function whyEmpty(card, overview) {
  if (!overview) return card.problem || "This run has not been read yet.";
  if (overview.positions.length) return "";
  return overview.is_live
    ? "Nothing has been measured yet. Figures appear here as soon as the run writes them."
    : "Nothing was measured in this run.";
}
