"""How the next token of every row is chosen: one tensor program of fixed shape.

Rule: pure functions of tensors, run by the generation thread. No Python here looks into a tensor, and shapes follow
from the arguments' shapes and ``Parts`` alone, so that the whole of ``choose`` can be compiled, exported or stand in a
CUDA graph. What a row gets depends on that row alone, whichever parts other rows switch on.

The filters are applied in the order of transformers' own: temperature, top_k, top_p, min_p. Tokens of equal score are
kept or left out together. A uniform number is then laid over the probabilities of what is left in the order of the
vocabulary, which, unlike their order by size, cannot be reshuffled by the last bits of nearly equal scores.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import embedding

GREEDY, DRAWN, FILTERED = 0.0, 1.0, 2.0
"""How a row gets its token: the most likely one, one of all, one of those that the filters leave."""
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "penalty", "frequency", "presence", "kind")
"""The columns of the settings. A row without top_k has 0 there, one without top_p has 1."""
PENALTY, FREQUENCY, PRESENCE = map(SETTINGS.index, ("penalty", "frequency", "presence"))
OPEN_END = 1 - 2.0**-52
"""The largest uniform number. It is so far below 1 that its product with a total is below the total."""


class Parts(NamedTuple):
    """Which parts of the program run. A compiled program or a recorded graph is good for one value of it.

    Attributes:
        greedy: some row takes its most likely token.
        drawn: some row draws from all tokens.
        head: how many of the most likely tokens the filters look at; 0 where no row has filters.
        limits: some row has top_k.
        cuts: some row has top_p.
        open: some row has top_p without top_k.
        bias: some row has tokens whose scores are raised, lowered or barred.
        penalty: some row has a repetition penalty.
        counts: some row has a frequency or presence penalty.
        grammars: some row follows a grammar.
        logprobs: how many of the most likely tokens to report beside the chosen one; -1 reports none at all.
    """

    greedy: bool = True
    drawn: bool = False
    head: int = 0
    limits: bool = False
    cuts: bool = False
    open: bool = False
    bias: bool = False
    penalty: bool = False
    counts: bool = False
    grammars: bool = False
    logprobs: int = -1


class Changes(NamedTuple):
    """What is done to scores first. Each is (rows, vocabulary) in single precision but for ``allowed``, and not looked
    at where its part is off.

    Attributes:
        biases: added; minus infinity bars a token.
        factors: the repetition penalty at tokens seen, 1 elsewhere.
        counts: how often the answer has each token.
        allowed: (rows, bytes), a bit for each token, the lowest first: whether the row's grammar lets it come next.
    """

    biases: torch.Tensor
    factors: torch.Tensor
    counts: torch.Tensor
    allowed: torch.Tensor


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        tokens: (rows,), the chosen tokens.
        enough: (rows,), whether the head was large enough to be right. It is if it is the whole vocabulary.
        listed: (rows, 1 + ``parts.logprobs``), the chosen token, then the most likely ones, best first.
        logprobs: their log-probabilities in the model's own distribution.
    """

    tokens: torch.Tensor
    enough: torch.Tensor
    listed: torch.Tensor
    logprobs: torch.Tensor


def choose(
    scores: torch.Tensor, settings: torch.Tensor, moment: torch.Tensor, changes: Changes, parts: Parts
) -> Choice:
    """Choose the next token of each row.

    Args:
        scores: (rows, vocabulary), single precision, as the model gave them; not changed.
        settings: (rows, 8), double precision, see ``SETTINGS``.
        moment: (rows, 2), double precision: a uniform number from 0 to ``OPEN_END``; the token that is forced, or -1.
        changes: of these rows.
    """
    tokens, enough = _pick(changed(scores, settings, changes, parts), settings, moment[:, :1], parts)
    forced = moment[:, 1].long()
    tokens = torch.where(forced >= 0, forced, tokens)
    return Choice(tokens, enough, *explain(scores, tokens, parts.logprobs))


