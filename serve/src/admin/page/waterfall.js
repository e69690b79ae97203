// The last starts: one line each, one bar for each stage, on a common scale.

import { drawn, element, keyed, mark, say, span, timeOfDay } from "./words.js";

/** The stages of a restore in their order; each has its colour in style.css. */
export const STAGES = ["admit", "sandbox", "fetch", "skeleton", "identity", "replay", "ready"];
const TIERS = { wake: "woken", restore: "restored", cold: "cold start" };
const OUTCOMES = { failed: "failed", timed_out: "too slow", given_up: "given up" };
const HEIGHT = 22;

/** Returns `{ node, update(starts) }`; starts are newest first. */
export function waterfall() {
  const list = element("ol", { class: "starts" });
  const empty = element("p", { class: "empty" }, "No replica has been started yet.");
  const node = element("div", {}, list, empty);
  function update(starts) {
    // A cold start or one that hung would make all others too small to see: their bars run over the edge.
    const usual = starts.filter((start) => start.outcome === "ready" && start.tier !== "cold");
    const longest = Math.max(1, ...(usual.length > 0 ? usual : starts).map((start) => start.took_ms));
    empty.hidden = starts.length > 0;
    keyed(list, starts, (start) => `${start.replica} ${start.at}`, (start) => line(start));
    for (const part of list.keyedParts.values()) part.scale(longest);
  }
  return { node, update };
}

/** What the colours mean. */
export function stageKey() {
  const words = STAGES.map((stage, index) => {
    const word = element("span", {}, stage);
    word.style.setProperty("--swatch", `var(--stage-${index + 1})`);
    return word;
  });
  return element("span", { class: "key" }, ...words);
}

function line(start) {
  const bars = drawn("svg", { role: "img", "aria-label": inWords(start) });
  const node = element("li", { class: "start", "data-outcome": start.outcome },
    element("span", { class: "who", title: `${start.replica}, ${timeOfDay(start.at)}` }, `${start.replica} `, element("span", { class: "quiet" }, TIERS[start.tier] ?? start.tier)),
    bars,
    element("span", { class: "took" }, OUTCOMES[start.outcome] ?? span(start.took_ms)),
    start.reason ? element("span", { class: "why" }, start.reason) : null);
  return { node, scale: (longest) => draw(bars, start, longest) };
}

/** Parallel stages lie in lanes of their own: admit, then sandbox above fetch. */
function draw(svg, start, longest) {
  if (svg.dataset.longest === String(longest)) return;
  svg.dataset.longest = longest;
  const percent = (ms) => `${Math.max(0, (100 * ms) / longest).toFixed(3)}%`;
  const stages = start.stages.length > 0 ? start.stages : [{ stage: "", start_ms: 0, took_ms: start.took_ms }];
  const bars = stages.map((stage) => {
    const index = STAGES.indexOf(stage.stage);
    const half = stages.some((other) => other !== stage && overlaps(stage, other));
    const lower = half && stages.some((other) => other !== stage && overlaps(stage, other) && before(other, stage));
    const bar = drawn("rect", {
      class: index === -1 ? "bar whole" : "bar",
      x: percent(stage.start_ms), width: percent(Math.max(stage.took_ms, longest / 400)),
      y: lower ? HEIGHT / 2 : 2, height: half ? HEIGHT / 2 - 2 : HEIGHT - 4, rx: 2,
    }, drawn("title", {}, `${stage.stage || TIERS[start.tier]}: ${span(stage.took_ms)}`));
    if (index !== -1) bar.style.setProperty("fill", `var(--stage-${index + 1})`);
    return bar;
  });
  const beyond = start.took_ms > longest ? drawn("text", { class: "beyond", x: "99%", y: HEIGHT - 6, "text-anchor": "end" }, "»") : null;
  svg.replaceChildren(...[drawn("rect", { class: "back", x: 0, y: 0, width: "100%", height: HEIGHT, rx: 4 }), ...bars, beyond].filter(Boolean));
}

/** A microsecond of rounding is no overlap. */
function overlaps(a, b) {
  return a.start_ms + 0.5 < b.start_ms + b.took_ms && b.start_ms + 0.5 < a.start_ms + a.took_ms;
}

function before(a, b) {
  return STAGES.indexOf(a.stage) < STAGES.indexOf(b.stage);
}

function inWords(start) {
  const stages = start.stages.map((stage) => `${stage.stage} ${span(stage.took_ms)}`).join(", ");
  return `${start.replica}, ${TIERS[start.tier] ?? start.tier}, ${start.outcome} after ${span(start.took_ms)}${stages ? `: ${stages}` : ""}`;
}
