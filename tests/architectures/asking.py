"""What a model answers by itself, and what it answers through a bridge, alone and in a crowd.

Rule: ``expected`` and ``answers_without`` use transformers alone, ``observe`` the bridge alone. All run in the caller's
thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from lmbridge import Bridge
from lmbridge.engines.transformers import TransformersEngine
from tests.architectures.models import Architecture
from tests.engines.conftest import EOS

COUNT = 16
"""Tokens of an answer."""
LENGTHS = (7, 40, 58, 90)
"""Tokens of the prompts, shortest first: some models keep, from one ``generate`` to the next, how long the longest was.
The third begins in front of the 64th position and its answer ends behind."""
LONGEST = 200
NEIGHBOURS = (64, 33, 120, LONGEST, 3, 12, 21, 5)
"""Tokens of the prompts of the others in the crowd: half of them come before the prompts above, half after."""
CHUNK = 32
"""Tokens of a prompt that are read at once; most prompts are longer."""
ROWS = 16
"""Places in a batch: enough for the crowd, and fewer than ``CHUNK``."""
LEAST_MARGIN = 0.01
"""How far apart the two likeliest tokens must be, in log-probability, for rounding to decide nothing."""
ENDING = [116, 104, 101, 32]
"""The end of every prompt. A model that has lost what stands before it answers all of them alike."""
PATIENCE = 60.0
"""Seconds for a call; a bound for what hangs."""


def prompt(length: int) -> list[int]:
    """Token ids without a pattern, the same in every run."""
    ids = torch.randint(0, EOS, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return [*ids[: max(0, length - len(ENDING))], *ENDING][-length:]


PROMPTS = [prompt(length) for length in LENGTHS]
CROWD = [prompt(length) for length in NEIGHBOURS]


@dataclass(frozen=True)
class Observation:
    """What came through the bridge: the answers to ``PROMPTS`` one at a time and all at once, and the runner's name."""

    runner: str
    alone: list[list[int]]
    crowded: list[list[int]]


def expected(architecture: Architecture, folder: str) -> tuple[list[list[int]], float]:
    """The answers of ``generate`` to ``PROMPTS``, and the least margin by which a token of theirs was the likeliest."""
    model = _load(architecture, folder, {})
    answers, margins = zip(*(_generate(model, ids) for ids in PROMPTS), strict=True)
    return list(answers), min(margins)


def answers_without(architecture: Architecture, folder: str, settings: Mapping[str, Any]) -> list[list[int]]:
    """The answers of ``generate`` to ``PROMPTS`` with other settings in the configuration and the same weights."""
    model = _load(architecture, folder, settings)
    return [_generate(model, ids)[0] for ids in PROMPTS]


def observe(folder: str) -> Observation:
    """Ask the model in the folder through a bridge.

    A longer prompt always comes right before a shorter one, which must not notice what it has left in the model.

    Raises:
        EngineStartError: it is refused.
    """
    engine = TransformersEngine(folder, device="cpu", max_context=512, max_chunk_size=CHUNK, max_batch_size=ROWS)
    longest_first = PROMPTS[::-1]
    half = len(CROWD) // 2
    with Bridge(engine, timeout=PATIENCE) as bridge:
        alone = [_answers(bridge, [ids])[0] for ids in (prompt(LONGEST), *longest_first)][1:]
        crowd = _answers(bridge, [*CROWD[:half], *longest_first, *CROWD[half:]])
        crowded = crowd[half : half + len(PROMPTS)]
        return Observation(engine.runner, alone[::-1], crowded[::-1])


def _answers(bridge: Bridge, prompts: list[list[int]]) -> list[list[int]]:
    answers = bridge.infer(prompts, max_new_tokens=COUNT, ignore_eos=True)
    return [answer.token_ids for answer in answers]


def _load(architecture: Architecture, folder: str, settings: Mapping[str, Any]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=architecture.attention, **settings
    )
    return model.eval()


def _generate(model: Any, ids: list[int]) -> tuple[list[int], float]:
    """A greedy answer, and its least margin."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        whole = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=EOS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(list(whole.logits)).float().log_softmax(-1).topk(2).values
    return whole.sequences[0, len(ids) :].tolist(), float((best[..., 0] - best[..., 1]).min())
