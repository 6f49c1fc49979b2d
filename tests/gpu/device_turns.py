"""Several models on one GPU: does a stream keep its pace beside a large job, and is the memory that is counted there?

A language model of random weights in the shape of Llama 3.2 1B, with a tokenizer made on the spot, streams beside a job
that embeds by matrix products of an encoder's size, or by a real one (``--embed MODEL``). Nothing is fetched. One call
does all:

- turns: the stream's time between tokens and the job's texts a second, alone, together with turns and without them.
  With turns the 99th percentile is to stay within twice that of the stream alone;
- memory: what the engine estimates and says it holds, beside what torch has allocated; to be within a tenth;
- room: two such models on a device that is told to have room for one of them answer in turn, and the memory of the one
  that was unloaded is given back.

It prints tables, writes ``device_turns.json`` and exits 1 when one of these does not hold. ``--tiny`` proves on a CPU
that the script works; its figures say nothing.

Run: ``python -m tests.gpu.device_turns [--seconds 10] [--rounds 5] [--embed MODEL] [--out FOLDER] [--tiny]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from lmbridge import Bridge, Device
from tests.benchmarks.device_turns import TEXT, Result, job_alone, stream, together
from tests.benchmarks.measure import interleave, print_table
from tests.device.embedding import Products
from tests.engines.conftest import EOS, byte_level_tokenizer

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCKS = 16  # pages of the cache, so that it takes no more than it needs
TENTH = 0.1


class Trial:
    """The models, and what did not hold."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.seconds: float = 0.5 if arguments.tiny else arguments.seconds
        self.rounds: int = 1 if arguments.tiny else arguments.rounds
        self.device = "cpu" if arguments.tiny else "cuda:0"
        self.width = 64 if arguments.tiny else 2048
        self.embed: str | None = arguments.embed
        self.faults: list[str] = []
        self.facts: dict[str, Any] = {}
        self.model = str(folder)
        self._save(folder, SMALL if arguments.tiny else LARGE)

    def hold(self, fact: str, holds: bool) -> None:
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {fact}", flush=True)
        if not holds:
            self.faults.append(fact)

    def bridge(self, device: Device) -> Bridge:
        """The language model on a device."""
        return Bridge(self.model, device=device, num_blocks=BLOCKS, max_batch_size=4, runner="paged")

    # --- turns ---

    def turns(self) -> None:
        shared = Device(self.device)
        with self.bridge(shared) as model, self._encoder(shared) as beside, self._encoder(Device(self.device)) as apart:
            for bridge in (beside, apart):
                self._embed(bridge, 64)
            model.infer("warm up", max_new_tokens=8)
            candidates = {
                "stream alone": partial(stream, model, self.seconds),
                "job alone": partial(job_alone, beside, self._embed, self.seconds),
                "with turns": partial(together, model, beside, self._embed, self.seconds),
                "without turns": partial(together, model, apart, self._embed, self.seconds),
            }
            results = interleave(candidates, self.rounds)
        print_table("in brackets: to the stream alone", results, "stream alone")
        self.facts["turns"] = {name: [vars(result) for result in rounds] for name, rounds in results.items()}
        alone, with_turns = (_median(results[name]) for name in ("stream alone", "with turns"))
        ratio = with_turns / alone
        self.hold(f"beside the job the 99th percentile between tokens is {ratio:.2f} times that alone (2)", ratio <= 2)

    def _encoder(self, device: Device) -> Bridge:
        if self.embed:
            return Bridge(self.embed, "encoder", device=device)
        return Bridge(lambda: Products(self.width, self.device), device=device)

    def _embed(self, bridge: Bridge, count: int) -> object:
        return bridge.embed([TEXT] * count) if self.embed else bridge.map([len(TEXT.split())] * count)

    # --- memory ---

    def memory(self) -> int:
        """What the model was said to need."""
        before = self._allocated()
        device = Device(self.device)
        with self.bridge(device) as bridge:
            engine = bridge._server_thread.engine
            assert engine is not None
            estimate, footprint = engine.estimate() or 0, engine.footprint() or 0
            allocated = self._allocated() - before
        self.facts["memory"] = {"estimate": estimate, "footprint": footprint, "allocated": allocated}
        print(self.facts["memory"], flush=True)
        self.hold("the estimate is within a tenth of the footprint", abs(estimate / footprint - 1) < TENTH)
        if self.device != "cpu":
            self.hold("the footprint is within a tenth of what is allocated", abs(footprint / allocated - 1) < TENTH)
            left = self._allocated() - before
            self.hold(f"{left} bytes are left after the end", left < TENTH * footprint)
        return max(estimate, footprint)

    def room(self, size: int) -> None:
        """Two models, and room for one."""
        device, before, most = Device(self.device, memory=size * 3 // 2), self._allocated(), 0
        with self.bridge(device) as one, self.bridge(device) as two:
            for number in range(6):
                (one, two)[number % 2].infer("hello", max_new_tokens=4)
                most = max(most, self._allocated() - before)
            status = device.status()
        print(status, flush=True)
        self.hold(f"each call has loaded its model ({status.loads - 2})", status.loads == 2 + 6)
        if self.device != "cpu":
            self.hold(f"never more than one was there ({most} bytes)", most < (1 + TENTH) * size)

    def _allocated(self) -> int:
        return 0 if self.device == "cpu" else torch.cuda.memory_allocated(self.device)

    def _save(self, folder: Path, shape: dict[str, int]) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **shape,
            vocab_size=264,
            num_key_value_heads=shape["num_attention_heads"] // 4,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=None,
        )
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        byte_level_tokenizer().save_pretrained(folder)


def _median(results: list[Result]) -> float:
    return statistics.median(result.p99_ms for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--embed", help="a model for the encoder engine instead of matrix products")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(arguments, Path(folder))
        trial.turns()
        trial.room(trial.memory())
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"faults": trial.faults, "facts": trial.facts, "torch": torch.__version__}
    (arguments.out / "device_turns.json").write_text(json.dumps(report, indent=1), "utf-8")
    sys.exit(1 if trial.faults and not arguments.tiny else 0)


if __name__ == "__main__":
    main()
