"""API keys: who may ask.

Rule: pure functions; keys are compared in constant time, each with each, so that no timing tells how near a guess was.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


def bearer(authorization: str | None) -> str | None:
    """The key in an ``Authorization: Bearer …`` header; None where there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def is_known(key: str, keys: Sequence[str]) -> bool:
    """Whether ``key``, as a header's latin-1 text, is one of ``keys``."""
    digest = _digest(key.encode("latin-1", "replace"))  # of one length, as the comparison wants
    matches = [hmac.compare_digest(digest, _digest(known.encode())) for known in keys]  # all of them, always
    return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
