"""Request options that only LMDeploy supports.

Rule: plain data; neither LMDeploy nor torch is known here. Other engines refuse these fields by name, like any
unsupported field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lmbridge.generation import GenerationConfig

GENERATION = (
    "bad_words", "bad_token_ids", "logits_processors", "output_logits", "output_last_hidden_state",
    "repetition_ngram_size", "repetition_ngram_threshold", "return_routed_experts",
)  # fmt: skip
"""Fields that go into LMDeploy's GenerationConfig under the same names."""
PREPROCESSING = ("adapter_name", "media_io_kwargs", "mm_processor_kwargs")
"""Arguments of its ``preprocess``."""


@dataclass
class LMDeployRequestConfig(GenerationConfig):
    """A GenerationConfig with the fields that only LMDeploy supports; None means unset.

    Attributes:
        bad_words, bad_token_ids, logits_processors, output_logits, output_last_hidden_state, repetition_ngram_size,
            repetition_ngram_threshold, return_routed_experts: as in LMDeploy's GenerationConfig. Their outputs are the
            ``value`` of the answer: a dict with the field names of its Response.
        structural_tag: a complete ``response_format`` of that type.
        keep_ending_token: keep the token that ended the answer, as LMDeploy's ``include_stop_str_in_output`` does.
        adapter_name: one of the ``adapters`` in the ``backend_config``.
        media_io_kwargs, mm_processor_kwargs: how media are read and processed.
        score: score the prompt, given as token ids, without generating: its mean cross-entropy, or a reward model's
            score. The score is the ``value`` of the answer.
    """

    bad_words: list[str] | None = None
    bad_token_ids: list[int] | None = None
    logits_processors: list[Callable[..., Any]] | None = None
    output_logits: Literal["all", "generation"] | None = None
    output_last_hidden_state: Literal["all", "generation"] | None = None
    repetition_ngram_size: int | None = None
    repetition_ngram_threshold: int | None = None
    return_routed_experts: bool | None = None
    structural_tag: Mapping[str, Any] | None = None
    keep_ending_token: bool | None = None
    adapter_name: str | None = None
    media_io_kwargs: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    score: Literal["ppl", "reward"] | None = None

    def __new__(cls, *args: object, **fields: object) -> LMDeployRequestConfig:
        return object.__new__(cls)  # this class has more fields than its base


OWN_FIELDS = frozenset(field.name for field in fields(LMDeployRequestConfig)) - frozenset(
    field.name for field in fields(GenerationConfig)
)
"""The fields that no other engine has."""


def given(config: GenerationConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are set."""
    values = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
