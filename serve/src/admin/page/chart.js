// Requests in flight and held over the last minutes, one above the other, as an SVG of its box's own size.

import { count, drawn, element, mark, say, timeOfDay } from "./words.js";

const LEFT = 34;
const BOTTOM = 20;
const TOP = 8;

/** Returns `{ node, update(samples) }`. A sample is `{ at, in_flight, held, serving }`, oldest first. */
export function chart(span_ms) {
  const parts = {
    grid: drawn("g"),
    held: drawn("path", { class: "held" }),
    inFlight: drawn("path", { class: "in-flight" }),
    cross: drawn("line", { class: "cross", visibility: "hidden" }),
  };
  const svg = drawn("svg", { class: "chart", role: "img", tabindex: "0" }, ...Object.values(parts));
  const readOut = element("p", { class: "read-out" });
  const node = element("div", {}, svg, readOut);
  let samples = [];
  let pointed = null;

  function update(next) {
    samples = next;
    draw();
  }

  function draw() {
    const width = svg.clientWidth || 600;
    const height = svg.clientHeight || 220;
    const end = samples.at(-1)?.at ?? 0;
    const top = ceiling(Math.max(4, ...samples.map((sample) => sample.in_flight + sample.held)));
    const x = (at) => LEFT + (1 - (end - at) / span_ms) * (width - LEFT);
    const y = (value) => TOP + (1 - value / top) * (height - TOP - BOTTOM);
    mark(svg, "viewBox", `0 0 ${width} ${height}`);
    const shown = samples.filter((sample) => end - sample.at <= span_ms);
    parts.grid.replaceChildren(...lines(top, y, width), ...times(x, height));
    mark(parts.inFlight, "d", band(shown, x, y, () => 0, (s) => s.in_flight));
    mark(parts.held, "d", shown.some((s) => s.held > 0) ? band(shown, x, y, (s) => s.in_flight, (s) => s.in_flight + s.held) : "");
    mark(svg, "aria-label", described(shown));
    point(x, height, shown);
  }

  function lines(top, y, width) {
    return [0, top / 2, top].flatMap((value) => [
      drawn("line", { class: "grid", x1: LEFT, x2: width, y1: y(value), y2: y(value) }),
      drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)),
    ]);
  }

  /** One word for each minute. */
  function times(x, height) {
    const end = samples.at(-1)?.at ?? 0;
    const minutes = span_ms / 60000;
    return Array.from({ length: minutes + 1 }, (_, ago) =>
      drawn("text", { x: x(end - ago * 60000), y: height - 4, "text-anchor": ago === 0 ? "end" : ago === minutes ? "start" : "middle" },
        ago === 0 ? "now" : `-${ago} min`));
  }

  function point(x, height, shown) {
    const sample = pointed === null ? null : shown.at(Math.min(pointed, shown.length - 1));
    if (!sample) {
      mark(parts.cross, "visibility", "hidden");
      say(readOut, "");
      return;
    }
    for (const [name, value] of Object.entries({ x1: x(sample.at), x2: x(sample.at), y1: TOP, y2: height - BOTTOM })) mark(parts.cross, name, value);
    mark(parts.cross, "visibility", "visible");
    say(readOut, `${timeOfDay(sample.at)}: ${sample.in_flight} in flight, ${sample.held} held, ${count(sample.serving, "replica")} serving`);
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const part = (event.clientX - box.left - LEFT) / (box.width - LEFT);
    const end = samples.at(-1)?.at ?? 0;
    const at = end - (1 - part) * span_ms;
    const shown = samples.filter((sample) => end - sample.at <= span_ms);
    const next = shown.findIndex((sample) => sample.at >= at);
    pointed = next === -1 ? shown.length - 1 : next;
    draw();
  });
  svg.addEventListener("pointerleave", () => { pointed = null; draw(); });
  svg.addEventListener("blur", () => { pointed = null; draw(); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const last = samples.length - 1;
    pointed = Math.min(last, Math.max(0, (pointed ?? last) + step));
    draw();
  });
  new ResizeObserver(draw).observe(svg);
  return { node, update };
}

/** The area between two values, in steps: a value holds until the next sample. */
function band(samples, x, y, from, to) {
  if (samples.length === 0) return "";
  const upper = stairs(samples, x, y, to);
  const lower = stairs(samples, x, y, from).reverse();
  return `M${upper.concat(lower).map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join("L")}Z`;
}

function stairs(samples, x, y, value) {
  return samples.flatMap((sample, index) => {
    const here = y(value(sample));
    const next = samples[index + 1];
    return next ? [[x(sample.at), here], [x(next.at), here]] : [[x(sample.at), here]];
  });
}

/** The next number above that is easy to read. */
function ceiling(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((step) => step * size).find((step) => step >= value);
}

function described(samples) {
  const last = samples.at(-1);
  if (!last) return "no requests yet";
  const most = (name) => Math.max(...samples.map((sample) => sample[name]));
  return `Last minutes: now ${last.in_flight} in flight and ${last.held} held; at most ${most("in_flight")} in flight and ${most("held")} held. Arrow keys read single moments.`;
}
