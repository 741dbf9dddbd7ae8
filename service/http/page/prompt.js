// What the model gets to read: the turns of a page as token ids, made to fit its memory. What does not fit is left out
// from the beginning, whole turns first, and how much it was is told.

import { Refused, tokenize } from "/page/server.js";

const CALLS = 6; // at most, to find what fits

/** `{ids, turns, tokens}`: the prompt, and how many turns and tokens of the answer so far it leaves out. */
export async function promptFor(turns, system, written, room) {
  const first = system ? [{ role: "system", content: system }] : [];
  let kept = turns;
  let ids = [];
  for (let call = 0; call < CALLS; call += 1) {
    ids = await idsOf([...first, ...kept]);
    const tail = Math.min(written.length, Math.floor(room / 2)); // of a long answer the end matters most
    const over = ids.length + tail - room;
    if (over <= 0) break;
    kept = shorter(kept, over / ids.length);
  }
  const space = Math.max(room - ids.length, 1);
  const tail = written.slice(-space);
  return {
    ids: [...ids, ...(written.length ? tail : [])],
    turns: turns.length - kept.length,
    tokens: written.length - tail.length,
  };
}

/** Without about this share of the text, taken from the front: turns, or of the only one left its first words. */
function shorter(turns, share) {
  const chars = turns.reduce((sum, turn) => sum + turn.content.length, 0);
  let todo = Math.ceil(chars * Math.min(share * 1.1, 0.9));
  let from = 0;
  while (from < turns.length - 1 && todo > 0) {
    todo -= turns[from].content.length;
    from += 1;
  }
  while (from < turns.length - 1 && turns[from].role !== "user") from += 1; // templates want a user's turn first
  if (from > 0) return turns.slice(from);
  const [{ content, role }] = turns;
  const cut = content.slice(todo);
  return [{ role, content: cut.slice(cut.search(/\s/) + 1) }];
}

let isBase = false; // a model without a chat template just goes on writing

async function idsOf(messages) {
  if (!isBase) {
    try {
      return await tokenize({ messages });
    } catch (error) {
      if (!(error instanceof Refused) || !/has no chat template/.test(error.message)) throw error;
      isBase = true;
    }
  }
  return await tokenize({ prompt: messages.map((message) => message.content).join("\n\n") });
}
