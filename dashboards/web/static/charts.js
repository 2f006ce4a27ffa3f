// Plotly in the page's clothes: one look, one set of options, charts of several panels over one step axis.

import { h } from "./dom.js";
import { colour, faded, severityColour } from "./theme.js";
import { plain } from "./words.js";

const OPTIONS = {
  displaylogo: false,
  // Named one by one: among plotly's own there is one that sends the chart to a server elsewhere.
  modeBarButtons: [["toImage", "resetScale2d"]],
  plotlyServerURL: "",
};
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif';
const TOP = 26;
const BOTTOM = 40;
const GAP = 36;
const MOST_LINES = 40;

let plotly = Promise.resolve();

/** Charts wait for this promise of plotly's script; words need not. */
export function chartsWaitFor(script) {
  plotly = script;
}

/** A chart that fits its place. `label` says to those who cannot see it what it shows. */
export class Chart {
  constructor(label, height, hasTools = true) {
    this.hasTools = hasTools;
    this.element = h("div", { class: "chart", role: "figure", "aria-label": label, style: `height:${height}px` });
    this.onclick = null;
    this.isDrawn = false;
    new ResizeObserver(() => this.fit()).observe(this.element);
  }

  set height(pixels) {
    this.element.style.height = `${pixels}px`;
  }

  label(text) {
    this.element.setAttribute("aria-label", text);
  }

  /** Draw in the next frame, of several wishes until then the last; the reader's zoom stays while `revision` does. */
  draw(traces, layout, revision) {
    const isWaiting = this.wanted !== undefined;
    this.wanted = { traces, layout, revision };
    if (!isWaiting) plotly.then(() => requestAnimationFrame(() => this.drawWanted()));
  }

  async drawWanted() {
    const { traces, layout, revision } = this.wanted;
    this.wanted = undefined;
    const whole = { ...dressed(layout), uirevision: revision };
    await Plotly.react(this.element, traces, whole, { ...OPTIONS, displayModeBar: this.hasTools ? "hover" : false });
    if (!this.isDrawn) {
      this.isDrawn = true;
      this.element.on("plotly_click", (event) => this.onclick && this.onclick(event.points[0]));
    }
    this.fit();
  }

  /** Put other lines over what is drawn. */
  mark(shapes) {
    if (this.wanted) this.wanted.layout = { ...this.wanted.layout, shapes };
    else if (this.isDrawn) Plotly.relayout(this.element, { shapes });
  }

  fit() {
    const size = this.element._fullLayout;
    const { clientWidth: width, clientHeight: height } = this.element;
    if (this.isDrawn && size && width && (size.width !== width || size.height !== height)) {
      Plotly.relayout(this.element, { width, height });
    }
  }
}

