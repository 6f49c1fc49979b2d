// The models to choose from, those of each tab, and the API key that the server may want.

import { byId } from "./dom.js";

const TABS = [
  { name: "chat", task: "generate", route: "chat" },
  { name: "similarity", task: "embed", route: "embeddings" },
  { name: "ranking", task: "rerank", route: "rerank" },
];

export class Models {
  #models = [];

  /** `chosen` has the name of the model of each tab; `onChoice` hears of each choice, `onKey` of a key that is accepted. */
  constructor(server, tabs, { chosen, wanted, onChoice, onKey }) {
    Object.assign(this, { server, tabs, chosen, wanted, onChoice, onKey });
    tabs.onOpen = () => this.#offer();
    byId("model").addEventListener("change", () => this.#choose());
    byId("reconnect").addEventListener("click", () => this.connect());
    byId("key-form").addEventListener("submit", (event) => this.#useKey(event));
  }

  async connect() {
    byId("trouble").hidden = true;
    try {
      this.#models = await this.server.models();
      byId("key-form").hidden = true;
      const offered = TABS.filter(({ task, route }) => this.server.routes[route] && this.#namesFor(task).length);
      this.tabs.offer(offered.length ? offered.map(({ name }) => name) : ["chat"], this.wanted ?? this.tabs.current);
      this.wanted = null;
    } catch (error) {
      if (error.status === 401) return this.askForKey(this.server.key ? error.message : "This server requires an API key.");
      byId("trouble").hidden = false;
      byId("trouble").firstElementChild.textContent = error.message;
    }
  }

  /** The model that is chosen in the open tab; undefined while none is known. */
  get current() {
    return this.#models.find(({ name }) => name === this.chosen[this.tabs.current]);
  }

  /** Look again once a model, which was loaded meanwhile, says what it does. */
  see(status) {
    const told = ({ name, tasks }) => String(status.models[name]?.tasks ?? tasks) === String(tasks);
    if (!this.#models.every(told)) this.connect();
  }

  askForKey(reason) {
    byId("key-form").hidden = false;
    byId("key-reason").textContent = reason;
    byId("key").focus();
    byId("key").select();
  }

  async #useKey(event) {
    event.preventDefault();
    this.server.key = byId("key").value.trim();
    await this.connect();
    if (byId("key-form").hidden) this.onKey();
  }

  /** The models that do a task; one that does not say what it does may chat. */
  #namesFor(task) {
    return this.#models.filter(({ tasks }) => (tasks.length ? tasks : ["generate"]).includes(task)).map(({ name }) => name);
  }

  /** Have the models of the open tab to choose from. */
  #offer() {
    const names = this.#namesFor(TABS.find(({ name }) => name === this.tabs.current).task);
    if (!names.length) return; // not connected yet
    const before = this.chosen[this.tabs.current];
    const chosen = names.includes(before) ? before : names[0];
    byId("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    byId("model").disabled = false;
    this.#choose();
  }

  #choose() {
    this.chosen[this.tabs.current] = byId("model").value;
    this.onChoice(this.current);
  }
}
