// The message's field and its button, which sends or stops.
//
// Rule: what was typed stays until it is sent.

import { byId } from "./dom.js";
import { keepInView } from "./log.js";

const ANSWERING = "Stop the answer first. Your message is kept.";
const NO_MODEL = "There is no model to ask yet. Your message is kept.";

export class Composer {
  #running = false;

  /** `onSend` gets what was typed, and says whether it could be sent; `onStop` is to end the answer that comes in. */
  constructor(draft, { onSend, onStop }) {
    this.onSend = onSend;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) onStop();
      else this.#send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#running) this.#send();
      else if (this.text) this.#notify(ANSWERING);
    });
    byId("prompt").addEventListener("input", () => this.#fit());
    byId("prompt").value = draft;
    addEventListener("resize", () => this.#fit());
    this.#fit();
  }

  get text() {
    return byId("prompt").value.trim();
  }

  get draft() {
    return byId("prompt").value;
  }

  focus() {
    byId("prompt").focus();
  }

  set running(running) {
    this.#running = running;
    byId("send").textContent = running ? "Stop" : "Send";
    byId("send").toggleAttribute("data-stops", running);
    this.#notify("");
  }

  #send() {
    const { text } = this;
    if (!text) return;
    if (!this.onSend(text)) return this.#notify(NO_MODEL);
    byId("prompt").value = "";
    this.#fit();
  }

  #notify(words) {
    byId("notice").textContent = words;
  }

  /** Give the field the height of its text; the style sheet bounds it. */
  #fit() {
    keepInView(() => {
      byId("prompt").style.height = "auto";
      byId("prompt").style.height = `${byId("prompt").scrollHeight}px`;
    });
  }
}
