"""What becomes of requests when they are left, when replicas die, and when a deployment is full or goes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip('needs Ray Serve: pip install "lmbridge[ray]"', allow_module_level=True)

import pydantic

from lmbridge import Bridge, EngineError, EngineStartError, InvalidRequestError, RequestTimeoutError, Stream
from lmbridge.engines.ray import RayEngine
from lmbridge.engines.ray.options import RayOptions
from lmbridge.engines.ray.serving import build
from tests.conftest import until
from tests.engines.ray.conftest import LITTLE, Deploy, Told, kill
from tests.engines.ray.inner import Telling

pytestmark = pytest.mark.timeout(240)
PATIENCE = 60.0


@pytest.fixture
def telling(cluster: None, told: Told) -> Iterator[Callable[..., Bridge]]:
    """Deploys ``Telling`` engines and returns a bridge to them."""
    bridges: list[Bridge] = []

    def build(**options: Any) -> Bridge:
        arguments = {**LITTLE, "inner_engine": Telling, **options}
        bridges.append(Bridge(lambda: RayEngine(str(told.folder), **arguments), timeout=PATIENCE))
        return bridges[-1].start()

    yield build
    for bridge in bridges:
        bridge.close(timeout=0)


def test_what_ends_a_request_here_ends_it_there(telling: Callable[..., Bridge], told: Told) -> None:
    """A replica that goes on with what nobody reads computes for nobody, while others wait."""
    bridge = telling(max_batch_size=8)
    with bridge.stream("left", max_new_tokens=10_000) as stream:
        next(stream)
    assert told.ended("left") == "CancelledError"

    future = bridge.submit("cancelled", max_new_tokens=10_000)
    told.begun("cancelled")
    assert future.cancel()
    assert told.ended("cancelled") == "CancelledError"

    told.hold()
    silent = bridge.submit("silent")
    told.begun("silent")
    bridge.abort(silent.request_id)
    assert told.ended("silent") == "CancelledError"
    told.go_on()

    with pytest.raises(RequestTimeoutError) as caught:
        bridge.infer("late", max_new_tokens=10_000, timeout=1.0)
    assert caught.value.partial
    assert told.ended("late") == "CancelledError"

    until(lambda: bridge.stats()["in_flight"] == 0)
    until(lambda: _stats(bridge)["in_flight"] == 0)


def test_a_killed_replica_loses_only_what_it_had_begun(telling: Callable[..., Bridge], told: Told) -> None:
    """One machine that fails must not take the answers of the others, nor leave a caller waiting."""
    bridge = telling(replicas=2, max_batch_size=10)
    streams = [bridge.stream(f"r{number}", max_new_tokens=100_000) for number in range(20)]
    replicas = [next(stream).text.split()[0] for stream in streams]
    assert len(set(replicas)) == 2
    victim = replicas[0]
    with ThreadPoolExecutor(20) as pool:
        reading = [pool.submit(_read, stream) for stream in streams]
        kill(int(victim))
        for future, replica in zip(reading, replicas, strict=True):
            if replica == victim:
                future.result(PATIENCE)
        (told.folder / "enough").touch()
        errors = [future.result(PATIENCE) for future in reading]
    for stream, replica, error in zip(streams, replicas, errors, strict=True):
        if replica == victim:
            assert isinstance(error, EngineError)
            assert error.retryable
            assert set(error.partial.split()) == {victim}
        else:
            assert error is None
            assert set(stream.response.text.split()) == {replica}
    assert bridge.health().restarts == 0
    until(lambda: bridge.stats()["replicas"] == 2)
    assert bridge.infer("afterwards", max_new_tokens=2).text


def test_what_a_killed_replica_had_not_begun_is_answered_by_another(telling: Callable[..., Bridge], told: Told) -> None:
    """A caller who has seen nothing yet need not know."""
    bridge = telling(replicas=2)
    told.hold()
    future = bridge.submit("waiting", max_new_tokens=3)
    first = told.begun("waiting")
    (told.folder / "waiting.begun").unlink()
    kill(first)
    second = told.begun("waiting")
    told.go_on()
    assert future.result(PATIENCE).text.split() == [str(second)] * 3
    assert second != first


def test_a_prompt_that_kills_its_replicas_is_given_up(telling: Callable[..., Bridge]) -> None:
    """One request that runs a machine out of memory must not go through all of a cluster."""
    bridge = telling(replicas=1)
    with pytest.raises(EngineError, match="3 replicas, one after another") as caught:
        bridge.infer("fatal")
    assert caught.value.retryable
    assert bridge.infer("another", max_new_tokens=2).text


def test_an_application_that_is_deleted_is_told_at_once_and_deployed_again(telling: Callable[..., Bridge]) -> None:
    """Somebody who tidies the cluster up must not leave callers waiting for their deadlines."""
    from ray import serve

    bridge = telling(app="tidied")
    stream = bridge.stream("long", max_new_tokens=10_000)
    next(stream)
    serve.delete("tidied")
    with pytest.raises(EngineError) as caught:
        for _ in stream:
            pass
    assert caught.value.retryable
    assert bridge.infer("again", max_new_tokens=2).text
    assert bridge.health().restarts == 1


def test_a_name_that_is_taken_is_refused(telling: Callable[..., Bridge]) -> None:
    """Two programs that use one name would replace each other's replicas."""
    telling(app="taken")
    with pytest.raises(EngineStartError, match="deploy=False"):
        telling(app="taken")


