"""The LMDeploy engine on a GPU: does it keep its promises there, and what does the bridge cost.

The model is small, has random weights in bfloat16 and a tokenizer made on the spot; nothing is fetched. In one call:

- facts: greedy answers through the bridge are LMDeploy's own token for token; stop words, seeds (the same text alone
  and in a crowd), logprobs, aborts within two steps, memory after ``close()``;
- speed: tokens a second of LMDeploy's async engine by itself and through a bridge with a thread a client.

It prints a table, writes ``lmdeploy_h200.json`` and exits 1 when a fact does not hold. ``--backend turbomind`` asks the
same of TurboMind. ``--scripted`` tries the script itself without a GPU, on the executor of the tests.

Run: ``python -m tests.gpu.lmdeploy_h200 [--backend pytorch] [--clients 1,16,64,256] [--out FOLDER] [--scripted]``
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from lmbridge import Bridge, Response
from lmbridge.engines.lmdeploy import LMDeployEngine
from tests.engines.conftest import EOS, byte_level_tokenizer

LENGTH = 128
ROUNDS = 5
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}


def save_model(folder: Path) -> str:
    """Random weights in the shape of Llama 3.2 1B, a token per byte."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=264,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # LMDeploy asks the GPU about the former
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


class Trial:
    """One model under one backend, asked both ways."""

    def __init__(self, model: str, backend: str, clients: int) -> None:
        self.options: dict[str, Any] = {"backend": backend, "max_batch_size": clients, "cache_share": 0.5}
        self.model = model
        self.prompts = [[(7 * place + step) % 256 for step in range(64)] for place in range(clients)]

    def bare(self, rounds: int) -> tuple[list[list[int]], list[float]]:
        """LMDeploy's async engine by itself: its answers, and tokens a second of each round."""
        return asyncio.run(self._bare(rounds))

    async def _bare(self, rounds: int) -> tuple[list[list[int]], list[float]]:
        from lmdeploy import GenerationConfig

        engine = LMDeployEngine(self.model, **self.options)
        await engine.start()
        core, speeds, answers = engine._core, [], []

        async def ask(prompt: list[int]) -> list[int]:
            config = GenerationConfig(max_new_tokens=LENGTH, ignore_eos=True)
            session = core.session_mgr.get()
            request = await core.preprocess(None, session, gen_config=config, input_ids=list(prompt))
            return [token async for out in core.generate(request) for token in out.token_ids or ()]

        for _ in range(rounds + 1):
            begin = time.perf_counter()
            answers = await asyncio.gather(*map(ask, self.prompts))
            speeds.append(len(answers) * LENGTH / (time.perf_counter() - begin))
        await engine.close()
        return answers, speeds[1:]

    def bridged(self, rounds: int) -> tuple[list[list[int]], list[float]]:
        """The same through a bridge, a thread for each prompt."""
        speeds: list[float] = []
        with self.bridge() as bridge, ThreadPoolExecutor(len(self.prompts)) as pool:

            def ask(prompt: list[int]) -> Response:
                return bridge.infer(prompt, max_new_tokens=LENGTH, ignore_eos=True, timeout=300)

            for _ in range(rounds + 1):
                begin = time.perf_counter()
                answers = list(pool.map(ask, self.prompts))
                speeds.append(len(answers) * LENGTH / (time.perf_counter() - begin))
        return [answer.token_ids for answer in answers], speeds[1:]

    def bridge(self) -> Bridge:
        return Bridge(self.model, engine="lmdeploy", **self.options)


def check_facts(trial: Trial) -> dict[str, bool]:
    """What holds of the engine."""
    facts = {"greedy equals LMDeploy's": trial.bare(0)[0] == trial.bridged(0)[0]}
    with trial.bridge() as bridge:
        facts |= _check_requests(bridge, trial.prompts)
    if torch.cuda.is_available():
        before = torch.cuda.mem_get_info()[0]
        trial.bridged(0)
        facts["memory is given back"] = before - torch.cuda.mem_get_info()[0] < 256 * 2**20
    return facts


def _check_requests(bridge: Bridge, prompts: list[list[int]]) -> dict[str, bool]:
    settings: dict[str, Any] = {"max_new_tokens": 64, "ignore_eos": True, "timeout": 300}
    plain = bridge.infer(prompts[0], **settings)
    word = plain.text[10:13]
    stopped = bridge.infer(prompts[0], stop_words=[word], **settings)
    told = bridge.infer(prompts[0], logprobs=2, **settings)
    seeded = [bridge.infer(prompts[0], random_seed=7, temperature=1.0, **settings).text]
    seeded += [
        answer.text for answer in bridge.infer([prompts[0]] * len(prompts), random_seed=7, temperature=1.0, **settings)
    ]
    stream = bridge.stream(prompts[0], max_new_tokens=2048, ignore_eos=True, timeout=300)
    next(stream)
    before = bridge.stats()["steps"]
    stream.close()
    after = _settled(bridge) - before
    assert told.logprobs is not None
    return {
        "stop words": stopped.text == plain.text.split(word)[0] and stopped.finish_reason == "stop",
        "logprobs, the token first": [next(iter(entry)) for entry in told.logprobs] == told.token_ids,
        "a seed gives one text, alone and in a crowd": len(set(seeded)) == 1,
        "an abort ends within a few steps": after <= 4,
        "the cache is free": bridge.stats()["cache_free"] == 1.0,
    }


def _settled(bridge: Bridge) -> float:
    """LMDeploy's count of steps when nothing runs."""
    end = time.monotonic() + 60
    while bridge.stats()["in_flight"] and time.monotonic() < end:
        pass
    return bridge.stats()["steps"]


def measure(trial: Trial) -> dict[str, float]:
    """Medians in tokens a second."""
    return {
        "LMDeploy": statistics.median(trial.bare(ROUNDS)[1]),
        "bridge": statistics.median(trial.bridged(ROUNDS)[1]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="pytorch", choices=["pytorch", "turbomind"])
    parser.add_argument("--clients", default="1,16,64,256")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--scripted", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.scripted:
            from tests.engines.lmdeploy_scripted import scripted_gpu

            SHAPE.update(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8)
            stack.enter_context(scripted_gpu(num_blocks=4096))
        model = save_model(folder)
        facts = check_facts(Trial(model, args.backend, 8))
        speeds = {count: measure(Trial(model, args.backend, count)) for count in map(int, args.clients.split(","))}
    for fact, holds in facts.items():
        print(f"{'yes' if holds else 'NO ':4} {fact}")
    for count, speed in speeds.items():
        share = speed["bridge"] / speed["LMDeploy"]
        print(
            f"{count:4} clients: LMDeploy {speed['LMDeploy']:8.0f} tokens/s, bridge {speed['bridge']:8.0f}, {share:.2f}"
        )
    report = {"versions": [torch.__version__, transformers.__version__], "facts": facts, "speeds": speeds}
    (args.out / "lmdeploy_h200.json").write_text(json.dumps(report, indent=1))
    return 0 if all(facts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
