"""From lazy start to clean end, and what happens to an engine that dies."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lmbridge
from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineDeadError,
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    ModelNotFoundError,
    RequestTimeoutError,
    UnknownEngineError,
    UnsupportedEnvironmentError,
)
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.server.workshop import run_script

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_nothing_loads_before_the_first_call(scripted: Scripted) -> None:
    """A Bridge in a module costs nothing until it is used; repr says so."""
    bridge, engine = scripted()
    assert (bridge.state, engine.threads) == ("new", set())
    assert "new" in repr(bridge)
    bridge.infer("hello")
    assert bridge.state == "ready"
    assert "scripted" in repr(bridge)


def test_repr_shows_what_is_going_on(scripted: Scripted) -> None:
    """repr and requests() show who is being served and who waits."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1))
    futures = [bridge.submit("a b", client="ann", request_id="one"), bridge.submit("c", client="bob")]
    engine.wait_for(lambda e: e.active == 1)
    engine.step(1)
    running, waiting = bridge.requests()
    assert (running.id, running.state, running.client, running.tokens) == ("one", "running", "ann", 1)
    assert (waiting.state, waiting.client) == ("waiting", "bob")
    assert "clients=2 in_flight=2" in repr(bridge)
    for future in futures:
        future.cancel()


def test_one_log_line_a_request(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG each request leaves one line with its id, client and end, and never its text."""
    bridge, _ = scripted()
    with caplog.at_level("DEBUG", "lmbridge"):
        bridge.infer("secret words", request_id="r1", client="ann")
        bridge.close()
    lines = [record.getMessage() for record in caplog.records if "r1" in record.getMessage()]
    assert len(lines) == 1
    assert "client ann: stop, 2 tokens" in lines[0]
    assert "secret" not in caplog.text


def test_start_reports_a_failed_load(scripted: Scripted) -> None:
    """start() raises what went wrong in loading, with the cause; later calls say the same at once."""
    bridge, engine = scripted(ScriptedEngine(start_error=OSError("no such weights")))
    for _ in range(2):
        with pytest.raises(EngineStartError, match="no such weights") as caught:
            bridge.start()
        assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(EngineStartError):
        bridge.infer("hello")
    assert bridge.state == "failed"
    assert engine.closed


def test_a_failed_load_ends_everybody_who_waited_for_it(scripted: Scripted) -> None:
    """Callers that came while the model loaded all get the load error, each an instance of its own."""
    gate = threading.Event()
    bridge, _ = scripted(ScriptedEngine(start_error=SystemExit(1), start_gate=gate))
    futures = [bridge.submit(f"number {n}") for n in range(4)]
    gate.set()
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, EngineStartError) for error in errors)
    assert len({id(error) for error in errors}) == 4


def test_a_deadline_covers_loading(scripted: Scripted) -> None:
    """A caller does not wait longer than its timeout for a model that is still loading; start(timeout) neither."""
    gate = threading.Event()
    bridge, _ = scripted(ScriptedEngine(start_gate=gate))
    with pytest.raises(RequestTimeoutError):
        bridge.infer("hello", timeout=0.1)
    with pytest.raises(RequestTimeoutError):
        bridge.start(timeout=0.1)
    assert bridge.state == "starting"
    gate.set()
    assert bridge.infer("hello").text == "hello"


def test_close_while_loading(scripted: Scripted) -> None:
    """close() does not wait for a model that is still loading, and ends who waits for it."""
    bridge, engine = scripted(ScriptedEngine(start_gate=threading.Event()))
    future = bridge.submit("hello")
    engine.wait_for(lambda e: bool(e.threads))
    bridge.close()
    assert isinstance(future.exception(10), BridgeClosedError)
    assert engine.closed


def test_close_ends_waiting_callers(scripted: Scripted) -> None:
    """Every thread that waits gets BridgeClosedError when somebody closes the bridge; so do later calls."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=2))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(bridge.infer, f"number {n}") for n in range(4)]
        engine.wait_for(lambda e: e.active == 2)
        bridge.close()
        bridge.close()
        assert all(isinstance(call.exception(10), BridgeClosedError) for call in waiting)
    with pytest.raises(BridgeClosedError, match="build a new one"):
        bridge.infer("too late")
    assert engine.closed
    assert bridge.state == "closed"


def test_close_with_drain_finishes_what_runs(scripted: Scripted) -> None:
    """close(drain=True) lets running and waiting requests finish and refuses new ones meanwhile."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1))
    futures = [bridge.submit("first"), bridge.submit("second")]
    engine.wait_for(lambda e: e.active == 1)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(bridge.close, drain=True, timeout=30.0)
        engine.step()
        engine.wait_for(lambda e: len(e.started) == 2)
        engine.step()
        closing.result(10)
    assert [future.result(10).text for future in futures] == ["first", "second"]


def test_drain_has_a_limit(scripted: Scripted) -> None:
    """What does not finish in the time given for draining is aborted, and its caller told."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    future = bridge.submit("never stepped")
    engine.wait_for(lambda e: e.active == 1)
    bridge.close(drain=True, timeout=0.1)
    assert isinstance(future.exception(10), BridgeClosedError)


def test_close_from_a_callback(scripted: Scripted) -> None:
    """A future's callback may close the bridge."""
    bridge, _ = scripted()
    closed = threading.Event()

    def close(_: object) -> None:
        bridge.close()
        closed.set()

    bridge.submit("hello").add_done_callback(close)
    assert closed.wait(10)
    assert bridge.state == "closed"


def test_a_closed_client_ends_its_own_calls_only(scripted: Scripted) -> None:
    """Closing a client aborts what it has running; the bridge and other clients go on."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    with bridge.client("worker") as client:
        mine = client.submit("mine and more")
        other = bridge.submit("other")
        engine.wait_for(lambda e: e.active == 2)
    assert isinstance(mine.exception(10), BridgeClosedError)
    engine.wait_for(lambda e: e.active == 1)
    engine.step()
    assert other.result(10).text == "other"
    with pytest.raises(BridgeClosedError, match="worker"):
        client.infer("again")


def test_short_lived_threads_leave_nothing(scripted: Scripted) -> None:
    """1,000 threads that each ask once do not leave channels, clients or requests behind."""
    bridge, _ = scripted()
    server = bridge._server_thread.handle
    for _ in range(20):
        threads = [threading.Thread(target=bridge.infer, args=("hello",)) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    gc.collect()
    assert len(server.channels._known) <= 150  # a few times the 50 alive at once, not 1,000
    until(lambda: bridge.requests() == [])


def test_a_dead_engine_is_rebuilt(scripted: Scripted) -> None:
    """A bridge with a factory survives its engine: begun requests fail as retryable, waiting ones are answered."""
    engines: list[ScriptedEngine] = []

    def factory() -> ScriptedEngine:
        engines.append(ScriptedEngine(manual=not engines, max_batch_size=1))
        return engines[-1]

    with Bridge(factory) as bridge:
        started = bridge.submit("a b c")
        engines[0].wait_for(lambda e: e.active == 1)
        waiting = bridge.submit("patient")
        engines[0].step(1)
        engines[0].crash(ValueError("device lost"))
        error = started.exception(10)
        assert waiting.result(10).text == "patient"
        assert bridge.infer("next").text == "next"
        assert isinstance(error, EngineDeadError)
        assert (error.retryable, error.partial, type(error.__cause__)) == (True, "a", ValueError)
        assert engines[0].closed
        assert len(engines) == 2


def test_an_engine_that_keeps_dying_stays_down(scripted: Scripted) -> None:
    """After several deaths in a row the bridge says that it stays down instead of trying for ever."""
    engines: list[ScriptedEngine] = []

    def factory() -> ScriptedEngine:
        engines.append(ScriptedEngine(manual=True))
        return engines[-1]

    def built(count: int) -> bool:
        return len(engines) == count

    with Bridge(factory) as bridge:
        for number in range(3):
            future = bridge.submit("hello")
            until(functools.partial(built, number + 1))
            engines[number].wait_for(lambda e: e.active == 1)
            engines[number].crash(ValueError("device lost"))
            assert isinstance(future.exception(10), EngineDeadError)
        with pytest.raises(EngineDeadError, match="stays down") as caught:
            bridge.infer("hello", timeout=10)
        assert not caught.value.retryable


def test_a_dead_instance_is_not_rebuilt(scripted: Scripted) -> None:
    """An engine given as an instance cannot be built again; the error says to give a factory."""
    bridge, engine = scripted()
    bridge.start()
    engine.crash(ValueError("device lost"))
    until(lambda: bridge.state == "failed")
    with pytest.raises(EngineDeadError, match="give a function"):
        bridge.infer("hello", timeout=10)


def test_a_loop_stopped_from_outside_holds_nobody(scripted: Scripted) -> None:
    """Stopping the server's loop behind its back ends waiting and later calls with an error, not a hang."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    future = bridge.submit("hello")
    engine.wait_for(lambda e: e.active == 1)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(bridge.infer, "also waiting")
        engine.wait_for(lambda e: e.active == 2)
        loop = bridge._server_thread.handle.loop
        assert loop is not None
        loop.call_soon_threadsafe(loop.stop)
        assert isinstance(waiting.exception(10), BridgeClosedError)
    assert isinstance(future.exception(10), BridgeClosedError)
    with pytest.raises(BridgeClosedError, match="server thread"):
        bridge.infer("later")


def test_an_unclosed_bridge_warns_and_ends(scripted: Scripted) -> None:
    """Dropping a started bridge warns once and ends its thread; a dropped unstarted one says nothing."""
    bridge = Bridge(ScriptedEngine())
    bridge.infer("hello")
    with pytest.warns(ResourceWarning, match="unclosed"):
        del bridge
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bridge(ScriptedEngine())
        gc.collect()


def test_a_stream_keeps_its_bridge_alive() -> None:
    """A stream made from a Bridge that nobody else holds can be read to its end."""
    with pytest.warns(ResourceWarning):
        stream = Bridge(ScriptedEngine(step_time=0.001)).stream("one two three")
        gc.collect()
        assert "".join(delta.text for delta in stream) == "one two three"
        del stream
        gc.collect()


def test_an_unclosed_bridge_does_not_hold_the_interpreter() -> None:
    """A script that forgets close() ends by itself, and quietly."""
    done = run_script("""
        bridge = Bridge(ScriptedEngine(manual=True))
        future = bridge.submit("never answered")
        print("end of script")
    """)
    assert (done.returncode, done.stdout) == (0, "end of script\n")
    assert done.stderr == ""


def test_threads_that_outlive_the_main_thread_are_served() -> None:
    """A non-daemon thread may go on asking after the main thread has ended; futures work there too."""
    done = run_script("""
        import threading
        bridge = Bridge(ScriptedEngine())
        bridge.submit("Python 3.12 starts no thread once the main one has ended").result()
        main = threading.current_thread()
        def later():
            main.join()
            print(bridge.infer("served after main").text, bridge.submit("and futures").result().text)
            bridge.close()
        threading.Thread(target=later).start()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "served after main and futures\n", "")


def test_ctrl_c_while_waiting() -> None:
    """Ctrl-C during infer raises KeyboardInterrupt at once and frees the engine."""
    done = run_script("""
        import os, signal, threading
        engine = ScriptedEngine(manual=True)
        with Bridge(engine) as bridge:
            def interrupt():
                engine.wait_for(lambda e: e.active == 1)
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=interrupt).start()
            try:
                bridge.infer("never answered")
            except KeyboardInterrupt:
                engine.wait_for(lambda e: e.active == 0)
                print("interrupted", len(engine.aborted))
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 1\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_told() -> None:
    """In a child of a process with a started bridge, calls, futures and streams raise ForkedError at once."""
    done = run_script("""
        import os
        engine = ScriptedEngine(manual=True)
        with Bridge(engine) as bridge:
            future, stream = bridge.submit("a"), bridge.stream("b")
            engine.wait_for(lambda e: e.active == 2)
            pid = os.fork()
            if pid == 0:
                told = 0
                calls = [lambda: bridge.infer("x"), lambda: bridge.submit("y"), future.result, lambda: next(stream)]
                for call in calls:
                    try:
                        call()
                    except ForkedError:
                        told += 1
                os._exit(told)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            engine.step()
            print(future.result().text, [delta.text for delta in stream])
    """)
    assert done.stdout == "4\na ['b']\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_an_unstarted_bridge_starts_in_the_child() -> None:
    """A bridge made at import time works in forked workers, each with its own engine."""
    done = run_script("""
        import os
        bridge = Bridge(ScriptedEngine)
        if os.fork() == 0:
            print(bridge.infer("child").text, flush=True)
            bridge.close()
            os._exit(0)
        os.wait()
        print(bridge.infer("parent").text)
        bridge.close()
    """)
    assert done.stdout == "child\nparent\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_many_threads_of_a_child_ask_first() -> None:
    """Threads that make a forked child's first call together would each start a server there, and load a model."""
    done = run_script("""
        import _thread, itertools, os, threading, types
        from concurrent.futures import ThreadPoolExecutor
        from lmbridge.server import keeper
        built, begun, arrived = [], [], set()
        together, asked, all_asked = threading.Barrier(8), itertools.count(1), threading.Event()
        class Lock(_thread.RLock):
            def __enter__(self):
                if next(asked) == 8:
                    all_asked.set()
                return super().__enter__()
        def getpid():  # all eight find that they are in a child, before the first draws a conclusion
            thread = threading.current_thread()
            if thread.name.startswith("first") and thread not in arrived:
                arrived.add(thread)
                together.wait(30)
            return os.getpid()
        def check():  # with the lock held: the first goes no further before all have asked for theirs
            begun.append("a server")
            all_asked.wait(30)
        def build():
            built.append("an engine")
            return ScriptedEngine()
        bridge = Bridge(build)
        if os.fork() == 0:
            keeper.os, keeper.check_environment = types.SimpleNamespace(getpid=getpid), check
            keeper.threading = types.SimpleNamespace(**vars(threading) | {"RLock": Lock})
            with ThreadPoolExecutor(8, "first") as pool:
                print(*[answer.text for answer in pool.map(bridge.infer, "abcdefgh")])
            bridge.close()
            print(*begun, *built, flush=True)
            os._exit(0)
        os.wait()
    """)
    assert done.stdout == "a b c d e f g h\na server an engine\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_multiprocessing_with_fork() -> None:
    """A multiprocessing worker started by fork is told as well, and can build a bridge of its own."""
    done = run_script("""
        import multiprocessing
        bridge = Bridge(ScriptedEngine)
        print(bridge.infer("parent").text, flush=True)
        def work():
            try:
                bridge.infer("inherited")
            except ForkedError:
                with Bridge(ScriptedEngine) as own:
                    print(own.infer("child's own").text, flush=True)
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(30)
        print(child.exitcode)
        bridge.close()
    """)
    assert done.stdout == "parent\nchild's own\n0\n", done.stderr


def test_sigterm_ends_a_script() -> None:
    """A script that is told to terminate does, while a request is being answered."""
    done = run_script("""
        import os, signal, threading
        engine = ScriptedEngine(manual=True)
        bridge = Bridge(engine)
        def terminate():
            engine.wait_for(lambda e: e.active == 1)
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=terminate, daemon=True).start()
        bridge.infer("never answered")
    """)
    assert done.returncode == -15
    assert "Traceback" not in done.stderr


def test_file_descriptors_do_not_pile_up() -> None:
    """Bridges that come and go leave no file descriptor open."""
    descriptors = Path("/proc/self/fd")
    counts = []
    for _ in range(20):
        with Bridge(ScriptedEngine) as bridge:
            bridge.submit("hello").result(10)
        counts.append(len(list(descriptors.iterdir())))
    assert counts[-1] <= counts[0]


def test_opentelemetry_context_reaches_the_engine(scripted: Scripted) -> None:
    """A span's context set by the caller is the current one where the engine takes the request."""
    baggage = pytest.importorskip("opentelemetry.baggage", reason="pip install opentelemetry-api")
    context = pytest.importorskip("opentelemetry.context")
    bridge, _ = scripted(ScriptedEngine(lambda request: [str(baggage.get_baggage("user"))]))
    token = context.attach(baggage.set_baggage("user", "ann"))
    try:
        assert bridge.infer("who?").text == "ann"
    finally:
        context.detach(token)


@pytest.mark.parametrize(
    ("module", "function"), [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")]
)
def test_patched_threads_are_refused(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, module: str, function: str
) -> None:
    """Where a library replaces threads by greenlets, the first call says so instead of blocking everything."""
    fake = types.ModuleType(module)
    setattr(fake, function, lambda name: True)
    monkeypatch.setitem(sys.modules, module, fake)
    bridge, _ = scripted()
    with pytest.raises(UnsupportedEnvironmentError, match="gthread"):
        bridge.infer("hello")


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 10), (3, 11)), reason="the private module it drives changes")
def test_a_subinterpreter_is_refused(tmp_path: Path) -> None:
    """A subinterpreter is told that the model cannot live there."""
    told = tmp_path / "told"
    source = f"""
        import sys
        sys.path[:] = {[str(Path(lmbridge.__file__).parents[1]), *sys.path]!r}
        from lmbridge import Bridge, UnsupportedEnvironmentError
        from lmbridge.testing import ScriptedEngine
        try:
            Bridge(ScriptedEngine).start()
        except UnsupportedEnvironmentError as error:
            open({str(told)!r}, "w").write(str(error))
    """
    run_script(f"""
        import _xxsubinterpreters as interpreters
        interpreters.run_string(interpreters.create(), {textwrap.dedent(source)!r})
    """)
    assert "subinterpreter" in told.read_text()


