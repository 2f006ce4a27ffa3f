// Layers × heads at one step, coloured by a figure or by alerts. Alerted heads are outlined; a click or the arrow keys
// choose the head that is shown in full.

import { Chart } from "./charts.js";
import { h } from "./dom.js";
import { SCALE, colour, severityColour } from "./theme.js";
import { SEVERITIES, number, plain, reading } from "./words.js";

/** Not a column of the records: the worst alert that is open at the step. */
export const ALERT_COLUMN = {
  name: "alert",
  label: "alert",
  unit: "",
  scale: "alert",
  bad: "high",
  text: "The worst alert that stands open for a head at the step.",
};
const LEVELS = ["none", "info", "warning", "severe"];
const LETTER = 6.2; // pixels of a label's letter, about
const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class HeadsMap {
  /** `onselect(row)`: a head was chosen. */
  constructor({ onselect }) {
    this.onselect = onselect;
    this.chart = new Chart("Map of layers and heads", 300, false);
    this.chart.onclick = (point) => this.choose(point.x, point.y);
    this.element = h(
      "div",
      {
        class: "heads-map",
        tabindex: "0",
        role: "group",
        "aria-label": "Map of layers and heads: arrow keys choose a head",
        onkeydown: (event) => this.move(event),
      },
      this.chart.element,
    );
  }

  choose(head, line) {
    const row = this.rows.rowAt(line, head);
    if (row !== null) this.onselect(row);
  }

  move(event) {
    const by = KEYS[event.key];
    if (!by || this.row === null || !this.rows) return;
    event.preventDefault();
    const next = this.rows.step(this.row, ...by);
    if (next === this.row) return;
    this.row = next; // the next key may come before the map is drawn anew
    this.onselect(next);
  }

  /**
   * `values`: a figure for each row, or null while it is on its way; `levels`: for each row, the place in LEVELS of the
   * worst alert that stands open; `range`: of the values in the whole run.
   */
  show({ rows, column, values, range, levels, row, step, revision }) {
    Object.assign(this, { rows, row });
    const height = mapHeight(rows.lines.length);
    this.chart.height = height + 62;
    const isAlert = column.name === ALERT_COLUMN.name;
    const shown = isAlert ? levels : values;
    const scale = isAlert ? alertScale() : valueScale(column, range);
    const cell = { z: [], words: [] };
    rows.lines.forEach((line, y) => {
      const z = new Array(rows.width).fill(NaN);
      const words = new Array(rows.width).fill("");
      const name = plain(line.name) + (rows.hasCalls ? `, call ${line.call}` : "");
      for (let x = 0; x < rows.width; x++) {
        const at = rows.rowAt(y, x);
        if (at === null) continue;
        z[x] = column.scale === "log" ? Math.log10(shown[at]) : shown[at];
        const said = isAlert
          ? LEVELS[levels[at]]
          : Number.isNaN(shown[at])
            ? "not known here"
            : reading(shown[at], column);
        words[x] =
          `${name}<br>head ${x}: <b>${plain(said)}</b>${!isAlert && levels[at] ? `<br>alert: ${LEVELS[levels[at]]}` : ""}`;
      }
      cell.z.push(z);
      cell.words.push(words);
    });
    const gaps = height / rows.lines.length >= 9 && rows.width <= 64 ? 1 : 0;
    const heat = {
      type: "heatmap",
      z: cell.z,
      customdata: cell.words,
      hovertemplate: "%{customdata}<extra></extra>",
      hoverongaps: false,
      xgap: gaps,
      ygap: gaps,
      ...scale,
    };
    const left = 14 + LETTER * Math.max(...rows.lines.map((line) => label(line, rows).length));
    const marks = isAlert ? [] : outlines(rows, levels, height);
    this.chart.label(`Map of layers and heads, ${column.label} at step ${step}`);
    this.chart.draw(
      [heat, ...marks, ...chosen(rows, row)],
      {
        margin: { l: left, r: 8, t: 8, b: 40 },
        plot_bgcolor: colour("unknown-cell"),
        hovermode: "closest",
        xaxis: {
          title: { text: "head", font: { size: 11, color: colour("quiet") }, standoff: 4 },
          range: [-0.5, rows.width - 0.5],
          showgrid: false,
          dtick: everyNth(rows.width, 22),
          tick0: 0,
        },
        yaxis: { range: [rows.lines.length - 0.5, -0.5], showgrid: false, ...layerTicks(rows, height) },
      },
      revision,
    );
  }
}

/** For every row, the place in LEVELS of the worst alert that stands open between two steps. */
export function alertLevels(rows, alerts, from, to) {
  const levels = new Uint8Array(rows.many);
  for (const alert of alerts) {
    if (alert.opened > to || (alert.closed !== null && alert.closed <= from)) continue;
    const level = SEVERITIES.length - Math.max(0, SEVERITIES.indexOf(alert.severity));
    for (const row of alert.rows) levels[row] = Math.max(levels[row], level);
  }
  return levels;
}

