// Which heads a run has, and how they lie on the map: a line for each layer and call, a column for each head.

import { shortNames } from "./words.js";

const SHORT = 20;
const LONGER = 40;

/** The rows of an overview, arranged. `shortNames` and `longerNames` are the layers' names, cut. */
export class Rows {
  constructor({ rows, layers }) {
    this.layer = rows.layer;
    this.call = rows.call;
    this.head = rows.head;
    this.layers = layers;
    const names = layers.map((layer) => layer.name);
    this.shortNames = shortNames(names, SHORT);
    this.longerNames = shortNames(names, LONGER);
    this.lines = [];
    this.width = 0;
    const ids = new Map();
    this.lineOf = Array.from(rows.layer, (layer, row) => {
      const id = `${layer}.${rows.call[row]}`;
      if (!ids.has(id)) {
        ids.set(id, this.lines.length);
        this.lines.push({ layer, call: rows.call[row], name: layers[layer].name });
      }
      this.width = Math.max(this.width, rows.head[row] + 1);
      return ids.get(id);
    });
    this.hasCalls = this.lines.some((line) => line.call > 0);
    this.at = new Int32Array(this.lines.length * this.width).fill(-1);
    this.lineOf.forEach((line, row) => (this.at[line * this.width + rows.head[row]] = row));
  }

  get many() {
    return this.head.length;
  }

  /** The row at a line and a column; null where there is none. */
  rowAt(line, head) {
    const inside = line >= 0 && head >= 0 && line < this.lines.length && head < this.width;
    const row = inside ? this.at[line * this.width + head] : -1;
    return row < 0 ? null : row;
  }

  /** The row of a head by places; null where the run has none. */
  find([layer, call, head]) {
    return this.rowAt(
      this.lines.findIndex((line) => line.layer === layer && line.call === call),
      head,
    );
  }

  /** A row's head by places, as addresses name it. */
  places(row) {
    return [this.layer[row], this.call[row], this.head[row]];
  }

  /** A row's name in words. */
  name(row) {
    const call = this.hasCalls ? `, call ${this.call[row]}` : "";
    return `${this.layers[this.layer[row]].name}${call}, head ${this.head[row]}`;
  }

  /** From one head to its neighbour on the map, over places where there is none. */
  step(row, down, right) {
    let [line, head] = [this.lineOf[row] + down, this.head[row] + right];
    while (line >= 0 && head >= 0 && line < this.lines.length && head < this.width) {
      const next = this.rowAt(line, head);
      if (next !== null) return next;
      line += down;
      head += right;
    }
    return row;
  }
}
