"""How the page looks in real Chromium, and what its live panel shows."""

from __future__ import annotations

import re

import pytest

from lmbridge.flask.testing import scripted_engine
from tests.flask.page.conftest import Site
from tests.flask.page.steps import Open, ask, expect, figure, finished

CONTRAST = """
element => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => color.slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    let behind = element;
    while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(rgb).map(luminance);
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}
"""


# --- the live panel ---


@pytest.mark.long
def test_panel_moves(visit: Open, site: Site) -> None:
    """The panel shows what goes on while it goes on, and its plots say in words what they draw."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit()
        for name in ("In flight", "Waiting", "Tokens per second", "Batch size"):
            expect(figure(page, name)).to_have_text("0")
        expect(figure(page, "Time to first token")).to_have_text("\N{EN DASH}")
        ask(page, "one two three")
        engine.wait_for(lambda engine: engine.active == 1)
        expect(figure(page, "In flight")).to_have_text("1")
        engine.step(2)
        expect(figure(page, "Tokens per second", "most")).to_have_text(re.compile(r"^max [1-2](\.\d+)?$"))
        engine.step()
        expect(figure(page, "In flight")).to_have_text("0")
        expect(figure(page, "Time to first token")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
        batch = page.get_by_role("img", name=re.compile("^Batch size over the last minute: last 0, at most 1$"))
        expect(batch.locator("path")).to_have_attribute("d", re.compile("M.*v-30"))


def test_panel_shows_the_queue(visit: Open, site: Site) -> None:
    """Requests that wait for the engine are told from those in it."""
    with scripted_engine(site.app, manual=True, max_batch_size=1) as engine:
        page, other = visit(), visit()
        ask(page, "one two")
        engine.wait_for(lambda engine: engine.active == 1)
        ask(other, "three four")
        for each in (page, other):
            expect(figure(each, "In flight")).to_have_text("1")
            expect(figure(each, "Waiting")).to_have_text("1")


def test_loading_is_shown(visit: Open, site: Site) -> None:
    """The page says whether its model is there: not yet asked for, loading, ready."""
    page = visit("slow/")
    expect(page.locator("#state")).to_have_text("Loads with the first message")
    ask(page, "hello")
    expect(page.locator("#state")).to_have_text("Loading")
    expect(page.locator("#loading")).to_be_visible()
    site.gate.set()
    expect(page.locator(".answer")).to_have_text("hello")
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#loading")).to_be_hidden()


# --- light, dark, narrow, still ---


def test_light_and_dark(visit: Open, site: Site) -> None:
    """The page follows the system's colours, and its text can be read in both."""
    with scripted_engine(site.app) as engine:
        page = visit()
        ask(page, "hello")
        engine.refuse("again", ValueError("no"))
        expect(page.locator(".facts")).to_be_visible()
        ask(page, "again")
        expect(page.locator(".exchange .trouble").last).to_be_visible()
        backgrounds = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for shown in ("h1", "#state", ".question", ".who", ".answer", ".facts", ".exchange:last-child .trouble",
                          "#send", "#keys", ".figure .name", "#settings label", "#seed", "summary"):  # fmt: skip
                contrast = page.locator(shown).first.evaluate(CONTRAST)
                assert contrast >= 4.5, f"{shown} is hard to read in {scheme}: {contrast:.1f}"
        assert backgrounds[0] != backgrounds[1]


@pytest.mark.long
def test_nothing_moves_while_an_answer_comes(visit: Open, site: Site) -> None:
    """Who reads or reaches for a button while an answer grows finds everything where it was."""
    boxes = """names => names.map((name) => {
        const { x, y, width, height } = document.querySelector(name).getBoundingClientRect();
        return [name, x, y, width, height].join(" ");
    })"""
    still = ["#model", "#new", ".question", ".who", ".answer p", "#composer", "#prompt", "#send", "#keys", "#seed",
             ".figure .value", ".figure .most", "#figures"]  # fmt: skip
    pieces = ["First.\n\n", "- one\n", "- two\n\n", "```python\nx = 1\n", "```\n"]
    with scripted_engine(site.app, manual=True, script=lambda _: pieces) as engine:
        page = visit()
        ask(page, "Say much.")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        expect(page.locator(".answer p")).to_be_visible()
        page.evaluate("document.querySelectorAll('.figure .value, .figure .most').forEach((text) => text.append('9'))")
        before = page.evaluate(boxes, still)
        page.get_by_label("Message").press("Enter")
        engine.step(4)
        expect(page.locator(".answer pre")).to_be_visible()
        finished(page)
        assert page.evaluate(boxes, still) == before


@pytest.mark.long
def test_a_long_message_leaves_room(visit: Open, site: Site) -> None:
    """A message of a hundred lines scrolls in its field; the conversation keeps most of the window."""
    page = visit(viewport={"width": 360, "height": 640})
    page.get_by_label("Message").fill("line\n" * 100)
    assert page.locator("#log").evaluate("log => log.clientHeight") > 250
    assert page.get_by_label("Message").evaluate("field => field.scrollHeight > field.clientHeight")
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()


def test_fits_a_phone(visit: Open, site: Site) -> None:
    """On 360 pixels nothing is cut off to the side, whatever is said, and the settings are a button away."""
    with scripted_engine(site.app):
        page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
        ask(page, "https://example.org/" + "long" * 60 + " and words")
        expect(page.locator(".answer")).to_contain_text("and words")
        width = "Math.max(document.documentElement.scrollWidth, document.getElementById('log').scrollWidth)"
        assert page.evaluate(width) <= 360
        expect(page.get_by_label("Temperature")).to_be_hidden()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Temperature")).to_be_in_viewport()  # before the figures
        expect(figure(page, "Batch size")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Message")).to_be_in_viewport()
        expect(page.get_by_role("button", name="Send")).to_be_in_viewport()


def test_still_where_motion_is_unwanted(visit: Open, site: Site) -> None:
    """Who asks the system for less motion sees none."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit(reduced_motion="reduce")
        ask(page, "hello")
        engine.wait_for(lambda engine: engine.active == 1)
        expect(page.locator('.exchange[data-state="running"]')).to_have_count(1)
        assert page.evaluate("document.getAnimations().length") == 0
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate("document.getAnimations().length") == 1


def test_long_answers_are_followed(visit: Open, site: Site) -> None:
    """The end of a growing answer stays in sight, unless the reader has scrolled up to read."""
    with scripted_engine(site.app, manual=True, script=lambda _: ["line\n" * 60, "the middle\n" * 9, "end"]) as engine:
        page = visit()
        ask(page, "Say much.")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        log = page.locator("#log")
        at_end = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 40"
        expect(page.locator(".answer")).to_contain_text("line")
        assert log.evaluate(f"async log => {{ await new Promise(requestAnimationFrame); return ({at_end})(log); }}")
        log.evaluate("log => log.scrollTo(0, 100)")
        engine.step(2)
        finished(page)
        assert log.evaluate("log => log.scrollTop") == 100
