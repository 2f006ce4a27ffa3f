// The page within a report: its data and plotly's script lie compressed in the file itself.

import { mount } from "./main.js";
import { unpack } from "./packing.js";
import { EmbeddedSource } from "./source_embedded.js";

async function inflated(id) {
  const text = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

async function plotly() {
  const script = await (await inflated("plotly")).blob();
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  await new Promise((done, failed) => {
    const element = Object.assign(document.createElement("script"), { src: url, onload: done, onerror: () => failed(new Error("the charts' script cannot be read")) });
    document.head.append(element);
  });
  URL.revokeObjectURL(url);
}

async function start(root) {
  const data = unpack(await (await inflated("data")).arrayBuffer());
  root.replaceChildren();
  mount(root, new EmbeddedSource(data), { plotly });
}

const root = document.getElementById("page");
start(root).catch((error) => {
  root.textContent = `The charts cannot be shown: ${error.message}. A browser of 2023 or later can show them.`;
});
