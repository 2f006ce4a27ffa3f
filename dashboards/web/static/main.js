// The page: the runs of a source side by side, and one of them in full. It asks again while runs grow.

import { chartsWaitFor } from "./charts.js";
import { Compare } from "./compare.js";
import { debounced, fill, h, withCode } from "./dom.js";
import { RunSection } from "./run_section.js";
import { RunsTable, worstFirst } from "./runs_table.js";
import { fromFragment, initialState, toFragment } from "./state.js";
import { chooseTheme, chosenTheme, isDark, onThemeChange } from "./theme.js";
import { count } from "./words.js";

const COMPARED_AT_FIRST = 6;
const MOST_COMPARED = 24;
const PENDING_MS = 300;
const WORDS_FIRST_MS = 200;
const THEMES = { auto: "light", light: "dark", dark: "auto" };

/**
 * Build the page into `root`. `interval`: milliseconds between two questions whether runs have grown. `plotly`: loads
 * plotly's script, unless it is there already.
 */
export function mount(root, source, { interval = 3000, emptyWords = "", plotly = null } = {}) {
  const page = new Page(root, source, interval, emptyWords);
  page.start();
  if (plotly) {
    // Its evaluation holds the page up; what can be read goes first.
    const script = new Promise((done) => setTimeout(done, WORDS_FIRST_MS)).then(plotly);
    chartsWaitFor(script.catch((error) => page.withoutCharts(error)));
  }
  return page;
}

class Page {
  constructor(root, source, interval, emptyWords) {
    Object.assign(this, { root, source, interval, emptyWords });
    this.cards = null;
    this.compared = null;
    this.summaries = new Map();
    this.state = fromFragment(location.hash);
    this.write = debounced(() => this.writeFragment(), 150);
    this.build();
  }

  build() {
    this.table = new RunsTable({
      onselect: (run) => this.go({ ...initialState(), colour: this.state.colour, curve: this.state.curve, run }),
      oncompare: (id, isOn) => this.compareToo(id, isOn),
    });
    this.compare = new Compare();
    this.section = new RunSection(this.source, {
      go: (change) => this.go(change),
      announce: (text) => this.announce(text),
    });
    this.folder = h("p", { class: "path" });
    this.status = h("p", { class: "status" });
    this.said = h("p", { class: "hidden", "aria-live": "polite" });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.theme = h("button", {
      type: "button",
      class: "plain",
      onclick: () => this.changeTheme(THEMES[chosenTheme()]),
    });
    this.headline = h("p", { class: "headline" });
    this.empty = h("div", { class: "empty" }, h("p", {}, "Reading the runs…"));
    this.runs = h(
      "section",
      { class: "part", "aria-labelledby": "runs-title", hidden: true },
      h("div", { class: "runs-head" }, h("h2", { id: "runs-title" }, "Runs"), this.headline),
      this.table.element,
      this.compare.element,
    );
    fill(
      this.root,
      h(
        "header",
        { class: "top" },
        h("div", {}, h("h1", {}, "Attention entropy"), this.folder),
        h("div", { class: "top-right" }, this.status, this.theme),
      ),
      h("main", {}, this.error, this.empty, this.runs, this.section.element),
      this.said,
    );
    this.section.element.hidden = true;
    this.changeTheme(chosenTheme());
  }

  start() {
    onThemeChange(() => this.redraw());
    addEventListener("hashchange", () => {
      if (location.hash !== this.written) this.go(fromFragment(location.hash));
    });
    document.addEventListener("visibilitychange", () => !document.hidden && this.poll());
    this.poll();
  }

  async poll() {
    clearTimeout(this.timer);
    if (this.isAsking) return;
    if (isOutOfSight()) {
      this.timer = setTimeout(() => this.poll(), this.interval);
      return;
    }
    this.isAsking = true;
    try {
      const { folder, runs } = await this.source.runs();
      this.folder.textContent = folder;
      this.sayError(null);
      this.take(runs);
    } catch (error) {
      this.sayError(error.message);
    }
    this.isAsking = false;
    const isPending = this.cards && this.cards.some((card) => card.pending);
    if (this.source.isLive) this.timer = setTimeout(() => this.poll(), isPending ? PENDING_MS : this.interval);
  }

  /** The runs as they are now. */
  take(cards) {
    const text = JSON.stringify(cards);
    if (text !== this.text) this.cards = cards; // else nothing is made anew that someone may be reading
    this.text = text;
    this.isUnknown = cards.length > 0 && this.state.run !== null && !cards.some((card) => card.id === this.state.run);
    if (this.compared === null && cards.length && !cards.some((card) => card.pending)) {
      this.compared = worstFirst(cards)
        .filter((card) => !card.problem)
        .slice(0, COMPARED_AT_FIRST)
        .map((card) => card.id)
        .sort();
    }
    this.show();
    this.drawCompared();
  }

