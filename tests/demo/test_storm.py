"""The storm in small on a real model: steps that fail, callers that leave, and answers checked by meaning."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

import lmbridge.server.supervisor
from examples.demo_model import world
from examples.demo_model.world import Question
from lmbridge import Bridge, EngineDeadError
from lmbridge.engines.transformers import TransformersEngine
from tests.conftest import until

THREADS = 32
QUESTIONS_EACH = 20
STEPS_BETWEEN_FAULTS = 150


class FailingEngine(TransformersEngine):
    """The bundled model; after so many steps one raises in its forward."""

    faults = 0

    async def start(self) -> None:
        await super().start()
        assert self._core is not None
        model: Any = self._core.runner._model  # type: ignore[attr-defined]
        forward = model.forward
        steps = iter(range(10**9))

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == STEPS_BETWEEN_FAULTS and FailingEngine.faults < 3:
                FailingEngine.faults += 1
                raise RuntimeError("failed by plan")
            return forward(*args, **kwargs)

        model.forward = faulty


def draw(chance: random.Random) -> Question:
    """A question with one right answer, in a phrasing the model knows well."""
    kind = chance.randrange(4)
    if kind == 0:
        return world.capital_question("What is the capital of {}?", chance.choice(list(world.CAPITALS)))
    if kind == 1:
        return world.opposite_question("What is the opposite of {}?", chance.choice(list(world.OPPOSITES)))
    if kind == 2:
        return world.colour_question("What colour is {}?", chance.choice(list(world.COLOURS)))
    return world.story_request("Tell me a story about {}.", chance.choice(world.ANIMALS))


def ask(bridge: Bridge, question: Question, way: int) -> str | None:
    """The answer, or None when the answer was left in the middle."""
    if way == 0:
        return bridge.submit(question.text, timeout=120).result().text
    if way == 1:
        return "".join(delta.text for delta in bridge.stream(question.text, timeout=120))
    if way == 2:
        for _ in bridge.stream(question.text):
            break
        return None
    if way == 3:
        future = bridge.submit(question.text)
        future.cancel()
        return future.result().text
    return bridge.infer(question.text, timeout=120).text


@pytest.mark.timeout(300)
@pytest.mark.long
def test_storm_on_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 threads while the engine dies three times: each request gets its own right answer, or says what happened."""
    monkeypatch.setattr(lmbridge.server.supervisor, "MAX_FAILURES", 100)
    FailingEngine.faults = 0
    ends: Counter[str] = Counter()
    counting = threading.Lock()

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(QUESTIONS_EACH):
            question = draw(chance)
            try:
                answer = ask(bridge, question, chance.randrange(6))
                end = "left" if answer is None else "right" if world.is_right(question, answer) else "wrong"
            except EngineDeadError as error:
                end = "died" if error.retryable else "down"
            except CancelledError:
                end = "cancelled"
            with counting:
                ends[end] += 1

    with Bridge(lambda: FailingEngine("demo", max_batch_size=16), max_pending=64) as bridge:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))
        until(lambda: not bridge.requests())  # what was left or cancelled ends a moment later
        assert bridge.stats()["in_flight"] == 0
        assert bridge.infer("What is 2 + 3?").text == "2 + 3 = 5."
        assert bridge.health().restarts == FailingEngine.faults == 3
    print(dict(ends))
    assert sum(ends.values()) == THREADS * QUESTIONS_EACH
    assert ends["wrong"] == ends["down"] == 0
    assert ends["died"] > 0
    assert ends["right"] > THREADS * QUESTIONS_EACH / 2
