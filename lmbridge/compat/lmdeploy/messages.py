"""LMDeploy's configs and Response, with the fields, defaults, order and mutability of 0.18.

Rule: plain data that validates itself when created; neither LMDeploy nor torch is known here. LMDeploy's documentation
explains the fields.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

from lmbridge.errors import InvalidRequestError


class AssertedError(InvalidRequestError, AssertionError):
    """An invalid value that LMDeploy rejects by ``assert``: code catching AssertionError still works."""


class ResponseType(enum.Enum):
    """How a step of LMDeploy's engine ended, for code that uses it; a Response has ``finish_reason`` instead."""

    SUCCESS = enum.auto()
    FINISH = enum.auto()
    ENGINE_STOP_ERROR = enum.auto()
    SESSION_REPEAT = enum.auto()
    SESSION_NOT_EXIST = enum.auto()
    HANDLER_NOT_EXIST = enum.auto()
    INPUT_LENGTH_ERROR = enum.auto()
    INTERNAL_ENGINE_ERROR = enum.auto()
    CANCEL = enum.auto()
    PREFIX_CACHE_CONFLICT = enum.auto()
    NO_QUEUE = enum.auto()
    NOT_SUPPORTED = enum.auto()
    OUT_OF_MEMORY = enum.auto()


class QuantPolicy(enum.IntEnum):
    """How the cache is quantized."""

    NONE = 0
    INT4 = 4
    INT8 = 8
    FP8 = 16
    FP8_E5M2 = 17
    TURBO_QUANT = 42


class EngineRole(enum.Enum):
    """An engine's part in disaggregated serving."""

    Hybrid = enum.auto()
    Prefill = enum.auto()
    Decode = enum.auto()


class MigrationBackend(enum.Enum):
    """What carries a cache from one engine to another."""

    DLSlime = enum.auto()
    Mooncake = enum.auto()


@dataclass
class GenerationConfig:
    """How to generate. Greedy unless ``do_sample``; then ``temperature`` 0.8 and ``top_k`` 50 by default.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    n: int = 1
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    logprob_start_len: int = -1
    response_format: dict[str, Any] | None = None
    logits_processors: list[Any] | None = None
    output_logits: Literal["all", "generation"] | None = None
    output_last_hidden_state: Literal["all", "generation"] | None = None
    include_stop_str_in_output: bool = False
    return_ppl: bool = False
    with_cache: bool = False
    preserve_cache: bool = False
    migration_request: Any = None
    return_routed_experts: bool = False
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0

    def __post_init__(self) -> None:
        _require(type(self.n) is int and self.n > 0, "n", "an int > 0", self.n)
        _require(0 <= self.top_p <= 1, "top_p", "in [0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k", ">= 0", self.top_k)
        _require(0 <= self.temperature <= 2, "temperature", "in [0, 2]", self.temperature)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(self.logprob_start_len >= -1, "logprob_start_len", ">= -1", self.logprob_start_len)
        if self.repetition_ngram_size <= 0 or self.repetition_ngram_threshold <= 0:
            self.repetition_ngram_size = self.repetition_ngram_threshold = 0


@dataclass
class KVTransferConfig:
    """Connects LMDeploy's PyTorch engine to an external cache."""

    kv_connector: str | None = None
    kv_role: Literal["kv_producer", "kv_consumer", "kv_both"] | None = None
    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = (self.kv_connector is None) == (self.kv_role is None)
        _require(both, "kv_role", "given together with kv_connector", self.kv_role)
        roles = (None, "kv_producer", "kv_consumer", "kv_both")
        _require(self.kv_role in roles, "kv_role", "'kv_producer', 'kv_consumer' or 'kv_both'", self.kv_role)


