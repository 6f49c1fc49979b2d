"""The Ray engine: replicas of any engine on a cluster, or on this machine, by Ray Serve.

Rule: everything here runs on the server thread, except where a docstring says otherwise; blocking calls into Ray run on
the engine's worker thread. Ray is imported when the engine starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Mapping
from typing import Any, ClassVar

from lmbridge.engines.base import Engine, Library
from lmbridge.engines.ray import serving
from lmbridge.engines.ray.library import INSTALL
from lmbridge.engines.ray.options import RayOptions
from lmbridge.engines.ray.sending import Sender
from lmbridge.engines.thread import EngineThread
from lmbridge.errors import EngineDeadError, EngineStartError, InvalidRequestError
from lmbridge.log import said
from lmbridge.messages import Delta, GenerationConfig, Request

LOOK_INTERVAL = 1.0
"""Seconds between checks that the application still exists."""
LOOK_PATIENCE = 15.0
"""Seconds without an answer after which the cluster counts as dead."""
START_INTERVAL = 0.1
LONG_START = 60.0
"""Seconds between log lines on what a start is waiting for."""
_log = logging.getLogger("lmbridge.engines.ray")


class RayEngine(Engine):
    """Replicas of a model on Ray Serve, each with its own engine.

    Args:
        model: the model for the engine on the replicas; with ``deploy=False``, the name of a running application.
        inner_engine: the engine on each replica: its name, or a function that builds one from the model and the
            options.
        replicas: how many.
        address: of a Ray cluster; ``"auto"`` for the one this machine belongs to; None: the one this process is
            connected to or RAY_ADDRESS names, or else one started on this machine for the bridge's life.
        app: the application's name in Serve; default: a new one. A name in use is an error.
        deploy: False uses an application deployed by another process or from a Serve config, and leaves it running.
        num_cpus, num_gpus: what Ray reserves for each replica; without ``num_gpus`` it sees no GPU.
        runtime_env: Ray's own, for each replica: packages, environment variables.
        device: where the model runs on each replica's machine: a torch name; None: the inner engine chooses.
        options: options of the inner engine, such as ``max_batch_size``, which is per replica.
    """

    name: ClassVar[str] = "ray"
    libraries = (Library("ray", "2.60", INSTALL),)

    def __init__(
        self,
        model: Any,
        *,
        inner_engine: Any = "transformers",
        replicas: int = 1,
        address: str | None = None,
        app: str | None = None,
        deploy: bool = True,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        runtime_env: Mapping[str, Any] | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if device is not None:
            options["device"] = device
        settings = RayOptions(model, inner_engine, replicas, address, num_cpus, num_gpus, runtime_env, options)
        self._deploys = bool(deploy)
        self._app = str(app or f"lmbridge-{secrets.token_hex(4)}")
        if self._deploys:
            pattern = settings.pattern()
            self.supports, self.tasks = pattern.supports, pattern.tasks  # type: ignore[misc]  # this one's own
            self.max_batch_size = settings.replicas * pattern.max_batch_size
        else:
            self._app = _checked_app(model, app, settings)
            self.supports = frozenset(GenerationConfig().__dict__)  # type: ignore[misc]  # what is refused is known once it has started
        self._settings = settings
        self._thread = EngineThread("lmbridge ray")
        weakref.finalize(self, self._thread.close).atexit = False
        self._joined = self._deployed = False  # worker thread only
        self._sender: Sender | None = None
        self._inner = f"{model} on {settings.label}" if self._deploys else self._app
        self._watching: asyncio.Task[None] | None = None
        self._dead: BaseException | None = None
        self._under_way: set[str] = set()  # ids of requests at a replica or on their way
        self._looks = self._tokens = 0
        self._seen = serving.Look("NOT_STARTED", 0, "")  # replaced as a whole, so that any thread may read it

    def describe(self) -> str:
        replicas = self._seen.running or self._settings.replicas
        return f"{self._inner}, {replicas} {'replica' if replicas == 1 else 'replicas'} on Ray"

    def where(self) -> str:
        return f"Serve's application {self._app} is {self._seen.state}, {self._seen.running} replicas run"

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Deploy the replicas, wait until all have loaded, and query one for its abilities.

        Raises:
            MissingDependencyError: Ray is missing, or has changed; the message names what.
            EngineStartError: the replicas could not be started, or there is no such application.
            InvalidRequestError: the application's name is taken.
        """
        await self._thread.run(self._join)
        await self._until_running()
        handle = await self._thread.run(serving.handle, self._app)
        try:
            about = await handle.about.remote()
            self.supports, self.tasks = about["supports"], about["tasks"]  # type: ignore[misc]
            self._inner = about["description"]
            self.max_batch_size = self._seen.running * about["places"]
        except Exception as cause:
            raise EngineStartError(
                f"Serve's application {self._app!r} does not answer like lmbridge's replicas: {said(cause)}."
            ) from cause
        self._sender = Sender(handle, lambda seconds: self.on_busy(seconds))
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="lmbridge ray watch")

    def _join(self) -> None:
        """On the worker thread."""
        serving.join(self._settings.address)
        self._joined = True
        if self._deploys:
            serving.deploy(self._app, self._settings)
            self._deployed = True

    async def _until_running(self) -> None:
        began = told = time.monotonic()
        while True:
            look = await self._thread.run(serving.look, self._app)
            if look is None or look.state == "DEPLOY_FAILED":
                raise EngineStartError(await self._why(look))
            self._seen = look
            if look.state == "RUNNING" or (look.state == "UNHEALTHY" and look.running):
                return
            if (now := time.monotonic()) - told > LONG_START:
                told = now
                needs = f"{self._settings.num_cpus:g} CPUs and {self._settings.num_gpus:g} GPUs"
                _log.warning("%s, after %.0f s. %s", self.where(), now - began, look.message)
                _log.warning("Each replica needs %s; `ray status` shows what the cluster has.", needs)
            await asyncio.sleep(START_INTERVAL)

    async def _why(self, look: serving.Look | None) -> str:
        if look is not None:
            reason = look.message.rstrip().rpartition("\n")[2] or "Serve does not say why"
            return f"The replicas of {self._app} could not be started: {reason}"
        there = ", ".join(await self._thread.run(serving.applications)) or "none"
        return f"Serve has no application {self._app!r}; there are: {there}. Deploy it, or leave out deploy=False."

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        try:
            await super().close()
            await self._thread.run(self._leave)
        finally:
            self._thread.close()

    def _leave(self) -> None:
        """On the worker thread, even after an aborted start."""
        if not self._joined:
            return
        self._joined = False
        try:
            if self._deployed:
                serving.delete(self._app)
        finally:
            serving.leave()

    async def _watch(self) -> None:
        """Check that the application exists; Serve looks after its replicas."""
        while self._dead is None:
            await asyncio.sleep(LOOK_INTERVAL)
            try:
                look = await asyncio.wait_for(self._thread.run(serving.look, self._app), LOOK_PATIENCE)
            except TimeoutError:
                self._die(TimeoutError(f"Ray has not answered for {LOOK_PATIENCE:g} s"))
            except Exception as cause:
                self._die(cause)
            else:
                self._take(look)

    def _take(self, look: serving.Look | None) -> None:
        self._looks += 1
        if look is None or look.state in serving.DEAD:
            state = "gone" if look is None else look.state
            self._die(RuntimeError(f"Serve's application {self._app} is {state}"))
        else:
            self._seen = look

    def _die(self, cause: BaseException) -> None:
        if self._dead is None:
            self._dead = cause
            if not serving.ending():  # then no engine could replace it
                self.on_death(cause)

    # --------------------------------------------------------------------------------------------------------- requests

    async def generate(self, request: Request) -> AsyncGenerator[Delta]:
        """Yield the request's deltas. A replica's death ends requests that it had begun; the others go to another
        replica.

        Raises:
            EngineDeadError: the application is gone.
            EngineError: the replica has died; ``retryable``.
        """
        if not serving.connected():
            self._die(ConnectionError("Ray has been shut down in this process"))
        if self._sender is None or self._dead is not None:
            raise EngineDeadError(f"Serve's application {self._app} is gone.") from self._dead
        self._under_way.add(request.id)
        try:
            async with contextlib.aclosing(self._sender.send(request)) as deltas:
                async for delta in deltas:
                    self._tokens += len(delta.token_ids)
                    yield delta
        except EngineDeadError as error:
            self._die(error.__cause__ or error)
            raise
        finally:
            self._under_way.discard(request.id)

    def progress(self, request_id: str) -> int | None:
        """How often the cluster was seen alive: the replica's own bridge monitors its requests."""
        return self._looks if request_id in self._under_way else None

    def stats(self) -> dict[str, float]:
        """``in_flight`` and ``tokens`` of this process; running ``replicas``; requests ``resent`` to another
        replica."""
        return {
            **super().stats(),
            "tokens": float(self._tokens),
            "replicas": float(self._seen.running),
            "resent": float(self._sender.resent if self._sender is not None else 0),
        }


def _checked_app(model: Any, app: str | None, settings: RayOptions) -> str:
    """The name of the application to use."""
    plain = RayOptions(settings.model, address=settings.address)
    if app is not None or settings != plain:
        raise InvalidRequestError(
            "deploy=False uses an application as deployed: give only its name as the model, and address if needed.",
            param="deploy",
        )
    if not isinstance(model, str) or not model:
        raise InvalidRequestError(f"model must be the application's name with deploy=False, not {model!r}.", "model")
    return model
