// The status page: reads the status once, follows the event stream from then on, and starts anew when the stream ends.
//
// The stream is read with fetch and not with EventSource, which cannot send the token.

import { DECISIONS_SHOWN, STARTS_SHOWN, poolCard } from "./pool.js";
import { count, element, keyed, mark, say, span } from "./words.js";

const RETRY_MS = 1500;
const SAID_MS = 6000;
const HISTORY_MS = 15 * 60 * 1000;

const main = document.getElementById("pools");
const link = document.getElementById("link");
const said = document.getElementById("said");
const summary = document.getElementById("summary");
const cards = new Map();
const history = new Map();
let status = null;
let skew_ms = 0;

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
}

/** Asks for the token until the server takes it. */
async function ask(path, options = {}) {
  for (;;) {
    const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
    if (answer.status !== 401) return answer;
    await askToken();
  }
}

let asking = null;
function askToken() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("token");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("token", dialog.querySelector("input").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function act(path, body) {
  const answer = await ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  const text = await answer.json().catch(() => ({}));
  tell(answer.ok ? text.done ?? "done" : text.error ?? `the server answered ${answer.status}`, !answer.ok);
}

let quietTimer = null;
function tell(text, bad) {
  said.classList.toggle("bad", bad);
  say(said, text);
  clearTimeout(quietTimer);
  quietTimer = setTimeout(() => say(said, ""), SAID_MS);
}

function setLink(state, text) {
  mark(link, "data-state", state);
  say(link, text);
}

/** Lines of `text/event-stream`: `event:` and `data:`, an empty line ends one. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n").filter((line) => !line.startsWith(":"));
      const named = (name) => fields.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart()).join("\n");
      if (named("data")) yield { event: named("event"), data: JSON.parse(named("data")) };
    }
  }
}

/** The stream is opened first: what happens between the two is told twice and taken once. */
async function follow() {
  const answer = await ask("admin/events");
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  for (const pool of await read("admin/history")) history.set(pool.name, pool.samples);
  await readPast();
  setLink("live", "live");
  for await (const { event, data } of events(answer.body)) {
    if (event === "status") take(data);
    else if (event === "notice") note(data);
    else if (event === "missed") await readPast();
  }
}

async function read(path) {
  const answer = await ask(path);
  if (!answer.ok) throw new Error(`${path}: the server answered ${answer.status}`);
  return answer.json();
}

/** Decisions and starts by pool: the stream's status is without them, and notices bring what is new. */
const past = new Map();
async function readPast() {
  const whole = await read(`admin/status?decisions=${DECISIONS_SHOWN}&starts=${STARTS_SHOWN}`);
  past.clear();
  for (const { name, decisions, starts } of whole.pools) past.set(name, { decisions, starts });
  take(whole);
}

function note(notice) {
  const known = past.get(notice.pool);
  if (notice.notice === "decision") add(known?.decisions, notice.decision, DECISIONS_SHOWN);
  if (notice.notice === "start") add(known?.starts, notice.start, STARTS_SHOWN);
  draw();
}

/** To a list that is oldest first, unless it is there already. */
function add(list, item, most) {
  const text = JSON.stringify(item);
  if (!list || list.some((known) => JSON.stringify(known) === text)) return;
  list.push(item);
  if (list.length > most) list.shift();
}

function take(next) {
  skew_ms = Date.now() - next.now;
  status = next;
  for (const pool of status.pools) {
    const samples = history.get(pool.name) ?? [];
    history.set(pool.name, samples);
    if (!past.has(pool.name)) past.set(pool.name, { decisions: [], starts: [] });
    const serving = pool.replicas.filter((replica) => ["ready", "busy"].includes(replica.state)).length;
    samples.push({ at: next.now, in_flight: pool.in_flight, held: pool.held, serving });
    while (samples.length > 1 && next.now - samples[0].at > HISTORY_MS) samples.shift();
  }
  draw();
}

function draw() {
  if (!status) return;
  const now = Date.now() - skew_ms;
  keyed(main, status.pools, (pool) => pool.name, (pool) => {
    const card = poolCard(pool.name, act);
    cards.set(pool.name, card);
    return { node: card.node };
  });
  for (const pool of status.pools) {
    cards.get(pool.name).update({ ...pool, ...past.get(pool.name) }, now);
    cards.get(pool.name).sample(history.get(pool.name) ?? []);
  }
  const sum = (value) => status.pools.reduce((total, pool) => total + value(pool), 0);
  say(summary, `${count(status.pools.length, "pool")}, ${count(sum((pool) => pool.replicas.length), "replica")}, up for ${span(now - status.since)}`);
  const held = sum((pool) => pool.held);
  document.title = held > 0 ? `(${held} held) Rewarm` : "Rewarm";
}

const THEMES = [["", "as the system", "◐"], ["light", "light", "☀"], ["dark", "dark", "☾"]];
function setTheme(name) {
  const [value, word, sign] = THEMES.find(([value]) => value === name) ?? THEMES[0];
  document.documentElement.dataset.theme = value;
  const button = document.getElementById("theme");
  mark(button, "aria-label", `Colours: ${word}`);
  mark(button, "title", `Colours: ${word}`);
  say(button, sign);
  localStorage.setItem("theme", value);
}
document.getElementById("theme").addEventListener("click", () => {
  const now = THEMES.findIndex(([value]) => value === (localStorage.getItem("theme") ?? ""));
  setTheme(THEMES[(now + 1) % THEMES.length][0]);
});
setTheme(localStorage.getItem("theme") ?? "");

// Ages grow between two events too.
setInterval(draw, 1000);

for (;;) {
  try {
    await follow();
    throw new Error("the stream ended");
  } catch (error) {
    setLink("lost", "connection lost, trying again");
    console.info(error.message);
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}
