"""A real instruct model, SmolLM2-135M: tokens a second and time to first token, beside what else runs it.

Candidates, each once in a round, the first one changing from round to round:

- lmbridge: a thread a caller reads ``bridge.stream``
- native: transformers' continuous batching by itself, its outputs taken by handlers on one loop; no thread is crossed.
  Page and chunk as lmbridge has them, attention as it comes (``sdpa``)
- native-ours: the same with lmbridge's attention; what is left of the difference to lmbridge is what we cost
- static batch: one padded ``model.generate`` for all; nobody may come later
- lock: a thread a caller runs ``model.generate`` behind a lock
- polled: native-ours behind LMDeploy's recipe for threads: a pair of queues for each caller, polled on the loop
- serve: ``transformers serve --continuous-batching`` in a process of its own, only with ``--serve``
- limit: the model's bare forward of as many rows, a token each: no cache, no attention to the past, no prompt

All answers have 64 tokens, whatever the model would have ended, so that the work is the same. No question is asked
twice of a candidate: what a cache of prefixes may share is the system prompt. A candidate that takes over half a minute
for a round is not asked again for as many callers. All use the same number of torch threads.

Run: ``python -m tests.benchmarks.real_model [--callers 1,8,32] [--rounds 3] [--threads 2] [--serve] [--profile]``;
with all of it some ten minutes on 2 cores. ``--rounds 0 --profile`` shows only where a step goes
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.generation import ContinuousBatchingConfig

from lmbridge import Bridge
from lmbridge.engines.transformers import attention
from lmbridge.engines.transformers.sizes import CPU_CHUNK, CPU_PAGE
from tests.benchmarks import real_profile
from tests.real.model import real_model_folder

TOKENS = 64  # of each answer
MOST = 32  # callers
LONG = 30.0  # seconds of a round that is not repeated

ASKED = (
    "What is {}?",
    "Tell me a story about {}.",
    "Explain {} to a child of six years, in simple words and with an example from the kitchen.",
    "Write a letter to a friend in which you describe {}.",
    "What would a historian, a painter and an engineer say to each other about {}? Let each speak twice.",
    "List five facts about {}.",
    "I have to give a short talk about {} tomorrow morning and have not begun to prepare it. The audience are "
    "pensioners who know little about it and like to laugh. What should I begin with, and how do I end?",
    "Compare {} with a clock.",
)
TOPICS = (
    "rain", "bread", "the sea", "a lighthouse", "trains", "honey", "the moon", "chess", "snow", "a harbour", "gold",
    "the alphabet", "volcanoes", "tea", "bridges", "the wind", "glass", "maps", "salt", "a market", "sleep", "echoes",
    "silk", "the desert", "a violin", "rivers", "paper", "ice", "spices", "a garden", "storms", "the calendar",
)  # fmt: skip
Ask = Callable[[Sequence[str]], "Reading"]


def questions() -> Iterator[str]:
    """Short ones and long ones by turns, none twice in a run."""
    return (question.format(topic) for topic in itertools.cycle(TOPICS) for question in ASKED)


@dataclass
class Reading:
    """One round of one candidate.

    Attributes:
        tokens_s: tokens a second, from the first question to the last token.
        firsts: seconds from then to the first token of each caller; none for the limit.
    """

    tokens_s: float
    firsts: list[float]


# --- the candidates ---


class Crowd:
    """Threads that ask at the same time, one question each."""

    def __init__(self, read: Callable[[str], float]) -> None:
        """``read`` asks one question, reads the answer to its end, and returns when its first token came."""
        self._read = read
        self._threads = ThreadPoolExecutor(MOST)

    def __call__(self, questions: Sequence[str]) -> Reading:
        start = threading.Barrier(len(questions) + 1)

        def ask(question: str) -> float:
            start.wait()
            return self._read(question)

        readings = [self._threads.submit(ask, question) for question in questions]
        start.wait()
        began = time.perf_counter()
        firsts = [reading.result() - began for reading in readings]
        return Reading(len(questions) * TOKENS / (time.perf_counter() - began), firsts)


def read_stream(bridge: Bridge, question: str) -> float:
    first, count = 0.0, 0
    for delta in bridge.stream(question, max_new_tokens=TOKENS, ignore_eos=True):
        if delta.token_ids:
            first = first or time.perf_counter()
            count += len(delta.token_ids)
    assert count == TOKENS
    return first


class Generate:
    """``model.generate`` as it comes."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._lock = threading.Lock()

    def behind_a_lock(self, question: str) -> float:
        with self._lock:
            return self._generate([question])

    def in_one_batch(self, questions: Sequence[str]) -> Reading:
        began = time.perf_counter()
        first = self._generate(questions)
        seconds = time.perf_counter() - began
        return Reading(len(questions) * TOKENS / seconds, [first - began] * len(questions))

    def _generate(self, questions: Sequence[str]) -> float:
        rows = [encode(self._tokenizer, question) for question in questions]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        steps: list[float] = []

        def note(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            steps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        noting: Any = [note]
        output = self._model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            stopping_criteria=transformers.StoppingCriteriaList(noting),
        )
        assert output.shape[1] == longest + TOKENS
        return steps[0]


