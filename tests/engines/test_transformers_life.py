"""The transformers engine's beginning and end, and what ends requests early: aborts, mistakes, faults, closing."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from lmbridge.engines import encoding, engine_class, engine_factory
from lmbridge.engines.transformers import TransformersEngine, library, paged, starting
from lmbridge.errors import (
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    MissingDependencyError,
    ModelNotFoundError,
    PromptTooLongError,
)
from lmbridge.messages import Delta, GenerationConfig
from tests.conftest import until_then
from tests.engines.conftest import Brake, Driver, driven, generate, save_model

# -------------------------------------------------------------------------------------------------- before it starts


def test_it_is_the_engine_of_that_name(llama: str) -> None:
    """``Bridge(model)`` would find no engine, or refuse an option that its documentation names."""
    assert engine_class("transformers") is TransformersEngine
    engine = engine_factory("transformers", llama, {"max_batch_size": 3, "device": "cpu"})()
    assert engine.max_batch_size == 3
    assert engine.supports == set(GenerationConfig().__dict__)
    documented = inspect.getdoc(TransformersEngine) or ""
    for option in inspect.signature(TransformersEngine).parameters:
        assert f"{option}:" in documented


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_batch_size", 0),
        ("max_batch_size", None),
        ("max_batch_size", True),
        ("max_chunk_size", -1),
        ("max_context", 1),
        ("cache_share", 1.5),
        ("cache_share", 0),
        ("page_size", 2),
        ("num_blocks", "many"),
        ("threads", 0),
        ("dtype", "int3"),
        ("attn_implementation", 3),
        ("revision", 1),
    ],
)
def test_wrong_options_are_named_at_once(llama: str, option: str, value: Any) -> None:
    """A mistyped option would be found a minute later, when the model has been loaded."""
    with pytest.raises(InvalidRequestError, match=option) as caught:
        TransformersEngine(llama, **{option: value})
    assert caught.value.param == option


def test_a_folder_that_does_not_exist_is_told_at_once(tmp_path: Path) -> None:
    """A mistyped path would be found only with the first request."""
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        TransformersEngine(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError, match="no config"):
        TransformersEngine(str(tmp_path))


def test_making_one_loads_nothing(llama: str) -> None:
    """``import lmbridge`` and making a bridge would take seconds."""
    code = f"""
        import sys
        from lmbridge.engines.transformers import TransformersEngine
        print(TransformersEngine({llama!r}).describe())
        assert not {{"torch", "transformers", "psutil"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{llama} on transformers"


@pytest.mark.parametrize("name", ["transformers", "torch", "psutil"])
def test_a_missing_package_is_named_with_its_command(llama: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The user would read an ImportError from deep inside and not know what to install."""
    monkeypatch.setitem(sys.modules, name, None)

    async def scenario() -> None:
        with pytest.raises(MissingDependencyError, match="pip install"):
            async with driven(llama):
                pass

    asyncio.run(scenario())


def test_too_old_a_transformers_is_named(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some attribute would be missing in the middle of the first request."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.23.0")

    async def scenario() -> None:
        with pytest.raises(MissingDependencyError, match=r"5\.23\.0 is too old.*pip install"):
            async with driven(llama):
                pass

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------- start and close


def test_the_loop_lives_while_the_model_loads(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines, aborts and health checks would stand still until a model is loaded."""
    allowed = threading.Event()
    load = transformers.AutoModelForCausalLM.from_pretrained

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert allowed.wait(60)
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", slow)

    async def scenario() -> None:
        engine = TransformersEngine(llama, device="cpu")
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        assert not starting.done()
        with pytest.raises(EngineDeadError, match="not running"):
            driver = Driver(engine)
            driver.add([1])
        allowed.set()
        await starting
        await engine.close()

    asyncio.run(scenario())


def test_it_says_what_runs_where(llama: str) -> None:
    """A user could not tell whether the model is on the GPU, or in which precision."""

    async def scenario() -> None:
        async with driven(llama, dtype="bfloat16") as driver:
            assert driver.engine.describe() == f"{llama} on transformers (cpu, bfloat16, paged)"
            assert (await driver.ask([1, 2], max_new_tokens=4)).usage.completion_tokens == 4

    asyncio.run(scenario())


def test_generation_threads_are_daemons(llama: str) -> None:
    """A bridge that nobody closed would keep the process from ending."""

    async def scenario() -> None:
        before = set(threading.enumerate())
        async with driven(llama):
            ours = set(threading.enumerate()) - before
            assert sorted(thread.name for thread in ours) == ["lmbridge generation", "lmbridge transformers"]
            assert all(thread.daemon for thread in ours)
        for thread in ours:
            thread.join(10)
            assert not thread.is_alive()

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["at work", "loading"])
def test_a_process_ends_with_an_engine_inside(llama: str, moment: str) -> None:
    """A script without close() would hang in the end, or be aborted and lose its last output."""
    code = f"""
        from lmbridge import Bridge

        print("started")
        bridge = Bridge({llama!r}, device="cpu")
        if {moment!r} == "loading":
            bridge.submit([1, 2])
        else:
            next(iter(bridge.stream([1, 2], max_new_tokens=500)))
            future = bridge.submit([3, 4], max_new_tokens=500)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, "started"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("option", "expected"), [(3, 3), (None, 1)])
def test_the_number_of_threads_is_the_engines_own(llama: str, option: int | None, expected: int) -> None:
    """Somebody's other work with torch would suddenly run on as many threads as suit a small language model."""
    usual = torch.get_num_threads()
    found: list[int] = []

    async def scenario() -> None:
        async with driven(llama, threads=option) as driver:
            model = driver.runner._model
            model.register_forward_pre_hook(lambda *args: found.append(torch.get_num_threads()))
            await driver.ask([1, 2], max_new_tokens=2)
            await asyncio.to_thread(lambda: found.append(torch.get_num_threads()))

    torch.set_num_threads(2)
    try:
        asyncio.run(scenario())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)
    assert found == [expected, expected, 2]


def test_progress_bars_stay_out_of_what_is_no_terminal(llama: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Each restart would leave a loading bar in the service's log."""

    async def scenario() -> None:
        async with driven(llama):
            pass

    before = transformers_logging.is_progress_bar_enabled()
    asyncio.run(scenario())
    assert "Loading" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled() == before


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"num_blocks": 10**12}, MemoryError), ({"attn_implementation": "no_such"}, EngineStartError)],
)
def test_a_start_that_fails_leaves_nothing(llama: str, options: dict[str, Any], kind: type[Exception]) -> None:
    """Restarts after failed starts would fill the memory and leave threads behind."""
    models: list[weakref.ref[Any]] = []
    make = transformers.LlamaForCausalLM.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        models.append(weakref.ref(self))
        make(self, *args, **kwargs)

    async def scenario() -> None:
        engine = TransformersEngine(llama, device="cpu", **options)
        try:
            with pytest.raises(kind):
                await engine.start()
        finally:
            await engine.close()
            await engine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "__init__", watched)
        asyncio.run(scenario())
    gc.collect()
    assert models
    assert [model() for model in models] == [None] * len(models)


