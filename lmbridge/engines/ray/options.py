"""The Ray engine's options, validated when it is created, and the inner engine they describe.

Rule: does not use Ray; builds an inner engine for inspection, but does not start it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmbridge.engines import engine_class, engine_factory, named_engine
from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError, ModelNotFoundError
from lmbridge.log import shown
from lmbridge.values import as_int, as_number


@dataclass(frozen=True)
class RayOptions:
    """The options of a deployment; RayEngine documents each.

    Raises:
        InvalidRequestError: a value is invalid; ``param`` names it.
        ModelNotFoundError: there is no such folder, and the cluster is this machine.
    """

    model: Any
    inner_engine: Any = "transformers"
    replicas: int = 1
    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    runtime_env: Mapping[str, Any] | None = None
    inner: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        replicas = as_int(self.replicas)
        if replicas is None or replicas < 1:
            raise _wrong("replicas", "an int >= 1", self.replicas)
        for name in ("num_cpus", "num_gpus"):
            amount = as_number(getattr(self, name))
            if amount is None or not 0 <= amount < float("inf"):
                raise _wrong(name, "a number >= 0", getattr(self, name))
        if self.address is not None and (not isinstance(self.address, str) or not self.address):
            raise _wrong("address", "'auto', 'local', a host with its port, or None", self.address)
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise _wrong("runtime_env", "a dict or None", self.runtime_env)
        if not isinstance(self.inner_engine, str) and not callable(self.inner_engine):
            raise _wrong("inner_engine", "an engine's name, or what builds one", self.inner_engine)

    @property
    def label(self) -> str:
        """The model on the replicas, for messages."""
        inner = self.inner_engine
        return inner if isinstance(inner, str) else str(getattr(inner, "__name__", type(inner).__name__))

    @property
    def actor(self) -> dict[str, Any]:
        """Ray's resources for each replica, by Ray's names."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.runtime_env is not None:
            options["runtime_env"] = dict(self.runtime_env)
        return options

    def pattern(self) -> Engine | type[Engine]:
        """An inner engine, built to validate its options and for inspection, not started.

        Its class if only the cluster has the model.
        """
        if not isinstance(self.inner_engine, str):
            engine: Engine = self.inner_engine(self.model, **self.inner)
            return engine
        try:
            name = named_engine(self.inner_engine, self.model)
            return engine_factory(name, self.model, self.inner)()
        except ModelNotFoundError:
            if self.address is None:
                raise
        return engine_class(self.inner_engine)


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {shown(value)}.", param=name)
