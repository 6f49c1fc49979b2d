"""The real model's folder, and what ``generate`` alone answers on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmbridge import Bridge
from tests.real.model import NoRealModelError, real_model_folder

# Each with the most tokens of its answer: a batch whose rows come and go, some ended by the model, some by the limit.
QUESTIONS = (
    ("What is the capital of France?", 32),
    ("What colour is the sky on a clear day?", 40),
    ("Write a short poem about the sea.", 48),
    ("What is the capital of Japan?", 32),
    ("Give me a recipe for pancakes.", 48),
    ("What is 2 + 2?", 32),
    ("How many days are there in a week?", 32),
    ("Who wrote Romeo and Juliet?", 40),
    ("What is the largest planet in our solar system?", 48),
    ("What gas do plants take in from the air?", 40),
    ("Name three animals that live in the sea.", 32),
    ("What do bees make?", 48),
    ('Translate "good morning" into French.', 32),
    ("Explain in one sentence why the sky is blue.", 40),
    ("What is the capital of Germany?", 32),
    ("What is the opposite of hot?", 40),
    ("Tell me a story about a fox who learns to swim.", 48),
    ("How does a bicycle stay upright?", 40),
    ("List the months of the year.", 48),
    ("What is photosynthesis?", 40),
    ("Write a polite letter to a neighbour about a noisy dog.", 48),
    ("What is the capital of Italy?", 32),
    (
        "Summarise the following in one sentence: The meeting began at nine. Everybody came late because of the snow, "
        "and the chairman decided to begin again on Monday.",
        40,
    ),
    ("What is the capital of Spain?", 40),
)


@dataclass(frozen=True)
class Reference:
    """What ``generate`` answers to one prompt, alone.

    Attributes:
        token_ids: greedy, the ending token left out.
        seconds: for each of them, and the ending one, the second most likely token.
        gaps: and how far the best is above it, in log-probability.
        text: the answer.
    """

    question: str
    limit: int
    token_ids: list[int]
    seconds: list[int]
    gaps: list[float]
    text: str


@pytest.fixture(scope="session")
def folder() -> str:
    """The model's folder; without it these tests are skipped, and say why."""
    try:
        return str(real_model_folder())
    except NoRealModelError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had. {error}")


@pytest.fixture(scope="session")
def references(folder: str) -> list[Reference]:
    """The answers of plain ``generate``, one question after the other."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [_ask(tokenizer, model, question, limit) for question, limit in QUESTIONS]


@pytest.fixture(scope="module")
def bridge(folder: str) -> Iterator[Bridge]:
    with Bridge(folder) as bridge:
        yield bridge


def _ask(tokenizer: Any, model: Any, question: str, limit: int) -> Reference:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        **prompt, max_new_tokens=limit, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = output.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    best = torch.cat(output.logits).log_softmax(-1).topk(2)
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    if ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return Reference(question, limit, ids, best.indices[:, 1].tolist(), gaps, tokenizer.decode(ids))