def test_mistakes_in_the_constructor_raise_there() -> None:
    """A wrong model, engine or option is told where the Bridge is built, not at the first call."""
    with pytest.raises(ModelNotFoundError, match="no-such-folder"):
        Bridge("./no-such-folder")
    with pytest.raises(UnknownEngineError, match="transformers"):
        Bridge("demo", engine="tranformers")
    with pytest.raises(InvalidRequestError, match="max_batch_size"):
        Bridge("demo", max_batchsize=3)
    with pytest.raises(InvalidRequestError, match="max_pending"):
        Bridge("demo", max_pending=0)
    with pytest.raises(InvalidRequestError, match="when_full"):
        Bridge("demo", when_full="wait")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="model must be"):
        Bridge(5)  # type: ignore[arg-type]


def test_a_load_after_the_main_thread_has_ended() -> None:
    """Python then refuses the thread pools that loading needs; the error says what to change."""
    done = run_script("""
        import lmbridge, threading
        class Pooled(ScriptedEngine):
            async def start(self):
                from concurrent.futures import ThreadPoolExecutor
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(int).result()
        bridge = Bridge(Pooled)
        def ask():
            threading.main_thread().join()
            try:
                bridge.infer("hello")
            except lmbridge.EngineStartError as error:
                print(error)
        threading.Thread(target=ask).start()
    """)
    assert "bridge.start()" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_first_caller_is_not_kept() -> None:
    """What the caller's context holds, such as a web request, is free once its answer is there."""
    held = contextvars.ContextVar[object]("held")

    class Thing:
        pass

    def ask() -> weakref.ref[Thing]:
        thing = Thing()
        held.set(thing)
        bridge.infer("hello")
        return weakref.ref(thing)

    with contextlib.closing(Bridge(ScriptedEngine())) as bridge:
        kept = contextvars.copy_context().run(ask)
        until(lambda: gc.collect() >= 0 and kept() is None)


