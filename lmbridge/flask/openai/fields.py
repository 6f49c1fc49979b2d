"""Reads the fields of a JSON object, and checks each one.

Rule: pure functions of the client's JSON; knows neither Flask nor an engine. ``null`` counts as not given, as in
OpenAI's own API. An invalid value raises InvalidRequestError with ``param`` set to the client's name of the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from lmbridge.errors import InvalidRequestError

LARGEST_ID = 2**31 - 1  # the largest token id, and the largest count of anything
_SHOWN = 80  # characters of an invalid value shown in its error
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Kind:
    """A field's check, the words for it in errors, and the conversion of valid values."""

    holds: Callable[[Any], bool]
    expected: str
    plain: Callable[[Any], Any] = lambda value: value


def integer(low: int, high: int) -> Kind:
    """An integer from ``low`` to ``high``, as ``is_int`` defines it."""
    return Kind(lambda value: is_int(value) and low <= value <= high, f"an integer from {low} to {high}", int)


def number(low: float, high: float) -> Kind:
    """A finite int or float from ``low`` to ``high``."""
    return Kind(lambda value: is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}")


def is_int(value: object) -> bool:
    """Whether it is an integer. JSON has only one kind of number, so 20.0 is one too; true and false are not."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def are_ids(value: object) -> bool:
    """Whether it is a list of possible token ids that is not empty."""
    return isinstance(value, list) and bool(value) and all(is_int(item) and 0 <= item <= LARGEST_ID for item in value)


def plain_ids(value: Any) -> Any:
    """Convert the numbers in a list, or in its lists, to ints; leave everything else as it is."""
    if isinstance(value, list):
        return [plain_ids(item) for item in value]
    return int(value) if isinstance(value, float) else value


BOOL = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a string")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")


def as_json(value: object) -> str:
    """A client's value as JSON, without the middle if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]}"


def wrong(path: str, expected: str, value: object) -> InvalidRequestError:
    """The error for an invalid value; ``path`` is its place in the client's JSON."""
    return InvalidRequestError(f"{path} must be {expected}, not {as_json(value)}.", path)


class Fields:
    """The fields of one object. Errors put ``path`` before their names."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def get(self, name: str) -> Any:
        """The unchecked value; None if not given."""
        return self._values.get(name)

    def take(self, name: str, kind: Kind, default: Any = None) -> Any:
        """The checked and converted value; ``default`` if not given.

        Raises:
            InvalidRequestError: the value is invalid.
        """
        value = self._values.get(name)
        if value is None:
            return default
        if not kind.holds(value):
            self.refuse(name, kind.expected)
        return kind.plain(value)

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise InvalidRequestError: the field must be ``expected``."""
        raise wrong(self._path + name, expected, self._values.get(name))


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a request body, which must be a JSON object.

    Raises:
        InvalidRequestError: it is not JSON in UTF-8, not an object, nests too deeply, or contains NaN, Infinity or half
            of a surrogate pair.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if _SURROGATE.search(raw):  # an escaped half of a pair is valid JSON, but cannot be encoded again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:  # bad UTF-8 and integers of thousands of digits are ValueErrors
        raise InvalidRequestError(f"The request body is not valid JSON: {_reason(cause)}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The request body must be a JSON object, not {as_json(value)}.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _reason(cause: Exception) -> str:
    if isinstance(cause, RecursionError):
        return "it nests too deeply"
    if isinstance(cause, UnicodeEncodeError):
        return "it escapes half of a surrogate pair"
    if isinstance(cause, UnicodeDecodeError):
        return f"byte {cause.start} is not UTF-8"
    return str(cause).rstrip(".")
