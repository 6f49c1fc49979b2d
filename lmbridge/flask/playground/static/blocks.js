// The block half of Markdown: where a block ends, and the node that it becomes.
//
// Rule: builds DOM nodes and never HTML. A block other than code has a bounded size, and blocks within it a bounded depth,
// so the work for one is bounded too, whatever a model writes.

import { Code, FENCE, closingFence } from "./code.js";
import { element } from "./dom.js";
import { inline } from "./inline.js";

const LARGEST = 8_000; // characters of a block; a longer one becomes several
const LONGEST = 4_000; // characters of a line; a longer one is cut
const DEEPEST = 6; // lists and quotes within each other
const MOST_COLUMNS = 30;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|\t|$)(.*)$/;

const isBlank = (line) => !line.trim();
const isNumbered = (line) => /^[ \t]*\d/.test(line);
const isTableRule = (line) => line.includes("-") && line.includes("|") && /^[\s|:-]+$/.test(line);

/** The lines of a text, none of them longer than LONGEST: {text, end}, where `end` is the place after it. */
export function linesOf(text) {
  const lines = [];
  for (let at = 0; at < text.length; ) {
    const found = text.indexOf("\n", at);
    const stop = Math.min(found < 0 ? text.length : found, at + LONGEST);
    const end = stop === found ? stop + 1 : stop;
    lines.push({ text: text.slice(at, stop), end });
    at = end;
  }
  return lines;
}

/** What a line begins. */
function kindOf(lines, at) {
  const line = lines[at];
  if (isBlank(line)) return "blank";
  if (FENCE.test(line)) return "code";
  if (RULE.test(line)) return "rule"; // before a list, of which "* * *" is none
  if (HEADING.test(line)) return "heading";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return line.includes("|") && line.length < LONGEST && isTableRule(lines[at + 1] ?? "") ? "table" : "words";
}

/** The block that begins at a line: its kind, and the place of the line after it. */
export function blockAt(lines, at) {
  const kind = kindOf(lines, at);
  if (kind === "heading" || kind === "rule") return { kind, end: at + 1 };
  const most = kind === "code" ? Infinity : LARGEST;
  const goesOn = kind === "code" ? inCode(lines[at]) : GOES_ON[kind];
  let end = at + 1;
  for (let size = lines[at].length; end < lines.length; end += 1) {
    size += lines[end].length + 1;
    if (size > most || !goesOn(lines, end, at)) break;
  }
  return { kind, end };
}

/** A fenced block ends with the line after its closing fence, or where the text does. */
function inCode(first) {
  const closes = closingFence(first);
  return (lines, at, began) => at - 1 === began || !closes.test(lines[at - 1]);
}

const GOES_ON = {
  blank: (lines, at) => isBlank(lines[at]),
  list: inList,
  quote: (lines, at) => ["quote", "words"].includes(kindOf(lines, at)),
  table: (lines, at) => lines[at].includes("|"),
  words: (lines, at) => kindOf(lines, at) === "words",
};

/** A list of the other kind is a list of its own. */
function inList(lines, at, began) {
  const line = lines[at];
  if (isBlank(line) || /^(?: {2}|\t)/.test(line)) return true;
  const kind = kindOf(lines, at);
  return kind === "list" ? isNumbered(line) === isNumbered(lines[began]) : kind === "words" && !isBlank(lines[at - 1]);
}

export const isClosed = (lines, at, end) => end > at + 1 && closingFence(lines[at]).test(lines[end - 1]);

// --- nodes ---

/** The nodes of some lines: each block of them. */
function nodesOf(lines, depth) {
  if (depth > DEEPEST) return [element("p", [lines.join("\n")])];
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const { kind, end } = blockAt(lines, at);
    const node = nodeOf(kind, lines.slice(at, end), depth);
    if (node) nodes.push(node);
    at = end;
  }
  return nodes;
}

/** The node of a block; null for blank lines. */
export function nodeOf(kind, lines, depth = 0) {
  if (kind === "blank") return null;
  if (kind === "code") return codeOf(lines);
  if (kind === "rule") return element("hr");
  if (kind === "heading") return headingOf(lines[0]);
  if (kind === "quote") return element("blockquote", nodesOf(lines.map((line) => line.replace(QUOTE, "")), depth + 1));
  if (kind === "list") return listOf(lines, depth);
  if (kind === "table") return tableOf(lines);
  return element("p", inline(lines.join("\n")));
}

/** Over an answer stand headings of the second level. */
function headingOf(line) {
  const [, marks, words] = HEADING.exec(line);
  return element(`h${Math.min(6, marks.length + 2)}`, inline(words.replace(/ +#+$/, "")));
}

function codeOf(lines) {
  const code = new Code(lines[0]);
  code.grow(lines.slice(1, isClosed(lines, 0, lines.length) ? -1 : undefined).join("\n"), "");
  return code.frame;
}

/** A list; what is not written as an item of it belongs to the item before. */
function listOf(written, depth) {
  const lines = written.map((line) => line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    ")));
  const [, indent, first] = ITEM.exec(lines[0]);
  const list = element(isNumbered(lines[0]) ? "ol" : "ul");
  if (list.tagName === "OL") list.start = parseInt(first, 10);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < indent.length + 2) items.push({ width: line.length - item[3].length, lines: [item[3]] });
    else items.at(-1).lines.push(dedent(line, items.at(-1).width));
  }
  list.append(...items.map((item) => element("li", tight(nodesOf(item.lines, depth + 1)))));
  return list;
}

const dedent = (line, most) => line.slice(Math.min(most, line.length - line.trimStart().length));

/** An item that begins with words has them without a paragraph around. */
const tight = ([first, ...rest]) => (first?.tagName === "P" ? [...first.childNodes, ...rest] : first ? [first, ...rest] : []);

function tableOf([head, rule = "", ...rows]) {
  const sides = cellsOf(rule).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (line, tag) =>
    element("tr", cellsOf(line).slice(0, sides.length).map((cell, place) => element(tag, inline(cell), sides[place])));
  const table = element("table", [element("thead", [row(head, "th")]), element("tbody", rows.map((line) => row(line, "td")))]);
  const frame = element("div", [table], "wide-table");
  frame.tabIndex = 0; // it moves sideways by the arrow keys
  return frame;
}

const cellsOf = (line) =>
  line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/, MOST_COLUMNS).map((cell) => cell.trim());
