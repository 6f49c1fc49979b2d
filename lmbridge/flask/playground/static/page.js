// The playground: a conversation over the OpenAI-compatible routes, its settings, and what is kept of both; and tabs to
// try models of other kinds.
//
// Rule: whatever comes from the server is put into the page as text, never as HTML. What the user types into the
// settings goes to the server as it is; the server says what is wrong with it.

import { byId, duration, fromTemplate } from "./dom.js";
import { Live } from "./live.js";
import { Server } from "./server.js";
import { Tabs } from "./tabs.js";
import { Ranking, Similarity } from "./trials.js";

// --- what outlives a reload ---

const STOPPED = "Stopped";
const TABS = [
  { name: "chat", task: "generate", route: "chat" },
  { name: "similarity", task: "embed", route: "embeddings" },
  { name: "ranking", task: "rerank", route: "rerank" },
];
const STORE = `lmbridge ${location.pathname}`;

function load() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function save(state) {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // no room or no leave: the conversation then lasts as long as the page
  }
}

// --- the settings ---

class Settings {
  #fields = [...byId("settings").querySelectorAll("input")]; // each named as the API's field

  constructor(values, onChange) {
    for (const field of byId("settings").elements) {
      field.value = values?.[field.id] ?? "";
      field.addEventListener("input", () => {
        this.mark(null);
        onChange();
      });
    }
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
  }

  get values() {
    return Object.fromEntries([...byId("settings").elements].map((field) => [field.id, field.value]));
  }

  get systemPrompt() {
    return byId("system").value.trim();
  }

  /** The fields of a request's body; what is no number is sent as it was typed. */
  get fields() {
    const given = this.#fields.filter((field) => field.value.trim());
    return Object.fromEntries(given.map(({ name, value }) => [name, Number.isFinite(+value) ? +value : value.trim()]));
  }

  /** Mark the field that the server has refused. */
  mark(name) {
    for (const field of this.#fields) {
      if (field.name === name) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
    }
  }
}

// --- one question with its answer ---

/**
 * An exchange is {question, model, answer, state, error, facts}; state is running, complete, stopped or failed.
 * This is how it is shown.
 */
class ExchangeView {
  #frame = 0;

  constructor(exchange, onRetry) {
    this.exchange = exchange;
    this.item = fromTemplate("exchange");
    this.#part("question").textContent = exchange.question;
    this.text = this.#part("answer").appendChild(new Text());
    this.#part("retry").addEventListener("click", onRetry);
    this.update();
  }

  /** The answer has grown: have `around` show it with the next frame, however often that is said until then. */
  grow(around) {
    this.#frame ||= requestAnimationFrame(() => around(() => this.#showText()));
  }

  /** Show everything as it is now. */
  update() {
    const { state, model, error, facts } = this.exchange;
    this.#showText();
    this.item.dataset.state = state;
    this.#part("who").textContent = model;
    this.#part("trouble").hidden = !error;
    this.#part("trouble").textContent = error;
    this.#part("facts").textContent = facts;
  }

  set canRetry(can) {
    this.#part("retry").hidden = !can;
  }

  #showText() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { answer } = this.exchange;
    if (answer.length < this.text.length) this.text.data = ""; // it is asked once more
    this.text.appendData(answer.slice(this.text.length));
  }

  #part(name) {
    return this.item.querySelector(`.${name}`);
  }
}

// --- the page ---

class Page {
  #running = null; // the AbortController of the answer that comes in

