// The page as a tab of TensorBoard, which gives it an empty document and calls `render`.

import { mount } from "./main.js";
import { HttpSource } from "./source_http.js";

const beside = (name) => new URL(name, import.meta.url).href;

export async function render() {
  document.title = "Attention";
  document.documentElement.lang = "en";
  await Promise.all([
    added("link", { rel: "stylesheet", href: beside("style.css") }),
    added("script", { src: beside("plotly.js") }),
  ]);
  const root = document.createElement("div");
  root.id = "page";
  document.body.append(root);
  mount(root, new HttpSource(new URL("../api/", import.meta.url)), {
    emptyWords: "TensorBoard's --logdir must hold run directories: those in which run.json lies, one above the folder of events.",
  });
}

function added(tag, attributes) {
  return new Promise((done, failed) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.onload = done;
    element.onerror = () => failed(new Error(`${attributes.src || attributes.href} cannot be read`));
    document.head.append(element);
  });
}
