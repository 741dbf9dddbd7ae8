// Talks to the server: keys, errors, and one answer read to its end over as many connections as that takes.
// It knows no page and shows nothing.

const PROGRESS = "progress ";
const KEY = "millrace.key"; // in the tab's own storage, gone when it is closed
const SILENT_MS = 25000; // the server says something every 10 s; after this the connection is taken for dead
const PATIENCE_MS = { embedded: 4000, durable: 40000 }; // without any answer, before an answer counts as lost
const AGAIN = new Set([408, 425, 429, 502, 503, 504]);

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
  ask: async () => "", // asks a person; "" is no. Set by the page
};
let asking = null; // one question, however many requests wait for it

/** The server said no, or that something is wrong. */
export class Refused extends Error {
  constructor(status, told, code, param, afterMs) {
    super(told);
    Object.assign(this, { status, code, param, afterMs });
  }
}

/** Fetch from the server; asks for a key where one is needed. Throws `Refused`, and what fetch throws. */
export async function ask(path, options = {}) {
  for (;;) {
    const used = key.get();
    const headers = { ...options.headers, ...(used ? { authorization: `Bearer ${used}` } : {}) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.ok) return response;
    if (response.status === 401 && (used !== key.get() || (await askForKey(used !== "")))) continue;
    throw await refusal(response);
  }
}

async function askForKey(wasWrong) {
  asking ??= key.ask(wasWrong).finally(() => (asking = null));
  const given = await asking;
  if (given) key.set(given);
  return Boolean(given);
}

async function refusal(response) {
  let told = {};
  try {
    told = await response.json();
  } catch { /* a proxy's page: its status must do */ }
  const error = told.error ?? told;
  const text = error.detail ?? error.message ?? `the server answered ${response.status}`;
  const afterMs = 1000 * (Number(response.headers.get("retry-after")) || 0);
  return new Refused(response.status, text, error.code, error.param ?? error.errors?.[0]?.field, afterMs);
}

const json = (data) => ({
  method: "POST",
  body: JSON.stringify(data),
  headers: { "content-type": "application/json" },
});

/** The served model: `{id, max_model_len}`. */
export const served = async () => (await (await ask("/v1/models")).json()).data[0];

/** Whether answers end with the server's process: one that has workers apart keeps them elsewhere. */
export const isEmbedded = async () => !("workers" in (await (await ask("/ready")).json()));

/** Token ids of `{messages}` or `{prompt}`. */
/** Whether the server tells where heads looked. */
export const canLook = async () => Boolean((await (await ask("/ready")).json()).attention_view);

/** Of a text's last token: the texts of all, and by layer and head how much it took of each. */
export const lookBack = async (ids) => (await ask("/attention", json({ token_ids: ids.slice(-512) }))).json();

export async function tokenize(what) {
  return (await (await ask("/tokenize", json(what))).json()).tokens;
}

/** Events as `{data, id}`, comments as `{comment}`: a comment is one line. Ends where the stream ends, whole or not. */
async function* frames(response, heard) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let frame = { data: "", id: "" };
  for (;;) {
    const { done, value } = await reader.read();
    heard();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const [, name, text] = /^([^:]*):? ?(.*)$/.exec(line);
      if (line === "") {
        if (frame.data) yield frame;
        frame = { data: "", id: "" };
      } else if (name === "") yield { comment: text };
      else if (name in frame) frame[name] += text;
    }
  }
}

/**
 * One answer. `body` is what is asked of /generate, under a `name` drawn for it alone; or, to read on, `id` and the
 * `position` in tokens.
 */
export class Reading {
  constructor({ body = null, name = "", id = "", position = 0 }, embedded) {
    Object.assign(this, { body, name, id, position, embedded, stopped: false });
    this.patienceMs = embedded ? PATIENCE_MS.embedded : PATIENCE_MS.durable;
    this.wake = () => {};
  }

  /** Ask the server to end it. Its terminal event still comes, if the server lives. */
  async stop() {
    this.stopped = true;
    this.wake();
    if (!this.id) return; // as soon as there is one
    setTimeout(() => this.connection?.abort(), 2000);
    try {
      await ask(`/generate/${this.id}`, { method: "DELETE" });
    } catch {
      this.connection?.abort();
    }
  }

