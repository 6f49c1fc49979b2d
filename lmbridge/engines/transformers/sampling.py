"""What each request wants of the sampler, and the sampler that serves a whole batch of them.

Rule: everything here runs on the thread that generates, but for the making of a ``Plan``, the setting of its ``end``
and the reading of its ``logprobs``, which are the server thread's. What a step computes is ``choosing.choose``; this
module fills the tensors it reads, before the step, and keeps what it found, after it.

A drawn token depends on the request's seed, its position in the answer and its own scores, and on nothing else in the
batch: one uniform number per (seed, position) from a hash, laid over the probabilities.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from lmbridge.engines.transformers.choosing import DRAWN, FILTERED, GREEDY, PENALTY, SETTINGS, Choice, Parts, choose
from lmbridge.messages import GenerationConfig, Logprobs

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HEAD = 64  # how many of the most likely tokens the filters look at first on a CPU; 98 of 100 rows need no more
_WIDE_HEAD = 256  # the most that rows pay for because another has a large top_k
_AT_ONCE = 1 << 19  # scores that a CPU works on at once; many more no longer fit its caches
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
    """What one request wants of the sampler, and what was found for it.

    Attributes:
        prompt: the prompt's token ids, which the repetition penalty covers as it does the answer's.
        position: how many tokens have been chosen for it; the one of a prepared step counts. Generation thread only.
        steps: how many steps it was part of, those that read its prompt included; counted by the runner.
        logprobs: one entry per generated token where asked for. The generation thread appends, the server thread reads
            those of tokens it has been told of.
        end: if not None, the token that comes next, whatever else is asked. Set by the server thread to end a request.
        history: generation thread only: the penalties of a request that is left out of steps for a while.
    """

    def __init__(self, config: GenerationConfig, prompt: Sequence[int] = ()) -> None:
        self.samples = config.samples
        self.temperature = _bounded(1.0 if config.temperature is None else config.temperature)
        self.top_k = config.top_k or 0
        self.top_p = config.top_p if config.top_p is not None else 1.0
        self.min_p = config.min_p or 0.0
        self.penalty = _bounded(config.repetition_penalty or 1.0)
        self.wants_logprobs = config.logprobs
        self.seed = config.random_seed if config.random_seed is not None else random.getrandbits(64)
        self.prompt = prompt
        self.position = 0
        self.steps = 0
        self.logprobs: list[Logprobs] = []
        self.end: int | None = None
        self.history: torch.Tensor | None = None
        self._stream = _mix(self.seed & _MASK)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """Itself: transformers copies a request's arguments when it takes the request's cache away."""
        return self

    @property
    def needed(self) -> bool:
        """Whether the request differs from taking the most likely token."""
        return self.samples or self.penalty != 1.0 or self.wants_logprobs is not None

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return bool(self.top_k or self.top_p < 1.0 or self.min_p)

    def settings(self, size: int) -> tuple[float, ...]:
        """Its row of ``choosing.SETTINGS``, for a vocabulary of that size."""
        if not self.samples:
            return 1.0, 0.0, 1.0, 0.0, self.penalty, GREEDY
        kind = FILTERED if self.filters else DRAWN
        return self.temperature, self.limit(size), self.top_p, self.min_p, self.penalty, kind

    def limit(self, size: int) -> int:
        """top_k, or 0 where it leaves all of a vocabulary of that size."""
        return self.top_k if self.top_k < size else 0

    def number(self) -> float:
        """The uniform number of the token that is chosen next."""
        return _number(self._stream, self.position) if self.samples else 0.0


class Sampler:
    """Chooses the tokens of a batch, step by step. Its tensors stay where they are from step to step.

    Attributes:
        steps: how many steps were prepared. Written by the generation thread, read anywhere.
        parts: what the step prepared has to run, see ``choosing.Parts``.
    """

    def __init__(
        self, vocabulary_size: int, rows: int, device: torch.device | str = "cpu", *, static: bool = False
    ) -> None:
        """
        Args:
            rows: the most plans that a step is prepared for.
            static: run every part in every step but log-probabilities, on tensors made at once (4 bytes per row and
                token for the penalties), as a CUDA graph needs that replays what it has recorded.
        """
        device = torch.device(device)
        self.steps = 0
        self._device = torch.device("cpu") if device.type == "mps" else device  # it has no double precision
        self._size = vocabulary_size
        self._static = static
        self._every = Parts(True, True, vocabulary_size, True, True, True, True)
        self.parts = self._every if static else Parts()
        self._seats: list[weakref.ref[Plan]] = []  # whose settings the rows hold
        self._needed = self._ending = False
        self._settings = self._buffer(rows, len(SETTINGS), 1.0)
        self._moment = self._buffer(rows, 2, -1.0)
        self._factors = self._buffer(rows, vocabulary_size if static else 0, 1.0, torch.float)

    @property
    def active(self) -> bool:
        """Whether the step prepared has a row that must not simply get its most likely token."""
        return self._static or self._needed or self._ending

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Before a step: row i of the coming scores belongs to ``plans[i]``. Counts the token that it will choose.

        Raises:
            ValueError: there are more plans than rows.
        """
        self.steps += 1
        if len(plans) != len(self._seats) or any(
            seat() is not plan for seat, plan in zip(self._seats, plans, strict=True)
        ):
            self._seat(plans)
        ends = [plan.end for plan in plans]  # read once: the server thread may set one at any time
        self._ending = any(end is not None for end in ends)
        if plans and self.active:
            moment = [(plan.number(), -1 if end is None else end) for plan, end in zip(plans, ends, strict=True)]
            self._moment[: len(plans)] = torch.tensor(moment, dtype=torch.double)
        for plan in plans:
            plan.position += 1

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """After the model: the token of every row. Keeps penalties and log-probabilities.

        Args:
            scores: (rows, vocabulary), of the plans prepared; not changed.

        Returns:
            (rows,), on the device of ``scores``.
        """
        choice = self.compute(scores)
        if self.parts.logprobs >= 0:
            self._note(choice)
        return choice.tokens.to(scores.device)

    def compute(self, scores: torch.Tensor) -> Choice:
        """What of ``choose`` is tensors alone. On a GPU it may stand in a CUDA graph, one for each ``parts``."""
        raw = scores.to(self._device, torch.float)
        settings, moment, factors = self.buffers(raw.shape[0])
        run = _choose_on_cpu if self._device.type == "cpu" else choose
        choice = run(raw, settings, moment, factors, self.parts)
        if self.parts.penalty:
            tokens = choice.tokens.clamp(max=self._size - 1).unsqueeze(-1)  # a forced one may be of no token
            factors.scatter_(1, tokens, settings[:, PENALTY : PENALTY + 1].float())
        return choice

    def buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``choosing.choose`` reads beside the scores, for the first rows: settings, moment, factors.

        The same memory in every step, but for the factors that a first penalty makes room for.
        """
        return self._settings[:rows], self._moment[:rows], self._factors[:rows]

    # ------------------------------------------------------------------------------------------------------------ seats

    def _seat(self, plans: Sequence[Plan]) -> None:
        """Fill what stays the same as long as the same plans come in the same order."""
        if len(plans) > self._settings.shape[0]:
            raise ValueError(f"The sampler was made for {self._settings.shape[0]} rows, and got {len(plans)} plans.")
        self._seat_histories(plans)
        self._seats = [weakref.ref(plan) for plan in plans]
        self._needed = any(plan.needed for plan in plans)
        self.parts = self._every if self._static else _parts(plans, self._size, self._device.type == "cpu")
        if plans:
            settings = [plan.settings(self._size) for plan in plans]
            self._settings[: len(plans)] = torch.tensor(settings, dtype=torch.double)

    def _seat_histories(self, plans: Sequence[Plan]) -> None:
        """Give each row the penalties of its new plan; a plan that has left its row takes its own along."""
        if not self._factors.shape[1]:
            if all(plan.penalty == 1.0 for plan in plans):
                return
            self._factors = self._buffer(self._settings.shape[0], self._size, 1.0, torch.float)
        before = [seat() for seat in self._seats]
        rows = range(max(len(before), len(plans)))
        changed = [row for row in rows if (plan := _at(before, row)) is None or plan is not _at(plans, row)]
        for row in changed:
            if (plan := _at(before, row)) is not None and plan.penalty != 1.0:
                plan.history = self._factors[row].clone()
        for row in changed:
            self._factors[row] = 1.0
            if (plan := _at(plans, row)) is not None and plan.penalty != 1.0:
                self._recall(self._factors[row], plan)

    def _recall(self, factors: torch.Tensor, plan: Plan) -> None:
        if plan.history is not None:
            factors.copy_(plan.history)
            plan.history = None
        else:
            seen = [token for token in set(plan.prompt) if 0 <= token < self._size]
            factors[torch.tensor(seen, dtype=torch.long, device=self._device)] = plan.penalty

    # ---------------------------------------------------------------------------------------------------------- tensors

    def _buffer(self, rows: int, columns: int, value: float, dtype: torch.dtype = torch.double) -> torch.Tensor:
        with torch.inference_mode(False):  # such a tensor may be written to in any mode
            return torch.full((rows, columns), value, dtype=dtype, device=self._device)

    def _note(self, choice: Choice) -> None:
        """Note log-probabilities of the model's own distribution, which no setting of the request has changed."""
        found = zip(choice.listed.tolist(), choice.logprobs.tolist(), strict=True)
        for seat, (tokens, logprobs) in zip(self._seats, found, strict=False):
            plan = seat()
            if plan is not None and plan.wants_logprobs is not None:
                count = 1 + plan.wants_logprobs
                plan.logprobs.append(dict(zip(tokens[:count], logprobs[:count], strict=True)))


