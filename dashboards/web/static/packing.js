// Reads what dashboards/packing.py packs: a header in JSON, and arrays as they lie in memory.

const KINDS = { f4: Float32Array, f8: Float64Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array };
const UNKNOWN = 65535;

/** The value that was packed. Arrays become typed arrays with a `shape`; quantised ones Float32Array. */
export function unpack(buffer) {
  if (buffer.byteLength < 4) throw new Error("the answer is cut off");
  const length = new DataView(buffer).getUint32(0, true);
  const start = (4 + length + 7) & ~7;
  if (buffer.byteLength < start) throw new Error("the answer is cut off");
  const header = new TextDecoder().decode(new Uint8Array(buffer, 4, length));
  return JSON.parse(header, (_, value) =>
    value !== null && typeof value === "object" && "$array" in value ? restore(value, buffer, start) : value,
  );
}

function restore(packed, buffer, start) {
  const [kind, shape, offset, bytes] = packed.$array;
  const Kind = KINDS[kind];
  const values = new Kind(buffer, start + offset, bytes / Kind.BYTES_PER_ELEMENT);
  const array = kind === "u2" ? spread(values, packed) : values;
  array.shape = shape;
  return array;
}

function spread(codes, { low, high, log }) {
  const values = new Float32Array(codes.length);
  const step = (high - low) / (UNKNOWN - 1);
  for (let i = 0; i < codes.length; i++) {
    const value = low + codes[i] * step;
    values[i] = codes[i] === UNKNOWN ? NaN : log ? 10 ** value : value;
  }
  return values;
}
