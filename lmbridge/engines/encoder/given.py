"""Objects accepted as the model: those of sentence-transformers, recognised by class name.

Rule: standard library only; loads nothing; any thread.
"""

from __future__ import annotations

from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Task

_PACKAGE = "sentence_transformers"
_TASKS: dict[str, Task] = {"SentenceTransformer": "embed", "CrossEncoder": "rerank"}


def task_of_object(model: object) -> Task | None:
    """The task of an object of sentence-transformers; None for other objects."""
    for kind in type(model).__mro__:
        if kind.__module__.partition(".")[0] == _PACKAGE and kind.__name__ in _TASKS:
            return _TASKS[kind.__name__]
    return None


def check_options_of_object(given: Any, **options: Any) -> None:
    """Refuse options that do not apply to a loaded model.

    Args:
        options: device, dtype, revision and task, as given.

    Raises:
        InvalidRequestError: an option would change the object; ``param`` names it.
    """
    own: dict[str, Any] = {
        "device": str(getattr(given, "device", "")),
        "dtype": "auto",
        "revision": None,
        "task": task_of_object(given),
    }
    for name, value in options.items():
        asked = str(value).removeprefix("torch.")
        if value is None or asked in ("auto", own[name]) or (name == "device" and own[name].startswith(f"{asked}:")):
            continue
        raise InvalidRequestError(
            f"{name}={value!r} cannot be combined with a {type(given).__name__} object, which is used as it is. Load "
            f"or move the object as needed, and leave {name} out.",
            name,
        )
