// One head in full: entropy between its floor and its maximum, what drives it, and the loss, over one step axis.

import { Chart, axisFor, band, broken, line, stacked, stepLines, titled } from "./charts.js";
import { choice, h } from "./dom.js";
import { colour } from "./theme.js";
import { number, reading } from "./words.js";

const PANEL_HEIGHT = 125;
const MOST_HEIGHT = 900;

export class HeadPanel {
  /** `onselect(row)`: a head was chosen; `onstep(step)`: a place on the step axis was. */
  constructor({ onselect, onstep }) {
    this.onselect = onselect;
    const choose = (part) => (value) => this.chosen(part, Number(value));
    this.layer = choice("layer", choose(0));
    this.call = choice("call", choose(1));
    this.head = choice("head", choose(2));
    this.chart = new Chart("", 5 * PANEL_HEIGHT);
    this.chart.onclick = (point) => onstep(point.x);
    this.note = h("p", { class: "quiet" });
    this.element = h(
      "div",
      { class: "head-panel" },
      h("div", { class: "controls" }, this.layer.element, this.call.element, this.head.element),
      this.note,
      this.chart.element,
    );
  }

  chosen(part, value) {
    const wanted = this.rows.places(this.row);
    wanted[part] = value;
    const [layer, call] = wanted;
    const nearest = [wanted, [layer, call, 0], [layer, 0, wanted[2]], [layer, 0, 0]]
      .map((places) => this.rows.find(places))
      .find((row) => row !== null);
    const any = this.rows.layer.indexOf(layer);
    this.onselect(nearest ?? (any >= 0 ? any : this.row));
  }

  choose(rows, row) {
    Object.assign(this, { rows, row });
    const [layer, call] = rows.places(row);
    const own = Array.from(rows.layer.keys()).filter((i) => rows.layer[i] === layer);
    const calls = [...new Set(own.map((i) => rows.call[i]))];
    const heads = own.filter((i) => rows.call[i] === call).map((i) => rows.head[i]);
    const named = [...new Set(rows.layer)].map((place) => [String(place), rows.longerNames[place]]);
    this.layer.show(named, String(layer));
    this.call.show(
      calls.map((c) => [String(c), String(c)]),
      String(call),
    );
    this.call.element.hidden = calls.length < 2;
    this.head.show(
      heads.map((n) => [String(n), String(n)]),
      String(rows.head[row]),
    );
  }

  /** `head` and `loss` as the source gives them; `alerts` those that name this head or the whole run. */
  draw({ head, loss, alerts, step, height, revision }) {
    this.alerts = alerts;
    this.note.hidden = !head.broken.length;
    this.note.textContent = head.broken.length
      ? `Entropy was not finite at ${head.broken.length === 100 ? "100 or more" : number(head.broken.length)} of the measured steps.`
      : "";
    const panels = [
      entropyPanel(head),
      logitPanel(head),
      sigmaPanel(head),
      gradientPanel(head),
      lossPanel(loss),
    ].filter(Boolean);
    this.panels = panels.length;
    this.height = fitting(height, this.panels);
    this.chart.height = this.height;
    const { traces, layout } = stacked(panels, this.height);
    this.chart.label(
      `Head ${head.head} of ${head.layer} over training steps: ${panels.map((p) => p.title).join("; ")}`,
    );
    this.chart.draw(traces, { ...layout, shapes: stepLines(alerts, step) }, revision);
  }

  /** Pixels of what stands above the chart. */
  get above() {
    return this.chart.element.offsetTop - this.element.offsetTop;
  }

  wouldDiffer(height) {
    return this.height !== undefined && Math.abs(fitting(height, this.panels) - this.height) > 12;
  }

  move(step) {
    if (this.alerts) this.chart.mark(stepLines(this.alerts, step));
  }
}

function fitting(height, panels) {
  return Math.min(MOST_HEIGHT, Math.max((panels + 0.5) * PANEL_HEIGHT, height));
}

