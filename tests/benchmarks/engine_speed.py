"""The transformers engine beside what else runs the same model: tokens a second for the same prompts.

Candidates, in turn, medians of the rounds, ratios within each round:

- bridge: a thread a prompt calls ``bridge.infer``
- bridge-sdpa: the same with transformers' own attention; the distance to the bridge is what lmbridge's is worth
- streams: a thread a prompt reads ``bridge.stream`` to its end
- engine: the engine on a loop of its own; no thread is crossed and no bridge there
- manager: transformers' continuous batching as it comes, driven by one thread
- manager-same: the same with our attention, page and chunk size, torch threads and inference mode; what is left of the
  difference to the bridge is what we cost
- lock: a thread a prompt calls ``model.generate`` behind a lock
- static-N: ``model.generate`` on N prompts at a time, filled up on the left
- serve: a process of ``transformers serve --continuous-batching`` on this machine, a thread a prompt reading its stream
  of chat completions

Each says how many of its answers equal those of ``model.generate`` on one prompt after the other, and the CPU time that
this process spent on them: on a machine that others use too it tells more than the clock, between candidates with as
many torch threads (a second one waits for work by spinning).

Run: ``python -m tests.benchmarks.engine_speed [--rounds 5] [--prompts 32] [--tokens 400] [--threads 1]
[--hidden 512] [--candidates bridge,manager,…]``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation import ContinuousBatchingConfig

from lmbridge import Bridge, GenerationConfig
from lmbridge.engines.transformers import attention
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.runner import thread_count, use_threads
from lmbridge.engines.transformers.sizes import CPU_CHUNK, CPU_PAGE
from tests.benchmarks.engine_models import model_folder
from tests.benchmarks.main_job import Locked, Native, make_prompts

_threads = ThreadPoolExecutor(256)  # kept from round to round, as those of a server would be
START_LIMIT = 60.0  # seconds for ``transformers serve`` to answer
Run = Callable[[list[str]], list[str]]


class Manager:
    """transformers' own manager, its requests added and its results taken by one thread.

    Args:
        same: set up as the engine sets it up, but for the sampler.
    """

    def __init__(self, path: str, locked: Locked, tokens: int, same: bool) -> None:
        self._tokenizer, self._tokens = locked.tokenizer, tokens
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        page = CPU_PAGE if same else 256
        sizes = ContinuousBatchingConfig(
            num_blocks=64 * 1024 // page,  # or it takes 60 per cent of the memory of the machine
            max_batch_tokens=CPU_CHUNK if same else None,
            max_requests_per_batch=64,
            page_size=page,
        )
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=model.generation_config.eos_token_id)
        with torch.inference_mode(same):
            self._manager: Any = model.init_continuous_batching(
                generation_config=config, continuous_batching_config=sizes
            )
            if same:
                attention.install(model)
                self._use_our_threads(model, thread_count(model, ModelOptions(path)))
            self._manager.warmup()
            self._manager.start()

    def _use_our_threads(self, model: Any, count: int | None) -> None:
        """From the generation thread's first step on."""

        def enter(*_: Any) -> None:
            hook.remove()
            use_threads(count)

        hook = model.register_forward_pre_hook(enter)

    def run(self, prompts: list[str]) -> list[str]:
        ids = [encode(self._tokenizer, prompt) for prompt in prompts]
        keys = self._manager.add_requests(ids, max_new_tokens=self._tokens)
        left, found = set(keys), {}
        while left:
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("The manager's generation thread has ended.")
            if result is not None and result.is_finished():
                left.discard(result.request_id)
                found[result.request_id] = result.generated_tokens
        return [self._tokenizer.decode(found[key], skip_special_tokens=True) for key in keys]

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


