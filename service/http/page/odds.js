// The odds of every word: which token made which letters of the rendered text, and what else it might have been, as bars.

const REACH = 24; // characters of markup that may lie between two letters of the rendered text
const TINTS = [[0.02, 4], [0.08, 3], [0.2, 2], [0.4, 1], [2, 0]];

export const chance = (logprob) => (logprob === null ? 0 : Math.exp(logprob));
export const percent = (share) => (share >= 0.995 ? "> 99 %" : share >= 0.01 ? `${Math.round(share * 100)} %` : "< 1 %");

/** Where each token's text ends in the whole text: `ends[i]` characters. */
export function endsOf(tokens, known = []) {
  let at = known.at(-1) ?? 0;
  for (let i = known.length; i < tokens.length; i += 1) known.push((at += tokens[i].text.length));
  return known;
}

function tokenAt(ends, at) {
  let low = 0;
  let high = ends.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > at) high = middle;
    else low = middle + 1;
  }
  return low;
}

/**
 * Put each token's letters in `node` into a span of their own. `source` from `start` on is what the node was rendered
 * from: letters are found in it in order, and what is passed over is markup.
 */
export function weave(node, source, start, tokens, ends) {
  let at = start;
  let current = tokenAt(ends, at);
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    if (/^\s*\n\s*$/.test(text.data)) continue; // between the items of a list nothing but items may be
    const woven = document.createDocumentFragment();
    let run = "";
    const flush = () => {
      if (run) woven.append(span(run, current, tokens[current]));
      run = "";
    };
    for (const char of text.data) {
      const found = source.indexOf(char, at);
      if (found >= 0 && found - at < REACH) {
        const next = tokenAt(ends, found);
        if (next !== current) flush();
        current = next;
        at = found + char.length;
      }
      run += char;
    }
    flush();
    text.replaceWith(woven);
  }
}

function span(text, index, token) {
  if (!token || token.logprob === null) return document.createTextNode(text);
  const made = document.createElement("span");
  made.className = `token tint${TINTS.find(([below]) => chance(token.logprob) < below)[1]}`;
  made.dataset.token = index;
  made.textContent = text;
  return made;
}

/** A token as people read it: a space before it is a matter of course, and where none is it goes on with a word. */
function shown(text) {
  if (/^[\p{L}\p{N}]/u.test(text)) return `…${text}`;
  return text.replace(/\n/g, "↵").replace(/^ (?=\S)/, "").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "nothing";
}

const add = (parent, tag, className, text = "") => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  parent.append(node);
  return node;
};

/** In words, for those who do not look. */
export function spoken(token) {
  const others = token.top.filter(([text]) => text !== token.name).slice(0, 3);
  const instead = others.map(([text, logprob]) => `${text.trim() || "a space"} ${percent(chance(logprob))}`);
  return `${token.text.trim() || "a space"}, ${percent(chance(token.logprob))}` +
    (instead.length ? `; instead: ${instead.join(", ")}` : "");
}

/** Fill the card: the likeliest tokens as bars, the chosen one marked, and what all others have together. */
export function fill(card, token) {
  card.replaceChildren();
  const rest = Math.max(0, 1 - token.top.reduce((sum, [, logprob]) => sum + chance(logprob), 0));
  const widest = Math.max(rest, ...token.top.map(([, logprob]) => chance(logprob)), 1e-6);
  const list = add(card, "ol", "bars");
  const row = (text, share, className) => {
    const line = add(list, "li", className);
    add(line, "span", "name", text);
    const bar = add(add(line, "span", "track"), "span", "bar");
    bar.style.width = `${Math.max((100 * share) / widest, 0.8)}%`;
    add(line, "span", "share", percent(share));
  };
  for (const [text, logprob] of token.top) row(shown(text), chance(logprob), text === token.name ? "chosen" : "");
  if (rest > 0.005) row("all others", rest, "rest");
}

/** Beside the word, inside the window. */
export function place(card, word) {
  card.hidden = false;
  const { left, bottom, top } = word.getClientRects()[0] ?? word.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = card;
  const under = bottom + 8 + height < innerHeight;
  card.style.left = `${Math.max(8, Math.min(left - 14, innerWidth - width - 8))}px`;
  card.style.top = `${under ? bottom + 8 : Math.max(8, top - height - 8)}px`;
}
