// Where the page's data come from: here, the server that sent the page. A page that carries its data in itself
// has another source with the same methods; nothing else knows where data come from.

import { unpack } from "./packing.js";

/** Answers of the server whose `api/` lies at `base`. What fails raises an Error with a text for the reader. */
export class HttpSource {
  constructor(base) {
    this.base = base;
    /** Whether runs may grow, so that asking again makes sense. */
    this.isLive = true;
  }

  runs() {
    return this.ask("runs", {});
  }

  overview(run) {
    return this.ask("overview", { run });
  }

  curves(run, column, layers) {
    return this.ask("curves", { run, column, layers: (layers || []).join(",") });
  }

  summary(run) {
    return this.ask("summary", { run });
  }

  grid(run, column, position) {
    return this.ask("grid", { run, column, position });
  }

  head(run, row) {
    return this.ask("head", { run, row });
  }

  scalar(run, name) {
    return this.ask("scalar", { run, name });
  }

  attentionMap(run, alert) {
    return this.ask("map", { run, alert });
  }

  async ask(question, parameters) {
    const url = new URL(question, this.base);
    for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
    let response;
    try {
      response = await fetch(url, { credentials: "same-origin", cache: "no-store" });
    } catch {
      throw new Error("The server does not answer. Is it still running?");
    }
    if (response.ok) return unpack(await response.arrayBuffer());
    let text = "";
    try {
      text = (await response.json()).error;
    } catch {
      // an answer of something between the server and here
    }
    throw new Error(text || `The server answered with status ${response.status}.`);
  }
}
