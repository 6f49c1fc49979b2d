"""A prompt's log-probabilities: the model reads the prompt once more, apart from generation.

Rule: generation threads only, between two runs of the model; ``Reading.entries`` and ``failure`` are read by the server
thread once it has been told of a token. The runs are plain forwards in the attention that the model was loaded with,
so that they say what the model itself says; torch's hooks see them as they see all runs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lmbridge.engines.transformers import library
from lmbridge.engines.transformers.choosing import explain
from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Logprobs

AT_ONCE = 256
"""Tokens in one run, whose scores for the whole vocabulary are held at once."""
MOST_SCORES = 1 << 28
"""The most scores held at once for a prompt that cannot be read in pieces: a gigabyte."""


class Reading:
    """The results for one prompt.

    Attributes:
        likely: how many of the most likely tokens are told beside a token of the prompt.
        entries: one per token that was read.
        cache: the model's own, between two runs.
        failure: what ended the reading.
    """

    def __init__(self, likely: int) -> None:
        self.likely = likely
        self.entries: list[Logprobs | None] = []
        self.cache: Any = None
        self.failure: Exception | None = None

    def fail(self, error: Exception) -> None:
        """It cannot be read to the end."""
        self.failure, self.cache = error, None

    def unread(self, prompt: Sequence[int]) -> bool:
        """Whether there is more to read."""
        return self.failure is None and len(self.entries) < len(prompt)


class Reader:
    """Reads prompts on a model that also generates.

    Args:
        attention: the name of what the model attends with by itself; None if it attends so at all times.
        pieces: read long prompts in pieces, which models that keep no cache of the usual kind cannot.
    """

    def __init__(self, model: Any, attention: str | None = None, pieces: bool = True) -> None:
        self._model = model
        self._attention = attention
        self._pieces = pieces and "past_key_values" in inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def read(self, reading: Reading, prompt: Sequence[int], most: int | None = None) -> None:
        """Read on to the end, or about ``most`` tokens.

        Raises:
            InvalidRequestError: the model must read a prompt at once, and this one is too long.
            Exception: the model failed.
        """
        if not reading.entries:
            self._refuse_long(prompt)
            reading.entries.append(None)
        end = len(prompt) if most is None else len(reading.entries) + most
        with self._own_attention(), torch.inference_mode():
            while len(reading.entries) < min(end, len(prompt)):
                self._run(reading, prompt)
        if not reading.unread(prompt):
            reading.cache = None

    def _run(self, reading: Reading, prompt: Sequence[int]) -> None:
        """One run of the model. It reads the last token too, though nothing follows: some models' positions depend on
        how long the whole is.
        """
        start, whole = len(reading.entries) - 1, len(prompt)
        stop = min(start + AT_ONCE, whole) if self._pieces else whole
        device = self._model.device
        ids = torch.tensor([prompt[start:stop]], device=device)
        if stop - start == whole:
            output = self._model(input_ids=ids, use_cache=False)
        else:
            output = self._model(input_ids=ids, past_key_values=reading.cache, use_cache=True)
            reading.cache = output.past_key_values
        following = torch.tensor(prompt[start + 1 : stop + 1], device=device)
        listed, logprobs = explain(output.logits[0, : len(following)].float(), following, reading.likely)
        found = zip(listed.tolist(), logprobs.tolist(), strict=True)
        reading.entries += [dict(zip(tokens, values, strict=True)) for tokens, values in found]

    def _refuse_long(self, prompt: Sequence[int]) -> None:
        size = self._model.get_output_embeddings().weight.shape[0]
        if not self._pieces and len(prompt) * size > MOST_SCORES:
            raise InvalidRequestError(
                f"prompt_logprobs of this model need prompts of at most {MOST_SCORES // size} tokens, since it cannot "
                f"read them in pieces; this one has {len(prompt)}. Shorten it, or leave prompt_logprobs out.",
                param="prompt_logprobs",
            )

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        used = library.attention_of(self._model)
        if self._attention is None or used == self._attention:
            yield
            return
        self._model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._model.set_attn_implementation(used)
