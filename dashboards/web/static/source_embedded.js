// A source whose data lie in the page itself: the same answers as the server's, made from whole columns.

const LOOK_BACK = 64; // positions over which a figure that is not read in all of them is carried on
const OF_LAYER = "layer."; // before the name of a layer's column where heads have one of the same name
const ALWAYS_READ = new Set(["entropy", "max_entropy", "entropy_share"]);

export class EmbeddedSource {
  /** `data`: what dashboards/report_data.py gathers: { folder, runs, details: { id: … } }. */
  constructor(data) {
    this.data = data;
    this.isLive = false;
  }

  async runs() {
    return { folder: this.data.folder, runs: this.data.runs };
  }

  async overview(run) {
    return this.detail(run).overview;
  }

  async summary(run) {
    return this.detail(run).summary;
  }

  async scalar(run, name) {
    return this.detail(run).scalars[name] || { name, steps: [], values: [], broken: [] };
  }

  async attentionMap(run, alert) {
    return this.detail(run).maps[alert];
  }

  async grid(run, column, position) {
    const { overview, heads } = this.detail(run);
    const { bad } = overview.columns.find(({ name }) => name === column);
    const { low, high, steps } = heads[column];
    const cube = bad === "high" && high ? high : low;
    const values = slice(cube, position);
    if (!ALWAYS_READ.has(column)) {
      for (let i = position - 1; i >= Math.max(0, position - LOOK_BACK) && values.some(Number.isNaN); i--) {
        const earlier = slice(cube, i);
        for (let row = 0; row < values.length; row++) if (Number.isNaN(values[row])) values[row] = earlier[row];
      }
    }
    const range = (this.ranges ||= new Map());
    const key = `${run} ${column}`;
    if (!range.has(key)) range.set(key, extent([low, high || low]));
    return { column, position, step: steps[position], values, ...range.get(key) };
  }

  async head(run, row) {
    const { overview, heads, layers } = this.detail(run);
    const { layer, call, head } = overview.rows;
    const series = {};
    for (const [name, column] of Object.entries(heads)) addSeries(series, name, column, row);
    const ofLayer = {};
    for (const [name, column] of Object.entries(layers)) addSeries(ofLayer, name, column, layer[row]);
    const { steps, low } = heads.entropy;
    const broken = steps.filter((_, i) => Number.isNaN(low[i * low.shape[1] + row]));
    return { row, layer: overview.layers[layer[row]].name, call: call[row], head: head[row], series, layer_series: ofLayer, broken };
  }

  async curves(run, column, wanted) {
    const { chosen } = this.detail(run);
    const isAsked = wanted && wanted.length > 0;
    const layers = isAsked ? wanted : chosen[column].layers;
    const maximum = column === "entropy" ? layers.map((layer) => this.band(run, "max_entropy", layer)) : [];
    return { column, layers: layers.map((layer) => this.band(run, column, layer)), maximum, remark: isAsked ? "" : chosen[column].remark };
  }

  detail(run) {
    const detail = this.data.details[run];
    if (!detail) throw new Error(`this report has no run ${run}`);
    return detail;
  }

  /** One layer over steps: the mean of its heads between the lowest and the highest. */
  band(run, column, layer) {
    const { overview, heads, layers } = this.detail(run);
    const table = heads[column] || layers[column.replace(OF_LAYER, "")];
    const own = heads[column] ? [...overview.rows.layer.keys()].filter((row) => overview.rows.layer[row] === layer) : [layer];
    const { steps, low, mean } = table;
    const high = table.high || low;
    const band = { layer, steps: [], mean: [], low: [], high: [] };
    steps.forEach((step, i) => {
      const value = mean[i * mean.shape[1] + layer];
      if (Number.isNaN(value)) return;
      let [least, largest] = [Infinity, -Infinity];
      for (const row of own) {
        least = Math.min(least, orElse(low[i * low.shape[1] + row], Infinity));
        largest = Math.max(largest, orElse(high[i * high.shape[1] + row], -Infinity));
      }
      band.steps.push(step);
      band.mean.push(value);
      band.low.push(least);
      band.high.push(largest);
    });
    return band;
  }
}

function slice(cube, position) {
  const width = cube.shape[1];
  return cube.slice(position * width, (position + 1) * width);
}

function addSeries(into, name, { steps, low, high }, place) {
  const series = { steps: [], values: [] };
  steps.forEach((step, i) => {
    for (const cube of high ? [low, high] : [low]) {
      const value = cube[i * cube.shape[1] + place];
      if (Number.isFinite(value)) {
        series.steps.push(step);
        series.values.push(value);
      }
    }
  });
  if (series.steps.length) into[name] = series;
}

function extent(cubes) {
  let [low, high] = [Infinity, -Infinity];
  for (const cube of cubes) {
    for (const value of cube) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? { low, high } : { low: null, high: null };
}

function orElse(value, other) {
  return Number.isNaN(value) ? other : value;
}
