"""What a row's scores are changed by before its token is chosen, kept for its plan wherever its row is.

Rule: generation thread only. Each kind of change is one tensor of (rows, vocabulary), which is not made before a plan
wants that kind, and stays where it is from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmbridge.engines.transformers.choosing import Changes, Parts
from lmbridge.engines.transformers.plan import Plan


class Layers:
    """The changes of all rows.

    Args:
        static: make every tensor at once, 12 bytes per row and token together.
    """

    def __init__(self, rows: int, size: int, device: torch.device, static: bool) -> None:
        width = size if static else 0
        self._biases = _Biases(rows, width, device)
        self._factors = _Factors(rows, width, device)
        self._counts = _Counts(rows, width, device)
        self._allowed = _Allowed(rows, 0, torch.device("cpu"))
        self._all = (self._biases, self._factors, self._counts, self._allowed)
        self._size = size
        self._device = device
        self._allowed_here = self._allowed.values.to(device)

    def rows(self, count: int) -> Changes:
        """Those of the first rows: the same memory in every step, but where a first plan makes room."""
        layers = self._biases.values, self._factors.values, self._counts.values, self._allowed_here
        return Changes(*(values[:count] for values in layers))

    def seat(self, before: Sequence[Plan | None], plans: Sequence[Plan]) -> None:
        """Give each row the changes of its new plan; a plan that has left its row takes its own along."""
        for layer in self._all:
            layer.seat(before, plans, self._size)

    def allow(self, plans: Sequence[Plan | None]) -> None:
        """Only what the grammars of these rows' plans let come next."""
        guided = [(plan.guide, row) for row, plan in enumerate(plans) if plan is not None and plan.guide is not None]
        if guided:
            guided[0][0].home.fill(guided, self._allowed.values)
            self._allowed_here = self._allowed.values.to(self._device)  # itself on a CPU

    def note(self, tokens: torch.Tensor, penalties: torch.Tensor, parts: Parts) -> None:
        """Keep what was chosen.

        Args:
            tokens: (rows, 1), each below the vocabulary's size.
            penalties: (rows, 1), of repetition.
        """
        rows = len(tokens)
        if parts.penalty:
            self._factors.values[:rows].scatter_(1, tokens, penalties)
        if parts.counts:
            self._counts.values[:rows].scatter_add_(1, tokens, torch.ones_like(penalties))


class _Layer:
    """One kind of change. What a plan has left is kept in its ``left`` under the layer's name."""

    name: str
    neutral: float = 0.0

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.values = self._buffer(width)

    def seat(self, before: Sequence[Plan | None], plans: Sequence[Plan], size: int) -> None:
        """See ``Layers.seat``."""
        if not self.values.shape[1]:
            if not any(map(self.wanted, plans)):
                return
            self.values = self._buffer(size)
        changed = [row for row in range(max(len(before), len(plans))) if self._changes(_at(before, row), plans, row)]
        for row in changed:
            if (plan := _at(before, row)) is not None and self.wanted(plan):
                self.leave(plan, self.values[row])
        for row in changed:
            self.values[row] = self.neutral
            if (plan := _at(plans, row)) is not None and self.wanted(plan):
                self.enter(plan, self.values[row])

    def wanted(self, plan: Plan) -> bool:
        """Whether the plan's row is other than neutral."""
        raise NotImplementedError

    def begin(self, plan: Plan, row: torch.Tensor) -> None:
        """Fill the row of a plan that has not been here."""

    def leave(self, plan: Plan, row: torch.Tensor) -> None:
        plan.left[self.name] = row.clone()

    def enter(self, plan: Plan, row: torch.Tensor) -> None:
        kept = plan.left.pop(self.name, None)
        if kept is None:
            self.begin(plan, row)
        else:
            row.copy_(kept)

    def _changes(self, before: Plan | None, plans: Sequence[Plan], row: int) -> bool:
        return before is None or before is not _at(plans, row)

    def _buffer(self, columns: int) -> torch.Tensor:
        with torch.inference_mode(False):  # such a tensor may be written to in any mode
            return torch.full((self._rows, columns), self.neutral, device=self._device)

    def _tokens(self, tokens: Any, row: torch.Tensor) -> torch.Tensor:
        """Those that the model has; callers may name others."""
        known = [token for token in tokens if 0 <= token < len(row)]
        return torch.tensor(known, dtype=torch.long, device=self._device)


class _Factors(_Layer):
    """The repetition penalty at tokens of prompt and answer, 1 elsewhere."""

    name = "factors"
    neutral = 1.0

    def wanted(self, plan: Plan) -> bool:
        return plan.penalty != 1.0

    def begin(self, plan: Plan, row: torch.Tensor) -> None:
        row[self._tokens(set(plan.prompt), row)] = plan.penalty


class _Counts(_Layer):
    """How often the answer has each token."""

    name = "counts"

    def wanted(self, plan: Plan) -> bool:
        return plan.counts


class _Biases(_Layer):
    """What is added to scores; minus infinity where a token is barred. It follows from the plan alone."""

    name = "biases"

    def wanted(self, plan: Plan) -> bool:
        return plan.biased

    def begin(self, plan: Plan, row: torch.Tensor) -> None:
        known = {token: bias for token, bias in plan.bias.items() if 0 <= token < len(row)}
        values = torch.tensor(list(known.values()), dtype=row.dtype, device=self._device)  # callers may give ints
        row[self._tokens(known, row)] = values
        if plan.bars:
            row[self._tokens(plan.barred, row)] = -torch.inf

    def leave(self, plan: Plan, row: torch.Tensor) -> None:
        """It is made anew."""

    def _changes(self, before: Plan | None, plans: Sequence[Plan], row: int) -> bool:
        plan = _at(plans, row)
        lifted = plan is not None and plan.position == plan.least
        return lifted or super()._changes(before, plans, row)


class _Allowed(_Layer):
    """The tokens that a row's grammar lets come next, a bit for each; filled before each choice, by a CPU."""

    name = "allowed"
    neutral = 255

    def wanted(self, plan: Plan) -> bool:
        return plan.guide is not None

    def leave(self, plan: Plan, row: torch.Tensor) -> None:
        """The guide keeps it."""

    def _buffer(self, columns: int) -> torch.Tensor:
        words = -(-columns // 32)
        with torch.inference_mode(False):
            return torch.full((self._rows, 4 * words), self.neutral, dtype=torch.uint8)


def _at(plans: Sequence[Plan | None], row: int) -> Plan | None:
    return plans[row] if row < len(plans) else None
