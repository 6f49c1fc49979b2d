"""One JSON object's fields, each checked as it is taken.

Rule: pure functions of what the client sent; neither Flask nor an engine is known. ``null`` counts as not given, as in
OpenAI's own API. A wrong value raises InvalidRequestError with ``param`` set to the field's name in OpenAI's words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from lmbridge.errors import InvalidRequestError

LARGEST_ID = 2**31 - 1  # of a token, and the largest count of anything
_SHOWN = 80  # characters of a wrong value
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Kind:
    """What a field may hold, how to say so, and the plain value of what it holds."""

    holds: Callable[[Any], bool]
    expected: str
    plain: Callable[[Any], Any] = lambda value: value


def integer(low: int, high: int) -> Kind:
    """An int from ``low`` to ``high``, as ``is_int`` takes it."""
    return Kind(lambda value: is_int(value) and low <= value <= high, f"an integer from {low} to {high}", int)


def number(low: float, high: float) -> Kind:
    """A finite int or float from ``low`` to ``high``."""
    return Kind(lambda value: is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}")


def is_int(value: object) -> bool:
    """Whether it is a whole number. JSON has one kind of number, so that 20.0 is one too; true and false are none."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def are_ids(value: object) -> bool:
    """Whether it is a list of what may be token ids, with at least one of them."""
    return isinstance(value, list) and bool(value) and all(is_int(item) and 0 <= item <= LARGEST_ID for item in value)


def plain_ids(value: Any) -> Any:
    """The numbers in a list, or in lists of one, as ints; what else there is stays as it is."""
    if isinstance(value, list):
        return [plain_ids(item) for item in value]
    return int(value) if isinstance(value, float) else value


BOOL = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a string")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")


def as_json(value: object) -> str:
    """What a client sent, as it sent it, but for the middle of what is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]}"


def wrong(path: str, expected: str, value: object) -> InvalidRequestError:
    """The error of a value that is not what it must be; ``path`` is where the client wrote it."""
    return InvalidRequestError(f"{path} must be {expected}, not {as_json(value)}.", path)


class Fields:
    """The fields of one object. ``path`` stands before their names in errors."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def get(self, name: str) -> Any:
        """The value as it came; None where it was not given."""
        return self._values.get(name)

    def take(self, name: str, kind: Kind, default: Any = None) -> Any:
        """The checked, plain value; ``default`` where it was not given.

        Raises:
            InvalidRequestError: it is not of the kind.
        """
        value = self._values.get(name)
        if value is None:
            return default
        if not kind.holds(value):
            self.refuse(name, kind.expected)
        return kind.plain(value)

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise InvalidRequestError: the field must be what ``expected`` says."""
        raise wrong(self._path + name, expected, self._values.get(name))


def parse_object(raw: bytes) -> dict[str, Any]:
    """A request's body as the JSON object it must be.

    Raises:
        InvalidRequestError: it is no JSON of UTF-8, no object, nests too deeply, or holds NaN, Infinity or half a
            character.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if _SURROGATE.search(raw):  # an escaped half of a pair is JSON, but no text that could be encoded again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:  # bad UTF-8 and integers of thousands of digits are ValueErrors
        raise InvalidRequestError(f"The request's body is not valid JSON: {_reason(cause)}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The request's body must be a JSON object, not {as_json(value)}.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _reason(cause: Exception) -> str:
    if isinstance(cause, RecursionError):
        return "it nests too deeply"
    if isinstance(cause, UnicodeEncodeError):
        return "it escapes half of a surrogate pair"
    if isinstance(cause, UnicodeDecodeError):
        return f"byte {cause.start} is not UTF-8"
    return str(cause).rstrip(".")
