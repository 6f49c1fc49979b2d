"""docs/http/responses.rst shows code that runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from lmbridge import Bridge
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import build_app, serving
from tests.flask.openai.responses.conftest import Script

PAGE = (Path(__file__).parents[4] / "docs" / "http" / "responses.rst").read_text()
BLOCKS = [textwrap.dedent(source) for source in re.findall(r"code-block:: python\n.*\n\n((?:(?:   .*)?\n)+)", PAGE)]


def test_the_page() -> None:
    """A reader who copies the examples gets answers; the model has read the call, and what came of it."""
    script = Script()
    names: dict[str, Any] = {}
    with Bridge(ScriptedEngine(script)) as bridge, serving(build_app({"demo": bridge, "qwen": bridge})) as url:
        source = "\n".join(BLOCKS).replace("http://127.0.0.1:8000", url).replace("the weather in Rome?", "it?")
        exec(source, names)
        names["client"].close()
    kinds = [message["role"] for message in script.last.prompt if isinstance(message, dict)]
    assert kinds == ["user", "assistant", "tool"]
    assert script.last.prompt[-1]["content"] == "sunny in Rome"  # type: ignore[index]
