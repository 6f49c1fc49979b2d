// The settings: the fields of a request, each named as the API's.
//
// Rule: what is typed goes to the server as it is; the server says what is wrong with it.

import { byId } from "./dom.js";

export class Settings {
  #fields = [...byId("settings").querySelectorAll("input")];
  #defaults = {};

  constructor(values, onChange) {
    for (const field of byId("settings").elements) {
      field.value = values?.[field.id] ?? "";
      field.addEventListener("input", () => {
        this.mark(null);
        onChange();
      });
    }
    for (const field of this.#fields) field.dataset.usual = field.placeholder;
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
  }

  get values() {
    return Object.fromEntries([...byId("settings").elements].map((field) => [field.id, field.value]));
  }

  get systemPrompt() {
    return byId("system").value.trim();
  }

  /** What fields that are empty stand for, where that is not the API's own default. */
  set defaults(values) {
    this.#defaults = values;
    for (const field of this.#fields) field.placeholder = values[field.name] ?? field.dataset.usual;
  }

  /** The fields of a request's body; what is no number is sent as it was typed. */
  get fields() {
    const given = this.#fields.filter((field) => field.value.trim());
    const read = given.map(({ name, value }) => [name, Number.isFinite(+value) ? +value : value.trim()]);
    return { ...this.#defaults, ...Object.fromEntries(read) };
  }

  /** Mark the field that the server has refused. */
  mark(name) {
    for (const field of this.#fields) {
      if (field.name === name) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
    }
  }
}