class Static:
    """``generate`` on some prompts at a time; a batch takes as long as its longest answer."""

    def __init__(self, locked: Locked, tokens: int, size: int) -> None:
        self._tokenizer, self._model, self._tokens, self._size = locked.tokenizer, locked.model, tokens, size

    def run(self, prompts: list[str]) -> list[str]:
        batches = [prompts[at : at + self._size] for at in range(0, len(prompts), self._size)]
        return [text for batch in batches for text in self._generate(batch)]

    def _generate(self, prompts: list[str]) -> list[str]:
        ids = [encode(self._tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, ids))
        padding = self._tokenizer.pad_token_id or 0
        rows = torch.tensor([[padding] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        with torch.no_grad():
            output = self._model.generate(
                rows, attention_mask=mask, max_new_tokens=self._tokens, do_sample=False, pad_token_id=padding
            )
        return [str(text) for text in self._tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


class Serve:
    """A process of ``transformers serve``; its answers are read as they stream."""

    def __init__(self, path: str, tokens: int, threads: int) -> None:
        self._path, self._tokens = path, tokens
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [str(Path(sys.executable).with_name("transformers")), "serve", path, "--continuous-batching"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        command += ["--cb-num-blocks", "256"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_LIMIT
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.2)
        self.close()
        self._log.seek(0)
        raise RuntimeError(self._log.read()[-500:].decode(errors="replace"))

    def run(self, prompts: list[str]) -> list[str]:
        return in_threads(self._ask, prompts)

    def _ask(self, prompt: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = {
            "model": self._path,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "max_tokens": self._tokens,
            "temperature": 0,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read()[:300].decode(errors="replace"))
        texts = []
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices") or [{}]
                texts.append(choices[0].get("delta", {}).get("content") or "")
        connection.close()
        return "".join(texts)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def in_threads(ask: Callable[[str], str], prompts: list[str]) -> list[str]:
    """One thread a prompt, all at once."""
    return list(_threads.map(ask, prompts))


def encode(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    return [int(token) for token in ids]


def build(name: str, path: str, locked: Locked, arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Run:
    """The candidate of that name, closed with the stack."""
    config = GenerationConfig(max_new_tokens=arguments.tokens)
    if name in ("bridge", "bridge-sdpa", "streams"):
        attention_name = "sdpa" if name == "bridge-sdpa" else None
        bridge = stack.enter_context(Bridge(path, runner="paged", attn_implementation=attention_name))
        if name == "streams":
            return functools.partial(in_threads, lambda prompt: "".join(d.text for d in bridge.stream(prompt, config)))
        return functools.partial(in_threads, lambda prompt: bridge.infer(prompt, config).text)
    if name == "engine":
        native = stack.enter_context(contextlib.closing(Native(path)))
        return lambda prompts: native.run(prompts, config)
    if name in ("manager", "manager-same"):
        manager = Manager(path, locked, arguments.tokens, same=name == "manager-same")
        return stack.enter_context(contextlib.closing(manager)).run
    if name == "lock":
        return functools.partial(in_threads, lambda prompt: locked.infer(prompt, config))
    if name == "serve":
        missing = [package for package in ("uvicorn", "fastapi", "openai") if importlib.util.find_spec(package) is None]
        if missing:
            raise RuntimeError(f"needs {', '.join(missing)}: pip install transformers[serving]")
        return stack.enter_context(contextlib.closing(Serve(path, arguments.tokens, arguments.threads))).run
    return Static(locked, arguments.tokens, int(name.removeprefix("static-"))).run


def measure(candidates: dict[str, Run], prompts: list[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds on the clock and of CPU time of each round of each, in an order drawn anew for each round.

    Nobody follows the same one always: threads of OpenMP go on spinning for a while after their work.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(candidates), len(candidates)):
            start, cpu = time.perf_counter(), time.process_time()
            candidates[name](prompts)
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return seconds


def report(seconds: dict[str, list[tuple[float, float]]], equal: dict[str, int], prompts: int, tokens: int) -> None:
    """Tokens a second, the speed of the first candidate in units of each, CPU seconds (of this process)."""
    first = next(iter(seconds))
    heading = f"{'candidate':<14} {'tokens/s':>9} {f'speed of {first} / its (median, min, max)':>44}"
    print(f"{heading} {'CPU s':>7} {'answers equal':>15}")
    for name, rounds in seconds.items():
        ratios = [mine / base for (mine, _), (base, _) in zip(rounds, seconds[first], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        rate = tokens / statistics.median(clock for clock, _ in rounds)
        cpu = f"{statistics.median(cpu for _, cpu in rounds):.2f}" if name != "serve" else "-"
        print(f"{name:<14} {rate:9.0f} {spread:>44} {cpu:>7} {equal[name]:>8} of {prompts}")


def main() -> None:
    names = "bridge,bridge-sdpa,streams,engine,manager-same,manager,lock,static-8,static-32,serve"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400, help="the most of an answer")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of all; 0 leaves each its own default")
    parser.add_argument("--hidden", type=int, default=0, help="a random model of this width instead of the bundled one")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--candidates", default=names)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    prompts = make_prompts(arguments.prompts)
    config = GenerationConfig(max_new_tokens=arguments.tokens)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(model_folder(arguments.hidden, arguments.layers))
        locked = Locked(path)
        reference = [locked.infer(prompt, config) for prompt in prompts]
        tokens = sum(len(locked.tokenizer.encode(text)) for text in reference)
        candidates: dict[str, Run] = {}
        for name in arguments.candidates.split(","):
            try:
                candidates[name] = build(name, path, locked, arguments, stack)
            except (RuntimeError, OSError) as error:
                print(f"{name} is left out: {error}")
        equal = {}
        for name, run in candidates.items():  # a warm-up too
            equal[name] = sum(text == other for text, other in zip(run(prompts), reference, strict=True))
        print(f"{len(prompts)} prompts, about {tokens} tokens, {torch.get_num_threads()} torch threads")
        report(measure(candidates, prompts, arguments.rounds), equal, len(prompts), tokens)


if __name__ == "__main__":
    main()
