// The chat page: which page is open, what is being written, and what every button means. Rules of the server are in
// server.js, of fitting in prompt.js, of looks in paper.js.

import { Paper, make } from "/page/paper.js";
import { promptFor } from "/page/prompt.js";
import { Reading, Refused, isEmbedded, key, served } from "/page/server.js";
import { askForKey, build, look, sampling } from "/page/settings.js";
import * as store from "/page/store.js";

const STORYTELLER = "bundled"; // the model that comes with the server
const NUM_ALTERNATIVES = 6; // bars beside a word
const RATE_MS = 2500; // over which the live rate is taken
const SAVE_MS = 1500;
const OPENINGS = {
  story: {
    title: "Where shall it begin?",
    told: "Write the first words, and the storyteller goes on in the same breath. Point at any word of its own to see what else it might have been.",
    lines: [
      "Once upon a time, in a mill by a slow green river,",
      "There was once a little mouse who",
      "“Where are you going?” asked the old woman.",
      "Tell me a story about a fox and the moon.",
      "The snow had fallen all night, and in the morning",
      "Far away in the forest stood a house that nobody",
    ],
  },
  chat: {
    title: "What shall we write?",
    told: "Ask, or begin something. Point at any word of the answer to see what else it might have been.",
    lines: [
      "Write a short poem about rain on a tin roof.",
      "Explain how a water mill works, to a child.",
      "Begin a story in a lighthouse, and stop where it gets exciting.",
      "Give me three unlikely titles for a book about bread.",
    ],
  },
};

const $ = (id) => document.getElementById(id);
const fresh = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

const runs = new Map(); // page id -> what is being written on it
let page = null; // the open one
let editing = null; // the turn whose words are in the line
let card = { id: "", max_model_len: 0 };
let embedded = true;
let undo = null;
let drawing = 0;
let atEnd = true; // the reader follows the text as it comes

const paper = new Paper({
  goOn: (turn) => write(page, turn, { goOn: true }),
  again: (turn) => write(page, turn, {}),
  turnTo: (turn, shown) => ((turn.shown = shown), keep(page), draw()),
  isLast: (turn) => page.turns.at(-1) === turn,
  copy: (text) => navigator.clipboard.writeText(text).then(() => say("Copied.")),
  edit,
});

// --- pages -----------------------------------------------------------------------------------------------------------

function blank() {
  const now = Date.now();
  return { id: fresh(), title: "", created: now, changed: now, turns: [], storyteller: null };
}

const isStoryteller = () => card.id === STORYTELLER;

function keep(which) {
  store.put(structuredClone(which)).catch(() => say("This browser would not keep the page: export it."));
}

function open(which) {
  page = which;
  editing = null;
  $("words").value = "";
  name(page);
  closeShelf();
  draw();
  scrollTo(0, document.body.scrollHeight);
}

/** A reload opens the same page again. */
const name = (which) => history.replaceState(null, "", which.turns.length ? `#${which.id}` : location.pathname);

function title(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 48 ? `${line.slice(0, 48).replace(/\s+\S*$/, "")}…` : line;
}

function shelf() {
  const list = $("pages");
  list.replaceChildren();
  for (const each of store.all()) {
    const item = make(list, "li", each.id === page.id ? "open" : "");
    const opener = make(item, "button", "name", each.title);
    opener.type = "button";
    if (each.id === page.id) opener.setAttribute("aria-current", "page");
    if (runs.has(each.id)) make(opener, "span", "writing", " writing");
    opener.addEventListener("click", () => each.id !== page.id && open(runs.get(each.id)?.page ?? structuredClone(each)));
    for (const [sign, label, action] of [["↓", "Export", exportOne], ["×", "Delete", discard]]) {
      const tool = make(item, "button", "quiet", sign);
      tool.type = "button";
      tool.title = label;
      tool.setAttribute("aria-label", `${label} “${each.title}”`);
      tool.addEventListener("click", () => action(each));
    }
  }
  $("export-all").hidden = !store.all().length;
}

function discard(which) {
  runs.get(which.id)?.reading?.stop();
  store.remove(which.id).catch(() => say("This browser would not forget the page: it may come back."));
  offerUndo("The page is gone.", () => (store.put(which), shelf()));
  if (which.id === page.id) open(blank());
  else shelf();
}

