"""How each request of a batch chooses its next token, under transformers' continuous batching.

Rule: one ``Sampler`` takes the place of a manager's logits processors. The server thread adds and removes requests;
everything else runs on the manager's generation thread. A manager that takes the most likely token (``do_sample`` off)
then serves requests of every kind: rows of greedy requests pass untouched, and where a token is drawn its score is
raised above all others.

A drawn token depends on the request's seed, its position in the answer and its own scores, and on nothing else in the
batch: one uniform number per (seed, position) from a hash, laid over the probabilities in the order of the vocabulary.
That order, unlike one by probability, cannot be reshuffled by the last bits of nearly equal scores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from lmbridge.messages import GenerationConfig, Logprobs

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HEAD = 256  # how many of the most likely tokens are looked at first, in the hope that the filters need no more
_BLOCK = 512  # how many neighbours in the vocabulary are summed up before any of them is looked at by itself


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on ``seed`` and ``position`` alone (splitmix64, 53 bits)."""
    return (_mix(_mix(seed & _MASK) + position * _GOLDEN) >> 11) * 2.0**-53


def _mix(number: int) -> int:
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


class Plan:
    """What one request wants of the sampler, and what was found for it.

    Attributes:
        logprobs: one entry per generated token where asked for. The generation thread appends, the server thread reads
            those of tokens it has been told of.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self.samples = config.samples
        self.temperature = config.temperature if config.temperature is not None else 1.0
        self.top_k = config.top_k or 0
        self.top_p = config.top_p if config.top_p is not None else 1.0
        self.min_p = config.min_p or 0.0
        self.penalty = config.repetition_penalty or 1.0
        self.wants_logprobs = config.logprobs
        self.seed = config.random_seed if config.random_seed is not None else random.getrandbits(64)
        self.logprobs: list[Logprobs] = []
        self.seen: dict[int, None] = {}  # generation thread only: the tokens of the prompt and the answer
        self.counted = 0  # generation thread only: how many tokens of the request ``seen`` covers

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return bool(self.top_k or self.top_p < 1.0 or self.min_p)

    @property
    def needed(self) -> bool:
        """Whether the request differs from taking the most likely token."""
        return self.samples or self.penalty != 1.0 or self.wants_logprobs is not None


class Sampler:
    """Stands in for ``ContinuousBatchingLogitsProcessorList``, and has what the manager asks of one.

    Attributes:
        steps: engine steps so far. Written by the generation thread, read anywhere.
        tensors_required: the manager keeps no tensor of arguments for us.
    """

    tensors_required = 0

    def __init__(self) -> None:
        self.steps = 0
        self._plans: dict[str, Plan] = {}  # single operations on a dict are atomic
        self._rows: list[tuple[int, Plan, Any]] = []  # generation thread only: (row, plan, request) of this step

    def add(self, request_id: str, plan: Plan) -> None:
        """Server thread: sample for the request from its first step on."""
        self._plans[request_id] = plan

    def remove(self, request_id: str) -> None:
        """Server thread: the request has ended; if it is in one more step, its token does not matter."""
        self._plans.pop(request_id, None)

    # ------------------------------------------------------------------ called by transformers on its generation thread

    @property
    def do_processing(self) -> bool:
        """Whether this step has a row to work on; if not, it is not called."""
        return bool(self._rows)

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Requests carry no arguments of their own; they are known by their id."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """There are no tensors to fill."""

    def clear(self) -> None:
        """Nothing is kept between generation loops."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Called once per step before the model runs: find the rows to work on."""
        self.steps += 1
        states = [request.state for request in requests_in_batch if request.has_new_token]
        plans = self._plans
        self._rows = [
            (row, plan, state) for row, state in enumerate(states) if (plan := plans.get(state.request_id)) is not None
        ]
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        """The scores with each row's choice made the most likely token. ``scores`` is ours to change."""
        rows = [row for row, _, _ in self._rows]
        plans = [plan for _, plan, _ in self._rows]
        raw = scores if len(rows) == scores.shape[0] else scores[rows]
        if raw.device.type == "mps":  # it has no double precision
            raw = raw.cpu()
        adjusted = _penalize(raw, self._rows)
        chosen = _argmax(adjusted, plans)
        for drawing in (draw_filtered, draw):
            places = [
                at for at, plan in enumerate(plans) if plan.samples and plan.filters == (drawing is draw_filtered)
            ]
            if places:
                part = adjusted if len(places) == len(plans) else adjusted[places]
                numbers = [uniform(plans[at].seed, _position(self._rows[at][2])) for at in places]
                chosen[places] = drawing(part, [plans[at] for at in places], numbers)
        _record(plans, raw, chosen)
        scores[rows, chosen.to(scores.device)] = torch.inf
        return scores


