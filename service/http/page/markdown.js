// Markdown to nodes, block by block, so that while an answer grows only its last block is made again. Everything goes
// through the sanitiser every time; raw HTML in an answer is text, and nothing is loaded from anywhere.

import { Marked } from "/page/marked.js";

const TAGS = "p br hr em strong del code pre blockquote ul ol li table thead tbody tr th td h3 a sup sub span".split(" ");
const SAFE = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "title", "start", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"]/g, (char) => `&#${char.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: false,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ text, href }) => `<span class="image">${escaped(text || href)}</span>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    heading({ tokens, depth }) {
      return `<h3 class="depth${Math.min(depth, 3)}">${this.parser.parseInline(tokens)}</h3>`;
    },
  },
});

/** The blocks of a text as marked's tokens, each with its `raw` source. */
export function blocks(text) {
  const found = marked.lexer(text);
  return found.filter((token) => token.type !== "space" && token.type !== "def");
}

/** One block as a node that is safe to show. */
export function render(block) {
  const fragment = window.DOMPurify.sanitize(marked.parser([block]), SAFE);
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const wide of fragment.querySelectorAll("pre, table")) wide.tabIndex = 0; // it scrolls, so keys must reach it
  return fragment;
}
