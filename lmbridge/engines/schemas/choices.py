"""Choices among strings, in llguidance's Lark.

Rule: pure functions of plain data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

_AT_ONCE = 1_000  # strings per rule


def choice_lines(rule: str, texts: Sequence[str]) -> list[str]:
    """Lark rules, the first named ``rule``, for one of several strings; llguidance accepts 2,000 per rule."""
    quoted = [_quoted(text) for text in texts]
    if len(quoted) <= _AT_ONCE:
        return [f"{rule}: {' | '.join(quoted)}"]
    lots = [quoted[start : start + _AT_ONCE] for start in range(0, len(quoted), _AT_ONCE)]
    names = [f"{rule}_{number}" for number in range(len(lots))]
    return [
        f"{rule}: {' | '.join(names)}",
        *(f"{name}: {' | '.join(lot)}" for name, lot in zip(names, lots, strict=True)),
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
