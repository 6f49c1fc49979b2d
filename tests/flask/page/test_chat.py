"""A conversation in real Chromium: what a user types, sees and presses."""

from __future__ import annotations

import re

import pytest

from lmbridge import PromptTooLongError, QueueFullError
from lmbridge.flask.testing import scripted_engine
from lmbridge.messages import Request
from lmbridge.testing import Script
from tests.flask.page.conftest import KEY, Site
from tests.flask.page.steps import Open, answers, ask, expect, finished


def recording(seen: list[Request], *pieces: str) -> Script:
    """A script that answers with ``pieces`` and keeps what it was asked."""

    def script(request: Request) -> list[str]:
        seen.append(request)
        return list(pieces)

    return script


def test_answers(visit: Open) -> None:
    """The bundled model answers, and the next question is asked with what was said before."""
    page = visit()
    page.get_by_label("Temperature").fill("0")
    ask(page, "What is the capital of France?")
    expect(answers(page)).to_have_text(re.compile("Paris"))
    expect(page.locator(".facts")).to_have_text(re.compile(r"\d+ tokens in [\d.]+ m?s, the first after"))
    ask(page, "What is 2 + 3?")
    expect(answers(page).nth(1)).to_have_text(re.compile("5|five"))


def test_streams(visit: Open, site: Site) -> None:
    """Each piece is seen as it comes, before the answer is complete; a screen reader hears it once, as a whole."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit()
        ask(page, "one two three")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        expect(answers(page)).to_have_text("one")
        engine.step()
        expect(answers(page)).to_have_text("one two")
        expect(page.locator("#announcer")).to_be_empty()
        engine.step()
        finished(page)
        expect(answers(page)).to_have_text("one two three")
        expect(page.locator("#announcer")).to_have_text("one two three")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_reaches_the_engine(visit: Open, site: Site, how: str) -> None:
    """The stop button and the Escape key end generation itself; what was said stays, and is part of what follows."""
    seen: list[Request] = []
    with scripted_engine(site.app, manual=True, script=recording(seen, "Once", " upon", " a time")) as engine:
        page = visit()
        ask(page, "A story, please.")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        expect(answers(page)).to_have_text("Once")
        if how == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press(how)
        engine.wait_for(lambda engine: bool(engine.aborted))
        assert engine.active == 0
        finished(page)
        expect(page.locator(".facts")).to_have_text("Stopped")
        expect(answers(page)).to_have_text("Once")
        ask(page, "Go on.")
        engine.wait_for(lambda engine: engine.active == 1)
        said = [message["content"] for message in seen[-1].prompt if isinstance(message, dict)]
        assert said == ["A story, please.", "Once", "Go on."]


def test_new_conversation_stops_the_old_one(visit: Open, site: Site) -> None:
    """Beginning anew while an answer comes in ends it, and the model hears no more of what was said."""
    seen: list[Request] = []
    with scripted_engine(site.app, manual=True, script=recording(seen, "a", "b")) as engine:
        page = visit()
        ask(page, "The old question")
        engine.wait_for(lambda engine: engine.active == 1)
        page.get_by_role("button", name="New conversation").click()
        engine.wait_for(lambda engine: bool(engine.aborted))
        expect(page.locator(".exchange")).to_have_count(0)
        expect(page.get_by_label("Message")).to_be_focused()
        ask(page, "The new question")
        engine.wait_for(lambda engine: engine.active == 1)
        assert len(seen[-1].prompt) == 1
        engine.step(2)
        expect(answers(page)).to_have_text("ab")


def test_settings_reach_the_engine(visit: Open, site: Site) -> None:
    """What the settings say is what the request asks for."""
    seen: list[Request] = []
    with scripted_engine(site.app, script=recording(seen, "Yes.")):
        page = visit()
        for label, value in {"Temperature": "0.5", "Top p": "0.9", "Max tokens": "7", "Seed": "3"}.items():
            page.get_by_label(label).fill(value)
        page.get_by_label("System prompt").fill("Be brief.")
        ask(page, "Well?")
        expect(answers(page)).to_have_text("Yes.")
        config = seen[0].config
        assert (config.temperature, config.top_p, config.max_new_tokens, config.random_seed) == (0.5, 0.9, 7, 3)
        assert seen[0].prompt[0] == {"role": "system", "content": "Be brief."}


def test_answer_cut_by_the_limit_says_so(visit: Open, site: Site) -> None:
    """A reader can tell an answer that ran into max_tokens from a complete one."""
    with scripted_engine(site.app):
        page = visit()
        page.get_by_label("Max tokens").fill("2")
        ask(page, "one two three")
        expect(page.locator(".facts")).to_have_text(re.compile("^2 tokens.*cut at the limit of tokens$"))


def test_chosen_model_answers(visit: Open) -> None:
    """The model that is chosen is the one that answers, and is named over its answer."""
    page = visit("two/")
    ask(page, "Who?")
    expect(answers(page)).to_have_text("I am alpha.")
    page.get_by_label("Model", exact=True).select_option("beta")
    ask(page, "And now?")
    expect(answers(page).nth(1)).to_have_text("I am beta.")
    expect(page.locator(".who")).to_have_text(["alpha", "beta"])


def test_prompts_to_begin_with(visit: Open) -> None:
    """A stranger's first click is answered rightly: the bundled model says what it knows, and is asked calmly."""
    page = visit()
    expect(page.locator("#start")).to_contain_text("capitals, sums of two numbers")
    expect(page.locator(".prompt")).to_have_count(3)
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.3")
    page.get_by_label("Message").fill("a draft")
    page.get_by_role("button", name="What is 37 + 48?").click()
    expect(answers(page)).to_contain_text("85")
    expect(page.locator("#start")).to_be_hidden()
    expect(page.get_by_label("Message")).to_have_value("a draft")
    page = visit("two/")
    expect(page.locator("#start")).to_contain_text("Ask the model something")
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "1")


