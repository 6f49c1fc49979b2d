// The live panel: what GET status says, once a second while the page is visible, as figures and plots of a minute.
//
// Rule: reads the status and nothing else.

import { byId, duration, fromTemplate, number } from "./dom.js";

const WINDOW = 60; // seconds that a plot shows
const BAR = 4; // a plot is 240 wide: a bar for each second
const HEIGHT = 32;
const STATES = {
  new: ["waiting", "Loads with the first message"],
  starting: ["waiting", "Loading"],
  restarting: ["waiting", "Restarting"],
  draining: ["waiting", "Being replaced"],
  unloaded: ["waiting", "Loads again with the next message"],
  ready: ["good", "Ready"],
  failed: ["bad", "Failed"],
  closed: ["bad", "Closed"],
};

const change = (now, before, name) => now.engine?.[name] - before.engine?.[name];

function mean(now, before) {
  const count = now.count - before.count;
  return count > 0 ? (now.sum - before.sum) / count : NaN;
}

function tokens(now, before) {
  const made = change(now, before, "tokens");
  return Number.isNaN(made) ? now.completion_tokens - before.completion_tokens : made;
}

function batchSize(now, before) {
  const batches = change(now, before, "batches"); // of an encoder, which counts texts
  if (batches > 0) return change(now, before, "items") / batches;
  if (batches === 0) return 0;
  const steps = change(now, before, "steps");
  if (steps > 0) return Math.max(1, change(now, before, "tokens") / steps); // reading a prompt takes steps too
  return steps === 0 ? 0 : now.running;
}

// Each figure is made of two looks at the same model; NaN says that there was nothing to measure between them.
const FIGURES = [
  { name: "In flight", of: (now) => now.running },
  { name: "Waiting", of: (now) => now.waiting },
  { name: "Tokens per second", of: (now, before, seconds) => tokens(now, before) / seconds },
  { name: "Time to first token", of: (now, before) => mean(now.first_token, before.first_token), format: duration },
  { name: "Batch size", of: batchSize },
];

class FigureView {
  #samples = []; // {at, value}, the oldest first

  constructor({ name, of, format = number }) {
    this.name = name;
    this.of = of;
    this.format = format;
    this.item = fromTemplate("figure");
    this.item.querySelector(".name").textContent = name;
    byId("figures").append(this.item);
    this.#draw(0);
  }

  clear() {
    this.#samples = [];
    this.#draw(0);
  }

  /** Take a value measured at `at`, in seconds. */
  add(at, value) {
    if (value >= 0) this.#samples.push({ at, value }); // neither NaN nor, after a restart, less than nothing
    this.#samples = this.#samples.filter((sample) => at - sample.at < WINDOW - 0.5);
    this.#draw(at);
  }

  #draw(now) {
    const most = Math.max(0, ...this.#samples.map((sample) => sample.value));
    const last = this.#samples.at(-1);
    const bars = this.#samples.map(({ at, value }) => {
      const x = (WINDOW - 1 - (now - at)) * BAR;
      const height = value && Math.max(1, (value / most) * (HEIGHT - 2));
      return `M${x.toFixed(1)} ${HEIGHT}v${-height.toFixed(2)}h${BAR - 1}v${height.toFixed(2)}z`;
    });
    this.item.querySelector(".most").textContent = most ? `max ${this.format(most)}` : "";
    const words = last ? `last ${this.format(last.value)}, at most ${this.format(most)}` : "nothing measured yet";
    this.item.querySelector(".value").textContent = last ? this.format(last.value) : "–";
    this.item.querySelector("path").setAttribute("d", bars.join(""));
    this.item.querySelector("svg").setAttribute("aria-label", `${this.name} over the last minute: ${words}`);
  }
}

/** Looks at the status once a second while the page is visible. */
export class Live {
  #views = FIGURES.map((figure) => new FigureView(figure));
  #before = null;
  #timer = 0;

  /** `onStatus` is called with each status that came. */
  constructor(server, onStatus) {
    this.server = server;
    this.onStatus = onStatus;
    this.model = null;
    document.addEventListener("visibilitychange", () => this.look());
    this.look();
  }

  show(model) {
    if (model === this.model) return;
    this.model = model;
    this.#before = null;
    for (const view of this.#views) view.clear();
    this.look();
  }

  async look() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const turn = (this.#timer = setTimeout(() => this.look(), 1000));
    try {
      const status = await this.server.status();
      if (turn === this.#timer) this.#take(status);
    } catch {
      if (turn === this.#timer) this.#lost();
    }
  }

  #take(status) {
    this.onStatus(status);
    const now = status.models[this.model ?? status.default];
    if (!now) return;
    now.at = status.uptime;
    const before = now.at - this.#before?.at < WINDOW ? this.#before : now;
    for (const view of this.#views) view.add(now.at, view.of(now, before, now.at - before.at));
    this.#before = now;
    byId("figures").classList.remove("stale");
    const [kind, text] = status.draining ? ["bad", "The server is shutting down"] : STATES[now.state] ?? ["bad", now.state];
    showState(kind, text, now.reason, now.state === "starting");
  }

  #lost() {
    this.#before = null;
    byId("figures").classList.add("stale");
    showState("bad", "The server does not respond");
  }
}

/** `reason` is for whoever runs the server, and shown to whoever points at the state. */
function showState(kind, text, reason = "", loading = false) {
  byId("loading").hidden = !loading;
  byId("state").dataset.kind = kind;
  byId("state").title = reason ? `${text}: ${reason}` : text;
  if (byId("state").textContent !== text) byId("state").textContent = text; // which is read out
}
