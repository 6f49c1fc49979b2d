"""LMDeploy's beginning and end on its real control plane, and what ends requests early: aborts, faults, closing."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from lmbridge import Bridge, EngineDeadError, RequestTimeoutError
from lmbridge.engines import parts
from lmbridge.engines.lmdeploy import LMDeployEngine, library
from lmbridge.engines.lmdeploy.watch import Watch
from lmbridge.errors import EngineStartError, MissingDependencyError
from tests.engines.conftest import Answer
from tests.engines.lmdeploy_scripted import Cues, Driver, driven, scripted_gpu

LONG = "abc" * 60


@pytest.fixture
def gpu() -> Iterator[Cues]:
    """LMDeploy without a GPU, and quiet about faults that are meant."""
    logger = logging.getLogger("lmdeploy")
    before = logger.level
    with scripted_gpu() as cues:
        yield cues
    logger.setLevel(before)


def bridge_over(model: str, **options: Any) -> Bridge:
    return Bridge(model, engine="lmdeploy", backend="pytorch", max_batch_size=4, log_level="CRITICAL", **options)


# ------------------------------------------------------------------------------------------------------------- loading


def test_nothing_is_loaded_before_the_start(llama: str) -> None:
    """``import lmbridge`` would take seconds, and need LMDeploy."""
    code = f"""
        import sys
        from lmbridge.engines import engine_factory
        print(engine_factory("lmdeploy", {llama!r}, {{}})().describe())
        assert not {{"torch", "lmdeploy", "transformers"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{llama} on LMDeploy"


def test_an_exit_while_loading_is_an_error(llama: str, gpu: Cues) -> None:
    """LMDeploy calls ``exit(1)`` when a check fails; off the main thread that would kill the loader without a word."""
    from lmdeploy import PytorchEngineConfig

    async def scenario() -> None:
        config = PytorchEngineConfig(thread_safe=True, max_batch_size=4, enable_metrics=False)
        engine = LMDeployEngine(llama, backend_config=config)
        with pytest.raises(EngineStartError, match=r"(?s)exit\(1\).*thread safe mode is no longer"):
            try:
                await engine.start()
            finally:
                await engine.close()

    with pytest.MonkeyPatch.context() as patch:
        from lmdeploy.pytorch.engine.engine_checker import EngineChecker

        patch.setattr("lmdeploy.pytorch.envs.enable_check_env", True)
        patch.setattr(EngineChecker, "handle", EngineChecker.check)  # a process of its own would look for a GPU first
        asyncio.run(scenario())


def test_a_script_needs_no_guard(llama: str, tmp_path: Path) -> None:
    """LMDeploy looks for the GPU in a process that it spawns: there a script without a guard would run all over again.

    The look is LMDeploy's own; it finds no GPU here, and its verdict is the error.
    """
    code = f"""
        from lmbridge import Bridge, EngineStartError
        print("the script runs", flush=True)
        try:
            Bridge({llama!r}, engine="lmdeploy", backend="pytorch", max_batch_size=4, device="cuda").start()
        except EngineStartError as error:
            print(error)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout.count("the script runs") == 1, done.stdout
    assert "LMDeploy called exit(1)" in done.stdout, done.stderr


def test_a_missing_lmdeploy_is_named_with_its_command(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user would read an ImportError from deep inside and not know what to install."""
    monkeypatch.setitem(sys.modules, "lmdeploy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lmbridge\[lmdeploy\]'"):
        library.import_library()


def test_too_old_an_lmdeploy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.15 has another ``generate``: the first request would fail."""
    monkeypatch.setattr("lmdeploy.__version__", "0.15.2")
    with pytest.raises(MissingDependencyError, match=r"0\.15\.2 is too old"):
        library.import_library()


def test_the_installed_lmdeploy_has_all_that_is_relied_on() -> None:
    """Fails, with the names, when a new LMDeploy changes what the adapter stands on."""
    assert list(library.missing_parts()) == []
    library.import_library()


@pytest.mark.parametrize(
    ("where", "name", "change", "named"),
    [
        ("lmdeploy.serve.core:AsyncEngine", "preprocess", lambda self, messages: None, "preprocess(input_ids)"),
        ("lmdeploy.serve.managers:Session", "async_abort", None, "Session.async_abort"),
        ("lmdeploy.serve.core.async_engine:GenOut", "__dataclass_fields__", {}, "GenOut.token_ids"),
    ],
)
def test_a_changed_lmdeploy_says_what_has_changed(
    llama: str, monkeypatch: pytest.MonkeyPatch, where: str, name: str, change: Any, named: str
) -> None:
    """The first request would fail with a TypeError from inside."""
    monkeypatch.setattr(parts.find(where), name, change)

    async def scenario() -> None:
        with pytest.raises(MissingDependencyError) as caught:
            async with driven(llama):
                pass
        assert named in str(caught.value)
        assert "pip install 'lmdeploy==" in str(caught.value)

    asyncio.run(scenario())


def test_a_changed_engine_says_what_has_changed(llama: str, gpu: Cues, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only an engine that was built shows would be missed: its end would never be heard of."""
    monkeypatch.setattr("lmbridge.engines.lmdeploy.library.PYTORCH_ATTRIBUTES", ("engine.req_manager.renamed",))

    async def scenario() -> None:
        with pytest.raises(MissingDependencyError, match=r"AsyncEngine\.engine\.req_manager\.renamed"):
            async with driven(llama):
                pass

    asyncio.run(scenario())


# -------------------------------------------------------------------------------------------------------------- aborts


def test_an_abort_at_every_point(llama: str, gpu: Cues) -> None:
    """An abort would be lost: LMDeploy swallows cancellations, and ignores aborts of what it has not begun."""

    async def aborted(driver: Driver, after: int) -> Answer:
        answer = driver.add(LONG)
        while len(answer.token_ids if answer.deltas else ()) < after:
            await asyncio.wait_for(answer.news.wait(), 60)
            answer.news.clear()
        before = gpu.steps
        driver.abort(answer)
        await answer.wait()
        assert answer.reason == "abort"
        assert gpu.steps - before <= 2
        assert LONG.startswith(answer.text)
        return answer

    async def scenario() -> None:
        async with driven(llama) as driver:
            free = driver.engine.stats()["cache_free"]
            for after in (0, 1, 2, 7):
                await aborted(driver, after)
            queued = driver.add(LONG)
            for _ in range(3):  # after it has been handed over, before it has a token
                await asyncio.sleep(0)
            driver.abort(queued)
            assert (await queued.wait()).reason == "abort"
            done = await driver.ask("done")
            driver.abort(done)
            driver.engine.abort_request("nobody's")
            assert (await driver.ask("next")).text == "next"
            assert driver.engine.stats()["cache_free"] == free
            assert not driver.engine._core.session_mgr.sessions

    asyncio.run(scenario())


def test_an_abort_does_not_wait_for_a_step_that_hangs(llama: str, gpu: Cues) -> None:
    """A stuck GPU would hold callers that have given up, and their cache."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            answer = driver.add(LONG)
            await answer.first()
            gpu.hang = True
            driver.abort(answer)
            assert (await answer.wait()).reason == "abort"

    asyncio.run(scenario())


def test_many_aborts_among_answers(llama: str, gpu: Cues) -> None:
    """Aborted neighbours would spoil the answers of the others, or keep their places."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            for turn in range(15):
                answers = [driver.add(f"{turn} {place} " + "word " * 5) for place in range(4)]
                for _ in range(turn):
                    await asyncio.sleep(0)
                driver.abort(answers[turn % 4])
                for place, answer in enumerate(answers):
                    await answer.wait()
                    if place != turn % 4:
                        assert answer.text == f"{turn} {place} " + "word " * 5
            assert not driver.engine._core.session_mgr.sessions

    asyncio.run(scenario())


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_crash_is_told_at_once_and_a_new_engine_follows(llama: str, gpu: Cues) -> None:
    """Callers would wait for LMDeploy's own two seconds, and every later call would fail: it never restarts."""
    with bridge_over(llama) as bridge:
        stream = bridge.stream(LONG, raw=True, timeout=60)
        next(stream)
        gpu.crash = RuntimeError("the executor broke")
        with pytest.raises(EngineDeadError) as caught:
            list(stream)
        gpu.crash = None
        assert caught.value.retryable
        assert "the executor broke" in repr(caught.value.__cause__)
        assert bridge.infer("again", raw=True, timeout=60).text == "again"
        assert bridge.health().restarts == 1
        assert gpu.released == 1


def test_a_crash_frees_everyone_and_leaves_no_task(llama: str, gpu: Cues) -> None:
    """Requests inside would hang in LMDeploy, or its tasks outlive it."""

    async def scenario() -> None:
        async with driven(llama, log_level="CRITICAL") as driver:
            answers = [driver.add(LONG) for _ in range(4)]
            await answers[0].first()
            gpu.crash = RuntimeError("gone")
            await asyncio.wait_for(driver.died.wait(), 60)
            assert driver.deaths == [gpu.crash]
            late = await driver.ask("late")
            assert isinstance(late.error, EngineDeadError)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_an_engine_process_that_ends_is_told(llama: str) -> None:
    """With ``enable_mp_engine`` callers would wait for answers of a process that is gone. The process alone is real."""

    async def scenario() -> None:
        engine = LMDeployEngine(llama)
        driver = Driver(engine)
        process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(3,))
        process.start()
        engine._core = types.SimpleNamespace(engine=types.SimpleNamespace(proc=process))
        watch = Watch(engine._core, engine._die)
        await asyncio.wait_for(driver.died.wait(), 60)
        assert "code 3" in str(driver.deaths[0])
        assert not watch.watches_process

    asyncio.run(scenario())


def test_a_hanging_step_keeps_no_caller_past_its_deadline(llama: str, gpu: Cues) -> None:
    """With LMDeploy's own pipeline the caller blocks forever. The engine serves on once the step has been given up."""
    with bridge_over(llama, stall_timeout=1.0) as bridge:
        with bridge.stream(LONG, raw=True) as stream:
            next(stream)
            gpu.hang = True
            with pytest.raises(RequestTimeoutError):
                bridge.infer(LONG, raw=True, timeout=0.2)
            with pytest.raises(EngineDeadError):  # the watchdog's verdict on those without a deadline
                list(stream)
        gpu.hang = False
        assert bridge.infer("again", raw=True, timeout=60).text == "again"


def test_slow_steps_are_no_fault(llama: str, gpu: Cues) -> None:
    """A model that takes its time would be taken for dead, or lose tokens."""
    with bridge_over(llama, stall_timeout=2.0) as bridge:
        gpu.step_time = 0.3
        assert bridge.infer("slow and long", raw=True, timeout=60).text == "slow and long"
        assert bridge.health().restarts == 0


def test_a_step_that_blocks_the_loop_costs_the_engine_only(llama: str, gpu: Cues) -> None:
    """LMDeploy's PyTorch engine runs on the loop: stuck native code stops deadlines and aborts with it."""
    with bridge_over(llama, stall_timeout=1.0) as bridge:
        assert bridge.infer("warm", raw=True, timeout=60).text == "warm"
        gpu.block = stuck = threading.Event()
        try:
            with pytest.raises(RequestTimeoutError):
                bridge.infer(LONG, raw=True, timeout=0.5)
            gpu.block = None
            assert bridge.infer("again", raw=True, timeout=60).text == "again"
        finally:
            stuck.set()
    gc.collect()  # the engine of the loop that was stuck; nobody could close it


# ------------------------------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("state", ["idle", "busy", "hanging", "dead"])
def test_closing_leaves_nothing_behind(llama: str, gpu: Cues, state: str) -> None:
    """Tasks, threads or GPU memory would pile up with every hot swap."""
    before = set(threading.enumerate())

    async def scenario() -> None:
        async with driven(llama, log_level="CRITICAL") as driver:
            answers = [driver.add(LONG) for _ in range(0 if state == "idle" else 4)]
            for answer in answers:
                await answer.first()
            gpu.hang = state == "hanging"
            gpu.crash = RuntimeError("gone") if state == "dead" else None
            if state == "dead":
                await asyncio.wait_for(driver.died.wait(), 60)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(driver.deaths) == (state == "dead")

    asyncio.run(scenario())
    assert gpu.released == 1
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("lmbridge")]
    for thread in left:
        thread.join(30)
        assert not thread.is_alive()


def test_a_start_that_is_given_up_is_unloaded(llama: str, gpu: Cues) -> None:
    """A bridge closed while it loads would keep the model for good."""

    async def scenario() -> None:
        engine = LMDeployEngine(llama, backend="pytorch", max_batch_size=4)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        await engine.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
    assert gpu.released == 1
