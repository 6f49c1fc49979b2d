"""What is wrong is said before anything is started; none of this needs Ray."""

from __future__ import annotations

import pickle
import sys
import time
from typing import Any

import pydantic
import pytest

from lmbridge import Bridge, EngineStartError, GenerationConfig, InvalidRequestError, ModelNotFoundError, Request
from lmbridge.engines.ray import RayEngine
from lmbridge.engines.ray.errand import GRACE, Errand
from lmbridge.engines.transformers import TransformersEngine


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("replicas", {"replicas": 0}),
        ("num_cpus", {"num_cpus": -1}),
        ("num_gpus", {"num_gpus": "one"}),
        ("address", {"address": ""}),
        ("runtime_env", {"runtime_env": "pip"}),
        ("inner_engine", {"inner_engine": 3}),
        ("max_batch_size", {"max_batch_size": 0}),
        ("no_such", {"no_such": 1}),
        ("deploy", {"deploy": False, "replicas": 2}),
        ("deploy", {"deploy": False, "app": "x"}),
    ],
)
def test_a_wrong_option_is_named_at_once(param: str, options: dict[str, Any]) -> None:
    """It would be found on a replica, minutes later."""
    with pytest.raises(InvalidRequestError) as caught:
        RayEngine("demo", **options)
    assert caught.value.param == param


def test_a_folder_need_not_be_here_where_a_cluster_has_it() -> None:
    """The program that asks is often on a machine without the model."""
    with pytest.raises(ModelNotFoundError):
        RayEngine("/nowhere/model")
    engine = RayEngine("/nowhere/model", address="auto", replicas=3)
    assert engine.max_batch_size == 3 * TransformersEngine.max_batch_size


def test_it_takes_what_all_replicas_take() -> None:
    """Fewer would leave replicas idle."""
    engine = RayEngine("demo", replicas=4, max_batch_size=6)
    assert engine.max_batch_size == 24
    assert engine.supports == TransformersEngine.supports


def test_without_ray_the_pip_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is the first thing that a newcomer meets."""
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(EngineStartError, match=r"pip install \"lmbridge\[ray\]\""), Bridge("demo", "ray"):
        pass


class Colour(pydantic.BaseModel):
    name: str


def test_what_crosses_is_plain() -> None:
    """A class of the caller's program, or its context, cannot be unpickled on another machine."""
    request = _request(GenerationConfig(response_format=Colour, tools=[_lookup], max_new_tokens=7), timeout=5.0)
    errand = pickle.loads(pickle.dumps(Errand.of(request)))
    schema = errand.config["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["name"]["type"] == "string"
    assert errand.config["tools"][0]["function"]["name"] == "_lookup"
    assert errand.config["max_new_tokens"] == 7
    assert 0 < errand.call["timeout"] - GRACE <= 5.0
    assert "temperature" not in errand.config


def _lookup(city: str) -> str:
    """The weather there."""
    return city


def _request(config: GenerationConfig, timeout: float) -> Request:
    import contextvars

    now = time.monotonic()
    return Request("r", "hello", config.merged({}), False, "me", 0, now + timeout, now, contextvars.copy_context())
