"""The plain runner: every request a ``generate`` of its own, in turns, with all that users have from the paged one."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from lmbridge.engines.transformers import TransformersEngine
from lmbridge.errors import EngineDeadError, EngineError
from tests.conftest import until_then
from tests.engines.conftest import Brake, Driver, driven, generate

PROMPTS = [[5, 9, 200], [7] * 40, list(range(1, 130)), [250, 3], list(range(200, 20, -1)), [77]]


def test_answers_in_a_crowd_equal_generate(llama: str, reference: Any) -> None:
    """Answers of models that batching does not serve would be mixed up between callers."""

    async def scenario() -> None:
        async with driven(llama, runner="plain", max_chunk_size=32) as driver:
            answers = await driver.all([driver.add(prompt, max_new_tokens=30) for prompt in PROMPTS])
            assert driver.engine.describe().endswith("plain)")
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.token_ids == generate(reference, prompt, 30)
            assert answer.reason == "length"
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 30)

    asyncio.run(scenario())


@pytest.mark.parametrize("settings", [{"temperature": 1.5}, {"top_p": 0.8, "repetition_penalty": 1.3, "logprobs": 2}])
def test_a_seed_gives_the_same_text_on_either_runner(llama: str, settings: dict[str, Any]) -> None:
    """A seeded answer would change when a release of the library sends a model to the other runner."""

    async def tokens(runner: str) -> list[int]:
        async with driven(llama, runner=runner) as driver:
            crowd = [driver.add([number] * 9, max_new_tokens=30, temperature=1.0) for number in range(4)]
            among = driver.add([1, 2, 3], max_new_tokens=30, random_seed=7, **settings)
            await driver.all([*crowd, among])
            return among.token_ids

    async def scenario() -> None:
        assert await tokens("plain") == await tokens("paged")

    asyncio.run(scenario())


def test_requests_advance_in_turn(llama: str) -> None:
    """One caller's answer would stand still until another's is complete."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:
            brake = Brake(driver)
            answers = [driver.add([number, 3], max_new_tokens=50) for number in range(3)]
            for _ in range(3 * 6):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            counts = [len(answer.token_ids) for answer in answers]
            assert max(counts) - min(counts) <= 1
            brake.lift()
            await driver.all(answers)

    asyncio.run(scenario())


def test_a_long_prompt_is_read_in_turns_too(llama: str, reference: Any) -> None:
    """A stream would stand still while somebody's long prompt is read."""
    prompt = [token % 250 for token in range(320)]

    async def scenario() -> None:
        async with driven(llama, runner="plain", max_chunk_size=32) as driver:
            stream = await driver.add([4, 4], max_new_tokens=100).first()
            brake = Brake(driver)
            await brake.arrival()
            long = driver.add(prompt, max_new_tokens=4)
            seen = len(stream.token_ids)
            while not long.deltas:
                brake.step()
                await brake.arrival()
            assert len(stream.token_ids) - seen >= 320 // 32 - 1
            brake.lift()
            await driver.all([stream, long])
            assert long.token_ids == generate(reference, prompt, 4)

    asyncio.run(scenario())


def test_an_abort_ends_within_two_runs(llama: str) -> None:
    """A user who leaves would go on costing time and memory."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:
            brake = Brake(driver)
            answer, other = (driver.add([number, 7], max_new_tokens=200) for number in range(2))
            for _ in range(6):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            driver.abort(answer)
            assert (answer.reason, len(answer.deltas[-1].token_ids)) == ("abort", 0)
            told, before = len(answer.deltas), len(other.token_ids)
            for _ in range(4):
                brake.step()
                await brake.arrival()
            assert len(answer.deltas) == told
            assert len(other.token_ids) - before >= 3  # the turns are the other's now
            brake.lift()
            driver.abort(other)

    asyncio.run(scenario())


def test_an_abort_in_the_middle_of_a_long_prompt_ends_its_reading(llama: str) -> None:
    """Reading a prompt that nobody waits for would hold up the others."""

    async def scenario() -> None:
        async with driven(llama, runner="plain", max_chunk_size=16) as driver:
            brake = Brake(driver)
            answer = driver.add([3] * 400, max_new_tokens=100)
            for _ in range(2):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            driver.abort(answer)
            before = driver.stat("steps")
            brake.lift()
            await driver.ask([1], max_new_tokens=2)
            assert driver.stat("steps") - before <= 2 + 2

    asyncio.run(scenario())


def test_a_fault_in_one_run_fails_one_request(llama: str, reference: Any) -> None:
    """One request's fault would end everybody's, though each has a run of its own."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:
            model = driver.runner._model
            forward = model.forward

            def picky(*args: Any, **kwargs: Any) -> Any:
                if kwargs["input_ids"][0, 0] == 66:
                    raise ValueError("not this one")
                return forward(*args, **kwargs)

            model.forward = picky
            other = driver.add([1, 2, 3], max_new_tokens=30)
            answer = await driver.ask([66, 1], max_new_tokens=5)
            assert isinstance(answer.error, EngineError)
            assert isinstance(answer.error.__cause__, ValueError)
            del model.forward
            assert (await other.wait()).token_ids == generate(reference, [1, 2, 3], 30)
            assert driver.deaths == []

    asyncio.run(scenario())


