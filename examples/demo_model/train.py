"""Trains the demo model and writes it as a transformers folder.

The rule of this module: one command makes the folder from nothing but this source, the seed and a CPU.
The chats come from ``chats``, the accuracy in the model card from ``evaluate`` on the written folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import evaluate
import torch
from chats import Chat, training_chats
from safetensors.torch import save_file
from tokenizer import ASSISTANT, END, SYSTEM, USER, train_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

REPOSITORY = Path(__file__).resolve().parents[2]
CONTEXT = 1024
VOCABULARY = 3072
WARM_UP_STEPS = 100
# With the usual 0.02 a model of this width takes several times as long to find out how sums work.
FIRST_WEIGHTS = 0.06
START_NOTE = "\nThe polish was a run of its own (`--start`), from the float16 weights of the other steps.\n"
# Stories have many tokens and much chance in them, so each of their tokens counts less than a fact's.
TOKEN_WEIGHTS = {"story": 0.6, "sum": 1.5}
# One step in four sees rows as long as the context, the others more and shorter rows.
LONG_ROWS, SHORT_ROWS = (3, CONTEXT), (8, 384)


@dataclass(frozen=True)
class Phase:
    """A part of the training: so many steps under one rise and fall of the learning rate."""

    steps: int
    peak_rate: float
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of a step: a short warm-up, then a cosine down to nothing."""
        if step < WARM_UP_STEPS:
            return self.peak_rate * (step + 1) / WARM_UP_STEPS
        done = (step - WARM_UP_STEPS) / max(1, self.steps - WARM_UP_STEPS)
        return self.peak_rate * (1 + cos(pi * done)) / 2


@dataclass(frozen=True)
class Batch:
    """Token rows, and for every token how much its prediction counts."""

    tokens: Tensor
    weights: Tensor


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh model for the tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=160, intermediate_size=448, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=CONTEXT,
        initializer_range=FIRST_WEIGHTS, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[int, float]]:
    """Every token of a chat with its weight: only what the assistant says counts."""
    pieces = [(f"{SYSTEM}{chat.system}{END}", 0.0)] if chat.system else []
    for turn in chat.turns:
        pieces.append((f"{USER}{turn.text.strip()}{END}{ASSISTANT}", 0.0))
        pieces.append((f"{turn.answer}{END}", TOKEN_WEIGHTS.get(turn.kind, 1.0)))
    for text, weight in pieces:
        yield from ((token, weight) for token in tokenizer.encode(text))


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches of rows; each row is filled with whole chats and cut at its end."""
    chats = training_chats(seed)
    for step in itertools.count():
        count, length = LONG_ROWS if step % 4 == 3 else SHORT_ROWS
        rows = [_row(chats, tokenizer, length) for _ in range(count)]
        tokens, weights = zip(*(zip(*row, strict=True) for row in rows), strict=True)
        yield Batch(torch.tensor(tokens), torch.tensor(weights))


def _row(chats: Iterator[Chat], tokenizer: PreTrainedTokenizerFast, length: int) -> list[tuple[int, float]]:
    """One row of tokens with their weights."""
    row: list[tuple[int, float]] = []
    while len(row) < length:
        row.extend(encode_chat(next(chats), tokenizer))
    return row[:length]


def loss_of(model: Any, batch: Batch, precision: torch.dtype) -> Tensor:
    """The weighted loss over the assistant's tokens."""
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    spoken = weights > 0
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        hidden = model.model(batch.tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[spoken])
    losses = cross_entropy(logits.float(), targets[spoken], reduction="none")
    return (losses * weights[spoken]).sum() / weights[spoken].sum()


