"""What the tests of the page do and look at; importing it skips a module where there is no Playwright."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.flask.page.conftest import HOW, PATIENCE

pytest.importorskip("playwright", reason=HOW)

from playwright.sync_api import Locator, Page, expect

expect.set_options(timeout=PATIENCE)

__all__ = ["Open", "answers", "ask", "expect", "figure", "finished"]

Open = Callable[..., Page]


def ask(page: Page, question: str) -> None:
    """Type a question and send it by the keyboard."""
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    page.get_by_label("Message").fill(question)
    page.get_by_label("Message").press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".answer")


def finished(page: Page) -> None:
    """Wait for the end of the answer."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def figure(page: Page, name: str, part: str = "value") -> Locator:
    """A part of one figure of the live panel."""
    return page.locator(".figure").filter(has_text=name).locator(f".{part}")
