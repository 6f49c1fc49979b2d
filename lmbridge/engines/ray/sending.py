"""A request's way to a replica and its deltas' way back, whatever happens to replicas meanwhile.

Rule: server thread only. Ray is imported inside.

Leaving Ray's generator, or cancelling the task that reads it, stops nothing over there: its ``cancel()`` does. The
replica has stopped when the generator then raises.
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
"""Seconds in which a replica confirms an abort; it stops whether or not it does."""
BUSY = 0.2
"""Seconds for which nothing is sent to a deployment whose queue is full and that does not say for how long."""
MOST_SENT = 3
"""To how many replicas a request is sent that die before its first delta: one that kills them must not meet all."""


class Sender:
    """Sends requests to the replicas of one application.

    Attributes:
        resent: how many requests went to another replica, since theirs had died before the first delta.
    """

    def __init__(self, handle: Any, on_busy: Callable[[float], None]) -> None:
        self.resent = 0
        self._handle = handle.options(method_name="generate", stream=True)
        self._on_busy = on_busy

    async def send(self, request: Request) -> AsyncGenerator[Delta]:
        """Yield the request's deltas; leaving this stops the replica.

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
    """Raise what one of Ray's errors means here; others are left to whoever caught them."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    if isinstance(error, LMBridgeError | BackPressureError):
        return
    if isinstance(error, DeploymentUnavailableError):
        raise EngineDeadError(f"Serve has given the application up: {said(error)}.") from error
    if isinstance(error, RayTaskError):
        raise EngineError(f"The replica failed with this request: {said(error.cause or error)}.") from error
    if isinstance(error, RayError | RayServeException):
        raise _ReplicaLostError from error


class _ReplicaLostError(Exception):
    """The replica that had the request is no more; its cause is chained."""

    def told(self, sent: int) -> EngineError:
        """What the caller hears."""
        lost = "the replica" if sent == 1 else f"{sent} replicas, one after another,"
        error = EngineError(f"Ray has lost {lost} that had this request ({type(self.__cause__).__name__}).")
        error.retryable = True
        return error


async def _stop(responses: Any) -> None:
    """Have the replica stop, and hear that it has."""
    with contextlib.suppress(Exception):
        responses.cancel()
        async with asyncio.timeout(ABORT_PATIENCE):
            async for _ in responses:
                pass
