"""The encoder engine's beginning and end, and what goes wrong on the way: it is one text's affair, or told."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch

from lmbridge import Bridge
from lmbridge.engines import engine_class
from lmbridge.engines.encoder import EncoderEngine
from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    RequestTimeoutError,
)
from lmbridge.messages import Embed
from tests.conftest import until_living, until_then
from tests.engines.encoder.conftest import MIXED, WORDS, Brake, alone, apart, driven, save_model, tokenizer

POISON = tokenizer().convert_tokens_to_ids("poison")


def tamper(model: Any, look: Any) -> None:
    """Have ``look`` see the token ids that the model is given, and raise what it likes."""
    model.register_forward_pre_hook(lambda module, args, kwargs: look(kwargs["input_ids"]), with_kwargs=True)


# ------------------------------------------------------------------------------------------------------- bad batches


def test_one_bad_text_fails_alone(bert: str) -> None:
    """Callers would get an error for what somebody else has sent."""

    def refuse(ids: torch.Tensor) -> None:
        if (ids == POISON).any():
            raise ValueError("poison")

    async def scenario() -> None:
        async with driven(bert) as driver:
            tamper(driver.model, refuse)
            texts = [*MIXED, "a poison cat", *MIXED]
            answers = [driver.add(text) for text in texts]
            for text, answer in zip(texts, answers, strict=True):
                await answer.wait()
                if "poison" in text:
                    assert isinstance(answer.error, EngineError)
                    assert "poison" in str(answer.error)
                else:
                    assert apart(answer.value, alone(bert, text)) <= 1e-5
            assert driver.stat("in_flight") == 0

    asyncio.run(scenario())


def test_too_little_memory_halves_the_batch_and_is_remembered(bert: str) -> None:
    """Each batch would run out of memory again, or all its callers get the error."""
    refused = []

    def refuse(ids: torch.Tensor) -> None:
        if ids.numel() > 100:
            refused.append(ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    async def scenario() -> None:
        async with driven(bert) as driver:
            tamper(driver.model, refuse)
            texts = ["the cat " * 7] * 32  # of 16 tokens
            for vector in await driver.ask_all(texts):
                assert apart(vector, alone(bert, texts[0])) <= 1e-5
            assert refused == [512, 256, 128]
            assert driver.stat("max_batch_tokens") == 64
            await driver.ask_all(texts)
            assert len(refused) == 3
            with pytest.raises(EngineError, match="out of memory"):
                await driver.ask("cat " * 120)
            assert apart(await driver.ask("the cat"), alone(bert, "the cat")) <= 1e-5
            assert not driver.deaths

    asyncio.run(scenario())


def test_what_is_no_number_is_told_to_its_caller(bert: str) -> None:
    """A vector of NaN would get into an index, where it is never found and spoils what is near."""

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        output.last_hidden_state[:, kwargs["input_ids"][0] == POISON] = torch.nan
        return output

    async def scenario() -> None:
        async with driven(bert) as driver:
            driver.model.register_forward_hook(spoil, with_kwargs=True)
            good, bad = driver.add("the cat"), driver.add("the poison")
            assert apart((await good.wait()).value, alone(bert, "the cat")) <= 1e-5
            assert isinstance((await bad.wait()).error, EngineError)
            assert "not a number" in str(bad.error)

    asyncio.run(scenario())


def test_a_vector_of_another_size_is_told_to_its_caller(bert: str) -> None:
    """It would get into an index of others, or stop the job of all who were in its batch."""

    run: Any = None

    def shorten(items: Any) -> Any:
        found = run(items)
        return found[:, :5] if any(POISON in item.ids for item in items) else found

    async def scenario() -> None:
        nonlocal run
        async with driven(bert) as driver:
            layout: Any = driver.engine._core.layout if driver.engine._core is not None else None
            run, layout.run = layout.run, shorten
            good, bad = driver.add("the cat"), driver.add("the poison")
            assert apart((await good.wait()).value, alone(bert, "the cat")) <= 1e-5
            assert isinstance((await bad.wait()).error, EngineError)
            assert "shape (1, 5) for 1 texts; at the start it was 32" in str(bad.error)

    asyncio.run(scenario())


def test_a_broken_device_is_the_end_of_the_engine(bert: str) -> None:
    """Every later text would fail too, one by one, and nobody would start the engine anew."""
    runs = []

    def break_down(ids: torch.Tensor) -> None:
        runs.append(ids.numel())
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def scenario() -> None:
        async with driven(bert) as driver:
            tamper(driver.model, break_down)
            answers = [driver.add(text) for text in MIXED]
            await until_then(lambda: driver.deaths)
            assert len(runs) == 1  # it is not taken apart
            assert all(answer.last is None for answer in answers)  # the server tells them
            with pytest.raises(EngineDeadError):
                driver.add("the cat")
        assert len(driver.deaths) == 1

    asyncio.run(scenario())


def test_the_worker_thread_may_die(bert: str) -> None:
    """What is thrown into it, a test's timeout say, would leave every caller waiting for ever."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            brake = Brake(driver)
            answer = driver.add("the cat")
            await brake.arrival()
            thread = next(thread for thread in threading.enumerate() if thread.name == "lmbridge encoder")
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
            brake.lift()
            await answer.wait()
            assert answer.error is not None or answer.value.shape == (32,)
            assert apart(await driver.ask("the dog"), alone(bert, "the dog")) <= 1e-5

    asyncio.run(scenario())


