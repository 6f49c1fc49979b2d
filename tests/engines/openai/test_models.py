"""Which of a server's models answers: the one that was named, or the one that does what is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lmbridge import Bridge, EngineError, EngineStartError, InvalidRequestError, UnsupportedTaskError
from lmbridge.engines.openai import server as one
from lmbridge.testing import ScriptedEncoder, ScriptedEngine
from tests.conftest import until
from tests.engines.openai.conftest import PATIENCE, Far, Rude, answer, far_end, http


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is asked ten times a second."""
    monkeypatch.setattr(one, "LOOK", 0.1)


def listing(*names: str) -> bytes:
    return http(200, {"data": [{"id": name, "owned_by": "vllm"} for name in names]})


def no_model(name: str) -> bytes:
    """As vLLM has it."""
    return http(
        404, {"error": {"message": f"The model `{name}` does not exist.", "type": "NotFoundError", "code": 404}}
    )


def test_the_first_that_does_the_task_is_chosen(serve: Callable[..., Far]) -> None:
    """A server of a chat model and an encoder embeds by the encoder; who asks the other is told what to name."""
    with Bridge(ScriptedEncoder(tasks=["embed"])) as encoder:
        url = serve(ScriptedEngine(), name="talker", beside={"encoder": encoder}).url
        with Bridge(url, task="embed") as bridge:
            assert bridge.describe().startswith("encoder at")
            assert bridge.embed("one", timeout=PATIENCE).shape
            with pytest.raises(UnsupportedTaskError, match="model_name='talker'"):
                bridge.infer("one", timeout=PATIENCE)
        with Bridge(url) as bridge:
            assert bridge.infer("one", timeout=PATIENCE).text == "one"
            with pytest.raises(UnsupportedTaskError, match="model_name='encoder'") as caught:
                bridge.embed("one", timeout=PATIENCE)
            assert "--embed" not in str(caught.value)
            with pytest.raises(UnsupportedTaskError, match="with task='rerank' if"):
                bridge.rerank("one", ["two"], timeout=PATIENCE)


def test_a_task_that_no_model_does(serve: Callable[..., Far]) -> None:
    """It is told at the start, with what each of them does."""
    url = serve(ScriptedEngine(), name="talker").url
    for name in (None, "talker"):
        with (
            pytest.raises(EngineStartError, match=r"that can rerank.*It serves talker \(generate\)\."),
            Bridge(url, task="rerank", model_name=name),
        ):
            pass


def test_a_server_that_comes_back_with_another_model() -> None:
    """Who named no model goes on with what is served now, also a request that was under way to the old one."""
    with far_end(ScriptedEngine(), name="old") as far, Bridge(far.url) as bridge:
        assert bridge.infer("one", timeout=PATIENCE).text == "one"
        port = int(far.server.url.rpartition(":")[2])
        far.server.close()
        with far_end(ScriptedEngine(), name="new", port=port):
            until(lambda: not bridge.stats()["servers_away"])
            assert bridge.infer("two", timeout=PATIENCE).text == "two"
            assert bridge.describe().startswith("new at")


def test_a_model_that_was_named_is_waited_for(serve: Callable[..., Far]) -> None:
    """Another one's answers are not taken for its own; when it is back, serving goes on."""
    with far_end(ScriptedEngine(), name="old") as far, Bridge(far.url, model_name="old") as bridge:
        port = int(far.server.url.rpartition(":")[2])
        far.server.close()
        with far_end(ScriptedEngine(), name="new", port=port) as other:
            for _ in range(2):
                with pytest.raises(EngineError, match=r"no model 'old'.*It serves new") as caught:
                    bridge.infer("two", timeout=PATIENCE)
                assert caught.value.retryable
            assert bridge.state == "ready"
            assert not other.engine.started
        with far_end(ScriptedEngine(), name="old", port=port):
            until(lambda: not bridge.stats()["servers_away"])
            assert bridge.infer("three", timeout=PATIENCE).text == "three"


def test_a_model_that_is_exchanged_behind_an_open_connection(rude: Callable[..., Rude]) -> None:
    """A server need not go away for that; what had not begun is asked of the new model."""
    server = rude(no_model("old"), answer("yes"), models=listing("old"))
    with Bridge(server.url) as bridge:
        server.models = listing("new", "old-too")
        assert bridge.infer("a", timeout=PATIENCE).text == "yes"
    assert [body["model"] for body in server.asked] == ["old", "new"]


def test_a_model_that_is_listed_and_not_known(rude: Callable[..., Rude]) -> None:
    """A server that contradicts itself is asked twice, and not for ever."""
    server = rude(no_model("m"), models=listing("m"))
    with Bridge(server.url) as bridge, pytest.raises(InvalidRequestError, match="does not exist"):
        bridge.infer("a", timeout=PATIENCE)
    assert len(server.asked) == 2


def test_a_model_that_is_still_there_is_kept(rude: Callable[..., Rude]) -> None:
    """Another one that is listed before it changes nothing."""
    server = rude(no_model("m"), answer("yes"), models=listing("m"))
    with Bridge(server.url) as bridge:
        server.models = listing("first", "m")
        assert bridge.infer("a", timeout=PATIENCE).text == "yes"
    assert [body["model"] for body in server.asked] == ["m", "m"]