def test_errors_pickle() -> None:
    """Every error survives a process pool: its type, message and facts."""
    for name in lmbridge.__all__:
        cls = getattr(lmbridge, name)
        if isinstance(cls, type) and issubclass(cls, LMBridgeError):
            error = cls("what happened").hinted("what to do")
            error.partial, error.request_id, error.index = "half", "req-1", 3
            for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
                assert type(twin) is cls
                assert (twin.args, twin.partial, twin.request_id, twin.index) == (error.args, "half", "req-1", 3)
                assert str(twin) == str(error) == "Prompt 3 of the list: what happened what to do"


def test_public_names() -> None:
    """The names users import are pinned; each is there."""
    assert {"Bridge", "GenerationConfig", "Engine", "Response", "Delta", "LMBridgeError"} <= set(lmbridge.__all__)
    assert all(hasattr(lmbridge, name) for name in lmbridge.__all__)
    assert set(lmbridge.__all__) == set(lmbridge._HOME_OF)


def test_import_is_light() -> None:
    """`import lmbridge` loads no torch, transformers or flask and costs under 0.2 s of CPU."""
    source = (
        "import time; before = time.process_time(); import lmbridge; cpu = time.process_time() - before\n"
        "import sys; print(cpu, [m for m in ('torch', 'transformers', 'flask') if m in sys.modules])"
    )
    command = [sys.executable, "-c", source]
    cheapest = min(subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3))
    cpu, heavy = cheapest.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(cpu) < 0.2