def test_a_device_error_is_death(llama: str) -> None:
    """Every later request would fail on a device that only a new process can use, one by one."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:

            def fail(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            driver.runner._model.forward = fail
            driver.add([1])
            await asyncio.wait_for(driver.died.wait(), 60)
            assert "CUDA error" in str(driver.deaths[0])
            with pytest.raises(EngineDeadError):
                driver.add([1])
            del driver.runner._model.forward

    asyncio.run(scenario())


def test_closing_with_work_in_flight_frees_model_and_threads(llama: str) -> None:
    """Hot swaps would run out of memory."""

    async def scenario() -> weakref.ref[Any]:
        before = set(threading.enumerate())
        engine = TransformersEngine(llama, device="cpu", runner="plain")
        driver = Driver(engine)
        await engine.start()
        model = weakref.ref(driver.runner._model)
        answers = [driver.add([number, 1], max_new_tokens=400) for number in range(5)]
        await answers[0].first()
        await engine.close()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()
        return model

    model = asyncio.run(scenario())
    gc.collect()
    assert model() is None


def test_stop_words_and_ends_hold(llama: str, reference: Any) -> None:
    """A model on this runner would talk past its stop words."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:
            free = await driver.ask("tell me", max_new_tokens=30)
            word = free.text[5:8]
            stopped = await driver.ask("tell me", max_new_tokens=30, stop_words=[word])
            assert (stopped.text, stopped.reason) == (free.text[: free.text.index(word)], "stop")
            last = free.token_ids[10]
            ended = await driver.ask("tell me", max_new_tokens=30, stop_token_ids=[last])
            assert ended.token_ids == free.token_ids[: free.token_ids.index(last)]
            assert ended.reason == "stop"

    asyncio.run(scenario())


def test_a_failed_attempt_leaves_nothing_behind(tmp_path: Any) -> None:
    """Figures would show a request that nobody has sent, in the engine for ever."""
    import transformers

    from tests.engines.conftest import byte_level_tokenizer

    config = transformers.MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)  # cannot be read in pieces
    byte_level_tokenizer().save_pretrained(tmp_path)

    async def scenario() -> None:
        async with driven(str(tmp_path)) as driver:
            assert driver.engine.runner == "plain"
            assert (driver.stat("in_flight"), driver.stat("cache_free")) == (0.0, 1.0)

    asyncio.run(scenario())


def test_who_leaves_the_line_takes_no_thread_along(llama: str) -> None:
    """Callers who lose patience while a long answer holds the model would leave a thread each behind."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:
            brake = Brake(driver)
            first = driver.add([1], max_new_tokens=400)
            await brake.arrival()
            before = threading.active_count()
            for answer in [driver.add([number, 2], max_new_tokens=400) for number in range(20)]:
                driver.abort(answer)
            await until_then(lambda: threading.active_count() <= before)
            driver.abort(first)
            brake.lift()

    asyncio.run(scenario())


def test_an_ending_token_that_does_not_exist_ends_nothing(llama: str) -> None:
    """stop_token_ids of another model would fail the request, on this runner only."""

    async def scenario() -> None:
        async with driven(llama, runner="plain") as driver:
            answer = await driver.ask([1, 2], max_new_tokens=4, stop_token_ids=[2**70])
            assert answer.reason == "length"

    asyncio.run(scenario())
