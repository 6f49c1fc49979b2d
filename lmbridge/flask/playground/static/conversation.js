// The conversation: its exchanges, the answer that comes in, and what is asked again.

import { byId, duration } from "./dom.js";
import { ExchangeView } from "./exchange.js";
import { keepInView, showEnd } from "./log.js";

const STOPPED = "Stopped";
const MOST_HEARD = 2_000; // characters of an answer that are read out unasked

export class Conversation {
  #running = null; // the AbortController of the answer that comes in
  #views = [];

  /** `host` has the server, the model and the settings, and hears of what happens. */
  constructor(exchanges, host) {
    this.host = host;
    for (const exchange of exchanges) this.#show(exchange);
    this.#showRunning();
    showEnd();
  }

  get running() {
    return Boolean(this.#running);
  }

  /** The exchanges as they would be if this were the end. */
  get exchanges() {
    const exchanges = this.#views.map(({ exchange }) => ({ ...exchange }));
    const last = exchanges.at(-1);
    if (last?.state === "running") Object.assign(last, { state: "stopped", facts: STOPPED });
    return exchanges;
  }

  ask(question) {
    this.#show({ question, model: "", answer: "", state: "running", error: "", details: "", facts: "" });
    showEnd();
    this.#answer();
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#running = null;
    this.#drop(0);
    this.host.announce("");
    this.host.settings.mark(null);
    this.#showRunning();
  }

  // --- its parts ---

  #show(exchange) {
    const view = new ExchangeView(exchange, {
      announce: this.host.announce,
      onRetry: () => this.#again(),
      onRewrite: (question) => this.#rewrite(view, question),
    });
    this.#views.push(view);
    byId("exchanges").append(view.item);
  }

  #drop(first) {
    for (const view of this.#views.splice(first)) view.item.remove();
  }

  #again() {
    // the button that had the focus goes; on a phone the message's field would bring up the keyboard
    byId(matchMedia("(pointer: fine)").matches ? "prompt" : "log").focus({ preventScroll: true });
    this.#answer();
  }

  /** Ask another question in an earlier one's place; what followed it is gone. */
  #rewrite(view, question) {
    this.#drop(this.#views.indexOf(view) + 1);
    view.exchange.question = question;
    this.#again();
    showEnd();
  }

  /** Have the last question answered. */
  async #answer() {
    const view = this.#views.at(-1);
    const { exchange } = view;
    const body = this.#body();
    const controller = (this.#running = new AbortController());
    Object.assign(exchange, { model: body.model, answer: "", state: "running", error: "", details: "", facts: "" });
    view.update();
    this.host.settings.mark(null);
    this.host.announce("");
    this.#showRunning();
    try {
      exchange.facts = await this.#read(view, body, controller.signal);
      exchange.state = "complete";
    } catch (error) {
      exchange.state = controller.signal.aborted ? "stopped" : "failed";
      if (exchange.state === "failed") Object.assign(exchange, { error: error.message, details: error.details ?? "" });
      else exchange.facts = STOPPED;
      if (exchange.state === "failed" && this.#running === controller) this.host.onError(error);
    }
    if (this.#running !== controller) return; // a new conversation has begun
    this.#running = null;
    keepInView(() => {
      view.update();
      this.#showRunning();
    });
    this.host.announce(exchange.state === "complete" ? view.heard.slice(0, MOST_HEARD) : exchange.facts);
    this.host.onChange();
  }

  /** Read the answer to its end; returns what is to be said about it. */
  async #read(view, body, signal) {
    const began = performance.now();
    let first, usage, reason;
    for await (const chunk of this.host.server.chat(body, signal)) {
      for (const choice of chunk.choices) {
        reason = choice.finish_reason ?? reason;
        if (!choice.delta.content) continue;
        first ??= performance.now();
        view.exchange.answer += choice.delta.content;
        view.grow(keepInView);
      }
      usage = chunk.usage ?? usage;
    }
    const total = (performance.now() - began) / 1000;
    const facts = [`${usage?.completion_tokens ?? 0} tokens in ${duration(total)}`];
    if (first) facts.push(`the first after ${duration((first - began) / 1000)}`);
    if (reason === "length") facts.push("cut at the limit of tokens");
    return facts.join(", ");
  }

  #body() {
    const { settings, model } = this.host;
    const earlier = this.#views.slice(0, -1).filter(({ exchange }) => exchange.answer);
    const system = settings.systemPrompt;
    return {
      ...settings.fields,
      model,
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...earlier.flatMap(({ exchange }) => [
          { role: "user", content: exchange.question },
          { role: "assistant", content: exchange.answer },
        ]),
        { role: "user", content: this.#views.at(-1).exchange.question },
      ],
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  #showRunning() {
    byId("start").hidden = this.#views.length > 0;
    this.#views.forEach((view, place) =>
      view.offer({ retry: !this.running && place === this.#views.length - 1, rewrite: !this.running }),
    );
    this.host.onRunning(this.running);
  }
}
