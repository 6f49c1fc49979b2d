"""Signal handlers that call the bridge, in the middle of a call of the thread that they interrupt."""

from __future__ import annotations

from tests.server.workshop import run_script


def test_a_handler_that_submits_in_the_middle_of_the_first_submit() -> None:
    """A handler runs on the main thread, which may hold a lock: one that it cannot take again would stop both."""
    done = run_script("""
        import itertools, signal, sys
        def is_ours(frame):
            return frame is not None and frame.f_globals["__name__"].startswith("lmbridge.")
        def profile(frame, event, arg):  # we call something, maybe with a lock held: the handler runs here
            if event in ("call", "c_call") and (is_ours(frame) or is_ours(frame.f_back)) and next(calls) == number:
                signal.raise_signal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda *_: inner.append(bridge.submit("the handler's")))
        for number in itertools.count():
            calls, inner = itertools.count(), []
            with Bridge(ScriptedEngine) as bridge:
                sys.setprofile(profile)
                outer = bridge.submit("the main thread's")
                sys.setprofile(None)
                if not inner:
                    break
                answers = [future.result().text for future in (outer, *inner)]
            assert answers == ["the main thread's", "the handler's"], (number, answers)
            assert bridge.metrics.started == sum(bridge.metrics.outcomes.values()) == 2, number
        print(number > 80)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_handler_that_submits_in_the_middle_of_the_start() -> None:
    """Between a look for a server and the note that there is one, it started another, which outlived close()."""
    done = run_script("""
        import itertools, signal, sys
        def is_ours(frame):
            return frame is not None and frame.f_globals["__name__"].startswith("lmbridge.")
        def profile(frame, event, arg):  # we call something, maybe with a lock held: the handler runs here
            if event in ("call", "c_call") and (is_ours(frame) or is_ours(frame.f_back)) and next(calls) == number:
                signal.raise_signal(signal.SIGUSR1)
        def build():
            engines.append(ScriptedEngine())
            return engines[-1]
        signal.signal(signal.SIGUSR1, lambda *_: inner.append(bridge.submit("the handler's")))
        for number in itertools.count():
            calls, inner, engines, bridge = itertools.count(), [], [], Bridge(build)
            sys.setprofile(profile)
            outer = bridge.submit("the main thread's")
            sys.setprofile(None)
            answers = [future.result().text for future in (outer, *inner)]
            bridge.close()
            assert [engine.closed for engine in engines] == [True], (number, engines)
            if not inner:
                break
            assert answers == ["the main thread's", "the handler's"], (number, answers)
        print(number > 120)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
