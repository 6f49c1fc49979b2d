"""Since when each caller waits, and whether that is longer than it may.

Rule: a post is written by the one caller who stands there; the watch, a thread of its own, only reads.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lmbridge.engines.standing import frame_of

GRACE = 30.0  # seconds beyond a deadline or a close after which a call hangs: the machine may be small and loaded
PATIENCE = 60.0  # seconds after which a call without a deadline hangs: no fault of the storm lasts as long
INTERVAL = 0.5  # seconds between two looks


class Waiting(NamedTuple):
    """One call under way; times are monotonic."""

    what: str
    since: float
    deadline: float | None


class Post:
    """Where one caller stands; made on its thread. ``with post.waits("infer", deadline): …`` around what may block."""

    def __init__(self, watch: Watch, name: str, closed_at: Callable[[], float | None] = lambda: None) -> None:
        self.name = name
        self.waiting: Waiting | None = None  # replaced as a whole by whoever stands here
        self.hung = False  # written by the watch
        self.left = False  # its caller has gone from it for good; written by that caller
        self.thread = threading.current_thread()
        self.task: asyncio.Task[Any] | None = None
        self._watch = watch
        self._closed_at = closed_at  # when the close of the bridge in use had returned, if it has

    def waits(self, what: str, deadline: float | None) -> Post:
        """Note what is waited for, until ``deadline`` or, without one, until the bridge was closed at the latest."""
        self.waiting = Waiting(what, time.monotonic(), deadline)
        return self

    def __enter__(self) -> Post:
        return self

    def __exit__(self, *exc_info: object) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self._watch.note_end(self, waiting, self.due(waiting))

    def leave(self) -> None:
        """Its caller goes for good."""
        self.left, self.task = True, None

    def due(self, waiting: Waiting) -> float | None:
        """When the call should have ended at the latest; None while nothing limits it."""
        closed_at = self._closed_at()
        limits = [] if waiting.deadline is None else [max(waiting.deadline, waiting.since)]
        if closed_at is not None:
            limits.append(max(closed_at, waiting.since))
        return min(limits, default=None)

    def limit(self, waiting: Waiting) -> str:
        """What should have ended the call."""
        return (
            "deadline" if waiting.deadline is not None and self.due(waiting) == waiting.deadline else "bridge's close"
        )

    def overdue(self, now: float) -> float:
        """For how many seconds the call has been hanging; 0 when it does not."""
        waiting = self.waiting
        if waiting is None:
            return 0.0
        due = self.due(waiting)
        return max(0.0, now - (waiting.since + PATIENCE if due is None else due + GRACE))

    def stack(self) -> str:
        """Where its caller stands in the code."""
        if self.task is not None:
            return "".join(_awaiting(self.task)) + "its loop: " + _stack_of(self.thread.ident)
        return _stack_of(self.thread.ident)


class Watch:
    """Looks at every post, tells of those that hang, and keeps the longest overrun.

    Args:
        tell: called with a post that hangs, once for each, from the watch's thread.
    """

    def __init__(self, tell: Callable[[Post, str], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._posts: list[Post] = []  # guarded by _lock, as are the next two
        self.latest = 0.0  # seconds by which a call ended later than its deadline, or than the close of its bridge
        self.latest_what = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="storm watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(INTERVAL * 10)

    def add(self, post: Post) -> Post:
        with self._lock:
            self._posts = [other for other in self._posts if not other.left] + [post]
        return post

    def note_end(self, post: Post, waiting: Waiting, due: float | None) -> None:
        """A call has ended; how late?"""
        if due is None:
            return
        late = time.monotonic() - due
        if late > self.latest:
            with self._lock:
                if late > self.latest:
                    self.latest, self.latest_what = (
                        late,
                        f"({waiting.what} of {post.name}, after its {post.limit(waiting)})",
                    )

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            now = time.monotonic()
            with self._lock:
                posts = [post for post in self._posts if not post.left and not post.hung]
            for post in posts:
                waiting = post.waiting
                if waiting is not None and post.overdue(now):
                    post.hung = True
                    self._tell(post, f"{waiting.what} for {now - waiting.since:.0f} s:\n{post.stack()}")


def _stack_of(thread_id: int | None) -> str:
    frame = frame_of(thread_id)
    return "  (the thread has ended)\n" if frame is None else _lines(traceback.extract_stack(frame))


def _lines(frames: list[traceback.FrameSummary]) -> str:
    """One line a frame, from where a caller of the storm asks."""
    ways = [place for place, frame in enumerate(frames) if frame.name == "ask"]
    return "".join(
        f"  {frame.filename}:{frame.lineno} {frame.name}: {frame.line}\n" for frame in frames[max(ways, default=0) :]
    )


def _awaiting(task: asyncio.Task[Any]) -> Iterator[str]:
    """The coroutines of a task, from the outermost in; a task's own stack shows the first alone."""
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            yield _lines(traceback.extract_stack(frame, 1))
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
