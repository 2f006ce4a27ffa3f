// Runs compared: loss, entropy and σ_QK of each in one colour.

import { Chart, axisFor, line, titled } from "./charts.js";
import { h } from "./dom.js";
import { colour, runLine } from "./theme.js";
import { plain } from "./words.js";

const PANELS = [
  { title: "loss", of: (s) => s.loss },
  {
    title: "mean entropy / maximum (dotted: the lowest head)",
    of: (s) => ({ steps: s.share.steps, values: s.share.mean }),
    low: (s) => s.share.low,
    range: [0, 1.03],
  },
  { title: "largest σ_QK", of: (s) => s.sigma, canLog: true },
];
const NARROW = 820;

export class Compare {
  constructor() {
    this.chart = new Chart("Loss, entropy and largest σ_QK of the runs compared", 200);
    this.element = h("div", { class: "compare" }, this.chart.element);
  }

  /** `runs`: [{ name, summary }] in the order of their colours. */
  show(runs) {
    const isNarrow = this.element.clientWidth < NARROW;
    this.chart.height = isNarrow ? 560 : 200;
    const traces = [];
    const layout = { annotations: [], hovermode: "x unified", margin: { l: 40, r: 28, t: 24, b: 26 } };
    PANELS.forEach((panel, i) => {
      const nth = i ? String(i + 1) : "";
      const known = runs.filter(({ summary }) => panel.of(summary).steps.length);
      for (const { name, summary } of known) {
        const look = runLine(runs.findIndex((run) => run.summary === summary));
        const { steps, values } = panel.of(summary);
        const axes = { xaxis: `x${nth}`, yaxis: `y${nth}` };
        traces.push(line(name, steps, values, look, axes));
        if (panel.low) {
          traces.push(
            line(
              name,
              steps,
              panel.low(summary),
              { ...look, dash: "dot", width: 1 },
              { ...axes, hoverinfo: "skip", opacity: 0.7 },
            ),
          );
        }
      }
      const [from, to] = [i * 0.345, i * 0.345 + 0.31];
      const [bottom, top] = isNarrow ? [1 - (i + 1) * 0.36 + 0.08, 1 - i * 0.36] : [0, 1];
      layout[`xaxis${nth}`] = {
        domain: isNarrow ? [0, 1] : [from, to],
        anchor: `y${nth}`,
        matches: i ? "x" : undefined,
        tickformat: ",d",
        hoverformat: ",d",
        nticks: 6,
      };
      const axis = panel.canLog ? axisFor(...known.map(({ summary }) => panel.of(summary).values)) : {};
      layout[`yaxis${nth}`] = {
        domain: [Math.max(0, bottom), top],
        anchor: `x${nth}`,
        nticks: 5,
        range: panel.range,
        ...axis,
      };
      layout.annotations.push({
        text: plain(titled(panel.title, axis)),
        x: isNarrow ? 0 : from,
        y: top,
        xref: "paper",
        yref: "paper",
        xanchor: "left",
        yanchor: "bottom",
        showarrow: false,
        font: { size: 11.5, color: colour("ink") },
      });
    });
    this.chart.draw(traces, layout, "compared");
  }
}
