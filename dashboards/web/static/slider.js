// The step slider over the map: keys and mouse move it, ticks show where alerts opened, a button lets it run.

import { fill, h } from "./dom.js";
import { SEVERITIES, whole } from "./words.js";

const PLAY_MS = 140;
const MOST_TICKS = 150;

export class Slider {
  /** `onmove(position)`: the reader moved it; it is at its end when `position` is the last one. */
  constructor({ onmove }) {
    this.onmove = onmove;
    this.positions = [];
    this.timer = 0;
    this.input = h("input", {
      type: "range",
      min: "0",
      max: "0",
      step: "1",
      "aria-label": "training step",
      oninput: () => this.moved(),
    });
    this.ticks = h("div", { class: "ticks", "aria-hidden": "true" });
    this.words = h("output", { class: "step-words" });
    this.button = h("button", {
      type: "button",
      class: "play",
      onclick: () => (this.timer ? this.stop() : this.play()),
    });
    this.element = h(
      "div",
      { class: "slider" },
      this.button,
      h("div", { class: "track" }, this.ticks, this.input),
      this.words,
    );
    this.stop();
  }

  /** `isThinned`: whether a position stands for several measured steps. */
  show(positions, position, alerts, lastStep, isThinned) {
    this.positions = positions;
    this.input.max = String(Math.max(0, positions.length - 1));
    this.input.value = String(position);
    this.input.disabled = positions.length < 2;
    this.button.disabled = positions.length < 2;
    const end = position + 1 < positions.length ? positions[position + 1] - 1 : lastStep;
    const words =
      end > positions[position] && isThinned
        ? `${whole(positions[position])} – ${whole(end)}`
        : whole(positions[position]);
    const isNewest = position === positions.length - 1;
    this.words.textContent = `step ${words}${isNewest ? " (newest)" : ""}`;
    this.input.setAttribute("aria-valuetext", this.words.textContent);
    const most = Math.max(1, positions.length - 1);
    if (this.ticked !== alerts)
      fill(
        this.ticks,
        alerts
          .slice(0, MOST_TICKS)
          .reverse()
          .map((alert) =>
            h("i", {
              style: `left:${(100 * positionOf(positions, alert.opened)) / most}%;background:var(--mark-${SEVERITIES.includes(alert.severity) ? alert.severity : "info"})`,
            }),
          ),
      );
    this.ticked = alerts;
  }

  moved() {
    this.stop();
    this.onmove(Number(this.input.value));
  }

  play() {
    this.button.textContent = "❚❚";
    this.button.setAttribute("aria-label", "stop");
    let at = Number(this.input.value);
    if (at >= this.positions.length - 1) at = -1;
    this.timer = setInterval(() => {
      if (++at >= this.positions.length) this.stop();
      else this.onmove(at);
    }, PLAY_MS);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.button.textContent = "▶";
    this.button.setAttribute("aria-label", "play the run step by step");
  }
}

/** The position that stands for a step: the last one that begins at or before it. */
export function positionOf(positions, step) {
  let [low, high] = [0, positions.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (positions[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}