# ----------------------------------------------------------------------------------------------- early and late ends


def test_aborted_texts_shift_nobody(bert: str) -> None:
    """A caller would get its neighbour's vector after somebody gave up."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            brake = Brake(driver)
            first = driver.add(MIXED[0])
            await brake.arrival()
            long = driver.add(Embed("the cat " * 5000, truncate="end"))  # becomes tokens behind what runs
            rest = [driver.add(text) for text in MIXED]
            for answer in (first, long, rest[0], rest[4]):
                driver.abort(answer)
                assert answer.last is not None
                assert answer.last.finish_reason == "abort"
            driver.engine.abort_request("nobody")
            brake.lift()
            for number, answer in enumerate(rest):
                if number not in (0, 4):
                    assert apart((await answer.wait()).value, alone(bert, MIXED[number])) <= 1e-5
            assert driver.stat("in_flight") == 0

    asyncio.run(scenario())


def test_it_says_where_it_stands(bert: str) -> None:
    """A model that hangs would be reported without a hint, or a slow one be taken for one that hangs."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            assert driver.engine.where() == ""
            brake = Brake(driver)
            answer = driver.add("the cat")
            waiting = driver.add(Embed("the cat " * 5000, truncate="end"))
            await brake.arrival()
            assert "hold" in driver.engine.where()
            before = driver.engine.progress(waiting.request.id)
            assert before is not None
            assert driver.engine.progress("nobody") is None
            assert driver.stat("in_flight") == 2
            brake.lift()
            await answer.wait()
            await waiting.wait()
            assert driver.engine._steps > before
            assert driver.engine.progress(answer.request.id) is None

    asyncio.run(scenario())


def test_a_closed_engine_holds_no_model(bert: str) -> None:
    """A swap would need the memory of both models for good; so would a start that failed."""
    kept: list[Any] = []

    async def scenario() -> None:
        async with driven(bert) as driver:
            brake = Brake(driver)
            answer = driver.add("the cat")
            await brake.arrival()
            kept.append(weakref.ref(driver.model))
            brake.lift()
        assert answer.last is None or answer.last.value is not None

    asyncio.run(scenario())
    gc.collect()
    assert kept[0]() is None


def test_a_layout_by_force(tmp_path: Path) -> None:
    """Who asks for packing would get vectors that are wrong, where the architecture does not take it."""
    folder = save_model(tmp_path, "mpnet")

    async def scenario(**options: Any) -> str:
        async with driven(folder, **options) as driver:
            for text, vector in zip(MIXED, await driver.ask_all(MIXED), strict=True):
                assert apart(vector, alone(folder, text)) <= 1e-5
            return driver.layout

    with pytest.raises(EngineStartError, match=r"packed: .*layout='auto'"):
        asyncio.run(scenario(layout="packed"))
    assert asyncio.run(scenario(self_check=False)) == "grouped"  # which every model knows
    assert asyncio.run(scenario(layout="single")) == "single"


