"""The sampler in the place of a manager's logits processors: one of two seams into undocumented parts of transformers.

Rule: all that is known of how transformers' continuous batching calls its processors is known here, and named in
``library.SAMPLER``, which is looked at before. Everything but ``install`` runs on the manager's generation thread.

transformers keeps one set of sampling parameters for a manager. A manager that takes the most likely token
(``do_sample`` off) serves requests of every kind, if the token that each request's own plan chooses is made the most
likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmbridge.engines.transformers import library
from lmbridge.engines.transformers.plan import Plan
from lmbridge.engines.transformers.sampling import Sampler
from lmbridge.messages import GenerationConfig

Read = Callable[[Plan, bool], None]
"""Read some of a plan's prompt beside the batch, or all that is left of it."""


def install(manager: Any, sampler: Sampler, entering: Callable[[], None], read: Read) -> None:
    """Have ``sampler`` choose the manager's tokens. Between making the manager and warming it up.

    Each request must be added with its ``plan`` as an argument of that name.

    Args:
        entering: called once on the generation thread, before its first step.
        read: called between two steps for each plan of the next whose prompt's log-probabilities are asked for.

    Raises:
        EngineStartError: the manager keeps its processors elsewhere.
    """
    library.check_manager(manager)
    manager.logit_processor = _Processors(sampler, entering, read)


class _Processors:
    """Stands in for ``ContinuousBatchingLogitsProcessorList``.

    Attributes:
        tensors_required: the manager keeps no tensor of arguments for us.
    """

    tensors_required = 0

    def __init__(self, sampler: Sampler, entering: Callable[[], None], read: Read) -> None:
        self._sampler = sampler
        self._read = read
        self._entering: Callable[[], None] | None = entering
        self._nobody = Plan(GenerationConfig())  # of requests that transformers makes up to record a step

    @property
    def do_processing(self) -> bool:
        """Whether this step has a row to work on; if not, the object is not called."""
        return self._sampler.active

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """A request's arguments: its plan, which is ours."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """There are no tensors to fill."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Before the model runs: whose rows are coming."""
        if self._entering is not None:
            self._entering()
            self._entering = None
        plans = []
        for request in requests_in_batch:
            plan = request.state.logit_processor_kwargs.get("plan", self._nobody)
            plan.steps += 1
            if request.has_new_token:
                plans.append(plan)
            if plan.end is not None:
                _end(request, plan.end)
            elif plan.reading is not None:
                self._read(plan, request.has_new_token)
        self._sampler.prepare(plans)
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """The scores with each row's choice made the most likely token. ``scores`` is ours to change."""
        chosen = self._sampler.choose(scores)
        return scores.scatter_(1, chosen.unsqueeze(-1), torch.inf)


def _end(request: Any, token: int) -> None:
    """Have a request that was given up end with ``token``, whatever that means to others, and without reading on."""
    state = request.state
    if request.has_new_token:
        state._eos_token_ids.add(token)
    else:  # one token more, and it has read all that it will read
        state.remaining_prefill_tokens = state.remaining_prefill_tokens[:1]
