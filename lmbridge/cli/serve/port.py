"""Opens the server's port, explains why it cannot be opened, and warns about who can reach it.

Rule: serves nothing.
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

FILES = 16_384  # open files for the server, if the system allows that many


def allow_files() -> None:
    """Raise the limit of open files up to ``FILES``: each connection takes one, and a large body another."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def opened(server: HttpServer, arguments: argparse.Namespace) -> bool:
    """Open the port; on failure, print why to stderr and return False."""
    try:
        server.open()
    except OSError as error:
        complain(f"{arguments.host}, port {arguments.port}: {_why_not(error)}")
        return False
    return True


_REASONS = {
    errno.EADDRINUSE: "another program is already listening there; choose another port with --port.",
    errno.EADDRNOTAVAIL: "this machine has no such address; leave --host out, or give 0.0.0.0 for all its addresses.",
    errno.EACCES: "permission denied; ports below 1024 are reserved for the system: choose a higher one with --port.",
}


def _why_not(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "unknown host name; check --host."
    for number, reason in _REASONS.items():
        if os.strerror(number) in str(error):  # waitress adds to the message
            return reason
    return str(error)


def warn_of_strangers(host: str) -> None:
    from lmbridge.flask.hosts import is_loopback

    if not is_loopback(host):
        complain(
            f"there is no API key, so anyone who can reach {host or 'this machine'} can use the models: set "
            "LMBRIDGE_API_KEYS or give --api-keys-file FILE, or leave --host out to serve this machine only."
        )
