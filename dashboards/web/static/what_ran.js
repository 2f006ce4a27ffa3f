// What ran and what was measured, and all advice at once: for those who look closer.

import { h, withCode } from "./dom.js";

const MOST_REASONS = 6;
const MOST_PLANS = 100;

export function whatRan({ facts, plan, advice }) {
  return [
    advice.length > 1
      ? h("details", {}, h("summary", {}, "All advice for this run"), h("ol", { class: "advice" }, advice.map(piece)))
      : null,
    facts.length || plan.length
      ? h(
          "details",
          {},
          h("summary", {}, "What ran, and what was measured"),
          h("h4", {}, "The run"),
          pairs(facts),
          plan.length
            ? [h("h4", {}, "Layers"), pairs(plan.slice(0, MOST_PLANS)), more(plan.length - MOST_PLANS, "layer")]
            : null,
        )
      : null,
    h(
      "details",
      {},
      h("summary", {}, "How to read this page"),
      h(
        "dl",
        { class: "facts" },
        WORDS.flatMap(([term, text]) => [h("dt", {}, term), h("dd", {}, text)]),
      ),
    ),
  ];
}

const WORDS = [
  [
    "Entropy",
    "How spread out attention is: −Σ a log a over the keys of a query, in nats, the mean over queries. Its maximum, log n for n keys, is uniform attention; 0 is attention on a single key.",
  ],
  [
    "Collapse",
    "Entropy that falls far below where the same head was, and stays there. It goes with a loss that stalls, oscillates or diverges. A head that was sharp from the start is no collapse.",
  ],
  ["σ_QK", "The spectral norm of a head's W_K W_Qᵀ. The larger it is, the sharper attention can become."],
  [
    "Floors",
    "Entropy cannot fall below them (Theorem 3.1 of Zhai et al., 2023, on centred logits). A floor near its maximum rules a collapse out; one near zero permits it, no more.",
  ],
  [
    "Keys",
    "Tab moves between parts. On the map, arrow keys choose a head; on the slider they move the step. The address keeps what you look at: send it to a colleague who has the page open.",
  ],
];

function piece({ text, reasons }) {
  return h(
    "li",
    {},
    h("p", { class: "message" }, withCode(text)),
    h(
      "ul",
      { class: "quiet" },
      reasons.slice(0, MOST_REASONS).map((reason) => h("li", {}, reason)),
      reasons.length > MOST_REASONS ? h("li", {}, `and ${reasons.length - MOST_REASONS} more`) : null,
    ),
  );
}

function pairs(rows) {
  return h(
    "dl",
    { class: "facts" },
    rows.flatMap(([key, text]) => [h("dt", {}, key), h("dd", {}, text)]),
  );
}

function more(many, what) {
  return many > 0 ? h("p", { class: "quiet" }, `and ${many} more ${what}s`) : null;
}
