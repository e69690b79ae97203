// Numbers, times and elements in the form in which a person reads them.

/** 0.6 s, 12 s, 3 min, 2 h: one unit, as many digits as help. */
export function span(ms) {
  if (!Number.isFinite(ms)) return "";
  const s = Math.max(0, ms) / 1000;
  if (s < 1) return `${Math.round(ms)} ms`;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} d`;
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

/** The time of day of milliseconds since 1970. */
export function timeOfDay(ms) {
  return clock.format(new Date(ms));
}

/** "1 replica", "2 replicas". */
export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes; `null` leaves one out, functions are listeners, the rest are children. */
export function element(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function drawn(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Writes text only where it changed, so that a selection or a screen reader is not disturbed each second. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Sets an attribute only where it changed. */
export function mark(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/**
 * Makes the children of `parent` one for each item, in order, and keeps those that are there already: the focus stays
 * where it is. `make(item)` gives `{ node, update(item) }`.
 */
export function keyed(parent, items, key, make) {
  const known = (parent.keyedParts ??= new Map());
  const wanted = new Set(items.map(key));
  for (const [name, part] of known) {
    if (!wanted.has(name)) {
      part.node.remove();
      known.delete(name);
    }
  }
  let before = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let part = known.get(name);
    if (!part) {
      part = make(item);
      known.set(name, part);
    }
    if (part.node === before) before = before.nextElementSibling;
    else parent.insertBefore(part.node, before);
    part.update?.(item);
  }
}
