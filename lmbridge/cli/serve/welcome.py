"""Prints how to use the server, once it is ready.

Rule: every printed command works as it stands.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmbridge.flask.models import Models


def welcome(url: str, models: Models, page: bool) -> str:
    """How to use each model with curl and from Python, and the web page's address."""
    names = models.names()
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    lines = [f"{listed} {'is' if len(names) == 1 else 'are'} ready; Ctrl-C stops the server."]
    if page:
        lines.append(f"  page:   {url}/")
    for name in names:
        for task in sorted(models.tasks(name), key=list(ROUTES).index):
            lines += [f"  curl:   {_curl(url, task, name, models)}", f"  {_python(url, task, name, models)}"]
    return "\n".join(lines)


ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    ),
    "embed": ("/v1/embeddings", {"input": ["A red fox.", "A brown dog."]}),
    "rerank": ("/v1/rerank", {"query": "Which animal is red?", "documents": ["A brown dog.", "A red fox."]}),
}


def _curl(url: str, task: str, name: str, models: Models) -> str:
    route, body = ROUTES[task]
    key = ' -H "Authorization: Bearer $KEY"' if models.settings.api_keys else ""
    return f"curl {url}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps({'model': name, **body})}'"


def _python(url: str, task: str, name: str, models: Models) -> str:
    key = "KEY" if models.settings.api_keys else '"none"'
    openai = f'openai: OpenAI(base_url="{url}/v1", api_key={key})'
    if task == "generate":
        return f'{openai}  # and model="{name}" in its calls'
    if task == "embed":
        return f'{openai}.embeddings.create(model="{name}", input=["A red fox."])'
    return f'cohere: cohere.ClientV2({key}, base_url="{url}").rerank(model="{name}", query="…", documents=["…"])'