def test_closing_frees_model_and_threads_with_work_in_flight(llama: str) -> None:
    """Hot swaps and restarts would run out of memory."""

    async def scenario() -> weakref.ref[Any]:
        before = set(threading.enumerate())
        engine = TransformersEngine(llama, device="cpu")
        driver = Driver(engine)
        await engine.start()
        model = weakref.ref(driver.runner._model)
        answers = [driver.add([number, 1], max_new_tokens=400) for number in range(5)]
        await answers[0].first()
        await engine.close()
        await engine.close()
        assert driver.deaths == []
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()
        with pytest.raises(EngineDeadError):
            driver.add([1])
        return model

    model = asyncio.run(scenario())
    gc.collect()
    assert model() is None


def test_a_start_given_up_while_loading_leaves_nothing(llama: str) -> None:
    """A bridge closed while its model loads would leave the model running for good."""

    async def scenario() -> None:
        before = set(threading.enumerate())
        engine = TransformersEngine(llama, device="cpu")
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        starting.cancel()
        await engine.close()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()

    asyncio.run(scenario())


def test_the_cache_takes_a_small_part_of_a_cpus_memory(llama: str) -> None:
    """Loading a small model would take most of the machine's memory."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            whole = driver.runner.capacity
            assert whole <= 64 * 512  # a full batch of full contexts
        async with driven(llama, cache_share=0.0001) as driver:
            assert driver.runner.capacity < whole

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------------------ wrong requests


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "no tokens|produces no token"),
        ([], "produces no token"),
        ([1, 264], "from 0 to 263"),
        ([1, -1], "from 0 to 263"),
        ([1, "two"], "from 0 to 263"),
        ([True], "from 0 to 263"),
        (5, "A prompt is"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"content": "hi"}], "'role' and 'content'"),
        ([{"role": "user", "content": 3}], "string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "text parts"),
        ([{"role": "forbidden", "content": "hi"}], "no such role"),
        ("\ud800", "Unicode"),
    ],
)
def test_wrong_prompts_fail_alone_and_at_once(llama: str, reference: Any, prompt: Any, complaint: str) -> None:
    """One malformed prompt would be answered with nonsense, or end everybody's answers."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            other = driver.add([1, 2, 3], max_new_tokens=20)
            with pytest.raises(InvalidRequestError, match=complaint) as caught:
                driver.add(prompt)
            assert caught.value.param == "prompt"
            assert (await other.wait()).token_ids == generate(reference, [1, 2, 3], 20)
            assert driver.stat("in_flight") == 0

    asyncio.run(scenario())