/** As text that people read. */
function exportOne(which) {
  const text = which.turns
    .map((turn) => (turn.role === "user" ? `> ${turn.text.replace(/\n/g, "\n> ")}` : turn.versions[turn.shown].text.trim()))
    .join("\n\n");
  store.download(`${which.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "page"}.md`, "text/markdown", `${text}\n`);
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function draw() {
  const run = runs.get(page.id);
  document.title = page.title ? `${page.title} · Millrace` : "Millrace";
  $("opening").hidden = page.turns.length > 0;
  paper.draw(page, Boolean(run));
  shelf();
  refresh();
}

/** What changes while something is written; at most once for each picture on the screen. */
function refresh() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    const run = runs.get(page.id);
    paper.update(page, Boolean(run));
    $("stop").hidden = !run;
    $("send").hidden = Boolean(run);
    const last = page.turns.at(-1);
    const goesOn = last?.role === "assistant" && last.versions[last.shown].finish !== "stop";
    $("send").textContent = editing ? "Replace" : $("words").value.trim() || !goesOn ? "Send" : "Go on";
    status(run);
    turnWheel(run);
    remember(last);
    if (run && atEnd) scrollTo(0, document.body.scrollHeight);
  });
}

function status(run) {
  const told = run?.told ?? "";
  const ahead = run?.ahead ?? 0;
  if ($("status").dataset.told === told) return;
  $("status").dataset.told = told;
  $("status").replaceChildren(told);
  const queue = make($("status"), "span", "queue");
  queue.setAttribute("aria-hidden", "true");
  for (let i = 0; i < Math.min(ahead, 24); i += 1) make(queue, "i");
}

/** The wheel turns as fast as the words flow. */
function turnWheel(run) {
  const wheel = document.querySelector(".wheel");
  wheel.classList.toggle("turning", Boolean(run));
  const [turning] = wheel.getAnimations();
  if (turning) turning.playbackRate = 0.3 + Math.min((run?.rate ?? 0) / 60, 3);
}

/** How much of the model's memory the page fills. */
function remember(last) {
  const stats = last?.versions?.[last.shown].stats;
  $("memory").hidden = !card.max_model_len;
  if (!card.max_model_len) return;
  const used = Math.min((stats?.prompt ?? 0) + (stats?.made ?? 0), card.max_model_len);
  $("memory-bar").firstChild.style.width = `${(100 * used) / card.max_model_len}%`;
  const limit = card.max_model_len.toLocaleString("en");
  $("memory-told").textContent = used ? `${used.toLocaleString("en")} of ${limit} tokens` : `${limit} tokens`;
}

function say(text, action) {
  const toast = $("toast");
  undo = action ?? null;
  toast.querySelector("span").textContent = text;
  toast.querySelector("button").hidden = !action;
  toast.hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => (toast.hidden = true), action ? 12000 : 4000);
}

const offerUndo = (text, action) => say(text, action);

// --- writing ---------------------------------------------------------------------------------------------------------

const blankVersion = () => ({ text: "", tokens: [], finish: null, stats: {}, unseen: null, pending: null });

/** The words in the line: a new turn, an edited one with all after it, or none, to go on. */
function send() {
  const text = $("words").value.trim();
  const last = page.turns.at(-1);
  if (runs.has(page.id)) return;
  if (!text) {
    if (last?.role === "assistant" && last.versions[last.shown].finish !== "stop") write(page, last, { goOn: true });
    return;
  }
  if (editing) {
    const before = structuredClone(page);
    page.turns.splice(page.turns.indexOf(editing));
    if (before.turns.length > page.turns.length + 2) {
      offerUndo("What came after was taken away.", () => (keep(before), open(before)));
    }
    editing = null;
  }
  $("words").value = "";
  grow();
  page.title ||= title(text);
  page.storyteller ??= isStoryteller();
  page.turns.push({ role: "user", text }, { role: "assistant", versions: [], shown: 0 });
  name(page);
  atEnd = true;
  write(page, page.turns.at(-1), {});
}

function edit(turn) {
  if (runs.has(page.id)) return;
  editing = turn;
  $("words").value = turn.text;
  grow();
  $("words").focus();
  refresh();
}