def test_type_information_is_shipped() -> None:
    """Users' type checkers see the annotations."""
    assert (Path(lmbridge.__file__).parent / "py.typed").exists()


@pytest.mark.long
def test_clients_in_reference_cycles_leave_nothing_broken() -> None:
    """What the garbage collector finds rather than the reference count must not come back half dismantled."""
    engine = ScriptedEngine(manual=True)
    with ThreadPoolExecutor() as pool, Bridge(engine) as bridge:
        for _ in range(20):
            client: Any = bridge.client()
            client.itself = client
            answer = pool.submit(client.infer, "one")
            engine.wait_for(lambda e: e.active == 1)
            engine.step()
            assert answer.result(30).text == "one"
            del client, answer
            gc.collect()
        waiting = [pool.submit(bridge.client().infer, "never answered") for _ in range(4)]
        engine.wait_for(lambda e: e.active == 4)
        loop = bridge._server_thread.handle.loop
        assert loop is not None
        loop.call_soon_threadsafe(loop.stop)
        for future in waiting:
            assert isinstance(future.exception(30), BridgeClosedError)


def test_garbage_collected_while_the_bridge_closes() -> None:
    """Clients that the collector frees in the middle of the server's end must not break it off: callers would hang."""
    bridge = Bridge(ScriptedEngine()).start()
    gc.collect()
    gc.disable()
    thresholds = gc.get_threshold()
    try:
        for number in range(300):
            client = bridge.client(f"client-{number}")
            client.infer("x")
            client.itself = client  # type: ignore[attr-defined]  # only the collector can free it
        del client
        gc.set_threshold(gc.get_count()[0] + 100)  # while the server goes through their channels
        gc.enable()
        bridge.close()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    assert bridge.state == "closed"


