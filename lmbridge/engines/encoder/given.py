"""Which objects may be given as the model: those of sentence-transformers, told by their class's name.

Rule: standard library only, nothing is loaded; any thread may ask.
"""

from __future__ import annotations

from lmbridge.messages import Task

_PACKAGE = "sentence_transformers"
_TASKS: dict[str, Task] = {"SentenceTransformer": "embed", "CrossEncoder": "rerank"}


def task_of_object(model: object) -> Task | None:
    """What an object of sentence-transformers does; None for all other objects."""
    for kind in type(model).__mro__:
        if kind.__module__.partition(".")[0] == _PACKAGE and kind.__name__ in _TASKS:
            return _TASKS[kind.__name__]
    return None
