"""Rewrites formats and patterns of strings.

Rule: each function gets one schema, which it must not change.
"""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]
_FORMATS = frozenset(("hostname", "ipv4", "ipv6", "uuid", "uri"))
_NARROWER = {
    "idn-hostname": "hostname", "iri": "uri", "uri-reference": "uri", "iri-reference": "uri", "ipvanyaddress": "ipv4",
    "ipvanyinterface": "ipv4", "ipvanynetwork": "ipv4", "ipv4network": "ipv4", "ipv4interface": "ipv4",
    "ipv6network": "ipv6", "ipv6interface": "ipv6",
}  # fmt: skip
_LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[2468]0|[13579][26])00)-02-29"
_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY = r"((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
_DATE = rf"({_YEAR}-{_DAY}|{_LEAP})"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_CLOCK = r"([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S)"
_DAYS = r"([0-9]{1,3}Y([0-9]{1,3}M([0-9]{1,4}D)?)?|[0-9]{1,3}M([0-9]{1,4}D)?|[0-9]{1,4}D)"
_DURATION = rf"P([0-9]{{1,4}}W|{_DAYS}(T{_CLOCK})?|T{_CLOCK})"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,20}[A-Za-z0-9])?"
_EMAIL = rf"[A-Za-z0-9_+-]{{1,20}}(\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@({_LABEL}\.){{1,3}}[A-Za-z]{{2,8}}"
_UUID = "[0-9a-f]{{8}}-[0-9a-f]{{4}}-{}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
_PATTERNS = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}", "duration": _DURATION, "email": _EMAIL,
    "idn-email": _EMAIL, **{f"uuid{version}": _UUID.format(version) for version in range(1, 9)},
}  # fmt: skip
"""Where llguidance accepts what parsers reject: 29 February of any year, a 61st second, an address without a dot,
an endless duration."""
CHECKED = frozenset(("regex", "json-pointer", "relative-json-pointer", "uri-template"))
"""Standard formats, which validators may enforce; other names bind nobody."""
_ZOD = r"^(?!\.)(?!.*\.\.)([{0}_'+\-\.]*)[{0}_+-]@([{1}][{1}\-]*\.)+[{2}]{{2,}}$"
_KNOWN_EMAILS = frozenset(
    _ZOD.format(*classes) for classes in (("A-Za-z0-9", "A-Za-z0-9", "A-Za-z"), ("a-zA-Z0-9", "a-zA-Z0-9", "a-zA-Z"))
)
"""Written by zod beside the format; ours are stricter, and llguidance cannot look ahead."""
_AHEAD = re.compile(r"\(\?(?:=(?P<has>(?:[^()\\]|\\.)*)|!\^\[(?P<only>(?:[^\]\\]|\\.)*)\]\*\$)\)")


def in_format(schema: Schema) -> Schema:
    name = schema.get("format")
    if name is None or name in _FORMATS or name in CHECKED:
        return schema
    if name in _NARROWER:
        return {**schema, "format": _NARROWER[name]}
    rest = {key: value for key, value in schema.items() if key != "format"}
    if name not in _PATTERNS:
        return rest
    if name == "email" and rest.get("pattern") in _KNOWN_EMAILS:
        del rest["pattern"]
    return _matching(rest, [f"^{_PATTERNS[name]}$"])


def with_pattern(schema: Schema) -> Schema:
    """Patterns that begin with a lookahead: the lookahead becomes a pattern of its own."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or not pattern.startswith("^(?"):
        return schema
    more, rest = [], pattern[1:]
    while found := _AHEAD.match(rest):
        more.append(_other_than(found["only"]) if found["has"] is None else f"^(?:{found['has']})")
        rest = rest[found.end() :]
    return _matching({**schema, "pattern": f"^{rest}"}, more)


def _other_than(inside: str) -> str:
    """A character outside this class, given by the content of its brackets."""
    if not inside.startswith("^"):
        return f"[^{inside}]"
    return f"[\\{inside[1:]}]" if inside.startswith("^^") else f"[{inside[1:]}]"


def _matching(schema: Schema, patterns: list[str]) -> Schema:
    """The schema with further patterns."""
    if not patterns:
        return schema
    if "pattern" not in schema and len(patterns) == 1:
        return {**schema, "pattern": patterns[0]}
    return {**schema, "allOf": [*schema.get("allOf", []), *({"pattern": each} for each in patterns)]}
