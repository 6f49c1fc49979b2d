"""Answers as Markdown in real Chromium: what is shown, what is copied, and what hostile text cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmbridge.flask.testing import scripted_engine
from tests.flask.page.conftest import Site
from tests.flask.page.steps import Open, answers, ask, expect, finished

ANSWER = """# Title

Some **bold**, *italic*, ***both***, ~~gone~~ and `code *as it is*`, 2 * 3 * 4, snake_case_name.

- one
  - within
    1. deep
- two

3. third

> quoted **words**

| a | b |
|---|--:|
| 1 | `x` |

```python
if x < 1:
\tprint("*no*")
```

[words](https://example.org/a_(b)) and https://example.org/.
---
\\*as written\\*"""

HTML = (
    "<h3>Title</h3><p>Some <strong>bold</strong>, <em>italic</em>, <strong><em>both</em></strong>, <del>gone</del> and "
    "<code>code *as it is*</code>, 2 * 3 * 4, snake_case_name.</p>"
    '<ul><li>one<ul><li>within<ol start="1"><li>deep</li></ol></li></ul></li><li>two</li></ul>'
    '<ol start="3"><li>third</li></ol><blockquote><p>quoted <strong>words</strong></p></blockquote>'
    '<div class="wide-table" tabindex="0"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td>1</td><td class="right"><code>x</code></td></tr></tbody></table></div>'
    '<div class="code"><div class="bar"><span>python</span>'
    '<button class="copy quiet" type="button" aria-label="Copy code">Copy</button></div>'
    '<pre tabindex="0"><code>if x &lt; 1:\n\tprint("*no*")\n</code></pre></div>'
    '<p><a href="https://example.org/a_(b)" title="https://example.org/a_(b)" target="_blank" '
    'rel="noopener noreferrer">words</a> and <a href="https://example.org/" title="https://example.org/" '
    'target="_blank" rel="noopener noreferrer">https://example.org/</a>.</p><hr><p>*as written*</p>'
)

# Shows a text as if it came in so many pieces; returns what it became, and the milliseconds of the longest turn.
SHOW = """
async ([text, pieces]) => {
    const { Markdown } = await import("./playground/markdown.js");
    const place = document.createElement("div");
    place.className = "answer";
    document.getElementById("log").replaceChildren(place);
    const view = new Markdown(place);
    let longest = 0;
    for (let piece = 1; piece <= pieces; piece += 1) {
        const began = performance.now();
        view.show(text.slice(0, Math.ceil((text.length * piece) / pieces)));
        place.getBoundingClientRect();
        longest = Math.max(longest, performance.now() - began);
    }
    const all = [...place.querySelectorAll("*")];
    return {
        longest,
        html: text.length < 10_000 ? place.innerHTML : "",
        tags: [...new Set(all.map((element) => element.tagName))],
        links: all.filter((element) => element.tagName === "A").map((link) => link.protocol),
        handlers: all.filter((element) => element.getAttributeNames().some((name) => name.startsWith("on"))).length,
        owned: window.owned === undefined ? "" : "owned",
    };
}
"""
HARMLESS = {
    "P", "H3", "H4", "H5", "H6", "HR", "UL", "OL", "LI", "BLOCKQUOTE", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD",
    "DIV", "PRE", "CODE", "SPAN", "BUTTON", "STRONG", "EM", "DEL", "A",
}  # fmt: skip


@pytest.fixture
def show(visit: Open) -> Callable[..., Any]:
    page = visit()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    return lambda text, pieces=1: page.evaluate(SHOW, [text, pieces])


def test_markdown(show: Callable[..., Any]) -> None:
    """Lists, tables, code and links look like what they are, and the same whether they came at once or in pieces."""
    assert show(ANSWER)["html"] == HTML
    assert show(ANSWER, 200)["html"] == HTML


ADDRESSES = (
    "javascript:owned=1", "JaVaScRiPt:owned=1", "java\tscript:owned=1", "java\nscript:owned=1",
    "\x01javascript:owned=1", "javascript&colon;owned=1", "&#106;avascript:owned=1", "javascript://https://x/%0aowned=1",
    "vbscript:owned=1", "data:text/html,<script>owned=1</script>", "data:text/html;base64,PHN2Zz4=", "file:///etc/passwd",
    "blob:x", "//example.org", "/v1/models", "#log", "?a", "about:blank",
)  # fmt: skip
TAGS = (
    "<img src=x onerror=owned=1>", "<script>owned=1</script>", "<svg onload=owned=1>", "<iframe srcdoc='x'></iframe>",
    "<a href=javascript:owned=1>x</a>", "<style>*{display:none}</style>", "</div></div><h1>x", "<base href=//x>",
)  # fmt: skip


def test_hostile_text_stays_text(show: Callable[..., Any]) -> None:
    """Whatever a model writes, no script runs, nothing is fetched, and no link leads elsewhere than to a web page."""
    links = "\n\n".join(f"[x]({to}) ![x]({to}) <{to}> [![x]({to})]({to}) {to}" for to in ADDRESSES)
    for text in (links, "\n\n".join(TAGS), "\n".join(f"- > | {tag} |" for tag in TAGS), "```<b>\n" + "\n".join(TAGS)):
        shown = show(text)
        assert set(shown["tags"]) <= HARMLESS
        assert {"https:", "http:", "mailto:"} >= set(shown["links"])
        assert shown["handlers"] == 0
        assert not shown["owned"]


HUGE = {
    "a line": "word " * 200_000,
    "a word": "x" * 1_000_000,
    "lists in lists": "\n".join("  " * depth + "- x" for depth in range(1_400)),
    "lists in lists on a line": "- " * 10_000 + "1. " * 10_000,
    "quotes": "> " * 10_000 + "x\n" + ">" * 100_000,
    "backticks": " ".join("`" * (n % 7 + 1) + "a" for n in range(20_000)) + "`a" * 50_000,
    "stars": "**a *b __c _d ~~e " * 20_000 + "*" * 100_000,
    "brackets": "[" * 100_000 + "[a](" * 50_000 + "![" * 50_000,
    "addresses": "https://" * 50_000 + " https://a" * 30_000,
    "spaces": " " * 500_000 + "\n" * 500_000 + "x",
    "fences": "```\n```\n" * 10_000,
    "code": "```\n" + "line of code\n" * 80_000,
    "a wide table": "|" * 20_000 + "\n" + "|-" * 10_000 + "\n" + "|x" * 20_000,
    "tables": "|a|\n|-|\n\n" * 8_000,
    "headings": "#" * 100_000 + " x\n" + "# x\n" * 20_000,
}


@pytest.mark.long
@pytest.mark.parametrize("name", HUGE)
def test_huge_text_does_not_hold_the_page_up(show: Callable[..., Any], name: str) -> None:
    """A model that writes nonsense without end does not freeze its reader's browser."""
    assert show(HUGE[name])["longest"] < 20_000
    assert show(HUGE[name], 200)["longest"] < 5_000


@pytest.mark.long
@pytest.mark.parametrize("what", ["word ", "Some **bold**.\n\n", "- item\n", "```\nx\n```\n"])
def test_five_megabytes(show: Callable[..., Any], what: str) -> None:
    """An answer of a size that nobody reads is shown in part."""
    assert show((what * (5_000_000 // len(what) + 1))[:5_000_000])["longest"] < 20_000


def clipboard(page: Any) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


@pytest.mark.long
def test_copy(visit: Open, site: Site) -> None:
    """An answer is copied as the model wrote it, a block of code without its fences; the button says that it was."""
    text = "Look:\n\n```sh\nls *\n```\n"
    with scripted_engine(site.app, script=lambda _: [text]):
        page = visit(permissions=["clipboard-read", "clipboard-write"])
        ask(page, "How?")
        finished(page)
        page.get_by_role("button", name="Copy code").click()
        expect(page.locator(".copy")).to_have_text("Copied")
        assert clipboard(page) == "ls *"
        page.get_by_role("button", name="Copy the answer").click()
        expect(page.locator(".copy-answer")).to_have_text("Copied")
        assert clipboard(page) == text
        expect(page.locator("#announcer")).to_have_text("Copied")


@pytest.mark.long
def test_what_is_settled_is_left_alone(visit: Open, site: Site) -> None:
    """Text that was selected in a finished paragraph stays selected while the answer goes on."""
    with scripted_engine(site.app, manual=True, script=lambda _: ["First.\n\n", "Second.", " Third."]) as engine:
        page = visit()
        ask(page, "Go.")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step(2)
        expect(answers(page).locator("p")).to_have_text(["First.", "Second."])
        page.evaluate("getSelection().selectAllChildren(document.querySelector('.answer p'))")
        engine.step()
        finished(page)
        assert page.evaluate("getSelection().toString()") == "First."
