"""A real model under llama.cpp: its answers beside those of transformers' ``generate`` on the same weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason='needs xllamacpp; run: pip install "lmbridge[llamacpp]"')

from lmbridge import Bridge
from tests.engines.llamacpp.real import plain_gguf, real_gguf
from tests.real.conftest import Reference, folder, references
from tests.real.model import NoRealModelError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
__all__ = ["folder", "references"]  # fixtures
CLOSE = 0.01  # in log-probability: nearer than that, rounding decides between two tokens
ROUNDED = 0.6  # the same for activations that are rounded to 8 bits


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return real_gguf()
    except NoRealModelError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had. {error}")


def compared(model: Path, references: Sequence[Reference], **options: Any) -> tuple[int, list[float]]:
    """How many answers are the same; of the others how far the best token was above the next where they part."""
    same, gaps = 0, []
    with Bridge(str(model), engine="llamacpp", max_context=512, **options) as bridge:
        futures = [bridge.submit(each.question, max_new_tokens=each.limit) for each in references]
        for reference, future in zip(references, futures, strict=True):
            answer, wanted = future.result(300).token_ids, reference.token_ids
            if answer == wanted:
                same += 1
                continue
            pairs = enumerate(zip(answer, wanted, strict=False))
            parted = next((place for place, (one, other) in pairs if one != other), min(len(answer), len(wanted)))
            gaps.append(reference.gaps[parted])
    return same, gaps


def test_plain_weights_give_the_same_answers(gguf: Path, references: list[Reference]) -> None:
    """Template, tokens or sampling would not be the model's own."""
    same, gaps = compared(plain_gguf(gguf), references, max_batch_size=1)
    print(f"F32: {same} of {len(references)} the same, the others part at {gaps}")
    assert all(gap < CLOSE for gap in gaps)
    assert same >= len(references) * 2 // 3


def test_quantised_weights_part_where_two_tokens_are_close(gguf: Path, references: list[Reference]) -> None:
    """More would be at fault than llama.cpp's rounding of activations to 8 bits beside quantised weights."""
    same, gaps = compared(gguf, references, max_batch_size=4)
    print(f"Q4_1: {same} of {len(references)} the same, the others part at {gaps}")
    assert all(gap < ROUNDED for gap in gaps)
    assert same >= 4


def test_it_fills_in_a_form(gguf: Path) -> None:
    """A program that reads the answer would fail."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Japan"]}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    with Bridge(str(gguf), engine="llamacpp", max_context=512, max_batch_size=2) as bridge:
        response = bridge.infer("What is the capital of Japan?", grammar={"json": schema}, timeout=200)
        assert json.loads(response.text)["country"] in ("France", "Japan")
        emoji = bridge.infer("Say: 😀 😂 🤣", raw=True, max_new_tokens=40, timeout=200)
        assert "\ufffd" not in emoji.text
        assert len(emoji.token_ids) <= emoji.usage.completion_tokens
