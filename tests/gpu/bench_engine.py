"""The transformers engine on a GPU: tokens a second and memory beside transformers' own manager.

The model has the shape of Llama 3.2 1B, random weights in bfloat16, and a tokenizer made on the spot; nothing is
fetched. Every client asks for one answer of a fixed length, greedily. Candidates, each in a process of its own:

- bridge: a thread a client calls ``bridge.infer``; the engine as it is
- manager, manager-graphs, manager-best: transformers' manager driven by one thread, without CUDA graphs, with them, and
  with asynchronous batching beside
- bridge-graphs (experiment): the engine replays CUDA graphs in steps where every request is greedy. A graph holds the
  choice of the token too, so that a step with a request that samples cannot be one; the engine has no such option
- bridge-segments (experiment): the engine's attention for CPUs, on the GPU

One call does all, prints a table and writes ``bench_engine.json``. It needs this repository with what it requires, and
no network. ``--tiny`` proves on a CPU that it works.

Run: ``python -m tests.gpu.bench_engine [--clients 1,16,64,256] [--rounds 3] [--out FOLDER] [--tiny]``
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

CANDIDATES = ["bridge", "manager", "manager-graphs", "manager-best", "bridge-graphs", "bridge-segments"]
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
TINY = {**SHAPE, "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
REPOSITORY = Path(__file__).resolve().parents[2]
CHUNK = 2048  # prompt tokens in a step, for every candidate
Ask = Callable[[list[list[int]], int], int]


def save_model(folder: str, shape: dict[str, Any], device: str) -> None:
    """Random weights, and a tokenizer that has a text for every id."""
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
    model.save_pretrained(folder)
    vocabulary = {byte: token for token, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"w{token}": token for token in range(len(vocabulary), size - 1)} | {"<eos>": size - 1}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)


# ---------------------------------------------------------------------------------------- one candidate, in its process


def ask_bridge(folder: str, arguments: argparse.Namespace) -> Ask:
    from lmbridge import Bridge

    if arguments.one == "bridge-graphs":
        _replay_greedy_steps()
    if arguments.one == "bridge-segments":
        from lmbridge.engines.transformers import continuous

        continuous._attends_by_segments = lambda model, options: True
    most = max(map(int, arguments.clients.split(",")))
    options = {"dtype": "bfloat16", "device": arguments.device, "max_batch_size": most, "max_chunk_size": CHUNK}
    options |= {"num_blocks": arguments.blocks, "page_size": arguments.page}
    bridge = Bridge(folder, **options).start()
    pool = ThreadPoolExecutor(most)

    def ask(prompts: list[list[int]], tokens: int) -> int:
        def one(prompt: list[int]) -> int:
            answer = bridge.infer(prompt, max_new_tokens=tokens, ignore_eos=True)
            return len(answer.token_ids)

        return sum(pool.map(one, prompts))

    return ask


def _replay_greedy_steps() -> None:
    """Graphs are captured, and replayed, only in steps that leave the sampler out."""
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    from lmbridge.engines.transformers import continuous

    configure, choose = continuous._batching_config, ModelRunner._get_forward_fn

    def configure_with_graphs(model: Any, options: Any) -> Any:
        config = configure(model, options)
        config.use_cuda_graph = True
        return config

    def choose_by_sampler(self: Any, use_block_table: bool) -> Any:
        function, graph = choose(self, use_block_table=use_block_table)
        return function, graph and not self.logit_processor.do_processing

    continuous._batching_config = configure_with_graphs
    ModelRunner._get_forward_fn = choose_by_sampler


def ask_manager(folder: str, arguments: argparse.Namespace) -> Ask:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    settings: dict[str, Any] = {
        "num_blocks": arguments.blocks,
        "page_size": arguments.page,
        "max_batch_tokens": CHUNK,
        "max_requests_per_batch": max(map(int, arguments.clients.split(","))),
        "use_cuda_graph": arguments.one != "manager",
        "use_async_batching": arguments.one == "manager-best",
        "auto_switch_to_flash": arguments.device != "cpu",
    }
    manager = model.to(arguments.device).init_continuous_batching(
        generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
    )
    manager.warmup()
    manager.start()

    def ask(prompts: list[list[int]], tokens: int) -> int:
        left = set(manager.add_requests(prompts, max_new_tokens=tokens))
        count = 0
        while left:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(f"the manager died: {manager.background_thread_status.fatal_error!r}")
            if result is not None and result.is_finished():
                left.discard(result.request_id)
                count += len(result.generated_tokens)
        return count

    return ask


def run_one(arguments: argparse.Namespace) -> None:
    """Measure one candidate and write what was found; the process then just ends, with threads and all."""
    build = ask_bridge if arguments.one.startswith("bridge") else ask_manager
    ask = build(arguments.folder, arguments)
    found: dict[str, Any] = {}
    for clients in map(int, arguments.clients.split(",")):
        found[str(clients)] = measure(ask, clients, arguments)
    Path(arguments.out).write_text(json.dumps(found))
    os._exit(0)


def measure(ask: Ask, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = arguments.device != "cpu"
    words = random.Random(clients)
    rates, counted = [], 0
    for number in range(-1, arguments.rounds):  # the first one warms up
        prompts = [[words.randrange(256, 1000) for _ in range(arguments.prompt)] for _ in range(clients)]
        if cuda and number == 0:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        counted = ask(prompts, arguments.tokens)
        rates.append(counted / (time.perf_counter() - start))
    gib = 1 << 30
    return {
        "tokens_per_s": rates[1:],
        "median": statistics.median(rates[1:]),
        "complete": counted == clients * arguments.tokens,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / gib if cuda else None,
        "reserved_gib": torch.cuda.memory_reserved() / gib if cuda else None,
    }


# --------------------------------------------------------------------------------------------------- all the candidates


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, TINY if arguments.tiny else SHAPE, arguments.device)
        for name in arguments.candidates.split(","):
            results[name] = _in_process(name, folder, arguments)
            print(f"{name}: {json.dumps(_short(results[name]))}", flush=True)
    return results


def _in_process(name: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as answer:
        command = [sys.executable, "-m", "tests.gpu.bench_engine", "--one", name, "--folder", folder]
        command += ["--out", answer.name, "--device", arguments.device]
        for option in ("clients", "rounds", "prompt", "tokens", "blocks", "page"):
            command += [f"--{option}", str(getattr(arguments, option))]
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {arguments.limit} s"}
        if done.returncode or not Path(answer.name).stat().st_size:
            return {"error": (done.stderr or done.stdout)[-1500:]}
        found: dict[str, Any] = json.loads(Path(answer.name).read_text())
        return found


def _short(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        return {"error": result["error"][-300:]}
    return {clients: round(found["median"], 1) for clients, found in result.items()}


def table(results: dict[str, Any], base: str) -> str:
    """Tokens a second, the ratio to the native manager, and memory."""
    lines = [f"{'candidate':<16} {'clients':>7} {'tokens/s':>9} {'/ ' + base:>10} {'peak GiB':>9} {'reserved GiB':>13}"]
    for name, result in results.items():
        for clients, found in result.items() if "error" not in result else ():
            other = results.get(base, {}).get(clients)
            ratio = f"{found['median'] / other['median']:.3f}" if other else "-"
            memory = [f"{found[key]:.2f}" if found[key] else "-" for key in ("peak_allocated_gib", "reserved_gib")]
            lines.append(f"{name:<16} {clients:>7} {found['median']:>9.0f} {ratio:>10} {memory[0]:>9} {memory[1]:>13}")
    return "\n".join(lines)


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--clients", default="1,16,64,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--page", type=int, default=256, help="tokens in a page of the cache")
    parser.add_argument("--blocks", type=int, default=1024, help="pages of the cache")
    parser.add_argument("--limit", type=int, default=300, help="seconds for one candidate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder for bench_engine.json")
    parser.add_argument("--tiny", action="store_true", help="a model and figures small enough for a CPU")
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.clients, arguments.rounds, arguments.prompt, arguments.tokens = "1,4", 1, 16, 8
        arguments.page, arguments.blocks = 32, 64
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.one:
        run_one(arguments)
    if arguments.device == "cpu" and not arguments.tiny:
        sys.exit("There is no GPU here; --tiny tries the script on a CPU.")
    results = run_all(arguments)
    print(table(results, "manager"))
    report = {"machine": machine(arguments.device), "arguments": vars(arguments), "results": results}
    path = Path(arguments.out) / "bench_engine.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
