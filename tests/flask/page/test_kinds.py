"""The tabs for models that make no text, in real Chromium: similarity of sentences, and documents ranked by a query."""

from __future__ import annotations

import re

from lmbridge import EngineError, InvalidRequestError
from lmbridge.flask.testing import scripted_encoder
from lmbridge.testing import vector_of
from tests.flask.page.conftest import Site
from tests.flask.page.steps import Open, answers, ask, expect, finished
from tests.flask.page.test_look import CONTRAST

WARM = """
(cell, warmth) => {
    cell.style.setProperty("--warmth", warmth);
    // the browser tells a mixed colour in a form that the measure does not read
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = getComputedStyle(cell).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
    cell.style.background = `rgb(${canvas.getImageData(0, 0, 1, 1).data.slice(0, 3).join(" ")})`;
}
"""


def test_no_tabs_for_one_kind(visit: Open) -> None:
    """A server with language models alone has the page it always had, and one with an encoder alone has no chat."""
    page = visit()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.get_by_role("tablist")).to_be_hidden()
    page = visit("encoder/")
    expect(page.get_by_role("button", name="Compare")).to_be_visible()
    expect(page.get_by_role("tablist")).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_hidden()


def test_each_tab_has_its_models(visit: Open) -> None:
    """Each tab offers the models that do what it is for; a chat and its draft are there again afterwards."""
    page = visit("kinds/")
    names = page.get_by_label("Model", exact=True).locator("option")
    expect(names).to_have_text(["chat"])
    ask(page, "hello")
    finished(page)
    page.get_by_label("Message").fill("a draft")
    page.get_by_role("tab", name="Similarity").click()
    expect(names).to_have_text(["minilm"])
    for of_chats in ("Message", "Temperature"):
        expect(page.get_by_label(of_chats)).to_be_hidden()
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    page.get_by_role("tab", name="Ranking").click()
    expect(names).to_have_text(["ranker"])
    page.reload()
    expect(page.get_by_label("Query")).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    expect(answers(page)).to_have_text("hello")
    expect(page.get_by_label("Message")).to_have_value("a draft")


def test_heat_map(visit: Open, site: Site) -> None:
    """Each pair of sentences has its cosine, in numbers as well as in colour; the closest pair is read out."""
    with scripted_encoder(site.kinds, "minilm", tasks=["embed"]) as encoder:
        page = visit("kinds/")
        page.get_by_role("tab", name="Similarity").click()
        page.get_by_label("Sentences").fill("A fox.\n\n  A hen. \nA fox.")
        page.get_by_role("button", name="Compare").click()
        cells = page.locator("tbody td")
        other = f"{float(vector_of('A fox.') @ vector_of('A hen.')):.2f}"
        expect(cells).to_have_text(["1.00", other, "1.00", other, "1.00", other, "1.00", other, "1.00"])
        expect(page.get_by_role("rowheader")).to_have_text(["A fox.", "A hen.", "A fox."])
        expect(page.get_by_role("columnheader")).to_have_text(["1", "2", "3"])
        expect(page.locator("#announcer")).to_have_text("The most similar are sentences 1 and 3: 1.00.")
        expect(page.locator("#similarity .outcome")).to_have_text(
            re.compile(r"^3 sentences and 6 tokens in [\d.]+ m?s$")
        )
        assert encoder.stats()["items"] == 3
        warm, cold = (cells.nth(n).evaluate("cell => getComputedStyle(cell).backgroundColor") for n in (0, 1))
        assert warm != cold


def test_ranked_list(visit: Open, site: Site) -> None:
    """Documents come in the order of their scores; what is typed survives a reload."""
    with scripted_encoder(site.kinds, "ranker", tasks=["rerank"]):
        page = visit("kinds/")
        page.get_by_role("tab", name="Ranking").click()
        page.get_by_label("Query").fill("red fox")
        page.get_by_label("Documents").fill("a hen\nthe red fox\na <b>fox</b> fox")
        page.get_by_label("Query").press("Enter")
        items = page.locator(".rank")
        expect(items.locator(".text")).to_have_text(["the red fox", "a <b>fox</b> fox", "a hen"])
        expect(items.locator(".score")).to_have_text(["1.000", "0.500", "0.000"])
        expect(page.locator("#announcer")).to_have_text("Most relevant: the red fox")
        page.reload()
        expect(page.get_by_label("Query")).to_have_value("red fox")


