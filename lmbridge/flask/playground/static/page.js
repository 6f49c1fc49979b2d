// The playground: a conversation over the OpenAI-compatible routes with its settings, and tabs to try models of other
// kinds. Here its parts are put together.
//
// Rule: whatever comes from the server is put into the page as text, never as HTML.

import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { byId } from "./dom.js";
import { Live } from "./live.js";
import { Models } from "./models.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { showStart } from "./start.js";
import { forget, load, save } from "./store.js";
import { Tabs } from "./tabs.js";
import { Ranking, Similarity } from "./trials.js";

const CALM = { temperature: 0.3 }; // the bundled model is so small that it errs at 1

class Page {
  constructor(server) {
    const stored = load();
    this.server = server;
    this.trials = { similarity: new Similarity(this.#hostOf("similarity")), ranking: new Ranking(this.#hostOf("ranking")) };
    for (const [name, trial] of Object.entries(this.trials)) trial.values = stored.trials?.[name];
    this.tabs = new Tabs();
    this.tabs.open("chat");
    this.settings = new Settings(stored.settings, () => this.#save());
    this.composer = new Composer(stored.draft ?? "", {
      onSend: (text) => this.#ask(text),
      onStop: () => this.conversation.stop(),
    });
    this.models = new Models(server, this.tabs, {
      chosen: stored.chosen ?? {},
      wanted: stored.tab,
      onChoice: (model) => this.#use(model),
      onKey: () => this.tabs.current === "chat" && this.composer.focus(),
    });
    this.conversation = new Conversation(stored.exchanges ?? [], this.#hostOf("chat"));
    this.live = server.routes.status && new Live(server, (status) => this.models.see(status));
    this.#listen();
    this.models.connect();
    if (matchMedia("(pointer: fine)").matches) this.composer.focus();
  }

  #listen() {
    byId("new").addEventListener("click", () => this.#begin());
    byId("side-switch").addEventListener("click", () => this.#openSide(byId("side-switch").ariaExpanded !== "true"));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) this.#escape();
    });
    addEventListener("beforeunload", () => this.conversation.stop()); // or it would look like a lost connection
    addEventListener("pagehide", () => this.#save());
  }

  /** What a tab needs of the page. */
  #hostOf(tab) {
    const page = this;
    return {
      server: page.server,
      get settings() {
        return page.settings;
      },
      get model() {
        return page.models.chosen[tab];
      },
      announce: (words) => (byId("announcer").textContent = words),
      onChange: () => page.#save(),
      onRunning: (running) => (page.composer.running = running),
      onError: (error) => page.#see(error),
    };
  }

  #see(error) {
    this.settings.mark(error.param);
    if (error.status === 401) this.models.askForKey(error.message); // the key was taken back, or never given
  }

  #use(model) {
    if (this.tabs.current === "chat") {
      this.settings.defaults = model.bundled ? CALM : {};
      showStart(model.bundled, (prompt) => this.#ask(prompt) && this.composer.focus());
    }
    this.live?.show(model.name);
    this.#save();
  }

  /** Whether it is asked. */
  #ask(question) {
    if (!this.models.chosen.chat || this.conversation.running) return false;
    this.conversation.ask(question);
    return true;
  }

  #begin() {
    this.conversation.clear();
    this.#openSide(false);
    this.#save();
    this.composer.focus();
  }

  #openSide(open) {
    document.body.classList.toggle("side-open", open);
    byId("side-switch").ariaExpanded = String(open);
  }

  #escape() {
    if (this.trials[this.tabs.current]?.stop()) return;
    if (this.conversation.running) this.conversation.stop();
    else this.#openSide(false);
  }

  #save() {
    save({
      exchanges: this.conversation.exchanges,
      settings: this.settings.values,
      draft: this.composer.draft,
      tab: this.models.wanted ?? this.tabs.current,
      chosen: this.models.chosen,
      trials: Object.fromEntries(Object.entries(this.trials).map(([name, trial]) => [name, trial.values])),
    });
  }
}

try {
  new Page(new Server({ ...document.body.dataset }));
} catch (error) {
  if (!forget()) throw error; // else what was stored does not fit: begin without it
  location.reload();
}
