"""``flask lmbridge status``: what an app serves, and whether it works.

Rule: runs in a process of its own, not in the one that serves; ``--url`` asks that one.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import click
from flask.cli import AppGroup

from lmbridge.errors import LMBridgeError
from lmbridge.flask.models import current_models

group = AppGroup("lmbridge", help="The models of this app.")


@group.command()
@click.option("--load", is_flag=True, help="Load each model here and have it answer once.")
@click.option("--url", help="Ask a running server, such as http://127.0.0.1:8000, how it is.")
def status(load: bool, url: str | None) -> None:
    """Show the app's models, and with --load or --url whether they work."""
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
    bridge, began = current_models().bridge(name), time.monotonic()
    try:
        bridge.start()
        loaded = time.monotonic()
        answer = bridge.infer("Hello", max_new_tokens=8)
    except LMBridgeError as error:
        raise click.ClickException(f"{name}: {error}") from None
    return f"loaded in {loaded - began:.1f} s, answered {answer.text!r} in {answer.timings.total:.2f} s"


def _ask(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/ready", timeout=10) as response:
            body = response.read()
    except urllib.error.HTTPError as error:  # 503 while it loads: its body says so
        body = error.read()
    except OSError as error:
        raise click.ClickException(f"{url} does not answer: {error}") from None
    try:
        return json.dumps(json.loads(body), indent=2)
    except ValueError:
        raise click.ClickException(f"{url}/ready is no lmbridge: {body[:80]!r}") from None
