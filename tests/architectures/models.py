"""Tiny random models of many architectures, and how the engine is to serve each.

Rule: data, and what makes models of it; nothing here runs one. A model has the layers of the real one in small, and
what is special about it is so narrow (a window of 16 tokens, positions scaled from 64 on) that the prompts of
``asking`` cross it. Its logits are so far apart that rounding decides no token.

Left out: decoders cut out of encoder-decoders, encoders that can be set up as decoders, models that need more than
token ids (XLNet, XLM, Reformer, CPM-Ant, BLT), and classes that do what another one in the table does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engines.conftest import EOS, byte_level_tokenizer

WINDOW = 16
"""Tokens that a sliding window shows."""
ORIGINAL = 64
"""Positions that a model with scaled ones was trained on."""
SHARPNESS = 8.0
"""What the output head is multiplied by."""
VOCABULARY = 264

Runner = Literal["paged", "plain"]


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        name: the test's id.
        kind: ``model_type`` in its config.json.
        runner: which one is to serve it.
        settings: of its configuration.
        about: what is special about it, for the table.
        without: settings under which the special thing is gone, and with it some answer.
        attention: the attention that defines what is right.
        seed: of the weights.
    """

    name: str
    kind: str
    runner: Runner
    settings: Mapping[str, Any]
    about: str = ""
    without: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "eager"
    seed: int = 0


@dataclass(frozen=True)
class Refused:
    """A model that is no causal language model.

    Attributes:
        kind: ``model_type`` in its config.json, and the test's id.
        model: the name of its class.
        why: what the error is to say.
        settings: of its configuration.
    """

    kind: str
    model: str
    why: str
    settings: Mapping[str, Any]


def save(architecture: Architecture, folder: Path) -> str:
    """Make the model and save it with a tokenizer; the folder."""
    torch.manual_seed(architecture.seed)
    model = transformers.AutoModelForCausalLM.from_config(configuration(architecture.kind, architecture.settings))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(SHARPNESS)
        head.weight[EOS].zero_()  # ends no answer by chance
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def save_refused(refused: Refused, folder: Path) -> str:
    """Make the model that is to be refused and save it with a tokenizer; the folder."""
    model = getattr(transformers, refused.model)(configuration(refused.kind, refused.settings))
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def configuration(kind: str, settings: Mapping[str, Any]) -> Any:
    """A configuration.

    Raises:
        TypeError: it does not know a setting. transformers would keep it as an attribute that nobody reads.
    """
    made = CONFIG_MAPPING[kind]
    known = {*made().to_dict(), *made.attribute_map}
    if unknown := [name for name in settings if name not in known]:
        raise TypeError(f"{made.__name__} knows no {', '.join(unknown)}.")
    return made(**settings)


# ----------------------------------------------------------------------------------------------------------- the shapes

_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}
_COMMON: dict[str, Any] = {**_ENDS, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
_HEADS: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
_LLAMA: dict[str, Any] = {**_HEADS, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    **_COMMON,
    "n_positions": 512,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
}
_MAMBA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_SLIDING = ["sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention"]
_WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _SLIDING}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA_LAYERS: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
}
_WIDE = {"sliding_window": 512}
"""A window that shows everything."""


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _yarn(**settings: Any) -> dict[str, Any]:
    return _rope("yarn", factor=8.0, original_max_position_embeddings=ORIGINAL, **settings)


_LLAMA3 = _rope(
    "llama3", factor=8.0, original_max_position_embeddings=ORIGINAL, low_freq_factor=1.0, high_freq_factor=4.0
)
_LONGROPE = _rope(
    "longrope",
    partial_rotary_factor=1.0,
    short_factor=[1.0] * 8,
    long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    original_max_position_embeddings=ORIGINAL,
)
_UNSCALED = _rope("default")


