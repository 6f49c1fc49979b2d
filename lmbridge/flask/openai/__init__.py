"""An OpenAI-compatible API: ``app.register_blueprint(lmbridge.flask.openai.blueprint)``.

Rule: the blueprint uses the bridge on behalf of its HTTP request, like any view; it knows no engine.

A request passes ``guard`` (id, key, size), ``asking`` (body and model), ``reading`` (with ``table``, ``fields``,
``sampling``, ``functions`` and ``conversation``: JSON to a checked call), ``answering`` (the bridge) and ``writing``
(with ``logprobs``: answers to JSON). ``embeddings`` replaces the last three for vectors, ``responses`` for the newer
API. ``errors`` has the error envelope, ``routes`` the views; ``astray`` handles unknown paths.
"""

from lmbridge.flask.openai.routes import blueprint

__all__ = ["blueprint"]