class Native:
    """transformers' manager on a loop of its own: one hop to the loop a step, and nobody behind it."""

    def __init__(self, model: Any, tokenizer: Any, *, ours: bool) -> None:
        self._tokenizer = tokenizer
        self._numbers = itertools.count()
        sizes = ContinuousBatchingConfig(
            page_size=CPU_PAGE,
            num_blocks=MOST * 512 // CPU_PAGE,  # or it takes 60 per cent of the memory of the machine
            max_batch_tokens=CPU_CHUNK,
            max_requests_per_batch=64,
        )
        greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
        with torch.inference_mode():
            self._manager: Any = model.init_continuous_batching(greedy, sizes)
            if ours:
                attention.install(model)
            self._manager.warmup()
            self._manager.start()

    def __call__(self, questions: Sequence[str]) -> Reading:
        return asyncio.run(self._ask(questions))

    async def _ask(self, questions: Sequence[str]) -> Reading:
        began = time.perf_counter()
        firsts = await asyncio.gather(*map(self.first_token, questions))
        seconds = time.perf_counter() - began
        return Reading(len(questions) * TOKENS / seconds, [first - began for first in firsts])

    async def first_token(self, question: str) -> float:
        """Ask, wait for the end, and return when the first token came."""
        firsts: list[float] = []
        done = asyncio.Event()

        def take(output: Any) -> None:
            firsts.append(time.perf_counter())
            if output.is_finished():
                assert len(output.generated_tokens) == TOKENS, output.error
                done.set()

        key = f"native-{next(self._numbers)}"
        self._manager.register_result_handler(key, take)
        ids = encode(self._tokenizer, question)
        self._manager.add_request(ids, request_id=key, max_new_tokens=TOKENS, streaming=True)
        await done.wait()
        return firsts[0]

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


class Polled:
    """LMDeploy's recipe before an engine: two queues for each thread, and a task for each that polls ``sleep(0)``."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._own = threading.local()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def read(self, question: str) -> float:
        if not hasattr(self._own, "pair"):
            self._own.pair = queue.Queue(), queue.Queue()
            asyncio.run_coroutine_threadsafe(self._serve(*self._own.pair), self._loop)
        inbox, outbox = self._own.pair
        inbox.put(question)
        return float(outbox.get(timeout=300))

    async def _serve(self, inbox: queue.Queue[str], outbox: queue.Queue[float]) -> None:
        while True:
            if inbox.empty():
                await asyncio.sleep(0)
            else:
                outbox.put(await self._native.first_token(inbox.get()))

    def close(self) -> None:
        async def cancel_all() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def poll(native: Native, questions: Sequence[str]) -> Reading:
    """One round: the loop ends with it, since it would go on polling beside the other candidates."""
    with contextlib.closing(Polled(native)) as polled:
        return Crowd(polled.read)(questions)


def read_served(port: int, folder: str, question: str) -> float:
    """One stream of chat completions; the server takes a whole generation config, which turns the end token off."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {
        "model": folder,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": TOKENS,
        "generation_config": json.dumps({"do_sample": False, "eos_token_id": -1, "max_new_tokens": TOKENS}),
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()[:300]
    first, ended = 0.0, ""
    for line in response:
        if line.startswith(b"data: {"):
            choice = (json.loads(line[6:]).get("choices") or [{}])[0]
            ended = choice.get("finish_reason") or ended
            if choice.get("delta", {}).get("content"):
                first = first or time.perf_counter()
    connection.close()
    assert ended == "length", ended
    return first


