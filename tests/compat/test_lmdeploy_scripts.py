"""Scripts that import ``lmdeploy``, run as they stand: by ``lmbridge run``, and in a process that called install()."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lmbridge import UnsupportedOptionError
from lmbridge.compat import lmdeploy as ours
from lmbridge.compat.lmdeploy import install
from lmbridge.compat.lmdeploy.standin import chosen
from tests.engines.conftest import save_model

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
RUN = [sys.executable, "-m", "lmbridge", "run"]
ON_DEMO = [*RUN, "--engine", "transformers", "--model", "demo"]
WITHOUT_GPU = """
import sys
from lmbridge.cli import main
from tests.engines.lmdeploy_scripted import scripted_gpu
with scripted_gpu():
    main(["run", *sys.argv[1:]])
"""
PATIENCE = 60.0
HAS_LMDEPLOY = importlib.util.find_spec("lmdeploy") is not None
needs_lmdeploy = pytest.mark.skipif(not HAS_LMDEPLOY, reason="needs LMDeploy; .ci/run installs it without a GPU")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=ENVIRONMENT)


@pytest.fixture(
    params=[pytest.param("transformers", marks=pytest.mark.long), pytest.param("lmdeploy", marks=needs_lmdeploy)]
)
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], list[str]]:
    """A command that runs a script, and what the answers to its two questions begin with."""
    if request.param == "transformers":
        return ON_DEMO, ["The capital of France is Paris.", "The capital of Japan is Tokyo."]
    model = save_model(tmp_path / "llama")  # its scripted executor repeats the prompt
    said = [f"<user>What is the capital of {country}?<assistant>" for country in ("France", "Japan")]
    return [sys.executable, "-c", WITHOUT_GPU, "--engine", "lmdeploy", "--model", model], said


# ------------------------------------------------------------------------------------------- the two shapes of 2024


def test_the_coroutines_script(runner: tuple[list[str], list[str]]) -> None:
    """A pipeline built under one loop answers two tasks of another, and the script ends without a word of complaint."""
    command, answers = runner
    done = run(*command, SCRIPTS / "coroutines.py")
    assert (done.stdout.splitlines(), done.returncode) == (answers, 0), done.stderr
    assert "not closed" not in done.stderr


def test_the_threads_script(runner: tuple[list[str], list[str]]) -> None:
    """A server thread with a loop of its own answers two client threads through their queues. It serves forever."""
    command, answers = runner
    with subprocess.Popen([*command, SCRIPTS / "threads.py"], stdout=-1, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(4)]
            assert process.poll() is None
        finally:
            process.kill()
    assert (lines[0], lines[3]) == ("serving 2 clients", "all are answered")
    assert sorted(lines[1:3]) == answers


# ------------------------------------------------------------------------------------------------ as under python

SAME = {
    "facts": """
        import sys
        print(__name__, __file__, __package__, sys.argv, sys.path[0])
        print(sys.modules["__main__"].__dict__ is globals(), "leftover" in globals())
    """,
    "exit status": "raise SystemExit(3)",
    "exit message": "import sys; sys.exit('enough')",
    "traceback": """
        def fail():
            raise ValueError("mine")
        try:
            {}["key"]
        except KeyError:
            fail()
    """,
    "syntax error": "print('a'",
    "threads that outlive it": """
        import pickle, threading
        def speak():
            main_thread.join()
            print(pickle.loads(pickle.dumps(speak)) is speak)
        main_thread = threading.current_thread()
        threading.Thread(target=speak).start()
    """,
    "module beside it": "import beside; print(beside.__file__)",
}


@pytest.mark.parametrize("body", SAME.values(), ids=SAME.keys())
def test_a_script_runs_as_under_python(body: str, tmp_path: Path) -> None:
    """Output, traceback and exit status of a script that has nothing to do with LMDeploy are those under Python."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(textwrap.dedent(body))
    (folder / "beside.py").touch()
    results = [
        run(*command, "scripts/script.py", "--model", "x", "-h", "--", cwd=tmp_path)
        for command in ([sys.executable], [*RUN, "--model", "demo"])
    ]
    plain, ours = [(done.stdout, done.stderr, done.returncode) for done in results]
    assert plain == ours
    assert any(plain)


def test_ctrl_c_ends_a_script(tmp_path: Path) -> None:
    """Ctrl-C shows where the script was, and the shell sees the status that it sees for any other program."""
    script = tmp_path / "script.py"
    script.write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    done = run(*RUN, script)
    assert done.returncode == 130
    assert done.stderr.startswith("Traceback")
    assert "lmbridge" not in done.stderr


def test_help() -> None:
    """--help says what is run and what can be chosen, within a terminal's width."""
    done = run(*RUN, "--help")
    assert [word for word in ("SCRIPT", "--engine", "--model", "LMDeploy") if word not in done.stdout] == []
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_script_that_is_not_there() -> None:
    """A wrong name is one line, with the status that Python has for it."""
    done = run(*RUN, "no-such-script.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lmbridge: cannot read no-such-script.py: No such file or directory\n"


@pytest.mark.long
def test_processes_that_a_script_spawns_get_the_drop_in(tmp_path: Path) -> None:
    """One process a GPU is a common script; its processes import it anew and would find LMDeploy itself, or nothing."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import multiprocessing, sys
            from lmdeploy import GenerationConfig, pipeline

            def work(answers):
                pipe = pipeline("models/a-chat-model")
                answers.put((__name__, sys.argv, pipe("What is 2 + 2?", gen_config=GenerationConfig()).text))

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                answers = context.Queue()
                process = context.Process(target=work, args=(answers,))
                process.start()
                print(*answers.get())
                process.join()
        """)
    )
    done = run(*ON_DEMO, script, "an argument")
    assert done.stdout == f"__mp_main__ {[str(script), 'an argument']} 2 + 2 = 4.\n", done.stderr


