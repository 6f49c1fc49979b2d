"""The WSGI server of ``lmbridge serve``: waitress, with what an open port and answers that take minutes need.

``heads`` reads the head of a request, ``connections`` looks after a client from the first byte to the last, ``answers``
has the app answer, or says why it is not asked, and ``server`` starts and ends it all. ``library`` is what is leant on
of waitress.

Rule: HTTP and threads only; nothing of models and Flask is known here. One thread, "lmbridge http", reads all
connections; a request is given to a thread of the pool once all of it has come, so that whoever sends slowly, or
nothing, holds none.
"""

from __future__ import annotations

from lmbridge.flask.http_server.server import HttpServer

__all__ = ["HttpServer"]