def _pick(
    scores: torch.Tensor, settings: torch.Tensor, numbers: torch.Tensor, parts: Parts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's token by its own kind of choice, and whether the head was enough."""
    kind = settings[:, -1]
    tokens, enough = torch.zeros_like(kind, dtype=torch.long), torch.ones_like(kind, dtype=torch.bool)
    total = None
    if parts.greedy:
        tokens = scores.max(-1).indices  # argmax takes three times as long on a CPU
    if parts.drawn or parts.open:
        probabilities = (scores / settings[:, :1].to(scores.dtype)).softmax(-1)
        if parts.drawn:
            tokens = torch.where(kind == DRAWN, draw(probabilities, numbers), tokens)
        total = spread(probabilities) if parts.open else None
    if parts.head >= scores.shape[-1]:
        found = fall(filtered(scores, settings, total, parts), numbers)[0]
    elif parts.head:
        order, weights, sufficed = filtered_head(scores, settings, total, parts)
        found = order.gather(-1, fall(weights, numbers)[0])
        enough = sufficed | (kind != FILTERED)
    if parts.head:
        tokens = torch.where(kind == FILTERED, found.squeeze(-1), tokens)
    return tokens, enough


def explain(scores: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """These tokens and the ``count`` most likely ones, and their log-probabilities. Nothing if it is negative."""
    if count < 0:
        return tokens.new_empty(len(tokens), 0), scores.new_empty(len(tokens), 0, dtype=torch.double)
    size = scores.shape[-1]
    listed = torch.cat([tokens.clamp(max=size - 1).unsqueeze(-1), _leading(scores, min(count, size))[1]], -1)
    total = scores.amax(-1, keepdim=True).double() + spread(scores.softmax(-1)).log()
    return listed, scores.gather(-1, listed) - total


def changed(scores: torch.Tensor, settings: torch.Tensor, changes: Changes, parts: Parts) -> torch.Tensor:
    """The scores that tokens are chosen by: biases, then the repetition penalty, then those that count, as vLLM has
    them. A row that asks for nothing keeps its scores to the last bit.
    """
    if parts.bias:
        scores = scores + changes.biases
    if parts.penalty:
        scores = penalized(scores, changes.factors)
    if parts.counts:
        frequency, presence = (settings[:, column].unsqueeze(-1).to(scores.dtype) for column in (FREQUENCY, PRESENCE))
        scores = scores - frequency * changes.counts - presence * changes.counts.clamp(max=1)
    if parts.grammars:
        scores = scores.minimum(ceilings(changes.allowed)[:, : scores.shape[-1]])
    return scores


def ceilings(allowed: torch.Tensor) -> torch.Tensor:
    """The most that scores may be: minus infinity where the bit is 0. Filling by a mask takes ten times as long on a
    CPU.
    """
    return embedding(allowed.int(), _ceilings_of_bytes(allowed.device)).flatten(1)


@cache
def _ceilings_of_bytes(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # such a tensor may be read in any mode
        bits = torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1
        return torch.where(bits == 1, torch.inf, -torch.inf).to(device)


def penalized(scores: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Repetition penalty as in ``generate``: scores are divided by their factor, or multiplied where negative."""
    # one of the two terms is always zero; choosing by a mask instead takes ten times as long on a CPU
    return (scores.clamp(max=0) * factors).add_(scores.clamp(min=0).div_(factors))


def spread(probabilities: torch.Tensor) -> torch.Tensor:
    """All of a row's probabilities in terms of its largest, in double precision.

    Its logarithm is ``logsumexp`` less the highest score; that function takes many times longer on a CPU where scores
    are far apart.
    """
    return 1 / probabilities.amax(-1, keepdim=True).double()


# ------------------------------------------------------------------------------------------------------------- filters


def filtered(scores: torch.Tensor, settings: torch.Tensor, total: torch.Tensor | None, parts: Parts) -> torch.Tensor:
    """What each token weighs in the draw, (rows, vocabulary): 0 if a filter leaves it out.

    Args:
        total: (rows, 1), what all tokens weigh together, the most likely one weighing 1. Needed where ``parts.open``.
    """
    temperature, top_k, top_p, min_p = settings[:, :4].unsqueeze(-1).unbind(1)
    weights = ((scores.double() - scores.amax(-1, keepdim=True).double()) / temperature).exp()
    kept = weights >= min_p
    if parts.limits:
        last = _reached(scores, torch.ones_like(weights), top_k).masked_fill(top_k == 0, -torch.inf)
        limited = scores >= last
        kept, weights = kept & limited, weights * limited
    if parts.cuts:
        own = weights.sum(-1, keepdim=True)
        aims = top_p * (own if total is None else torch.where(top_k > 0, own, total))
        # rounding must not put the aim out of reach
        nucleus = _reached(scores, weights, torch.minimum(aims, own * (1 - 2.0**-40)))
        kept = kept & (scores >= nucleus.masked_fill(top_p >= 1, -torch.inf))
    return weights * kept


def filtered_head(
    scores: torch.Tensor, settings: torch.Tensor, total: torch.Tensor | None, parts: Parts
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``filtered``, of the ``parts.head`` most likely tokens alone.

    Each filter keeps what reaches some score, so that the others need not be looked at if the last of these is left
    out. Double precision makes the result the same.

    Returns:
        (rows, head), the tokens in the order of the vocabulary; what each weighs; (rows,), whether they were enough.
    """
    temperature, top_k, top_p, min_p = settings[:, :4].unsqueeze(-1).unbind(1)
    best, tokens = _leading(scores, parts.head)
    weights = ((best.double() - best[:, :1].double()) / temperature).exp()
    kept, short = weights >= min_p, torch.zeros_like(top_k, dtype=torch.bool)
    if parts.limits:
        last = best.gather(-1, (top_k.long() - 1).clamp(0, parts.head - 1)).masked_fill(top_k == 0, -torch.inf)
        limited = best >= last
        short = limited[:, -1:] & (top_k > 0)  # top_p is a share of what top_k leaves, so all of that must be seen
        kept, weights = kept & limited, weights * limited
    if parts.cuts:
        sums = weights.cumsum(-1)
        aims = top_p * (sums[:, -1:] if total is None else torch.where(top_k > 0, sums[:, -1:], total))
        nucleus = best.gather(-1, torch.searchsorted(sums, aims).clamp(max=parts.head - 1))
        kept = kept & (best >= nucleus.masked_fill(top_p >= 1, -torch.inf))
    tokens, order = tokens.sort(-1)
    return tokens, (weights * kept).gather(-1, order), ~(kept[:, -1:] | short).squeeze(-1)


def _reached(scores: torch.Tensor, weights: torch.Tensor, aims: torch.Tensor) -> torch.Tensor:
    """The highest score of each row such that the tokens that have it or more weigh at least ``aims``, (rows, 1).

    Scores are told apart by the bits of their representation, eleven at a time: a quarter of what sorting them takes.
    """
    bits = scores.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the scores
    aims = aims.contiguous()  # searchsorted warns of anything else
    found = torch.full_like(keys[:, :1], -1024)  # the lowest key's first eleven bits
    for shift, count, further in ((21, 2048, 2048), (10, 2048, 1024), (0, 1024, 1)):
        top = found + count
        place = top - torch.minimum(torch.maximum(keys >> shift, found - 1), top)  # 0 is above what is told apart
        sums = weights.new_zeros(len(keys), count + 2).scatter_add_(-1, place.long(), weights).cumsum_(-1)
        found = (top - torch.searchsorted(sums, aims, out_int32=True).clamp_(1, count)) * further
    return (found ^ ((found >> 31) & 0x7FFFFFFF)).view(torch.float)


def _leading(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk``, which on a CPU takes long over a whole vocabulary.

    The tokens looked for are in those groups whose own best are the best: as many groups as tokens. A group's tokens
    are far apart, since one maximum over whole rows is quicker than many over a few neighbours.
    """
    size = values.shape[-1]
    width = math.isqrt(size // max(count, 1))
    if width < 4 or count == 0 or values.device.type != "cpu":
        return values.topk(count)
    groups = size // width
    whole = groups * width
    best = values[:, :whole].reshape(values.shape[0], width, groups).amax(1).topk(count, sorted=False).indices
    tokens = (best.unsqueeze(-1) + torch.arange(0, whole, groups)).flatten(1)
    if whole < size:
        tokens = torch.cat([tokens, torch.arange(whole, size).expand(values.shape[0], -1)], -1)
    found, places = values.gather(-1, tokens).topk(count)
    return found, tokens.gather(-1, places)


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """One token per row of all: first the block of neighbours that the number falls in, then the token."""
    size = probabilities.shape[-1]
    width = 1 << round(math.log2(size) / 2)
    whole = size - size % width
    exact = None if probabilities.device.type == "cpu" else torch.double  # the order of sums varies on other devices
    blocks = probabilities[:, :whole].reshape(probabilities.shape[0], whole // width, width).sum(-1, dtype=exact)
    if whole < size:
        blocks = torch.cat([blocks, probabilities[:, whole:].sum(-1, keepdim=True, dtype=exact)], -1)
    block, share = fall(blocks.double(), numbers)
    neighbours = block * width + torch.arange(width, device=probabilities.device)
    inside = probabilities.gather(-1, neighbours.clamp(max=size - 1)).double() * (neighbours < size)
    token = block * width + fall(inside, share)[0]
    return token.squeeze(-1).clamp(max=size - 1)


def fall(weights: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's number falls in the running sums of its weights, and how far into that weight."""
    sums = weights.cumsum(-1)
    aims = numbers * sums[:, -1:]
    place = torch.searchsorted(sums, aims, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, place)
    return place, ((aims - sums.gather(-1, place) + weight) / weight).clamp(0, OPEN_END)