_SEEDS = {
    "bamba": 2,
    "bloom": 2,
    "codegen": 1,
    "ctrl": 1,
    "cwm": 1,
    "ernie4_5": 2,
    "falcon": 1,
    "falcon-alibi": 1,
    "falcon_mamba": 1,
    "gemma3": 1,
    "gemma3-vision": 14,
    "gemma4": 1,
    "glm4": 2,
    "gpt_neo": 2,
    "gptj": 2,
    "granitemoehybrid": 3,
    "hunyuan_v1_dense": 2,
    "lfm2": 5,
    "lfm2_moe": 2,
    "llama4": 2,
    "mamba2": 2,
    "mimo_v2_flash": 1,
    "minicpm3": 8,
    "minimax": 1,
    "mpt": 4,
    "openai-gpt": 1,
    "persimmon": 5,
    "phi3": 1,
    "qwen3": 2,
    "qwen3_5": 8,
    "recurrent_gemma": 5,
    "rwkv": 3,
    "starcoder2": 2,
    "xlstm": 3,
    "zamba2": 1,
}
"""Seeds other than 0, for models that would find two tokens nearly equally likely, or answer all prompts alike."""


def _row(
    name: str,
    runner: Runner,
    shape: Mapping[str, Any] = _LLAMA,
    settings: Mapping[str, Any] | None = None,
    *,
    kind: str = "",
    about: str = "",
    without: Mapping[str, Any] | None = None,
    attention: str = "eager",
) -> Architecture:
    both = {**shape, **(settings or {})}
    return Architecture(name, kind or name, runner, both, about, without or {}, attention, _SEEDS.get(name, 0))


# --------------------------------------------------------------------------------------------------------- the rows

DENSE = [
    _row("llama", "paged"),
    _row("apertus", "paged", settings=_LLAMA3),
    _row("arcee", "paged"),
    _row("bitnet", "paged"),
    _row("cohere", "paged", settings={"logit_scale": 1.0}),
    _row("diffllama", "paged", settings={"head_dim": 16}),
    _row("doge", "paged"),
    _row("ernie4_5", "paged", settings={"head_dim": 16}),
    _row("gemma", "paged", settings={"head_dim": 16}),
    _row("glm", "paged", settings={"head_dim": 16}),
    _row("glm4", "paged", settings={"head_dim": 16}),
    _row("granite", "paged", settings={"attention_multiplier": 0.25}),
    _row("helium", "paged", settings={"head_dim": 16}),
    _row("hunyuan_v1_dense", "paged", settings={"head_dim": 16}),
    _row("nanochat", "paged", settings={"final_logit_softcapping": None}),
    _row("nemotron", "plain", settings={"head_dim": 16}),
    _row("olmo", "paged"),
    _row("olmo2", "paged"),
    _row("persimmon", "paged", _HEADS),
    _row("phi", "paged"),
    _row("phi3", "paged", settings={"original_max_position_embeddings": 512}),
    _row("qwen2", "paged"),
    _row("qwen3", "paged", settings={"head_dim": 16}),
    _row("seed_oss", "paged", settings={"head_dim": 16}),
    _row("smollm3", "paged", settings={"num_hidden_layers": 4}),
    _row("stablelm", "plain"),
]

POSITIONS = [
    _row(
        "llama-dynamic",
        "plain",
        settings={"max_position_embeddings": ORIGINAL, **_rope("dynamic", factor=8.0)},
        kind="llama",
        about="dynamic NTK",
        without=_UNSCALED,
    ),
    _row("llama-linear", "paged", settings=_rope("linear", factor=4.0), kind="llama", about="linear scaling"),
    _row("llama-llama3", "paged", settings=_LLAMA3, kind="llama", about="Llama 3 scaling", without=_UNSCALED),
    _row("llama-yarn", "paged", settings=_yarn(), kind="llama", about="YaRN", without=_UNSCALED),
    _row(
        "ministral3",
        "paged",
        settings={"head_dim": 16, **_yarn(llama_4_scaling_beta=0.1)},
        about="YaRN",
        without=_rope("default", llama_4_scaling_beta=0.0, original_max_position_embeddings=ORIGINAL),
    ),
    _row(
        "phi3-longrope",
        "plain",
        settings={"original_max_position_embeddings": ORIGINAL, **_LONGROPE},
        kind="phi3",
        about="LongRoPE",
        without={"original_max_position_embeddings": 512, **_UNSCALED},
    ),
]

