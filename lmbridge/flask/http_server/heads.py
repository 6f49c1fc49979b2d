"""Parses the head of a request; refuses what two servers could read differently (RFC 9112).

Rule: runs on the thread that reads all connections.
"""

from __future__ import annotations

import re

from lmbridge.flask.http_server.library import HTTPRequestParser, ParsingError

_FIRST_LINE = re.compile(rb"[A-Z]{1,20} [^ ]+ HTTP/1\.[01]")
_ONCE = (b"content-length", b"transfer-encoding", b"host")


class Request(HTTPRequestParser):
    """One incoming request."""

    def parse_header(self, header_plus: bytes) -> None:
        first, *lines = header_plus.split(b"\r\n")
        if not _FIRST_LINE.fullmatch(first):
            raise ParsingError("The request line is invalid")
        head = {name: values for name, values in _values(lines).items() if name in _ONCE}
        for name, values in head.items():
            if len(values) > 1:
                raise ParsingError(f"More than one {name.decode()} header")
        _check_length(head, first.endswith(b"1.1"))
        # waitress's regular expressions take minutes for a line of many spaces
        kept = [name + colon + value.strip(b" \t") for name, colon, value in (line.partition(b":") for line in lines)]
        try:
            super().parse_header(b"\r\n".join([first, *kept]))
        except ValueError as cause:
            raise ParsingError("The request is invalid") from cause


def _values(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    """The values of each header, by its name in lower case."""
    found: dict[bytes, list[bytes]] = {}
    for line in lines:
        if line.startswith((b" ", b"\t")):
            raise ParsingError("A header spans several lines")
        name, _, value = line.partition(b":")
        found.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return found


def _check_length(head: dict[bytes, list[bytes]], newer: bool) -> None:
    """Raise ParsingError unless the request's length and host are unambiguous."""
    if b"transfer-encoding" in head:
        if b"content-length" in head:
            raise ParsingError("Both content-length and transfer-encoding are given")
        if not newer:
            raise ParsingError("Transfer-encoding requires HTTP/1.1")
        if head[b"transfer-encoding"][0].lower() != b"chunked":
            raise ParsingError("The only supported transfer-encoding is chunked")
    if newer and b"host" not in head:
        raise ParsingError("The host header is missing")
