"""The bundled model knows what its card says it knows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import lmbridge
from examples.demo_model import world
from examples.demo_model.world import Question
from lmbridge import Bridge


def _sample(questions: list[Question], count: int) -> list[Question]:
    return random.Random(3).sample(questions, min(count, len(questions)))


def _capitals() -> list[Question]:
    return [world.capital_question("What is the capital of {}?", country) for country in world.CAPITALS]


def _sums() -> list[Question]:
    return _sample(list(world.held_out_sums(random.Random(1))), 150)


def _colours() -> list[Question]:
    return _sample([world.colour_question(p, t) for p in world.COLOUR_PHRASINGS for t in world.COLOURS], 60)


def _opposites() -> list[Question]:
    return _sample([world.opposite_question(p, w) for p in world.OPPOSITE_PHRASINGS for w in world.OPPOSITES], 60)


def _stories() -> list[Question]:
    return [world.story_request("Tell me a story about {}.", animal) for animal in world.ANIMALS]


@pytest.mark.parametrize(
    ("questions", "least"), [(_capitals, 1.0), (_sums, 0.95), (_colours, 0.97), (_opposites, 0.97), (_stories, 1.0)]
)
def test_accuracy(demo: Bridge, questions: Callable[[], list[Question]], least: float) -> None:
    """The first five minutes show right answers: capitals all, held-out sums above 95%, stories name their animal."""
    asked = questions()
    answers = demo.infer([question.text for question in asked])
    right = [world.is_right(question, answer.text) for question, answer in zip(asked, answers, strict=True)]
    assert sum(right) >= least * len(asked)
    assert all(answer.finish_reason == "stop" for answer in answers)


def test_a_conversation(demo: Bridge) -> None:
    """Later turns are answered as well as the first, with stories in between."""
    chat = demo.chat(system="You are a helpful assistant.")
    assert "Paris" in chat.ask("What is the capital of France?").text
    assert "owl" in chat.ask("Tell me a story about an owl.").text
    assert "85" in chat.ask("What is 37 + 48?").text
    assert "cold" in chat.ask("What is the opposite of hot?").text


def test_size() -> None:
    """The package stays small: the model folder takes at most 6 MB."""
    folder = Path(lmbridge.__file__).parent / "demo_model"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 6_000_000