def test_by_keyboard(visit: Open, site: Site) -> None:
    """Arrows go from tab to tab, Ctrl+Enter asks, and Escape takes back what was asked."""
    with scripted_encoder(site.kinds, "minilm", tasks=["embed"], manual=True) as encoder:
        page = visit("kinds/")
        page.get_by_role("tab", name="Chat").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Similarity")).to_be_focused()
        expect(page.get_by_role("tab", name="Similarity")).to_have_attribute("aria-selected", "true")
        page.get_by_label("Sentences").focus()
        page.keyboard.press("Control+Enter")
        encoder.wait_for(lambda encoder: encoder.active == 4)
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Escape")
        encoder.wait_for(lambda encoder: encoder.active == 0)
        expect(page.get_by_role("button", name="Compare")).to_be_visible()
        expect(page.locator("#similarity .trouble")).to_be_hidden()
        page.get_by_role("tab", name="Similarity").focus()
        page.keyboard.press("End")
        expect(page.get_by_role("tab", name="Ranking")).to_be_focused()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Chat")).to_be_focused()


def test_what_goes_wrong_is_said(visit: Open, site: Site) -> None:
    """Too little to compare, a text that is refused, an engine that fails: each in words, and it works again."""
    with scripted_encoder(site.kinds, "minilm", tasks=["embed"]) as encoder:
        page = visit("kinds/")
        page.get_by_role("tab", name="Similarity").click()
        trouble = page.get_by_role("alert").filter(visible=True)
        page.get_by_label("Sentences").fill("alone")
        page.get_by_role("button", name="Compare").click()
        expect(trouble).to_have_text(re.compile("at least two"))
        encoder.refuse("bad", InvalidRequestError("no such word"))
        page.get_by_label("Sentences").fill("good\nbad")
        page.get_by_role("button", name="Compare").click()
        expect(trouble).to_have_text("Input 1 of the list: no such word")
        encoder.fail("good", EngineError("broken"))
        page.get_by_role("button", name="Compare").click()
        expect(trouble).to_have_text(re.compile("scripted failure"))
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("table")).to_be_visible()
        expect(trouble).to_have_count(0)


def test_a_tab_comes_when_its_model_is_there(visit: Open, site: Site) -> None:
    """What a model does may be known only once it is loaded; the page then has its tab without being loaded anew."""
    page = visit("later/")
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.get_by_role("tablist")).to_be_hidden()
    site.gate.set()
    page.request.post(f"{page.url}rerank", data={"model": "later", "query": "a", "texts": ["a"]})
    expect(page.get_by_role("tab", name="Ranking")).to_be_visible()
    expect(page.get_by_label("Message")).to_be_visible()


def test_every_warmth_can_be_read(visit: Open, site: Site) -> None:
    """The numbers of the heat map stand out from their colour, from the coldest to the warmest, in light and dark."""
    with scripted_encoder(site.kinds, "minilm", tasks=["embed"]):
        page = visit("kinds/")
        page.get_by_role("tab", name="Similarity").click()
        page.get_by_role("button", name="Compare").click()
        cell = page.locator("tbody td").first
        expect(cell).to_be_visible()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for warmth in (0, 0.25, 0.5, 0.75, 1):
                cell.evaluate(WARM, warmth)
                contrast = cell.evaluate(CONTRAST)
                cell.evaluate("cell => cell.style.removeProperty('background')")
                assert contrast >= 4.5, f"{warmth} in {scheme}: {contrast:.1f}"
            for shown in ("[role=tab]", "[aria-selected=false]", "caption", ".trial label", ".outcome", "tbody th"):
                contrast = page.locator(f"{shown}:visible").first.evaluate(CONTRAST)
                assert contrast >= 4.5, f"{shown} in {scheme}: {contrast:.1f}"


def test_it_fits_a_phone(visit: Open, site: Site) -> None:
    """On 360 pixels the page does not move sideways: a heat map that is wider moves within its own frame."""
    with scripted_encoder(site.kinds, "minilm", tasks=["embed"]):
        page = visit("kinds/", viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
        page.get_by_role("tab", name="Similarity").click()
        page.get_by_label("Sentences").fill("\n".join(f"{'long' * 20} sentence {n}" for n in range(12)))
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("table")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#similarity").evaluate("panel => panel.scrollWidth") <= 360
        page.get_by_role("tab", name="Ranking").click()
        page.get_by_role("button", name="Rank").click()
        expect(page.locator(".rank")).to_have_count(4)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
