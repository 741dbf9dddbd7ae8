// The settings dialog: what the model is asked with, and how the page looks. Every change holds at once and is kept.

import { key } from "/page/server.js";
import { set, settings } from "/page/store.js";

const SLIDERS = [
  { name: "temperature", label: "Daring", low: 0, high: 2, step: 0.05, ends: ["sure", "wild"], start: 0.7 },
  { name: "top_p", label: "Breadth (top p)", low: 0.05, high: 1, step: 0.05, ends: ["few words", "all words"], start: 0.9 },
  { name: "min_p", label: "Floor (min p)", low: 0, high: 0.5, step: 0.01, ends: ["off", "strict"], start: 0.05 },
  { name: "top_k", label: "Candidates (top k)", low: 0, high: 200, step: 1, ends: ["off", "200"], start: 40 },
  { name: "repetition_penalty", label: "Against repeating", low: 1, high: 1.5, step: 0.01, ends: ["off", "strong"], start: 1.1 },
];
const LENGTH = { name: "max_tokens", label: "Length of a turn", low: 16, high: 1024, step: 8, ends: ["a line", "pages"], start: 200 };
const SEED = "seed";

const $ = (id) => document.getElementById(id);

/** What the settings say of sampling, in the words of /generate. */
export function sampling() {
  const given = { max_tokens: settings.max_tokens ?? LENGTH.start };
  for (const { name } of SLIDERS) if (settings[name] !== undefined) given[name] = settings[name];
  if (settings[SEED] !== undefined) given.seed = settings[SEED];
  return given;
}

function slider({ name, label, low, high, step, ends, start }, hasDefault) {
  const row = document.createElement("div");
  row.className = "slider";
  const title = Object.assign(document.createElement("label"), { textContent: label, htmlFor: `set-${name}` });
  const told = Object.assign(document.createElement("output"), { htmlFor: `set-${name}` });
  const input = Object.assign(document.createElement("input"), { type: "range", id: `set-${name}`, min: low, max: high, step });
  const reset = Object.assign(document.createElement("button"), { type: "button", textContent: "reset", className: "quiet" });
  reset.setAttribute("aria-label", `Reset ${label}`);
  const scale = Object.assign(document.createElement("span"), { className: "ends" });
  scale.setAttribute("aria-hidden", "true");
  for (const end of ends) scale.append(Object.assign(document.createElement("span"), { textContent: end }));
  const show = () => {
    const value = settings[name];
    input.value = value ?? start;
    told.textContent = value ?? (hasDefault ? "the model’s own" : start);
    input.setAttribute("aria-valuetext", told.textContent);
    row.classList.toggle("unset", value === undefined);
    reset.hidden = value === undefined;
  };
  input.addEventListener("input", () => (set(name, Number(input.value)), show()));
  reset.addEventListener("click", () => (set(name, undefined), show(), input.focus()));
  show();
  row.append(title, told, reset, input, scale);
  return { row, input };
}

function seedRow() {
  const row = document.createElement("div");
  row.className = "slider";
  const label = Object.assign(document.createElement("label"), { textContent: "Seed", htmlFor: "set-seed" });
  const input = Object.assign(document.createElement("input"), {
    type: "text", inputMode: "numeric", id: "set-seed", placeholder: "a new one each time", pattern: "[0-9]{1,15}",
    value: settings[SEED] ?? "",
  });
  input.addEventListener("input", () => {
    const value = input.value.trim();
    if (input.validity.valid) set(SEED, value === "" ? undefined : Number(value));
  });
  row.append(label, input);
  return row;
}

/** The page's look follows the setting. */
export function look() {
  document.documentElement.dataset.looks = settings.looks ?? "auto";
}

/** Build the dialog. `opened` is called each time before it is shown. */
export function build(opened) {
  const dialog = $("settings");
  const length = slider(LENGTH, false);
  $("sampling").append(...SLIDERS.map((each) => slider(each, true).row), length.row, seedRow());
  $("system").value = settings.system ?? "";
  $("system").addEventListener("input", () => set("system", $("system").value.trim() || undefined));
  $("ask-odds").checked = settings.odds !== false;
  $("ask-odds").addEventListener("change", () => set("odds", $("ask-odds").checked));
  for (const input of document.querySelectorAll("[name=looks]")) {
    input.checked = input.value === (settings.looks ?? "auto");
    input.addEventListener("change", () => (set("looks", input.value), look()));
  }
  $("forget-key").addEventListener("click", () => {
    key.set("");
    $("key-set").hidden = true;
  });
  $("settings-button").addEventListener("click", () => {
    $("key-set").hidden = !key.get();
    opened();
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  return { longest: (tokens) => (length.input.max = Math.max(64, Math.min(tokens, 8192))) };
}

/** Ask a person for the API key; "" if they would rather not. */
export function askForKey(wasWrong) {
  const dialog = $("key");
  const input = $("key-value");
  if (wasWrong) $("key-told").textContent = "That key is not taken here. Try another.";
  input.value = "";
  return new Promise((done) => {
    dialog.querySelector("form").onsubmit = () => done(input.value.trim());
    dialog.oncancel = $("key-later").onclick = () => (done(""), dialog.close());
    dialog.showModal();
  });
}
