"""The keyword arguments that LMDeploy's calls pass to its engine.

Rule: the caller's thread. What LMDeploy ignores is ignored here, with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmbridge.engines.lmdeploy.own import PREPROCESSING
from lmbridge.errors import InvalidRequestError

_log = logging.getLogger("lmbridge.compat.lmdeploy")
_TEMPLATE = ("chat_template_kwargs", "enable_thinking", "reasoning_effort", "tools")
_NEUTRAL: dict[str, Any] = {"multiplex": True, "sequence_start": True, "sequence_end": True, "step": 0}
"""Arguments without effect in LMDeploy, with a value that needs no warning; None never does."""
_told: set[str] = set()  # warnings already given; any thread, in atomic steps


@dataclass
class Keywords:
    """What a call's keywords ask for.

    Attributes:
        template: variables of the chat template.
        own: further options for LMDeploy's own engine.
    """

    template: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


def read_keywords(given: Mapping[str, Any], *, template: bool) -> Keywords:
    """The keywords of a call.

    Args:
        template: prompts go through the chat template; otherwise its keywords have no effect.

    Raises:
        InvalidRequestError: ``chat_template_kwargs`` is not a dict.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if name not in _TEMPLATE and name not in PREPROCESSING and _NEUTRAL.get(name) != value:
            told_once("The argument %s is ignored, as in LMDeploy; use GenerationConfig instead", name)
    own = {name: asked[name] for name in PREPROCESSING if name in asked}
    return Keywords(_variables(asked) if template else {}, own)


def told_once(message: str, *values: Any) -> None:
    """Warn once per message."""
    if (text := message % values) not in _told:
        _told.add(text)
        _log.warning(text)


def _variables(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As in LMDeploy, ``chat_template_kwargs`` override ``enable_thinking``; ``reasoning_effort`` overrides both."""
    variables = asked.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise InvalidRequestError(
            f"chat_template_kwargs must be a dict, not {type(variables).__name__}.", "chat_template_kwargs"
        )
    thinking = {"enable_thinking": asked["enable_thinking"]} if "enable_thinking" in asked else {}
    over = {name: asked[name] for name in ("reasoning_effort", "tools") if name in asked}
    return {**thinking, **{name: value for name, value in variables.items() if value is not None}, **over}