  /**
   * What happens, in order: `{kind: "waiting", ahead}`, `{kind: "reading", share}`, `{kind: "token", ...}`,
   * `{kind: "away", tries, why}`, `{kind: "back"}`, and one last `{kind: "end", finish, ...}` or
   * `{kind: "lost", why, told}`.
   */
  async *events() {
    let tries = 0;
    let heardMs = performance.now();
    for (;;) {
      let why = "broken";
      let end = null;
      let afterMs = 0;
      try {
        const response = await this.#connect();
        heardMs = performance.now();
        if (tries) yield { kind: "back" };
        tries = 0;
        for await (const event of this.#read(response)) {
          heardMs = performance.now();
          if (event.kind === "end") end = event; // what follows is only the end of the stream
          else yield event;
        }
      } catch (error) {
        if (error instanceof Refused) {
          if (this.id && error.status === 404) return yield { kind: "lost", why: "forgotten", told: error.message };
          if (!AGAIN.has(error.status)) return yield { kind: "lost", why: "refused", told: error.message, error };
          why = error.status === 429 ? "full" : "unready";
          afterMs = error.afterMs;
          heardMs = performance.now(); // it answers, so it lives
        } else if (!(error instanceof TypeError || error instanceof DOMException)) throw error;
        else why = tries || !this.id ? "unreachable" : "broken";
      }
      if (end) return yield end;
      if (this.stopped) return yield { kind: "end", finish: "cancelled" };
      if (performance.now() - heardMs > this.patienceMs) return yield { kind: "lost", why };
      tries += 1;
      yield { kind: "away", tries, why };
      await this.#pause(Math.max(afterMs, Math.min(100 * 2 ** tries, 3000)));
      if (this.stopped) return yield { kind: "end", finish: "cancelled" };
    }
  }

  async #connect() {
    this.connection = new AbortController();
    const { signal } = this.connection;
    const accept = "text/event-stream";
    if (this.id) {
      const headers = { accept, "last-event-id": `${this.id}:${this.position}` };
      return await ask(`/generate/${this.id}`, { headers, signal });
    }
    // The same name makes the same request, so sending it twice asks for it once.
    const request = json(this.body);
    const response = await ask("/generate", {
      ...request,
      headers: { ...request.headers, accept, "idempotency-key": this.name },
      signal,
    });
    this.id = response.headers.get("content-location").split("/").pop();
    this.position = 0;
    if (this.stopped) this.stop();
    return response;
  }

  async *#read(response) {
    let alarm;
    const heard = () => {
      clearTimeout(alarm);
      alarm = setTimeout(() => this.connection.abort(), SILENT_MS);
    };
    heard();
    try {
      for await (const frame of frames(response, heard)) {
        if (frame.comment?.startsWith(PROGRESS)) yield progress(JSON.parse(frame.comment.slice(PROGRESS.length)));
        if (!frame.data || frame.data === "[DONE]") continue;
        const told = JSON.parse(frame.data);
        const [choice] = told.choices;
        if (choice.finish_reason === null) {
          this.position = Number(frame.id.split(":").pop());
          yield { kind: "token", seed: told.seed, ...token(choice) };
        } else {
          yield {
            kind: "end",
            finish: choice.finish_reason,
            text: choice.text,
            error: told.error?.detail,
            usage: told.usage,
            timings: told.timings,
          };
        }
      }
    } finally {
      clearTimeout(alarm);
    }
  }

  #pause(ms) {
    return new Promise((done) => {
      this.wake = done;
      setTimeout(done, ms);
    });
  }
}

function token(choice) {
  const odds = choice.logprobs;
  return {
    id: choice.token_ids[0],
    text: choice.text,
    logprob: odds?.token_logprobs[0] ?? null,
    name: odds?.tokens[0] ?? choice.text,
    top: odds?.top_logprobs.length ? Object.entries(odds.top_logprobs[0]).sort((a, b) => b[1] - a[1]) : [],
  };
}

const progress = (told) =>
  told.position === null
    ? { kind: "reading", share: told.computed_tokens / told.prompt_tokens }
    : { kind: "waiting", ahead: told.position };
