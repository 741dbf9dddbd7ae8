// Where each head looked: of one word of an answer, how much every head of every layer took of each token before it.

import { canLook, lookBack } from "/page/server.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => (share >= 0.01 ? `${Math.round(share * 100)} %` : "< 1 %");

let on = null; // asked once
let seen = null; // what the server told of the word in view

export const isOn = () => (on ??= canLook().catch(() => false));

/** Show where the token `at` of a version looked; `prompt` has the ids that came before its first. */
export async function show(version, at) {
  const ids = [...(version.promptIds ?? []), ...version.tokens.slice(0, at + 1).map((token) => token.id)];
  $("sight-told").textContent = "Looking…";
  $("sight-text").replaceChildren();
  $("sight-heads").replaceChildren();
  if (!$("sight").open) $("sight").showModal();
  try {
    seen = await lookBack(ids);
  } catch (error) {
    $("sight-told").textContent = error.message;
    return;
  }
  const word = seen.tokens.at(-1).trim() || "a space";
  const left = ids.length - seen.tokens.length;
  $("sight-told").textContent = `What “${word}” took of the ${seen.tokens.length} tokens up to it` +
    (left > 0 ? `; the ${left} before these are left out.` : ".");
  options($("sight-layer"), seen.weights.length);
  options($("sight-head"), seen.weights[0].length);
  const [layer, head] = telling(seen.weights);
  choose(layer, head);
}

function options(select, num) {
  const before = Math.min(Number(select.value) || 0, num - 1);
  select.replaceChildren(...Array.from({ length: num }, (_, i) => new Option(i, i)));
  select.value = before;
  select.onchange = () => choose(Number($("sight-layer").value), Number($("sight-head").value));
}

/** The head that looks hardest at something other than the word itself, the one before it and the first. */
function telling(weights) {
  let best = [0, 0, -1];
  weights.forEach((heads, layer) => heads.forEach((row, head) => {
    const peak = Math.max(...row.slice(1, -2), 0);
    if (peak > best[2]) best = [layer, head, peak];
  }));
  return best;
}

function choose(layer, head) {
  $("sight-layer").value = layer;
  $("sight-head").value = head;
  overview(layer, head);
  const row = seen.weights[layer][head];
  const most = Math.max(...row);
  $("sight-text").replaceChildren(...seen.tokens.map((text, i) => {
    const node = document.createElement("span");
    node.className = i === row.length - 1 ? "looker" : "";
    node.textContent = text;
    node.title = percent(row[i]);
    node.dataset.weight = row[i];
    node.style.setProperty("--share", `${Math.round((70 * row[i]) / most)}%`);
    return node;
  }));
}

/** One strip of the text for each head; a click makes it the large one. */
function overview(layer, head) {
  const heads = seen.weights[0].length;
  $("sight-heads").style.setProperty("--heads", heads);
  $("sight-heads").replaceChildren(...seen.weights.flatMap((rows, l) => rows.map((row, h) => {
    const canvas = document.createElement("canvas");
    canvas.width = row.length;
    canvas.height = 1;
    canvas.className = l === layer && h === head ? "chosen" : "";
    canvas.title = `layer ${l}, head ${h}`;
    canvas.onclick = () => choose(l, h);
    const brush = canvas.getContext("2d");
    const ink = getComputedStyle($("sight")).getPropertyValue("color");
    row.forEach((weight, i) => {
      brush.globalAlpha = Math.sqrt(weight);
      brush.fillStyle = ink;
      brush.fillRect(i, 0, 1, 1);
    });
    return canvas;
  })));
}
