"""What the core does where nothing is installed but janus: docs/installing.rst."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec

from lmbridge import Bridge, EngineStartError, function_engine

PATIENCE = 30.0


async def shout(prompt: str) -> AsyncIterator[str]:
    for word in prompt.split():
        yield f"{word.upper()} "


def main() -> int | str:
    for package in ("torch", "transformers", "flask", "pydantic", "rich"):
        if find_spec(package) is not None:
            return f"{package} is installed here"
    with Bridge(function_engine(shout)) as bridge:
        if (text := bridge.infer("many threads", timeout=PATIENCE).text) != "MANY THREADS ":
            return f"an answer is {text!r}"
    try:
        with Bridge("demo"):
            pass
    except EngineStartError as error:
        return 0 if "pip install" in str(error) else f"{error} names no command"
    return "a model of transformers has been loaded without it"


if __name__ == "__main__":
    sys.exit(main())
