"""A model in its layout, with everything a request needs.

Rule: torch on the engine's worker thread; methods marked quick may be called on the server thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch

from lmbridge.engines.encoder.encoding import Item
from lmbridge.engines.encoder.layouts import Layout
from lmbridge.engines.encoder.vectors import Score, finished
from lmbridge.errors import EngineError, InvalidRequestError
from lmbridge.messages import Embed, Rerank, Task

TOKENS = 16_384
"""Per batch, on devices where no cache limits it."""


class Encoder(Protocol):
    """Turns jobs into items."""

    room: int

    def at_once(self, job: Embed | Rerank) -> Item | None:
        """The item, if that is quick."""

    def encode(self, job: Embed | Rerank) -> Item:
        """The item."""


@dataclass(frozen=True)
class Core:
    """A loaded model.

    Attributes:
        module: the module with the weights.
        dimensions: of a vector; 0 for a model that makes scores.
        score: makes scores; None for a model that makes vectors.
        pooling: described; "" for a model that makes scores.
    """

    module: Any
    task: Task
    encoder: Encoder
    layout: Layout
    dimensions: int
    score: Score | None
    pooling: str
    device: str
    dtype: str

    def describe(self) -> str:
        """The task and how it runs. Quick."""
        length = f"{self.encoder.room} tokens" if self.encoder.room else ""
        said = (
            self.task,
            self.layout.name,
            self.score.name if self.score is not None else self.pooling,
            length,
            self.device,
            self.dtype,
        )
        return ", ".join(part for part in said if part)

    @property
    def usual_tokens(self) -> int:
        """How many tokens make a fast batch. Quick."""
        return self.layout.tokens_on_cpu if self.device.startswith("cpu") else TOKENS

    def check(self, job: Embed | Rerank) -> None:
        """Refuse what the model cannot do. Quick."""
        if isinstance(job, Embed) and job.dimensions is not None and job.dimensions > self.dimensions:
            raise InvalidRequestError(
                f"dimensions is {job.dimensions}, but the model's vectors have {self.dimensions}.", "dimensions"
            )

    def run(self, items: Sequence[Item]) -> list[Any]:
        """A vector or a score for each item, or an error in its place. Worker thread."""
        with torch.inference_mode():
            outputs = self.layout.run(items).float().cpu()
            found = self._numbers(outputs, len(items))
        jobs = [item.job for item in items]
        wishes = [(job.dimensions, job.normalize) for job in jobs if isinstance(job, Embed)]
        values: list[Any] = finished(found, wishes) if self.task == "embed" else found.tolist()
        if not numpy.isfinite(found).all():
            values = [value if numpy.isfinite(value).all() else _no_number() for value in values]
        return values

    def _numbers(self, outputs: torch.Tensor, texts: int) -> numpy.ndarray[Any, Any]:
        """The vectors or the scores.

        Raises:
            EngineError: their shape has changed since the start.
        """
        width = self.dimensions if self.score is None else self.score.labels
        if outputs.shape != (texts, width):
            raise EngineError(
                f"The model returned shape {tuple(outputs.shape)} for {texts} texts; at the start it was {width} for "
                "each. It may have been modified since."
            )
        found: numpy.ndarray[Any, Any] = outputs.numpy() if self.score is None else self.score(outputs)
        return found

    def footprint(self) -> int:
        """Bytes of the weights. Quick."""
        tensors = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _no_number() -> EngineError:
    return EngineError(
        "The model's output for this text is not a number (NaN). Half precision may overflow; load the model with "
        "dtype='float32'."
    )
