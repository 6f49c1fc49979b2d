"""Lets LMDeploy score a prompt instead of continuing it.

Rule: server thread. It takes one uninterruptible step of the engine: an abort takes effect after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lmbridge.errors import InvalidRequestError, UnsupportedOptionError

_METHODS = {"ppl": "async_get_ppl", "reward": "async_get_reward_score"}


async def score(core: Any, kind: Literal["ppl", "reward"], ids: Sequence[int]) -> float:
    """The mean cross-entropy of the prompt's tokens, or a reward model's score of it.

    Raises:
        UnsupportedOptionError: the installed LMDeploy cannot score.
        InvalidRequestError: the model, or the way it was loaded, does not allow it.
    """
    ask = getattr(core, _METHODS[kind], None)
    if ask is None:
        raise UnsupportedOptionError(
            f"The installed LMDeploy has no {_METHODS[kind]}; upgrade it: pip install 'lmdeploy>=0.18'", param="score"
        )
    try:
        found = await ask(list(ids) if kind == "ppl" else [list(ids)])
    except ValueError as cause:
        raise InvalidRequestError(f"LMDeploy cannot score this prompt: {cause}", param="score") from cause
    return float(found if kind == "ppl" else found[0])
