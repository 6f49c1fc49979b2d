"""From token vectors to one per text: pooling, further layers, dimensions, normalisation.

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
    """Processes the model's output for a batch of texts.

    Args:
        pooling: kinds of pooling, whose results are concatenated.
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
            hidden: (tokens, size): those of all texts, one after another.
            lengths: (texts): how many tokens each has.
        """
        starts = lengths.cumsum(0) - lengths
        parts = [pool(hidden, starts, lengths).float() for pool in self._pools]
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        for dense in self._dense:
            vectors = dense(vectors)
        return _of_length_one(vectors) if self._normalizes else vectors


def finished(vectors: numpy.ndarray[Any, Any], wishes: Sequence[tuple[int | None, bool]]) -> list[Any]:
    """Each text's own vector, cut and normalised as it wished: (dimensions, normalize)."""
    return [
        _finished(row[:dimensions], normalize) for row, (dimensions, normalize) in zip(vectors, wishes, strict=True)
    ]


def _finished(row: numpy.ndarray[Any, Any], normalize: bool) -> numpy.ndarray[Any, Any]:
    if not normalize:
        return row.copy()  # a view would keep the whole batch alive
    wide = row.astype(numpy.float64)  # whose squares neither overflow nor vanish
    return (wide / (float(numpy.sqrt(wide @ wide)) or 1.0)).astype(numpy.float32)


def _of_length_one(vectors: torch.Tensor) -> torch.Tensor:
    """Normalised, after scaling so that squares neither overflow nor vanish."""
    scale = vectors.abs().amax(-1, keepdim=True)
    return torch.nn.functional.normalize(vectors / torch.where(scale > 0, scale, 1.0), dim=-1)


class Score:
    """How a model's logits become one number for each text.

    Args:
        labels: how many logits each text has.
        activation: applied to the single logit; None is the sigmoid, which gives a probability. With several labels the
            softmax of the last, relevance, counts.

    Attributes:
        name: described.
        is_raw: the score is unbounded.
    """

    def __init__(self, labels: int, activation: Callable[[torch.Tensor], Any] | None = None) -> None:
        self.labels = labels
        self._activation = activation or torch.nn.Sigmoid()
        kind = getattr(self._activation, "__name__", type(self._activation).__name__).lower()
        self.name = f"{kind} score" if labels == 1 else f"softmax of the last of {labels} labels"
        self.is_raw = labels == 1 and not isinstance(self._activation, torch.nn.Sigmoid)

    def __call__(self, logits: torch.Tensor) -> numpy.ndarray[Any, Any]:
        """(texts), float32, of (texts, labels).

        Raises:
            ValueError: the number of labels is wrong.
        """
        if logits.shape[1] != self.labels:
            raise ValueError(f"the model returned {logits.shape[1]} labels for a text instead of {self.labels}")
        logits = logits.float().cpu()
        found = self._activation(logits)[:, 0] if self.labels == 1 else logits.softmax(-1)[:, -1]
        as_array: numpy.ndarray[Any, Any] = found.float().numpy()
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
        _refuse("Dense", "is not a plain layer on a text's vector")
    if config["in_features"] != size:
        _refuse("Dense", f"expects vectors of {config['in_features']} numbers, but gets {size}")
    linear = torch.nn.Linear(size, config["out_features"], bias=config.get("bias", True))
    activation = activation_of(config.get("activation_function") or "torch.nn.Tanh")  # sentence-transformers' default
    if activation is None:
        _refuse("Dense", f"has the activation {config['activation_function']}")
    whole = torch.nn.Sequential(linear, activation)
    try:
        linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in module.weights().items()})
    except RuntimeError as cause:  # missing or unexpected ones, or of another shape
        _refuse("Dense", "has weights that do not match its config.json", cause)
    return whole.eval().requires_grad_(False)


def activation_of(name: str) -> torch.nn.Module | None:
    """A torch activation by the name that sentence-transformers writes; None if unknown."""
    package, _, kind = name.rpartition(".")
    found = getattr(torch.nn, kind, None)
    if not package.startswith("torch.nn") or not isinstance(found, type):
        return None
    made = found()
    assert isinstance(made, torch.nn.Module)
    return made


def _is_of_texts(module: Module) -> bool:
    """Whether it works on a text's one vector."""
    names = ("module_input_name", "module_output_name")
    return all(module.config.get(name) in (None, "sentence_embedding") for name in names)


def _refuse(kind: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise EngineStartError(
        f"The model's {kind} module {why}, which is not supported. Load it with sentence-transformers, and give "
        "that object as the model."
    ) from cause
