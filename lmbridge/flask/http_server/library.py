"""The undocumented parts of waitress that we use: the classes we derive from, and their names.

Rule: checks the names before anything derives from the classes, so that an error names what another version of
waitress lacks; setup.cfg bounds its version.
"""

from __future__ import annotations

import re
from typing import Any

from lmbridge.errors import MissingDependencyError

_WANTED = "Install the version that lmbridge serve needs: pip install 'waitress >= 3.0.1, < 3.1'"

try:
    from waitress import receiver
    from waitress.adjustments import Adjustments
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.server import TcpWSGIServer
    from waitress.task import ErrorTask, WSGITask
except ImportError as error:
    raise MissingDependencyError(_WANTED) from error

__all__ = ["Adjustments", "ErrorTask", "HTTPChannel", "HTTPRequestParser", "ParsingError", "TcpWSGIServer", "WSGITask"]

NAMES: dict[Any, tuple[str, ...]] = {
    HTTPChannel: (
        "close_when_flushed", "error_task_class", "handle_close", "handle_expt", "handle_read", "handle_write",
        "last_activity", "parser_class", "readable", "received", "recv", "request", "send_continue", "sent_continue",
        "service", "task_class", "total_outbufs_len", "writable", "write_soon",
    ),
    HTTPRequestParser: ("body_rcv", "completed", "error", "headers_finished", "parse_header"),
    TcpWSGIServer: ("channel_class", "del_channel", "handle_accept", "handle_error", "maintenance", "run"),
    WSGITask: ("build_response_header", "execute", "get_environment", "set_close_on_finish", "write"),
    ErrorTask: ("execute", "set_close_on_finish", "write"),
    receiver: ("CHUNK_EXT_RE", "ONLY_HEXDIG_RE"),
}  # fmt: skip
"""The names used of each class, and of the module that reads chunks."""

_missing = [f"{owner.__name__}.{name}" for owner, names in NAMES.items() for name in names if not hasattr(owner, name)]
if _missing:
    raise MissingDependencyError(f"This waitress has no {', '.join(_missing)}. {_WANTED}")

# waitress accepts a bare line feed in a chunk's size line, where some proxies see the end of the line.
receiver.ONLY_HEXDIG_RE = re.compile(rb"[0-9a-fA-F]{1,16}\Z")  # type: ignore[attr-defined]
receiver.CHUNK_EXT_RE = re.compile(receiver.CHUNK_EXT_RE.pattern.removesuffix(b"$") + rb"\Z")  # type: ignore[attr-defined]
