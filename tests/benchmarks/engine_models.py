"""A model of a chosen size for the engine's benchmarks: random weights under the bundled tokenizer."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmbridge.engines.models import find_model


@contextlib.contextmanager
def model_folder(hidden: int, layers: int) -> Iterator[str]:
    """The bundled model where ``hidden`` is 0, else a random Llama of this width, as long as it is needed."""
    if not hidden:
        yield find_model("demo")
        return
    with tempfile.TemporaryDirectory() as folder:
        _save_random_llama(Path(folder), hidden, layers)
        yield folder


def _save_random_llama(folder: Path, hidden: int, layers: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_model("demo"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
