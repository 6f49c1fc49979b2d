"""A web page for trying the served models: ``app.register_blueprint(lmbridge.flask.playground.blueprint)``.

Rule: serves one template and its static files, and knows no bridge. The page is a client like any other: it uses the
OpenAI-compatible routes, and the reranking routes and ``GET /status`` if the app has them.
"""

from __future__ import annotations

import posixpath

from flask import Blueprint, Response, current_app, render_template, url_for

PAGE = "lmbridge_playground"
MODELS = "lmbridge_openai.list_models"
CHAT = "lmbridge_openai.chat_completions"
EMBEDDINGS = "lmbridge_openai.embeddings"
RERANK = "lmbridge_rerank.rerank_v1"
STATUS = "lmbridge_operations.status"

# The page runs only its own scripts, loads nothing from elsewhere, and cannot be framed by another page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

blueprint = Blueprint(
    PAGE, __name__, template_folder="templates", static_folder="static", static_url_path="/playground"
)


@blueprint.get("/")
def page() -> str:
    """The page.

    Raises:
        RuntimeError: the app has no OpenAI-compatible routes.
    """
    if CHAT not in current_app.view_functions:
        raise RuntimeError(
            "The playground needs the OpenAI-compatible routes; add them with "
            "app.register_blueprint(lmbridge.flask.openai.blueprint)."
        )
    routes = {"models": MODELS, "chat": CHAT, "embeddings": EMBEDDINGS, "rerank": RERANK, "status": STATUS}
    return render_template(
        "lmbridge_playground/page.html",
        routes={
            name: _from_page(url_for(route)) for name, route in routes.items() if route in current_app.view_functions
        },
        asset=lambda name: _from_page(url_for(".static", filename=name)),
    )


@blueprint.after_request
def _protect(response: Response) -> Response:
    response.headers.update(_HEADERS)
    return response


def _from_page(path: str) -> str:
    """A URL relative to the page, which works even behind a proxy that strips a prefix without telling."""
    return posixpath.relpath(path, url_for(".page"))