class Limit:
    """The arithmetic that no way of serving gets around: every layer's matrices, once for each token."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, questions: Sequence[str], steps: int = 20) -> Reading:
        ids = torch.arange(100, 100 + len(questions)).unsqueeze(1)
        with torch.inference_mode():
            self._model(input_ids=ids, use_cache=False)
            began = time.perf_counter()
            for _ in range(steps):
                self._model(input_ids=ids, use_cache=False)
        return Reading(steps * len(questions) / (time.perf_counter() - began), [])


def load(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def encode(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return [
        int(token) for token in tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ]


@contextlib.contextmanager
def candidates(folder: str, threads: int, serve: bool) -> Iterator[dict[str, Ask]]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    generate = Generate(model, tokenizer)
    with contextlib.ExitStack() as stack:
        bridge = stack.enter_context(Bridge(folder))
        found: dict[str, Ask] = {"lmbridge": Crowd(lambda question: read_stream(bridge, question))}
        found["native"] = stack.enter_context(contextlib.closing(Native(load(folder), tokenizer, ours=False)))
        ours = stack.enter_context(contextlib.closing(Native(load(folder), tokenizer, ours=True)))
        found["native-ours"] = ours
        found["polled"] = functools.partial(poll, ours)
        found |= {"static batch": generate.in_one_batch, "lock": Crowd(generate.behind_a_lock)}
        if serve:
            from tests.benchmarks.engine_speed import Serve  # its packages are an extra

            server = stack.enter_context(contextlib.closing(Serve(folder, TOKENS, threads)))
            found["serve"] = Crowd(lambda question: read_served(server.port, folder, question))
        found["limit"] = Limit(model)
        print(bridge.describe())
        yield found


# --- what is measured ---


def measure(asks: Mapping[str, Ask], asked: Iterator[str], callers: int, rounds: int) -> dict[str, list[Reading]]:
    """The readings of each candidate, one a round; all get the same questions."""
    names, slow = list(asks), set()
    readings: dict[str, list[Reading]] = {name: [] for name in names}
    for number in range(rounds):
        these = list(itertools.islice(asked, callers))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in slow:
                continue
            began = time.perf_counter()
            readings[name].append(asks[name](these))
            if time.perf_counter() - began > LONG:
                slow.add(name)
    return readings


def ratio(readings: Mapping[str, list[Reading]], name: str, base: str) -> float:
    """Tokens a second of one in units of another's, the median of the rounds that both have."""
    pairs = zip(readings[name], readings[base], strict=False)
    return statistics.median(mine.tokens_s / its.tokens_s for mine, its in pairs)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def cells(readings: Mapping[str, list[Reading]], name: str) -> list[str]:
    """Tokens a second, in units of lmbridge's; the first token's median and 99th percentile. Medians of the rounds."""
    speed = statistics.median(reading.tokens_s for reading in readings[name])
    found = [f"{speed:,.0f} ({ratio(readings, name, 'lmbridge'):.2f})"]
    firsts = [reading.firsts for reading in readings[name] if reading.firsts]
    shown = [
        f"{statistics.median(quantile(values, share) for values in firsts):.2f}" for share in (0.5, 0.99) if firsts
    ]
    return [*found, f"{', '.join(shown)} s" if shown else ""]


def report(results: Mapping[int, Mapping[str, list[Reading]]]) -> None:
    head = ["candidate"]
    for callers in results:
        head += [f"{callers} caller{'s' * (callers > 1)}: tokens/s", "first token, p50, p99"]
    names = list(next(iter(results.values())))
    rows = [[name, *(cell for readings in results.values() for cell in cells(readings, name))] for name in names]
    print("\nIn brackets: in units of lmbridge's, medians of the ratios within a round.\n")
    print(real_profile.table(head, rows))
    for callers, readings in results.items():
        others = [f"{ratio(readings, 'lmbridge', name):.2f} of {name}" for name in names if name != "lmbridge"]
        print(f"{callers} caller{'s' * (callers > 1)}, lmbridge: {', '.join(others)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--callers", default="1,8,32", help=f"of at most {MOST}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch threads of all; 0 for torch's own choice")
    parser.add_argument("--candidates", default="", help="only these, beside lmbridge")
    parser.add_argument("--serve", action="store_true", help="transformers serve too")
    parser.add_argument("--profile", action="store_true", help="then show where a step of lmbridge goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())  # of threads to come, too
    asked = questions()
    folder, callers = str(real_model_folder()), [int(count) for count in arguments.callers.split(",")]
    print(
        f"{torch.get_num_threads()} torch threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    if arguments.rounds:
        wanted = {"lmbridge", *arguments.candidates.split(",")} if arguments.candidates else None
        with candidates(folder, torch.get_num_threads(), arguments.serve) as every:
            asks = {name: ask for name, ask in every.items() if wanted is None or name in wanted}
            for ask in asks.values():  # a first request is slower than the others
                ask(list(itertools.islice(asked, 2)))
            report({count: measure(asks, asked, count, arguments.rounds) for count in callers})
    if arguments.profile:
        limit = Limit(load(folder))
        limits = {count: count / limit(["?"] * count).tokens_s for count in callers}
        real_profile.run(folder, asked, limits, TOKENS)


if __name__ == "__main__":
    main()
