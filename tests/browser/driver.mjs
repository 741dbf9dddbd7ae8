// One Chromium for all tests. Each line of standard input is a scenario to play, as JSON: `{"scenario", ...arguments}`;
// each line of standard output is what came of it: `{"done": result}` or `{"failed": why}`. In between a scenario may
// ask for something that only the test can do, `{"wants": what}`, and goes on when the next line comes in.
//
//   node driver.mjs /usr/bin/chromium folder-for-screenshots

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";
import * as failing from "./failing.mjs";
import * as writing from "./writing.mjs";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const GUARD_MS = 40000;
const [, , chromiumPath, shots] = process.argv;

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const say = (data) => process.stdout.write(`${JSON.stringify(data)}\n`);
const browser = await chromium.launch({ executablePath: chromiumPath, args: FLAGS });

/** A person before a fresh browser at `url`. `complaints` are the things that no visit may bring. */
async function visitor(url, { settings = {}, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1180, height: 820 }, reducedMotion: "reduce", ...options });
  context.setDefaultTimeout(GUARD_MS);
  const complaints = [];
  await context.exposeFunction("complain", (text) => complaints.push(text));
  await context.addInitScript((given) => {
    addEventListener("securitypolicyviolation", (event) => window.complain(`policy: ${event.violatedDirective} ${event.blockedURI}`));
    if (!localStorage.getItem("millrace.settings")) localStorage.setItem("millrace.settings", JSON.stringify(given));
  }, settings);
  const page = await context.newPage();
  page.on("pageerror", (error) => complaints.push(`error: ${error.stack}`));
  page.on("console", (message) => {
    const isStatus = message.text().startsWith("Failed to load resource"); // a refusal, which the page answers itself
    if (message.type() === "error" && !isStatus) complaints.push(`console: ${message.text()}`);
  });
  const host = new URL(url).host;
  page.on("request", (request) => {
    const { protocol, host: asked } = new URL(request.url());
    if (asked !== host && protocol !== "blob:") complaints.push(`another host: ${request.url()}`);
  });
  await page.goto(url);
  return { page, context, complaints };
}

const tools = {
  visitor,
  shot: (page, name) => page.screenshot({ path: `${shots}/${name}.png` }),
  want: async (what) => {
    say({ wants: what });
    return JSON.parse((await lines.next()).value);
  },
};

say({ done: browser.version() });
for (;;) {
  const { value, done } = await lines.next();
  if (done) break;
  const { scenario, ...given } = JSON.parse(value);
  const visits = [];
  const watched = { ...tools, visitor: async (...args) => (visits.push(await visitor(...args)), visits.at(-1)) };
  try {
    const result = await { ...writing, ...failing }[scenario]({ ...watched, ...given });
    const complaints = visits.flatMap((visit) => visit.complaints);
    say(complaints.length ? { failed: complaints.join("\n") } : { done: result ?? null });
  } catch (error) {
    for (const [i, { page }] of visits.entries()) await tools.shot(page, `failed-${scenario}-${i}`).catch(() => {});
    say({ failed: `${error.stack}\n${visits.flatMap((visit) => visit.complaints).join("\n")}` });
  }
  await Promise.all(visits.map(({ context }) => context.close()));
}
await browser.close();
