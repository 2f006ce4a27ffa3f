// The run's course in the form of the paper's Figure 1: alerts and loss above, a figure of the layers below.

import { Chart, axisFor, band, broken, line, stacked, stepLines, titled } from "./charts.js";
import { choice, fill, h, keepingFocus } from "./dom.js";
import { colour, depthColours, faded, severityColour } from "./theme.js";
import { SEVERITIES, plain, shortNames, shorten } from "./words.js";

const HEIGHT = 600;
const MOST_LAYERS = 24;
const LEGEND = 196; // pixels beside the panels, for the layers' names

export class Course {
  /** `oncolumn(name)`, `onlayers(places or null)`, `onstep(step)`, `onalert(alert)`: what the reader chose. */
  constructor({ oncolumn, onlayers, onstep, onalert }) {
    this.onlayers = onlayers;
    this.column = choice("layers' figure", oncolumn);
    this.chart = new Chart("", HEIGHT);
    this.chart.onclick = (point) =>
      point.data.meta === "alerts" ? onalert(this.alerts[point.pointNumber]) : onstep(point.x);
    this.remark = h("p", { class: "quiet" });
    this.boxes = h("div", { class: "layer-boxes" });
    this.chooser = h(
      "details",
      { class: "layer-chooser" },
      h("summary", {}, "choose layers"),
      this.boxes,
      h("button", { type: "button", class: "plain", onclick: () => onlayers(null) }, "as at first"),
    );
    this.element = h(
      "div",
      { class: "course" },
      h("div", { class: "controls" }, this.column.element),
      this.chart.element,
      this.remark,
      this.chooser,
    );
  }

  choose(overview, column, drawn) {
    const seen = new Set();
    const options = [...overview.columns, ...(overview.layer_columns || [])].filter(
      ({ name }) => !seen.has(name) && seen.add(name),
    );
    const names = overview.layers.map((layer) => layer.name);
    this.column.show(
      options.map(({ name, label }) => [name, label]),
      column,
    );
    this.chooser.hidden = overview.layers.length < 2;
    const places = new Set(drawn);
    const short = shortNames(names, 34);
    keepingFocus(this.boxes, () =>
      fill(
        this.boxes,
        names.map((name, place) => {
          const box = h("input", {
            type: "checkbox",
            checked: places.has(place),
            disabled: !places.has(place) && places.size >= MOST_LAYERS,
            "data-focus": `layer ${place}`,
            onchange: () => {
              if (box.checked) places.add(place);
              else places.delete(place);
              this.onlayers(places.size ? [...places].sort((a, b) => a - b) : null);
            },
          });
          return h("label", { class: "choice", title: name }, box, h("span", {}, short[place]));
        }),
      ),
    );
  }

  draw({ curves, column, layers, loss, alerts, step, lastStep, revision }) {
    this.alerts = alerts;
    this.remark.textContent = `Lines are means over a layer's heads, bands reach from the lowest head to the highest.${curves.remark ? ` Shown: ${curves.remark}.` : ""}`;
    const panels = [alertPanel(alerts, lastStep), lossPanel(loss), layersPanel(curves, column, layers)].filter(Boolean);
    const { traces, layout } = stacked(panels, HEIGHT, { margin: { l: 52, r: LEGEND, t: 26, b: 40 } });
    this.chart.label(`Loss and ${column.label} of ${curves.layers.length} layers over training steps`);
    this.chart.draw(traces, { ...layout, shapes: stepLines(alerts, step) }, revision);
  }

  move(step) {
    if (this.alerts) this.chart.mark(stepLines(this.alerts, step));
  }
}

/** A lane of alerts: each from its opening to its end. */
function alertPanel(alerts, lastStep) {
  if (!alerts.length) return null;
  const level = (alert) => SEVERITIES.length - 1 - Math.max(0, SEVERITIES.indexOf(alert.severity));
  const spans = SEVERITIES.map((severity) => {
    const own = alerts.filter((alert) => alert.severity === severity);
    return {
      type: "scatter",
      mode: "lines",
      hoverinfo: "skip",
      showlegend: false,
      line: { color: faded(severityColour(severity), 0.35), width: 4 },
      x: own.flatMap((alert) => [alert.opened, alert.closed ?? lastStep, null]),
      y: own.flatMap((alert) => [level(alert), level(alert), null]),
    };
  });
  const marks = {
    type: "scatter",
    mode: "markers",
    meta: "alerts",
    showlegend: false,
    x: alerts.map((a) => a.opened),
    y: alerts.map(level),
    marker: {
      symbol: "diamond",
      size: 9,
      color: alerts.map((a) => severityColour(a.severity)),
      line: { color: colour("card"), width: 1 },
    },
    customdata: alerts.map((alert) => plain(shorten(alert.title, 90))),
    hovertemplate: "%{customdata}<extra></extra>",
  };
  return {
    title: "alerts, from opening to end",
    weight: 0.42,
    traces: [...spans, marks],
    axis: { range: [-0.6, 2.6], tickvals: [2, 1, 0], ticktext: SEVERITIES, showgrid: false },
  };
}

function lossPanel(loss) {
  if (!loss || !loss.steps.length) return null;
  const finite = loss.values.filter(Number.isFinite);
  const traces = [
    line(
      "loss",
      loss.steps,
      loss.values,
      { color: colour("ink"), width: 1.2 },
      { connectgaps: false, showlegend: false },
    ),
  ];
  if (loss.broken.length)
    traces.push(broken(Array.from(loss.broken), finite.length ? finite.reduce((a, b) => Math.min(a, b)) : 0));
  return { title: "loss", weight: 1, traces };
}

function layersPanel(curves, column, layers) {
  const colours = depthColours(curves.layers.length);
  const axis =
    column.scale === "log" ? axisFor(...curves.layers.map((c) => c.low), ...curves.layers.map((c) => c.high)) : {};
  const bands = curves.layers.flatMap((curve, i) =>
    band(curve.steps, curve.low, curve.high, colours[i], 0.22 / Math.sqrt(curves.layers.length)),
  );
  const names = shortNames(
    layers.map((layer) => layer.name),
    24,
  );
  const means = curves.layers.map((curve, i) =>
    line(names[curve.layer], curve.steps, curve.mean, { color: colours[i], width: 2 }),
  );
  const maxima = distinct(curves.maximum).map((curve, i) =>
    line(
      "maximum",
      curve.steps,
      curve.mean,
      { color: colour("quiet"), dash: "dot", width: 1.4 },
      { showlegend: i === 0 },
    ),
  );
  const unit = column.unit ? `, ${column.unit}` : "";
  const isShare = column.scale === "share";
  return {
    title: titled(`${column.label}${unit}`, axis),
    weight: 2.2,
    legendBeside: true,
    traces: [...bands, ...maxima, ...means],
    axis: {
      ...axis,
      ...(isShare ? { range: [-0.02, 1.04], tickformat: ".0%" } : {}),
      ...(column.unit === "nats" ? { rangemode: "tozero" } : {}),
    },
  };
}

/** Of curves that lie on each other, the first. */
function distinct(curves) {
  const seen = new Set();
  return (curves || []).filter(({ mean }) => {
    const key = `${mean.length} ${mean[0]} ${mean[mean.length - 1]}`;
    return !seen.has(key) && seen.add(key);
  });
}
