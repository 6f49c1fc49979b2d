"""Plain values out of what callers give: whole numbers, numbers, flags and lists, whatever library they come from.

Rule: pure functions for any thread. Imports neither lmbridge nor any library whose values it takes. What is none of
the kind gives None, and whoever asked says so in its own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def as_int(value: object) -> int | None:
    """A whole number as an int; None for a bool and for all that is no ``numbers.Integral``."""
    if type(value) is int:
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return None


def as_number(value: object) -> int | float | None:
    """A number as an int or a float, which may be infinite or nan; None for a bool and all that is no ``numbers.Real``.

    One that no float can hold is None too.
    """
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return int(value) if isinstance(value, Integral) else float(value)
        except OverflowError:
            return None
    return None


def as_flag(value: object) -> bool | None:
    """True or False, numpy's among them; None for everything else, 0 and 1 too."""
    if isinstance(value, bool):
        return value
    kind = type(value)
    return bool(value) if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_") else None


def as_list(value: object) -> Sequence[Any] | None:
    """What may stand for a list: any sequence but a string or bytes, and any array, tensor or column of one dimension.

    What has ``tolist`` gives the plain Python values it holds. None for everything else: generators, which can be read
    but once, sets, which have no order, and arrays of more dimensions or of none.
    """
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    if hasattr(value, "tolist"):
        held = value.tolist() if getattr(value, "ndim", 1) == 1 else None
        return held if isinstance(held, list) else None
    return value if isinstance(value, Sequence) else None


def as_rows(value: object) -> Sequence[Any] | None:
    """What ``as_list`` takes, and the rows of any array or tensor of more dimensions."""
    rows = as_list(value)
    if rows is None and getattr(value, "ndim", 0) > 1 and isinstance(value, Iterable):
        return list(value)
    return rows
