"""Translates our GenerationConfig to vLLM's.

Rule: vLLM is imported inside functions. All fields are given, so that nothing depends on vLLM's defaults, one of which
is 16 tokens. Stop words are not passed on: they are found in the text that we make.
"""

from __future__ import annotations

import json
from typing import Any

from lmbridge.engines.schemas import choice_lines, followable
from lmbridge.grammar import Grammar
from lmbridge.messages import GenerationConfig

_SEEDS = 2**63
PARAMS = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "random_seed"}
"""Maps vLLM's names of refused parameters to our fields, where they differ."""


def sampling_params(config: GenerationConfig, room: int, form: dict[str, str] | None) -> Any:
    """vLLM's ``SamplingParams``.

    Args:
        room: the most tokens of the answer.
        form: see ``structured``.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    most = min(config.max_new_tokens, room)
    return SamplingParams(
        max_tokens=most,
        min_tokens=min(config.min_new_tokens or 0, most),
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        repetition_penalty=_given(config.repetition_penalty, 1.0),
        logit_bias=dict(config.logit_bias) if config.logit_bias else None,
        stop_token_ids=config.stop_token_ids,
        ignore_eos=config.ignore_eos,
        logprobs=config.logprobs,
        prompt_logprobs=config.prompt_logprobs,
        structured_outputs=StructuredOutputsParams(**form) if form is not None else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **_choice_of_token(config),
    )


def structured(form: Grammar | None) -> dict[str, str] | None:
    """The field of vLLM's ``StructuredOutputsParams`` for an answer's form, as llguidance supports it.

    Raises:
        InvalidRequestError: the schema is not supported.
    """
    if form is None:
        return None
    if form.kind == "json":
        return {"json": json.dumps(followable(form.value, form.param))}
    if form.kind == "regex":
        return {"regex": form.value}
    return {"grammar": "\n".join(choice_lines("start", form.value)) if form.kind == "choice" else form.value}


def _choice_of_token(config: GenerationConfig) -> dict[str, Any]:
    if not config.samples:
        return {"temperature": 0.0}
    return {
        "temperature": _given(config.temperature, 1.0),
        "top_p": _given(config.top_p, 1.0),
        "top_k": config.top_k or 0,
        "min_p": config.min_p or 0.0,
        "seed": None if config.random_seed is None else config.random_seed % _SEEDS,
    }


def _given(value: float | None, neutral: float) -> float:
    return neutral if value is None else value