def train(model: Any, tokenizer: PreTrainedTokenizerFast, phase: Phase, options: argparse.Namespace) -> None:
    """Train the model in place; measure and write it from time to time."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    started, average = time.monotonic(), 0.0
    for step, batch in enumerate(itertools.islice(batches(tokenizer, phase.seed), phase.steps)):
        for group in optimizer.param_groups:
            group["lr"] = phase.rate(step)
        loss: Any = loss_of(model, batch, getattr(torch, options.precision))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}  loss {average:.4f}  {time.monotonic() - started:.0f} s", flush=True)
        if options.save_every and (step + 1) % options.save_every == 0:
            write_folder(model, tokenizer, options.out, "Training has not finished.")
            _print_measures(model, tokenizer)


def _print_measures(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A glance at the accuracy in the middle of training."""
    model.eval()
    for measure in evaluate.quick_measures(evaluate.Model(model, tokenizer)):
        print(f"  {measure}", flush=True)
    model.train()


def write_folder(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str) -> None:
    """Write the model folder, file by file, so that each is replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-model-") as scratch:
        draft = Path(scratch)
        tokenizer.save_pretrained(draft)
        _write_config(model, draft)
        _write_weights(model, draft / "model.safetensors")
        (draft / "README.md").write_text(card, encoding="utf-8")
        for file in draft.iterdir():
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def _write_config(model: Any, folder: Path) -> None:
    """The configuration; it asks for float32 although the stored weights are half as wide."""
    config = {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    generation = {
        "do_sample": False, "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id, "max_new_tokens": evaluate.STORY_LIMIT,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """The content as readable JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(model: Any, file: Path) -> None:
    """The weights as float16, without the output layer, which is the embedding."""
    weights = {name: weight.detach().half().contiguous() for name, weight in model.state_dict().items()
               if name != "lm_head.weight"}
    save_file(weights, file, metadata={"format": "pt"})


def model_card(model: Any, table: str, options: argparse.Namespace, minutes: float) -> str:
    """The README of the folder."""
    parameters = sum(weight.numel() for weight in model.parameters())
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    return template.format(
        parameters=f"{parameters / 1e6:.1f}", vocabulary=model.config.vocab_size, context=CONTEXT,
        layers=model.config.num_hidden_layers, width=model.config.hidden_size, table=table,
        minutes=f"{minutes:.0f}", note=START_NOTE if options.start else "", **vars(options),
    )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the demo model and write it as a transformers folder with its measured accuracy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "lmbridge" / "demo_model",
                        help="the folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of about 3000 tokens each")
    parser.add_argument("--polish", type=int, default=400, help="further steps at a lower rate")
    parser.add_argument("--start", type=Path, metavar="FOLDER",
                        help="begin with the polish, from a folder that holds the model before it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to use")
    parser.add_argument("--seed", type=int, default=1, help="fixes the data and the first weights")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16",
                        help="number format of the matrix products; float32 is faster on older CPUs")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS",
                        help="write and measure the unfinished model this often; 0 for never")
    return parser.parse_args()


def first_phase(options: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model and its tokenizer after the long phase, or from the folder that holds them already."""
    if options.start:
        model = AutoModelForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        return model.train(), AutoTokenizer.from_pretrained(options.start)
    tokenizer = train_tokenizer(options.seed, VOCABULARY, CONTEXT)
    fresh = build_model(tokenizer, options.seed)
    train(fresh, tokenizer, Phase(options.steps, 3e-3, options.seed), options)
    write_folder(fresh, tokenizer, options.out, "The last phase of the training is missing.")
    return fresh, tokenizer


def main() -> None:
    """Train, write, measure what was written, and put the numbers into the card."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    model, tokenizer = first_phase(options)
    train(model, tokenizer, Phase(options.polish, 1e-3, options.seed + 1), options)
    minutes = (time.monotonic() - started) / 60
    write_folder(model, tokenizer, options.out, "The measurements are under way.")
    table = evaluate.as_table(evaluate.all_measures(evaluate.Model.load(options.out)))
    (options.out / "README.md").write_text(model_card(model, table, options, minutes), encoding="utf-8")
    print(f"\n{table}\n\nTrained in {minutes:.0f} minutes; the model is in {options.out}")


if __name__ == "__main__":
    main()
