// The page as a tab of TensorBoard, which gives it an empty document and calls `render`.

import { loaded } from "./dom.js";
import { mount } from "./main.js";
import { HttpSource } from "./source_http.js";

const beside = (name) => new URL(name, import.meta.url).href;

export async function render() {
  document.title = "Attention";
  document.documentElement.lang = "en";
  await loaded("link", { rel: "stylesheet", href: beside("style.css") });
  const root = document.createElement("div");
  root.id = "page";
  document.body.append(root);
  mount(root, new HttpSource(beside("../api/")), {
    plotly: () => loaded("script", { src: beside("plotly.js") }),
    emptyWords:
      "TensorBoard's `--logdir` must hold run directories: those in which `run.json` lies, one above the folder of events.",
  });
}
