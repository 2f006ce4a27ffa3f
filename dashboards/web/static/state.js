// What the reader looks at, and how it stands in the address, so that a link leads another to the same place.

/**
 * run: id, or null. alert: key, or null. head: [layer, call, head] by places, or null. step: number, or null for the
 * newest. colour: column of the map. curve: column of the layers' chart. layers: places chosen for it, or null.
 */
export function initialState() {
  return { run: null, alert: null, head: null, step: null, colour: "entropy_share", curve: "entropy", layers: null };
}

/** The state that a fragment such as `#run=a&step=120` names; what it does not name is as at the start. */
export function fromFragment(fragment) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  const state = initialState();
  for (const name of ["run", "alert", "colour", "curve"]) if (given.get(name)) state[name] = given.get(name);
  const step = Number(given.get("step"));
  if (given.get("step") && Number.isFinite(step)) state.step = step;
  const head = places(given.get("head"));
  if (head && head.length === 3) state.head = head;
  state.layers = places(given.get("layers"));
  return state;
}

export function toFragment(state) {
  const start = initialState();
  const named = new URLSearchParams();
  for (const name of ["run", "alert", "step", "colour", "curve"]) {
    if (state[name] !== null && state[name] !== start[name]) named.set(name, state[name]);
  }
  for (const name of ["head", "layers"]) if (state[name]) named.set(name, state[name].join("."));
  return `#${named}`;
}

function places(text) {
  if (!text || !/^\d{1,6}(\.\d{1,6}){0,63}$/.test(text)) return null;
  return text.split(".").map(Number);
}