WINDOWS = [
    _row("cohere2", "paged", settings={"head_dim": 16, "logit_scale": 1.0, **_WINDOWS}, without=_WIDE),
    _row(
        "cwm",
        "paged",
        settings={
            "head_dim": 16,
            "bos_token_id": EOS,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        without=_WIDE,
    ),
    _row("exaone4", "paged", settings={"sliding_window_pattern": 2, **_WINDOWS}, without=_WIDE),
    _row(
        "gemma2",
        "plain",
        settings={
            "head_dim": 16,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": None,
            **_WINDOWS,
        },
        about="soft cap on attention",
        without={"attn_logit_softcapping": None},
    ),
    _row("gemma3", "paged", settings={"head_dim": 16, **_WINDOWS}, kind="gemma3_text", without=_WIDE),
    _row(
        "gemma3n",
        "paged",
        settings={
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": [128] * 4,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING * 2,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "activation_sparsity_pattern": [0.5] * 4,
            "final_logit_softcapping": 1000.0,
        },
        kind="gemma3n_text",
        about="layers that share keys and values",
        without=_WIDE,
    ),
    _row(
        "gemma4",
        "plain",
        settings={
            "head_dim": 16,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "per_layer_config": {"1": {"head_dim": 32}},
            **_WINDOWS,
        },
        kind="gemma4_text",
        about="heads of two sizes",
        without=_WIDE,
    ),
    _row(
        "gemma3-vision",
        "paged",
        {
            "text_config": {**_LLAMA, "head_dim": 16, **_WINDOWS},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 16,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 260,
            "eoi_token_index": 261,
            "image_token_index": 262,
            "tie_word_embeddings": False,
        },
        kind="gemma3",
        about="reads pictures too; asked for text alone",
    ),
    _row(
        "llama4",
        "plain",
        settings={
            "head_dim": 16,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        kind="llama4_text",
        about="attention in chunks",
        without={"attention_chunk_size": 512},
    ),
    _row("ministral", "paged", settings={"head_dim": 16, **_WINDOWS}, without=_WIDE),
    _row("mistral", "paged", settings={"head_dim": 16, "sliding_window": WINDOW}, without=_WIDE),
    _row(
        "modernbert-decoder",
        "paged",
        _HEADS,
        {
            "local_attention": 2 * WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
            **dict.fromkeys(("bos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"), EOS),
        },
        without=_WIDE,
    ),
    _row("olmo3", "paged", settings=_WINDOWS, without=_WIDE),
    _row(
        "qwen2-window",
        "paged",
        settings={
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        kind="qwen2",
        about="sliding window",
        without=_WIDE,
    ),
    _row("starcoder2", "paged", settings={"sliding_window": WINDOW}, without=_WIDE),
    _row(
        "vaultgemma",
        "plain",
        settings={
            "head_dim": 16,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": None,
            **_WINDOWS,
        },
        about="soft cap on attention",
        without={"attn_logit_softcapping": None},
    ),
]

EXPERTS = [
    _row(
        "dbrx",
        "paged",
        {
            **_COMMON,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "initializer_range": 0.2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    _row(
        "dots1",
        "paged",
        settings={
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "max_window_layers": 1,
            **_ROUTED_EXPERTS,
            **_WINDOWS,
        },
        without=_WIDE,
    ),
    _row(
        "ernie4_5_moe",
        "paged",
        settings={"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1},
    ),
    _row("flex_olmo", "paged", settings=_EXPERTS),
    _row("glm4_moe", "paged", settings={"first_k_dense_replace": 1, **_ROUTED_EXPERTS}),
    _row(
        "gpt_oss",
        "paged",
        settings={"head_dim": 16, **_LOCAL_EXPERTS, **_WINDOWS, **_yarn(truncate=False)},
        about="attention sinks, YaRN",
        without=_WIDE,
    ),
    _row("granitemoe", "paged", settings={"attention_multiplier": 0.25, **_LOCAL_EXPERTS}),
    _row("hunyuan_v1_moe", "paged", settings={"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    _row(
        "jetmoe",
        "paged",
        {name: value for name, value in _LLAMA.items() if name != "num_attention_heads"},
        {"kv_channels": 16, **_LOCAL_EXPERTS},
    ),
    _row(
        "mimo_v2_flash",
        "plain",
        settings={
            "head_dim": 16,
            "v_head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            **_ROUTED_EXPERTS,
        },
        without=_WIDE,
    ),
    _row("minimax_m2", "paged", settings={"head_dim": 16, **_LOCAL_EXPERTS}),
    _row("mixtral", "paged", settings=_LOCAL_EXPERTS),
    _row("olmoe", "paged", settings=_EXPERTS),
    _row("phimoe", "paged", settings=_LOCAL_EXPERTS),
    _row(
        "qwen2_moe",
        "paged",
        settings={"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **_EXPERTS},
    ),
    _row("qwen3_moe", "paged", settings={"moe_intermediate_size": 32, **_EXPERTS}),
]

LATENT = [
    _row(
        "deepseek_v2",
        "plain",
        settings={
            "head_dim": 8,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            **_ROUTED_EXPERTS,
            **_LATENT,
        },
    ),
    _row(
        "deepseek_v3",
        "plain",
        settings={"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **_ROUTED_EXPERTS, **_LATENT},
    ),
    _row(
        "longcat_flash",
        "plain",
        {name: value for name, value in _LLAMA.items() if name not in ("num_hidden_layers", "intermediate_size")},
        {
            "num_layers": 1,
            "head_dim": 8,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            **_LATENT,
        },
    ),
    _row("minicpm3", "plain", settings=_LATENT),
]

OLDER = [
    _row("biogpt", "plain", _HEADS, {"pad_token_id": 1}),
    _row(
        "bloom",
        "plain",
        {**_COMMON, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        about="ALiBi",
    ),
    _row("codegen", "paged", {k: v for k, v in _GPT.items() if k != "pad_token_id"}, {"rotary_dim": 8, "n_ctx": 512}),
    _row("ctrl", "plain", _GPT, {"dff": 128}),
    _row("falcon", "plain", {k: v for k, v in _HEADS.items() if k != "intermediate_size"}, {"ffn_hidden_size": 128}),
    _row(
        "falcon-alibi",
        "plain",
        {k: v for k, v in _HEADS.items() if k != "intermediate_size"},
        {"ffn_hidden_size": 128, "alibi": True},
        kind="falcon",
        about="ALiBi",
        without={"alibi": False},
        attention="sdpa",  # the eager one adds the bias twice
    ),
    _row("gpt2", "paged", _GPT),
    _row("gpt_bigcode", "paged", _GPT),
    _row(
        "gpt_neo",
        "plain",
        {
            **{k: v for k, v in _COMMON.items() if k != "pad_token_id"},
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
        },
        without={"window_size": 512},
    ),
    _row("gpt_neox", "plain", _HEADS),
    _row("gptj", "paged", _GPT, {"rotary_dim": 8}),
    _row(
        "mpt",
        "plain",
        {
            **_COMMON,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 512,
            "initializer_range": 0.2,
        },
        about="ALiBi",
    ),
    _row("openai-gpt", "plain", _GPT, {"initializer_range": 0.5}, about="no cache"),
    _row(
        "opt",
        "plain",
        {k: v for k, v in _HEADS.items() if k not in ("initializer_range", "intermediate_size")},
        {"ffn_dim": 128, "init_std": 0.2, "word_embed_proj_dim": 64, "pad_token_id": 1},
    ),
    _row(
        "xglm",
        "plain",
        {
            **_COMMON,
            "d_model": 64,
            "ffn_dim": 128,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 512,
            "init_std": 0.2,
            "pad_token_id": 1,
        },
    ),
]

RECURRENT = [
    _row("mamba", "plain", _MAMBA),
    _row("mamba2", "plain", _MAMBA, {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 32}),
    _row("falcon_mamba", "plain", _MAMBA),
    _row(
        "rwkv",
        "plain",
        {
            **{k: v for k, v in _COMMON.items() if k != "pad_token_id"},
            "context_length": 512,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
        },
    ),
    _row(
        "xlstm",
        "plain",
        {
            **_COMMON,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "qk_dim_factor": 1.0,
            "chunk_size": 16,
        },
    ),
]

HYBRID = [
    _row("bamba", "plain", settings={"attn_layer_indices": [1], **_MAMBA_LAYERS}),
    _row("falcon_h1", "plain", settings={"mamba_d_ssm": 128, **_MAMBA_LAYERS}),
    _row(
        "granitemoehybrid",
        "plain",
        settings={
            "attention_multiplier": 0.25,
            "num_local_experts": 4,
            "shared_intermediate_size": 64,
            "layer_types": _LINEAR,
            **_MAMBA_LAYERS,
        },
    ),
    _row(
        "jamba",
        "plain",
        settings={
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    _row(
        "kimi_linear",
        "plain",
        {name: value for name, value in _HEADS.items() if name != "max_position_embeddings"},
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "layer_types": _LINEAR,
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    _row(
        "lfm2",
        "plain",
        settings={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    _row(
        "lfm2_moe",
        "plain",
        settings={
            "layer_types": ["conv", "full_attention"],
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            **_EXPERTS,
        },
    ),
    _row("minimax", "plain", settings={"num_local_experts": 4, "layer_types": _LINEAR, "block_size": 32}),
    _row(
        "nemotron_h",
        "plain",
        {name: value for name, value in _LLAMA.items() if name != "num_hidden_layers"},
        {
            "head_dim": 16,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 32,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    _row(
        "olmo_hybrid",
        "plain",
        settings={**_DELTA, "linear_num_key_heads": 4, "layer_types": _LINEAR},
    ),
    _row("qwen3_5", "plain", settings={"head_dim": 16, "layer_types": _LINEAR, **_DELTA}, kind="qwen3_5_text"),
    _row(
        "qwen3_next",
        "plain",
        settings={
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": _LINEAR,
            **_DELTA,
            **_EXPERTS,
        },
    ),
    _row(
        "recurrent_gemma",
        "plain",
        {k: v for k, v in _LLAMA.items() if k not in ("initializer_range", "max_position_embeddings")},
        {
            "num_hidden_layers": 3,
            "lru_width": 64,
            "head_dim": 16,
            "attention_window_size": WINDOW,
            "logits_soft_cap": 1000.0,
        },
        about="one request after another",
        without={"attention_window_size": 512},
    ),
    _row(
        "zamba",
        "plain",
        settings={
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    _row(
        "zamba2",
        "plain",
        settings={
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_d_state": 16,
            "chunk_size": 32,
            "use_mamba_kernels": False,
        },
    ),
]


def _all() -> list[Architecture]:
    groups = {
        "": [*DENSE, *POSITIONS, *OLDER],
        "sliding window": WINDOWS,
        "experts": EXPERTS,
        "latent attention": LATENT,
        "a state, no attention": RECURRENT,
        "a state and attention": HYBRID,
    }
    return [replace(row, about=row.about or about) for about, rows in groups.items() for row in rows]


ARCHITECTURES = _all()

REFUSED = [
    Refused(
        "t5",
        "T5ForConditionalGeneration",
        "encoder-decoder",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 1,
            "num_heads": 4,
            "eos_token_id": EOS,
        },
    ),
    Refused(
        "bart",
        "BartForConditionalGeneration",
        "encoder-decoder",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
    ),
    Refused(
        "bert",
        "BertForMaskedLM",
        "encoder",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
    ),
    Refused(
        "distilbert",
        "DistilBertForMaskedLM",
        "no causal language model",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64},
    ),
    Refused(
        "llava",
        "LlavaForConditionalGeneration",
        "no causal language model",
        {
            "text_config": {**_LLAMA, "model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "projection_dim": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 262,
        },
    ),
]