  go(change) {
    if ("error" in change) return this.sayError(change.error);
    this.state = { ...this.state, ...change };
    this.show();
    this.write();
    return undefined;
  }

  show() {
    if (!this.cards) return;
    const { cards } = this;
    const card = cards.find(({ id }) => id === this.state.run) || worstFirst(cards)[0];
    this.empty.hidden = cards.length > 0;
    fill(this.empty, h("p", {}, "No run here yet."), h("p", {}, withCode(this.emptyWords)));
    this.runs.hidden = !cards.length;
    this.runs.classList.toggle("single", cards.length === 1);
    this.section.element.hidden = !card;
    const live = cards.filter((c) => c.is_live).length;
    this.status.textContent =
      this.source.isLive && cards.length
        ? `${count(cards.length, "run")}${live ? `, ${live} live` : ""} · asked at ${new Date().toLocaleTimeString()}`
        : "";
    if (!card) return;
    this.headline.textContent = this.isUnknown
      ? `The run ${this.state.run} is not here any more; another one is shown.`
      : headline(cards);
    const listed = [cards, card.id, this.compared, isDark()];
    if (!this.listed || listed.some((part, i) => part !== this.listed[i]))
      this.table.show(cards, card.id, this.compared || []);
    this.listed = listed;
    const { run } = this.section;
    const isShown = run && run.id === card.id && run.version === card.version;
    const loading = `${card.id} ${card.version}`;
    if (isShown) this.section.update(this.state);
    else if (this.loading !== loading) this.load(card, loading);
  }

  async load(card, loading) {
    this.loading = loading;
    await this.section.load(card, () => this.state);
    if (this.loading === loading) this.loading = null;
  }

  compareToo(id, isOn) {
    const others = this.compared.filter((other) => other !== id);
    this.compared = isOn ? [...others, id].slice(-MOST_COMPARED) : others;
    this.show();
    this.drawCompared();
  }

  async drawCompared() {
    this.compare.element.hidden = this.cards.length < 2 || !this.compared || !this.compared.length;
    if (this.compare.element.hidden) return;
    const wanted = this.compared
      .map((id) => this.cards.find((card) => card.id === id))
      .filter((card) => card && !card.problem && !card.pending);
    const asked = wanted.map((card) => `${card.id} ${card.version}`).join("\n");
    if (this.askedCompared === asked) return;
    this.askedCompared = asked;
    try {
      await Promise.all(
        wanted.map(async (card) => {
          const kept = this.summaries.get(card.id);
          if (!kept || kept.version !== card.version)
            this.summaries.set(card.id, { version: card.version, summary: await this.source.summary(card.id) });
        }),
      );
    } catch (error) {
      this.askedCompared = null;
      this.sayError(error.message);
      return;
    }
    if (this.askedCompared === asked)
      this.compare.show(wanted.map((card) => ({ name: card.name, summary: this.summaries.get(card.id).summary })));
  }

  redraw() {
    this.askedCompared = null;
    if (this.cards) this.drawCompared();
    this.section.redraw();
    this.show();
  }

  changeTheme(choice) {
    chooseTheme(choice);
    this.theme.textContent = `theme: ${choice}`;
    this.redraw();
  }

  sayError(text) {
    const said = text || this.lasting || "";
    this.error.hidden = !said;
    if (this.error.textContent !== said) this.error.textContent = said;
  }

  /** The words go on without charts; those wait for ever. */
  withoutCharts(error) {
    this.lasting = `There are no charts: ${error.message}.`;
    this.sayError(null);
    return new Promise(() => {});
  }

  announce(text) {
    this.said.textContent = text;
  }

  writeFragment() {
    this.written = toFragment(this.state);
    history.replaceState(null, "", this.written);
  }
}

/** Whether nobody can see the page: its window is hidden, or the frame it stands in. */
function isOutOfSight() {
  return document.hidden || !document.documentElement.clientWidth;
}

/** All runs in one sentence. */
function headline(cards) {
  if (cards.length === 1) return "";
  const parts = [
    ["trouble", "in trouble"],
    ["watch", "worth a look"],
    ["sound", "sound"],
    ["unknown", "unknown"],
  ]
    .map(([verdict, words]) => [cards.filter((card) => card.verdict === verdict).length, words])
    .filter(([many]) => many);
  return `${count(cards.length, "run")}: ${parts.map(([many, words]) => `${many} ${words}`).join(", ")}.`;
}
