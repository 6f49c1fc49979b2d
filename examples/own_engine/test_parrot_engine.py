"""The tests that every engine of lmbridge passes, and one of this engine's own. Run: ``python -m pytest``."""

from __future__ import annotations

import pytest
from parrot_engine import ParrotEngine

from lmbridge import Bridge, Engine, PromptTooLongError
from lmbridge.testing import EngineContract


class TestParrotEngine(EngineContract):
    prompts = ("one prompt", "another", "a third one")
    long_prompt = "word " * 300
    poison = "word " * 401  # it reads 400
    stall_timeout = 0.5

    def engine(self) -> Engine:
        return ParrotEngine("loud")


def test_a_conversation_is_answered() -> None:
    """So that ``lmbridge chat`` and OpenAI's clients, which send conversations, are served."""
    with Bridge(lambda: ParrotEngine("loud")) as bridge:
        assert bridge.chat(system="Be brief.").ask("hello there", timeout=30).text == "HELLO THERE "


def test_a_long_prompt_is_refused_by_its_own_error() -> None:
    """The API's error comes as lmbridge's, so that a Flask view answers 400 and not 500."""
    with Bridge(lambda: ParrotEngine("quiet")) as bridge, pytest.raises(PromptTooLongError, match="401 words"):
        bridge.infer("word " * 401, timeout=30)
