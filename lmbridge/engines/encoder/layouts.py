"""The ways to run a batch of texts through the model; ``proof`` picks the fastest correct one.

Rule: torch on the engine's worker thread. A layout returns the model's output for each text, in the given order: its
token vectors, or its logits.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy
import torch

from lmbridge.engines.encoder import attention
from lmbridge.engines.encoder.attention import Segments
from lmbridge.engines.encoder.encoding import Item
from lmbridge.engines.encoder.vectors import Tail
from lmbridge.engines.transformers.runner import rope_kind

PADDING = 0.15
"""The share of padding that a group of texts may have."""
SLACK = 2.0
"""On a GPU, texts up to this many times as long as the shortest share one attention call."""


_SHORT = "original_max_position_embeddings"
_LAST_TOKEN = "GenericForSequenceClassification"  # transformers' head for decoders


class Layout(ABC):
    """One way of running the model.

    Attributes:
        name: its name for users.
        tokens_on_cpu: per batch; with more, intermediate results leave the cache, and with fewer, padded texts find
            fewer of similar length.
        tokens, padding: tokens given to the model so far, and how many were padding.
    """

    name: ClassVar[str]
    tokens_on_cpu: ClassVar[int] = 8_192

    def __init__(self, model: Any, tail: Tail | None) -> None:
        self.tokens = self.padding = 0
        self._model = model
        self._tail = tail
        self._pad: int = getattr(model.config.get_text_config(), "pad_token_id", None) or 0

    def run(self, items: Sequence[Item]) -> torch.Tensor:
        """(texts, dimensions) of vectors, or (texts, labels) of logits; float32."""
        order = sorted(range(len(items)), key=lambda place: len(items[place].ids))
        found = self._sorted([items[place] for place in order]).float()
        if len(items) == 1:
            return found
        answers = torch.empty_like(found)
        answers[torch.tensor(order, device=found.device)] = found
        return answers

    def close(self) -> None:  # noqa: B027 - there may be nothing to do
        """Leave the model as it was."""

    @abstractmethod
    def _sorted(self, items: Sequence[Item]) -> torch.Tensor:
        """The output for items sorted by length."""

    def _padded(self, items: Sequence[Item]) -> torch.Tensor:
        """The output of one row per text, padded to the longest."""
        lengths = [len(item.ids) for item in items]
        longest = lengths[-1]
        ids = numpy.full((len(items), longest), self._pad, numpy.int64)
        for row, item in zip(ids, items, strict=True):
            row[: len(item.ids)] = item.ids
        given = {"input_ids": self._tensor(ids)}
        places = numpy.arange(longest) < numpy.array(lengths)[:, None]
        given["attention_mask"] = self._tensor(places.astype(numpy.int64))
        if items[0].types is not None:
            types = numpy.zeros_like(ids)
            for row, item in zip(types, items, strict=True):
                row[: len(item.ids)] = item.types or 0
            given["token_type_ids"] = self._tensor(types)
        self._count(ids.size, ids.size - sum(lengths))
        output = self._model(**given)
        if self._tail is None:
            return self._logits(output, len(items))
        hidden = output.last_hidden_state
        flat = hidden[0] if len(items) == 1 else hidden[self._tensor(places)]
        return self._tail(flat, self._tensor(numpy.array(lengths)))

    def _logits(self, output: Any, texts: int) -> torch.Tensor:
        logits: torch.Tensor = output.logits
        if logits.shape[0] != texts or logits.ndim != 2:
            raise ValueError(f"the model returned logits of shape {tuple(logits.shape)} for {texts} texts")
        return logits

    def _count(self, tokens: int, padding: int) -> None:
        self.tokens += tokens
        self.padding += padding

    def _tensor(self, array: numpy.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._model.device)


class Single(Layout):
    """One text after another."""

    name = "single"

    def _sorted(self, items: Sequence[Item]) -> torch.Tensor:
        return torch.cat([self._padded([item]) for item in items])


class Grouped(Layout):
    """Texts of similar length together, the shorter ones padded."""

    name = "grouped"

    def _sorted(self, items: Sequence[Item]) -> torch.Tensor:
        return torch.cat([self._padded(group) for group in groups(items)])


class Packed(Layout):
    """All texts in one row, each with its own positions, kept apart by ``attention``.

    Args:
        offset: the position of the first token; None counts as RoBERTa does: from the padding token's id plus one, and
            skipping such tokens.
        slack: see ``Segments``; default: by device.
    """

    name = "packed"
    tokens_on_cpu = 2_048

    def __init__(self, model: Any, tail: Tail | None, offset: int | None = 0, slack: float | None = None) -> None:
        super().__init__(model, tail)
        self._slack = slack or (1.0 if model.device.type == "cpu" else SLACK)
        self._counts_like_roberta = offset is None
        self._usual = attention.chosen(model)
        self._starts: torch.Tensor | None = None  # of the texts, while the head needs their first tokens
        self._hook: Any = None
        if tail is None:
            self._hook = layers_of(model)[-1].register_forward_hook(self._first_tokens)
        model.set_attn_implementation(attention.NAME)

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._model.set_attn_implementation(self._usual)

    def _sorted(self, items: Sequence[Item]) -> torch.Tensor:
        lengths = numpy.array([len(item.ids) for item in items])
        ids = _joined([item.ids for item in items], int(lengths.sum()))
        given = {
            "input_ids": self._tensor(ids[None]),
            "position_ids": self._tensor(self._positions(ids, lengths)[None]),
        }
        if items[0].types is not None:
            types = [item.types or [] for item in items]
            given["token_type_ids"] = self._tensor(_joined(types, len(ids))[None])
        self._count(len(ids), 0)
        segments = Segments(lengths.tolist(), self._slack)
        if self._tail is not None:
            hidden = self._model(**given, segments=segments).last_hidden_state
            return self._tail(hidden[0], self._tensor(lengths))
        with self._told(self._tensor(lengths.cumsum() - lengths)):
            return self._logits(self._model(**given, segments=segments), len(items))

    def _positions(self, ids: numpy.ndarray[Any, Any], lengths: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
        starts = lengths.cumsum() - lengths
        counted = (ids != self._pad) if self._counts_like_roberta else numpy.ones(len(ids), bool)
        before = counted.cumsum() - counted
        positions: numpy.ndarray[Any, Any] = before - before[starts].repeat(lengths)
        return (positions + 1) * counted + self._pad if self._counts_like_roberta else positions

    @contextlib.contextmanager
    def _told(self, starts: torch.Tensor) -> Iterator[None]:
        self._starts = starts
        try:
            yield
        finally:
            self._starts = None

    def _first_tokens(self, module: Any, given: Any, output: Any) -> Any:
        """After the last layer, turn the row into one row per text with its first token, as a head expects."""
        if self._starts is None:
            return output
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        firsts = hidden[0][self._starts][:, None]
        return firsts if isinstance(output, torch.Tensor) else (firsts, *output[1:])


def groups(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Neighbours among items that are sorted by length, so that at most ``PADDING`` of a group is padding."""
    start = total = 0
    for end, item in enumerate(items):
        length = len(item.ids)
        room = length * (end + 1 - start)
        if end > start and room - total - length > PADDING * room:
            yield items[start:end]
            start, total = end, 0
        total += length
    yield items[start:]


