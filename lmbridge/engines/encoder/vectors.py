"""From the vectors of tokens to one of each text: pooling, further layers, dimensions, length 1.

Rule: torch on the engine's worker thread. Nothing loops over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy
import torch

from lmbridge.engines.encoder.settings import Module, Settings
from lmbridge.errors import EngineStartError

Pool = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Tail:
    """What is done to the model's output for a batch of texts.

    Args:
        pooling: kinds of pooling, whose results are put behind each other.
        size: of a token's vector.
    """

    def __init__(self, settings: Settings, pooling: Sequence[str], size: int, like: torch.Tensor) -> None:
        self.pooling = tuple(pooling)
        self._pools = [_POOLS[kind] for kind in pooling]
        self._dense: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self._normalizes = False
        self.dimensions = size * len(self._pools)
        for module in settings.modules:
            if module.kind == "Dense":
                dense = _dense(module, self.dimensions).to(like.device, torch.float32)
                self.dimensions = int(module.config["out_features"])
                self._dense.append(dense)
            elif module.kind == "Normalize":
                if not _is_of_texts(module):
                    _refuse("Normalize", "works on the vectors of tokens")
                self._normalizes = True

    def __call__(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Vectors (texts, dimensions), float32.

        Args:
            hidden: (tokens, size): those of all texts, one text behind the other.
            lengths: (texts): how many tokens each has.
        """
        starts = lengths.cumsum(0) - lengths
        parts = [pool(hidden, starts, lengths).float() for pool in self._pools]
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        for dense in self._dense:
            vectors = dense(vectors)
        return torch.nn.functional.normalize(vectors, dim=-1) if self._normalizes else vectors


def finished(vectors: numpy.ndarray[Any, Any], wishes: Sequence[tuple[int | None, bool]]) -> list[Any]:
    """Each text's own vector, cut to its dimensions and then made as long as it wished: (dimensions, normalize)."""
    return [
        _finished(row[:dimensions], normalize) for row, (dimensions, normalize) in zip(vectors, wishes, strict=True)
    ]


def _finished(row: numpy.ndarray[Any, Any], normalize: bool) -> numpy.ndarray[Any, Any]:
    length = float(numpy.sqrt(row @ row)) if normalize else 1.0
    return row / numpy.float32(length or 1.0)  # a copy: a view would keep the vectors of the whole batch


def scores(logits: torch.Tensor) -> numpy.ndarray[Any, Any]:
    """(texts) of scores from 0 to 1 out of (texts, labels) of logits.

    One label is a probability by its sigmoid; of several, the last is the one of relevance, and its softmax counts.
    """
    logits = logits.float()
    found = logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)[:, -1]
    as_array: numpy.ndarray[Any, Any] = found.numpy()
    return as_array


# -------------------------------------------------------------------------------------------------------------- pooling


def _first(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden[starts]


def _last(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden[starts + lengths - 1]


def _mean(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _sums(hidden.float(), lengths) / lengths[:, None]


def _mean_sqrt(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _sums(hidden.float(), lengths) / lengths[:, None].sqrt()


def _weighted_mean(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1, len(hidden) + 1, device=hidden.device) - starts.repeat_interleave(lengths)
    return _sums(hidden.float() * places[:, None], lengths) / (lengths * (lengths + 1) / 2)[:, None]


def _max(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    texts = list(torch.split(hidden, lengths.tolist()))
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-torch.inf).amax(1)


def _sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(len(lengths), values.shape[1]).index_add_(0, _owners(lengths), values)


def _owners(lengths: torch.Tensor) -> torch.Tensor:
    """The text of each token."""
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


_POOLS: dict[str, Pool] = {
    "cls": _first,
    "lasttoken": _last,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "max": _max,
}


# ---------------------------------------------------------------------------------------------------------------- dense


def _dense(module: Module, size: int) -> torch.nn.Sequential:
    config = module.config
    if not _is_of_texts(module) or config.get("use_residual"):
        _refuse("Dense", "is no plain layer on a text's vector")
    if config["in_features"] != size:
        _refuse("Dense", f"takes vectors of {config['in_features']}, but gets such of {size}")
    linear = torch.nn.Linear(size, config["out_features"], bias=config.get("bias", True))
    whole = torch.nn.Sequential(linear, _activation(config.get("activation_function")))
    try:
        linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in module.weights().items()})
    except RuntimeError as cause:  # missing or unexpected ones, or of another shape
        _refuse("Dense", "has other weights than its config.json says", cause)
    return whole.eval().requires_grad_(False)


def _activation(name: str | None) -> torch.nn.Module:
    """One of torch's own; the default is sentence-transformers'."""
    package, _, kind = (name or "torch.nn.Tanh").rpartition(".")
    found = getattr(torch.nn, kind, None)
    if not package.startswith("torch.nn") or not isinstance(found, type):
        _refuse("Dense", f"has the activation {name}")
    made = found()
    assert isinstance(made, torch.nn.Module)
    return made


def _is_of_texts(module: Module) -> bool:
    """Whether it works on a text's one vector."""
    names = ("module_input_name", "module_output_name")
    return all(module.config.get(name) in (None, "sentence_embedding") for name in names)


def _refuse(kind: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise EngineStartError(
        f"The model's {kind} module {why}, which this engine does not do. Load it with sentence-transformers, and give "
        "that object as the model."
    ) from cause
