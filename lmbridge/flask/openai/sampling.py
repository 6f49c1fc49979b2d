"""From OpenAI's sampling fields to a GenerationConfig, and back to OpenAI's names in errors.

Rule: pure functions of one request's fields. Beside OpenAI's fields, those that vLLM's users know from ``extra_body``
are taken: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, skip_special_tokens. A field that would change
the answer and that nothing here can honour is refused by name; a field that would not is tolerated, known or unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from lmbridge.errors import (
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    UnsupportedOptionError,
    UnsupportedTaskError,
)
from lmbridge.flask.openai.fields import BOOL, Fields, Kind, integer, is_int, number
from lmbridge.messages import GenerationConfig, Overrides

TEMPERATURE = 1.0  # OpenAI's default
GREEDY = 1e-5  # temperatures below are 0: scores divided by them would overflow
WHAT_FITS = 2**31 - 1  # tokens; the engine ends an answer where the model's context does
MAX_STOPS = 32  # each is looked for in every new piece of text, on the server's thread
MAX_STOP_LENGTH = 1000  # characters
MAX_STOP_TOKENS = 64
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Option:
    """One field that goes to the engine: its name here, GenerationConfig's, and what it may hold.

    Attributes:
        neutral: values that ask for nothing.
        convert: from OpenAI's value to GenerationConfig's.
    """

    name: str
    field: str
    kind: Kind
    neutral: tuple[Any, ...] = ()
    convert: Callable[[Any], Any] = lambda value: value


def _is_stop(value: object) -> bool:
    words = [value] if isinstance(value, str) else value
    return (
        isinstance(words, list)
        and len(words) <= MAX_STOPS
        and all(isinstance(word, str) and 0 < len(word) <= MAX_STOP_LENGTH for word in words)
    )


def _are_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_STOP_TOKENS
        and all(is_int(item) and 0 <= item <= LARGEST_ID for item in value)
    )


STOP = Kind(_is_stop, f"a string or a list of at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_LENGTH:,} characters")
IDS = Kind(_are_ids, f"a list of at most {MAX_STOP_TOKENS} token ids")
SEED = integer(-(2**63), 2**63 - 1)
TOKENS = integer(1, LARGEST_ID)

OPTIONS = (
    Option("max_tokens", "max_new_tokens", TOKENS),
    Option("max_completion_tokens", "max_new_tokens", TOKENS),  # the newer name wins where both are given
    Option("temperature", "temperature", number(0, 2), convert=lambda value: 0 if value < GREEDY else value),
    Option("top_p", "top_p", number(0, 1), (1,), lambda value: max(value, 1e-9)),
    Option("top_k", "top_k", integer(-1, LARGEST_ID), (-1, 0)),
    Option("min_p", "min_p", number(0, 1), (0,)),
    Option("repetition_penalty", "repetition_penalty", number(0.01, 100), (1,)),
    Option("seed", "random_seed", SEED, convert=lambda value: value % 2**63),
    Option("stop", "stop_words", STOP, ([],), lambda value: [value] if isinstance(value, str) else value),
    Option("stop_token_ids", "stop_token_ids", IDS, ([],)),
    Option("ignore_eos", "ignore_eos", BOOL),
    Option("skip_special_tokens", "skip_special_tokens", BOOL),
)


def read_config(fields: Fields, supported: Set[str], max_tokens: int, logprobs: int | None) -> GenerationConfig:
    """The request's GenerationConfig.

    Args:
        supported: the GenerationConfig fields that the engine honours; the defaults keep to them.
        max_tokens: the limit where the request gives none.
        logprobs: how many of the likeliest tokens are asked for, or None.

    Raises:
        InvalidRequestError: a value is impossible, or nothing here can honour it.
    """
    refuse_unanswerable(fields)
    overrides: dict[str, Any] = {"max_new_tokens": max_tokens, "logprobs": logprobs}
    if "temperature" in supported:
        overrides["temperature"] = TEMPERATURE
    for option in OPTIONS:
        value = fields.take(option.name, option.kind)
        if value is not None and value not in option.neutral:
            overrides[option.field] = option.convert(value)
    return GenerationConfig().merged(_typed(overrides))


def _typed(overrides: dict[str, Any]) -> Overrides:
    return overrides  # type: ignore[return-value]


# --- what would be a wrong answer if it were ignored ---


def _empty(value: object) -> bool:
    return value in (False, 0, "", [], {})


_NOTHING = Kind(_empty, "left out: it is not supported here")
_PLAIN_TEXT = Kind(
    lambda value: isinstance(value, dict) and value.get("type") == "text",
    'left out or {"type": "text"}: other formats are not supported here',
)
_ONLY_TEXT = Kind(lambda value: value == ["text"], 'left out or ["text"]: this server answers with text')
_PENALTY = Kind(
    lambda value: value == 0 and not isinstance(value, bool),
    "0 or left out: this penalty is not supported here; repetition_penalty is",
)

UNANSWERABLE: dict[str, Kind] = {
    "response_format": _PLAIN_TEXT,
    "modalities": _ONLY_TEXT,
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    **dict.fromkeys(
        (
            "audio",
            "logit_bias",
            "moderation",
            "web_search_options",
            # vLLM's
            "allowed_token_ids",
            "bad_words",
            "chat_template",
            "chat_template_kwargs",
            "continue_final_message",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "min_tokens",
            "prompt_logprobs",
            "structured_outputs",
            "use_beam_search",
        ),
        _NOTHING,
    ),
}


def refuse_unanswerable(fields: Fields) -> None:
    """Raise InvalidRequestError, naming the field, for what would change the answer and cannot be honoured.

    Tools may stand in a request that forbids their use; otherwise the model would never hear of them.
    """
    for name, kind in UNANSWERABLE.items():
        fields.take(name, kind)
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if fields.get(choice) != "none":
            fields.take(tools, _NOTHING)
        if fields.get(choice) not in (None, "none", "auto"):
            fields.refuse(choice, '"none" or left out: tools are not supported here')


# --- errors in the client's words ---


def in_clients_words(error: InvalidRequestError, fields: Fields, prompt: str) -> LMBridgeError:
    """The error with OpenAI's name for the field at fault, where the bridge or its engine found the fault.

    The default temperature is nobody's fault: what the engine knows was not known yet while it was loading.

    Args:
        prompt: what the prompt is called in this request: ``messages`` or ``prompt``.
    """
    if error.param == "prompt":
        error.param = prompt
        return error
    if isinstance(error, UnsupportedTaskError):
        error.param = "model"
    if not isinstance(error, UnsupportedOptionError):
        return error
    name = _given_name(error.param, fields)
    if name == "temperature" and fields.get(name) is None:
        return EngineStartError("The model was still being loaded; send the request again.")
    return UnsupportedOptionError(f"{name} is not supported by the engine of this model; leave it out.", name)


def _given_name(field: str | None, fields: Fields) -> str | None:
    if field == "logprobs":
        return "top_logprobs" if fields.get("top_logprobs") is not None else "logprobs"
    names = [option.name for option in OPTIONS if option.field == field]
    return next((name for name in names if fields.get(name) is not None), names[0] if names else field)
