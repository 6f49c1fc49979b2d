"""The prefix of a text: one of the model's prompts by name, or a given string.

Rule: standard library only; safe on the server thread and the worker thread together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lmbridge.log import shown

logger = logging.getLogger("lmbridge")

NO_PROMPTS = {"query": "", "document": ""}  # names that every model knows
_REMEMBERED = 100


class Prompts:
    """The prompts of one model.

    Args:
        named: by name.
        default: the name of the prompt for texts without one.
    """

    def __init__(self, named: Mapping[str, str], default: str | None = None) -> None:
        self._named = {**NO_PROMPTS, **named}
        self._own = [name for name in named if name not in NO_PROMPTS or named[name]]
        self._default = default
        self._looked_at: set[str] = set()

    def before(self, prompt: str | None) -> str:
        """The prefix of the text. Warns once about a prompt that looks like an unknown name."""
        if prompt is None:
            return "" if self._default is None else self._named.get(self._default, "")
        if prompt in self._named:
            return self._named[prompt]
        if prompt[-1:].isalnum() and prompt not in self._looked_at and len(self._looked_at) < _REMEMBERED:
            self._looked_at.add(prompt)
            own = f"those of the model are {', '.join(map(shown, self._own))}" if self._own else "the model has none"
            logger.warning(
                "prompt=%s is not one of the model's prompts (%s), so it is put before the text as it is. If intended, "
                "end it with a blank or a colon.",
                shown(prompt),
                own,
            )
        return prompt
