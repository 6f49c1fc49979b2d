"""The recipe for a chat bot, which needs nothing but lmbridge."""

from __future__ import annotations

import pytest

from tests.examples.recipes.conftest import Serve


@pytest.mark.long
def test_users_do_not_wait_for_each_other(serve: Serve) -> None:
    """One who asks for three stories would have the others wait for all of them."""
    bot = serve("bot.py")
    assert bot.process.wait(60) == 0, bot.output
    bot.until("@bob")
    lines = bot.output.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["@ann", "@ann", "@ann", "@bob", "@cy"]
    assert "@bob: 2 + 3 = 5." in lines[:2]
    assert "Sorry" in next(line for line in lines if line.startswith("@cy"))
