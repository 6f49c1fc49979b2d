"""Scoring prompts instead of continuing them: ``get_ppl`` and ``get_reward_score``.

Rule: pure functions on the caller's thread.
"""

from __future__ import annotations

from typing import Any, Literal

from lmbridge import messages
from lmbridge.compat.lmdeploy.generation import Ability
from lmbridge.compat.lmdeploy.messages import AssertedError
from lmbridge.engines.lmdeploy.own import LMDeployRequestConfig
from lmbridge.errors import UnsupportedOptionError


def perplexity(prompt_logprobs: messages.PromptLogprobs) -> float:
    """The mean cross-entropy of a prompt with these log-probabilities; the first token has none."""
    own = [next(iter(entry.values())) for entry in prompt_logprobs if entry is not None]
    return -sum(own) / len(own)


def scoring_config(kind: Literal["ppl", "reward"], ability: Ability) -> messages.GenerationConfig:
    """The config that scores a prompt instead of continuing it.

    Raises:
        UnsupportedOptionError: the engine cannot score prompts that way.
    """
    if ability.own:
        return LMDeployRequestConfig(score=kind)
    if kind == "ppl" and "prompt_logprobs" in ability.supports:
        return messages.GenerationConfig(max_new_tokens=1, prompt_logprobs=0)
    what = "get_ppl" if kind == "ppl" else "get_reward_score"
    raise UnsupportedOptionError(f"{what} is not supported by this engine; use LMDeploy's (backend='lmdeploy').", what)


def lists_of_ids(given: Any, least: int) -> list[list[int]]:
    """The prompts to score, each a list of token ids."""
    prompts = [given] if isinstance(given, list) and given and isinstance(given[0], int) else given
    if not isinstance(prompts, list) or not prompts or not all(_are_ids(ids, least) for ids in prompts):
        raise AssertedError(f"input_ids must be a list of at least {least} token ids, or a list of these.", "input_ids")
    return prompts


def _are_ids(ids: Any, least: int) -> bool:
    return isinstance(ids, list) and len(ids) >= least and all(isinstance(token, int) for token in ids)
