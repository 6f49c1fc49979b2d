"""One request's sampling settings and results.

Rule: a ``Plan`` is made by the server thread, which also sets its ``end`` and reads its ``logprobs``; all else belongs
to the thread that generates.

A drawn token depends on the request's seed, its position in the answer and its own scores, and on nothing else in the
batch: one uniform number per (seed, position) from a hash, laid over the probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import torch

from lmbridge.engines.transformers.choosing import DRAWN, FILTERED, GREEDY
from lmbridge.engines.transformers.guides import Guide
from lmbridge.engines.transformers.reading import Reading
from lmbridge.messages import GenerationConfig, Logprobs

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_LEAST, _MOST = 1e-6, 1e6  # of what scores are divided by: beyond, they could overflow, and nothing would change


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on ``seed`` and ``position`` alone (splitmix64, 52 bits)."""
    return _number(_mix(seed & _MASK), position)


def _number(stream: int, position: int) -> float:
    return (_mix(stream + position * _GOLDEN) >> 12) * 2.0**-52


def _mix(number: int) -> int:
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def _bounded(divisor: float) -> float:
    return float(min(max(divisor, _LEAST), _MOST))


class Plan:
    """One request's sampling settings and results.

    Attributes:
        prompt: the prompt's token ids, which the repetition penalty covers as it does the answer's.
        barred: tokens that may not come before ``least`` others have.
        position: how many tokens have been chosen for it; the one of a prepared step counts. Generation thread only.
        steps: how many steps it was part of, those that read its prompt included; counted by the runner.
        logprobs: one entry per generated token where asked for. The generation thread appends, the server thread reads
            those of tokens it has been told of.
        end: if not None, the token that must come next. Set by the server thread to end a request.
        left: generation thread only: the changes to the scores of a request that is left out of steps for a while.
        reading: the prompt's own log-probabilities where asked for.
        guide: the guide for the answer's grammar, if any; set before the request starts.
    """

    def __init__(
        self, config: GenerationConfig, prompt: Sequence[int] = (), barred: Collection[int] = frozenset()
    ) -> None:
        self.samples = config.samples
        self.temperature = _bounded(1.0 if config.temperature is None else config.temperature)
        self.top_k = config.top_k or 0
        self.top_p = config.top_p if config.top_p is not None else 1.0
        self.min_p = config.min_p or 0.0
        self.penalty = _bounded(config.repetition_penalty or 1.0)
        self.frequency, self.presence = config.frequency_penalty, config.presence_penalty
        self.bias = config.logit_bias or {}
        self.least = config.min_new_tokens or 0
        self.barred = barred
        self.wants_logprobs = config.logprobs
        self.seed = config.random_seed if config.random_seed is not None else random.getrandbits(64)
        self.prompt = prompt
        self.position = 0
        self.steps = 0
        self.logprobs: list[Logprobs] = []
        self.end: int | None = None
        self.left: dict[str, torch.Tensor] = {}
        self.reading = None if config.prompt_logprobs is None else Reading(config.prompt_logprobs)
        self.guide: Guide | None = None
        self._stream = _mix(self.seed & _MASK)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """Itself: transformers copies a request's arguments when it takes the request's cache away."""
        return self

    @property
    def needed(self) -> bool:
        """Whether the request needs more than the most likely token."""
        changed = self.penalty != 1.0 or self.counts or self.biased or self.guide is not None
        return self.samples or changed or self.wants_logprobs is not None

    @property
    def failure(self) -> Exception | None:
        """Why it cannot go on: there will be no log-probabilities of its prompt, or no more masks of its grammar."""
        for part in (self.reading, self.guide):
            if part is not None and part.failure is not None:
                return part.failure
        return None

    @property
    def counts(self) -> bool:
        """Whether it matters how often the answer has a token."""
        return bool(self.frequency or self.presence)

    @property
    def bars(self) -> bool:
        """Whether some tokens may not come next."""
        return self.position < self.least and bool(self.barred)

    @property
    def biased(self) -> bool:
        """Whether some tokens' scores are raised, lowered or barred."""
        return bool(self.bias) or self.bars

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return bool(self.top_k or self.top_p < 1.0 or self.min_p)

    def settings(self, size: int) -> tuple[float, ...]:
        """Its row of ``choosing.SETTINGS``, for a vocabulary of that size."""
        penalties = self.penalty, self.frequency, self.presence
        if not self.samples:
            return 1.0, 0.0, 1.0, 0.0, *penalties, GREEDY
        kind = FILTERED if self.filters else DRAWN
        return self.temperature, self.limit(size), self.top_p, self.min_p, *penalties, kind

    def limit(self, size: int) -> int:
        """top_k, or 0 where it leaves all of a vocabulary of that size."""
        return self.top_k if self.top_k < size else 0

    def number(self) -> float:
        """The uniform number of the token that is chosen next."""
        return _number(self._stream, self.position) if self.samples else 0.0