def test_broken_weights_are_found_at_the_start(tmp_path: Path) -> None:
    """A model of NaN would be called ready."""
    from transformers import BertModel

    folder = save_model(tmp_path)
    model: Any = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.fill_(torch.nan)
    model.save_pretrained(folder)

    async def scenario() -> None:
        async with driven(folder):
            pass

    with pytest.raises(EngineStartError, match="not a number"):
        asyncio.run(scenario())


def test_padding_is_counted(bert: str) -> None:
    """Nobody would see how much of the work is for nothing."""

    async def scenario(layout: str) -> float:
        async with driven(bert, layout=layout) as driver:
            await driver.ask_all(MIXED)
            assert driver.stat("items") == len(MIXED)
            assert driver.stat("tokens") == sum(len(text.split()) + 2 for text in MIXED)
            return driver.stat("padding_share")

    assert asyncio.run(scenario("packed")) == asyncio.run(scenario("single")) == 0
    assert 0 < asyncio.run(scenario("grouped")) <= 0.15


def test_a_long_list_holds_up_nobody(bert: str) -> None:
    """One caller's ten thousand texts would have everybody else wait behind all that the engine has taken of them."""

    async def scenario() -> None:
        async with driven(bert, max_batch_size=4) as driver:
            brake = Brake(driver)
            listed = [driver.add("the cat", client="list") for _ in range(40)]
            await brake.arrival()
            single = driver.add("the dog", client="somebody")
            brake.lift()
            await single.wait()
            assert sum(answer.last is not None for answer in listed) <= 8
            assert single.value.shape == (32,)

    asyncio.run(scenario())


class RecordingParty:
    """A share of a device on which somebody else is at work, or nobody."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.inside = 0
        self.turns = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        assert threading.current_thread().name == "lmbridge encoder"
        self.turns += 1
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def pause(self) -> float:
        return 0.0

    @property
    def waiting(self) -> bool:
        return False

    def share(self) -> float | None:
        return self.seconds


def test_it_takes_turns_and_keeps_them_short(bert: str) -> None:
    """A stream of a language model on the same device would stand still while thousands of texts are encoded."""
    party = RecordingParty()

    async def scenario() -> None:
        async with driven(bert) as driver:
            driver.engine.party = party
            tamper(driver.model, lambda ids: seen.append(party.inside))
            seen: list[int] = []
            await driver.ask_all(["cat"] * 20)
            assert party.turns == driver.stat("batches") <= 2
            party.seconds = 0.0
            party.turns = 0
            await driver.ask_all(["cat"] * 20)
            assert party.turns == 20
            assert seen
            assert set(seen) == {1}
            assert party.inside == 0
            party.seconds = float("inf")  # of one whose neighbours have next to no weight
            assert len(await driver.ask_all(["cat"] * 20)) == 20

    asyncio.run(scenario())


# ----------------------------------------------------------------------------------------------------- through a bridge


def test_it_is_the_engine_of_that_name(bert: str) -> None:
    """``Bridge(model, engine="encoder")`` would find none; or load torch in every process that imports lmbridge."""
    assert engine_class("encoder") is EncoderEngine
    documented = inspect.getdoc(EncoderEngine) or ""
    for option in inspect.signature(EncoderEngine).parameters:
        assert f"{option}:" in documented
    script = "import sys, lmbridge.engines.encoder; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_sixty_four_threads_get_their_own(bert: str) -> None:
    """Callers would get each other's vectors."""
    texts = [
        [" ".join(WORDS[(n * 5 + m * k) % len(WORDS)] for k in range(1 + (n + m) % 40)) for m in range(20)]
        for n in range(64)
    ]
    with Bridge(bert, engine="encoder") as bridge, ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda own: [bridge.embed(one) for one in own], texts))
        expected = bridge.embed([one for own in texts for one in own])
        assert apart(numpy.concatenate(found), expected) <= 1e-5
        assert apart(expected[0], alone(bert, texts[0][0])) <= 1e-5


def test_wrong_things_are_refused_one_by_one(bert: str) -> None:
    """One None among ten thousand texts would lose the others, or show a trace of the tokenizer."""
    with Bridge(bert, engine="encoder") as bridge:
        wrongs: tuple[Any, ...] = (None, 3, b"bytes", 1.5, {"text": "a"}, [["a"]], ["a", None])
        for wrong in wrongs:
            with pytest.raises(InvalidRequestError):
                bridge.embed(wrong)
        with pytest.raises(LMBridgeError, match=r"cannot generate.*encoder|'encoder' cannot"):
            bridge.infer("the cat")
        with pytest.raises(LMBridgeError, match="cannot rerank"):
            bridge.rerank("a", ["b"])
        assert bridge.embed("the cat").shape == (32,)


