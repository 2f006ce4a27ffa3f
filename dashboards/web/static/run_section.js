// Everything about one run: its verdict, alerts and their evidence, the heads, the layers, what ran.

import { AlertList, worstAlertsFirst } from "./alerts.js";
import { Course } from "./course.js";
import { fill, h, latest } from "./dom.js";
import { Evidence } from "./evidence.js";
import { HeadsPart } from "./heads_part.js";
import { Rows } from "./rows.js";
import { RunHeader } from "./run_header.js";
import { count } from "./words.js";
import { whatRan } from "./what_ran.js";

const TOLD = 3; // new alerts that are told by their titles

export class RunSection {
  /** `go(change)`: change the page's state; `announce(text)`: say something to those who do not see the page. */
  constructor(source, { go, announce }) {
    Object.assign(this, { source, go, announce });
    this.run = null;
    const isNow = ({ id }) => this.run !== null && this.run.id === id && this.wanted === id;
    const failed = (error) => this.fail(error);
    this.askCurves = latest(
      ({ id, column, layers }) => source.curves(id, column, layers),
      (curves, want) => isNow(want) && this.showCurves(curves),
      failed,
    );
    this.askLoss = latest(
      ({ id }) => source.scalar(id, "loss"),
      (loss, want) => isNow(want) && this.showLoss(loss),
      failed,
    );
    this.askMap = latest(
      ({ id, alert }) => source.attentionMap(id, alert.key),
      (map, want) => isNow(want) && this.alert.key === want.alert.key && this.evidence.drawMap(map, want.alert),
      (error) => this.evidence.mapFailed(error),
    );
    this.header = new RunHeader();
    this.alertList = new AlertList({ onselect: (alert) => this.openAlert(alert) });
    this.evidence = new Evidence();
    this.heads = new HeadsPart(source, { go, failed, isNow });
    this.course = new Course({
      oncolumn: (curve) => go({ curve }),
      onlayers: (layers) => go({ layers }),
      onstep: (step) => go({ step: Math.max(0, Math.round(step)) }),
      onalert: (alert) => this.openAlert(alert),
    });
    this.measured = h(
      "div",
      {},
      part("alerts", "Alerts", h("div", { class: "two alerts-two" }, this.alertList.element, this.evidence.element)),
      part("heads", "Heads", this.heads.element),
      part("layers", "Layers", this.course.element),
    );
    this.ran = h("div", {});
    this.element = h(
      "section",
      { class: "run", "aria-labelledby": "run-title" },
      this.header.elements,
      this.measured,
      this.ran,
    );
  }

  /** Take a run up, or read it anew; `state()` gives the page's state when it is there. */
  async load(card, state) {
    this.wanted = card.id;
    let overview = null;
    try {
      if (!card.problem && !card.pending) overview = await this.source.overview(card.id);
    } catch (error) {
      if (this.wanted === card.id) this.fail(error);
      return;
    }
    if (this.wanted !== card.id) return;
    const before = this.run && this.run.id === card.id ? this.run : null;
    if (!before) this.curves = this.loss = null;
    this.run = overview && {
      id: card.id,
      version: card.version,
      overview,
      rows: new Rows(overview),
      alerts: worstAlertsFirst(overview.alerts),
    };
    if (before && overview) this.tellNewAlerts(before.alerts);
    const isEmpty = !overview || !overview.positions.length;
    this.header.show(card, overview);
    this.measured.hidden = isEmpty && !(overview && overview.alerts.length);
    this.measured.classList.toggle("nothing-measured", isEmpty);
    fill(this.ran, overview ? whatRan(overview) : null);
    this.update(state());
  }

  /** Show what the state says, and ask for what that needs. */
  update(state) {
    if (!this.run) return;
    this.state = state;
    const { id, version, overview, rows, alerts } = this.run;
    const words = overview.measured ? "No alert: nothing in this run asks for action." : "";
    this.alert = alerts.find((alert) => alert.key === state.alert) || alerts[0] || null;
    this.alertList.show(alerts, this.alert && this.alert.key, words);
    this.heads.once("evidence", [id, this.alert], () => {
      this.evidence.show(this.alert);
      if (this.alert && this.alert.has_map) this.askMap({ id, alert: this.alert });
    });
    if (!overview.positions.length || !rows.many) return;
    this.heads.update(this.run, state, this.alert);
    const known = [...overview.columns, ...(overview.layer_columns || [])];
    const named = (wanted) => known.find(({ name }) => name === wanted);
    this.column = named(state.curve) || named("entropy") || known[0];
    const places = (state.layers || []).filter((place) => place < overview.layers.length);
    const want = { id, column: this.column.name, layers: places.length ? places : null };
    this.heads.once("curves", [version, want], () => this.askCurves(want));
    this.heads.once("loss", [id, version], () => this.askLoss({ id }));
    this.heads.once("course's step", [id, this.heads.step], () => this.course.move(this.heads.step));
  }

  openAlert(alert) {
    const row = alert.worst_row ?? alert.rows[0];
    const head = row === undefined ? {} : { head: this.run.rows.places(row) };
    this.go({ alert: alert.key, step: alert.opened, ...head });
  }

  showLoss(loss) {
    this.loss = loss;
    this.heads.showLoss(loss);
    this.drawCourse();
  }

  showCurves(curves) {
    this.curves = curves;
    this.drawCourse();
  }

  drawCourse() {
    if (!this.curves || !this.loss || this.curves.column !== this.column.name) return;
    const { id, alerts, overview } = this.run;
    const drawn = this.curves.layers.map((curve) => curve.layer);
    this.course.choose(overview, this.column.name, drawn);
    this.course.draw({
      curves: this.curves,
      column: this.column,
      layers: overview.layers,
      loss: this.loss,
      alerts,
      step: this.heads.step,
      lastStep: overview.last_step,
      revision: `${id} ${this.column.name}`,
    });
  }

  /** Say what failed, and ask again with the next update. */
  fail(error) {
    this.heads.forget();
    this.go({ error: error.message });
  }

  tellNewAlerts(before) {
    const known = new Set(before.map((alert) => alert.key));
    const opened = this.run.alerts.filter((alert) => !known.has(alert.key));
    if (!opened.length) return;
    const titles = opened.slice(0, TOLD).map((alert) => alert.title);
    this.announce(`${count(opened.length, "new alert")}: ${titles.join("; ")}`);
  }

  /** Draw all anew, in other colours. */
  redraw() {
    if (!this.run) return;
    this.heads.forget();
    this.update(this.state);
  }
}

function part(id, title, ...children) {
  const heading = h("h3", { id: `${id}-title` }, title);
  return h("section", { class: `part part-${id}`, "aria-labelledby": `${id}-title` }, heading, children);
}
