"""Sends requests to replicas and receives deltas, whatever happens to the replicas.

Rule: server thread only. Ray is imported inside.

Leaving Ray's generator, or cancelling the task that reads it, does not stop the replica; only its ``cancel()`` does.
The replica has stopped once the generator raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable
from typing import Any

from lmbridge.engines.ray.errand import Errand
from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineError, EngineStartError, LMBridgeError
from lmbridge.log import said
from lmbridge.messages import Delta, Request

ABORT_PATIENCE = 1.5
"""Seconds for a replica to confirm an abort; it stops in any case."""
BUSY = 0.2
"""Seconds without requests to a deployment with a full queue and no stated wait."""
MOST_SENT = 3
"""How many replicas may die on a request before its first delta: a deadly request must not reach all."""


class Sender:
    """Sends requests to the replicas of one application.

    Attributes:
        resent: requests sent to another replica after theirs died before the first delta.
    """

    def __init__(self, handle: Any, on_busy: Callable[[float], None]) -> None:
        self.resent = 0
        self._handle = handle.options(method_name="generate", stream=True)
        self._on_busy = on_busy

    async def send(self, request: Request) -> AsyncGenerator[Delta]:
        """Yield the request's deltas; leaving it stops the replica's work on it.

        Raises:
            EngineDeadError: the application is gone.
            EngineError: the replica has died; ``retryable``.
        """
        begun = False
        for sent in itertools.count(1):
            try:
                async with contextlib.aclosing(self._once_there_is_room(request)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                return
            except _ReplicaLostError as lost:
                if begun or sent == MOST_SENT:
                    raise lost.told(sent) from lost.__cause__
                self.resent += 1

    async def _once_there_is_room(self, request: Request) -> AsyncGenerator[Delta]:
        from ray.serve.exceptions import BackPressureError

        while True:
            try:
                async with contextlib.aclosing(self._once(Errand.of(request))) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except BackPressureError as full:
                seconds = full.retry_after_s or BUSY
                self._on_busy(seconds)
                await asyncio.sleep(seconds)

    async def _once(self, errand: Errand) -> AsyncGenerator[Delta]:
        responses = self._handle.remote(errand)
        over = False
        try:
            async for delta in responses:
                if isinstance(delta.error, BridgeClosedError | EngineStartError):  # Serve takes this replica down
                    raise _ReplicaLostError from delta.error
                over = delta.error is not None or delta.finish_reason is not None
                yield delta
        except (asyncio.CancelledError, GeneratorExit):
            if not over:
                await _stop(responses)
            raise
        except Exception as error:
            _translate(error)
            raise


def _translate(error: Exception) -> None:
    """Raise our equivalent of a Ray error; leave other errors to the caller."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    if isinstance(error, LMBridgeError | BackPressureError):
        return
    if isinstance(error, DeploymentUnavailableError):
        raise EngineDeadError(f"Serve has shut the application down: {said(error)}.") from error
    if isinstance(error, RayTaskError):
        raise EngineError(f"The replica failed with this request: {said(error.cause or error)}.") from error
    if isinstance(error, RayError | RayServeException):
        raise _ReplicaLostError from error


class _ReplicaLostError(Exception):
    """The replica with the request has died; the cause is chained."""

    def told(self, sent: int) -> EngineError:
        """The caller's error."""
        lost = "the replica" if sent == 1 else f"{sent} replicas, one after another,"
        error = EngineError(f"Ray has lost {lost} working on this request ({type(self.__cause__).__name__}).")
        error.retryable = True
        return error


async def _stop(responses: Any) -> None:
    """Stop the replica's work and wait for confirmation."""
    with contextlib.suppress(Exception):
        responses.cancel()
        async with asyncio.timeout(ABORT_PATIENCE):
            async for _ in responses:
                pass
