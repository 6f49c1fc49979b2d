"""Objects of sentence-transformers as models, taken apart or used as they are.

Rule: runs on the engine's worker thread. sentence-transformers is never imported here; whoever made the object did so.
Its releases 5 and 6 name some things differently; both are supported. Undocumented names are used only in
``taken_apart``, and its results are compared with the object's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lmbridge.engines.encoder.encoding import Item
from lmbridge.engines.encoder.layouts import Layout
from lmbridge.engines.encoder.loading import Parts
from lmbridge.engines.encoder.prompts import NO_PROMPTS, Prompts
from lmbridge.engines.encoder.settings import Module, Settings, checked_modules
from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Embed, Rerank, Task

_GUESS = 4  # characters per token, where tokens are not counted


def taken_apart(given: Any, task: Task) -> Parts:
    """The model, tokenizer and settings of the object, which stays unchanged.

    Raises:
        Exception: it cannot be taken apart.
    """
    first = next(iter(given)) if task == "embed" else None
    model = given.model if first is None else first.auto_model
    tokenizer = copy.deepcopy(given.tokenizer)  # its own sets truncation and padding for each call
    modules = [] if task == "rerank" else [_module(module) for module in given]
    longest = getattr(given, "max_seq_length", None) or getattr(given, "max_length", None)
    prompts = dict(getattr(given, "prompts", None) or {})
    settings = Settings(
        checked_modules(modules),
        longest,
        bool(getattr(first, "do_lower_case", False)),
        {**NO_PROMPTS, **prompts},
        getattr(given, "default_prompt_name", None),
    )
    if task == "rerank" and settings.default_prompt:
        raise ValueError("it puts a prompt before each pair")
    if not isinstance(model.config.model_type, str):
        raise TypeError("its model is not from transformers")
    return Parts(model, tokenizer, settings, task, activation_of_object(given) if task == "rerank" else None)


def activation_of_object(given: Any) -> Any:
    """The object's activation; None if unspecified."""
    return getattr(given, "activation_fn", None) or getattr(given, "default_activation_function", None)


def _module(module: Any) -> Module:
    describe = getattr(module, "get_config_dict", dict)
    return Module(type(module).__name__, describe(), module.state_dict)


class Whole(Layout):
    """The object's own ``encode`` or ``predict``, a batch at a time."""

    name = "its own"

    def __init__(self, given: Any, task: Task) -> None:
        self.tokens = self.padding = 0
        self._given = given
        self._task = task

    def run(self, items: Sequence[Item]) -> torch.Tensor:
        self._count(sum(item.size for item in items), 0)
        if self._task == "rerank":
            return self._predict(
                [(item.job.query, item.job.document) for item in items if isinstance(item.job, Rerank)]
            )
        jobs = [item.job for item in items if isinstance(item.job, Embed)]
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        if len(prompts) == 1:
            return self._encode([job.text for job in jobs], prompts[0])
        answers: list[Any] = [None] * len(jobs)
        for prompt in prompts:
            places = [place for place, job in enumerate(jobs) if job.prompt == prompt]
            for place, vector in zip(places, self._encode([jobs[place].text for place in places], prompt), strict=True):
                answers[place] = vector
        return torch.stack(answers)

    def _sorted(self, items: Sequence[Item]) -> torch.Tensor:
        return self.run(items)

    def _encode(self, texts: Iterable[Any], prompt: str | None) -> torch.Tensor:
        listed = list(texts)
        named = prompt is not None and prompt in {**NO_PROMPTS, **self._given.prompts}
        return torch.as_tensor(
            self._given.encode(
                listed,
                prompt_name=prompt if named and prompt in self._given.prompts else None,
                prompt=None if named or prompt is None else prompt,
                batch_size=len(listed),
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        )

    def _predict(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        found = self._given.predict(
            pairs,
            batch_size=len(pairs),
            show_progress_bar=False,
            activation_fn=torch.nn.Identity(),
            convert_to_numpy=True,
        )
        logits = torch.as_tensor(found)
        return logits[:, None] if logits.ndim == 1 else logits


class Uncounted:
    """Items whose texts only the object itself tokenises.

    Attributes:
        room: the most tokens of a text, as set in the object; longer ones are always cut.
    """

    def __init__(self, given: Any) -> None:
        self.room = getattr(given, "max_seq_length", None) or 0
        self._prompts = Prompts(getattr(given, "prompts", None) or {})

    def at_once(self, job: Embed | Rerank) -> Item | None:
        return self.encode(job)

    def encode(self, job: Embed | Rerank) -> Item:
        text = job.text if isinstance(job, Embed) else job.query + job.document
        if not isinstance(text, str):
            raise InvalidRequestError("The model was given as an object that takes strings, not token ids.", "texts")
        if isinstance(job, Embed):
            self._prompts.before(job.prompt)  # warns about a mistyped name
        return Item(job, [], None, max(1, len(text) // _GUESS))