def test_enter_while_an_answer_comes(visit: Open, site: Site) -> None:
    """Who presses Enter too early is told why nothing was sent, and loses nothing of what was typed."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit()
        ask(page, "one two")
        engine.wait_for(lambda engine: engine.active == 1)
        page.get_by_label("Message").fill("too early")
        page.get_by_label("Message").press("Enter")
        expect(page.get_by_text("Stop the answer first. Your message is kept.")).to_be_visible()
        expect(page.get_by_label("Message")).to_have_value("too early")
        engine.step(2)
        finished(page)
        expect(page.locator("#notice")).to_be_empty()
        assert len(engine.started) == 1


def test_edit_and_regenerate(visit: Open, site: Site) -> None:
    """An earlier question can be asked otherwise: what followed it goes. The last answer can be made once more."""
    seen: list[Request] = []
    with scripted_engine(site.app, script=recording(seen, "Yes.")):
        page = visit()
        for count, question in enumerate(("first", "second"), 1):
            ask(page, question)
            expect(page.locator('.exchange[data-state="complete"]')).to_have_count(count)
        edit, field = page.get_by_label("Edit the question").first, page.get_by_label("Edited question").first
        edit.press("Enter")
        expect(field).to_be_focused()
        field.press("Escape")
        expect(edit).to_be_focused()
        edit.click()
        field.fill("better")
        field.press("Enter")
        expect(page.locator(".question")).to_have_text(["better"])
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator('.exchange[data-state="complete"]')).to_have_count(1)
        asked = [[message["content"] for message in request.prompt if isinstance(message, dict)] for request in seen]
        assert asked == [["first"], ["first", "Yes.", "second"], ["better"], ["better"]]


# --- what goes wrong ---


@pytest.mark.long
def test_errors_speak_to_the_visitor(visit: Open, site: Site) -> None:
    """Whoever meets an error learns what to do; what only the server's owner understands is folded away."""
    with scripted_engine(site.app) as engine:
        page = visit()
        for error, words in {
            PromptTooLongError("It has 9 tokens. Raise max_context."): "Shorten it, or start a new conversation.",
            QueueFullError("max_pending=3"): "The server is busy. Try again in a moment.",
            RuntimeError("KeyError: 7"): "The model failed to answer. Try again.",
        }.items():
            engine.refuse(words, error)
            ask(page, words)
            expect(page.locator(".exchange .said").last).to_contain_text(words)
            details = page.locator(".exchange details").last
            expect(details.locator("p")).to_be_hidden()
            expect(details).to_contain_text(re.compile("max_context|max_pending|KeyError|refused"))
            finished(page)