/** Have an answer written: a new version of it, or the shown one further. */
async function write(which, turn, { goOn = false }) {
  if (runs.has(which.id)) return;
  if (!goOn) turn.shown = turn.versions.push(blankVersion()) - 1;
  const version = turn.versions[turn.shown];
  const run = { page: which, version, began: performance.now(), told: "Asking…", times: [], first: version.tokens.length };
  start(run);
  try {
    if (!card.max_model_len) await meet();
    const asked = sampling();
    const { max_model_len: longest } = card;
    const room = longest - Math.min(asked.max_tokens, Math.floor(longest / 2));
    const ids = version.tokens.map((token) => token.id).filter((id) => id !== null);
    const before = which.turns.slice(0, which.turns.indexOf(turn));
    const messages = before.map((each) =>
      each.role === "user" ? { role: "user", content: each.text }
      : { role: "assistant", content: each.versions[each.shown].text });
    const prompt = await promptFor(messages, store.settings.system, goOn ? ids : [], room);
    version.unseen = { turns: prompt.turns, tokens: prompt.tokens };
    version.stats.prompt = prompt.ids.length;
    version.promptIds = prompt.ids.slice(0, goOn ? prompt.ids.length - ids.length : undefined);
    const body = { prompt: prompt.ids, model: card.id, ...asked, stream: true, resumable: true, progress: true };
    if (body.seed !== undefined) body.seed += goOn ? ids.length : turn.versions.length - 1; // more of the same luck is none
    if (store.settings.odds !== false) body.logprobs = NUM_ALTERNATIVES;
    await follow(run, new Reading({ body, name: fresh() }, embedded));
  } catch (error) {
    fail(run, error);
  }
}

/** Go on reading what was being written when this page was last left. */
async function reattach(which) {
  const last = which.turns.at(-1);
  const version = last?.versions?.[last.shown];
  if (!version?.pending || runs.has(which.id)) return;
  const run = { page: which, version, told: "Looking for the rest…", times: [], first: version.tokens.length, again: true };
  start(run);
  try {
    await follow(run, new Reading(version.pending, embedded));
  } catch (error) {
    fail(run, error);
  }
}

function start(run) {
  runs.set(run.page.id, run);
  run.version.finish = null;
  run.version.told = run.version.error = undefined;
  keep(run.page);
  if (run.page === page) draw();
}

function fail(run, error) {
  if (run.stopped) return finish(run, "cancelled");
  if (error instanceof Refused) finish(run, "refused", { told: error.message });
  else if (error instanceof TypeError && /fetch|network|load/i.test(error.message)) finish(run, "unreachable");
  else {
    finish(run, "error", { error: String(error) });
    throw error;
  }
}

function finish(run, how, more = {}) {
  Object.assign(run.version, { finish: how, pending: null, ...more });
  runs.delete(run.page.id);
  run.page.changed = Date.now();
  keep(run.page);
  if (run.page === page) {
    paper.update(page, false);
    $("spoken").textContent = `The answer has ${run.version.tokens.length - run.first} more tokens.`;
  }
  shelf();
  refresh();
}

async function follow(run, reading) {
  const { version } = run;
  run.reading = reading;
  if (run.stopped) return finish(run, "cancelled");
  run.told = "";
  pend(run);
  for await (const event of reading.events()) {
    if (event.kind === "token") take(run, event);
    else if (event.kind === "waiting") {
      run.ahead = event.ahead;
      run.told = event.ahead ? `${event.ahead} ahead of you ` : "Next in line";
    } else if (event.kind === "reading") {
      run.ahead = 0;
      run.told = event.share < 1 ? `Reading the page: ${Math.round(100 * event.share)} %` : "";
    } else if (event.kind === "away") run.told = away(event);
    else if (event.kind === "back") run.told = "";
    else if (event.kind === "lost") finish(run, event.why, { told: event.told });
    else {
      if (event.text) append(version, { id: null, text: event.text, logprob: null, name: event.text, top: [] });
      finish(run, event.finish, { error: event.error });
    }
    if (run.page === page) refresh();
  }
}

function away({ tries, why }) {
  if (why === "full") return "The server has too much to do; asking again…";
  if (why === "unready") return "The server is not ready; asking again…";
  return tries < 3 ? "The connection broke; going on…" : "The server does not answer; what it wrote is kept. Trying again…";
}

function append(version, token) {
  version.tokens.push(token);
  version.text += token.text;
}

