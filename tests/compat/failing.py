"""What becomes of a Pipeline when something goes wrong: LMDeploy's own and the drop-in, by the same calls.

Run: ``python -m tests.compat.failing {lmdeploy,lmbridge} MODEL``; it prints as JSON what was observed at each event,
in the words of the table in docs/moving/from-lmdeploy.rst. LMDeploy is all there; only the executor that drives the
GPU is scripted. What hangs is left behind, and the process ends without waiting for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.engines.lmdeploy_scripted import Cues, scripted_gpu

PATIENCE = 10.0  # seconds after which somebody who waits is taken to hang; no answer here takes a tenth of it
LENGTH = 150  # tokens of a long answer
Observation = Callable[[], str]
"""Says what was observed; waits for it where it has to."""
EVENTS: dict[str, Callable[[Trial], Observation]] = {}


class Trial:
    """One pipeline, and the means to trouble it."""

    def __init__(self, library: Any, model: str, cues: Cues) -> None:
        self.cues = cues
        self._library = library
        self._model = model
        self.pipe = self.build()

    def build(self, **config: Any) -> Any:
        fields = {"session_len": 400, "max_batch_size": 2, "enable_metrics": False, **config}
        config = self._library.PytorchEngineConfig(**fields)
        return self._library.pipeline(self._model, backend_config=config, log_level="CRITICAL")

    def long(self) -> dict[str, Any]:
        """Arguments that make an answer long, and its prompt go to the model as it is."""
        config = self._library.GenerationConfig(max_new_tokens=LENGTH, ignore_eos=True)
        return {"gen_config": config, "do_preprocess": False}

    def working(self) -> None:
        """Return when the engine has made a few steps."""
        self.cues.wait_for(lambda cues: cues.steps > 3)

    def went_on(self) -> str:
        """Whether an answer that was begun and left goes on: it would be through before one that begins now."""
        self.pipe("next", **self.long())
        return "generation goes on to its end" if self.cues.tokens >= 2 * LENGTH else "generation stops"


class Waiting:
    """A call on a thread of its own, that may never return."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._told = "the caller hangs"
        self._end = time.monotonic() + PATIENCE
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._told = told(self._call)

    def __call__(self) -> str:
        self._thread.join(max(0.0, self._end - time.monotonic()))
        return self._told


def told(call: Callable[[], Any]) -> str:
    """What the caller is told: the name of an error, or what kind of answer."""
    try:
        found = call()
    except BaseException as error:
        return type(error).__name__
    last = found[-1] if isinstance(found, list) else getattr(found, "response", found)
    if last.finish_reason == "error":
        return "a failed Response"
    if last.finish_reason is None and last.generate_token_len < LENGTH:
        return "a truncated text, as if it were whole"
    return "an answer"


# What hangs comes first, so that the patience for all of it runs at the same time.


def event(name: str) -> Callable[[Callable[[Trial], Observation]], Callable[[Trial], Observation]]:
    def register(scenario: Callable[[Trial], Observation]) -> Callable[[Trial], Observation]:
        EVENTS[name] = scenario
        return scenario

    return register


@event("the GPU is stuck, ``timeout=1``")
def stuck(trial: Trial) -> Observation:
    trial.cues.hang = True
    return Waiting(lambda: trial.pipe("abc", timeout=1))


@event("a forked child calls")
def forked(trial: Trial) -> Observation:
    trial.pipe("abc")
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.write(writer, told(lambda: trial.pipe("abc")).encode())
        os._exit(0)

    end = time.monotonic() + PATIENCE

    def observe() -> str:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        found = os.read(reader, 1000).decode() if ready else "the caller hangs"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return found

    return observe


@event("a ``gen_config`` list too short")
def wrong_length(trial: Trial) -> Observation:
    return Waiting(lambda: trial.pipe(["abc", "xyz"], gen_config=[trial.long()["gen_config"]]))


@event("``close()`` during ``stream_infer``")
def close_stream(trial: Trial) -> Observation:
    return closed(trial, lambda: list(trial.pipe.stream_infer("abc", **trial.long())))


