"""An OpenAI-compatible API: ``app.register_blueprint(lmbridge.flask.openai.blueprint)``.

Rule: the blueprint asks in the name of its HTTP request, as any view would; it knows no engine.

One request passes ``guard`` (id, key, size), ``asking`` (body and model), ``reading`` (with ``table``, ``fields``,
``sampling``, ``functions`` and ``conversation``: JSON to a checked call), ``answering`` (the bridge) and ``writing``
(with ``logprobs``: answers to JSON); ``embeddings`` is the last three for vectors, ``responses`` for the
newer API. ``errors`` has the envelope, ``routes`` the views, ``astray`` the way back for what no view answers.
"""

from lmbridge.flask.openai.routes import blueprint

__all__ = ["blueprint"]
