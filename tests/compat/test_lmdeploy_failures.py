"""Where LMDeploy's own Pipeline hangs, goes on or lies: a test for each, in which the drop-in does right."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import BridgeClosedError, RequestTimeoutError
from lmbridge.compat.lmdeploy import GenerationConfig, Pipeline, pipeline
from lmbridge.testing import ScriptedEngine

LONG = GenerationConfig(max_new_tokens=400, ignore_eos=True)
Call = Callable[..., Any]


def drain(stream: Any) -> list[Any]:
    return list(stream)


CALLS: dict[str, Call] = {
    "infer": lambda pipe, **more: pipe("a b", **more),
    "list": lambda pipe, **more: pipe(["a b", "c d", "e f"], **more),
    "stream_infer": lambda pipe, **more: drain(pipe.stream_infer("a b", **more)),
    "stream_infer of several": lambda pipe, **more: drain(pipe.stream_infer(["a b", "c d"], **more)),
    "chat": lambda pipe, **more: pipe.chat("a b", **more),
    "streamed chat": lambda pipe, **more: drain(pipe.chat("a b", stream_response=True, **more)),
    "async_batch_infer": lambda pipe, **more: asyncio.run(pipe.async_batch_infer(["a b", "c d"], **more)),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    return CALLS[request.param]


@pytest.mark.parametrize("prompts", ["Tell me a story", ["Tell me a story", "Hi"]])
def test_break_stops_generation(prompts: Any) -> None:
    """Leaving a loop that alone holds the stream frees the engine, and so does dropping one that is held."""
    with pipeline("demo") as pipe:
        for part in pipe.stream_infer(prompts, gen_config=LONG):
            assert part.finish_reason is None
            break
        assert is_idle(pipe)
        dropped = pipe.stream_infer(prompts, gen_config=LONG)
        next(dropped)
        del dropped
        assert is_idle(pipe)


def is_idle(pipe: Pipeline) -> bool:
    """Whether nothing runs once a short prompt is answered, which the engine takes after it was told of an abort."""
    pipe("Hi", gen_config=GenerationConfig(max_new_tokens=16, ignore_eos=True))
    return pipe.bridge.requests() == [] and pipe.bridge.stats()["in_flight"] == 0


def test_a_slow_reader_piles_nothing_up() -> None:
    """What comes while nobody reads is merged: two prompts of many steps, read late, come in a few parts."""
    engine = ScriptedEngine(lambda request: ["x"] * 1000, max_batch_size=2)
    with pipeline(engine) as pipe:
        stream = pipe.stream_infer(["a", "b"], gen_config=GenerationConfig(max_new_tokens=1000))
        engine.wait_for(lambda e: e.tokens == 2000)
        parts = list(stream)
        assert sum(len(part.text) for part in parts) == 2000
        assert len(parts) < 200


def test_a_dead_engine_is_rebuilt(call: Call) -> None:
    """The caller hears of the engine's death at once as a failed answer, and the next call is served by a new one."""
    engines: list[ScriptedEngine] = []

    def build() -> ScriptedEngine:
        engines.append(ScriptedEngine(manual=len(engines) == 0))
        return engines[-1]

    with pipeline(build) as pipe, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, pipe)
        engines[0].wait_for(lambda e: e.active > 0)
        engines[0].crash(RuntimeError("the batch fell apart"))
        found = waiting.result(30)
        answers = found if isinstance(found, list) else [getattr(found, "response", found)]
        failed = [answer for answer in answers if answer.finish_reason == "error"]  # what came later is served
        assert {answer.error_code for answer in failed} == {"engine_unavailable"}
        assert "the batch fell apart" in str(failed[0].error_message)
        assert pipe("still here").text == "still here"
        assert len(engines) == 2


def test_timeouts(call: Call) -> None:
    """A stuck engine holds a caller no longer than its timeout; every call takes one, and the pipeline one for all."""
    with pipeline(lambda: ScriptedEngine(manual=True), timeout=0.2) as pipe:
        with pytest.raises(RequestTimeoutError):
            call(pipe, timeout=0.05)
        with pytest.raises(TimeoutError):
            call(pipe)


def test_close_wakes_everyone(call: Call) -> None:
    """Closing ends every kind of waiting call with an error that says so, more prompts than places included."""
    engine = ScriptedEngine(manual=True, max_batch_size=1)
    pipe = pipeline(engine)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, pipe)
        engine.wait_for(lambda e: e.active == 1)
        pipe.close()
        with pytest.raises(BridgeClosedError, match="closed"):
            waiting.result(30)
    with pytest.raises(BridgeClosedError):
        call(pipe)


