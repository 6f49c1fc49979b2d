"""The transformers engine on a GPU: its speed beside transformers' own manager, and whether CUDA graphs change answers.

**Speed.** A model of the shape of Llama 3.2 1B, random weights in bfloat16, with a tokenizer made on the spot; nothing
is fetched. Every client asks for one answer of a fixed length: once all of them greedily, once all with temperature and
top_p. Candidates, each in a process of its own:

- bridge: a thread a client calls ``bridge.infer``; the engine as it is
- bridge-graphs: the same with ``cuda_graphs=True``
- manager, manager-graphs, manager-best: transformers' manager driven by one thread, without CUDA graphs, with them, and
  with asynchronous batching beside. It samples with one setting for all, and without seeds

**Equality.** 16 threads ask an engine without graphs and one with them for the same answers: greedy ones at first, then
also seeded ones of every kind of sampling. They ask twice: the second time, what was recorded in the first is replayed.
In float64 rounding decides nothing, so that every answer must be the same, token for token. In bfloat16 an answer
depends on who shares its steps, with graphs and without: how far the engine without graphs differs from itself is the
measure there.

One call does all, prints tables and writes ``bench_engine.json``, anew after each candidate. Its exit code is 1 if a
candidate failed, if graphs change an answer in float64, or if the engine replays none. It needs this repository with
what it requires, and no network. ``--tiny`` proves on a CPU, where transformers leaves graphs off by itself, that it
works.

Run: ``python -m tests.gpu.bench_engine [--clients 1,16,64,256] [--rounds 2] [--equality float64,bfloat16]
[--candidates bridge,bridge-graphs,manager,manager-graphs,manager-best] [--out FOLDER] [--tiny]``
Equality alone: ``--candidates ""``; speed alone: ``--equality ""``
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.generation import ContinuousBatchingConfig

from lmbridge import Bridge, GenerationConfig

BRIDGES = ["bridge", "bridge-graphs"]
CANDIDATES = [*BRIDGES, "manager", "manager-graphs", "manager-best"]
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMALL = {**SHAPE, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False}
TINY = {**SHAPE, "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
TINY_UNTIED = {**TINY, "tie_word_embeddings": False}
REPOSITORY = Path(__file__).resolve().parents[2]
CHUNK = 2048  # prompt tokens in a step, for every candidate
KINDS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}
"""What the clients of one measurement ask for."""

THREADS = 16  # of those that ask for equal answers
EQUAL_CHUNK, EQUAL_PAGE, EQUAL_BLOCKS = 128, 64, 128
"""Of the equality's engines: prompts take several steps, beside others that decode."""
MIXES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, penalty": {"repetition_penalty": 1.3},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 20},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "top_k, top_p, min_p": {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "all": {"temperature": 0.7, "top_k": 100, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1},
}
Ask = Callable[[list[list[int]], int], int]
Answers = list[list[int]]


def save_model(folder: str, shape: dict[str, Any], device: str) -> None:
    """Random weights in bfloat16, and a tokenizer that has a text for every id."""
    torch.manual_seed(0)
    size = shape["vocab_size"]
    config = transformers.LlamaConfig(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None,
        eos_token_id=size - 1,
        pad_token_id=None,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        if not shape["tie_word_embeddings"]:  # scores as far apart as those of a trained model: draws mean something
            torch.nn.init.normal_(model.lm_head.weight, std=5 / shape["hidden_size"] ** 0.5)
    model.save_pretrained(folder)
    vocabulary = {byte: token for token, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"w{token}": token for token in range(len(vocabulary), size - 1)} | {"<eos>": size - 1}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)


def random_prompt(words: random.Random, length: int) -> list[int]:
    return [words.randrange(256, 1000) for _ in range(length)]


# --------------------------------------------------------------------------------------- speed, one candidate's process


class Replays:
    """Counts what is replayed in this process: that graphs are on can be told from nothing else."""

    def __init__(self) -> None:
        self.count = 0
        graphs: Any = torch.cuda.CUDAGraph
        replay = graphs.replay

        def counted(graph: Any) -> None:
            self.count += 1
            replay(graph)

        graphs.replay = counted


class BridgeCandidate:
    """A thread a client, each of which calls ``bridge.infer``."""

    def __init__(self, folder: str, arguments: argparse.Namespace) -> None:
        self._most = most_clients(arguments)
        self._bridge = Bridge(
            folder,
            runner="paged",
            cuda_graphs=arguments.one == "bridge-graphs",
            dtype="bfloat16",
            device=arguments.device,
            max_batch_size=self._most,
            max_chunk_size=CHUNK,
            num_blocks=arguments.blocks,
            page_size=arguments.page,
        ).start()
        self._pool = ThreadPoolExecutor(self._most)

    def asking(self, kind: str) -> Ask:
        settings = KINDS[kind]

        def one(number: int, prompt: list[int], tokens: int) -> int:
            seed = number if settings else None
            config = GenerationConfig(max_new_tokens=tokens, ignore_eos=True, random_seed=seed, **settings)
            return len(self._bridge.infer(prompt, config).token_ids)

        def ask(prompts: list[list[int]], tokens: int) -> int:
            return sum(self._pool.map(one, range(len(prompts)), prompts, [tokens] * len(prompts)))

        return ask