def _at(plans: Sequence[Plan | None], row: int) -> Plan | None:
    return plans[row] if row < len(plans) else None


def _parts(plans: Sequence[Plan], size: int, on_cpu: bool) -> Parts:
    """What these plans need. The head is the whole vocabulary, but on a CPU a smaller one is tried first."""
    drawn = [plan for plan in plans if plan.samples]
    filtered = [plan for plan in drawn if plan.filters]
    limits = [plan.limit(size) for plan in filtered]
    head = min(max(max(limits, default=0) + 1, _HEAD), _WIDE_HEAD) if on_cpu else size
    return Parts(
        greedy=len(drawn) < len(plans),
        drawn=len(filtered) < len(drawn),
        head=head if filtered else 0,
        limits=any(limits),
        cuts=any(plan.top_p < 1.0 for plan in filtered),
        open=any(plan.top_p < 1.0 and not limit for plan, limit in zip(filtered, limits, strict=True)),
        penalty=any(plan.penalty != 1.0 for plan in plans),
        logprobs=max((-1 if plan.wants_logprobs is None else plan.wants_logprobs for plan in plans), default=-1),
    )


# ------------------------------------------------------------------------------------ only on a CPU: looks into tensors


def _choose_on_cpu(
    scores: torch.Tensor, settings: torch.Tensor, moment: torch.Tensor, factors: torch.Tensor, parts: Parts
) -> Choice:
    """As many rows at once as fit the caches, if any part makes tensors as large as the scores."""
    rows, size = scores.shape
    many = max(_AT_ONCE // size, 1)
    if rows <= many or not (parts.drawn or parts.open or parts.penalty or parts.logprobs >= 0):
        return _choose_until_enough(scores, settings, moment, factors, parts)
    several = []
    for start in range(0, rows, many):
        some = slice(start, start + many)
        several.append(_choose_until_enough(scores[some], settings[some], moment[some], factors[some], parts))
    return Choice(*map(torch.cat, zip(*several, strict=True)))


def _choose_until_enough(
    scores: torch.Tensor, settings: torch.Tensor, moment: torch.Tensor, factors: torch.Tensor, parts: Parts
) -> Choice:
    """``choose``, and once more, looking at the whole vocabulary, for the rows whose head was too small."""
    choice = choose(scores, settings, moment, factors, parts)
    size = scores.shape[-1]
    if not 0 < parts.head < size or bool(choice.enough.all()):
        return choice
    rows = (~choice.enough).nonzero().squeeze(-1)
    again = choose(scores[rows], settings[rows], moment[rows], factors[rows], parts._replace(head=size))
    for mine, new in zip(choice, again, strict=True):
        mine[rows] = new
    return choice
