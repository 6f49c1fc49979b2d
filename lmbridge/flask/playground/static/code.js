// A block of code: its language, a button to copy it, and the code, which may grow.
//
// Rule: code is text. The browser lays an element out as a whole, so a long block becomes several elements, and only the
// last one grows.

import { element } from "./dom.js";

export const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const LARGEST = 8_000; // characters of an element
const MAY_CLOSE = /^ {0,3}[`~]*$/;

/** What closes the fence that this line opens. */
export function closingFence(line) {
  const [, mark] = FENCE.exec(line);
  return new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
}

export class Code {
  #lines = new Text(); // as they came
  #rest = new Text(); // the line that is coming

  /** `line` opens it. */
  constructor(line) {
    const language = element("span", [FENCE.exec(line)[2].trim().split(/\s/)[0].slice(0, 30) || "text"]);
    const button = element("button", ["Copy"], "copy quiet");
    button.type = "button";
    button.ariaLabel = "Copy code";
    this.code = element("pre");
    this.code.tabIndex = 0; // arrow keys move it sideways
    this.frame = element("div", [element("div", [language, button], "bar"), this.code], "code");
    this.#begin();
  }

  /** Append text, and show `rest` after it until more comes. */
  grow(text, rest) {
    for (let at = 0; at < text.length; ) {
      const end = text.length - at > LARGEST ? text.lastIndexOf("\n", at + LARGEST) + 1 : text.length;
      const next = end > at ? end : at + LARGEST;
      if (this.#lines.length > LARGEST / 2) this.#begin();
      this.#lines.appendData(text.slice(at, next));
      at = next;
    }
    this.#rest.data = MAY_CLOSE.test(rest) ? "" : rest;
  }

  #begin() {
    this.#lines = new Text();
    this.code.append(element("code", [this.#lines, this.#rest]));
  }
}
