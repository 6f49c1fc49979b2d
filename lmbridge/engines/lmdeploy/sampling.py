"""Translates our GenerationConfig to LMDeploy's.

Rule: what means something else in LMDeploy is done here instead: stop words (LMDeploy knows only single tokens, and
stops at any token containing one) and stop tokens with ``ignore_eos`` (it would ban them from the answer).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from lmbridge.engines.lmdeploy.own import GENERATION, LMDeployRequestConfig, given
from lmbridge.errors import InvalidRequestError, UnsupportedOptionError
from lmbridge.grammar import Grammar
from lmbridge.messages import GenerationConfig

HOTTEST = 2.0


def check_ranges(config: GenerationConfig) -> None:
    """Raise InvalidRequestError for a value that LMDeploy does not take."""
    if config.temperature is not None and config.temperature > HOTTEST:
        raise InvalidRequestError(
            f"temperature must be at most {HOTTEST} with LMDeploy, not {config.temperature!r}.", param="temperature"
        )
    response_format(config.form)
    if config.min_new_tokens and config.ignore_eos and config.stop_token_ids:
        raise InvalidRequestError(
            "LMDeploy cannot combine min_new_tokens, ignore_eos and stop_token_ids; leave one of the three out.",
            param="min_new_tokens",
        )


def response_format(form: Grammar | None) -> dict[str, Any] | None:
    """The form of the answer; a choice becomes a regular expression.

    Raises:
        UnsupportedOptionError: LMDeploy does not support such grammars.
    """
    if form is None:
        return None
    if form.kind == "json":
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.value}}
    if form.kind == "lark":
        raise UnsupportedOptionError("LMDeploy follows only JSON schemas, regular expressions and choices.", form.param)
    pattern = form.value if form.kind == "regex" else "|".join(map(re.escape, form.value))
    return {"type": "regex_schema", "regex_schema": pattern}


def sampling_fields(
    config: GenerationConfig, template_stops: Sequence[int], form: Grammar | None = None
) -> dict[str, Any]:
    """The fields of LMDeploy's GenerationConfig; those left out have neutral defaults there too.

    Args:
        template_stops: tokens that end an answer by the chat template. LMDeploy drops them if others are given.
        form: of the answer, calls included.
    """
    fields: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "ignore_eos": config.ignore_eos,
        "skip_special_tokens": config.skip_special_tokens,
        "random_seed": config.random_seed,
        "response_format": response_format(form or config.form),
        "logprobs": None if config.logprobs is None else max(1, config.logprobs),  # 0 would give none at all
        **_choice_of_token(config),
        **_own(config),
    }
    if not config.ignore_eos:
        fields["stop_token_ids"] = [*(config.stop_token_ids or ()), *template_stops]
    return fields


def _own(config: GenerationConfig) -> dict[str, Any]:
    """The fields that only LMDeploy supports.

    Raises:
        UnsupportedOptionError: the installed LMDeploy lacks one.
    """
    if not isinstance(config, LMDeployRequestConfig):
        return {}
    import lmdeploy

    fields = given(config, GENERATION)
    if config.keep_ending_token:
        fields["include_stop_str_in_output"] = True
    known = {field.name for field in dataclasses.fields(lmdeploy.GenerationConfig)}
    for name in fields:
        if name not in known:
            raise UnsupportedOptionError(
                f"lmdeploy {lmdeploy.__version__} has no {name}; leave it out, or upgrade lmdeploy.", param=name
            )
    if config.structural_tag is not None:
        fields["response_format"] = dict(config.structural_tag)
    return fields


def own_stop_ids(config: GenerationConfig) -> frozenset[int]:
    """The stop tokens that we look for ourselves."""
    return frozenset(config.stop_token_ids or ()) if config.ignore_eos else frozenset()


def _choice_of_token(config: GenerationConfig) -> dict[str, Any]:
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    if not config.samples:
        # LMDeploy drops the penalty when do_sample is off; sampling among one token is greedy and keeps it
        return {"do_sample": penalty != 1.0, "top_k": 1, "temperature": 1.0, "repetition_penalty": penalty}
    return {
        "do_sample": True,
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "top_k": config.top_k or 0,
        "min_p": config.min_p or 0.0,
        "repetition_penalty": penalty,
    }
