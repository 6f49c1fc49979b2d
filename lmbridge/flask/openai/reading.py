"""A request's JSON object made into a checked call.

Rule: pure functions of the client's JSON and of what the model's engine supports; nothing is sent here. Every fault is
an InvalidRequestError with ``param`` in the client's own words.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.conversation import read_messages
from lmbridge.flask.openai.fields import BOOL, OBJECT, TEXT, Fields, Kind, integer, is_int
from lmbridge.flask.openai.sampling import LARGEST_ID, WHAT_FITS, read_config
from lmbridge.messages import GenerationConfig, Prompt

MAX_CHOICES = 128  # of one request: its prompts times n
MAX_LOGPROBS = 20
COMPLETION_TOKENS = 16  # what OpenAI's completions default to; chats go on for as long as they fit

_LOGPROBS = integer(0, MAX_LOGPROBS)


@dataclass(frozen=True)
class Call:
    """One checked request.

    Attributes:
        fields: what it was read from.
        prompt_name: what the prompt is called there.
        prompts: at least one; ``n`` answers are wanted of each.
        config: how to generate; see ``configs``.
        raw: texts go to the model as they are.
        stream: answer with server-sent events.
        include_usage: end the events with the token counts.
        echoed: texts to put before the answers to each prompt; empty when nothing is echoed.
    """

    fields: Fields
    prompt_name: str
    prompts: list[Prompt]
    config: GenerationConfig
    n: int = 1
    raw: bool = False
    stream: bool = False
    include_usage: bool = False
    echoed: list[str] = field(default_factory=list)

    @property
    def choices(self) -> list[Prompt]:
        """One prompt for each answer, in the order of the answers."""
        return [prompt for prompt in self.prompts for _ in range(self.n)]

    @property
    def configs(self) -> list[GenerationConfig]:
        """One config for each answer. A prompt's answers draw with seeds of their own, or they would be the same."""
        seed = self.config.random_seed
        if seed is None or self.n == 1:
            return [self.config] * len(self.choices)
        return [replace(self.config, random_seed=(seed + i) % 2**63) for _ in self.prompts for i in range(self.n)]


def read_chat(values: dict[str, Any], supported: Set[str]) -> Call:
    """A body of ``chat/completions``."""
    fields = Fields(values)
    return Call(
        fields=fields,
        prompt_name="messages",
        prompts=[read_messages(fields.get("messages"))],
        config=read_config(fields, supported, WHAT_FITS, _chat_logprobs(fields)),
        n=_count(fields, 1),
        **_manners(fields),
    )


def read_completion(values: dict[str, Any], supported: Set[str]) -> Call:
    """A body of ``completions``."""
    fields = Fields(values)
    prompts = _read_prompts(fields)
    n = _count(fields, len(prompts))
    _refuse_unsupported(fields, n)
    return Call(
        fields=fields,
        prompt_name="prompt",
        prompts=prompts,
        config=read_config(fields, supported, COMPLETION_TOKENS, fields.take("logprobs", _LOGPROBS)),
        n=n,
        raw=isinstance(prompts[0], str),
        echoed=_echoed(fields, prompts),
        **_manners(fields),
    )


def _manners(fields: Fields) -> dict[str, Any]:
    """How to answer. ``user`` is checked and otherwise ignored: it buys no turns."""
    fields.take("user", TEXT)
    stream = fields.take("stream", BOOL, False)
    options = fields.take("stream_options", OBJECT)
    if options and not stream:
        raise InvalidRequestError(
            "stream_options is for streams; set stream to true, or leave it out.", "stream_options"
        )
    return {
        "stream": stream,
        "include_usage": Fields(options or {}, "stream_options.").take("include_usage", BOOL, False),
    }


def _count(fields: Fields, prompts: int) -> int:
    """``n``, such that there are at most MAX_CHOICES answers in all."""
    n: int = fields.take("n", integer(1, MAX_CHOICES), 1)
    if n * prompts > MAX_CHOICES:
        raise InvalidRequestError(
            f"One request gets at most {MAX_CHOICES} answers; {prompts} prompts with n = {n} ask for {n * prompts}. "
            "Send several requests.",
            "n" if n > 1 else "prompt",
        )
    return n


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.take("logprobs", BOOL, False)
    top: int | None = fields.take("top_logprobs", _LOGPROBS)
    if top and not wanted:
        raise InvalidRequestError("top_logprobs needs logprobs set to true.", "top_logprobs")
    return (top or 0) if wanted else None


# --- prompts of completions ---


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(is_int(item) and 0 <= item <= LARGEST_ID for item in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _are_prompts(value: object) -> bool:
    if _is_text(value) or _are_tokens(value):
        return True
    return isinstance(value, list) and bool(value) and (all(map(_is_text, value)) or all(map(_are_tokens, value)))


_PROMPTS = Kind(
    _are_prompts, "a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
)


def _read_prompts(fields: Fields) -> list[Prompt]:
    given = fields.take("prompt", _PROMPTS)
    if given is None:
        raise InvalidRequestError("prompt is missing.", "prompt")
    single = isinstance(given, str) or is_int(given[0])
    return [given] if single else list(given)


def _refuse_unsupported(fields: Fields, n: int) -> None:
    if fields.get("suffix") not in (None, ""):
        fields.refuse("suffix", "left out: text cannot be inserted here")
    if fields.get("best_of") not in (None, n):
        fields.refuse("best_of", "the same as n: answers are not ranked here")


def _echoed(fields: Fields, prompts: list[Prompt]) -> list[str]:
    if not fields.take("echo", BOOL, False):
        return []
    if fields.get("logprobs") is not None:
        fields.refuse("echo", "false beside logprobs: a prompt's own probabilities are not known here")
    if not all(isinstance(prompt, str) for prompt in prompts):
        fields.refuse("echo", "false where the prompt is token ids")
    return [str(prompt) for prompt in prompts]
