"""What crosses between the caller's thread and the server thread: plain data, no behaviour beyond checking itself.

Rule: no thread, no queue and no engine is known here. Times are seconds on the monotonic clock.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import sys
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict, Union

from lmbridge.errors import InvalidRequestError, LMBridgeError
from lmbridge.values import as_flag, as_int, as_list, as_number

FinishReason = Literal["stop", "length", "abort", "error"]

Task = Literal["generate", "embed", "rerank", "call"]
"""What an engine may do with a request."""

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "user", "content": "…"}``."""

Prompt = Union[str, Sequence[Message], Sequence[int]]
"""One prompt: a string, a conversation, or token ids. Engines get plain dicts and ints, whatever was given."""

Logprobs = dict[int, float]
"""One position: token id to log-probability; the token that was chosen comes first."""

_OPENAI_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "random_seed",
    "stop": "stop_words",
    "top_logprobs": "logprobs",
}
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "random_seed")


class Overrides(TypedDict, total=False):
    """GenerationConfig's fields as keyword arguments of the verbs: ``bridge.infer(prompt, temperature=0.7)``."""

    max_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    random_seed: int | None
    stop_words: list[str] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int | None


@dataclass
class GenerationConfig:
    """How to generate. Mutable, and copied when a request is submitted.

    Numbers, flags and lists may be numpy's, torch's, or of any type that Python's ``numbers`` knows; engines get plain
    ones.

    Attributes:
        max_new_tokens: the most tokens to generate, >= 1. The room left in the model's context may end it earlier.
        do_sample: True samples, False takes the most likely token; None samples when one of temperature, top_p,
            top_k, min_p or random_seed is given and is greedy otherwise.
        temperature: >= 0; 0 is greedy.
        top_p: keep the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep the k most likely tokens, >= 1 (0 keeps all).
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: > 0; above 1 makes tokens of the prompt and the answer less likely.
        random_seed: the same seed gives the same text, whatever else is in the batch.
        stop_words: strings that end the answer; the answer does not contain them.
        stop_token_ids: token ids that end the answer, beside the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: per generated token, its own log-probability and those of this many most likely tokens.
    """

    max_new_tokens: int = 512
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    random_seed: int | None = None
    stop_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __new__(cls, *args: object, **fields: object) -> GenerationConfig:
        _refuse_unknown(fields)
        return super().__new__(cls)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random rather than taken by highest probability."""
        if self.temperature == 0 or self.top_k == 1:
            return False
        if self.do_sample is None:
            return any(getattr(self, name) is not None for name in _SAMPLING_FIELDS)
        return self.do_sample

    def merged(self, overrides: Overrides) -> GenerationConfig:
        """A checked copy with ``overrides`` applied over it; its numbers, flags and lists are plain ones of its own.

        Raises:
            InvalidRequestError: a field is unknown, of the wrong type or out of range.
        """
        _refuse_unknown(overrides)
        merged = object.__new__(type(self))
        fields = merged.__dict__
        fields.update(self.__dict__, **overrides)
        for name, default in _DEFAULTS.items():
            value = fields[name]
            if value is not default:  # by identity: 512.0 and numpy's 512 equal the default too
                fields[name] = _checked(name, value)
        return merged

    def check(self) -> None:
        """Raise InvalidRequestError, naming the field, unless every field is of its type and in its range."""
        self.merged({})

    def given(self) -> list[str]:
        """The names of the fields that differ from their defaults."""
        fields = self.__dict__
        if fields == _DEFAULTS:
            return []
        return [name for name, value in fields.items() if value != _DEFAULTS.get(name)]


def _refuse_unknown(fields: Any) -> None:
    for name in fields:
        if name in _FIELD_NAMES:
            continue
        known = _OPENAI_NAMES.get(name)
        hint = f"use {known}" if known else f"the fields are {', '.join(_FIELD_NAMES)}"
        raise InvalidRequestError(f"GenerationConfig has no field {name!r}: {hint}.", param=name)


def _checked(name: str, value: object) -> object:
    """The field's plain value."""
    read, expected = _KINDS[name]
    plain = read(value)
    if plain is None:
        raise InvalidRequestError(f"{name} must be {expected}, not {reprlib.repr(value)}.", param=name)
    return plain


def _int(low: int, high: float = math.inf) -> _Reader:
    def read(value: object) -> int | None:
        number = as_int(value)
        return number if number is not None and low <= number <= high else None

    return read


def _number(low: float, high: float = sys.float_info.max, above: bool = False) -> _Reader:
    """From ``low``, or above it, to ``high``; never infinite, and never nan, which compares to nothing."""

    def read(value: object) -> float | None:
        number = as_number(value)
        return number if number is not None and low <= number <= high and not (above and number == low) else None

    return read


def _texts(value: object) -> list[str] | None:
    texts = as_list(value)
    return list(texts) if texts is not None and all(isinstance(text, str) and text for text in texts) else None


def _ints(value: object) -> list[int] | None:
    numbers = as_list(value)
    if numbers is None:
        return None
    plain = [number for number in map(as_int, numbers) if number is not None]
    return plain if len(plain) == len(numbers) else None


