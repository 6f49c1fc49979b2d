"""Pauses within the layers of a model, in which others may have the device.

Rule: the engine's worker thread, by hooks that torch documents. On a CPU only: there a batch of one text may take
longer than another model's step, and what a GPU has been told to compute is not done when the call returns.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lmbridge.engines.base import Party
from lmbridge.engines.encoder.layouts import layers_of


class Pauses:
    """Has a model pause in front of each matrix of its layers, or of each layer where it has none that are known.

    Attributes:
        parts: into how many a batch is divided so; read by the server thread.
        waited: seconds that others have had in all pauses so far.
    """

    def __init__(self, model: Any, party: Party) -> None:
        self._party = party
        layers: list[Any] = []
        if model is not None and next(model.parameters()).device.type == "cpu":
            with contextlib.suppress(ValueError, AttributeError):  # they are not known
                layers = layers_of(model)
        steps = [part for layer in layers for part in layer.modules() if isinstance(part, torch.nn.Linear)] or layers
        self.parts = max(1, len(steps))
        self.waited = 0.0
        self._hooks = [step.register_forward_pre_hook(self._before) for step in steps[1:]]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, step: Any, inputs: Any) -> None:
        self.waited += self._party.pause()
