"""Detects LMDeploy's end at once, and ends it in the way LMDeploy supports.

Rule: server thread, with its loop running.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from lmbridge.engines.thread import EngineThread

CLOSE_TIMEOUT = 3.0
"""Seconds to wait on closing for each of: LMDeploy's requests, their aborts, its main loop."""
_log = logging.getLogger("lmbridge.engines.lmdeploy")


class Watch:
    """Monitors the main loop or process of one LMDeploy engine.

    Args:
        core: LMDeploy's ``AsyncEngine``, its loop started.
        on_end: called with the reason for its end, which LMDeploy's own requests would notice a second later.
    """

    def __init__(self, core: Any, on_end: Callable[[BaseException], None]) -> None:
        self._core = core
        self._on_end = on_end
        self._main: asyncio.Task[Any] | None = None  # the PyTorch engine's main loop
        self._sentinel: int | None = None  # file descriptor, readable when the engine process has ended
        manager = getattr(core.engine, "req_manager", None)
        process = getattr(core.engine, "proc", None)
        if manager is not None:
            self._main = manager._loop_task
            self._main.add_done_callback(self._on_main_end)
        elif process is not None:
            self._sentinel = os.dup(process.sentinel)  # LMDeploy reads the other, and a loop knows one reader of each
            asyncio.get_running_loop().add_reader(self._sentinel, self._on_process_end, process)

    @property
    def watches_process(self) -> bool:
        """Whether it monitors a process."""
        return self._sentinel is not None

    async def end(self, thread: EngineThread) -> None:
        """End LMDeploy's loop, after its requests; what does not end is logged and left behind."""
        core = self._core
        self._unwatch()
        if hasattr(core.engine, "proc"):  # its client belongs to the loop; this blocks until the process has ended
            core.close()
            return
        if self._main is None:  # TurboMind has no loop, and is slow to free a GPU
            await thread.run(core.close)
            return
        manager = core.engine.req_manager
        core.close()
        if core.engine._loop_main is None:  # it has not begun; closing has released everything, and it must not begin
            self._main.cancel()
        await within(CLOSE_TIMEOUT, "main loop", [self._main])
        sender = manager._sender_wait_task
        manager.stop_loop()
        if sender is not None:
            await within(CLOSE_TIMEOUT, "sender", [sender])

    def _on_main_end(self, main: asyncio.Task[Any]) -> None:
        error = None if main.cancelled() else main.exception()
        self._on_end(error or RuntimeError("LMDeploy's main loop ended"))

    def _on_process_end(self, process: Any) -> None:
        self._unwatch()
        process.join(0.2)  # its pipe closes a moment before its exit code is known
        self._on_end(RuntimeError(f"LMDeploy's engine process ended with code {process.exitcode}"))

    def _unwatch(self) -> None:
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is not None:
            asyncio.get_running_loop().remove_reader(sentinel)
            os.close(sentinel)


async def within(seconds: float, what: str, tasks: Any) -> None:
    """Wait for the tasks, whatever their outcome. ``asyncio.wait`` and no timeout inside: LMDeploy swallows those."""
    tasks = set(tasks)
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=seconds)
        if late:
            _log.warning("LMDeploy's %s did not end within %.0f s and are left behind", what, seconds)