def held(bridge: Bridge) -> tuple[threading.Event, threading.Event]:
    """Hold the bridge's model before its next runs: (somebody has arrived, let go)."""
    arrived, go = threading.Event(), threading.Event()
    engine: Any = bridge._server_thread.engine

    def hold(*args: Any) -> None:
        arrived.set()
        assert go.wait(60)

    engine._core.module.register_forward_pre_hook(hold)
    return arrived, go


def test_a_deadline_ends_one_call(bert: str) -> None:
    """A caller in a hurry would wait for the batch, or its neighbours lose theirs."""
    with Bridge(bert, engine="encoder") as bridge, ThreadPoolExecutor(2) as pool:
        arrived, go = held(bridge)
        hurried, other = pool.submit(bridge.embed, "the cat", timeout=0.5), pool.submit(bridge.embed, "the dog")
        assert arrived.wait(30)
        with pytest.raises(RequestTimeoutError):
            hurried.result(30)
        go.set()
        assert apart(other.result(30), alone(bert, "the dog")) <= 1e-5


def test_a_swap_loses_no_text(bert: str, tmp_path: Path) -> None:
    """Texts on their way would fail when the model is exchanged."""
    other = save_model(tmp_path, seed=5)
    with Bridge(bert, engine="encoder") as bridge, ThreadPoolExecutor(9) as pool:
        arrived, go = held(bridge)
        running = [pool.submit(bridge.embed, text) for text in MIXED]
        assert arrived.wait(30)
        until_living(bridge, len(MIXED))
        swap = pool.submit(bridge.swap, other, "encoder")
        go.set()
        swap.result(60)
        for text, future in zip(MIXED, running, strict=True):
            vector = future.result(30)
            assert min(apart(vector, alone(bert, text)), apart(vector, alone(other, text))) <= 1e-5
        assert apart(bridge.embed("the cat"), alone(other, "the cat")) <= 1e-5


def test_closing_ends_every_call(bert: str) -> None:
    """A program that ends would hang in its threads."""
    bridge = Bridge(bert, engine="encoder").start()
    arrived, go = held(bridge)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(bridge.embed, text) for text in MIXED]
        assert arrived.wait(30)
        until_living(bridge, len(MIXED))
        closing = threading.Thread(target=bridge.close)
        closing.start()
        for call in calls:
            with pytest.raises(BridgeClosedError):
                call.result(30)
        go.set()
        closing.join(30)
        assert not closing.is_alive()


def test_a_dead_engine_is_followed_by_a_new_one(bert: str) -> None:
    """One fault of the device would end the service."""
    with Bridge(bert, engine="encoder") as bridge:
        engine: Any = bridge._server_thread.engine
        engine._die(RuntimeError("gone"))
        assert apart(bridge.embed("the cat"), alone(bert, "the cat")) <= 1e-5
        assert bridge.health().restarts == 1


@pytest.mark.long
def test_a_process_may_end_while_texts_are_encoded(bert: str) -> None:
    """The interpreter would abort with a core dump, which looks like a fault of the user's program."""
    script = f"""
        import threading
        from lmbridge import Bridge
        bridge = Bridge({bert!r}, engine="encoder").start()
        future = bridge.submit_embed(["the cat sat " * 60] * 250)
        bridge.embed("the cat")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Fatal" not in done.stderr


@pytest.mark.long
def test_a_hundred_thousand_texts_take_no_memory(bert: str) -> None:
    """A service would grow until the system ends it."""
    texts = [" ".join(WORDS[(n + k) % len(WORDS)] for k in range(1 + n % 30)) for n in range(2_000)]
    process = psutil.Process()
    with Bridge(bert, engine="encoder") as bridge:
        for _ in range(10):
            bridge.embed(texts)
        gc.collect()
        before = process.memory_info().rss
        for _ in range(50):
            bridge.embed(texts)
        gc.collect()
        assert process.memory_info().rss - before < 30_000_000
