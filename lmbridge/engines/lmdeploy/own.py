"""What a request may ask of LMDeploy beside what every engine knows.

Rule: plain data; neither LMDeploy nor torch is known here. Other engines refuse these fields by name, as all that they
do not honour.
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
    """A GenerationConfig with what LMDeploy alone understands; None asks for nothing.

    Attributes:
        bad_words, bad_token_ids, logits_processors, output_logits, output_last_hidden_state, repetition_ngram_size,
            repetition_ngram_threshold, return_routed_experts: of LMDeploy's own GenerationConfig. What they have it
            tell comes as the ``value`` of the answer: a dict by the names of its Response.
        structural_tag: a ``response_format`` of that type, whole.
        keep_ending_token: the answer has the token that ended it, as LMDeploy's ``include_stop_str_in_output`` means.
        adapter_name: one of the ``adapters`` in the ``backend_config``.
        media_io_kwargs, mm_processor_kwargs: how images and the like are read and prepared.
        score: the prompt, which is token ids, is scored and nothing is generated: its mean cross-entropy, or what a
            reward model thinks of it. The score is the ``value`` of the answer.
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
        return object.__new__(cls)  # the fields of the class above are not all


OWN_FIELDS = frozenset(field.name for field in fields(LMDeployRequestConfig)) - frozenset(
    field.name for field in fields(GenerationConfig)
)
"""Those that no other engine has."""


def given(config: GenerationConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the fields that ask for something."""
    values = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
