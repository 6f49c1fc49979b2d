// The server, as the page knows it: models, answers as they are streamed, vectors, rankings, status.
//
// Rule: knows nothing of the page. What goes wrong is a ServerError with words for the user. The API key is kept in
// memory only: any script of this origin could read a store.

import { wordsFor } from "./words.js";

const LOST = "The connection was lost before the answer was complete.";
const UNREACHABLE = "The server cannot be reached. Check your connection, then try again.";

export class ServerError extends Error {
  /** `details` are the server's own words, `status` is 0 where no response came, `param` is the field at fault. */
  constructor(message, { details = "", status = 0, param = null } = {}) {
    super(message);
    Object.assign(this, { details, status, param });
  }

  /** Of an error in the API's form. */
  static told(error, status) {
    const { message, details } = wordsFor(error, status);
    return new ServerError(message, { details, status, param: error.param });
  }

  static async of(response) {
    const said = await response.json().catch(() => null);
    const error = said?.error?.message ? said.error : { message: said?.error ?? response.statusText };
    return ServerError.told(error, response.status);
  }
}

export class Server {
  key = "";

  /** `routes`: the addresses of models, chat and, where there are such, embeddings, rerank and status. */
  constructor(routes) {
    this.routes = routes;
  }

  /** Each model with its tasks, of which there are none while they are not known, and whether it is the bundled one. */
  async models() {
    const response = await this.#ask(this.routes.models);
    return (await response.json()).data.map(({ id, lmbridge }) => ({
      name: id,
      tasks: lmbridge?.tasks ?? [],
      bundled: Boolean(lmbridge?.bundled),
    }));
  }

  async status() {
    return (await this.#ask(this.routes.status, { cache: "no-store" })).json();
  }

  /** A vector for each input, and the tokens that were read. */
  async embed(body, signal) {
    const { data, usage } = await this.#post(this.routes.embeddings, body, signal);
    return { vectors: data.map(({ embedding }) => embedding), tokens: usage.total_tokens };
  }

  /** The documents' places and scores, the most relevant first, and the tokens that were read. */
  async rerank(body, signal) {
    const { results, usage } = await this.#post(this.routes.rerank, body, signal);
    const ranks = results.map(({ index, relevance_score }) => ({ index, score: relevance_score }));
    return { ranks, tokens: usage.total_tokens };
  }

  /** The chunks of one answer. Throws ServerError also where the stream ends without its final word. */
  async *chat(body, signal) {
    const response = await this.#send(this.routes.chat, body, signal);
    try {
      for await (const data of eventsOf(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw ServerError.told(chunk.error, 0);
        yield chunk;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // which is how fetch says that the network failed
    }
    throw new ServerError(LOST);
  }

  async #post(address, body, signal) {
    const response = await this.#send(address, body, signal);
    return response.json().catch((error) => {
      throw error.name === "AbortError" ? error : new ServerError(LOST);
    });
  }

  #send(address, body, signal) {
    const headers = { "Content-Type": "application/json" };
    return this.#ask(address, { method: "POST", headers, body: JSON.stringify(body), signal });
  }

  async #ask(address, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Bearer ${this.key}` }) };
    const response = await fetch(address, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new ServerError(UNREACHABLE);
    });
    if (!response.ok) throw await ServerError.of(response);
    return response;
  }
}

const LINE_END = /\r\n|\n|\r/;
const SURE_LINE_END = /\r\n|\n|\r(?!$)/; // a \r that came last may be half of one

/** The data of each server-sent event in `body`, a stream of bytes that may be cut anywhere. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value = "", done } = await reader.read();
      const lines = (rest + value).split(done ? LINE_END : SURE_LINE_END);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line !== "" || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
