// One alert in full: what was seen, what drove it, what to do, and the attention map that was kept.

import { severityBadge, stateOf } from "./badge.js";
import { Chart } from "./charts.js";
import { fill, h, withCode } from "./dom.js";
import { SCALE, colour } from "./theme.js";
import { ranges, whole } from "./words.js";

const MAP_SIZE = 290;

export class Evidence {
  constructor() {
    this.chart = new Chart("", MAP_SIZE, false);
    this.caption = h("figcaption", {});
    this.figure = h("figure", { class: "attention-map" }, this.chart.element, this.caption);
    this.words = h("div", { class: "evidence-words" });
    this.measured = h("div", { class: "evidence-figures" });
    this.element = h("article", { class: "card evidence" }, this.words, this.figure, this.measured);
  }

  /** Say all but the map, which `drawMap` adds once it is there. */
  show(alert) {
    this.element.hidden = !alert;
    if (!alert) return;
    const heads = alert.heads.length ? `${alert.heads.length > 1 ? "heads" : "head"} ${ranges(alert.heads)}` : null;
    fill(
      this.words,
      h("h4", {}, severityBadge(alert.severity), " ", alert.title),
      h(
        "p",
        { class: "quiet" },
        [
          alert.kind.replaceAll("_", " "),
          alert.layer || "the whole run",
          heads,
          `opened at step ${whole(alert.opened)}`,
          `last changed at step ${whole(alert.updated)}`,
          stateOf(alert),
        ]
          .filter(Boolean)
          .join(" · "),
      ),
      h("p", { class: "message" }, withCode(alert.message)),
      alert.advice
        ? h("div", { class: "todo" }, h("h5", {}, "What to do"), h("p", { class: "message" }, withCode(alert.advice)))
        : null,
    );
    fill(
      this.measured,
      alert.evidence.length
        ? [
            h("h5", {}, "Measured"),
            h(
              "dl",
              { class: "figures" },
              alert.evidence.map(([label, text]) => h("div", {}, h("dt", {}, label), h("dd", {}, text))),
            ),
          ]
        : null,
    );
    this.figure.hidden = !alert.has_map;
    if (alert.has_map) this.caption.textContent = "Reading the attention map…";
  }

  drawMap({ map, alt }, alert) {
    const [queries, keys] = map.shape;
    const z = Array.from({ length: queries }, (_, i) => map.subarray(i * keys, (i + 1) * keys));
    this.caption.textContent = `${alt}. Each row is a query, each column a key; at step ${whole(alert.updated)}.`;
    this.chart.label(alt);
    const axis = { showgrid: false, nticks: 5, ticks: "outside", ticklen: 3, fixedrange: false, constrain: "domain" };
    this.chart.draw(
      [
        {
          type: "heatmap",
          z,
          colorscale: SCALE,
          zmin: 0,
          hovertemplate: "query %{y}, key %{x}: %{z:.3f}<extra></extra>",
          colorbar: { thickness: 8, outlinewidth: 0, tickfont: { size: 10, color: colour("quiet") }, nticks: 4 },
        },
      ],
      {
        margin: { l: 24, r: 8, t: 8, b: 24 },
        xaxis: { ...axis, title: { text: "key", font: { size: 10.5 }, standoff: 4 } },
        yaxis: {
          ...axis,
          title: { text: "query", font: { size: 10.5 }, standoff: 4 },
          autorange: "reversed",
          scaleanchor: "x",
        },
      },
      alert.key,
    );
  }

  mapFailed(error) {
    this.caption.textContent = error.message;
  }
}
