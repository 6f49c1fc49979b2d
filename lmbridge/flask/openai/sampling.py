"""From OpenAI's sampling fields to a GenerationConfig, and back to OpenAI's names in errors.

Rule: pure functions of one request's fields and of its route's table, which says what they mean.
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
BY_DEFAULT = ("temperature", "separate_reasoning")  # GenerationConfig's fields that are set though nobody gave them
WHAT_FITS = LARGEST_ID  # tokens; the engine ends an answer where the model's context does


class Body(Fields):
    """The fields of a request's body, each of the kind that its route's table says."""

    def __init__(self, values: dict[str, Any], table: Mapping[str, Field]) -> None:
        super().__init__(values)
        self.table = table

    def value(self, name: str, default: Any = None) -> Any:
        """The checked value; ``default`` where it was not given."""
        return self.take(name, self.table[name].kind, default)


def read_config(body: Body, supported: Set[str], **more: Any) -> GenerationConfig:
    """The request's GenerationConfig.

    Args:
        supported: the GenerationConfig fields that the engine honours; the defaults keep to them.
        more: fields of it that take more than one of the client's to tell.

    Raises:
        InvalidRequestError: a value is impossible, or nothing here can honour it.
    """
    refuse_unanswerable(body)
    overrides: dict[str, Any] = {"temperature": TEMPERATURE} if "temperature" in supported else {}
    for field in body.table.values():
        if field.option is None or field.convert is None:
            continue
        value = body.value(field.name)
        if value is not None and value not in field.neutral:
            if field.option == "grammar" and overrides.get("grammar", field.convert(value)) != field.convert(value):
                body.refuse(field.name, "left out: another field says already what form the answer has")
            overrides[field.option] = field.convert(value)
    overrides.update(more)
    drop_idle(overrides)
    most = given_name("max_new_tokens", body)
    if "max_new_tokens" not in supported and body.get(most) is None:  # a limit of our own is nothing to be refused
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
    """Raise InvalidRequestError, naming the field, for what would change the answer and cannot be honoured."""
    excused = {"best_of"}  # of these some values ask for nothing beside others
    if body.get("function_call") == "none":
        excused.add("functions")
    for field in body.table.values():
        if field.fate == "refused" and field.name not in excused:
            body.value(field.name)
    if body.get("best_of") not in (None, body.value("n", 1)):
        body.refuse("best_of", "the same as n (answers are not ranked here)")


# --- errors in the client's words ---


def in_clients_words(error: InvalidRequestError, body: Body, prompt: str) -> LMBridgeError:
    """The error with OpenAI's name for the field at fault, where the bridge or its engine found the fault.

    What is asked for by default is nobody's fault: what the engine knows was not known yet while it was loading.

    Args:
        prompt: what the prompt is called in this request: ``messages`` or ``prompt``.
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
        return EngineStartError("The model was still being loaded; send the request again.")
    return UnsupportedOptionError(f"{name} is not supported by the engine of this model; leave it out.", name)


def given_name(option: str, body: Body) -> str:
    """What the client calls GenerationConfig's field: of several names the one that it has given."""
    names = [field.name for field in body.table.values() if field.option == option]
    given = [name for name in reversed(names) if body.get(name) is not None]
    return next(iter([*given, *names]), option)
