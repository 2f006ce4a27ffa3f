// Everything about one run: its verdict, alerts and their evidence, the map, one head, the layers, what ran.

import { AlertList, worstAlertsFirst } from "./alerts.js";
import { alertCounts, liveBadge, verdictBadge } from "./badge.js";
import { Course } from "./course.js";
import { choice, debounced, fill, h, latest } from "./dom.js";
import { Evidence } from "./evidence.js";
import { HeadPanel, readingsAt } from "./head_panel.js";
import { ALERT_COLUMN, HeadsMap, alertLevels } from "./heads_map.js";
import { Rows } from "./rows.js";
import { Slider, positionOf } from "./slider.js";
import { count, whole } from "./words.js";
import { whatRan } from "./what_ran.js";

export class RunSection {
  /** `go(change)`: change the page's state; `announce(text)`: say something to those who do not see the page. */
  constructor(source, { go, announce }) {
    Object.assign(this, { source, go, announce });
    this.run = null;
    this.build();
    const failed = (error) => this.fail(error);
    this.askGrid = latest(({ id, column, position }) => source.grid(id, column, position), (grid, want) => this.isNow(want) && this.showGrid(grid), failed);
    this.askHead = latest(({ id, row }) => source.head(id, row), (head, want) => this.isNow(want) && this.showHead(head), failed);
    this.askCurves = latest(({ id, column, layers }) => source.curves(id, column, layers), (curves, want) => this.isNow(want) && this.showCurves(curves), failed);
    this.askLoss = latest(({ id }) => source.scalar(id, "loss"), (loss, want) => this.isNow(want) && this.showLoss(loss), failed);
    this.askMap = latest(({ id, alert }) => source.attentionMap(id, alert.key), (map, want) => this.isNow(want) && this.alert.key === want.alert.key && this.evidence.drawMap(map, want.alert), (error) => this.evidence.mapFailed(error));
    this.readGrid = debounced(() => this.wantGrid(), 15);
  }

  build() {
    const goTo = (row) => this.go({ head: this.run.rows.places(row) });
    const toStep = (step) => this.go({ step: Math.max(0, Math.round(step)) });
    this.alertList = new AlertList({ onselect: (alert) => this.openAlert(alert) });
    this.evidence = new Evidence();
    this.colour = choice("coloured by", (colour) => this.go({ colour }));
    this.colourWords = h("p", { class: "quiet" });
    this.slider = new Slider({ onmove: (position) => this.moveTo(position) });
    this.map = new HeadsMap({ onselect: goTo });
    this.reading = h("dl", { class: "figures readings" });
    this.readingTitle = h("h5", {});
    this.headPanel = new HeadPanel({ onselect: goTo, onstep: toStep });
    this.course = new Course({
      oncolumn: (curve) => this.go({ curve }), onlayers: (layers) => this.go({ layers }), onstep: toStep, onalert: (alert) => this.openAlert(alert),
    });
    this.title = h("h2", { id: "run-title" });
    this.words = h("p", { class: "lead" });
    this.facts = h("p", { class: "quiet" });
    this.problems = h("div", { class: "problems", role: "note" });
    this.empty = h("p", { class: "empty" });
    this.mapColumn = h("div", { class: "map-column" },
      h("div", { class: "controls" }, this.colour.element), this.slider.element, this.map.element, this.colourWords,
      h("div", { class: "card reading" }, this.readingTitle, this.reading));
    this.measured = h("div", {},
      part("alerts", "Alerts", h("div", { class: "two alerts-two" }, this.alertList.element, this.evidence.element)),
      part("heads", "Heads", h("div", { class: "two heads-two" }, this.mapColumn, this.headPanel.element)),
      part("layers", "Layers", this.course.element));
    this.ran = h("div", {});
    this.element = h("section", { class: "run", "aria-labelledby": "run-title" }, this.title, this.words, this.facts, this.problems, this.empty, this.measured, this.ran);
  }

  /** Take a run up, or read it anew; `state()` gives the page's state when it is there. */
  async load(card, state) {
    const isOther = !this.run || this.run.id !== card.id;
    this.wanted = card.id;
    if (card.problem || card.pending) return this.showWithout(card);
    let overview;
    try {
      overview = await this.source.overview(card.id);
    } catch (error) {
      if (this.wanted === card.id) this.fail(error);
      return undefined;
    }
    if (this.wanted !== card.id) return undefined;
    const before = isOther ? null : this.run;
    this.run = { id: card.id, version: card.version, overview, rows: new Rows(overview), alerts: worstAlertsFirst(overview.alerts) };
    if (isOther) this.grid = this.head = this.curves = this.loss = null;
    if (before) this.tellNewAlerts(before.alerts);
    this.showHeader(overview, card);
    this.update(state());
    return undefined;
  }

