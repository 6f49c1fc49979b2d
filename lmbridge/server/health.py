"""The actual state of the server, whatever its thread last reported.

Rule: any thread; only reads, and never blocks.
"""

from __future__ import annotations

import dataclasses
import time

from lmbridge.crossing.status import State, Status
from lmbridge.engines.standing import where_is
from lmbridge.server import watchdog
from lmbridge.server.run import Run

QUIET = 10.0  # seconds without progress after which health() reports it


def seen(told: Status, run: Run | None, forked: bool) -> Status:
    """The status as observed: a state holds only while what it relies on is alive."""
    thread = None if run is None else run.thread
    ended = thread is not None and not thread.is_alive()  # read before the state, which the thread writes at its end
    if run is None or told.state in ("failed", "closed"):
        return told
    if forked:
        return _but(told, "failed", "the bridge was started in another process; build one in this process")
    if ended:
        return _but(told, "failed", "the server thread has ended")
    return _as_it_stands(told, run)


def silence(run: Run) -> float:
    """Seconds since the server thread's last heartbeat (it sends two a second)."""
    return time.monotonic() - run.loop.sweep.heartbeat


def _as_it_stands(told: Status, run: Run) -> Status:
    """The status of a server with a living thread: corrected if it is stuck, or its engine dead or silent."""
    place, silent = run.loop.calls.place, silence(run)
    if silent > watchdog.LOOP_GRACE and told.state in ("starting", "ready", "restarting", "unloaded"):
        state: State = "restarting" if told.state == "ready" else told.state
        where = where_is(run.loop.handle.thread_id) or "unknown code"
        return _but(told, state, f"the server thread has not answered for {silent:.0f} s; it is in {where}")
    if told.state != "ready" or place is None:
        return told
    if place.dead.done():
        return _but(told, "restarting", f"the engine died: {place.dead.result()!r}")
    quiet = place.standstill
    if quiet > QUIET:
        standing = place.where()
        reason = f"the engine has made no progress for {quiet:.0f} s" + (f"; {standing}" if standing else "")
        return _but(told, "ready", reason)
    if (busy := place.busy) > 0:
        return _but(told, "ready", f"the engine is full and takes no requests for another {busy:.1f} s")
    return told


def _but(told: Status, state: State, reason: str) -> Status:
    return dataclasses.replace(told, state=state, reason=reason)
