"""Converts what callers give (integers, numbers, flags, lists, from any library) to plain values.

Rule: pure functions for any thread. Imports neither lmbridge nor any library whose values it takes. An invalid value
gives None; the caller words the error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def as_int(value: object) -> int | None:
    """A whole number as an int; None for a bool and for anything but a ``numbers.Integral``."""
    if type(value) is int:
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return None


def as_number(value: object) -> int | float | None:
    """A number as an int or a float, possibly infinite or nan; None for a bool, or if no float can hold it.

    Accepts every ``numbers.Real``.
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
    """True or False, numpy's included; None for anything else, even 0 and 1."""
    if isinstance(value, bool):
        return value
    kind = type(value)
    return bool(value) if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_") else None


def as_list(value: object) -> Sequence[Any] | None:
    """A list-like value: any sequence except a string or bytes, any one-dimensional array, tensor or column.

    ``tolist``, if there is one, gives the plain Python values. None for everything else: generators, which can be read
    only once, sets, which have no order, and arrays that do not have one dimension.
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
    """As ``as_list``, and the rows of any array or tensor with more dimensions."""
    rows = as_list(value)
    if rows is None and getattr(value, "ndim", 0) > 1 and isinstance(value, Iterable):
        return list(value)
    return rows