  /** Show what the state says, and ask for what that needs. */
  update(state) {
    if (!this.run) return;
    this.state = state;
    const { id, overview, rows, alerts } = this.run;
    const { positions } = overview;
    const words = overview.measured ? "No alert: nothing in this run asks for action." : "";
    this.alert = alerts.find((alert) => alert.key === state.alert) || alerts[0] || null;
    this.alertList.show(alerts, this.alert && this.alert.key, words);
    const shown = JSON.stringify([id, this.alert]);
    if (this.shownAlert !== shown) {
      this.evidence.show(this.alert);
      if (this.alert && this.alert.has_map) this.askMap({ id, alert: this.alert });
      this.shownAlert = shown;
    }
    if (!positions.length || !rows.many) return;
    const columns = [...overview.columns, ALERT_COLUMN];
    this.column = columns.find(({ name }) => name === state.colour) || columns[0];
    this.colour.show(columns.map(({ name, label }) => [name, label]), this.column.name);
    this.colourWords.textContent = this.column.text;
    this.position = state.step === null ? positions.length - 1 : positionOf(positions, state.step);
    this.row = this.chooseRow(state);
    this.slider.show(positions, this.position, alerts, overview.last_step);
    this.headPanel.choose(rows, this.row);
    this.readGrid();
    const newRow = `${id} ${this.run.version} ${this.row}`;
    if (this.askedRow !== newRow) this.askHead({ id, row: this.row });
    else this.moveMarks();
    this.askedRow = newRow;
    this.updateCurves(state);
  }

  updateCurves(state) {
    const { id, version, overview } = this.run;
    const known = [...overview.columns, ...(overview.layer_columns || [])];
    this.curveColumn = known.find(({ name }) => name === state.curve) || known.find(({ name }) => name === "entropy") || known[0];
    const layers = state.layers && state.layers.filter((place) => place < overview.layers.length);
    const asked = `${id} ${version} ${this.curveColumn.name} ${layers}`;
    if (this.askedCurves !== asked) this.askCurves({ id, column: this.curveColumn.name, layers: layers && layers.length ? layers : null });
    this.askedCurves = asked;
    if (this.askedLoss !== `${id} ${version}`) this.askLoss({ id });
    this.askedLoss = `${id} ${version}`;
  }

  chooseRow({ head }) {
    const { rows, overview } = this.run;
    const given = head && rows.find(head);
    if (given !== null && given !== undefined) return given;
    const ill = this.alert && (this.alert.worst_row ?? this.alert.rows[0]);
    return ill ?? (overview.lowest_share ? overview.lowest_share.row : 0);
  }

  openAlert(alert) {
    const { rows } = this.run;
    const row = alert.worst_row ?? alert.rows[0];
    this.go({ alert: alert.key, step: alert.opened, ...(row === undefined || row === null ? {} : { head: rows.places(row) }) });
  }

  moveTo(position) {
    const { positions } = this.run.overview;
    this.go({ step: position === positions.length - 1 ? null : positions[position] });
  }

  isNow({ id }) {
    return this.run !== null && this.run.id === id && this.wanted === id;
  }

  /** The step that is looked at; null where nothing was measured. */
  get step() {
    return this.run.overview.positions[this.position] ?? null;
  }

  wantGrid() {
    if (this.column.name === ALERT_COLUMN.name) this.drawMap(null);
    else this.askGrid({ id: this.run.id, column: this.column.name, position: this.position });
  }

  showGrid(grid) {
    this.grid = grid;
    if (grid.column === this.column.name && grid.values.length === this.run.rows.many) this.drawMap(grid);
  }

  drawMap(grid) {
    const { id, overview, rows, alerts } = this.run;
    const { positions } = overview;
    const end = this.position + 1 < positions.length ? positions[this.position + 1] - 1 : overview.last_step;
    const levels = alertLevels(rows, alerts, this.step, end);
    this.map.show({ rows, column: this.column, values: grid && grid.values, range: grid || {}, levels, row: this.row, step: this.step, revision: id });
    this.showReading();
    if (this.headPanel.wouldDiffer(this.headHeight)) this.drawHead();
  }

