"""Reranking for Cohere's, Jina's and TEI's clients: ``app.register_blueprint(lmbridge.flask.rerank.blueprint)``.

Rule: the blueprint asks in the name of its HTTP request, as any view would; it knows no engine. ``reading`` and
``writing`` know the dialects, ``routes`` has the views. What surrounds them, keys and sizes say, is that of the
OpenAI-compatible routes.
"""

from lmbridge.flask.rerank.routes import blueprint

__all__ = ["blueprint"]