def test_a_prompt_longer_than_the_room_states_both(llama: str) -> None:
    """The user could not tell by how much to shorten, or the engine would die of it."""

    async def scenario() -> None:
        async with driven(llama, max_context=32) as driver:
            with pytest.raises(PromptTooLongError, match=r"32 tokens.* room for 32"):
                driver.add([1] * 32)
            assert (await driver.ask([1] * 31)).reason == "length"
        async with driven(llama, num_blocks=2, page_size=16) as driver:
            with pytest.raises(PromptTooLongError, match=r"40 tokens.* room for 32"):
                driver.add([1] * 40)
            assert (await driver.ask([1] * 20)).usage.completion_tokens == 12

    asyncio.run(scenario())


def test_long_prompts_leave_the_loop_alone_and_fail_alone(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a book is tokenised, everybody else's stream would stand still."""
    monkeypatch.setattr(encoding, "INLINE_CHARACTERS", 100)

    async def scenario() -> None:
        async with driven(llama) as driver:
            core = driver.engine._core
            assert core is not None
            threads: list[str] = []
            encode = core.encoder.encode

            def watched(*args: Any) -> list[int]:
                threads.append(threading.current_thread().name)
                return encode(*args)

            monkeypatch.setattr(core.encoder, "encode", watched)
            long = driver.add("long " * 40, max_new_tokens=3)
            conversation = driver.add([{"role": "user", "content": "long " * 40}], max_new_tokens=3)
            too_long = driver.add("é" * 400)  # two tokens each
            short = driver.add("short", max_new_tokens=3)
            assert driver.stat("in_flight") == 4
            await driver.all([short, long, conversation, too_long])
            assert isinstance(too_long.error, PromptTooLongError)
            assert [answer.reason for answer in (long, conversation, short)] == ["length"] * 3
            assert threads.count("lmbridge transformers") == 3
            assert (long.usage.prompt_tokens, driver.stat("in_flight")) == (200, 0)

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------------------- abort


def test_abort_while_queued(llama: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A request given up before its first step would still be worked on."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            before = driver.stat("steps")
            brake = Brake(driver)
            first = driver.add([1], max_new_tokens=3)
            await brake.arrival()
            second = driver.add([2], max_new_tokens=400)
            driver.abort(second)
            assert second.reason == "abort"
            brake.lift()
            await first.wait()
            assert driver.stat("steps") - before == 3
            assert driver.holders == set()

    asyncio.run(scenario())


def test_abort_while_the_prompt_is_read(llama: str) -> None:
    """A request given up in the middle of a long prompt would keep its part of the cache."""

    async def scenario() -> None:
        async with driven(llama, max_chunk_size=16, max_batch_size=4) as driver:
            brake = Brake(driver)
            answer = driver.add([3] * 200, max_new_tokens=400)
            for _ in range(3):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            assert len(driver.holders) == 1
            driver.abort(answer)
            before = driver.stat("steps")
            assert (answer.reason, answer.usage.prompt_tokens, answer.token_ids) == ("abort", 200, [])
            brake.lift()
            await driver.ask([1], max_new_tokens=1)
            assert driver.stat("steps") - before <= 2
            assert driver.holders == set()
            assert driver.stat("cache_free") == 1.0

    asyncio.run(scenario())


def test_abort_while_decoding_frees_the_cache_within_two_steps(llama: str) -> None:
    """A user who leaves would go on costing memory and time."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            brake = Brake(driver)
            answers = [driver.add([number, 7], max_new_tokens=400) for number in range(3)]
            for _ in range(5):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            assert len(driver.holders) == 3
            driver.abort(answers[1])
            before = driver.stat("steps")
            for _ in range(2):
                brake.step()
                await brake.arrival()
            assert driver.stat("steps") - before == 2
            holders = {key.split("#")[0] for key in driver.holders}
            assert holders == {answer.request.id for answer in (answers[0], answers[2])}
            assert (answers[1].reason, answers[1].usage.completion_tokens) == ("abort", len(answers[1].token_ids))
            told = len(answers[1].deltas)
            for answer in (answers[0], answers[2]):
                driver.abort(answer)
            brake.lift()
            await driver.ask([1], max_new_tokens=2)
            assert len(answers[1].deltas) == told  # what was under way arrives at nobody
            assert driver.stat("cache_free") == 1.0

    asyncio.run(scenario())


def test_abort_of_what_is_finished_or_unknown_is_ignored(llama: str) -> None:
    """An abort that comes a moment late would fail, or end another request."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            answer = await driver.ask([1, 2], max_new_tokens=3)
            driver.abort(answer)
            driver.engine.abort_request("nobody")
            assert [delta.finish_reason for delta in answer.deltas][-1] == "length"

    asyncio.run(scenario())


def test_abort_of_one_whose_ending_token_does_not_exist(llama: str, reference: Any) -> None:
    """A caller's stop_token_ids of another model would kill the engine when he leaves."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            other = driver.add([1, 2, 3], max_new_tokens=100)
            answer = await driver.add([4], max_new_tokens=400, ignore_eos=True, stop_token_ids=[10**6]).first()
            driver.abort(answer)
            assert (await other.wait()).token_ids == generate(reference, [1, 2, 3], 100)
            await driver.ask([1], max_new_tokens=2)
            assert driver.holders == set()
            assert driver.deaths == []

    asyncio.run(scenario())


def test_abort_tells_what_was_held_back(llama: str) -> None:
    """The partial text of an aborted answer would lack its last characters."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            free = await driver.ask("tell me", max_new_tokens=30)
            brake = Brake(driver)
            word = free.text[:10] + "never"
            answer = driver.add("tell me", max_new_tokens=400, stop_words=[word])
            await brake.arrival()
            brake.step()
            await brake.arrival()  # the first token was delivered, and is held back
            await asyncio.sleep(0)
            assert answer.deltas == []
            driver.abort(answer)
            brake.lift()
            assert answer.token_ids == free.token_ids[:1]
            assert free.text.startswith(answer.text)

    asyncio.run(scenario())


def test_abort_while_tokenising(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt given up while it is tokenised would be answered all the same."""
    monkeypatch.setattr(encoding, "INLINE_CHARACTERS", 10)

    async def scenario() -> None:
        async with driven(llama) as driver:
            before = driver.stat("steps")
            answer = driver.add("long " * 40, max_new_tokens=400)
            driver.abort(answer)
            assert answer.reason == "abort"
            await driver.ask("another " * 4, max_new_tokens=2)
            assert len(answer.deltas) == 1
            assert driver.stat("steps") - before == 2

    asyncio.run(scenario())


def test_an_id_may_be_used_again_at_once(llama: str, reference: Any) -> None:
    """The abort of a request would end the one that follows it under the same id."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            first = await driver.add([1, 2], max_new_tokens=400).first()
            driver.abort(first)
            again: list[Delta] = []
            ended = asyncio.Event()

            def sink(delta: Delta) -> None:
                again.append(delta)
                if delta.finish_reason:
                    ended.set()

            request = driver.request([9, 9], max_new_tokens=20)
            request.id = first.request.id
            driver.engine.add_request(request, sink)
            await asyncio.wait_for(ended.wait(), 60)
            assert [token for delta in again for token in delta.token_ids] == generate(reference, [9, 9], 20)

    asyncio.run(scenario())


def test_a_cancellation_that_overtakes_its_request_is_repeated(llama: str) -> None:
    """A request aborted at an unlucky moment would run to its end, unseen."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            manager = driver.runner._manager
            brake = Brake(driver)
            manager.cancel_request = lambda request_id: None  # as if read too early
            answer = driver.add([1], max_new_tokens=400)
            driver.abort(answer)
            del manager.cancel_request
            brake.lift()
            last = await driver.ask([2], max_new_tokens=30)
            assert last.reason == "length"
            assert driver.holders == set()

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------------------- faults


def test_a_fault_in_the_model_is_death_with_its_cause(llama: str) -> None:
    """Callers would wait forever for an engine whose thread is gone."""

    async def scenario() -> weakref.ref[Any]:
        async with driven(llama) as driver:
            model = driver.runner._model
            answers = [driver.add([number, 1], max_new_tokens=400) for number in range(3)]
            await answers[0].first()

            def fail(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError("device-side assert")

            model.forward = fail
            await asyncio.wait_for(driver.died.wait(), 60)
            (cause,) = driver.deaths
            assert isinstance(cause, RuntimeError)
            assert str(cause) == "device-side assert"
            with pytest.raises(EngineDeadError) as caught:
                driver.add([1])
            assert caught.value.__cause__ is cause
            assert driver.stat("in_flight") == 0
            return weakref.ref(model)

    with library.quiet():  # or pytest would keep what transformers logs, with its traceback
        model = asyncio.run(scenario())
    gc.collect()
    assert model() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_a_request_inside_is_death_too(llama: str) -> None:
    """An engine that dies while idle would swallow the next request."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            processor = driver.runner._manager.batch_processor

            def exit_thread() -> None:
                raise SystemExit("a library has called exit()")

            processor.prepare_next_batch = exit_thread
            await asyncio.wait_for(driver.died.wait(), 60)
            assert "ended without an error" in str(driver.deaths[0])

    asyncio.run(scenario())


def test_a_request_the_manager_refuses_is_death(llama: str) -> None:
    """A manager that takes no requests says so in a log and leaves the caller waiting."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            driver.runner._manager.add_request = lambda *args, **kwargs: None
            answer = driver.add([1])
            await asyncio.wait_for(driver.died.wait(), 60)
            assert len(driver.deaths) == 1
            assert answer.deltas == []

    asyncio.run(scenario())


def test_one_refused_by_the_manager_fails_alone(llama: str, reference: Any) -> None:
    """A fault that concerns one request would end the others."""

    async def scenario() -> None:
        async with driven(llama) as driver:

            def picky(kwargs: dict[str, Any]) -> None:
                raise ValueError("not this one")

            other = await driver.add([1, 2, 3], max_new_tokens=60).first()
            driver.runner._manager.logit_processor.check_kwargs = picky
            answer = await driver.ask([4])
            assert isinstance(answer.error, EngineError)
            assert "not this one" in str(answer.error)
            assert (await other.wait()).token_ids == generate(reference, [1, 2, 3], 60)
            assert driver.deaths == []

    asyncio.run(scenario())


def test_a_sink_that_raises_ends_its_own_request_only(llama: str, reference: Any) -> None:
    """A mistake in one caller's path would lose everybody's tokens of that step."""

    async def scenario() -> None:
        async with driven(llama) as driver:

            def broken(delta: Delta) -> None:
                raise ValueError("no more")

            driver.engine.add_request(driver.request([9], max_new_tokens=400), broken)
            other = await driver.ask([1, 2, 3], max_new_tokens=20)
            assert other.token_ids == generate(reference, [1, 2, 3], 20)
            assert driver.stat("in_flight") == 0
            assert driver.holders == set()

    asyncio.run(scenario())


def test_steps_and_tokens_are_counted(llama: str) -> None:
    """What an abort has saved could not be told."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            tokens, steps = driver.stat("tokens"), driver.stat("steps")
            await driver.all([driver.add([1, 2], max_new_tokens=7), driver.add([3], max_new_tokens=7)])
            assert driver.stat("tokens") - tokens == 14
            assert 7 <= driver.stat("steps") - steps <= 14

    asyncio.run(scenario())


def test_a_model_may_have_more_rows_than_its_tokenizer(tmp_path: Path) -> None:
    """A padded vocabulary's spare tokens would break the text of an answer."""
    model = save_model(tmp_path, vocab_size=300)

    async def scenario() -> None:
        async with driven(model) as driver:
            answer = await driver.ask([290, 299], max_new_tokens=50, temperature=50.0, random_seed=1)
            assert max(answer.token_ids) > 257
            assert len(answer.token_ids) == 50

    asyncio.run(scenario())


def test_an_abort_under_a_full_cache_leaves_the_others_served(llama: str, reference: Any) -> None:
    """After one caller leaves, those who had lost their cache to him would wait for ever, and everybody after them."""

    async def scenario() -> None:
        async with driven(llama, num_blocks=8, page_size=16) as driver:
            answers = [driver.add([number] * 30, max_new_tokens=90, ignore_eos=True) for number in (1, 2)]
            await until_then(lambda: max(len(answer.deltas) for answer in answers) >= 45)
            longer, other = sorted(answers, key=lambda answer: -len(answer.deltas))
            driver.abort(longer)
            assert (await driver.ask([3] * 5, max_new_tokens=3)).reason == "length"
            await other.wait()
            prompt = [answers.index(other) + 1] * 30
            assert other.token_ids == generate(reference, prompt, 90)
            assert driver.deaths == []

    asyncio.run(scenario())


def test_a_scheduler_that_runs_nothing_is_death(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers would wait beside a living thread that has forgotten them all, each until a deadline of his own."""
    monkeypatch.setattr(paged, "WEDGED", 3)

    async def scenario() -> None:
        async with driven(llama) as driver:
            scheduler = driver.runner._manager.batch_processor.scheduler
            scheduler.schedule_batch = lambda *args: ([], False, 0, 0)
            driver.add([1, 2])
            await asyncio.wait_for(driver.died.wait(), 60)
            assert "schedules nothing" in str(driver.deaths[0])

    asyncio.run(scenario())


def test_an_abort_while_a_prompt_is_read_under_a_full_cache_leaves_the_others_served(llama: str) -> None:
    """Whoever had lost his cache would wait for the end of a request that was cancelled, and so would all after him."""

    async def scenario() -> None:
        async with driven(llama, max_chunk_size=8, max_batch_size=4) as driver:
            brake = Brake(driver)
            reader = driver.add([2] * 80, max_new_tokens=5)
            for _ in range(3):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            driver.runner._manager.batch_processor.scheduler.block_new_requests = True  # as when a cache has been taken
            waiting = driver.add([3] * 5, max_new_tokens=3)
            driver.abort(reader)
            brake.lift()
            assert (await waiting.wait()).reason == "length"
            assert driver.deaths == []

    asyncio.run(scenario())


def test_a_runner_closed_while_a_step_hangs_lets_go_of_the_model_afterwards(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one hung step the process would hold a model that nobody uses until it ends."""
    monkeypatch.setattr(starting, "CLOSE_TIMEOUT", 0.1)

    async def scenario() -> weakref.ref[Any]:
        engine = TransformersEngine(llama, device="cpu")
        driver = Driver(engine)
        await engine.start()
        model = weakref.ref(driver.runner._model)
        brake = Brake(driver)
        driver.add([1, 2], max_new_tokens=5)
        await brake.arrival()
        await engine.close()
        brake.lift()
        for thread in threading.enumerate():
            if thread.name in ("lmbridge generation", "lmbridge late end"):
                await asyncio.to_thread(thread.join, 30)
        return model

    with library.quiet():  # or pytest would keep what transformers logs, with its traceback
        model = asyncio.run(scenario())
    gc.collect()
    assert model() is None
