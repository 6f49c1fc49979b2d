"""A thread pool over one model, and the same without a pool: ``submit`` gives futures.

Run it with ``python examples/thread_pool.py``.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from lmbridge import Bridge, Response

COUNTRIES = ("France", "Japan", "Peru", "Kenya", "Norway", "Egypt", "Cuba", "Nepal")
QUESTIONS = [f"What is the capital of {country}?" for country in COUNTRIES]

if __name__ == "__main__":
    with Bridge("demo") as bridge, ThreadPoolExecutor(max_workers=8) as pool:
        for question, response in zip(QUESTIONS, pool.map(bridge.infer, QUESTIONS), strict=True):
            print(f"{question} {response.text}")

        futures: dict[Future[Response], int] = {bridge.submit(f"What is {n} + {n}?"): n for n in range(1, 9)}
        for future in as_completed(futures):  # the first to be ready comes first
            n = futures[future]
            print(f"{n} + {n}? {future.result().text}")
