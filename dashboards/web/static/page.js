// The page as `serve` shows it: served beside its data.

import { mount } from "./main.js";
import { HttpSource } from "./source_http.js";

const { interval } = document.body.dataset;
mount(document.getElementById("page"), new HttpSource(new URL("../api/", import.meta.url)), {
  interval: Number(interval),
  emptyWords: "Runs appear by themselves as soon as a training writes them below this folder: `em.EntropyMonitor(model, run_dir=…)`.",
});
