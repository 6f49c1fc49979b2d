"""Pauses within a model's layers, in which others may use the device.

Rule: the engine's worker thread, by hooks documented by torch. On a CPU only: there one text may take longer than
another model's step; on a GPU, work is not finished when the call returns.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lmbridge.engines.base import Party
from lmbridge.engines.encoder.layouts import layers_of


class Pauses:
    """Makes a model pause before each matrix of its layers, or each layer if its matrices are unknown.

    Attributes:
        parts: how many parts this divides a batch into; read by the server thread.
        waited: seconds used by others in all pauses so far.
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
