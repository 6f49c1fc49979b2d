"""The self-check before an engine is ready: real requests, compared with the model itself.

Rule: ``Proof.of`` runs the model and belongs to the engine's worker thread; ``ask`` runs on the server thread.

Two prompts of different length run together for two tokens each. What is compared is not only which token came but the
log-probabilities of the five most likely: a wrong mask or a dropped soft cap changes those long before it changes the
token. The model's own definition is its eager attention, in a plain forward of each prompt by itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lmbridge.engines.base import Sink
from lmbridge.errors import EngineStartError
from lmbridge.messages import Delta, GenerationConfig, Logprobs, Request, join_deltas

PATIENCE = 60.0
"""Seconds that the requests may take."""
TEXTS = ("The fox", "Every morning the old sailor walked down to the harbour and looked at the sea")
LONGEST = 16
"""Tokens of a prompt, so that a tokenizer of letters makes no long ones."""
TOKENS, LIKELY = 2, 5
FINE, COARSE = 0.02, 0.5
"""How far log-probabilities may be apart in full and in half precision: each way of computing rounds in its own way."""


@dataclass(frozen=True)
class Proof:
    """The model's own results.

    Attributes:
        prompts: token ids.
        expected: for each prompt and each token of its answer, the log-probabilities (vocabulary) in front of it.
        tolerance: how far others may be from them.
    """

    prompts: list[list[int]]
    expected: list[list[torch.Tensor]]
    tolerance: float

    @classmethod
    def of(cls, model: Any, tokenizer: Any, attention: str | None, room: int | None) -> Proof:
        """Ask the model.

        Args:
            attention: what the model attends with, to be set again afterwards; None if it has no choice.
            room: the most tokens of a prompt and its answer; None if there is no limit.

        Raises:
            EngineStartError: the model's own output is invalid.
        """
        size = model.get_input_embeddings().weight.shape[0]
        longest = LONGEST if room is None else max(1, min(LONGEST, room - TOKENS))
        prompts = [_ids(tokenizer, text, size)[:longest] for text in TEXTS]
        eager = attention is not None and not _eager_is_wrong(model)
        if eager:
            model.set_attn_implementation("eager")
        try:
            expected = [_answer(model, prompt) for prompt in prompts]
        finally:
            if eager:
                model.set_attn_implementation(attention)
        if any(bool(logprobs.isnan().any()) for answer in expected for logprobs in answer):
            raise EngineStartError(
                "The model's own answers are not numbers (NaN): its weights are broken, or overflow."
            )
        return cls(prompts, expected, FINE if model.dtype.itemsize >= 4 else COARSE)

    async def ask(self, add: Callable[[Request, Sink], None], logprobs: bool = True) -> str:
        """Send the prompts as ordinary requests; returns what is wrong with the answers, or "".

        Args:
            logprobs: ask for them; without them only the tokens are compared.

        Raises:
            Exception: a request failed.
        """
        answers = [_Answer() for _ in self.prompts]
        for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            add(_request(number, prompt, logprobs), answer.sink)
        async with asyncio.timeout(PATIENCE):
            wholes = [await answer.whole for answer in answers]
        for expected, whole in zip(self.expected, wholes, strict=True):
            if not whole.token_ids or (logprobs and whole.logprobs is None):
                return "no tokens came" if not whole.token_ids else "no log-probabilities came"
            if fault := self._fault(expected, whole):
                return fault
        return ""

    def _fault(self, expected: list[torch.Tensor], answer: Delta) -> str:
        likely: list[Logprobs] = answer.logprobs or [{} for _ in answer.token_ids]
        for place, (logprobs, token, found) in enumerate(zip(expected, answer.token_ids, likely, strict=False)):
            apart = _apart(logprobs, token, found)
            if not apart <= self.tolerance:  # not a number is a fault too
                return f"log-probabilities of token {place + 1} differ by {apart:.3g} from the model's own"
            if token != int(logprobs.argmax()):
                break  # nearly as likely as the best: what follows it was not asked for
        return ""


def _apart(expected: torch.Tensor, token: int, found: Logprobs) -> float:
    """How far an answer's log-probabilities are from the expected, and its token from the most likely one."""
    lost = float(expected.max() - expected[token]) / 2
    apart = [lost, *(abs(float(expected[other]) - logprob) for other, logprob in found.items())]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


class _Answer:
    """Gathers what one request's sink is told."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[Delta] = asyncio.get_running_loop().create_future()
        self.whole.add_done_callback(lambda whole: whole.cancelled() or whole.exception())  # one error is told, not two
        self._deltas: list[Delta] = []

    def sink(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if self.whole.done():
            return
        if delta.error is not None:
            self.whole.set_exception(delta.error)
        elif delta.finish_reason is not None:
            self.whole.set_result(join_deltas(self._deltas))


def _request(number: int, prompt: list[int], logprobs: bool) -> Request:
    config = GenerationConfig(
        max_new_tokens=TOKENS, ignore_eos=True, logprobs=LIKELY if logprobs else None, skip_special_tokens=False
    )
    return Request(
        id=f"self-check-{number}",
        prompt=prompt,
        config=config,
        raw=True,
        client="self-check",
        priority=0,
        deadline=None,
        created=time.monotonic(),
        context=contextvars.copy_context(),
    )


def _eager_is_wrong(model: Any) -> bool:
    """Falcon's eager attention adds an ALiBi bias twice (transformers 5.24)."""
    config = model.config.get_text_config()
    return config.model_type == "falcon" and bool(getattr(config, "alibi", False))


def _answer(model: Any, prompt: list[int]) -> list[torch.Tensor]:
    """The log-probabilities in front of each token of the greedy answer."""
    ids, found = list(prompt), []
    for _ in range(TOKENS):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        found.append(logits.float().log_softmax(-1).cpu())
        ids.append(int(found[-1].argmax()))
    return found


def _ids(tokenizer: Any, text: str, size: int) -> list[int]:
    """The text's tokens, as far as the model knows them; of a tokenizer that makes none, the first ids there are."""
    try:
        ids = [token for token in tokenizer.encode(text, add_special_tokens=False) if token < size]
    except Exception:  # one that does not know these words, and no word for the unknown
        ids = []
    return ids or list(range(min(size, len(text.split()))))