  showHead(head) {
    this.head = head;
    this.drawHead();
    this.showReading();
  }

  showLoss(loss) {
    this.loss = loss;
    this.drawHead();
    this.drawCourse();
  }

  showCurves(curves) {
    this.curves = curves;
    this.drawCourse();
  }

  /** Such that the head's panels end where the map's column does. */
  get headHeight() {
    return this.mapColumn.offsetHeight - this.headPanel.above;
  }

  drawHead() {
    if (!this.head || !this.loss || this.head.row !== this.row) return;
    const { id, alerts } = this.run;
    const own = alerts.filter((alert) => !alert.layer || alert.rows.includes(this.row));
    this.headPanel.draw({ head: this.head, loss: this.loss, alerts: own, step: this.step, height: this.headHeight, revision: `${id} ${this.row}` });
  }

  drawCourse() {
    if (!this.curves || !this.loss) return;
    const { id, alerts, overview } = this.run;
    this.course.choose(overview, this.curveColumn.name, this.curves.layers.map((curve) => curve.layer));
    if (this.curves.column !== this.curveColumn.name) return;
    this.course.draw({
      curves: this.curves, column: this.curveColumn, layers: overview.layers, loss: this.loss, alerts, step: this.step,
      lastStep: overview.last_step, revision: `${id} ${this.curveColumn.name}`,
    });
  }

  moveMarks() {
    this.headPanel.move(this.step);
    this.course.move(this.step);
  }

  showReading() {
    if (!this.head || this.head.row !== this.row) return;
    this.readingTitle.textContent = `${this.run.rows.name(this.row)} at step ${whole(this.step)}`;
    fill(this.reading, readingsAt(this.head, this.run.overview.columns, this.step).map(([label, text]) => h("div", {}, h("dt", {}, label), h("dd", {}, text))));
  }

  showHeader(overview, card) {
    fill(this.title, overview.name, " ", verdictBadge(overview), " ", liveBadge(overview));
    this.words.textContent = overview.words;
    const span = overview.first_step === null ? null : `steps ${whole(overview.first_step)} to ${whole(overview.last_step)}`;
    const facts = [overview.model, overview.layers.length ? `${count(overview.layers.length, "layer")}, ${count(overview.heads, "head")}` : null, span, `${count(overview.measured, "step")} measured`, `alerts: ${alertCounts(card)}`];
    this.facts.textContent = facts.filter(Boolean).join(" · ");
    this.problems.hidden = !overview.problems.length;
    fill(this.problems, h("strong", {}, "Not everything could be read"), h("ul", {}, overview.problems.map((text) => h("li", {}, text))));
    const isEmpty = !overview.positions.length;
    this.measured.hidden = isEmpty && !overview.alerts.length;
    this.measured.classList.toggle("nothing-measured", isEmpty);
    this.empty.hidden = !isEmpty;
    this.empty.textContent = overview.is_live ? "Nothing has been measured yet. Figures appear here as soon as the run writes them." : "Nothing was measured in this run.";
    fill(this.ran, whatRan(overview));
  }

  /** A run that cannot be shown, or not yet: what there is to say. */
  showWithout(card) {
    this.run = null;
    fill(this.title, card.name, " ", verdictBadge(card));
    fill(this.words);
    this.facts.textContent = "";
    this.problems.hidden = true;
    this.measured.hidden = true;
    this.empty.hidden = false;
    this.empty.textContent = card.problem || "This run has not been read yet.";
    fill(this.ran);
  }

  fail(error) {
    this.go({ error: error.message });
  }

  tellNewAlerts(before) {
    const known = new Set(before.map((alert) => alert.key));
    const opened = this.run.alerts.filter((alert) => !known.has(alert.key));
    if (opened.length) this.announce(`${count(opened.length, "new alert")}: ${opened.slice(0, 3).map((alert) => alert.title).join("; ")}`);
  }

  redraw() {
    if (!this.run) return;
    this.shownAlert = null;
    this.drawHead();
    this.drawCourse();
    this.update(this.state);
  }
}

function part(id, title, ...children) {
  return h("section", { class: `part part-${id}`, "aria-labelledby": `${id}-title` }, h("h3", { id: `${id}-title` }, title), children);
}
