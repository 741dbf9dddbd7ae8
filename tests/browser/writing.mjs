// What a person does with a server that is well: write, look, change, keep. Each scenario throws where the page fails.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const SMALL = { width: 390, height: 780 };

export const whole = (page) => page.waitForSelector("#stop", { state: "hidden" });
export const textOf = (page) => page.locator(".answer .text").last().innerText();

/** The open page as the browser has kept it. */
export const keptOf = (page) =>
  page.evaluate(async () => {
    const { all } = await import("/page/store.js");
    return all()[0];
  });

/** Until the last answer has come to its end, whoever reads it now. */
export async function ended(page) {
  while (!(await keptOf(page))?.turns.at(-1).versions.at(-1).finish) await page.waitForTimeout(50);
}

/** Say something, and wait until the answer is there. */
export async function say(page, text) {
  const before = (await keptOf(page))?.changed;
  await page.fill("#words", text);
  await page.keyboard.press("Enter");
  while ((await keptOf(page))?.changed === before) await page.waitForTimeout(20); // it may be too quick to be seen
  await ended(page);
}

async function axe(page, where) {
  if (!(await page.evaluate(() => "axe" in window))) await page.context().newCDPSession(page).then((cdp) => inject(page, cdp));
  const { violations } = await page.evaluate(() => window.axe.run());
  const told = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`);
  assert.deepEqual(told, [], `accessibility, ${where}`);
}

/** Past the page's policy, as an extension would. */
async function inject(page, cdp) {
  const { readFile } = await import("node:fs/promises");
  await cdp.send("Runtime.evaluate", { expression: await readFile(AXE, "utf-8") });
}

/** From the empty page to a story of two turns: an opening, numbers, odds by pointer and by keys, more of it. */
export async function story({ url, visitor, shot }) {
  const { page } = await visitor(url, { settings: { max_tokens: 50, seed: 11 }, colorScheme: "light" });
  await page.waitForSelector("#openings button");
  assert.match(await page.innerText("#served"), /Bundled storyteller\s+1,024 tokens/);
  await axe(page, "empty");
  await shot(page, "empty-light");
  await page.click("#openings li:nth-child(2) button");
  await page.waitForSelector(".answer.running .token");
  await shot(page, "writing-light");
  await whole(page);
  assert.match(await page.innerText(".answer .numbers"), /[\d.]+ tokens\/s · first after [\d.]+ m?s · 50 tokens/);
  assert.match(await page.innerText("#memory-told"), /^58 of 1,024 tokens$/);
  await axe(page, "written");

  await page.locator(".token").nth(5).hover();
  const bars = await page.locator("#odds .bar").evaluateAll((all) => all.map((bar) => bar.getBoundingClientRect().width));
  assert.ok(bars.length >= 6 && Math.max(...bars) > 3 * Math.min(...bars), "bars are as long as their odds");
  assert.equal(await page.locator("#odds .chosen").count(), 1);
  await shot(page, "odds-light");
  await page.click(".answer .buttons >> text=Odds");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  assert.match(await page.textContent("#spoken"), /, (<|>)? ?\d+ %; instead: /);
  await axe(page, "odds shown");
  await page.emulateMedia({ colorScheme: "dark" });
  await axe(page, "dark");
  await shot(page, "odds-dark");

  const before = (await textOf(page)).trim();
  await page.focus("#words");
  await page.keyboard.press("Enter"); // nothing written: go on
  await page.waitForSelector("#stop:not([hidden])");
  await whole(page);
  const after = (await textOf(page)).trim();
  assert.ok(after.startsWith(before) && after.length > before.length + 60, "it goes on in the same text");
  const kept = await keptOf(page);
  assert.equal(kept.turns[1].versions[0].tokens.length, 100);
  await page.setViewportSize(SMALL);
  const [inner, wide] = await page.evaluate(() => [innerWidth, document.documentElement.scrollWidth]);
  assert.equal(wide, inner, "nothing sticks out at the width of a phone");
  await axe(page, "phone");
  await shot(page, "phone-dark");
  await page.click("#shelf-button");
  await axe(page, "phone, shelf");
  await shot(page, "phone-shelf");
}

/** Settings, versions, editing, pages: what is changed is kept, over a reload too. */
export async function changes({ url, visitor, shot }) {
  const { page } = await visitor(url, { settings: { max_tokens: 16 } });
  const bodies = [];
  page.on("request", (request) => request.url().endsWith("/generate") && bodies.push(request.postDataJSON()));
  await say(page, "The king was");
  await page.click("text=Try another");
  await page.waitForSelector("text=2 of 2");
  await ended(page); // as kept: what stops it may not have been drawn yet
  await page.click("[aria-label='Earlier version']");
  await page.waitForSelector("text=1 of 2");

  await page.click("#settings-button");
  await page.locator("#set-temperature").fill("0");
  await page.fill("#set-seed", "7");
  await page.fill("#system", "Be brief.");
  await page.check("[value=dark]");
  await axe(page, "settings");
  await shot(page, "settings-dark");
  await page.keyboard.press("Escape");
  await page.reload();
  assert.equal(await page.evaluate(() => document.documentElement.dataset.looks), "dark");
  assert.equal(await page.inputValue("#system"), "Be brief.");
  await page.waitForSelector("text=1 of 2");

  await say(page, "And then the queen");
  assert.deepEqual([bodies.at(-1).temperature, bodies.at(-1).seed], [0, 7]);
  assert.ok(bodies.at(-1).resumable && bodies.at(-1).logprobs > 0);
  await page.locator(".exchange").first().hover();
  await page.locator("[aria-label='Edit these words']").first().click();
  await say(page, "The king is");
  assert.equal(await page.locator(".exchange").count(), 1, "what came after an edited turn is gone");
  await page.click("#toast >> text=Undo");
  assert.equal(await page.locator(".exchange").count(), 2, "and comes back");

  const [file] = await Promise.all([page.waitForEvent("download"), page.click("text=Export all")]);
  const { pages } = JSON.parse(await (await import("node:fs/promises")).readFile(await file.path(), "utf-8"));
  assert.equal(pages[0].turns[0].text, "The king was");
  await page.click("text=New page");
  assert.ok(await page.isVisible("#openings button"));
  await page.hover("#pages li");
  await page.click("#pages [title=Delete]");
  assert.equal(await page.locator("#pages li").count(), 0);
}

/** Markdown while it comes, and nothing that an answer says can become more than text. */
export async function markdown({ url, visitor, shot }) {
  const { page, context } = await visitor(url);
  await page.fill("#words", "go");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".answer.running strong"); // before it is whole
  await whole(page);
  const found = await page.evaluate(() => {
    const text = document.querySelector(".answer .text");
    return {
      tags: [...new Set([...text.querySelectorAll("*")].map((node) => node.localName))],
      links: [...text.querySelectorAll("a")].map((link) => link.href),
      done: window.done,
      words: text.innerText,
    };
  });
  for (const tag of ["strong", "em", "h3", "li", "code", "pre", "table", "blockquote", "a"]) assert.ok(found.tags.includes(tag), tag);
  for (const tag of ["script", "img", "iframe", "form", "style", "svg"]) assert.ok(!found.tags.includes(tag), tag);
  assert.deepEqual(found.links, ["https://example.org/a", "", "https://example.org/auto"]);
  assert.equal(found.done, undefined);
  assert.match(found.words, /<img src=x onerror=window.done=1>[^]*a picture bad[^]*<svg onload=window.done=1>/);
  await axe(page, "markdown");
  await shot(page, "markdown");
  assert.equal(context.pages().length, 1);
}

/** What no longer fits into the model's memory is left out from the beginning, and the page says so. */
export async function memory({ url, visitor }) {
  const { page } = await visitor(url, { settings: { max_tokens: 16 } });
  const prompts = [];
  page.on("request", (request) => request.url().endsWith("/generate") && prompts.push(request.postDataJSON().prompt));
  for (const text of ["the first of three", "the second, rather longer", "the third"]) await say(page, text);
  assert.match(await page.locator(".numbers").last().innerText(), /the model saw no more of \d+ earlier turns/);
  await say(page, `${"word ".repeat(60)}end`);
  for (const prompt of prompts) assert.ok(prompt.length <= 80 - 16, `${prompt.length} tokens`);
  assert.ok(String.fromCharCode(...prompts.at(-1)).length > 30);
}

/** Waiting in a queue can be seen; to stop is to cancel, and keeps what there is. */
export async function waiting({ url, visitor, shot, want }) {
  const { page } = await visitor(url);
  await page.fill("#words", "go");
  await page.keyboard.press("Enter");
  await page.waitForSelector("text=The server has too much to do; asking again");
  await want("room");
  await page.waitForSelector("text=7 ahead of you");
  assert.equal(await page.locator(".queue i").count(), 7);
  await shot(page, "queue");
  await want("go");
  await page.waitForSelector(".answer .token, .answer .block");
  await page.keyboard.press("Escape");
  await page.waitForSelector("text=Stopped.");
  assert.ok((await textOf(page)).length > 0);
}

/** Without a key nothing is said; the page asks for one, keeps it for the tab, and sends it. */
export async function keys({ url, visitor, shot, key }) {
  const { page } = await visitor(url);
  await page.waitForSelector("#key[open]");
  await axe(page, "key");
  await shot(page, "key");
  await page.fill("#key-value", "wrong");
  await page.keyboard.press("Enter");
  await page.waitForSelector("text=That key is not taken here");
  await page.fill("#key-value", key);
  await page.keyboard.press("Enter");
  await say(page, "Hello");
  assert.ok(await textOf(page));
  await page.reload();
  await say(page, "Once more");
  const kept = await page.evaluate(() => [JSON.stringify(localStorage), Object.values(sessionStorage)]);
  assert.ok(!kept[0].includes(key) && kept[1].includes(key));
}

/** A click on a word shows where each head looked; another head is another picture. */
export async function sight({ url, visitor, shot }) {
  const { page } = await visitor(url, { colorScheme: "light" });
  await say(page, "Why did it stay?");
  await page.locator(".answer .token").nth(20).click();
  await page.waitForSelector("#sight[open] #sight-text .looker");
  const weights = () => page.$$eval("#sight-text span", (nodes) => nodes.map((node) => Number(node.dataset.weight)));
  const first = await weights();
  assert.ok(first.length > 30 && Math.abs(first.reduce((sum, weight) => sum + weight, 0) - 1) < 0.01);
  assert.equal(await page.locator("#sight-heads canvas").count(), 2 * 4);
  await shot(page, "sight");
  await page.selectOption("#sight-layer", await page.inputValue("#sight-layer") === "0" ? "1" : "0");
  assert.notDeepEqual(await weights(), first);
  await axe(page, "sight");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#sight[open]", { state: "detached" });
}
