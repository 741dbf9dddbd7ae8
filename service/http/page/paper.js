// The page as it is seen: turns, the growing answer, its notice, its numbers and its tools. It changes nothing but nodes;
// what a button means is the business of whoever passed `act`.

import { blocks, render } from "/page/markdown.js";
import { endsOf, fill, place, spoken, weave } from "/page/odds.js";
import { isOn, show } from "/page/sight.js";

const $ = (id) => document.getElementById(id);
const UNENDED = /[\p{L}\p{N},;:–—-]$/u; // words that the answer goes on with in the same line

export function make(parent, tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  parent?.append(node);
  return node;
}

function button(parent, text, action, label = "") {
  const node = make(parent, "button", "quiet", text);
  node.type = "button";
  if (label) node.setAttribute("aria-label", label);
  node.addEventListener("click", action);
  return node;
}

const NOTES = {
  forgotten: "The server has been started anew and no longer knows this answer. What it wrote is kept.",
  unreachable: "The server does not answer any more. What it wrote is kept.",
  broken: "The connection was lost. What was written is kept.",
  unready: "The server is not ready. What was written is kept.",
  full: "The server has too much to do. What was written is kept.",
  interrupted: "This was left before an answer came.",
  timeout: "The time for this answer ran out.",
  cancelled: "Stopped.",
};

/** What is said of how an answer ended; "" where the text says it all. */
function noteOf(version) {
  const { finish, told, error } = version;
  if (finish === "refused") return `The server refused: ${told}`;
  if (finish === "error") return `The server could not go on: ${error ?? "it failed"}. What it wrote is kept.`;
  return NOTES[finish] ?? "";
}

const number = (value, unit) => `${value} ${value === 1 ? unit : `${unit}s`}`;

function numbersOf({ stats, tokens, unseen }) {
  const told = [];
  if (stats.rate) told.push(`${stats.rate >= 10 ? Math.round(stats.rate) : stats.rate.toFixed(1)} tokens/s`);
  if (stats.firstMs !== undefined) {
    told.push(`first after ${stats.firstMs < 950 ? `${Math.round(stats.firstMs)} ms` : `${(stats.firstMs / 1000).toFixed(1)} s`}`);
  }
  if (tokens.length) told.push(number(tokens.length, "token"));
  const parts = [unseen?.turns && number(unseen.turns, "earlier turn"), unseen?.tokens && number(unseen.tokens, "token")];
  const gone = parts.filter(Boolean).join(" and ");
  if (gone) told.push(`the model saw no more of ${gone}`);
  return told.join(" · ");
}

/** One answer on the paper. `show` may be called as often as a screen is drawn. */
class Answer {
  constructor(parent, turn, act) {
    this.turn = turn;
    this.act = act;
    this.blocks = [];
    this.node = make(parent, "article", "turn answer");
    make(this.node, "h2", "unseen", "Millrace");
    this.text = make(this.node, "div", "text");
    this.note = make(this.node, "p", "note");
    this.tools = make(this.node, "div", "tools");
    this.numbers = make(this.tools, "span", "numbers");
    this.buttons = make(this.tools, "span", "buttons");
  }

  get version() {
    return this.turn.versions[this.turn.shown];
  }

  show(isRunning, isLast) {
    const { version } = this;
    this.node.classList.toggle("running", isRunning);
    this.node.classList.toggle("ended", version.finish === "stop");
    this.#write(version, isRunning);
    this.note.textContent = isRunning ? "" : noteOf(version);
    this.note.classList.toggle("calm", version.finish === "cancelled");
    this.numbers.textContent = numbersOf(version);
    const wanted = [isRunning, isLast, this.turn.shown, this.turn.versions.length, version.finish, this.looking].join();
    if (wanted !== this.shownButtons) this.#offer(isRunning, isLast);
    this.shownButtons = wanted;
  }

