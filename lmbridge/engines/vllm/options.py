"""The vLLM engine's options, validated when it is created, and the engine arguments they make.

Rule: plain data; vLLM is not imported. None leaves the choice to vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmbridge.errors import InvalidRequestError

_DTYPES = ("auto", "float16", "bfloat16", "float32")
_LEAST = {"max_batch_size": 1, "max_chunk_size": 1, "max_context": 2, "page_size": 1, "num_blocks": 1, "tp": 1}
_NAMES = {
    "dtype": "dtype",
    "max_batch_size": "max_num_seqs",
    "max_chunk_size": "max_num_batched_tokens",
    "max_context": "max_model_len",
    "cache_share": "gpu_memory_utilization",
    "page_size": "block_size",
    "num_blocks": "num_gpu_blocks_override",
    "tp": "tensor_parallel_size",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
}
"""Maps our options to vLLM's."""


@dataclass(frozen=True)
class VLLMOptions:
    """An engine's options; the engine class documents each.

    Raises:
        InvalidRequestError: a value is invalid, or two contradict each other; ``param`` names the option.
    """

    model: str
    dtype: Any = None
    max_batch_size: int | None = None
    max_chunk_size: int | None = None
    max_context: int | None = None
    cache_share: float | None = None
    page_size: int | None = None
    num_blocks: int | None = None
    tp: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise _wrong(name, f"an int >= {least}", value)
        if self.cache_share is not None and not (isinstance(self.cache_share, float) and 0 < self.cache_share < 1):
            raise _wrong("cache_share", "a number between 0 and 1", self.cache_share)
        if self.dtype is not None and _dtype_name(self.dtype) not in _DTYPES:
            raise _wrong("dtype", f"one of {', '.join(_DTYPES)} or a torch dtype", self.dtype)
        if not isinstance(self.engine_args, Mapping) or not all(isinstance(name, str) for name in self.engine_args):
            raise _wrong("engine_args", "a dict of vLLM's engine arguments", self.engine_args)
        for name in ("model", *self._given()):
            if name in self.engine_args:
                raise InvalidRequestError(f"{name} is set twice: in engine_args, too.", param="engine_args")

    def arguments(self) -> dict[str, Any]:
        """The arguments of vLLM's ``AsyncEngineArgs``.

        ``tokenizer_mode``: our token ids need a tokenizer of transformers. ``guidance`` follows the grammars written
        here, and everything that the other engines follow.
        """
        return {
            "model": self.model,
            "tokenizer_mode": "hf",
            "structured_outputs_config": {"backend": "guidance"},
            "disable_log_stats": True,
            **self._given(),
            **self.engine_args,
        }

    def _given(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _NAMES}
        if self.dtype is not None:
            values["dtype"] = _dtype_name(self.dtype)
        return {_NAMES[name]: value for name, value in values.items() if value not in (None, False)}


def _dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {value!r}.", param=name)
