// Markdown as it comes in: what is settled stays as it is, and only the last block is made anew.
//
// Rule: of a text that grows, what is settled is neither read nor laid out again; what is not has a bounded size.

import { blockAt, isClosed, linesOf, nodeOf } from "./blocks.js";
import { Code } from "./code.js";

const LONGEST = 4_000; // characters of a line of code that are waited for

export class Markdown {
  #text = "";
  #settled = 0; // the place in the text from where it is read again
  #last = null; // the node of the last block
  #code = null; // the block of code that is open

  /** Show texts in this element. */
  constructor(place) {
    this.place = place;
  }

  /** Show this text, which as a rule begins with the one before. */
  show(text) {
    if (!text.startsWith(this.#text)) this.#clear();
    this.#text = text;
    this.#last?.remove();
    this.#last = null;
    while (this.#code ? this.#readCode() : this.#readBlocks());
  }

  #clear() {
    this.place.replaceChildren();
    this.#settled = 0;
    this.#last = this.#code = null;
  }

  /** Read blocks up to the text's end, or into a block of code that is open; whether there is more to read. */
  #readBlocks() {
    const began = this.#settled;
    const found = linesOf(this.#text.slice(began));
    const lines = found.map(({ text }) => text);
    for (let at = 0; at < lines.length; ) {
      const { kind, end } = blockAt(lines, at);
      if (kind === "code" && !isClosed(lines, at, end) && this.#text[began + found[at].end - 1] === "\n") {
        this.#settled = began + found[at].end;
        this.#code = new Code(lines[at]);
        this.place.append(this.#code.frame);
        return true;
      }
      const node = nodeOf(kind, lines.slice(at, end));
      if (node) this.place.append(node);
      if (end < lines.length) this.#settled = began + found[end - 1].end;
      else this.#last = node;
      at = end;
    }
    return false;
  }

  /** Read lines of code; whether its end was among them. */
  #readCode() {
    const began = this.#settled;
    for (let end; (end = this.#text.indexOf("\n", this.#settled) + 1) > 0; this.#settled = end) {
      if (!this.#code.closes.test(this.#text.slice(this.#settled, end - 1))) continue;
      this.#code.grow(this.#text.slice(began, this.#settled), "");
      this.#code = null;
      this.#settled = end;
      return true;
    }
    if (this.#text.length - this.#settled > LONGEST) this.#settled = this.#text.length;
    this.#code.grow(this.#text.slice(began, this.#settled), this.#text.slice(this.#settled));
    return false;
  }
}