class ManagerCandidate:
    """transformers' manager, driven by one thread; a manager for each kind of sampling, as it has one setting."""

    def __init__(self, folder: str, arguments: argparse.Namespace) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model = model.to(arguments.device)
        self._manager: Any = None
        self._settings: dict[str, Any] = {
            "num_blocks": arguments.blocks,
            "page_size": arguments.page,
            "max_batch_tokens": CHUNK,
            "max_requests_per_batch": most_clients(arguments),
            "use_cuda_graph": arguments.one != "manager",
            "use_async_batching": arguments.one == "manager-best",
            "auto_switch_to_flash": arguments.device != "cpu",
        }

    def asking(self, kind: str) -> Ask:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=60)
        sampling = {"do_sample": True, "top_k": 0, **KINDS[kind]} if KINDS[kind] else {"do_sample": False}
        manager = self._manager = self._model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(eos_token_id=-1, **sampling),
            continuous_batching_config=ContinuousBatchingConfig(**self._settings),
        )
        manager.warmup()
        manager.start()

        def ask(prompts: list[list[int]], tokens: int) -> int:
            left = set(manager.add_requests(prompts, max_new_tokens=tokens))
            count = 0
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("the manager's generation thread has ended")
                if result is not None and result.is_finished():
                    left.discard(result.request_id)
                    count += len(result.generated_tokens)
            return count

        return ask


def most_clients(arguments: argparse.Namespace) -> int:
    return max(map(int, arguments.clients.split(",")))


