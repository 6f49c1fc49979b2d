"""GGUF files made on the spot: the bundled model, and small random encoders.

Rule: no test framework and no lmbridge engine here. ``gguf`` writes the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file

from lmbridge.engines.models import DEMO_FOLDER

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{letter}" for letter in "abcdefgh"))


def write_demo(path: Path, *, template: str | None = None, bare: bool = False, architecture: str = "llama") -> str:
    """The bundled model as a GGUF file, with its own chat template, another, or none."""
    config = json.loads((DEMO_FOLDER / "config.json").read_text("utf-8"))
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    _add_bpe(writer, config)
    if not bare:
        writer.add_chat_template(template or (DEMO_FOLDER / "chat_template.jinja").read_text("utf-8"))
    for name, weight in load_file(DEMO_FOLDER / "model.safetensors").items():
        writer.add_tensor(*_llama_tensor(name, weight.astype(numpy.float32), config))
    return _written(writer, path)


def _add_bpe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    saved = json.loads((DEMO_FOLDER / "tokenizer.json").read_text("utf-8"))
    special = {token["id"]: token["content"] for token in saved["added_tokens"]}
    names = {**{number: token for token, number in saved["model"]["vocab"].items()}, **special}
    tokens = [names.get(number, f"<unused {number}>") for number in range(config["vocab_size"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # digits one by one, then the words of GPT-2
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if number in special else TokenType.NORMAL for number in range(len(tokens))]
    )
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)


def _llama_tensor(name: str, weight: Any, config: dict[str, Any]) -> tuple[str, Any]:
    name = name.removeprefix("model.")
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name], weight
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    if part.endswith(("q_proj", "k_proj")):  # llama.cpp turns pairs of neighbours
        heads = config["num_attention_heads"]
        rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        weight = rows.swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{_NAMES[part]}.weight", weight


def write_encoder(path: Path, *, scores: bool = False, context: int = 512, width: int = 64) -> str:
    """A random BERT: one that makes vectors, or one that scores pairs."""
    random = numpy.random.default_rng(7)
    writer = GGUFWriter(path, "bert")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", 4 if scores else 1)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(list(WORDS))
    writer.add_token_type_count(2)
    writer.add_token_types([TokenType.CONTROL] * 5 + [TokenType.NORMAL] * (len(WORDS) - 5))
    for kind, number in (("padding", 0), ("unknown", 1), ("bos", 2), ("cls", 2), ("seperator", 3), ("mask", 4)):
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", number)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(numpy.float32))

    def biased(name: str, rows: int, columns: int) -> None:
        add(name, rows, columns)
        writer.add_tensor(f"{name}.bias", random.normal(0, 0.3, rows).astype(numpy.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(width, numpy.float32))
        writer.add_tensor(f"{name}.bias", numpy.zeros(width, numpy.float32))

    add("token_embd", len(WORDS), width)
    add("token_types", 2, width)
    add("position_embd", context, width)
    norm("token_embd_norm")
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        biased(f"blk.0.{part}", width, width)
    norm("blk.0.attn_output_norm")
    biased("blk.0.ffn_up", 2 * width, width)
    biased("blk.0.ffn_down", width, 2 * width)
    norm("blk.0.layer_output_norm")
    if scores:
        biased("cls", width, width)
        biased("cls.output", 1, width)
    return _written(writer, path)


def _written(writer: GGUFWriter, path: Path) -> str:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
