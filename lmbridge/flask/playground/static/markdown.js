// Markdown as it comes in: what is settled stays as it is, and only the last block is made anew.
//
// Rule: of a text that grows, what is settled is neither read nor laid out again; what is not has a bounded size.

import { blockAt, isClosed, linesOf, nodeOf } from "./blocks.js";
import { Code, closingFence } from "./code.js";
import { element } from "./dom.js";

const LONGEST = 4_000; // characters of a line of code that are waited for
const MOST = 100_000; // characters that are read as Markdown; what follows is shown as it is
const MOST_SHOWN = 1_000_000; // characters
const NOT_SHOWN = "The rest is too long to be shown here. “Copy” copies all of it.";

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
  show(whole) {
    const text = whole.slice(0, MOST_SHOWN);
    if (text === this.#text) return;
    if (!text.startsWith(this.#text)) this.#clear();
    this.#text = text;
    this.#last?.remove();
    this.#last = null;
    while (this.#code ? this.#readCode() : this.#readBlocks());
    if (whole.length > MOST_SHOWN) this.place.append(element("p", [NOT_SHOWN]));
  }

  #clear() {
    this.place.replaceChildren();
    this.#settled = 0;
    this.#last = this.#code = null;
  }

  /** Read blocks up to the text's end, or into a block of code that is open; whether there is more to read. */
  #readBlocks() {
    const began = this.#settled;
    if (began >= MOST) return this.#openCode("```", /(?!)/);
    const found = linesOf(this.#text.slice(began, MOST));
    const lines = found.map(({ text }) => text);
    for (let at = 0; at < lines.length; ) {
      const { kind, end } = blockAt(lines, at);
      if (kind === "code" && !isClosed(lines, at, end) && this.#text[began + found[at].end - 1] === "\n") {
        this.#settled = began + found[at].end;
        return this.#openCode(lines[at]);
      }
      const inside = [found[at].end, found[Math.max(at, end - 2)].end].map((place) => began + place);
      const node = kind === "code" ? this.#codeOf(lines[at], ...inside) : nodeOf(kind, lines.slice(at, end));
      if (node) this.place.append(node);
      if (end < lines.length) this.#settled = began + found[end - 1].end;
      else this.#last = node;
      at = end;
    }
    if (this.#text.length <= MOST) return false;
    this.#last = null;
    this.#settled = MOST;
    return true;
  }

  /** A block of code that stands between two places. */
  #codeOf(line, from, to) {
    const code = new Code(line);
    code.grow(this.#text.slice(from, to), "");
    return code.frame;
  }

  #openCode(line, closes = closingFence(line)) {
    const code = new Code(line);
    this.#code = { code, closes };
    this.place.append(code.frame);
    return true;
  }

  /** Read lines of code; whether its end was among them. */
  #readCode() {
    const began = this.#settled;
    for (let end; (end = this.#text.indexOf("\n", this.#settled) + 1) > 0; this.#settled = end) {
      if (!this.#code.closes.test(this.#text.slice(this.#settled, end - 1))) continue;
      this.#code.code.grow(this.#text.slice(began, this.#settled), "");
      this.#code = null;
      this.#settled = end;
      return true;
    }
    if (this.#text.length - this.#settled > LONGEST) this.#settled = this.#text.length;
    this.#code.code.grow(this.#text.slice(began, this.#settled), this.#text.slice(this.#settled));
    return false;
  }
}