def speeds(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was found so far, after each measurement."""
    replays = Replays()
    build = BridgeCandidate if arguments.one in BRIDGES else ManagerCandidate
    candidate = build(arguments.folder, arguments)
    found: dict[str, Any] = {}
    for kind in KINDS:
        ask = candidate.asking(kind)
        found[kind] = {}
        for clients in map(int, arguments.clients.split(",")):
            found[kind][str(clients)] = measure(ask, clients, arguments, replays)
            yield found


def measure(ask: Ask, clients: int, arguments: argparse.Namespace, replays: Replays) -> dict[str, Any]:
    """Tokens a second of each round, memory, and how often a graph was replayed in the last round."""
    cuda = arguments.device != "cpu"
    words = random.Random(clients)
    rates, counted = [], 0
    for number in range(-1, arguments.rounds):  # the first one warms up
        prompts = [random_prompt(words, arguments.prompt) for _ in range(clients)]
        if cuda and number == 0:
            torch.cuda.reset_peak_memory_stats()
        before, start = replays.count, time.perf_counter()
        counted = ask(prompts, arguments.tokens)
        rates.append(counted / (time.perf_counter() - start))
    gib = 1 << 30
    return {
        "tokens_per_s": rates[1:],
        "median": statistics.median(rates[1:]),
        "complete": counted == clients * arguments.tokens,
        "replays": replays.count - before,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / gib if cuda else None,
        "reserved_gib": torch.cuda.memory_reserved() / gib if cuda else None,
    }


# ------------------------------------------------------------------------------------ equality, one candidate's process


class Asked(NamedTuple):
    """One request, of a kind of ``MIXES``."""

    kind: str
    prompt: list[int]
    config: GenerationConfig


def requests(arguments: argparse.Namespace) -> list[Asked]:
    """The same in every process. The first quarter is greedy, so that there are steps in which nobody samples."""
    words = random.Random(1)
    found = []
    for number in range(arguments.requests):
        kind = "greedy" if number < arguments.requests // 4 else list(MIXES)[number % len(MIXES)]
        seed = None if kind.startswith("greedy") else 1000 + number
        config = GenerationConfig(max_new_tokens=arguments.tokens, ignore_eos=True, random_seed=seed, **MIXES[kind])
        length = words.randint(arguments.prompt // 4, arguments.prompt)
        found.append(Asked(kind, random_prompt(words, length), config))
    return found


def answers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The token ids of every answer, of two rounds."""
    replays = Replays()
    bridge = Bridge(
        arguments.folder,
        runner="paged",
        cuda_graphs=arguments.one == "bridge-graphs",
        dtype=arguments.dtype,
        device=arguments.device,
        # no flash kernel has more than half precision
        attn_implementation=None if arguments.dtype == "bfloat16" else "sdpa",
        max_batch_size=THREADS,
        max_chunk_size=EQUAL_CHUNK,
        num_blocks=EQUAL_BLOCKS,
        page_size=EQUAL_PAGE,
    ).start()
    asked = requests(arguments)

    def one(request: Asked) -> list[int]:
        return list(bridge.infer(request.prompt, request.config).token_ids)

    found: dict[str, Any] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name in ("first", "again"):
            found[name] = list(pool.map(one, asked))
            yield found | {"replays": replays.count}


def differences(reference: Answers, others: Answers, kinds: list[str]) -> dict[str, Any]:
    """How many answers are equal, by kind too, and where the first that is not begins to differ."""
    differing = [number for number, pair in enumerate(zip(reference, others, strict=True)) if pair[0] != pair[1]]
    of_kind = {kind: [number for number, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    by_kind = {
        kind: f"{sum(number not in differing for number in numbers)} of {len(numbers)}"
        for kind, numbers in of_kind.items()
    }
    found: dict[str, Any] = {"equal": len(kinds) - len(differing), "of": len(kinds), "by_kind": by_kind}
    if differing:
        places = [first_difference(reference[number], others[number]) for number in differing]
        number, place = differing[0], places[0]
        found["first"] = {
            "request": number,
            "kind": kinds[number],
            "token": place,
            "without_graphs": reference[number][place : place + 1],
            "here": others[number][place : place + 1],
        }
        found["earliest_token"] = min(places)
    return found


def first_difference(mine: list[int], theirs: list[int]) -> int:
    """The place; the end of the shorter one, if that is how the longer one begins."""
    shorter = min(len(mine), len(theirs))
    return next((place for place in range(shorter) if mine[place] != theirs[place]), shorter)


# --------------------------------------------------------------------------------------------------- all the candidates


def run_one(arguments: argparse.Namespace) -> None:
    """Measure one candidate and write what was found; the process then just ends, with threads and all."""
    code = 0
    try:
        for found in answers(arguments) if arguments.dtype else speeds(arguments):
            Path(arguments.out).write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def in_process(name: str, folder: str, arguments: argparse.Namespace, **changes: object) -> dict[str, Any]:
    """What the candidate found; with ``error`` beside, if it did not come to its end."""
    options = ("clients", "rounds", "prompt", "tokens", "blocks", "page", "device", "requests")
    values = {option: getattr(arguments, option) for option in options} | changes
    with tempfile.NamedTemporaryFile() as answer:
        command = [sys.executable, "-m", "tests.gpu.bench_engine", "--one", name, "--folder", folder]
        command += ["--out", answer.name, *(f"--{option}={value}" for option, value in values.items())]
        error = ""
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=arguments.limit)
            error = (done.stderr or done.stdout)[-1500:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"not done after {arguments.limit} s"
        text = Path(answer.name).read_text()
        found: dict[str, Any] = json.loads(text) if text else {}
        return {**found, "error": error} if error or not found else found


def compare_speed(arguments: argparse.Namespace, folder: str, report: dict[str, Any]) -> None:
    save_model(folder, TINY if arguments.tiny else SHAPE, arguments.device)
    results = report["speed"] = {}
    for name in filter(None, arguments.candidates.split(",")):
        if name == "manager-best" and arguments.device == "cpu":
            print("manager-best is left out: transformers has no asynchronous batching on a CPU")
            continue
        results[name] = in_process(name, folder, arguments)
        print(f"{name}: {json.dumps(_short(results[name]))}", flush=True)
        write(arguments, report)


def compare_answers(arguments: argparse.Namespace, folder: str, report: dict[str, Any]) -> None:
    """Of each dtype, the answers of three rounds with those of the first round without graphs."""
    save_model(folder, TINY_UNTIED if arguments.tiny else SMALL, arguments.device)
    kinds = [asked.kind for asked in requests(arguments)]
    results = report["equality"] = {}
    for dtype in filter(None, arguments.equality.split(",")):
        off, on = (in_process(name, folder, arguments, dtype=dtype) for name in BRIDGES)
        result = results[dtype] = {"replays": on.get("replays", 0)}
        for name, other in (("without graphs", off), ("with graphs", on)):
            if "error" in other:
                result[name] = {"error": other["error"]}
        if "again" in off and "again" in on:
            result["distinct_tokens"] = len({token for tokens in off["first"] for token in tokens})
            result["without graphs, again"] = differences(off["first"], off["again"], kinds)
            result["with graphs"] = differences(off["first"], on["first"], kinds)
            result["with graphs, again"] = differences(off["first"], on["again"], kinds)
        print(equality_table(dtype, result, arguments.tokens), flush=True)
        write(arguments, report)


def _short(result: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens a second by kind and clients; the end of the error, if there is one."""
    short = {kind: {n: round(found["median"], 1) for n, found in result.get(kind, {}).items()} for kind in KINDS}
    return short | ({"error": result["error"][-300:]} if "error" in result else {})


def speed_table(results: dict[str, Any], base: str) -> str:
    """Tokens a second, the ratio to the native manager, replays of the last round, and memory."""
    heading = f"{'candidate':<16} {'asked':<8} {'clients':>7} {'tokens/s':>9} {'/ ' + base:>10} {'replays':>8}"
    lines = [f"\n{heading} {'peak GiB':>9} {'reserved GiB':>13}"]
    for name, result in results.items():
        for kind in KINDS:
            for clients, found in result.get(kind, {}).items():
                other = results.get(base, {}).get(kind, {}).get(clients)
                ratio = f"{found['median'] / other['median']:.3f}" if other else "-"
                memory = [f"{found[key]:.2f}" if found[key] else "-" for key in ("peak_allocated_gib", "reserved_gib")]
                cells = f"{found['median']:>9.0f} {ratio:>10} {found['replays']:>8} {memory[0]:>9} {memory[1]:>13}"
                lines.append(f"{name:<16} {kind:<8} {clients:>7} {cells}" + ("" if found["complete"] else " SHORT"))
    return "\n".join(lines)


def equality_table(dtype: str, result: dict[str, Any], tokens: int) -> str:
    """How many answers equal those of the first round without graphs."""
    lines = [f"\n{dtype}, {THREADS} threads, {tokens} tokens an answer, graphs replayed {result['replays']} times:"]
    for name, found in result.items():
        if not isinstance(found, dict):
            continue
        if "error" in found:
            lines.append(f"  {name:<22} failed: {found['error'][-300:]}")
            continue
        line = f"  {name:<22} {found['equal']} of {found['of']} answers equal"
        if first := found.get("first"):
            line += "; first difference: request {request} ({kind}), token {token}, {here} instead of {without_graphs}"
            line = line.format(**first) + f"; earliest token {found['earliest_token']}\n{'':25}{found['by_kind']}"
        lines.append(line)
    return "\n".join(lines)


def faults(report: dict[str, Any]) -> list[str]:
    """What is wrong with what was found, a line each."""
    found = []
    for name, result in report["speed"].items():
        measured = [point for kind in KINDS for point in result.get(kind, {}).values()]
        if "error" in result or not all(point["complete"] for point in measured):
            found.append(f"{name} did not come to its end")
        elif name == "bridge-graphs" and not all(point["replays"] for point in measured):
            found.append(f"{name} replayed no graph")
    for dtype, result in report["equality"].items():
        rounds = [point for point in result.values() if isinstance(point, dict)]
        if any("error" in point for point in rounds):
            found.append(f"{dtype}: an engine failed")
        elif dtype == "float64" and any(point["equal"] < point["of"] for point in rounds):
            found.append(f"{dtype}: answers differ")
        if not result["replays"]:
            found.append(f"{dtype}: no graph was replayed")
    on_cpu = report["arguments"]["device"] == "cpu"
    return [fault for fault in found if not (on_cpu and "replayed" in fault)]


def write(arguments: argparse.Namespace, report: dict[str, Any]) -> Path:
    path = Path(arguments.out) / "bench_engine.json"
    path.write_text(json.dumps(report, indent=1))
    return path


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help="whose speed is measured; may be empty")
    parser.add_argument("--equality", default="float64,bfloat16", help="dtypes in which answers are compared, or empty")
    parser.add_argument("--clients", default="1,16,64,256")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt; the most of one, for equality")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=96, help="answers compared")
    parser.add_argument("--page", type=int, default=256, help="tokens in a page of the cache")
    parser.add_argument("--blocks", type=int, default=1024, help="pages of the cache")
    parser.add_argument("--limit", type=int, default=240, help="seconds for one candidate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder for bench_engine.json")
    parser.add_argument("--tiny", action="store_true", help="a model and figures small enough for a CPU")
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.clients, arguments.rounds, arguments.prompt, arguments.tokens = "1,4", 1, 16, 8
        arguments.page, arguments.blocks, arguments.requests = 32, 64, 32
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.one:
        run_one(arguments)
    if arguments.device == "cpu" and not arguments.tiny:
        sys.exit("There is no GPU here; --tiny tries the script on a CPU.")
    report: dict[str, Any] = {"machine": machine(arguments.device), "arguments": vars(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        compare_answers(arguments, folder, report)
    with tempfile.TemporaryDirectory() as folder:
        compare_speed(arguments, folder, report)
    print(speed_table(report["speed"], "manager"))
    print(f"written to {write(arguments, report)}")
    sys.exit("\n".join(faults(report)) or 0)


if __name__ == "__main__":
    main()