  constructor(server) {
    const stored = load();
    this.server = server;
    this.models = [];
    this.chosen = stored.chosen ?? {}; // the name of the model of each tab
    this.trials = { similarity: new Similarity(this.#hostOf("similarity")), ranking: new Ranking(this.#hostOf("ranking")) };
    for (const [name, trial] of Object.entries(this.trials)) trial.values = stored.trials?.[name];
    this.tabs = new Tabs(() => this.#offerModels());
    this.tabs.open("chat");
    this.wanted = stored.tab;
    this.live = server.routes.status && new Live(server, (status) => this.#see(status));
    this.settings = new Settings(stored.settings, () => this.#save());
    this.views = (stored.exchanges ?? []).map((exchange) => this.#show(exchange));
    this.#offerRetry();
    this.#listen();
    this.#fit(stored.draft ?? "");
    this.#connect();
    byId("log").scrollTop = byId("log").scrollHeight;
    if (matchMedia("(pointer: fine)").matches) byId("prompt").focus();
  }

  #listen() {
    const on = (id, event, action) => byId(id).addEventListener(event, action);
    on("composer", "submit", (event) => {
      event.preventDefault();
      if (this.#running) this.#stop();
      else this.#send();
    });
    on("prompt", "keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#running) this.#send();
    });
    on("prompt", "input", () => this.#fit());
    on("new", "click", () => this.#clear());
    on("side-switch", "click", () => this.#openSide(byId("side-switch").ariaExpanded !== "true"));
    on("model", "change", () => this.#chooseModel());
    on("reconnect", "click", () => this.#connect());
    on("key-form", "submit", (event) => this.#useKey(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) this.#escape();
    });
    addEventListener("beforeunload", () => this.#stop()); // or it would look like a lost connection
    addEventListener("pagehide", () => this.#save());
  }

  // --- the model ---

  async #connect() {
    byId("trouble").hidden = true;
    try {
      this.models = await this.server.models();
      byId("key-form").hidden = true;
      const offered = TABS.filter(({ task, route }) => this.server.routes[route] && this.#namesFor(task).length);
      this.tabs.offer(offered.length ? offered.map(({ name }) => name) : ["chat"], this.wanted ?? this.tabs.current);
      this.wanted = null;
    } catch (error) {
      if (error.status === 401) return this.#askForKey(this.server.key ? error.message : "This server wants an API key.");
      byId("trouble").hidden = false;
      byId("trouble").firstElementChild.textContent = error.message;
    }
  }

  /** The models that do a task; one that does not say what it does may chat. */
  #namesFor(task) {
    return this.models.filter(({ tasks }) => (tasks.length ? tasks : ["generate"]).includes(task)).map(({ name }) => name);
  }

  /** Have the models of the open tab to choose from. */
  #offerModels() {
    const names = this.#namesFor(TABS.find(({ name }) => name === this.tabs.current).task);
    if (!names.length) return; // not connected yet
    const before = this.chosen[this.tabs.current];
    const chosen = names.includes(before) ? before : names[0];
    byId("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    byId("model").disabled = false;
    this.#chooseModel();
  }

  #chooseModel() {
    this.chosen[this.tabs.current] = byId("model").value;
    this.live?.show(byId("model").value);
    this.#save();
  }

  /** Look again at the models once one of them, which was loaded meanwhile, says what it does. */
  #see(status) {
    const told = ({ name, tasks }) => String(status.models[name]?.tasks ?? tasks) === String(tasks);
    if (!this.models.every(told)) this.#connect();
  }

  /** What a tab needs of the page. */
  #hostOf(tab) {
    const page = this;
    return {
      server: page.server,
      get model() {
        return page.chosen[tab];
      },
      announce: (words) => (byId("announcer").textContent = words),
      onChange: () => page.#save(),
      onError: (error) => error.status === 401 && page.#askForKey(error.message),
    };
  }

  #askForKey(reason) {
    byId("key-form").hidden = false;
    byId("key-reason").textContent = reason;
    byId("key").focus();
    byId("key").select();
  }

  async #useKey(event) {
    event.preventDefault();
    this.server.key = byId("key").value.trim();
    await this.#connect();
    if (byId("key-form").hidden && this.tabs.current === "chat") byId("prompt").focus();
  }

  // --- the conversation ---

  #send() {
    const question = byId("prompt").value.trim();
    if (!question) return;
    this.views.push(this.#show({ question, model: "", answer: "", state: "running", error: "", facts: "" }));
    this.#fit("");
    byId("log").scrollTop = byId("log").scrollHeight;
    this.#answer();
  }

  /** Have the last question answered. */
  async #answer() {
    const view = this.views.at(-1);
    const { exchange } = view;
    const body = this.#body();
    Object.assign(exchange, { model: body.model, answer: "", state: "running", error: "", facts: "" });
    view.update();
    const controller = (this.#running = new AbortController());
    this.settings.mark(null);
    this.#showRunning();
    try {
      exchange.facts = await this.#read(view, body, controller.signal);
      exchange.state = "complete";
    } catch (error) {
      exchange.state = controller.signal.aborted ? "stopped" : "failed";
      if (exchange.state === "failed") this.#explain(exchange, error);
      else exchange.facts = STOPPED;
    }
    if (this.#running !== controller) return; // a new conversation has begun
    this.#running = null;
    this.#keepInView(() => view.update());
    byId("announcer").textContent = exchange.state === "complete" ? exchange.answer : exchange.facts;
    this.#showRunning();
    this.#save();
  }

  /** Read the answer to its end; returns what is to be said about it. */
  async #read(view, body, signal) {
    const began = performance.now();
    let first, usage, reason;
    for await (const chunk of this.server.chat(body, signal)) {
      for (const choice of chunk.choices) {
        reason = choice.finish_reason ?? reason;
        if (!choice.delta.content) continue;
        first ??= performance.now();
        view.exchange.answer += choice.delta.content;
        view.grow((show) => this.#keepInView(show));
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
    const earlier = this.views.slice(0, -1).filter(({ exchange }) => exchange.answer);
    const { question } = this.views.at(-1).exchange;
    const system = this.settings.systemPrompt;
    return {
      ...this.settings.fields,
      model: this.chosen.chat,
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...earlier.flatMap(({ exchange }) => [
          { role: "user", content: exchange.question },
          { role: "assistant", content: exchange.answer },
        ]),
        { role: "user", content: question },
      ],
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  #explain(exchange, error) {
    exchange.error = error.message;
    this.settings.mark(error.param);
    if (error.status === 401) this.#askForKey(error.message); // the key was taken back, or never given
  }

  #stop() {
    this.#running?.abort();
  }

  #clear() {
    this.#stop();
    this.#running = null;
    this.views = [];
    byId("exchanges").replaceChildren();
    byId("announcer").textContent = "";
    this.settings.mark(null);
    this.#openSide(false);
    this.#showRunning();
    this.#save();
    byId("prompt").focus();
  }

  // --- how it is shown ---

  #show(exchange) {
    const view = new ExchangeView(exchange, () => {
      byId("log").focus({ preventScroll: true }); // the button that had the focus goes
      this.#answer();
    });
    byId("exchanges").append(view.item);
    return view;
  }

  /** Do what may make the conversation longer; who looks at its end still does afterwards. */
  #keepInView(act) {
    const log = byId("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    act();
    if (follows) log.scrollTop = log.scrollHeight;
  }

  #showRunning() {
    const running = Boolean(this.#running);
    byId("send").textContent = running ? "Stop" : "Send";
    byId("send").toggleAttribute("data-stops", running);
    this.#offerRetry();
  }

  #offerRetry() {
    byId("hint").hidden = this.views.length > 0;
    this.views.forEach((view, place) => (view.canRetry = !this.#running && place === this.views.length - 1));
  }

  /** Give the message's field the height of its text. */
  #fit(text = byId("prompt").value) {
    const field = byId("prompt");
    if (field.value !== text) field.value = text;
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  }

  #openSide(open) {
    document.body.classList.toggle("side-open", open);
    byId("side-switch").ariaExpanded = String(open);
  }

  #escape() {
    if (this.trials[this.tabs.current]?.stop()) return;
    if (this.#running) this.#stop();
    else this.#openSide(false);
  }

  #save() {
    const exchanges = this.views.map(({ exchange }) => ({ ...exchange }));
    const last = exchanges.at(-1);
    if (last?.state === "running") Object.assign(last, { state: "stopped", facts: STOPPED });
    save({
      exchanges,
      settings: this.settings.values,
      draft: byId("prompt").value,
      tab: this.wanted ?? this.tabs.current,
      chosen: this.chosen,
      trials: Object.fromEntries(Object.entries(this.trials).map(([name, trial]) => [name, trial.values])),
    });
  }
}

new Page(new Server({ ...document.body.dataset }));
