// One question with its answer, as it is shown.
//
// Rule: an exchange is {question, model, answer, state, error, details, facts}; its state is running, complete, stopped or
// failed. Whatever came from the server is put into the page as text.

import { copy } from "./copy.js";
import { fromTemplate } from "./dom.js";
import { Markdown } from "./markdown.js";
import { explain } from "./trouble.js";

export class ExchangeView {
  #frame = 0;
  #answer;

  /** `host` hears of what is pressed: onRetry(), onRewrite(question), and announces words. */
  constructor(exchange, host) {
    this.exchange = exchange;
    this.host = host;
    this.item = fromTemplate("exchange");
    this.#answer = new Markdown(this.#part("answer"));
    this.#part("retry").addEventListener("click", () => host.onRetry());
    this.#part("copy-answer").addEventListener("click", ({ target }) => copy(exchange.answer, target, host.announce));
    this.#part("answer").addEventListener("click", ({ target }) => this.#copyCode(target));
    this.#listenToRewriting();
    this.update();
  }

  /** The answer has grown: have `around` show it with the next frame, however often that is said until then. */
  grow(around) {
    this.#frame ||= requestAnimationFrame(() => around(() => this.#showAnswer()));
  }

  /** Show everything as it is now. */
  update() {
    const { question, state, model, error, details, facts } = this.exchange;
    this.#showAnswer();
    this.item.dataset.state = state;
    this.#part("question").textContent = question;
    this.#part("who").textContent = model;
    explain(this.#part("trouble"), error, details);
    this.#part("facts").textContent = facts;
    this.#part("retry").textContent = state === "complete" ? "Regenerate" : "Try again";
  }

  /** What can be done with it now. */
  offer({ retry, rewrite }) {
    this.#part("retry").hidden = !retry;
    this.#part("copy-answer").hidden = this.exchange.state === "running" || !this.exchange.answer;
    this.#part("edit").disabled = this.#part("resend").disabled = !rewrite;
  }

  /** The answer as it is read: without its marks. */
  get heard() {
    return this.#part("answer").textContent;
  }

  #showAnswer() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#answer.show(this.exchange.answer);
  }

  #copyCode(target) {
    if (!target.matches("button.copy")) return;
    copy(target.closest(".code").querySelector("pre").textContent.replace(/\n$/, ""), target, this.host.announce);
  }

  // --- rewriting the question ---

  #listenToRewriting() {
    const field = this.#part("rewritten");
    this.#part("edit").addEventListener("click", () => (this.#rewriting = true));
    this.#part("cancel").addEventListener("click", () => (this.#rewriting = false));
    this.#part("rewrite").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(field.value.trim());
    });
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        this.#rewriting = false;
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        this.#send(field.value.trim());
      }
    });
  }

  #send(question) {
    if (!question || this.#part("resend").disabled) return; // what was typed stays
    this.#rewriting = false;
    this.host.onRewrite(question);
  }

  set #rewriting(open) {
    if (this.#part("rewrite").hidden === !open) return;
    const had = this.#part("rewrite").contains(document.activeElement);
    this.#part("rewrite").hidden = !open;
    this.#part("question").hidden = this.#part("edit").hidden = open;
    this.#part("rewritten").value = this.exchange.question;
    if (open) this.#part("rewritten").focus();
    else if (had) this.#part("edit").focus();
  }

  #part(name) {
    return this.item.querySelector(`.${name}`);
  }
}