def test_refusal_is_shown_in_the_api_s_words(visit: Open) -> None:
    """A wrong setting is sent as it is; the page shows what the API says of it, and where. Then it works."""
    page = visit()
    page.get_by_label("Temperature").fill("hot")
    ask(page, "What is the capital of France?")
    expect(page.get_by_role("alert").filter(has_text='"hot"')).to_have_text(
        'temperature must be a number from 0 to 2, not "hot".'
    )
    expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Temperature").fill("0")
    expect(page.get_by_label("Temperature")).not_to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text(re.compile("Paris"))
    expect(page.locator(".exchange .trouble")).to_be_hidden()


def test_error_in_mid_stream_is_shown(visit: Open, site: Site) -> None:
    """An answer that fails after its first words keeps them, says why it ended, and can be asked for again."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit()
        ask(page, "one two three")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        expect(answers(page)).to_have_text("one")
        engine.fail("one two three", RuntimeError("out of paper"))
        engine.step()
        expect(page.locator(".exchange").get_by_role("alert")).to_have_text(re.compile("scripted failure"))
        expect(answers(page)).to_have_text("one")
        page.get_by_role("button", name="Try again").press("Enter")
        expect(page.get_by_label("Message")).to_be_focused()
        engine.wait_for(lambda engine: len(engine.started) == 2)
        engine.step(3)
        expect(answers(page)).to_have_text("one two three")


def test_lost_connection_is_shown(visit: Open, site: Site) -> None:
    """A connection that breaks in mid-answer is not taken for the answer's end."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit()
        ask(page, "one two three")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        expect(answers(page)).to_have_text("one")
        site.cut()
        expect(page.locator(".exchange").get_by_role("alert")).to_have_text(
            "The connection was lost before the answer was complete."
        )
        page.context.set_offline(True)
        expect(page.locator("#state")).to_have_text("The server does not respond")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".exchange").get_by_role("alert")).to_have_text(re.compile("The server cannot be reached"))
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        engine.wait_for(lambda engine: len(engine.started) == 2)
        engine.step(3)
        expect(answers(page)).to_have_text("one two three")


EVENTS = """
: open

data: {"choices": [{"delta": {"content": "Zürich, 東京, 🦊"}}]}

data: {"choices": [{"delta":
data:  {"content": "; and more"}}]}

"""

