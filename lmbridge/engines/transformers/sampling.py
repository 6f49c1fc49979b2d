"""The sampler that serves a whole batch of requests, each by its plan.

Rule: everything here runs on the thread that generates. What a step computes is ``choosing.choose``; this module fills
the tensors it reads, before the step, and keeps what it found, after it. ``layers`` keeps what is done to scores first.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch

from lmbridge.engines.transformers.choosing import PENALTY, SETTINGS, Changes, Choice, Parts, choose
from lmbridge.engines.transformers.layers import Layers
from lmbridge.engines.transformers.plan import Plan as Plan

_HEAD = 64  # how many of the most likely tokens the filters look at first on a CPU; 98 of 100 rows need no more
_WIDE_HEAD = 256  # the most that rows pay for because another has a large top_k
_AT_ONCE = 1 << 19  # scores that a CPU works on at once; many more no longer fit its caches


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
            static: run every part in every step but grammars and log-probabilities, on tensors made at once (12 bytes
                per row and token for biases and penalties), as a CUDA graph needs that replays what it has recorded.
        """
        device = torch.device(device)
        self.steps = 0
        self._device = torch.device("cpu") if device.type == "mps" else device  # it has no double precision
        self._size = vocabulary_size
        self._static = static
        self._every = Parts(True, True, vocabulary_size, True, True, True, True, True, True)
        self.parts = self._every if static else Parts()
        self._seats: list[weakref.ref[Plan]] = []  # whose settings the rows hold
        self._needed = self._ending = False
        self._lifts: float = math.inf  # the step before which a token that is barred in some row is barred no more
        self._settings = self._buffer(rows, len(SETTINGS), 1.0)
        self._moment = self._buffer(rows, 2, -1.0)
        self._layers = Layers(rows, vocabulary_size, self._device, static)

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
        if (
            self.steps >= self._lifts
            or len(plans) != len(self._seats)
            or any(seat() is not plan for seat, plan in zip(self._seats, plans, strict=True))
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
        plans = [seat() for seat in self._seats] if self.parts.grammars else []
        self._layers.allow(plans)
        choice = self.compute(scores)
        if self.parts.grammars:
            _tell_guides(plans, choice.tokens.tolist())
        if self.parts.logprobs >= 0:
            self._note(choice)
        return choice.tokens.to(scores.device)

    def compute(self, scores: torch.Tensor) -> Choice:
        """What of ``choose`` is tensors alone. On a GPU it may stand in a CUDA graph, one for each ``parts``."""
        raw = scores.to(self._device, torch.float)
        settings, moment, changes = self.buffers(raw.shape[0])
        run = _choose_on_cpu if self._device.type == "cpu" else choose
        choice = run(raw, settings, moment, changes, self.parts)
        if self.parts.penalty or self.parts.counts:
            tokens = choice.tokens.clamp(max=self._size - 1).unsqueeze(-1)  # a forced one may be of no token
            self._layers.note(tokens, settings[:, PENALTY : PENALTY + 1].float(), self.parts)
        return choice

    def buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, Changes]:
        """What ``choosing.choose`` reads beside the scores, for the first rows: settings, moment, changes.

        The same memory in every step, but for the changes that a first plan makes room for.
        """
        return self._settings[:rows], self._moment[:rows], self._layers.rows(rows)

    # ------------------------------------------------------------------------------------------------------------ seats

    def _seat(self, plans: Sequence[Plan]) -> None:
        """Fill what stays the same as long as the same plans come in the same order."""
        if len(plans) > self._settings.shape[0]:
            raise ValueError(f"The sampler was made for {self._settings.shape[0]} rows, and got {len(plans)} plans.")
        self._layers.seat([seat() for seat in self._seats], plans)
        self._seats = [weakref.ref(plan) for plan in plans]
        self._needed = any(plan.needed for plan in plans)
        self._lifts = self.steps + min((plan.least - plan.position for plan in plans if plan.bars), default=math.inf)
        self.parts = self._every if self._static else _parts(plans, self._size, self._device.type == "cpu")
        if plans:
            settings = [plan.settings(self._size) for plan in plans]
            self._settings[: len(plans)] = torch.tensor(settings, dtype=torch.double)

    # ---------------------------------------------------------------------------------------------------------- tensors

    def _buffer(self, rows: int, columns: int, value: float) -> torch.Tensor:
        with torch.inference_mode(False):  # such a tensor may be written to in any mode
            return torch.full((rows, columns), value, dtype=torch.double, device=self._device)

    def _note(self, choice: Choice) -> None:
        """Note log-probabilities of the model's own distribution, which no setting of the request has changed."""
        found = zip(choice.listed.tolist(), choice.logprobs.tolist(), strict=True)
        for seat, (tokens, logprobs) in zip(self._seats, found, strict=False):
            plan = seat()
            if plan is not None and plan.wants_logprobs is not None:
                count = 1 + plan.wants_logprobs
                plan.logprobs.append(dict(zip(tokens[:count], logprobs[:count], strict=True)))


def _tell_guides(plans: Sequence[Plan | None], tokens: Sequence[int]) -> None:
    """Which tokens were chosen."""
    told = [
        (plan.guide, token)
        for plan, token in zip(plans, tokens, strict=False)
        if plan is not None and plan.guide is not None and plan.end is None
    ]
    if told:
        told[0][0].home.chosen(told)


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
        bias=any(plan.biased for plan in plans),
        penalty=any(plan.penalty != 1.0 for plan in plans),
        counts=any(plan.counts for plan in plans),
        grammars=any(plan.guide is not None for plan in plans),
        logprobs=max((-1 if plan.wants_logprobs is None else plan.wants_logprobs for plan in plans), default=-1),
    )


# ------------------------------------------------------------------------------------ only on a CPU: looks into tensors


def _choose_on_cpu(
    scores: torch.Tensor, settings: torch.Tensor, moment: torch.Tensor, changes: Changes, parts: Parts
) -> Choice:
    """As many rows at once as fit the caches, if any part makes tensors as large as the scores."""
    rows, size = scores.shape
    many = max(_AT_ONCE // size, 1)
    changed = parts.bias or parts.penalty or parts.counts or parts.grammars
    if rows <= many or not (parts.drawn or parts.open or changed or parts.logprobs >= 0):
        return _choose_until_enough(scores, settings, moment, changes, parts)
    several = []
    for start in range(0, rows, many):
        some = slice(start, start + many)
        several.append(_choose_until_enough(scores[some], settings[some], moment[some], _of(changes, some), parts))
    return Choice(*map(torch.cat, zip(*several, strict=True)))


def _choose_until_enough(
    scores: torch.Tensor, settings: torch.Tensor, moment: torch.Tensor, changes: Changes, parts: Parts
) -> Choice:
    """``choose``, and once more, looking at the whole vocabulary, for the rows whose head was too small."""
    choice = choose(scores, settings, moment, changes, parts)
    size = scores.shape[-1]
    if not 0 < parts.head < size or bool(choice.enough.all()):
        return choice
    rows = (~choice.enough).nonzero().squeeze(-1)
    again = choose(scores[rows], settings[rows], moment[rows], _of(changes, rows), parts._replace(head=size))
    for mine, new in zip(choice, again, strict=True):
        mine[rows] = new
    return choice


def _of(changes: Changes, rows: slice | torch.Tensor) -> Changes:
    return Changes(*(change[rows] for change in changes))
