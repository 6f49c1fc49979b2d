"""``flask lmbridge status``: shows an app's models and whether they work.

Rule: runs in its own process, not in the serving one; ``--url`` queries that one.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Set

import click
from flask.cli import AppGroup

from lmbridge.bridge import Bridge
from lmbridge.errors import LMBridgeError
from lmbridge.flask.models import current_models
from lmbridge.messages import Task

group = AppGroup("lmbridge", help="The models of this app.")


@group.command()
@click.option("--load", is_flag=True, help="Load each model in this process and try it once.")
@click.option("--url", help="Ask a running server, such as http://127.0.0.1:8000, whether it is ready.")
def status(load: bool, url: str | None) -> None:
    """List the app's models; with --load or --url, show whether they work."""
    try:
        models = current_models()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    for name in models.names():
        mark = " (default)" if name == models.default else ""
        click.echo(f"{name}{mark}: {models.bridge(name)!r}")
    if load:
        for name in models.names():
            click.echo(f"{name}: {_try(name)}")
        models.close()
    if url is not None:
        click.echo(_ask(url))


def _try(name: str) -> str:
    models, began = current_models(), time.monotonic()
    bridge = models.bridge(name)
    try:
        bridge.start()
        loaded = time.monotonic()
        said = _say(bridge, models.tasks(name))
    except LMBridgeError as error:
        raise click.ClickException(f"{name}: {error}") from None
    return f"loaded in {loaded - began:.1f} s, {said} in {time.monotonic() - loaded:.2f} s"


def _say(bridge: Bridge, tasks: Set[Task]) -> str:
    """Try a model's main task once, and describe the result."""
    if "generate" in tasks:
        return f"answered {bridge.infer('Hello', max_new_tokens=8).text!r}"
    if "embed" in tasks:
        return f"returned a vector of {len(bridge.embed('Hello'))} dimensions"
    if "rerank" in tasks:
        return f"returned the score {bridge.rerank('Hello', ['Hello'])[0].score:.2g}"
    return "not tried"


def _ask(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/ready", timeout=10) as response:
            body = response.read()
    except urllib.error.HTTPError as error:  # 503 while models load: the body says so
        body = error.read()
    except OSError as error:
        raise click.ClickException(f"{url} does not respond: {error}") from None
    try:
        return json.dumps(json.loads(body), indent=2)
    except ValueError:
        raise click.ClickException(f"{url} is not an lmbridge server: /ready returned {body[:80]!r}") from None