@event("``close()`` during ``chat``")
def close_chat(trial: Trial) -> Observation:
    return closed(trial, lambda: trial.pipe.chat("abc", gen_config=trial.long()["gen_config"]))


@event("``close()`` during a long list")
def close_list(trial: Trial) -> Observation:
    return closed(trial, lambda: trial.pipe(["abc"] * 5, **trial.long()))


@event("``close()`` during ``infer``")
def close_infer(trial: Trial) -> Observation:
    return closed(trial, lambda: trial.pipe("abc", **trial.long()))


def closed(trial: Trial, call: Callable[[], Any]) -> Observation:
    caller = Waiting(call)
    trial.working()
    threading.Thread(target=trial.pipe.close, daemon=True).start()
    return caller


@event("``thread_safe=True``")
def thread_safe(trial: Trial) -> Observation:
    from lmdeploy.pytorch.engine.engine_checker import EngineChecker

    with (  # the check itself; around it is a process that looks for a GPU
        mock.patch("lmdeploy.pytorch.envs.enable_check_env", True),
        mock.patch.object(EngineChecker, "handle", EngineChecker.check),
    ):
        found = told(lambda: trial.build(thread_safe=True)("abc"))
    return lambda: found


@event("``async_batch_infer``")
def async_batch_infer(trial: Trial) -> Observation:
    found = told(lambda: asyncio.run(trial.pipe.async_batch_infer(["abc", "xyz"])))
    return lambda: found


@event("``break`` out of ``stream_infer``")
def leaving(trial: Trial) -> Observation:
    for _part in trial.pipe.stream_infer("abc", **trial.long()):
        break
    return trial.went_on


@event("Ctrl-C in ``infer``")
def interrupted(trial: Trial) -> Observation:
    def interrupt() -> None:
        trial.working()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        trial.pipe("abc", **trial.long())
    return trial.went_on


@event("nobody reads a stream")
def unread(trial: Trial) -> Observation:
    trial.cues.step_time = 0.005  # LMDeploy's steps merge too when its loop is behind
    stream = trial.pipe.stream_infer("abc", **trial.long())
    trial.cues.wait_for(lambda cues: cues.tokens >= LENGTH)
    count = len(list(stream))
    return lambda: "the parts pile up" if count > LENGTH / 2 else "what waits becomes one part"


@event("the engine dies")
def death(trial: Trial) -> Observation:
    caller = Waiting(lambda: trial.pipe("abc", **trial.long()))
    trial.working()
    trial.cues.crash = RuntimeError("the GPU fell off the bus")
    first = caller()
    trial.cues.crash = None
    found = f"{first}; {next_call(trial)}"
    return lambda: found


@event("a prompt without tokens")
def empty(trial: Trial) -> Observation:
    first = told(lambda: trial.pipe("", do_preprocess=False))
    return lambda: f"{first}; {next_call(trial)}"


def next_call(trial: Trial) -> str:
    answered = told(lambda: trial.pipe("abc")) == "an answer"
    return "the next call is answered" if answered else "the next call fails too"


@event("a turn of a chat fails")
def failed_turn(trial: Trial) -> Observation:
    session = trial.pipe.session()
    with contextlib.suppress(ValueError):
        trial.pipe.chat("x" * 500, session)
    return lambda: "is in the history, with no answer" if session.history else "is not in the history"


@event("two turns of a chat at once")
def two_turns(trial: Trial) -> Observation:
    session = trial.pipe.session()
    Waiting(lambda: trial.pipe.chat("abc", session, gen_config=trial.long()["gen_config"]))
    trial.working()
    return Waiting(lambda: trial.pipe.chat("xyz", session))


def observe(library: Any, model: str) -> Iterator[tuple[str, Observation]]:
    for name, scenario in EVENTS.items():
        with scripted_gpu() as cues:
            yield name, scenario(Trial(library, model, cues))


def main(side: str, model: str) -> None:
    if side == "lmdeploy":
        import lmdeploy as library
    else:
        from lmbridge.compat import lmdeploy as library
    for name, observation in dict(observe(library, model)).items():
        print(json.dumps([name, observation()]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