def _argmax(scores: torch.Tensor, plans: Sequence[Plan]) -> torch.Tensor:
    """The most likely token of each row; anything where all rows draw theirs anyway."""
    if all(plan.samples for plan in plans):
        return torch.zeros(len(plans), dtype=torch.long, device=scores.device)
    return scores.argmax(-1)


def _position(state: Any) -> int:
    """How many tokens the request has generated; after the loss of its cache the first of them are in its prompt."""
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return len(state.initial_tokens) - prompt + len(state.generated_tokens)


def _column(scores: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """One value per row, in double precision."""
    return torch.tensor(values, dtype=torch.double, device=scores.device).unsqueeze(-1)


def _total(scores: torch.Tensor) -> torch.Tensor:
    """``logsumexp``, which is many times slower on a CPU where scores are far apart."""
    return scores.amax(-1, keepdim=True) - scores.softmax(-1).amax(-1, keepdim=True).log()


# ------------------------------------------------------------------------------------------------------------- penalty


def _penalize(scores: torch.Tensor, rows: Sequence[tuple[int, Plan, Any]]) -> torch.Tensor:
    """Repetition penalty as in ``generate``: scores of tokens seen are divided by it, or multiplied where negative."""
    wanted = [(at, plan, state) for at, (_, plan, state) in enumerate(rows) if plan.penalty != 1.0]
    if not wanted:
        return scores
    scores = scores.clone()  # log-probabilities are those before
    for at, plan, state in wanted:
        seen = torch.tensor(_seen(plan, state), device=scores.device)
        part = scores[at, seen]
        scores[at, seen] = torch.where(part < 0, part * plan.penalty, part / plan.penalty)
    return scores


def _seen(plan: Plan, state: Any) -> list[int]:
    total = len(state.initial_tokens) + len(state.generated_tokens)
    if plan.counted == total - 1 and state.generated_tokens:
        plan.seen[state.generated_tokens[-1]] = None
    elif plan.counted < total:
        plan.seen.update(dict.fromkeys(state.initial_tokens + state.generated_tokens))
    plan.counted = total
    return list(plan.seen)


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(scores: torch.Tensor, plans: Sequence[Plan], numbers: Sequence[float]) -> torch.Tensor:
    """One token per row from all of the vocabulary: first the block of neighbours the number falls in, then the token.

    Args:
        scores: (rows, vocabulary).
        numbers: one in [0, 1) per row.
    """
    if any(plan.temperature != 1.0 for plan in plans):
        scores = scores / _column(scores, [plan.temperature for plan in plans]).to(scores.dtype)
    probabilities = scores.softmax(-1)
    rows, size = probabilities.shape
    whole = size - size % _BLOCK
    blocks = probabilities[:, :whole].reshape(rows, -1, _BLOCK).sum(-1)
    blocks = torch.cat([blocks, probabilities[:, whole:].sum(-1, keepdim=True)], -1).double()
    block, share = _fall(blocks, _column(scores, numbers))
    neighbours = block * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    inside = probabilities.gather(-1, neighbours.clamp(max=size - 1)).double().masked_fill(neighbours >= size, 0)
    return (block * _BLOCK + _fall(inside, share)[0]).squeeze(-1).clamp(max=size - 1)


def _fall(weights: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's number falls in the running sums of its weights, and how far into that weight, in [0, 1)."""
    sums = weights.cumsum(-1)
    aims = numbers * sums[:, -1:]
    place = torch.searchsorted(sums, aims, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, place)
    return place, ((aims - sums.gather(-1, place) + weight) / weight).clamp(0, 1 - 2**-53)


def draw_filtered(scores: torch.Tensor, plans: Sequence[Plan], numbers: Sequence[float]) -> torch.Tensor:
    """One token per row, from those that temperature, top_k, top_p and min_p leave, applied in that order."""
    tokens, left = filtered(scores, plans)
    place, _ = _fall(left.softmax(-1), _column(scores, numbers))
    return tokens.gather(-1, place).squeeze(-1)


def filtered(scores: torch.Tensor, plans: Sequence[Plan]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be left, in the order of the vocabulary, and their scores; the others' are minus infinity.

    Each filter keeps what reaches some score, so that only the most likely tokens need be looked at: so many that the
    last of them is below that score.
    """
    size = scores.shape[-1]
    top_k = [plan.top_k if plan.top_k < size else 0 for plan in plans]
    count = min(size, max(k + 1 if k else _HEAD for k in top_k))
    temperature = _column(scores, [plan.temperature for plan in plans])
    total = None
    if any(plan.top_p < 1.0 and not k for plan, k in zip(plans, top_k, strict=True)):
        total = _total(scores / temperature.to(scores.dtype)).double()
    while True:
        values, tokens = _topk(scores, count)
        head = values.double() / temperature
        least, enough = _least(head, plans, top_k, total)
        if count == size or bool((enough & (head[:, -1:] < least)).all()):
            break
        count = min(8 * count, size)
    tokens, order = tokens.sort(-1)
    return tokens, head.masked_fill(head < least, -torch.inf).gather(-1, order)


def _topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk``, which on a CPU takes long over a whole vocabulary.

    The tokens looked for are in those groups whose own best are the best: as many groups as tokens. A group's tokens
    are far apart, since one maximum over whole rows is quicker than many over a few neighbours.
    """
    rows, size = scores.shape
    width = math.isqrt(size // count)
    if width < 4 or scores.device.type != "cpu":
        return scores.topk(count)
    groups = size // width
    best = scores[:, : groups * width].view(rows, width, groups).amax(1).topk(count).indices
    tokens = (best.unsqueeze(-1) + torch.arange(width) * groups).flatten(1)
    tokens = torch.cat([tokens, torch.arange(groups * width, size).expand(rows, -1)], -1)
    values, places = scores.gather(-1, tokens).topk(count)
    return values, tokens.gather(-1, places)


def _least(
    head: torch.Tensor, plans: Sequence[Plan], top_k: Sequence[int], total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score that passes all filters, and whether the head is large enough to tell.

    Args:
        head: (rows, n), the highest scores, best first.
        total: the logarithm of the sum of all scores' exponentials, where top_p is without top_k.
    """
    limited = torch.tensor([k > 0 for k in top_k], device=head.device).unsqueeze(-1)
    last = torch.tensor([(k or head.shape[-1]) - 1 for k in top_k], device=head.device).unsqueeze(-1)
    least = head.gather(-1, last).masked_fill(~limited, -torch.inf)
    enough = torch.ones_like(limited)
    if any(plan.top_p < 1.0 for plan in plans):
        top_p = _column(head, [plan.top_p for plan in plans])
        left = head.masked_fill(head < least, -torch.inf)
        own = left.logsumexp(-1, keepdim=True)
        probabilities = (left - (own if total is None else torch.where(limited, own, total))).exp()
        sums = probabilities.cumsum(-1)
        kept = (sums - probabilities) < top_p
        kept[:, 0] = True
        nucleus = head.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        cut = top_p < 1.0
        least = torch.where(cut, torch.maximum(least, nucleus), least)
        enough = ~cut | limited | (sums[:, -1:] >= top_p)
    ratio = _column(head, [plan.min_p for plan in plans])
    return torch.maximum(least, head[:, :1] + ratio.log()), enough


# ------------------------------------------------------------------------------------------------------------ logprobs


def _record(plans: Sequence[Plan], raw: torch.Tensor, chosen: torch.Tensor) -> None:
    """Note log-probabilities of the model's own distribution, which no setting of the request has changed."""
    wanted = [at for at, plan in enumerate(plans) if plan.wants_logprobs is not None]
    if not wanted:
        return
    part = raw if len(wanted) == len(plans) else raw[wanted]
    total = _total(part)
    tokens = chosen[wanted]
    own = (part.gather(-1, tokens.unsqueeze(-1)) - total).squeeze(-1).tolist()
    values, others = part.topk(min(part.shape[-1], max(plans[at].wants_logprobs or 0 for at in wanted)))
    likely = zip(others.tolist(), (values - total).tolist(), strict=True)
    for at, token, logprob, (ids, logprobs) in zip(wanted, tokens.tolist(), own, likely, strict=True):
        count = plans[at].wants_logprobs or 0
        entry = {token: logprob}
        entry.update(zip(ids[:count], logprobs[:count], strict=True))
        plans[at].logprobs.append(entry)
