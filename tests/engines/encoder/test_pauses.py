"""What an encoder gives up of its turn on a CPU, so that a stream beside it keeps its pace."""

from __future__ import annotations

import contextlib

import torch
import transformers

from lmbridge.engines.encoder.pauses import Pauses


class Counting:
    """A party that somebody always waits for."""

    def __init__(self) -> None:
        self.pauses = 0

    def turn(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def share(self) -> float | None:
        return 0.01

    def pause(self) -> float:
        self.pauses += 1
        return 0.5

    @property
    def waiting(self) -> bool:
        return False


def test_between_two_matrices_others_may_go_first(bert: str) -> None:
    """One text may take longer than another model's step, and cannot be made shorter."""
    model, party = transformers.AutoModel.from_pretrained(bert).eval(), Counting()
    matrices = 6 * model.config.num_hidden_layers
    pauses = Pauses(model, party)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    assert (pauses.parts, party.pauses, pauses.waited) == (matrices, matrices - 1, 0.5 * (matrices - 1))
    pauses.close()
    model(torch.tensor([[1, 2, 3]]))
    assert party.pauses == matrices - 1


def test_a_model_of_unknown_layers_makes_none() -> None:
    """What is no model of transformers' is run as it is."""
    pauses = Pauses(torch.nn.Linear(2, 2), Counting())
    assert pauses.parts == 1
    pauses.close()