def test_what_the_other_engine_cannot_do_is_named(tmp_path: Path) -> None:
    """Run on transformers, a script's option for many GPUs is an error at its line rather than left out in silence."""
    script = tmp_path / "script.py"
    script.write_text("from lmdeploy import *\npipeline('org/model', TurbomindEngineConfig(tp=2))")
    done = run(*ON_DEMO, script)
    assert done.returncode == 1
    assert 'script.py", line 2' in done.stderr
    assert "does not support tp" in done.stderr


# ------------------------------------------------------------------------------------------------------- install()


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = builtins.__import__
    yield
    assert builtins.__import__ is before


def imported(statement: str, importer: str = "somebody's") -> Mapping[str, Any]:
    names: dict[str, Any] = {"__name__": importer}
    exec(statement, names)
    return names


def test_install_gives_the_drop_in() -> None:
    """Every form of an import statement gives our names, under the modules where LMDeploy has them."""
    names = "GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, Response, ChatTemplateConfig, pipeline"
    with install():
        assert imported("import lmdeploy")["lmdeploy"] is ours
        assert imported("import lmdeploy.messages")["lmdeploy"] is ours
        assert imported("import lmdeploy.model as model")["model"].ChatTemplateConfig is ours.ChatTemplateConfig
        assert imported("from lmdeploy.messages import Response")["Response"] is ours.Response
        assert imported("from lmdeploy.api import pipeline")["pipeline"] is ours.pipeline
        assert imported("from lmdeploy.pipeline import Pipeline")["Pipeline"] is ours.Pipeline
        found = imported(f"from lmdeploy import {names}")
        assert all(found[name] is getattr(ours, name) for name in names.split(", "))
        assert imported("from lmdeploy import *")["pipeline"] is ours.pipeline


def test_install_is_undone() -> None:
    """After uninstall(), ``lmdeploy`` is LMDeploy itself again or missing as before, also below another's hook."""
    before = builtins.__import__
    installed = install()
    hook = builtins.__import__
    builtins.__import__ = lambda *args, **more: hook(*args, **more)  # a tool that came later
    try:
        installed.uninstall()
        assert_not_ours()
    finally:
        builtins.__import__ = before
    with install():
        pass
    assert_not_ours()


def assert_not_ours() -> None:
    if HAS_LMDEPLOY:
        assert imported("import lmdeploy")["lmdeploy"].__name__ == "lmdeploy"
    else:
        with pytest.raises(ModuleNotFoundError, match="lmdeploy"):
            imported("import lmdeploy")


@needs_lmdeploy
def test_lmdeploy_and_the_engine_keep_the_real_one() -> None:
    """The engine under the drop-in would get the drop-in's configs, and LMDeploy a pipeline inside its own modules."""
    with install():
        for importer in ("lmdeploy.serve.anything", "lmbridge.engines.lmdeploy.engine"):
            found = imported("from lmdeploy.messages import GenerationConfig", importer)["GenerationConfig"]
            assert found.__module__ == "lmdeploy.messages"
        assert importlib.import_module("lmdeploy").__name__ == "lmdeploy"
        assert imported("from lmdeploy.utils import get_logger")["get_logger"].__module__.startswith("lmdeploy")


def test_threads_that_install_at_once() -> None:
    """One's hook could stay below another's for good, or take it away, so that ``lmdeploy`` is whose nobody knows."""
    before, interval, together = builtins.__import__, sys.getswitchinterval(), threading.Barrier(4)

    def come_and_go(number: int) -> None:
        together.wait()
        for _ in range(20_000):
            with install(model=f"model {number}"):
                pass

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(come_and_go, range(4)))
    finally:
        sys.setswitchinterval(interval)
        left, builtins.__import__ = builtins.__import__, before
    assert left is before
    assert chosen("org/a-model", None) == ("org/a-model", None)


def test_an_installation_that_goes_while_a_pipeline_is_built() -> None:
    """The pipeline gets what was installed when it was asked for, rather than an AttributeError from inside."""

    class Leaving:
        """A path; whoever sees that it is one has the installation gone by then."""

        @property
        def __fspath__(self) -> Any:
            installation.uninstall()
            return lambda: "org/a-model"

    installation = install(model="demo", backend="transformers")
    assert chosen(Leaving(), None) == ("demo", "transformers")


def test_install_chooses_model_and_engine() -> None:
    """What the code cannot say is said once for it; code that does name its engine keeps it."""
    install(model="org/another-model")
    with install(model="demo", backend="transformers"):  # once more, as a notebook's cell does
        names = imported("from lmdeploy import pipeline, GenerationConfig")
        with names["pipeline"]("org/a-large-model") as pipe:
            assert pipe("What is 2 + 2?", names["GenerationConfig"](max_new_tokens=16)).text == "2 + 2 = 4."
        with pytest.raises(UnsupportedOptionError, match="tp"):
            names["pipeline"]("org/a-large-model", ours.TurbomindEngineConfig(tp=2))
    assert_not_ours()
