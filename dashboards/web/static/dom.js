// Elements. Text only ever becomes a text node: whatever comes from a run is shown, never read as HTML.

/**
 * An element with attributes and children. `on…` attributes are listeners, `true` and `false` switch, null
 * and undefined leave out; children are elements, texts, lists of them, or null.
 */
export function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...nodes(children));
  return element;
}

/** Put these children in place of those that are there. */
export function fill(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** A text whose `backticks` mark code, as advice has it. */
export function withCode(text) {
  return String(text)
    .split("`")
    .map((part, i, all) => (i % 2 && i < all.length - 1 ? h("code", {}, part) : i % 2 ? `\`${part}` : part));
}

/** A labelled select; `options` are [value, label] pairs. */
export function choice(label, onchange) {
  const select = h("select", { onchange: () => onchange(select.value) });
  const element = h("label", { class: "choice" }, h("span", {}, label), select);
  let shown = "";
  return {
    element,
    show(options, value) {
      const key = JSON.stringify(options);
      if (key !== shown) {
        fill(
          select,
          options.map(([option, text]) => h("option", { value: option }, text)),
        );
        shown = key;
      }
      select.value = value;
    },
  };
}

/** Add an element to the head that loads something; resolves once it has. */
export function loaded(tag, attributes) {
  return new Promise((done, failed) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.onload = () => done();
    element.onerror = () => failed(new Error(`${attributes.src || attributes.href} cannot be read`));
    document.head.append(element);
  });
}

/** Call `act` for the last of several calls in quick succession. */
export function debounced(act, delay) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...given), delay);
  };
}

/**
 * Ask for the latest of several things wanted, one at a time: while an answer is under way, of what is wanted
 * meanwhile only the last is asked for. `ask` returns a promise, `show` gets what came and what was wanted.
 */
export function latest(ask, show, failed) {
  let wanted;
  let isBusy = false;
  const next = async () => {
    isBusy = true;
    while (wanted !== undefined) {
      const now = wanted;
      wanted = undefined;
      try {
        const answer = await ask(now);
        if (wanted === undefined) show(answer, now);
      } catch (error) {
        if (wanted === undefined) failed(error, now);
      }
    }
    isBusy = false;
  };
  return (want) => {
    wanted = want;
    if (!isBusy) next();
  };
}

/** Render anew, and give the focus back to the element with the same `data-focus` as the one that had it. */
export function keepingFocus(container, render) {
  const held = container.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  render();
  if (!held) return;
  for (const element of container.querySelectorAll("[data-focus]")) {
    if (element.dataset.focus === held) element.focus({ preventScroll: true });
  }
}
