"""Checks the ``Host`` header: refuses requests for a name that is not this server's.

Rule: HTTP only. Without this, any website could resolve its own name to 127.0.0.1 (DNS rebinding), and browsers would
let its pages read this server's responses.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from flask import request
from werkzeug.exceptions import HTTPException

ANY = "*"
_HOST = re.compile(r"(\[[\w:.%~-]{2,}\]|[\w.~-]+)(:[0-9]*)?", re.ASCII)
_LONGEST = 253  # characters of a name in DNS


class HostError(HTTPException):
    """The request's ``Host`` is not a name of this server (421), or is invalid (400)."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(description)
        self.code = code


def check_host(allowed: Sequence[str]) -> None:
    """Refuse the current request unless its ``Host`` is allowed.

    Raises:
        HostError: 421 if the name is not allowed; 400, as RFC 9112 requires, if it is missing or invalid.
    """
    header = request.environ.get("HTTP_HOST")
    if header is None and request.environ.get("SERVER_PROTOCOL") != "HTTP/1.1":
        return
    host = host_of(header or "")
    if host is None:
        raise HostError(400, 'The Host header is missing or invalid; send one, such as "Host: localhost:8000".')
    if not is_allowed(host, allowed):
        raise HostError(
            421,
            f"This server does not accept requests for the host {host!r}. Use localhost or an IP address; its operator "
            f"can allow the name with --allowed-host {host}, or with LMBRIDGE_ALLOWED_HOSTS in an app.",
        )


def host_of(header: str) -> str | None:
    """The host of a ``Host`` header in lower case, without its port and a final dot; None if it is invalid.

    Two headers are invalid too: servers that accept both join them with a comma.
    """
    match = _HOST.fullmatch(header)
    if match is None:
        return None
    host = match[1].lower().removesuffix(".")
    if len(host) > _LONGEST or not all(host.split(".")) or (host.startswith("[") and _address(host) is None):
        return None
    return host


def is_allowed(host: str, allowed: Sequence[str]) -> bool:
    """Whether requests for ``host``, as returned by ``host_of``, are allowed."""
    # An IP address needs no DNS and cannot be rebound: all are allowed.
    if ANY in allowed or _address(host) is not None or _is_localhost(host):
        return True
    return any(host == name or (name.startswith(".") and f".{host}".endswith(name)) for name in allowed)


def allowed_name(text: str) -> str:
    """Normalise a name for ``is_allowed``: a host, ``.example.org`` with its subdomains, or ``*``.

    Raises:
        ValueError: ``text`` is none of these.
    """
    text = text.strip()
    host = host_of(text.removeprefix("."))
    if text != ANY and host is None:
        raise ValueError(f"{text!r} is not a host name, a domain such as .example.org, or *")
    return text if host is None else f".{host}" if text.startswith(".") else host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens at ``host``."""
    address = _address(host)
    return _is_localhost(host.lower()) if address is None else address.is_loopback


def _is_localhost(host: str) -> bool:
    return f".{host}".endswith(".localhost")  # a name that RFC 6761 keeps out of DNS, subdomains included


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
