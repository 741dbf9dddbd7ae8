// Pages and settings in this browser: IndexedDB for pages, since odds of every word are too much for localStorage.
// Where a browser keeps nothing (some private windows), all of it lives as long as the tab.

const SETTINGS = "millrace.settings";
const kept = new Map(); // every page by id, newest state
let database = null;

const settled = (request) =>
  new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });

const pagesStore = (mode) => database.transaction("pages", mode).objectStore("pages");

/** All pages, the latest first; `false` as second value if nothing will be kept. */
export async function open() {
  try {
    const request = indexedDB.open("millrace", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pages", { keyPath: "id" });
    database = await settled(request);
    for (const page of await settled(pagesStore("readonly").getAll())) kept.set(page.id, page);
  } catch {
    database = null;
  }
  return database !== null;
}

export const get = (id) => kept.get(id);
export const all = () => [...kept.values()].sort((a, b) => b.changed - a.changed);

/** Keep a page as it is now. */
export async function put(page) {
  kept.set(page.id, page);
  if (database) await settled(pagesStore("readwrite").put(page));
}

export async function remove(id) {
  kept.delete(id);
  if (database) await settled(pagesStore("readwrite").delete(id));
}

export const settings = { ...read() };

function read() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

/** Set one setting; undefined takes it away. */
export function set(name, value) {
  if (value === undefined) delete settings[name];
  else settings[name] = value;
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* then until the tab is closed */ }
}

/** Hand the person a file. */
export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
