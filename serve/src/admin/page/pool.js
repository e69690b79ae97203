// One pool: its figures, the chart, the replicas as tiles, the last starts, the decisions in words, and what a person may do.

import { chart } from "./chart.js";
import { stageKey, waterfall } from "./waterfall.js";
import { count, drawn, element, keyed, mark, say, span, timeOfDay } from "./words.js";

/** How many starts and decisions are asked for and shown. */
export const STARTS_SHOWN = 10;
export const DECISIONS_SHOWN = 50;
const CHART_SPAN_MS = 5 * 60 * 1000;

/** Most interesting first. */
const ORDER = ["failed", "busy", "ready", "waking", "restoring", "draining", "pausing", "warm"];
const TIERS = { wake: "woken", restore: "restored", cold: "cold start" };

/** Returns `{ node, update(pool), sample(samples) }`. `act(path, body)` asks the server for something. */
export function poolCard(name, act) {
  const where = element("code", { class: "where quiet" });
  const policy = element("span", { class: "quiet" });
  const note = element("p", { class: "note" });
  const figures = figureRow();
  const requests = chart(CHART_SPAN_MS);
  const tiles = element("ul", { class: "tiles" });
  const none = element("p", { class: "empty" }, "No replica exists. The next request starts one.");
  const starts = waterfall();
  const decisions = element("ol", { class: "decisions", tabindex: "0", "aria-label": `Decisions of ${name}, newest first` });
  const undecided = element("p", { class: "empty" }, "Nothing has been decided yet.");
  const actions = actionRow(name, act);
  const title = `pool-${name}`;
  const node = element("article", { class: "pool", "aria-labelledby": title },
    element("div", { class: "head" }, element("h2", { id: title }, name), where, policy, actions.node),
    note,
    figures.node,
    element("div", { class: "panels" },
      section("Requests", key(["in flight", "--in-flight"], ["held", "--held"]), requests.node),
      section("Replicas", null, tiles, none),
      section("Last starts", stageKey(), starts.node),
      section("Decisions", null, decisions, undecided)));

  function update(pool, now) {
    say(where, pool.snapshot);
    say(policy, `policy ${pool.policy}`);
    const [text, bad] = noteOf(pool);
    say(note, text);
    note.classList.toggle("bad", bad);
    figures.update(pool);
    actions.update(pool);
    const sorted = pool.replicas.toSorted((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || b.in_flight - a.in_flight || a.name.localeCompare(b.name));
    none.hidden = sorted.length > 0;
    keyed(tiles, sorted, (replica) => replica.name, () => tile(name, act));
    for (const replica of sorted) tiles.keyedParts.get(replica.name).show(replica, pool.limits.concurrency, now);
    starts.update(pool.starts.slice(-STARTS_SHOWN).reverse());
    undecided.hidden = pool.decisions.length > 0;
    keyed(decisions, pool.decisions.slice(-DECISIONS_SHOWN).reverse(), (decision) => `${decision.at} ${decision.reason}`, decisionLine);
  }
  return { node, update, sample: requests.update };
}

function section(title, legend, ...content) {
  return element("section", {}, element("h3", {}, title, legend), ...content);
}

function key(...words) {
  return element("span", { class: "key" }, ...words.map(([word, colour]) => {
    const node = element("span", {}, word);
    node.style.setProperty("--swatch", `var(${colour})`);
    return node;
  }));
}

/** What a person must know before anything else. */
function noteOf(pool) {
  if (pool.circuit) return [`Starts of one kind are left alone until ${timeOfDay(pool.circuit.until)}, after ${count(pool.circuit.failures, "failure")} in a row: ${pool.circuit.reason}`, true];
  if (pool.obstacle) return [`${pool.obstacle[0].toUpperCase()}${pool.obstacle.slice(1)}.`, true];
  if (pool.paused) return ["Paused by hand: requests are refused, what is in flight is finished, and nothing is started until it is resumed.", false];
  if (pool.fixed !== null) return [`Set by hand to ${count(pool.fixed, "replica")}, whatever the policy wants.`, false];
  return ["", false];
}

function figureRow() {
  const figure = (kind, word) => {
    const value = element("span");
    const small = element("small");
    const node = element("div", { "data-kind": kind }, element("dt", {}, word), element("dd", {}, value, small));
    return { node, show: (text, more) => { say(value, String(text)); say(small, more); } };
  };
  const inFlight = figure("in-flight", "In flight");
  const held = figure("held", "Held");
  const serving = figure("serving", "Serving");
  const starting = figure("starting", "Starting");
  const warm = figure("warm", "Warm");
  const node = element("dl", { class: "figures" }, ...[inFlight, held, serving, starting, warm].map((one) => one.node));
  function update(pool) {
    const number = (...states) => pool.replicas.filter((replica) => states.includes(replica.state)).length;
    const up = number("ready", "busy");
    const draining = number("draining");
    inFlight.show(pool.in_flight, `of ${count(up * pool.limits.concurrency, "slot")}`);
    held.show(pool.held, pool.held > 0 ? `the oldest for ${span(pool.oldest_held_ms ?? 0)}` : "nobody waits");
    mark(held.node, "data-some", pool.held > 0);
    serving.show(up, `wanted ${pool.desired}, at most ${pool.limits.max_replicas}`);
    starting.show(number("restoring", "waking"), draining > 0 ? `${draining} draining` : "");
    warm.show(number("warm", "pausing"), `of ${pool.limits.warm}`);
  }
  return { node, update };
}

function actionRow(name, act) {
  const path = `admin/pools/${encodeURIComponent(name)}`;
  const input = element("input", { type: "number", min: 0, step: 1, value: 0, "aria-label": `Replicas of ${name}` });
  const scale = element("button", { type: "button", click: () => act(`${path}/scale`, { replicas: input.valueAsNumber }) }, "Scale");
  const back = element("button", { type: "button", click: () => act(`${path}/scale`, { replicas: null }) }, "Let the policy decide");
  const pause = element("button", { type: "button", "aria-pressed": "false", click: () => act(`${path}/${pause.getAttribute("aria-pressed") === "true" ? "resume" : "pause"}`, {}) }, "Pause");
  const node = element("div", { class: "actions" }, input, scale, back, pause);
  function update(pool) {
    mark(input, "max", pool.limits.max_replicas);
    if (document.activeElement !== input && input.dataset.shown !== String(pool.desired)) {
      input.value = pool.desired;
      input.dataset.shown = pool.desired;
    }
    back.hidden = pool.fixed === null;
    mark(pause, "aria-pressed", pool.paused);
    say(pause, pool.paused ? "Resume" : "Pause");
  }
  return { node, update };
}

function tile(pool, act) {
  const state = element("b");
  const since = element("span", { class: "since" });
  const name = element("div", { class: "name mono" });
  const slots = drawn("svg", { class: "slots", "aria-hidden": "true", preserveAspectRatio: "none" });
  const foot = element("span");
  const drain = element("button", { type: "button" }, "Drain");
  let shown = null;
  drain.addEventListener("click", () => act(`admin/pools/${encodeURIComponent(pool)}/replicas/${encodeURIComponent(shown.name)}/drain`, {}));
  const node = element("li", { class: "tile" },
    element("div", { class: "state" }, state, since), name, slots,
    element("div", { class: "foot" }, foot, drain));
  function show(replica, concurrency, now) {
    shown = replica;
    mark(node, "data-state", replica.state);
    say(state, replica.state);
    say(since, span(now - replica.since));
    say(name, replica.name);
    mark(name, "title", replica.name);
    pips(slots, replica.in_flight, concurrency);
    say(foot, `${replica.in_flight} of ${concurrency} · ${TIERS[replica.tier] ?? replica.tier}`);
    mark(drain, "aria-label", `Drain ${replica.name}`);
    drain.hidden = !["ready", "busy"].includes(replica.state);
  }
  return { node, show };
}

/** One box for each slot, filled where a request is in flight. */
function pips(svg, taken, slots) {
  const state = `${taken} ${slots}`;
  if (svg.dataset.shown === state) return;
  svg.dataset.shown = state;
  mark(svg, "viewBox", `0 0 ${slots * 10} 10`);
  svg.replaceChildren(...Array.from({ length: slots }, (_, index) =>
    drawn("rect", { class: index < taken ? "taken" : "free", x: index * 10 + 1, y: 1, width: 8, height: 8, rx: 1.5 })));
}

function decisionLine(decision) {
  const turn = decision.desired > decision.active ? "up" : decision.desired < decision.active ? "down" : "same";
  const { start_seconds: start } = decision;
  const inputs = {
    wanted: decision.wanted,
    "serving or starting": decision.active,
    warm: decision.warm,
    "in flight": decision.in_flight,
    held: decision.oldest_held_ms === null ? decision.held : `${decision.held}, the oldest for ${span(decision.oldest_held_ms)}`,
    "a start takes": `${span(start.wake * 1000)} woken, ${span(start.restore * 1000)} restored`,
  };
  const node = element("li", { class: "decision", "data-turn": turn },
    element("time", { datetime: new Date(decision.at).toISOString() }, timeOfDay(decision.at)),
    element("b", { "aria-label": `from ${decision.active} to ${decision.desired}` }, turn === "same" ? `${decision.desired}` : `${decision.active} → ${decision.desired}`),
    element("span", {}, `${decision.reason}.`, decision.steps.length === 0 ? null : element("span", { class: "quiet" }, ` ${decision.steps.join(", ")}.`)),
    element("details", {}, element("summary", {}, "what it looked at"),
      element("dl", {}, ...Object.entries(inputs).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]))));
  return { node };
}
