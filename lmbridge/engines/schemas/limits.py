"""Refuses what llguidance would need too much time or memory to compile.

Rule: a schema of a few characters must not block the worker thread, which every constrained request needs. What
is not counted here is cheap: lengths, ranges, repetitions and enums.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from lmbridge.engines.schemas.words import BOUNDS, WIDEST, is_number

_MOST_STEPS, _MOST_TOGETHER = 10_000, 200_000
"""Of ``multipleOf``: one state each. Two for one value make as many as their least common multiple has."""
_MOST = {"optional properties": 4_000, "patternProperties": 200, "lists and objects in enums": 5_000}
"""Per schema: the time grows with their square, or faster."""
_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))


class Limits:
    """Counts the cost of one schema's parts as they are written.

    Args:
        refuse: makes the error for a place and a reason.
    """

    def __init__(self, refuse: Callable[[str, str], Exception]) -> None:
        self._refuse = refuse
        self._counts: Counter[str] = Counter()
        self._multiple = Fraction(1)

    def check(self, schema: dict[str, Any], place: str) -> None:
        """Check one part, without the parts inside it."""
        kinds = schema.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            if kind not in _TYPES:
                raise self._refuse(f"{place}/type", f"there is no type {kind}")
        for key, sign in BOUNDS:
            if is_number(schema.get(key)) and sign * schema[key] < -WIDEST:
                raise self._refuse(f"{place}/{key}", f"bounds beyond {WIDEST:,} are not supported")
        if is_number(schema.get("multipleOf")):
            self._check_multiple(schema["multipleOf"], f"{place}/multipleOf")
        named = schema.get("properties", {})
        self._count("optional properties", len(named.keys() - set(schema.get("required", ()))), f"{place}/properties")
        self._count("patternProperties", len(schema.get("patternProperties", ())), f"{place}/patternProperties")
        large = sum(isinstance(value, (list, dict)) for value in schema.get("enum", ()))
        self._count("lists and objects in enums", large, f"{place}/enum")

    def _count(self, what: str, number: int, place: str) -> None:
        self._counts[what] += number
        if self._counts[what] > _MOST[what]:
            raise self._refuse(place, f"a schema may have {_MOST[what]:,} {what}, and this one has more")

    def _check_multiple(self, value: float, place: str) -> None:
        if value <= 0:
            raise self._refuse(place, "it must be more than 0")
        exact = Fraction(Decimal(str(value)))
        if _steps(exact) > _MOST_STEPS:
            raise self._refuse(place, f"it may be at most {_MOST_STEPS:,}, in units of its last digit")
        self._multiple = Fraction(
            math.lcm(self._multiple.numerator, exact.numerator),
            math.gcd(self._multiple.denominator, exact.denominator),
        )
        if _steps(self._multiple) > _MOST_TOGETHER:
            many = f"{_MOST_TOGETHER:,}"
            raise self._refuse(place, f"the least common multiple of all multipleOf in the schema is more than {many}")


def _steps(value: Fraction) -> int:
    """The value in units of its last decimal."""
    scale = 1
    while value.denominator > 1 and (value * scale).denominator > 1:
        scale *= 10
    return int(value * scale)
