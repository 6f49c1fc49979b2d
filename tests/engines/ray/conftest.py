"""One real Ray on this machine for all tests, with two processors, and applications of replicas on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import until

ROOT = str(Path(__file__).resolve().parents[3])
LITTLE: dict[str, Any] = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}}}
"""What a replica is given: its process imports the tests' own engines."""

Deploy = Callable[..., str]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray and Serve, joined by all engines here."""
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def deployed(cluster: None) -> Deploy:
    """Deploys an application as somebody else would, once for each name, and returns the name."""
    from ray import serve

    from lmbridge.engines.ray import application

    def deploy(name: str, **args: Any) -> str:
        if name not in serve.status().applications:
            serve.run(application({**LITTLE, **args}), name=name, route_prefix=None)
        return name

    return deploy


class Told:
    """What ``Telling`` engines have told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hold(self) -> None:
        """Have them say nothing from now on."""
        (self.folder / "hold").touch()

    def go_on(self) -> None:
        (self.folder / "hold").unlink()

    def begun(self, prompt: str) -> int:
        """The process that has begun the prompt; waits for it."""
        return int(self._when_there(f"{prompt}.begun"))

    def ended(self, prompt: str) -> str:
        """How the prompt ended there; waits for it."""
        return self._when_there(f"{prompt}.ended")

    def _when_there(self, name: str) -> str:
        path = self.folder / name
        until(lambda: path.exists() and path.read_text())
        return path.read_text()


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def kill(process: int) -> None:
    """End a replica's process as the kernel does when memory runs out."""
    os.kill(process, 9)