function mapHeight(lines) {
  if (lines <= 20) return Math.max(90, lines * (lines <= 8 ? 36 : 27));
  return Math.min(720, Math.max(540, lines * 14));
}

function label(line, rows) {
  const name = rows.shortNames[line.layer];
  return rows.hasCalls ? `${name} ·${line.call}` : name;
}

function layerTicks(rows, height) {
  const every = everyNth(rows.lines.length, height / 13);
  const places = rows.lines.map((_, i) => i).filter((i) => i % every === 0);
  return { tickmode: "array", tickvals: places, ticktext: places.map((i) => plain(label(rows.lines[i], rows))) };
}

/** One of how many things to name, where there is room for `most`. */
function everyNth(many, most) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 500].find((n) => many / n <= most) || 1000;
}

function valueScale(column, { low, high }) {
  const bar = { thickness: 10, outlinewidth: 0, tickfont: { size: 10.5, color: colour("quiet") }, nticks: 6, len: 1 };
  if (column.scale === "share") return { colorscale: SCALE, zmin: 0, zmax: 1, colorbar: { ...bar, tickformat: ".0%" } };
  if (low === null || high === null) return { colorscale: SCALE, showscale: false };
  if (column.scale !== "log" || low <= 0)
    return { colorscale: SCALE, zmin: low, zmax: high > low ? high : low + 1, colorbar: bar };
  const [from, to] = [Math.log10(low), Math.max(Math.log10(high), Math.log10(low) + 0.01)];
  const ticks = Array.from({ length: 5 }, (_, i) => from + ((to - from) * i) / 4);
  return {
    colorscale: SCALE,
    zmin: from,
    zmax: to,
    colorbar: { ...bar, tickvals: ticks, ticktext: ticks.map((t) => number(10 ** t)) },
  };
}

function alertScale() {
  const colours = [colour("no-alert"), ...["info", "warning", "severe"].map(severityColour)];
  return {
    zmin: -0.5,
    zmax: 3.5,
    colorscale: colours.flatMap((c, i) => [
      [i / 4, c],
      [(i + 1) / 4, c],
    ]),
    colorbar: {
      thickness: 10,
      outlinewidth: 0,
      tickvals: [0, 1, 2, 3],
      ticktext: LEVELS,
      tickfont: { size: 10.5, color: colour("quiet") },
    },
  };
}

/** Alerted cells in a light and a coloured line; where lines are too thin for that, a mark beside the line. */
function outlines(rows, levels, height) {
  const isThin = height / rows.lines.length < 7;
  return [1, 2, 3].flatMap((level) => {
    const cells = [];
    for (let row = 0; row < rows.many; row++) if (levels[row] === level) cells.push(row);
    if (!cells.length) return [];
    const look = severityColour(LEVELS[level]);
    if (isThin) return [edgeMarks([...new Set(cells.map((row) => rows.lineOf[row]))], look)];
    const path = boxes(spans(rows, cells), 0.1);
    return [overlay(path, colour("halo"), 3.5), overlay(path, look, 1.75)];
  });
}

function edgeMarks(lines, look) {
  return {
    type: "scatter",
    mode: "markers",
    x: lines.map(() => -0.5),
    y: lines,
    cliponaxis: false,
    hoverinfo: "skip",
    marker: { symbol: "triangle-right", size: 11, color: look, line: { color: colour("halo"), width: 1 } },
  };
}

function chosen(rows, row) {
  const path = boxes(row === null || row === undefined ? [] : spans(rows, [row]), 0);
  return [overlay(path, colour("chosen-halo"), 4.5), overlay(path, colour("chosen"), 2)];
}

/** Cells that lie side by side as one span: [line, first column, last column]. */
function spans(rows, cells) {
  const found = [];
  for (const row of [...cells].sort((a, b) => rows.lineOf[a] - rows.lineOf[b] || rows.head[a] - rows.head[b])) {
    const [line, head] = [rows.lineOf[row], rows.head[row]];
    const last = found[found.length - 1];
    if (last && last[0] === line && last[2] === head - 1) last[2] = head;
    else found.push([line, head, head]);
  }
  return found;
}

function boxes(found, inset) {
  const path = { x: [], y: [] };
  const [across, down] = [0.48 - inset, 0.46 - inset];
  for (const [line, first, last] of found) {
    const [left, right, top, bottom] = [first - across, last + across, line - down, line + down];
    path.x.push(left, right, right, left, left, null);
    path.y.push(top, top, bottom, bottom, top, null);
  }
  return path;
}

function overlay(path, look, width) {
  return {
    type: "scatter",
    mode: "lines",
    ...path,
    line: { color: look, width },
    hoverinfo: "skip",
    cliponaxis: false,
  };
}