_Reader = Callable[[object], object]
"""The plain value, or None where what was given is not of the kind."""
_FIELD_NAMES: dict[str, None] = {}  # filled below, once the class exists
# What the fields may hold beside their defaults, which is None wherever None says something.
_KINDS: dict[str, tuple[_Reader, str]] = {
    "max_new_tokens": (_int(1), "an int >= 1"),
    "do_sample": (as_flag, "True, False or None"),
    "temperature": (_number(0), "a number >= 0 or None"),
    "top_p": (_number(0, 1, above=True), "a number in (0, 1] or None"),
    "top_k": (_int(0), "an int >= 0 or None"),
    "min_p": (_number(0, 1), "a number in [0, 1] or None"),
    "repetition_penalty": (_number(0, above=True), "a number > 0 or None"),
    "random_seed": (_int(0), "an int >= 0 or None"),
    "stop_words": (_texts, "a list of strings that are not empty, or None"),
    "stop_token_ids": (_ints, "a list of ints or None"),
    "ignore_eos": (as_flag, "True or False"),
    "skip_special_tokens": (as_flag, "True or False"),
    "logprobs": (_int(0, 20), "an int from 0 to 20 or None"),
}
_FIELD_NAMES.update(dict.fromkeys(f.name for f in dataclasses.fields(GenerationConfig)))
_DEFAULTS: dict[str, object] = {}
_DEFAULTS.update(GenerationConfig().__dict__)


@dataclass(frozen=True, slots=True)
class Embed:
    """A text to make a vector of.

    Attributes:
        text: a string, or token ids.
        normalize: give a vector of length 1.
        dimensions: keep the first so many, for models that were trained for that; None keeps all.
        prompt: put before the text: the name of one of the model's own prompts, or a text.
        truncate: what to do with a text longer than the model reads: refuse it, or cut off its end.
    """

    task: ClassVar[Task] = "embed"
    noun: ClassVar[str] = "Text"

    text: str | list[int]
    normalize: bool = True
    dimensions: int | None = None
    prompt: str | None = None
    truncate: Literal["error", "end"] = "error"


@dataclass(frozen=True, slots=True)
class Rerank:
    """A document whose relevance to a query is wanted; ``truncate`` cuts the document."""

    task: ClassVar[Task] = "rerank"
    noun: ClassVar[str] = "Document"

    query: str
    document: str
    truncate: Literal["error", "end"] = "end"


@dataclass(frozen=True, slots=True)
class Apply:
    """An item for a function."""

    task: ClassVar[Task] = "call"
    noun: ClassVar[str] = "Item"

    item: Any


Job = Embed | Rerank | Apply
"""What a request asks for that generates no text."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document in the order of its relevance.

    Attributes:
        index: its position in the list that was given.
        score: the higher, the more relevant. Of a model with one label what its own activation makes of it, by default
            the sigmoid, from 0 to 1; of one with several the softmax of the last.
        document: its text.
    """

    index: int
    score: float
    document: str


@dataclass(slots=True)
class Request:
    """One prompt, or one job, on its way to the engine.

    Attributes:
        id: unique within the bridge.
        prompt: see ``Prompt``; checked. "" for a job.
        config: checked, and nobody else's.
        raw: give a text to the model as it is, without the chat template.
        client: the account whose turn it takes.
        priority: higher goes first; waiting raises it.
        deadline: monotonic time at which it fails, or None.
        created: monotonic time of submission.
        context: the caller's context variables.
        job: what is asked for instead of text.
    """

    id: str
    prompt: Prompt
    config: GenerationConfig
    raw: bool
    client: str
    priority: int
    deadline: float | None
    created: float
    context: Context
    job: Job | None = None

    @property
    def task(self) -> Task:
        """What the engine is asked to do."""
        return "generate" if self.job is None else self.job.task


@dataclass(slots=True)
class Usage:
    """Token counts; ``completion_tokens`` counts what the engine generated, the ending token included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Seconds since submission: until the engine took the request, until its first token, until its end."""

    queued: float = 0.0
    first_token: float | None = None
    total: float = 0.0


@dataclass(slots=True)
class Delta:
    """What one or more engine steps added to an answer.

    Attributes:
        text: new text; the texts of all deltas joined are the whole answer.
        token_ids: new token ids, the ending token left out.
        logprobs: one entry per token id when asked for, else None.
        finish_reason: set on the last delta of a finished request.
        usage: set on the last delta where the engine counts tokens itself.
        error: set on the last delta of a failed request; a stream raises it.
        value: set on the last delta of a job: a vector, a score, or what a function made of an item.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: LMBridgeError | None = None
    value: Any = None


@dataclass(slots=True)
class Response:
    """A whole answer.

    Attributes:
        text: the answer.
        token_ids: its token ids, the ending token left out.
        finish_reason: ``stop`` (the model or a stop word ended it), ``length`` (no room left), ``abort``.
        usage: token counts.
        timings: seconds.
        logprobs: one entry per token id when asked for, else None.
        request_id: the request it answers.
        value: what a job gave: a vector, a score, or what a function made of an item.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[Logprobs] | None = None
    request_id: str = ""
    value: Any = None


Outcome = Response | BaseException
"""How a call ended. Its reader fills a Response's text, token ids and logprobs in from the deltas."""


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what ``deltas`` said, in order. ``deltas`` holds at least one."""
    if len(deltas) == 1:
        return deltas[0]
    token_ids: list[int] = []
    logprobs: list[Logprobs] | None = None
    for delta in deltas:
        token_ids += delta.token_ids
        if delta.logprobs is not None:
            logprobs = [] if logprobs is None else logprobs
            logprobs += delta.logprobs
    last = deltas[-1]
    text = "".join([delta.text for delta in deltas])
    return Delta(text, token_ids, logprobs, last.finish_reason, last.usage, last.error, last.value)
