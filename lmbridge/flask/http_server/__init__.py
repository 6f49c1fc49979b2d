"""The WSGI server of ``lmbridge serve``: waitress, hardened for an open port and for answers that take minutes.

``heads`` parses the head of a request, ``connections`` manages a client's connection, ``answers`` calls the app or
refuses the request, and ``server`` starts and stops it all. ``library`` lists what we use of waitress.

Rule: HTTP and threads only; knows nothing of models or Flask. One thread, "lmbridge http", reads all connections; a
request goes to a thread of the pool only once it is complete, so slow or silent clients occupy none.
"""

from __future__ import annotations

from lmbridge.flask.http_server.server import HttpServer

__all__ = ["HttpServer"]