def unpackable(model: Any, ranks: bool) -> str:
    """Why a model must not be packed, or "". On a GPU an invalid index kills the process, so do not try.

    Args:
        ranks: it has a head that makes scores.
    """
    attention.install()
    if not attention.is_taken(model):
        return "its attention cannot be replaced"
    kinds = {kind.__name__ for kind in type(model).__mro__}
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    if ranks and (causal or _LAST_TOKEN in kinds):
        return "its head uses the last token of each row"
    return ""


def unbatchable(model: Any, room: int) -> str:
    """Why long neighbours in a batch, packed or padded, would change a text's result; "" if not.

    Args:
        room: the most tokens of a text.
    """
    kind = rope_kind(model)
    if kind not in ("dynamic", "longrope"):
        return ""
    config = model.config.get_text_config()
    rope = config.rope_parameters or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict)), vars(config)]
    stated = [part[_SHORT] for part in parts if part.get(_SHORT)]
    short = min(stated, default=config.max_position_embeddings)
    return f"its {kind} positions follow the longest text (max_length={short} avoids it)" if room > short else ""


def layers_of(model: Any) -> list[Any]:
    """The model's layers, in the order in which they run.

    Raises:
        ValueError: there is no list of as many modules as the model has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError("the model has no list of layers")


def _joined(lists: Sequence[Sequence[int]], count: int) -> numpy.ndarray[Any, Any]:
    return numpy.fromiter(itertools.chain.from_iterable(lists), numpy.int64, count)
