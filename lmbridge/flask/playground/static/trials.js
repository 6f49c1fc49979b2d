// What there is to try of models that make no text: how similar sentences are, and which documents fit a query.
//
// Rule: each has a form and what came of it last. Whatever comes from the server or the user is put into the page as
// text.

import { byId, duration, fromTemplate } from "./dom.js";
import { explain } from "./trouble.js";

const MOST = 24; // lines that a heat map has room for
const SENTENCES = [
  "A red fox jumps over the fence.",
  "The fox leapt across a hedge.",
  "Shares fell sharply this morning.",
  "The stock market lost ground today.",
];
const QUERY = "How do plants make food?";
const DOCUMENTS = [
  "The bakery on the corner opens at six.",
  "Leaves turn light, water and air into sugar.",
  "Roots take up water from the soil.",
  "A recipe for a salad of garden greens.",
];

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** One form: asks when it is sent, shows what came, and stops when it is sent again meanwhile. */
class Trial {
  #running = null; // the AbortController of what is being asked

  /** `host` has the server, the model to ask, and hears of what is typed and of errors. */
  constructor(panel, host) {
    this.host = host;
    this.panel = byId(panel);
    this.form = this.part("form");
    this.fields = [...this.form.elements].filter((field) => field.name);
    this.verb = this.part("button").textContent;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.stop();
      else this.#run();
    });
    this.form.addEventListener("input", () => host.onChange());
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || this.#running) return;
      event.preventDefault();
      this.#run();
    });
  }

  part(selector) {
    return this.panel.querySelector(selector);
  }

  get values() {
    return Object.fromEntries(this.fields.map(({ name, value }) => [name, value]));
  }

  set values(given) {
    for (const field of this.fields) field.value = given?.[field.name] ?? this.examples[field.name];
  }

  /** Whether something was running. */
  stop() {
    this.#running?.abort();
    return Boolean(this.#running);
  }

  async #run() {
    const controller = (this.#running = new AbortController());
    const began = performance.now();
    this.#explain("");
    try {
      const { count, tokens, words } = await this.ask(controller.signal);
      this.part(".outcome").textContent = `${count} and ${tokens} tokens in ${duration((performance.now() - began) / 1000)}`;
      this.host.announce(words);
    } catch (error) {
      if (!controller.signal.aborted) this.host.onError(error);
      this.#explain(controller.signal.aborted ? "" : error.message, error.details);
    }
    this.#running = null;
    this.#showRunning();
  }

  /** Show what went wrong, in place of what came last; "" while nothing has. */
  #explain(trouble, details) {
    if (trouble) this.part(".result").hidden = true;
    if (trouble) this.part(".outcome").textContent = "";
    explain(this.part(".trouble"), trouble, details);
    this.#showRunning();
  }

  #showRunning() {
    this.part("button").textContent = this.#running ? "Stop" : this.verb;
    this.part("button").toggleAttribute("data-stops", Boolean(this.#running));
    this.panel.ariaBusy = String(Boolean(this.#running));
  }
}

/** Sentences as vectors, and the cosine of each pair as a heat map. */
export class Similarity extends Trial {
  examples = { sentences: SENTENCES.join("\n") };

  constructor(host) {
    super("similarity", host);
  }

  async ask(signal) {
    const sentences = linesOf(this.values.sentences);
    if (sentences.length < 2) throw new Error("Enter at least two sentences, one per line.");
    if (sentences.length > MOST) throw new Error(`Enter at most ${MOST} sentences; these are ${sentences.length}.`);
    const { vectors, tokens } = await this.host.server.embed({ model: this.host.model, input: sentences }, signal);
    const cosines = vectors.map((one) => vectors.map((other) => cosine(one, other)));
    this.part(".result").replaceChildren(heatMap(sentences, cosines));
    this.part(".result").hidden = false;
    return { count: `${sentences.length} sentences`, tokens, words: closest(cosines) };
  }
}

const dot = (one, other) => one.reduce((sum, value, place) => sum + value * other[place], 0);

function cosine(one, other) {
  const lengths = Math.sqrt(dot(one, one) * dot(other, other));
  return lengths ? dot(one, other) / lengths : 0;
}

/** A table, so that whoever sees no colours has the numbers with their sentences. */
function heatMap(sentences, cosines) {
  const table = document.createElement("table");
  table.createCaption().textContent = "Cosine similarity: 1 is equal, 0 unrelated";
  const head = table.createTHead().insertRow();
  head.append(document.createElement("td"), ...sentences.map((sentence, place) => header("col", place + 1, sentence)));
  const body = table.createTBody();
  cosines.forEach((row, place) => {
    const line = body.insertRow();
    line.append(header("row", sentences[place], "", place + 1), ...row.map(cell));
  });
  return table;
}

function header(scope, text, title = "", label = "") {
  const made = document.createElement("th");
  made.scope = scope;
  made.textContent = text;
  made.title = title;
  made.dataset.number = label;
  return made;
}

function cell(value) {
  const made = document.createElement("td");
  made.textContent = (Math.abs(value) < 0.005 ? 0 : value).toFixed(2); // never -0.00
  made.style.setProperty("--warmth", Math.min(1, Math.max(0, value)).toFixed(3));
  return made;
}

/** In words, which two of the sentences are the most alike. */
function closest(cosines) {
  const pairs = cosines.flatMap((row, one) => row.slice(0, one).map((value, other) => ({ value, one, other })));
  const { value, one, other } = pairs.reduce((best, pair) => (pair.value > best.value ? pair : best));
  return `The most similar are sentences ${other + 1} and ${one + 1}: ${value.toFixed(2)}.`;
}

/** Documents in the order of their relevance to a query. */
export class Ranking extends Trial {
  examples = { query: QUERY, documents: DOCUMENTS.join("\n") };

  constructor(host) {
    super("ranking", host);
  }

  async ask(signal) {
    const query = this.values.query.trim();
    const documents = linesOf(this.values.documents);
    if (!query) throw new Error("Enter a query.");
    if (!documents.length) throw new Error("Enter at least one document, one per line.");
    const { ranks, tokens } = await this.host.server.rerank({ model: this.host.model, query, documents }, signal);
    const most = Math.max(1, ...ranks.map(({ score }) => score)); // a score may be any number
    this.part(".result").replaceChildren(...ranks.map((rank) => rankItem(documents[rank.index], rank.score, most)));
    this.part(".result").hidden = false;
    return { count: `${documents.length} documents`, tokens, words: `Most relevant: ${documents[ranks[0].index]}` };
  }
}

function rankItem(text, score, most) {
  const item = fromTemplate("rank");
  item.querySelector(".text").textContent = text;
  item.querySelector(".score").textContent = score.toFixed(3);
  item.querySelector(".bar").style.setProperty("--share", Math.max(0, score / most).toFixed(3));
  return item;
}