@pytest.mark.parametrize("name", ["list", "stream_infer of several", "async_batch_infer"])
def test_a_config_list_of_the_wrong_length_is_refused_at_once(name: str) -> None:
    """It raises before anything is sent, rather than waiting forever."""
    engine = ScriptedEngine()
    with pipeline(engine) as pipe:
        with pytest.raises(ValueError, match="gen_config"):
            CALLS[name](pipe, gen_config=[GenerationConfig()])
        with pytest.raises(ValueError, match="sessions"):
            pipe.stream_infer(["a", "b"], sessions=[pipe.session()])
        assert engine.started == []


def test_an_empty_prompt_fails_alone() -> None:
    """A prompt without tokens is one failed answer; the list's others and everybody's next calls are served."""
    with pipeline("demo") as pipe:
        good, empty, nobody = pipe(["Hi", "", []], gen_config=GenerationConfig(max_new_tokens=4))
        assert good.text
        assert (empty.finish_reason, empty.error_code) == ("error", "invalid_request")
        assert "empty" in str(empty.error_message)
        assert nobody.finish_reason == "error"
        assert pipe("").finish_reason == "error"
        [part] = pipe.stream_infer("")
        assert part.finish_reason == "error"
        reasons = {p.index: p.finish_reason for p in pipe.stream_infer(["", "Hi"], gen_config=LONG) if p.finish_reason}
        assert reasons[0] == "error"
        assert reasons[1] != "error"


@pytest.mark.parametrize("prompts", [7, None, [1, 2], ["a", 7], ("a", "b", "c"), [("a", 3)], [["a"]]])
def test_wrong_types_are_refused_at_once(prompts: Any) -> None:
    """What is no prompt raises before anything is sent, on every call."""
    engine = ScriptedEngine()
    with pipeline(engine) as pipe:
        for ask in (pipe, pipe.stream_infer, pipe.chat, lambda p: asyncio.run(pipe.async_batch_infer(p))):
            with pytest.raises(ValueError, match="Prompt"):
                ask(prompts)
        with pytest.raises(ValueError, match="gen_config"):
            pipe("a", gen_config={"top_k": 1})
        assert engine.started == []


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    head = """
        import os, signal, threading
        from lmbridge import ForkedError
        from lmbridge.compat.lmdeploy import pipeline
        from lmbridge.testing import ScriptedEngine
        engine = ScriptedEngine(manual=True)
        pipe = pipeline(engine)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


INTERRUPTED = (
    "pipe('a')",
    "pipe(['a', 'b'])",
    "list(pipe.stream_infer('a'))",
    "list(pipe.stream_infer(['a', 'b']))",
    "pipe.chat('a')",
)


@pytest.mark.parametrize("call", INTERRUPTED)
def test_ctrl_c_frees_the_engine(call: str) -> None:
    """Ctrl-C raises in the waiting call, and the engine stops working on it."""
    done = run_script(f"""
        def interrupt():
            engine.wait_for(lambda e: e.active == len(pipe.bridge.requests()) > {1 if "b" in call else 0})
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            {call}
        except KeyboardInterrupt:
            engine.wait_for(lambda e: e.active == 0 and e.aborted)
            print("interrupted and free")
        pipe.close()
    """)
    assert done.stdout == "interrupted and free\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_told() -> None:
    """In a child, calls and streams begun in the parent raise ForkedError; the parent goes on."""
    done = run_script("""
        one, many = pipe.stream_infer("a"), pipe.stream_infer(["b", "c"])
        engine.wait_for(lambda e: e.active == 3)
        pid = os.fork()
        if pid == 0:
            told = 0
            calls = [lambda: pipe("x"), lambda: pipe(["x", "y"]), lambda: pipe.chat("x"), lambda: next(one),
                     lambda: next(many), lambda: list(pipe.stream_infer(["x", "y"]))]
            for call in calls:
                try:
                    call()
                except ForkedError:
                    told += 1
            os._exit(told)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        engine.step()
        print("".join(part.text for part in one), sorted(part.text for part in many if part.text))
        pipe.close()
    """)
    assert done.stdout == "6\na ['b', 'c']\n", done.stderr
