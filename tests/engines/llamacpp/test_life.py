"""The llama.cpp engine's beginning and end, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason='needs xllamacpp; run: pip install "lmbridge[llamacpp]"')

from lmbridge import Bridge
from lmbridge.engines.auto import engine_for
from lmbridge.engines.llamacpp import LlamaCppEngine, library
from lmbridge.engines.llamacpp import engine as engine_module
from lmbridge.engines.llamacpp.header import read_header
from lmbridge.errors import (
    EngineError,
    EngineStartError,
    InvalidRequestError,
    MissingDependencyError,
    ModelNotFoundError,
)
from lmbridge.messages import Embed
from tests.conftest import until_then
from tests.engines.llamacpp.conftest import Answer, driven, request
from tests.engines.llamacpp.models import write_demo

STORY = "Tell me a story about a fox."


def test_neither_torch_nor_transformers_is_loaded(demo: str) -> None:
    """A machine for small models would spend seconds and half a gigabyte on what is not used."""
    script = f"""
        import sys
        from lmbridge import Bridge
        with Bridge({demo!r}, engine="llamacpp", threads=1) as bridge:
            assert bridge.infer("What is 2 + 3?", logprobs=1, response_format={{"type": "json_object"}}).text
            assert bridge.infer("What is 2 + 3?", stop_words=["5"]).text
        print(sorted({{"torch", "transformers"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_gguf_file_is_for_it(demo: str) -> None:
    """engine="auto" would load the file into torch, several times as large."""
    assert engine_for(demo) == "llamacpp"


def test_an_abort_strikes_within_two_chunks_of_a_prompt(demo: str) -> None:
    """A long prompt that nobody waits for any more would be read to its end."""

    async def scenario() -> None:
        async with driven(demo, max_chunk_size=8) as engine:
            answer = Answer()
            asked = request([7] * 1000)
            engine.add_request(asked, answer.sink)
            await until_then(lambda: (engine.progress(asked.id) or 0) >= 3)
            call = engine._calls[asked.id]
            engine.abort_request(asked.id)
            heard = call.heard
            whole = await answer.wait()
            assert (whole.finish_reason, whole.text) == ("abort", "")
            assert call.heard <= heard + 2
            await until_then(lambda: engine.stats()["free"] == 2)

    asyncio.run(scenario())


def test_an_abort_strikes_within_two_tokens(demo: str) -> None:
    """An answer that nobody reads would be written to its end."""

    async def scenario() -> None:
        async with driven(demo) as engine:
            answer = Answer()
            asked = request(STORY, max_new_tokens=900, ignore_eos=True)
            engine.add_request(asked, answer.sink)
            await until_then(lambda: answer.deltas)
            call = engine._calls[asked.id]
            engine.abort_request(asked.id)
            heard = call.heard
            assert (await answer.wait()).finish_reason == "abort"
            assert call.heard <= heard + 2

    asyncio.run(scenario())


def test_news_of_many_requests_wakes_the_loop_once(demo: str) -> None:
    """The loop would be woken for each token of each request."""

    async def scenario() -> None:
        async with driven(demo, max_batch_size=8) as engine:
            answers = [Answer() for _ in range(8)]
            asked = [request(STORY, max_new_tokens=100, ignore_eos=True) for _ in answers]
            for each, answer in zip(asked, answers, strict=True):
                engine.add_request(each, answer.sink)
            wakes, answer_bell = 0, engine._bell._answer

            def counted() -> None:
                nonlocal wakes
                wakes += 1
                answer_bell()

            engine._bell._answer = counted  # type: ignore[method-assign]
            for answer in answers:
                await answer.wait()
            assert 0 < wakes < 8 * 100

    asyncio.run(scenario())


def test_a_call_that_is_stuck_is_named_and_left_behind(
    demo: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() would wait for a library that does not return."""
    monkeypatch.setattr(engine_module, "CLOSE_TIMEOUT", 0.2)
    stuck, entered = threading.Event(), threading.Event()

    def hang(body: str, callback: Any) -> None:
        entered.set()
        stuck.wait(60)

    async def scenario() -> None:
        async with driven(demo) as engine:
            assert engine._model is not None
            engine._model.server = _Server(engine._model.server, hang)
            answer = Answer()
            asked = request(STORY)
            engine.add_request(asked, answer.sink)
            await until_then(entered.is_set)
            assert "1 calls are in llama.cpp" in engine.where()
            engine.abort_request(asked.id)
            assert (await answer.wait()).finish_reason == "abort"

    try:
        with caplog.at_level(logging.WARNING):
            asyncio.run(scenario())
        assert "does not return from a call" in caplog.text
    finally:
        stuck.set()


@pytest.mark.parametrize("late", [False, True])
def test_a_job_that_nobody_waits_for_does_not_keep_the_model(
    encoder: str, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A swap or close just after would leave the model in memory for good."""
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(engine_module, "CLOSE_TIMEOUT", 0.2 if late else 30)
    server: Any = None

    async def scenario() -> None:
        nonlocal server
        async with driven(encoder) as engine:
            assert engine._model is not None
            engine._model.server = _Slow(engine._model.server, entered, go_on, ended)
            server = weakref.ref(engine._model.server)
            answer = Answer()
            asked = dataclasses.replace(request("a b"), job=Embed("a b"))
            engine.add_request(asked, answer.sink)
            await until_then(entered.is_set)
            engine.abort_request(asked.id)
            if not late:
                asyncio.get_running_loop().call_later(0.1, go_on.set)

    asyncio.run(scenario())
    assert ended.is_set() is not late
    go_on.set()
    assert ended.wait(30)
    asyncio.run(until_then(lambda: server() is None))


class _Slow:
    """xllamacpp's server whose vectors take until they may go on; it is freed with this."""

    def __init__(self, real: Any, entered: threading.Event, go_on: threading.Event, ended: threading.Event) -> None:
        self._real, self._entered, self._go_on, self._ended = real, entered, go_on, ended
        self.handle_metrics = real.handle_metrics

    def handle_embeddings(self, body: str) -> Any:
        self._entered.set()
        self._go_on.wait(60)
        self._ended.set()
        return self._real.handle_embeddings(body)


class _Server:
    """xllamacpp's server whose conversations hang; the rest is its own."""

    def __init__(self, real: Any, hang: Any) -> None:
        self.handle_chat_completions = hang
        self.handle_metrics = real.handle_metrics


def test_what_llama_cpp_raises_midway_is_an_error_that_may_be_tried_again(demo: str) -> None:
    """The request would be blamed for what is not its fault, or never end."""

    def fail(body: str, callback: Any) -> None:
        callback('{"choices": [{"delta": {"content": "a"}}]}')
        raise RuntimeError("no more memory")

    async def scenario() -> None:
        async with driven(demo) as engine:
            assert engine._model is not None
            real = engine._model.server
            engine._model.server = _Server(real, fail)
            answer = Answer()
            engine.add_request(request(STORY), answer.sink)
            await asyncio.wait_for(answer.ended.wait(), 60)
            error = answer.deltas[-1].error
            assert isinstance(error, EngineError)
            assert error.retryable
            assert "no more memory" in str(error)
            engine._model.server = real
            again = Answer()
            engine.add_request(request(STORY), again.sink)
            assert (await again.wait()).text

    asyncio.run(scenario())


def test_the_server_inside_answers_nobody_else(demo: str) -> None:
    """Whoever may open a socket on this machine could use the model, past every limit of the bridge's."""

    async def scenario() -> None:
        async with driven(demo) as engine:
            assert engine._model is not None
            address = engine._model.server.listening_address
            assert address.startswith("http://127.0.0.1:")
            for path in ("/props", "/v1/models", "/slots", "/completion", "/v1/chat/completions"):
                body = None if path in ("/props", "/v1/models", "/slots") else b'{"prompt": "a", "messages": []}'
                asking = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
                with pytest.raises(urllib.error.HTTPError) as caught:
                    await asyncio.to_thread(urllib.request.urlopen, asking, None, 30)
                assert caught.value.code == 401
                caught.value.close()

    asyncio.run(scenario())


def test_a_text_that_is_too_long_is_cut_or_refused(encoder: str, reranker: str) -> None:
    """A document's beginning is what is wanted of it, unless the caller says otherwise."""
    long = "a b c d e f g h " * 100
    with Bridge(encoder, engine="llamacpp", threads=1) as bridge:
        with pytest.raises(InvalidRequestError, match=r"too large|exceeds"):
            bridge.embed(long, timeout=60)
        assert bridge.embed(long, truncate="end", timeout=60).shape == (64,)
        assert bridge.embed("a b", dimensions=8, timeout=60).shape == (8,)
        raw = bridge.embed("a b", normalize=False, timeout=60)
        assert abs(float((raw**2).sum()) - 1) > 1e-3
    with Bridge(reranker, engine="llamacpp", threads=1) as bridge:
        ranked = bridge.rerank("a b", ["c d", long, "e"], timeout=60)
        assert sorted(each.index for each in ranked) == [0, 1, 2]
        assert all(0 <= each.score <= 1 for each in ranked)


# ------------------------------------------------------------------------------------------- what cannot be loaded


def test_options_are_checked_at_once(demo: str, files: Path) -> None:
    """A mistake would show when the model is loaded, or never."""
    wrong: tuple[dict[str, Any], ...] = (
        {"threads": 0},
        {"max_batch_size": "4"},
        {"max_context": 1},
        {"task": "call"},
        {"gpu_layers": -1},
    )
    for options in wrong:
        with pytest.raises(InvalidRequestError) as caught:
            LlamaCppEngine(demo, **options)
        assert caught.value.param == next(iter(options))
    with pytest.raises(ModelNotFoundError, match=r"\.gguf"):
        LlamaCppEngine("demo")
    with pytest.raises(ModelNotFoundError, match=r"^The file .*demo2\.gguf does not exist \(did you mean .*demo\.g"):
        LlamaCppEngine(str(Path(demo).with_name("demo2.gguf")))


def test_a_file_that_is_no_model_says_so(demo: str, files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The message would be llama.cpp's "please check the input params"."""
    whole = Path(demo).read_bytes()
    for name, content, said in (
        ("text.gguf", b"hello", "not a readable GGUF file"),
        ("cut.gguf", whole[:5000], "not a readable GGUF file"),
        ("short.gguf", whole[: len(whole) // 2], "llama.cpp cannot load"),
    ):
        (files / name).write_bytes(content)
        with pytest.raises(EngineStartError, match=said), Bridge(str(files / name), engine="llamacpp"):
            pass
    strange = write_demo(files / "strange.gguf", architecture="tomorrow")
    with pytest.raises(EngineStartError, match="tomorrow"), Bridge(strange, engine="llamacpp"):
        pass
    assert "unknown model architecture" in capfd.readouterr().err


def test_the_header_says_what_the_model_is_for(demo: str, encoder: str, reranker: str) -> None:
    """An embedding model would be asked to write."""
    assert [read_header(path).task for path in (demo, encoder, reranker)] == ["generate", "embed", "rerank"]
    header = read_header(demo)
    assert (header.context, header.vocabulary, header.has_template) == (1024, 3072, True)


def test_a_missing_library_names_the_command(demo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user would have to guess which package has which name."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lmbridge\[llamacpp\]"'):
        library.import_library()


def test_a_library_that_has_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail in the midst of somebody's request."""
    monkeypatch.setitem(library.MEMBERS, "xllamacpp:Server", ("handle_completions", "handle_gone"))
    with pytest.raises(MissingDependencyError, match=r"lacks .*Server\.handle_gone"):
        library.import_library()


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that this one starts would inherit a setting that is none of theirs."""
    script = (
        "import os; from lmbridge.engines.llamacpp import library; library.import_library(); "
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout == "None\n"


def test_two_models_live_beside_each_other(demo: str, encoder: str) -> None:
    """A swap, or a second model, would take the first with it: llama.cpp frees its backend whenever a server ends."""
    with Bridge(demo, engine="llamacpp", threads=1) as bridge:
        stream = bridge.stream(STORY, max_new_tokens=200, ignore_eos=True, timeout=60)
        next(stream)
        with Bridge(encoder, engine="llamacpp", threads=1) as other:
            assert other.embed("a b", timeout=60).shape == (64,)
        before = bridge.infer("What is 2 + 3?", timeout=60).text
        bridge.swap(demo, engine="llamacpp", threads=1, overlap=True)
        assert bridge.infer("What is 2 + 3?", timeout=60).text == before
        assert "".join(delta.text for delta in stream)
