"""The ExLlama engines on a GPU: do they keep their promises there, on ExLlama's own kernels.

The model is small, has weights in float16 and a tokenizer made on the spot; nothing is fetched. ExLlama builds
its CUDA part at its first import (minutes), which needs nvcc, a C++ compiler and ninja. For each engine, in one call:

- the contract suite, check by check;
- greedy answers are transformers' own, token for token; twenty streams at once give what each gives alone;
- a stream that is closed frees the generator within a second; memory is free again after ``close()``;
- tokens a second, of one stream and of twenty.

It prints a line for each and exits 1 when one does not hold. ``--scripted`` tries this script itself without a GPU, on
the kernels of the tests; the answers are not transformers' then.

Run: ``python -m tests.gpu.exllama [--engine exllamav3] [--scripted]``
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import string
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmbridge import Bridge, Engine
from lmbridge.engines import engine_class
from lmbridge.testing import EngineContract
from lmbridge.testing.witness import WitnessedEngines
from tests.engines.conftest import BYTES, EOS, byte_level_tokenizer

NAMES = ("exllamav3", "exllamav2")
STREAMS = 20
LENGTH = 64
LETTERS = string.ascii_letters
PROMPTS = [f"the twenty letters, of which this is {letter}" for letter in LETTERS[:STREAMS]]
LEFT_OVER = 64 << 20
"""Bytes that CUDA's own libraries may keep after the first model."""


def save_model(folder: Path) -> str:
    """Weights that say the letters in an order made up, whatever came before the last: rounding decides nothing.

    All layers are computed, on random weights, but add little to what a token's embedding says.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    order = torch.tensor([BYTES[letter] for letter in LETTERS])[torch.randperm(len(LETTERS))]
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[order.roll(-1)] = embeddings[order]
    model.half().save_pretrained(folder)
    byte_level_tokenizer(chat_template=None).save_pretrained(folder)
    return str(folder)


class Report:
    """A line for each thing that was looked at."""

    def __init__(self) -> None:
        self.failed = 0

    def say(self, what: str, good: bool | None, more: str = "") -> None:
        """Whether it holds; None where it was not looked at."""
        self.failed += good is False
        print(f"{ {True: 'ok', False: 'FAILED', None: 'skipped'}[good]:8}{what:58}{more}", flush=True)

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Whether what happens inside goes through, and how long it takes."""
        begin = time.perf_counter()
        try:
            yield
        except (unittest.SkipTest, pytest.skip.Exception) as reason:
            self.say(what, None, str(reason))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.say(what, False, f"{type(error).__name__} at {place.name}, {place.line}: {error}"[:400])
        else:
            self.say(what, True, f"{time.perf_counter() - begin:.1f} s")


