// What a person does with the status page, in a real browser. `tests/page.rs` serves the page over scripted pools, which
// do what the clicks ask for.
//
//   node status.mjs MODULES CHROMIUM URL TOKEN [SCREENSHOTS]

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [modules, executablePath, url, token, screenshots] = process.argv.slice(2);
const require = createRequire(path.join(modules, "x"));
const { chromium } = require("playwright-core");
const axe = require.resolve("axe-core/axe.min.js");

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
  for (const colorScheme of ["light", "dark"]) await look(colorScheme);
  await use();
} finally {
  await browser.close();
}
console.log("done");

/** A page that has been given the token. What goes wrong in it is remembered, and whom it asks. */
async function open(options) {
  const context = await browser.newContext({ viewport: { width: 1400, height: 900 }, locale: "en-GB", ...options });
  const page = await context.newPage();
  page.troubles = [];
  page.asked = new Set();
  page.on("pageerror", (error) => page.troubles.push(error.message));
  page.on("console", (message) => message.type() === "error" && page.troubles.push(message.text()));
  page.on("request", (request) => page.asked.add(new URL(request.url()).origin));
  await page.goto(url);
  const dialog = page.getByRole("dialog", { name: "This server asks for its token" });
  await dialog.getByLabel("Token").fill("wrong");
  await dialog.getByRole("button", { name: "Use it" }).click();
  // A wrong one is asked for again.
  await dialog.getByLabel("Token").fill(token);
  await dialog.getByRole("button", { name: "Use it" }).click();
  await page.getByText("live", { exact: true }).waitFor();
  return { context, page };
}

/** Everything is there, nothing keeps anybody out, and nothing comes from elsewhere. */
async function look(colorScheme) {
  const { context, page } = await open({ colorScheme });
  const llama = page.getByRole("article", { name: "llama" });
  await llama.getByRole("listitem").filter({ hasText: "llama-1" }).first().waitFor();

  const figures = await llama.locator(".figures > div").evaluateAll((all) =>
    all.map((one) => [one.querySelector("dt").textContent, one.querySelector("dd span").textContent]));
  assert.deepEqual(figures, [["In flight", "26"], ["Held", "5"], ["Serving", "4"], ["Starting", "2"], ["Warm", "1"]]);
  const states = await llama.locator(".tile").evaluateAll((all) => all.map((tile) => tile.dataset.state));
  assert.deepEqual(states, ["failed", "busy", "busy", "busy", "ready", "waking", "restoring", "draining", "warm"]);
  const busy = llama.locator(".tile").filter({ hasText: "llama-1" });
  assert.equal(await busy.locator(".taken").count(), 8, "one box for each request in flight");

  const starts = llama.locator(".start");
  assert.match(await starts.first().textContent(), /llama-8 woken/, "newest first");
  const restored = starts.filter({ hasText: "restored" }).first().getByRole("img");
  assert.match(await restored.getAttribute("aria-label"), /^llama-\d, restored, ready after \d+ ms: admit .*, replay .*, ready \d+ ms$/);
  assert.equal(await restored.locator("rect.bar").count(), 7, "one bar for each stage");
  await llama.getByText("not ready within 3 s").waitFor();

  const decision = llama.getByRole("listitem").filter({ hasText: "12 held requests would wait too long" });
  await decision.getByText("what it looked at").click();
  await decision.getByText("34 ms woken, 410 ms restored").waitFor();

  const chart = llama.locator("svg.chart");
  assert.match(await chart.getAttribute("aria-label"), /now 26 in flight and 5 held/);
  await chart.focus();
  await page.keyboard.press("ArrowLeft");
  await llama.getByText(/^\d\d:\d\d:\d\d: 26 in flight, 5 held, 4 replicas serving$/).waitFor();
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => getComputedStyle(document.body).colorScheme), "light dark");

  // Not as a script of the page, which the page's policy forbids.
  await page.evaluate(readFileSync(axe, "utf8"));
  const found = await page.evaluate(() => globalThis.axe.run({ resultTypes: ["violations"] }));
  const barriers = found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html).join(" ")}`);
  assert.deepEqual(barriers, [], "barriers that axe finds");

  if (screenshots) {
    await decision.getByText("what it looked at").click();
    await page.screenshot({ path: path.join(screenshots, `admin-${colorScheme}.png`), fullPage: true });
  }
  checkQuiet(page);
  await context.close();
}

/** The commands, the stream that follows, and a connection that is lost and comes back. */
async function use() {
  const { context, page } = await open({});
  const llama = page.getByRole("article", { name: "llama" });

  await llama.getByLabel("Replicas of llama").fill("6");
  await llama.getByRole("button", { name: "Scale", exact: true }).click();
  await llama.getByText("Set by hand to 6 replicas").waitFor();
  // The notices that follow: a decision and a replica.
  await llama.getByText("set by hand.").waitFor();
  await llama.locator(".tile[data-state=restoring]").filter({ hasText: "llama-10" }).waitFor();
  await llama.getByRole("button", { name: "Let the policy decide" }).click();
  await llama.getByText("Set by hand to 6 replicas").waitFor({ state: "hidden" });
  await llama.getByText("A start waits for memory: host memory: 40 bytes wanted, 2 of 90 free.").waitFor();

  await llama.getByLabel("Replicas of llama").fill("99");
  await llama.getByRole("button", { name: "Scale", exact: true }).click();
  await page.getByRole("status").getByText("99 replicas, expected at most 16").waitFor();

  // By keyboard alone: the focus stays on the button while tiles change around it.
  const drain = llama.getByRole("button", { name: "Drain llama-5" });
  await drain.focus();
  await page.keyboard.press("Enter");
  await llama.locator(".tile[data-state=draining]").filter({ hasText: "llama-5" }).waitFor();

  const theme = page.getByRole("button", { name: /^Colours/ });
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await theme.click();
  const light = await ground();
  await theme.click();
  assert.notEqual(await ground(), light);
  await page.reload();
  assert.notEqual(await ground(), light, "the choice is kept");

  // The pause makes the server go away and come back. The token is still known.
  await page.getByText("live", { exact: true }).waitFor();
  await llama.getByRole("button", { name: "Pause" }).click();
  await page.getByText("connection lost, trying again").waitFor();
  await page.getByText("live", { exact: true }).waitFor();
  await llama.getByRole("button", { name: "Resume" }).waitFor();

  const small = await page.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth);
  await page.setViewportSize({ width: 380, height: 800 });
  assert.ok(small && await page.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth), "nothing is cut off");
  page.troubles = page.troubles.filter((text) => !text.includes("ERR_CONNECTION_REFUSED") && !text.includes("ERR_INCOMPLETE_CHUNKED_ENCODING"));
  page.troubles = page.troubles.filter((text) => !text.includes("409"));
  checkQuiet(page);
  await context.close();
}

function checkQuiet(page) {
  // The browser itself writes a line for each answer that is an error; the wrong token was one.
  assert.deepEqual(page.troubles.filter((text) => !text.includes("401")), []);
  assert.deepEqual([...page.asked], [new URL(url).origin], "nothing is asked elsewhere");
}
