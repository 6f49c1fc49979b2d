// The inline half of Markdown: code, links, bold, italic, struck out, escapes; all else is text.
//
// Rule: builds DOM nodes and never HTML. Each pattern is bounded, so that hostile text costs time in proportion to its
// length; a link goes to http, https or mailto, opens elsewhere and tells nobody where from.

import { element } from "./dom.js";

const DEEPEST = 4; // marks within marks
const SAFE = new Set(["http:", "https:", "mailto:"]);
const MARKS = new RegExp(
  [
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!|~<>])/,
    /(?<!`)(?<ticks>`{1,3})(?!`)(?<code>(?:(?!\k<ticks>)[^]){1,1000})\k<ticks>(?!`)/,
    /!?\[(?<words>[^[\]]{1,300})\]\((?<target>[^\s()<>]{1,1000}(?:\([^\s()<>]{0,100}\)[^\s()<>]{0,100})?)(?: "[^"\n]{0,200}")?\)/,
    /(?<![\w/])(?<bare>https?:\/\/[^\s<>()[\]"'`*|\\]{1,1000}[^\s<>()[\]"'`*|\\.,;:!?])/,
    /\*\*\*(?<both>(?![\s*])[^*\n]{1,1000}(?<!\s))\*\*\*/,
    /\*\*(?<strong>(?![\s*])(?:(?!\*\*).){1,1000}(?<!\s))\*\*/,
    /(?<![\w_])__(?<strong2>(?![\s_])(?:(?!__).){1,1000}(?<!\s))__(?![\w_])/,
    /(?<![\w*])\*(?<em>(?![\s*])[^*\n]{1,1000}(?<!\s))\*(?![\w*])/,
    /(?<![\w_])_(?<em2>(?![\s_])[^_\n]{1,1000}(?<!\s))_(?![\w_])/,
    /~~(?<del>(?![\s~])[^~\n]{1,1000}(?<!\s))~~/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "gu",
);

/** The nodes of a text without blocks. */
export function inline(text, depth = 0) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(MARKS)) {
    if (found.index > at) nodes.push(text.slice(at, found.index));
    nodes.push(nodeOf(found.groups, found[0], depth));
    at = found.index + found[0].length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function nodeOf(groups, whole, depth) {
  const { escaped, code, words, target, bare, both } = groups;
  if (escaped) return escaped;
  if (code) return element("code", [code.trim() || code]);
  if (words) return link(target, words, depth) ?? whole;
  if (bare) return link(bare, null, depth) ?? whole;
  if (both) return element("strong", [element("em", [both])]);
  const tag = ["strong", "em", "del"].find((name) => groups[name] ?? groups[`${name}2`]);
  const inner = groups[tag] ?? groups[`${tag}2`];
  return element(tag, depth < DEEPEST ? inline(inner, depth + 1) : [inner]);
}

/** A link, or null where the address is none that is followed. The browser itself reads it: spellings differ. */
function link(address, words, depth) {
  const url = URL.canParse(address) ? new URL(address) : null; // none without a scheme: nothing leads into this site
  if (!url || !SAFE.has(url.protocol)) return null;
  const made = element("a", words === null ? [address] : wordsOf(words, depth));
  made.href = url.href;
  made.title = url.href; // the words may say something else
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}

/** A link's words may be marked, but hold no link of their own. */
const wordsOf = (words, depth) =>
  depth < DEEPEST ? inline(words, depth + 1).map((node) => (node.tagName === "A" ? node.textContent : node)) : [words];
