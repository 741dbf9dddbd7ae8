// What a person sees when connections, servers and processes die under an answer.

import assert from "node:assert/strict";
import { ended, keptOf, say, textOf, whole } from "./writing.mjs";

async function begin(page, numWords, text = "Once upon a time") {
  await page.fill("#words", text);
  await page.keyboard.press("Enter");
  await page.waitForFunction((num) => document.querySelectorAll(".answer .token, .answer .text")[0]?.innerText.length > num, numWords);
}

/** What was asked, what came of it, and how often it had to be asked for again. */
function followed(page) {
  const seen = { bodies: [], again: [] };
  page.on("request", (request) => {
    const { pathname } = new URL(request.url());
    if (pathname === "/generate") seen.bodies.push(request.postDataJSON());
    else if (pathname.startsWith("/generate/") && request.method() === "GET") seen.again.push(request.headers()["last-event-id"]);
  });
  return seen;
}

/** The connection dies, then the process that served it: the text goes on at the right token, by itself. */
export async function reconnect({ url, visitor, want, shot }) {
  const { page } = await visitor(url, { settings: { max_tokens: 250, seed: 5 } });
  const seen = followed(page);
  await begin(page, 20);
  await want("reset");
  await page.waitForFunction((before) => document.querySelector(".answer .text").innerText.length > before + 20, (await textOf(page)).length);
  await want("kill");
  await shot(page, "reconnecting");
  await page.waitForFunction((before) => document.querySelector(".answer .text").innerText.length > before + 20, (await textOf(page)).length);
  await want("mend");
  await page.reload(); // the reader's own leaving
  await ended(page);
  const kept = await keptOf(page);
  const version = kept.turns[1].versions[0];
  assert.equal(version.finish, "length");
  return { body: seen.bodies[0], bodies: seen.bodies.length, again: seen.again, text: version.text, tokens: version.tokens.map((token) => token.id) };
}

/** An embedded server dies: the page says so, keeps the text, and goes on with it when there is a server again. */
export async function death({ url, visitor, want, shot }) {
  const { page } = await visitor(url, { settings: { max_tokens: 200 } });
  await begin(page, 60);
  await want("kill");
  await page.waitForSelector("text=The server does not answer any more. What it wrote is kept.");
  const before = (await textOf(page)).trim();
  await shot(page, "dead-server");
  await want("start");
  await page.goto(url);
  await page.click("#pages .name");
  assert.equal((await textOf(page)).trim(), before);
  await page.click("text=Continue from here");
  await page.waitForSelector("#stop:not([hidden])");
  await page.waitForFunction((num) => document.querySelector(".answer .text").innerText.length > num + 20, before.length);
  await page.keyboard.press("Escape");
  await whole(page);
  assert.ok((await textOf(page)).startsWith(before));
}

/** It was started anew while an answer was read: that answer is gone there, and not here. */
export async function forgotten({ url, visitor, want }) {
  const { page } = await visitor(url);
  await begin(page, 3, "go");
  await want("forget");
  await page.waitForSelector("text=no longer knows this answer");
  assert.ok((await textOf(page)).length > 3);
  await say(page, "go");
}
