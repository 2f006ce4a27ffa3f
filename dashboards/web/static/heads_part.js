// The heads of a run: the map over the step slider, what one head says at that step, and this head in full.

import { choice, debounced, fill, h, latest } from "./dom.js";
import { HeadPanel, readingsAt } from "./head_panel.js";
import { ALERT_COLUMN, HeadsMap, alertLevels } from "./heads_map.js";
import { Slider, positionOf } from "./slider.js";
import { whole } from "./words.js";

export class HeadsPart {
  /** `go(change)`: change the page's state; `failed(error)`; `isNow(want)`: whether its run is still the one shown. */
  constructor(source, { go, failed, isNow }) {
    this.go = go;
    this.askGrid = latest(
      ({ id, column, position }) => source.grid(id, column, position),
      (grid, want) => isNow(want) && this.showGrid(grid),
      failed,
    );
    this.askHead = latest(
      ({ id, row }) => source.head(id, row),
      (head, want) => isNow(want) && this.showHead(head),
      failed,
    );
    this.readGrid = debounced(() => this.wantGrid(), 15);
    // The map first: a head's figures are many, and a run answers one question at a time.
    this.readHead = debounced(() => this.askHead({ id: this.run.id, row: this.row }), 60);
    this.build();
  }

  build() {
    const goTo = (row) => this.go({ head: this.run.rows.places(row) });
    this.colour = choice("coloured by", (colour) => this.go({ colour }));
    this.colourWords = h("p", { class: "quiet" });
    this.slider = new Slider({ onmove: (position) => this.moveTo(position) });
    this.map = new HeadsMap({ onselect: goTo });
    this.reading = h("dl", { class: "figures readings" });
    this.readingTitle = h("h5", {});
    this.panel = new HeadPanel({ onselect: goTo, onstep: (step) => this.go({ step: Math.max(0, Math.round(step)) }) });
    this.mapColumn = h(
      "div",
      { class: "map-column" },
      h("div", { class: "controls" }, this.colour.element),
      this.slider.element,
      this.map.element,
      this.colourWords,
      h("div", { class: "card reading" }, this.readingTitle, this.reading),
    );
    this.element = h("div", { class: "two heads-two" }, this.mapColumn, this.panel.element);
  }

  /** Show the step, the head and the colour that the state names, and ask for what that needs. */
  update(run, state, alert) {
    const { id, version, overview, rows, alerts } = run;
    const { positions } = overview;
    if (!this.run || this.run.id !== id) this.head = this.loss = null;
    this.run = run;
    const columns = [...overview.columns, ALERT_COLUMN];
    this.column = columns.find(({ name }) => name === state.colour) || columns[0];
    const options = columns.map(({ name, label }) => [name, label]);
    this.colour.show(options, this.column.name);
    this.colourWords.textContent = this.column.text;
    this.position = state.step === null ? positions.length - 1 : positionOf(positions, state.step);
    this.row = chosenRow(run, state, alert);
    this.slider.show(positions, this.position, alerts, overview.last_step, overview.measured > positions.length);
    this.panel.choose(rows, this.row);
    this.once("grid", [id, version, this.column.name, this.position, this.row], () => this.readGrid());
    this.once("head", [id, version, this.row], () => this.readHead());
    this.once("step", [id, this.step], () => this.panel.move(this.step));
  }

  /** Do what is needed for something, unless that was done for the same. */
  once(what, key, act) {
    const text = JSON.stringify(key);
    this.done ||= {};
    if (this.done[what] !== text) act();
    this.done[what] = text;
  }

  /** Ask for all anew with the next update. */
  forget() {
    this.done = {};
  }

  /** The step that is looked at. */
  get step() {
    return this.run.overview.positions[this.position];
  }

  /** The last step that the slider's position stands for. */
  get end() {
    const { positions, last_step: last } = this.run.overview;
    return this.position + 1 < positions.length ? positions[this.position + 1] - 1 : last;
  }

  moveTo(position) {
    const { positions } = this.run.overview;
    this.go({ step: position === positions.length - 1 ? null : positions[position] });
  }

  wantGrid() {
    if (this.column.name === ALERT_COLUMN.name) this.drawMap(null);
    else this.askGrid({ id: this.run.id, column: this.column.name, position: this.position });
  }

  showGrid(grid) {
    if (grid.column === this.column.name && grid.values.length === this.run.rows.many) this.drawMap(grid);
  }

  drawMap(grid) {
    const { id, rows, alerts } = this.run;
    this.map.show({
      rows,
      column: this.column,
      values: grid && grid.values,
      range: grid || {},
      levels: alertLevels(rows, alerts, this.step, this.end),
      row: this.row,
      step: this.step,
      revision: id,
    });
    this.showReading();
    if (this.panel.wouldDiffer(this.height)) this.drawHead();
  }

  showHead(head) {
    this.head = head;
    this.drawHead();
    this.showReading();
  }

  showLoss(loss) {
    this.loss = loss;
    if (this.run) this.drawHead();
  }

  /** Such that the head's panels end where the map's column does. */
  get height() {
    return this.mapColumn.offsetHeight - this.panel.above;
  }

  drawHead() {
    if (!this.head || !this.loss || this.head.row !== this.row) return;
    const { id, alerts } = this.run;
    this.panel.draw({
      head: this.head,
      loss: this.loss,
      alerts: alerts.filter((alert) => !alert.layer || alert.rows.includes(this.row)),
      step: this.step,
      height: this.height,
      revision: `${id} ${this.row}`,
    });
  }

  showReading() {
    if (!this.head || this.head.row !== this.row) return;
    const { rows, overview } = this.run;
    this.readingTitle.textContent = `${rows.name(this.row)} at step ${whole(this.step)}`;
    const readings = readingsAt(this.head, overview.columns, this.step);
    fill(
      this.reading,
      readings.map(([label, text]) => h("div", {}, h("dt", {}, label), h("dd", {}, text))),
    );
  }
}

/** The head that the state names or, if it names none, the worst one of an alert or of the run. */
function chosenRow({ rows, overview }, { head }, alert) {
  const given = head && rows.find(head);
  const ill = alert && (alert.worst_row ?? alert.rows[0]);
  return given ?? ill ?? overview.lowest_share?.row ?? 0;
}
