"""Translates OpenAI's sampling fields into a GenerationConfig, and GenerationConfig's names in errors into OpenAI's.

Rule: pure functions of a request's fields and its route's table, which defines them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from lmbridge.errors import (
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    UnsupportedOptionError,
    UnsupportedTaskError,
)
from lmbridge.flask.openai.fields import LARGEST_ID, Fields
from lmbridge.flask.openai.functions import drop_idle
from lmbridge.flask.openai.table import Field
from lmbridge.messages import GenerationConfig, Overrides

TEMPERATURE = 1.0  # OpenAI's default
BY_DEFAULT = ("temperature", "separate_reasoning")  # GenerationConfig's fields that are set by default
WHAT_FITS = LARGEST_ID  # tokens; the engine ends an answer when the model's context is full


class Body(Fields):
    """The fields of a request's body, checked as its route's table says."""

    def __init__(self, values: dict[str, Any], table: Mapping[str, Field]) -> None:
        super().__init__(values)
        self.table = table

    def value(self, name: str, default: Any = None) -> Any:
        """The checked value; ``default`` if not given."""
        return self.take(name, self.table[name].kind, default)


def read_config(body: Body, supported: Set[str], **more: Any) -> GenerationConfig:
    """Make the request's GenerationConfig.

    Args:
        supported: the GenerationConfig fields that the engine supports; only these get defaults.
        more: GenerationConfig fields that depend on several of the client's.

    Raises:
        InvalidRequestError: a value is invalid or not supported.
    """
    refuse_unanswerable(body)
    overrides: dict[str, Any] = {"temperature": TEMPERATURE} if "temperature" in supported else {}
    for field in body.table.values():
        if field.option is None or field.convert is None:
            continue
        value = body.value(field.name)
        if value is not None and value not in field.neutral:
            if field.option == "grammar" and overrides.get("grammar", field.convert(value)) != field.convert(value):
                body.refuse(field.name, "left out: another field already sets the answer's format")
            overrides[field.option] = field.convert(value)
    overrides.update(more)
    drop_idle(overrides)
    most = given_name("max_new_tokens", body)
    if "max_new_tokens" not in supported and body.get(most) is None:  # our default must not be refused
        del overrides["max_new_tokens"]
    elif overrides.get("min_new_tokens", 0) > overrides["max_new_tokens"]:
        body.refuse("min_tokens", f"at most {most}, which is {overrides['max_new_tokens']}")
    try:
        return GenerationConfig().merged(_typed(overrides))
    except InvalidRequestError as error:
        option = error.param or ""
        name = given_name(option, body)
        raise InvalidRequestError(str(error).replace(option, name, 1), name) from None


def _typed(overrides: dict[str, Any]) -> Overrides:
    return overrides  # type: ignore[return-value]


def refuse_unanswerable(body: Body) -> None:
    """Raise InvalidRequestError for an unsupported field that would change the answer."""
    excused = {"best_of"}  # without effect in combination with certain values of other fields
    if body.get("function_call") == "none":
        excused.add("functions")
    for field in body.table.values():
        if field.fate == "refused" and field.name not in excused:
            body.value(field.name)
    if body.get("best_of") not in (None, body.value("n", 1)):
        body.refuse("best_of", "the same as n (ranking answers is not supported)")


# --- errors with the client's field names ---


def in_clients_words(error: InvalidRequestError, body: Body, prompt: str) -> LMBridgeError:
    """Translate an error of the bridge or its engine: use OpenAI's name of the field.

    An unsupported default is not the client's fault: while the engine was loading, its options were unknown.

    Args:
        prompt: the prompt's name in this request: ``messages``, ``prompt`` or ``input``.
    """
    if error.param == "prompt":
        error.param = prompt
        return error
    if isinstance(error, UnsupportedTaskError):
        error.param = "model"
        return error
    if error.param is None:
        return error
    option = error.param
    error.param = name = given_name(option, body)
    if not isinstance(error, UnsupportedOptionError):
        return error
    if option in BY_DEFAULT and body.get(name) is None:
        return EngineStartError("The model was still loading; send the request again.")
    return UnsupportedOptionError(f"This model's engine does not support {name}; leave it out.", name)


def given_name(option: str, body: Body) -> str:
    """The client's name for a field of GenerationConfig: if there are several, the one given."""
    names = [field.name for field in body.table.values() if field.option == option]
    given = [name for name in reversed(names) if body.get(name) is not None]
    return next(iter([*given, *names]), option)
