// The tabs: one for each thing that a model of the server does, as long as there are at least two.
//
// Rule: shows and hides what has a data-tab, and knows nothing of what that is.

import { byId } from "./dom.js";

const tabs = () => [...byId("tabs").children].filter((tab) => !tab.hidden);

export class Tabs {
  onOpen = () => {}; // called when a tab is opened
  current = null;

  constructor() {
    byId("tabs").addEventListener("click", (event) => {
      const tab = event.target.closest("[role=tab]");
      if (tab) this.open(tab.dataset.opens);
    });
    byId("tabs").addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Have these tabs, and open one of them: the one named, else the first. */
  offer(names, wanted) {
    for (const tab of byId("tabs").children) tab.hidden = !names.includes(tab.dataset.opens);
    byId("tabs").hidden = names.length < 2;
    this.open(names.includes(wanted) ? wanted : names[0]);
  }

  open(name) {
    this.current = name;
    for (const tab of byId("tabs").children) {
      tab.ariaSelected = String(tab.dataset.opens === name);
      tab.tabIndex = tab.dataset.opens === name ? 0 : -1; // arrows go from one to the next
    }
    for (const part of document.querySelectorAll("[data-tab]")) part.hidden = part.dataset.tab !== name;
    this.onOpen();
  }

  #onKey(event) {
    const all = tabs();
    const place = all.findIndex((tab) => tab.dataset.opens === this.current);
    const steps = { ArrowRight: place + 1, ArrowLeft: place - 1 + all.length, Home: 0, End: all.length - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = all[steps[event.key] % all.length];
    this.open(next.dataset.opens);
    next.focus();
  }
}
