"""Checks API keys.

Rule: pure functions; compares a key with every known one in constant time, so that timing reveals nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


def bearer(authorization: str | None) -> str | None:
    """The key in an ``Authorization: Bearer …`` header; None if there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def is_known(key: str, keys: Sequence[str]) -> bool:
    """Whether ``key``, a header's text decoded as latin-1, is one of ``keys``."""
    digest = _digest(key.encode("latin-1", "replace"))  # of one length, as a constant-time comparison needs
    matches = [hmac.compare_digest(digest, _digest(known.encode())) for known in keys]  # all of them, always
    return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