  #write(version, isRunning) {
    if (this.written !== version) {
      this.written = version;
      this.blocks = [];
      this.ends = [];
      this.text.replaceChildren();
    }
    const { text, tokens } = version;
    endsOf(tokens, this.ends);
    const found = blocks(text);
    let at = 0;
    found.forEach((block, i) => {
      const start = Math.max(text.indexOf(block.raw.trimEnd(), at), at);
      at = start + block.raw.trimEnd().length;
      if (this.blocks[i]?.raw === block.raw) return;
      const node = this.blocks[i]?.node ?? make(this.text, "div", "block");
      const fragment = render(block);
      if (tokens.some((token) => token.logprob !== null)) weave(fragment, text, start, tokens, this.ends);
      node.replaceChildren(fragment);
      this.blocks[i] = { raw: block.raw, node };
    });
    for (const { node } of this.blocks.splice(found.length)) node.remove();
    this.text.classList.toggle("empty", isRunning && !text);
  }

  #offer(isRunning, isLast) {
    this.buttons.replaceChildren();
    const { turn, version, act } = this;
    if (isRunning) return;
    if (turn.versions.length > 1) {
      button(this.buttons, "‹", () => act.turnTo(turn, turn.shown - 1), "Earlier version").disabled = turn.shown === 0;
      make(this.buttons, "span", "which", `${turn.shown + 1} of ${turn.versions.length}`);
      const last = turn.versions.length - 1;
      button(this.buttons, "›", () => act.turnTo(turn, turn.shown + 1), "Later version").disabled = turn.shown === last;
    }
    if (isLast && !["stop", "length", "cancelled"].includes(version.finish)) {
      button(this.buttons, "Continue from here", () => act.goOn(turn)).classList.add("first");
    }
    if (isLast) button(this.buttons, "Try another", () => act.again(turn), "Regenerate: try another answer");
    if (version.tokens.some((token) => token.top.length)) {
      const node = button(this.buttons, "Odds", () => this.look(!this.looking), "Show the odds of every word");
      node.setAttribute("aria-pressed", String(Boolean(this.looking)));
    }
    if (this.looking) {
      const legend = make(this.buttons, "span", "legend", "sure");
      for (let tint = 1; tint < 5; tint += 1) make(legend, "i", `tint${tint}`);
      legend.append("surprising");
    }
    if (version.text && navigator.clipboard) button(this.buttons, "Copy", () => act.copy(version.text));
  }

  /** Tint the words by their odds, and let the arrow keys walk over them. */
  look(isOn) {
    this.looking = isOn;
    this.node.classList.toggle("looking", isOn);
    const { text } = this;
    if (isOn) {
      text.tabIndex = 0;
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", "Words with their odds: the arrow keys go from word to word");
      text.focus();
      walk(text, 0);
    } else {
      for (const name of ["tabindex", "role", "aria-label"]) text.removeAttribute(name);
      hide();
    }
    this.#offer(false, this.act.isLast(this.turn));
    this.buttons.querySelector("[aria-pressed]")?.focus({ preventScroll: true });
    if (isOn) text.focus({ preventScroll: true });
  }
}

/** The whole page. `act` has what its buttons do. */
export class Paper {
  constructor(act) {
    this.act = act;
    this.answers = new Map();
    this.node = $("paper");
    this.node.addEventListener("pointerover", (event) => this.#point(event));
    this.node.addEventListener("click", (event) => {
      this.#point(event);
      this.#sight(event.target.closest(".token"));
    });
    this.node.addEventListener("pointerleave", hide);
    this.node.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("scroll", hide, { passive: true });
  }

  /** Draw a page from its turns. */
  draw(page, isRunning) {
    hide();
    this.answers.clear();
    this.node.replaceChildren();
    let exchange = null;
    page.turns.forEach((turn, i) => {
      if (turn.role === "user" || !exchange) exchange = make(this.node, "section", "exchange");
      if (turn.role === "user") this.#yours(exchange, turn, page.turns[i + 1], page.storyteller);
      else this.answers.set(turn, new Answer(exchange, turn, this.act));
    });
    this.update(page, isRunning);
  }

  /** What has changed in its answers. */
  update(page, isRunning) {
    const last = page.turns.at(-1);
    for (const [turn, answer] of this.answers) answer.show(isRunning && turn === last, turn === last);
    this.node.setAttribute("aria-busy", String(isRunning));
  }

  #yours(exchange, turn, next, isStory) {
    const node = make(exchange, "article", "turn yours");
    const runsOn = isStory && next?.role === "assistant" && UNENDED.test(turn.text) && !turn.text.includes("\n\n");
    exchange.classList.toggle("runs-on", Boolean(runsOn));
    make(node, "h2", "unseen", "You");
    make(node, "div", "text", turn.text);
    if (runsOn) exchange.append(" ");
    const tools = make(node, "div", "tools");
    button(tools, "Edit", () => this.act.edit(turn), "Edit these words");
  }

  #answerOf(node) {
    const article = node.closest("article.answer");
    return [...this.answers.values()].find((answer) => answer.node === article);
  }

  #point(event) {
    const word = event.target.closest(".token");
    if (!word) return hide();
    if (event.type === "pointerover" && event.pointerType === "touch") return; // the tap says it
    point(word, this.#answerOf(word).version);
  }

  /** Where the heads looked when this word was written, if the server tells. */
  async #sight(word) {
    if (!word || !(await isOn())) return;
    hide();
    await show(this.#answerOf(word).version, Number(word.dataset.token));
  }

  #key(event) {
    const text = event.target.closest(".looking .text");
    if (!text || event.target !== text) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") {
      hide();
      event.stopPropagation();
    }
    if (event.key === "Enter") this.#sight(text.querySelector(".token.at"));
    if (!step) return;
    event.preventDefault();
    const token = walk(text, step);
    if (token) $("spoken").textContent = spoken(this.#answerOf(text).version.tokens[token.dataset.token]);
    if (token) point(token, this.#answerOf(text).version);
  }
}

/** The next word with odds; a word may be in several pieces. */
function walk(text, step) {
  const words = [...text.querySelectorAll(".token")];
  const now = words.findIndex((word) => word.classList.contains("at"));
  const next = words[Math.max(0, Math.min(words.length - 1, now < 0 ? 0 : now + step))];
  words[now]?.classList.remove("at");
  next?.classList.add("at");
  next?.scrollIntoView({ block: "nearest" });
  return next;
}

function point(word, version) {
  const token = version.tokens[word.dataset.token];
  if (!token) return;
  for (const old of document.querySelectorAll(".token.here")) old.classList.remove("here");
  word.classList.add("here");
  fill($("odds"), token);
  place($("odds"), word);
}

function hide() {
  if ($("odds").hidden) return;
  $("odds").hidden = true;
  for (const old of document.querySelectorAll(".token.here")) old.classList.remove("here");
}