def test_an_application_that_is_not_there_is_named(cluster: None) -> None:
    """A mistyped name would be waited for."""
    with pytest.raises(EngineStartError, match="no application 'nobody'"), Bridge("nobody", "ray", deploy=False):
        pass


def test_a_replica_that_cannot_start_says_why(telling: Callable[..., Bridge], told: Told) -> None:
    """Serve says that a deployment has failed, and keeps the reason to itself."""
    (told.folder / "broken").touch()
    with pytest.raises(EngineStartError, match="no such model on this machine"):
        telling()


def test_a_full_deployment_is_asked_again(cluster: None, told: Told) -> None:
    """A deployment that others use as well may be full: its BackPressureError is no caller's affair."""
    from ray import serve

    options = RayOptions(str(told.folder), inner_engine=Telling, **LITTLE, inner={"max_batch_size": 1})
    app = build(options, max_ongoing_requests=1, max_queued_requests=1)
    serve.run(app, name="narrow", route_prefix=None)
    with Bridge(lambda: _wide("narrow"), timeout=PATIENCE) as bridge, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(bridge.infer, f"p{number}", max_new_tokens=5) for number in range(6)]
        assert all(len(answer.result(PATIENCE).text.split()) == 5 for answer in asked)
    serve.delete("narrow")


def test_errors_keep_their_class_and_say_what_is_wrong(deployed: Deploy) -> None:
    """An application that answers 400 for what is wrong in itself, and 503 for the rest, tells them by the class."""
    app = deployed("demo", model="demo", replicas=2, max_batch_size=4)
    with Bridge(lambda: RayEngine(app, deploy=False), timeout=PATIENCE) as bridge:
        with pytest.raises(InvalidRequestError) as caught:
            bridge.infer("x", min_new_tokens=1, grammar={"regex": "("})
        assert caught.value.param
        with pytest.raises(InvalidRequestError, match="ids of a prompt"):
            bridge.infer([10**9])


class Colour(pydantic.BaseModel):
    name: str


def test_a_class_stands_for_its_schema_there_as_well(deployed: Deploy) -> None:
    """Classes of the caller's program are unknown to replicas."""
    app = deployed("demo", model="demo", replicas=2, max_batch_size=4)
    with Bridge(lambda: RayEngine(app, deploy=False), timeout=PATIENCE) as bridge:
        answer = bridge.infer("What colour is grass?", response_format=Colour, max_new_tokens=60)
        assert Colour.model_validate_json(answer.text)


def _stats(bridge: Bridge) -> Any:
    """What the replica's own engine counts."""
    from ray import serve

    (app,) = [name for name in serve.status().applications if name.startswith("lmbridge-")]
    return serve.get_app_handle(app).stats.remote().result(timeout_s=PATIENCE)


def _wide(app: str) -> RayEngine:
    """An engine that believes there is more room than there is, as others have taken it."""
    engine = RayEngine(app, deploy=False)
    start = engine.start

    async def wide() -> None:
        await start()
        engine.max_batch_size = 6

    engine.start = wide  # type: ignore[method-assign]
    return engine


def _read(stream: Stream) -> Exception | None:
    """Read a stream to its end; the error it ended with."""
    try:
        for _ in stream:
            pass
    except Exception as error:
        return error
    return None