function known(series, name) {
  return series[name] || { steps: new Float64Array(0), values: new Float32Array(0) };
}

function lines(series, wanted) {
  return wanted
    .filter(([name]) => series[name])
    .map(([name, text, color, more]) => {
      const { visible, ...look } = more || {};
      return line(text, series[name].steps, series[name].values, { color, ...look }, visible ? { visible } : {});
    });
}

function entropyPanel({ series, broken: gone }) {
  const quiet = colour("quiet");
  const floor = known(series, "floor_row");
  const maximum = known(series, "max_entropy");
  const between =
    floor.steps.length && floor.steps.length === maximum.steps.length
      ? band(floor.steps, floor.values, maximum.values, colour("blue"), 0.07)
      : [];
  const drawn = lines(series, [
    ["max_entropy", "maximum", quiet, { dash: "dot" }],
    ["entropy", "entropy", colour("blue"), { width: 2.4 }],
    ["floor_row", "row floor", colour("orange"), { dash: "dash" }],
    ["floor_activation", "q·k floor", colour("green"), { dash: "dashdot" }],
    ["floor_weights", "weight floor", colour("pink"), { dash: "dot", visible: "legendonly" }],
  ]);
  const most = Math.max(
    0,
    ...[...known(series, "max_entropy").values, ...known(series, "entropy").values].filter(Number.isFinite),
  );
  const crosses = gone.length ? [broken(Array.from(gone), 0)] : [];
  return {
    title: "entropy, nats",
    weight: 1.9,
    axis: { range: [-0.03 * (most || 1), 1.06 * (most || 1)] },
    traces: [...between, ...drawn, ...crosses],
  };
}

function logitPanel({ series }) {
  if (!series.max_logit) return null;
  const axis = axisFor(series.max_logit.values);
  return {
    title: titled("largest logit", axis),
    axis,
    traces: lines(series, [["max_logit", "largest logit", colour("blue")]]).map(unlisted),
  };
}

function sigmaPanel({ series }) {
  const traces = lines(series, [
    ["sigma_qk", "σ_QK", colour("blue"), { width: 2 }],
    ["sigma_q", "σ(W_Q)", colour("orange")],
    ["sigma_k", "σ(W_K)", colour("green")],
  ]);
  if (!traces.length) return null;
  const axis = axisFor(...traces.map((trace) => trace.y));
  return { title: titled("spectral norms", axis), axis, traces };
}

function gradientPanel({ layer_series: series }) {
  const traces = lines(series, [
    ["grad_linf", "largest", colour("blue")],
    ["grad_l2", "norm", colour("sky")],
    ["update_sigma", "update σ", colour("orange")],
  ]);
  if (!traces.length) return null;
  const axis = axisFor(...traces.map((trace) => trace.y));
  return { title: titled("gradient and update of the layer", axis), axis, traces };
}

function lossPanel(loss) {
  if (!loss || !loss.steps.length) return null;
  const traces = [
    unlisted(line("loss", loss.steps, loss.values, { color: colour("ink"), width: 1.2 }, { connectgaps: false })),
  ];
  if (loss.broken.length) traces.push(broken(Array.from(loss.broken), lowest(loss.values)));
  return { title: "loss", traces };
}

function lowest(values) {
  const finite = values.filter(Number.isFinite);
  return finite.length ? finite.reduce((a, b) => Math.min(a, b)) : 0;
}

function unlisted(trace) {
  return { ...trace, showlegend: false };
}

/** What is known of a head at a step, in words, for a list beside the map. */
export function readingsAt(head, columns, step) {
  return columns
    .filter((column) => head.series[column.name])
    .map((column) => {
      const { steps, values } = head.series[column.name];
      let value = NaN;
      for (let i = 0; i < steps.length && steps[i] <= step; i++) if (!Number.isNaN(values[i])) value = values[i];
      return [column.label, reading(value, column)];
    });
}
