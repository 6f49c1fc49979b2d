"""CORS: lets pages of the origins in LMBRIDGE_CORS_ORIGINS read the responses.

Rule: response headers only. Credentials are never allowed: a page sends its key itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from flask import Request, Response

EXPOSED = "x-request-id, retry-after, x-should-retry"
MAX_AGE = "600"  # seconds that a browser may remember a preflight


def allow(request: Request, response: Response, origins: Sequence[str]) -> None:
    """Add the headers for the request's origin if it is one of ``origins`` (``*`` means all)."""
    if not origins:
        return
    headers = response.headers
    if "*" not in origins:
        response.vary.add("Origin")
    origin = request.headers.get("Origin")
    if origin is None or not ("*" in origins or origin in origins):
        return
    headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
    headers["Access-Control-Expose-Headers"] = EXPOSED
    if request.method == "OPTIONS":
        headers["Access-Control-Allow-Methods"] = "GET, POST"
        headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "*")
        headers["Access-Control-Max-Age"] = MAX_AGE