class Contract(EngineContract):
    """The contract suite, over an engine of a name."""

    __test__ = False
    prompts = tuple(PROMPTS[:6])
    long_prompt = "word " * 20 + "Z"
    poison = (10**9,)
    follows_forms = False  # it never ends by itself
    patience = 180.0
    stall_timeout = 20.0  # a step of another size may have a kernel tuned

    def __init__(self, make: Callable[[], Engine], name: str, alone: bool) -> None:
        self._make, self.workers, self._alone = make, (f"lmbridge {name}",), alone

    def engine(self) -> Engine:
        return self._make()

    def test_a_forgotten_request_ends_alone(self) -> None:
        """Where one request has all places nothing goes on beside it."""
        if self._alone:
            raise unittest.SkipTest("one request at a time")
        super().test_a_forgotten_request_ends_alone()

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The name of each check, and the check."""
        for name in sorted(name for name in dir(self) if name.startswith("test_")):
            yield name.removeprefix("test_").replace("_", " "), getattr(self, name)


class Trial:
    """One engine, looked at from all sides."""

    def __init__(self, name: str, model: str, report: Report, real: bool) -> None:
        self.name, self.model, self.report, self.real = name, model, report, real

    def make(self) -> Engine:
        options = {"cache_tokens": 16384, "max_batch_size": STREAMS, "max_context": 2048}
        return engine_class(self.name)(self.model, **options)  # type: ignore[call-arg]

    def run(self) -> None:
        """Print what holds."""
        print(f"\n{self.name}")
        engines = WitnessedEngines(self.make)
        free = self._held()
        with self.report.of("loads, builds its CUDA part if need be, and answers"), Bridge(engines) as bridge:
            bridge.infer(PROMPTS[0], max_new_tokens=2)
        if not engines.witnesses:
            return
        alone = engines.latest.engine.max_batch_size == 1
        gc.collect()
        left = self._held() - free
        self.report.say("the memory is free again", left <= LEFT_OVER, f"{left / 2**20:.0f} MiB are left")
        with Bridge(engines) as bridge:
            self._answers(bridge)
            self._settings(bridge)
            self._abort(bridge, engines)
        for what, check in Contract(self.make, self.name, alone).checks():
            with self.report.of(what):
                check()

    def _answers(self, bridge: Bridge) -> None:
        begin = time.perf_counter()
        single = [self._stream(bridge, prompt) for prompt in PROMPTS]
        middle = time.perf_counter()
        with ThreadPoolExecutor(STREAMS) as pool:
            crowd = list(pool.map(lambda prompt: self._stream(bridge, prompt), PROMPTS))
        end = time.perf_counter()
        same = sum(one == other for one, other in zip(single, crowd, strict=True))
        self.report.say("twenty streams at once say what each says alone", same == STREAMS, f"{same} of {STREAMS}")
        speeds = [STREAMS * LENGTH / seconds for seconds in (middle - begin, end - middle)]
        self.report.say("speed", True, f"{speeds[0]:.0f} tokens/s one by one, {speeds[1]:.0f} at once")
        if self.real:
            expected = self._expected()
            same = sum(one == other for one, other in zip(single, expected, strict=True))
            self.report.say("greedy answers are transformers' own", same == STREAMS, f"{same} of {STREAMS}")

    def _settings(self, bridge: Bridge) -> None:
        number = bridge.infer(PROMPTS[0], grammar={"regex": "[0-9]{3}"}, max_new_tokens=3, timeout=120).text
        self.report.say("an answer keeps to its grammar", number.isdigit() and len(number) == 3, number)
        first, again, other = (
            bridge.infer(PROMPTS[0], temperature=100.0, random_seed=seed, max_new_tokens=LENGTH, timeout=120).token_ids
            for seed in (1, 1, 2)
        )
        self.report.say("a seed gives one text", first == again != other)
        plain = bridge.infer(PROMPTS[0], max_new_tokens=LENGTH, timeout=120).text
        stopped = bridge.infer(PROMPTS[0], stop_words=[plain[20:23]], timeout=120).text
        self.report.say("a stop word ends an answer", stopped == plain[:20])

    def _stream(self, bridge: Bridge, prompt: str) -> list[int]:
        stream = bridge.stream(prompt, max_new_tokens=LENGTH, timeout=120)
        return [token for delta in stream for token in delta.token_ids]

    def _expected(self) -> list[list[int]]:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        tokenizer = byte_level_tokenizer()
        found = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
            with torch.no_grad():
                whole = model.generate(ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=EOS)
            found.append(whole[0, ids.shape[1] :].tolist())
        return found

    def _abort(self, bridge: Bridge, engines: WitnessedEngines) -> None:
        engine: Any = engines.latest.engine
        streams = [bridge.stream(prompt, max_new_tokens=1500) for prompt in PROMPTS]
        next(streams[0])
        begin = time.perf_counter()
        for stream in streams:
            stream.close()
        tick = threading.Event()
        while engine._model.generator.num_remaining_jobs() and time.perf_counter() - begin < 10:
            tick.wait(0.005)
        seconds = time.perf_counter() - begin
        self.report.say("twenty closed streams free the generator", seconds < 1, f"{1000 * seconds:.0f} ms")

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.real else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=NAMES, help="this one alone")
    parser.add_argument("--scripted", action="store_true", help="without a GPU, on the kernels of the tests")
    arguments = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        model = save_model(Path(folder) / "model")
        for name in [arguments.engine] if arguments.engine else NAMES:
            if arguments.scripted:
                from tests.engines.exllama.conftest import scripted

                scripted(patch, "v3" if name == "exllamav3" else "v2", model)
            elif name == NAMES[0]:
                print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
            Trial(name, model, report, real=not arguments.scripted).run()
    print(f"\n{report.failed} failed" if report.failed else "\nall good")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
