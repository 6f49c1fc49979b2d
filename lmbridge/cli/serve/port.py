"""The port: opening it, why it cannot be opened, and who may come in by it.

Rule: nothing is served here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import socket
from typing import TYPE_CHECKING

from lmbridge.cli.terminal import complain

if TYPE_CHECKING:
    from lmbridge.flask.http_server import HttpServer

FILES = 16_384  # that the server may open, where the system allows so many


def allow_files() -> None:
    """Let the process open as many files as it may: each connection is one, and a large body another."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def opened(server: HttpServer, arguments: argparse.Namespace) -> bool:
    """Open the port; False, with a line on stderr, where it cannot be."""
    try:
        server.open()
    except OSError as error:
        complain(f"{arguments.host}, port {arguments.port}: {_why_not(error)}")
        return False
    return True


_REASONS = {
    errno.EADDRINUSE: "another program listens there already; choose another one with --port.",
    errno.EADDRNOTAVAIL: "this machine has no such address; leave --host out, or give 0.0.0.0 for all it has.",
    errno.EACCES: "no permission; ports below 1024 are the system's: choose one above with --port.",
}


def _why_not(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "no such address is known; check --host."
    for number, reason in _REASONS.items():
        if os.strerror(number) in str(error):  # waitress adds to the text
            return reason
    return str(error)


def warn_of_strangers(host: str) -> None:
    from lmbridge.flask.hosts import is_loopback

    if not is_loopback(host):
        complain(
            f"there is no API key, so anyone who can reach {host or 'this machine'} may use the models: set "
            "LMBRIDGE_API_KEYS or give --api-keys-file FILE, or leave --host out to serve this machine only."
        )
