"""What following a grammar costs in a step: answers of one length by the bundled model, or another, with and without.

With a JSON schema each row's next mask is worked out after the model, before its token is chosen. ``free`` is a grammar
that allows every text: what it costs to have one at all. Figures are milliseconds of one step, as the clients see it:
the time of the round by the steps that the engine counts. ``cpu ms`` is what all threads together worked in it, which
other programs on the machine change less.

Run: ``python -m tests.benchmarks.grammar_cost [--model demo] [--clients 1,8,32] [--tokens 200] [--rounds 5]``
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmbridge import Bridge
from tests.benchmarks.measure import interleave, print_table

PROMPT = "Write a long story about a fox."


@dataclass
class Result:
    """One round of one way."""

    step_ms: float
    cpu_ms: float
    tokens_s: float


def ways(tokens: int) -> dict[str, dict[str, Any]]:
    """Options of requests whose answers all have that many tokens: nothing may end before."""
    least = 20 * tokens  # characters, more than that many tokens have
    item = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
            "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    return {
        "no grammar": {"ignore_eos": True},
        "free": {"grammar": f"start: /(.|\\n){{{least},}}/"},
        "schema": {"grammar": {"json": {"type": "array", "items": item, "minItems": least}}},
    }


def run(bridge: Bridge, clients: int, tokens: int, options: dict[str, Any]) -> Result:
    """All ask at once."""

    def ask(number: int) -> int:
        answer = bridge.infer(PROMPT, max_new_tokens=tokens, temperature=1.0, random_seed=number, **options)
        return len(answer.token_ids)

    steps, began, worked = bridge.stats()["steps"], time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(pool.map(ask, range(clients)))
    took, work = time.perf_counter() - began, time.process_time() - worked
    steps = bridge.stats()["steps"] - steps
    return Result(1000 * took / steps, 1000 * work / steps, made / took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with Bridge(arguments.model) as bridge:
        for clients in map(int, arguments.clients.split(",")):
            candidates = {
                name: partial(run, bridge, clients, arguments.tokens, options)
                for name, options in ways(arguments.tokens).items()
            }
            print_table(f"{clients} clients", interleave(candidates, arguments.rounds), "no grammar")


if __name__ == "__main__":
    main()
