// The page as `serve` shows it: served beside its data.

import { loaded } from "./dom.js";
import { mount } from "./main.js";
import { HttpSource } from "./source_http.js";

const { interval } = document.body.dataset;
const beside = (name) => new URL(name, import.meta.url).href;

mount(document.getElementById("page"), new HttpSource(beside("../api/")), {
  interval: Number(interval),
  plotly: () => loaded("script", { src: beside("plotly.js") }),
  emptyWords:
    "Runs appear by themselves as soon as a training writes them below this folder: `em.EntropyMonitor(model, run_dir=…)`.",
});
