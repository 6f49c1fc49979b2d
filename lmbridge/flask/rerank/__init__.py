"""Reranking for Cohere's, Jina's and TEI's clients: ``app.register_blueprint(lmbridge.flask.rerank.blueprint)``.

Rule: the blueprint uses the bridge on behalf of its HTTP request, like any view; it knows no engine. ``reading`` and
``writing`` know the dialects, ``routes`` has the views. Keys, size limits and the like are shared with the
OpenAI-compatible routes.
"""

from lmbridge.flask.rerank.routes import blueprint

__all__ = ["blueprint"]