function take(run, { kind: _, seed, ...token }) {
  const { version } = run;
  const now = performance.now();
  append(version, token);
  version.seed = seed;
  version.stats.made = version.tokens.length - run.first;
  run.told = "";
  if (!run.again) {
    if (!run.times.length) version.stats.firstMs = now - run.began;
    run.times.push(now);
    const since = Math.max(run.times.findLastIndex((time) => time < now - RATE_MS), 0);
    const spent = now - run.times[since];
    run.rate = spent > 0 ? (1000 * (run.times.length - 1 - since)) / spent : 0;
    const whole = now - run.times[0];
    if (whole > 0) version.stats.rate = (1000 * (run.times.length - 1)) / whole;
  }
  if (!version.pending.id || now - run.savedMs > SAVE_MS) pend(run);
}

/** Keep the page with where its answer can be read on. */
function pend(run) {
  const { body, name, id, position } = run.reading;
  run.savedMs = performance.now();
  run.version.pending = id ? { id, position } : { body, name };
  keep(run.page);
}

function stop() {
  const run = runs.get(page.id);
  if (!run) return;
  run.stopped = true;
  run.told = "Stopping…";
  run.reading?.stop();
  refresh();
}

// --- the line, the shelf, the start ----------------------------------------------------------------------------------

function grow() {
  const { style } = $("words");
  style.height = "auto";
  style.height = `${Math.min($("words").scrollHeight, innerHeight * 0.4)}px`;
  refresh();
}

function closeShelf() {
  document.body.classList.remove("shelf-open");
  $("shelf-button").setAttribute("aria-expanded", "false");
}

async function meet() {
  card = await served();
  embedded = await isEmbedded().catch(() => true);
  $("served-name").textContent = isStoryteller() ? "Bundled storyteller" : card.id;
  $("system-told").textContent = isStoryteller()
    ? "The bundled storyteller does not read one: it knows stories, not instructions."
    : "What the model is told before every page.";
  longest(Math.floor(card.max_model_len / 2));
  const kind = isStoryteller() ? OPENINGS.story : OPENINGS.chat;
  $("opening-title").textContent = kind.title;
  $("opening-told").textContent = kind.told;
  $("words").placeholder = isStoryteller() ? "Your next words…" : "Write…";
  $("openings").replaceChildren();
  for (const line of kind.lines) {
    const choice = make(make($("openings"), "li"), "button", "", line);
    choice.type = "button";
    choice.addEventListener("click", () => (($("words").value = line), send()));
  }
}

async function meetPatiently() {
  for (let tries = 1; ; tries += 1) {
    try {
      return await meet();
    } catch (error) {
      const isLoading = error instanceof Refused && error.status === 503;
      $("served-name").textContent = isLoading ? "The model is being loaded…" : "The server does not answer";
      if (error instanceof Refused && !isLoading) return ($("served-name").textContent = error.message);
      await new Promise((done) => setTimeout(done, Math.min(300 * tries, 3000)));
    }
  }
}

key.ask = askForKey;
look();
const { longest } = build(() => {});

$("writing").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("stop").addEventListener("click", stop);
$("words").addEventListener("input", grow);
$("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "ArrowUp" && !$("words").value) {
    const yours = page.turns.findLast((turn) => turn.role === "user");
    if (yours) edit(yours);
  }
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (runs.has(page.id)) stop();
    else if (editing) (editing = null), ($("words").value = ""), grow();
    closeShelf();
  }
  const isTyping = event.target.closest("input, textarea, dialog");
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("words").focus();
  }
});
addEventListener("scroll", () => (atEnd = innerHeight + scrollY > document.body.scrollHeight - 80), { passive: true });
addEventListener("pagehide", () => runs.forEach((run) => run.reading && pend(run)));
$("new-page").addEventListener("click", () => (open(blank()), $("words").focus()));
$("export-all").addEventListener("click", () =>
  store.download("millrace-pages.json", "application/json", JSON.stringify({ pages: store.all() }, null, 1)));
$("shelf-button").addEventListener("click", () => {
  const isOpen = document.body.classList.toggle("shelf-open");
  $("shelf-button").setAttribute("aria-expanded", String(isOpen));
});
$("toast").querySelector("button").addEventListener("click", () => (undo?.(), ($("toast").hidden = true)));

const isKept = await store.open();
if (!isKept) say("This browser keeps nothing: export what you like before you close the tab.");
const [meeting, asked] = [meetPatiently(), store.get(location.hash.slice(1))];
page = blank();
for (const each of store.all()) reattach(structuredClone(each)); // what was being written when the tab was left
if (asked) open(runs.get(asked.id)?.page ?? structuredClone(asked));
else meeting.then(() => page.turns.length || draw());
if (matchMedia("(hover: hover)").matches) $("words").focus(); // on a phone it would bring up the keyboard
