"""What of transformers the engine relies on, checked before anything is loaded.

Rule: transformers is imported inside the functions only, on the engine's worker thread. Nothing here runs a model. What
is named here is everything that the other files touch, so that a new transformers that changes it says so by name at
the start. What its documentation knows stands under ``PLAIN`` and ``BATCHING``; what it does not, under ``SAMPLER`` and
``ATTENTION``, each the business of one file.

transformers promises no stability for any of its continuous batching, and changes it in nearly every release. Without
``BATCHING`` and ``SAMPLER`` the engine still runs models one request at a time; without ``ATTENTION`` it uses
transformers' own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from lmbridge.engines.parts import find, missing_fields, missing_members, missing_parameters
from lmbridge.errors import EngineStartError, MissingDependencyError

OLDEST, BELOW = (5, 24), (5, 25)
TRIED = "5.24.0"
PIP = 'pip install "transformers>=5.24,<5.25"'
"""What setup.cfg asks for; all names below are there since 5.24 or longer."""

_BATCHING = "transformers.generation.continuous_batching"
_MANAGER = f"{_BATCHING}:ContinuousBatchingManager"

PLAIN = {
    "transformers:GenerationMixin.generate": ("inputs", "generation_config", "logits_processor"),
    "transformers:LogitsProcessor.__call__": ("input_ids", "scores"),
    "transformers:PreTrainedModel.set_attn_implementation": ("attn_implementation",),
}
"""Running a model by itself: callable to the parameters given to it."""

BATCHING = {
    "transformers:GenerationMixin.init_continuous_batching": ("generation_config", "continuous_batching_config"),
    f"{_MANAGER}.warmup": (),
    f"{_MANAGER}.start": (),
    f"{_MANAGER}.stop": ("block", "timeout", "hard_stop"),
    f"{_MANAGER}.is_running": (),
    f"{_MANAGER}.add_request": (
        "input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id", "logit_processor_kwargs",
    ),
    f"{_MANAGER}.cancel_request": ("request_id",),
    f"{_MANAGER}.register_result_handler": ("request_id", "callback"),
}  # fmt: skip
"""Running many requests in one batch: callable to the parameters given to it."""

BATCHING_FIELDS = {
    "transformers.generation:ContinuousBatchingConfig": (
        "page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "use_cuda_graph",
        "use_async_batching", "auto_switch_to_flash", "safety_margin",
    ),
    f"{_BATCHING}.requests:GenerationOutput": ("request_id", "generated_tokens", "error"),
}  # fmt: skip
"""Dataclass to the fields read or set."""

_PROCESSORS = f"{_BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList"
SAMPLER = {
    f"{_PROCESSORS}.__call__": ("input_ids", "scores", "logits_processor_args"),
    f"{_PROCESSORS}.prepare_tensor_args": ("requests_in_batch", "arg_storage"),
    f"{_PROCESSORS}.check_kwargs": ("kwargs",),
    f"{_PROCESSORS}.fill_defaults": ("int32_tensor",),
}
"""The first seam, ``processor``: what a manager requires of its ``logit_processor``, besides ``do_processing`` and
``tensors_required``."""

SAMPLER_MEMBERS = {
    "transformers:PreTrainedConfig": ("_attn_implementation",),
    f"{_BATCHING}.requests:RequestState": (
        "logit_processor_kwargs", "_eos_token_ids", "remaining_prefill_tokens",
    ),
    f"{_BATCHING}.requests:FutureRequestState": ("state", "has_new_token"),
}  # fmt: skip
"""What the processors read or change in a request, and read from the model for prompt log-probabilities."""

ATTENTION = {
    "transformers:AttentionInterface.register": ("key", "value"),
    f"{_BATCHING}.cache:PagedAttentionCache.update": ("key_states", "value_states", "layer_idx", "kwargs"),
}
"""The second seam, ``attention``: a function in the place of transformers' own, given keys and values that the cache
has read already."""

ATTENTION_MEMBERS = {f"{_BATCHING}.input_outputs:PagedAttentionArgs": ("cu_seq_lens_q", "cu_seq_lens_k")}
"""And the keywords that say whose they are."""


def import_library() -> None:
    """Check that a tested version of transformers is installed, and runs single requests as expected.

    Raises:
        MissingDependencyError: a package is missing or too old.
        EngineStartError: transformers has changed; the message names what is missing.
    """
    try:
        transformers = importlib.import_module("transformers")
        if _version(transformers.__version__) < OLDEST:
            raise ImportError(f"transformers {transformers.__version__} is too old")
        for package in ("torch", "psutil"):
            importlib.import_module(package)
    except ImportError as cause:
        raise MissingDependencyError(
            f"The transformers engine needs torch, transformers >= 5.24 and psutil ({cause}); "
            'install them with: pip install --upgrade torch "transformers>=5.24,<5.25" psutil jinja2 llguidance'
        ) from cause
    _refuse(list(missing_parameters(PLAIN)))


def batching_faults() -> str:
    """What batching needs and transformers lacks, as a sentence, or ""."""
    missing = list(_missing_batching())
    return _complaint(missing) if missing else ""


def check_manager(manager: Any) -> None:
    """Raise EngineStartError unless the manager keeps its processors where we put ours."""
    if type(getattr(manager, "logit_processor", None)) is not find(_PROCESSORS):
        _refuse(["ContinuousBatchingManager.logit_processor"])


def attention_of(model: Any) -> str | None:
    """The name of the model's current attention; None if it has no choice."""
    name: str | None = getattr(model.config, "_attn_implementation", None)
    return name


def attention_fits() -> bool:
    """Whether our attention function finds what it needs."""
    return not any(missing_parameters(ATTENTION)) and not any(missing_members(ATTENTION_MEMBERS))


def _missing_batching() -> Iterator[str]:
    yield from missing_parameters(BATCHING)
    yield from missing_fields(BATCHING_FIELDS)
    yield from missing_parameters(SAMPLER)
    yield from missing_members(SAMPLER_MEMBERS)


def _refuse(missing: list[str]) -> None:
    if missing:
        raise EngineStartError(_complaint(missing))


def _complaint(missing: list[str]) -> str:
    return (
        f"transformers {installed()} lacks what this engine relies on: {', '.join(missing)}. It was tested with "
        f"transformers {TRIED}; install that, or a newer lmbridge: {PIP}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While a runner is tried, silence the batching's own logger: we report failures ourselves."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    nothing = logging.Filter()  # one of its own each time: several engines may start at once
    nothing.filter = lambda record: False  # type: ignore[method-assign]
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def installed() -> str:
    """The installed version."""
    version: str = importlib.import_module("transformers").__version__
    return version


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