function dressed(layout) {
  const axes = {};
  for (const [name, axis] of Object.entries(layout)) {
    if (/^[xy]axis/.test(name)) axes[name] = { ...axisLook(), ...axis };
  }
  return {
    font: { family: FONT, size: 11, color: colour("ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 30, t: TOP, b: BOTTOM },
    hoverlabel: {
      bgcolor: colour("card"),
      bordercolor: colour("line"),
      font: { color: colour("ink"), size: 12 },
      namelength: -1,
    },
    modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("ink") },
    dragmode: "zoom",
    showlegend: false,
    ...layout,
    ...axes,
  };
}

function axisLook() {
  return {
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zeroline: false,
    tickfont: { color: colour("quiet"), size: 10.5 },
    automargin: false,
    exponentformat: "power",
    showexponent: "all",
  };
}

/**
 * The layout of panels one above the other over one step axis.
 *
 * Of each panel: `title`, its share of the height `weight`, what else its `axis` is told, and `traces`, which are told
 * their axes and legends here. Returns { traces, layout }.
 */
export function stacked(panels, height, more) {
  const inner = height - TOP - BOTTOM;
  const gap = GAP / inner;
  const total = panels.reduce((sum, panel) => sum + (panel.weight || 1), 0);
  const unit = (1 - gap * (panels.length - 1)) / total;
  const layout = {
    xaxis: { title: stepTitle(), tickformat: ",d", anchor: `y${panels.length}`, hoverformat: ",d" },
    annotations: [],
    ...more,
  };
  const traces = [];
  let top = 1;
  panels.forEach((panel, i) => {
    const nth = i ? String(i + 1) : "";
    const bottom = Math.max(0, top - unit * (panel.weight || 1));
    layout[`yaxis${nth}`] = { domain: [bottom, top], nticks: 5, ...panel.axis };
    layout[`legend${nth}`] = {
      ...(panel.legendBeside
        ? { x: 1.02, xanchor: "left", y: top, yanchor: "top" }
        : { orientation: "h", x: 1, xanchor: "right", y: top, yanchor: "bottom" }),
      bgcolor: "rgba(0,0,0,0)",
      font: { size: 10.5, color: colour("quiet") },
      itemwidth: 30,
      tracegroupgap: 0,
      traceorder: "normal",
    };
    layout.annotations.push({
      text: plain(panel.title),
      x: 0,
      xref: "paper",
      xanchor: "left",
      y: top,
      yref: "paper",
      yanchor: "bottom",
      showarrow: false,
      font: { size: 11.5, color: colour("ink") },
    });
    for (const trace of panel.traces) traces.push({ ...trace, yaxis: `y${nth}`, legend: `legend${nth}` });
    top = bottom - gap;
  });
  return { traces, layout: { showlegend: true, hovermode: "x unified", ...layout } };
}

function stepTitle() {
  return { text: "training step", font: { size: 11, color: colour("quiet") }, standoff: 4 };
}

/** A line through values by step. */
export function line(name, steps, values, look, more) {
  return {
    type: "scatter",
    mode: steps.length > 1 ? "lines" : "markers",
    name: plain(name),
    x: steps,
    y: values,
    line: { width: 1.6, ...look },
    marker: { color: look.color, size: 5 },
    connectgaps: true,
    ...more,
  };
}

/** The band between two curves. */
export function band(steps, low, high, shade, alpha) {
  const edge = { type: "scatter", mode: "lines", x: steps, line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  return [
    { ...edge, y: low },
    { ...edge, y: high, fill: "tonexty", fillcolor: faded(shade, alpha) },
  ];
}

/** Crosses at the foot of a panel, where values were NaN or infinite. */
export function broken(steps, foot) {
  return {
    type: "scatter",
    mode: "markers",
    name: "not finite",
    x: steps,
    y: steps.map(() => foot),
    marker: { symbol: "x-thin-open", color: severityColour("severe"), size: 7, line: { width: 1.5 } },
    hovertemplate: "not finite<extra></extra>",
  };
}

/** A linear axis, or a logarithmic one where values spread so far that no other shows them all. */
export function axisFor(...series) {
  let low = Infinity;
  let high = 0;
  for (const values of series) {
    for (const value of values) {
      if (Number.isFinite(value)) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  }
  if (!(low > 0 && high / low > 30)) return { type: "linear" };
  return { type: "log", dtick: high / low > 300 ? Math.ceil(Math.log10(high / low) / 5) : "D2" };
}

/** A panel's title, which says where its axis is logarithmic. */
export function titled(text, axis) {
  return axis.type === "log" ? `${text} (log scale)` : text;
}

/** Vertical lines where alerts, the worst first, opened, of many the worst ones, and at the step that is looked at. */
export function stepLines(alerts, step) {
  const worst = new Map();
  for (const { opened, severity } of alerts)
    if (!worst.has(opened) && worst.size < MOST_LINES) worst.set(opened, severity);
  const opacity = worst.size > 12 ? 0.35 : 0.75;
  const marks = [...worst].map(([opened, severity]) => upright(opened, severityColour(severity), 1, "dash", opacity));
  if (step !== null && step !== undefined) marks.push(upright(step, colour("ink"), 1.25, "solid", 0.65));
  return marks;
}

function upright(step, color, width, dash, opacity) {
  return {
    type: "line",
    xref: "x",
    x0: step,
    x1: step,
    yref: "paper",
    y0: 0,
    y1: 1,
    opacity,
    layer: "above",
    line: { color, width, dash },
  };
}