def test_a_with_that_cannot_be_entered_closes_the_bridge() -> None:
    """``with`` calls no ``__exit__`` when the model cannot be loaded; the server thread must not stay behind."""
    bridge = Bridge(ScriptedEngine(start_error=ValueError("bad weights")))
    with pytest.raises(EngineStartError), bridge:
        pytest.fail("it was entered")
    assert bridge.state == "closed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_that_is_being_told_of_is_told_to_all() -> None:
    """Whoever comes while another thread makes a forked child the bridge's own must not be told that it is not."""
    done = run_script("""
        import os, threading
        bridge = Bridge(ScriptedEngine)
        if os.fork() == 0:
            handle, inside, go_on = bridge._server_thread.handle, threading.Event(), threading.Event()
            belong_here = handle.belong_here
            def slowly():
                inside.set()
                go_on.wait(20)
                belong_here()
            handle.belong_here = slowly
            first = threading.Thread(target=bridge.infer, args=("first",))
            first.start()
            inside.wait(20)
            handle.belong_here = belong_here
            print(*[bridge.infer(prompt, timeout=20).text for prompt in "ab"], flush=True)
            go_on.set()
            first.join()
            bridge.close()
            os._exit(0)
        os.wait()
    """)
    assert done.stdout == "a b\n", done.stderr