ANSWER_BYTE_BY_BYTE = """
text => {
    window.realFetch ??= window.fetch;
    const body = () => new ReadableStream({
        start(controller) {
            for (const byte of new TextEncoder().encode(text)) controller.enqueue(new Uint8Array([byte]));
            controller.close();
        },
    });
    window.fetch = async (address, options) =>
        options.method === "POST" ? new Response(body()) : window.realFetch(address, options);
}
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_events_may_be_cut_anywhere(visit: Open, line_end: str) -> None:
    """Networks deliver a stream in any pieces, also in the middle of a character; one that merely ends is an error."""
    page = visit()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    lost = page.get_by_text("The connection was lost before the answer was complete.")
    for place, end in enumerate(["data: [DONE]\n\n", ""]):
        page.evaluate(ANSWER_BYTE_BY_BYTE, (EVENTS + end).replace("\n", line_end))
        ask(page, "Where?")
        finished(page)
        expect(answers(page).nth(place)).to_have_text("Zürich, 東京, 🦊; and more")
        expect(lost).to_have_count(place)


def test_html_stays_text(visit: Open, site: Site) -> None:
    """What looks like HTML, in a question, an answer or an error, is shown as it is; so are its spaces and lines."""
    evil = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>\n    <script>document.title='taken'</script>"
    with scripted_engine(site.app, script=lambda request: [evil]) as engine:
        page = visit()
        ask(page, f"Say {evil}")
        finished(page)
        assert answers(page).inner_text() == evil
        assert page.locator(".question").inner_text() == f"Say {evil}"
        engine.refuse("again", RuntimeError(evil))
        ask(page, "again")
        expect(page.locator(".exchange").get_by_role("alert").last).to_contain_text("<img src=x")
        expect(page.locator("#log img, #log b, #log script")).to_have_count(0)
        expect(page).to_have_title("lmbridge")


# --- keys, reloads, addresses ---


def test_api_key(visit: Open) -> None:
    """A server with keys asks for one in the page, says when it is wrong, and the key is kept nowhere but in memory."""
    page = visit("keyed/")
    field = page.get_by_label("API key")
    expect(page.get_by_text("This server requires an API key")).to_be_visible()
    expect(field).to_be_focused()
    field.fill("a-wrong-key")
    field.press("Enter")
    expect(page.get_by_text("The server requires a valid API key.")).to_be_visible()
    field.fill(KEY)
    field.press("Enter")
    expect(field).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_focused()
    ask(page, "Good morning")
    expect(answers(page)).to_have_text("Good morning")
    assert KEY not in page.evaluate("JSON.stringify([sessionStorage, localStorage]) + document.cookie")
    page.reload()
    expect(field).to_be_visible()
    expect(answers(page)).to_have_text("Good morning")


def test_reload_keeps_the_conversation(visit: Open, site: Site) -> None:
    """A reload loses nothing that was said, typed or chosen; an answer that came in is stopped, and says so."""
    with scripted_engine(site.app, manual=True) as engine:
        page = visit()
        page.get_by_label("Seed").fill("12")
        page.get_by_label("System prompt").fill("Be brief.")
        ask(page, "one two three")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        expect(answers(page)).to_have_text("one")
        page.get_by_label("Message").fill("a draft\nof two lines")
        page.reload()
        engine.wait_for(lambda engine: bool(engine.aborted))
        expect(page.locator(".question")).to_have_text("one two three")
        expect(answers(page)).to_have_text("one")
        expect(page.locator(".facts")).to_have_text("Stopped")
        expect(page.get_by_label("Message")).to_have_value("a draft\nof two lines")
        expect(page.get_by_label("Seed")).to_have_value("12")
        expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
        page.get_by_role("button", name="New conversation").click()
        page.reload()
        expect(page.locator(".exchange")).to_have_count(0)


POISON = """
if (!window.name) { // which a tab keeps over a reload
  window.name = "poisoned";
  sessionStorage.setItem(`lmbridge ${location.pathname}`, '{"exchanges": {"a": 1}}');
}
"""


@pytest.mark.long
def test_what_was_stored_and_does_not_fit_is_dropped(visit: Open) -> None:
    """A conversation that the page cannot show would otherwise keep it from starting until the tab is closed."""
    page = visit()
    page.context.add_init_script(POISON)
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()  # it is connected, after a reload of its own
    ask(page, "What is the capital of Peru?")
    expect(answers(page)).to_have_text("The capital of Peru is Lima.")


def test_reload_keeps_the_model(visit: Open) -> None:
    """The chosen model is chosen still after a reload."""
    page = visit("two/")
    page.get_by_label("Model", exact=True).select_option("beta")
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("beta")


def test_works_behind_a_prefix(visit: Open) -> None:
    """The page finds its API below a proxy that hides a prefix, and below a prefix of its own."""
    page = visit("hidden/play/")
    page.get_by_label("Temperature").fill("0")
    ask(page, "What is the capital of France?")
    expect(answers(page)).to_have_text(re.compile("Paris"))
    expect(page.locator("#state")).to_have_text("Ready")


# --- by keyboard ---


def test_shift_enter_begins_a_line(visit: Open, site: Site) -> None:
    """A message may have several lines; an empty one is not sent."""
    with scripted_engine(site.app) as engine:
        page = visit()
        expect(page.get_by_label("Message")).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.type("first")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("second")
        page.keyboard.press("Enter")
        finished(page)
        assert answers(page).inner_text() == "first\nsecond"
        assert len(engine.started) == 1


def test_everything_is_reached_by_tab(visit: Open, site: Site) -> None:
    """The Tab key goes through the page in the order it is read, and what has the focus is marked."""
    with scripted_engine(site.app):
        page = visit()
        ask(page, "hello")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        page.get_by_label("Model", exact=True).focus()
        order = []
        for _ in range(10):
            name, marked = page.evaluate(
                """() => {
                    const there = document.activeElement, box = there.closest("#composer") ?? there;
                    const marks = [there, box].map((element) => getComputedStyle(element));
                    return [there.id || there.className.split(" ")[0],
                            marks.some((style) => style.outlineStyle !== "none" || style.boxShadow !== "none")];
                }"""
            )
            assert marked, f"nothing shows that {name} has the focus"
            order.append(name)
            page.keyboard.press("Tab")
        assert order == [
            "model", "new", "log", "edit", "copy-answer", "retry", "prompt", "send", "temperature", "top_p",
        ]  # fmt: skip