@dataclass
class TurbomindEngineConfig:
    """The options of LMDeploy's TurboMind engine.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    dtype: str = "auto"
    gemm_input_dtype: str | None = None
    model_format: str | None = None
    tp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    device_num: int | None = None
    attn_tp_size: int | None = None
    attn_cp_size: int | None = None
    attn_dp_size: int | None = None
    mlp_tp_size: int | None = None
    mlp_dp_size: int | None = None
    outer_dp_size: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    devices: list[int] | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_chunk_size: int = -1
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = False
    cache_checkpoint_interval: int = 4096
    cache_prompt: str = "auto"
    cache_prompt_boundary_skip: int = 1
    cache_generation: str = "auto"
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    download_dir: str | None = None
    revision: str | None = None
    max_prefill_token_num: int = 8192
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    async_: int = 1
    empty_init: bool = False
    language_model_only: bool = False
    communicator: str = "nccl"
    moe_a2a_backend: str = "auto"
    hf_overrides: dict[str, Any] | None = None
    enable_metrics: bool = True

    def __post_init__(self) -> None:
        _check_common(self)
        count = self.cache_max_entry_count
        _require(count > 0, "cache_max_entry_count", "a share in (0, 1), or an int > 0 of blocks", count)


@dataclass
class PytorchEngineConfig:
    """The options of LMDeploy's PyTorch engine. ``thread_safe`` may be given; a pipeline of ours always is.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    dtype: str = "auto"
    tp: int = 1
    dp: int = 1
    dp_rank: int = 0
    ep: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    attn_tp_size: int | None = None
    mlp_tp_size: int | None = None
    moe_tp_size: int | None = None
    cache_max_entry_count: float = 0.8
    prefill_interval: int = 16
    block_size: int = 64
    kernel_block_size: int = -1
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0
    adapters: dict[str, str] | None = None
    max_prefill_token_num: int = 8192
    cudagraph_capture_batch_sizes: list[int] | None = None
    thread_safe: bool = False
    enable_prefix_caching: bool = False
    prefix_cache_state_budget: int = 0
    prefix_cache_decode_state_interval: int = 0
    device_type: str = "cuda"
    eager_mode: bool = False
    custom_module_map: dict[str, str] | None = None
    download_dir: str | None = None
    revision: str | None = None
    quant_policy: QuantPolicy | int = QuantPolicy.NONE
    distributed_executor_backend: str | None = None
    empty_init: bool = False
    enable_microbatch: bool = False
    enable_eplb: bool = False
    enable_mp_engine: bool = False
    mp_engine_backend: str = "mp"
    model_format: str | None = None
    enable_metrics: bool = True
    hf_overrides: dict[str, Any] | None = None
    language_model_only: bool = False
    logprobs_mode: str | None = None
    enable_return_routed_experts: bool = False
    enable_transfer_obj_ref: bool = False
    dllm_block_length: int | None = None
    dllm_unmasking_strategy: str = "low_confidence_dynamic"
    dllm_denoising_steps: int | None = None
    dllm_confidence_threshold: float = 0.85
    role: EngineRole = EngineRole.Hybrid
    migration_backend: MigrationBackend = MigrationBackend.DLSlime
    kv_transfer_config: KVTransferConfig | dict[str, Any] | None = None
    piecewise_cudagraph_max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.kernel_block_size == -1:
            self.kernel_block_size = self.block_size
        _check_common(self)
        share = self.cache_max_entry_count
        _require(0 < share < 1, "cache_max_entry_count", "in (0, 1)", share)
        _require(self.num_gpu_blocks >= 0, "num_gpu_blocks", ">= 0", self.num_gpu_blocks)
        devices = ("cuda", "ascend", "maca", "camb")
        _require(self.device_type in devices, "device_type", f"one of {', '.join(devices)}", self.device_type)
        if isinstance(self.kv_transfer_config, dict):
            self.kv_transfer_config = KVTransferConfig(**self.kv_transfer_config)


@dataclass
class VisionConfig:
    """How images are batched; ``thread_safe`` may be given."""

    max_batch_size: int = 1
    thread_safe: bool = False


@dataclass
class SpeculativeConfig:
    """Speculative decoding in LMDeploy."""

    method: str
    model: str = ""
    num_speculative_tokens: int = 1
    dflash_block_size: int | None = None


@dataclass
class Response:
    """An answer, or a part of one from ``stream_infer``.

    Attributes:
        text: the answer, or what this part adds.
        generate_token_len: tokens generated so far, without the end token.
        input_token_len: tokens of the prompt, the chat template's included; an engine of your own that does not report
            them sets this only in the last part.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; None in a part that is not the last.
        token_ids: the tokens of ``text``.
        logprobs: per token id of the answer, token id to log-probability; None unless requested.
        index: position of the prompt in the given list.
        error_code, error_message: the reason, if ``finish_reason`` is ``error``.
        logits, last_hidden_state, routed_experts, cached_tokens: set by LMDeploy's engine, in the last part.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    finish_reason: Literal["stop", "length", "error", "abort"] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    logits: Any = None
    last_hidden_state: Any = None
    index: int = 0
    routed_experts: Any = None
    cached_tokens: int = 0
    error_code: str | None = None
    error_message: str | None = None

    def extend(self, other: Response) -> Response:
        """Append the next part of the same answer to this one, and return this one."""
        self.text += other.text
        self.token_ids = [*self.token_ids, *other.token_ids]
        if other.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *other.logprobs]
        for name in _LATEST:
            setattr(self, name, getattr(other, name))
        return self

    def __str__(self) -> str:
        return f"text={self.text}\n{self._facts()}"

    def __repr__(self) -> str:
        return f"text={self.text!r}\n{self._facts()}"

    def _facts(self) -> str:
        return "\n".join(
            f'{name}="{self.finish_reason}"' if name == "finish_reason" else f"{name}={getattr(self, name)}"
            for name in _SHOWN
        )


_LATEST = (
    "generate_token_len", "input_token_len", "finish_reason", "index", "routed_experts", "error_code", "error_message",
    "logits", "last_hidden_state", "cached_tokens",
)  # fmt: skip
_SHOWN = (
    "input_token_len", "generate_token_len", "finish_reason", "token_ids", "logprobs", "logits", "last_hidden_state",
    "routed_experts",
)  # fmt: skip


def _check_common(config: TurbomindEngineConfig | PytorchEngineConfig) -> None:
    _require(config.dtype in ("auto", "float16", "bfloat16"), "dtype", "auto, float16 or bfloat16", config.dtype)
    for name in ("tp", "dp", "ep"):
        value = getattr(config, name)
        _require(value >= 1, name, "an int >= 1", value)
    tokens = config.max_prefill_token_num
    _require(tokens >= 0, "max_prefill_token_num", ">= 0", tokens)
    policies = {int(policy) for policy in QuantPolicy}
    _require(config.quant_policy in policies, "quant_policy", f"one of {sorted(policies)}", config.quant_policy)
    config.quant_policy = QuantPolicy(config.quant_policy)


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise AssertedError(f"{name} must be {expected}, not {value!r}.", param=name)
