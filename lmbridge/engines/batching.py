"""Single items into batches: what waits when the model is free goes together, and a batch that fails is taken apart.

Rule: server thread only; the batches themselves run wherever ``run`` has them run. Nothing polls and nothing idles:
while a batch runs, the next one gathers.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lmbridge.engines.ailments import is_out_of_memory
from lmbridge.engines.base import Sink, engine_error
from lmbridge.errors import EngineError, LMBridgeError
from lmbridge.log import logger, shown
from lmbridge.messages import Delta, Usage

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    """One request's item."""

    key: str
    item: T
    size: int
    usage: Usage | None
    client: str
    sink: Sink


class Batcher(Generic[T]):
    """Hands items to ``run`` in batches, in the order in which they came; clients of several take turns.

    Args:
        run: takes a list of items and returns one result for each, which may be an exception.
        max_items: the most items in a batch.
        max_size: the most that the sizes of a batch's items may add up to, tokens say; a larger item runs alone.
        wait: seconds for which a batch that is not full waits for more.
        cap: asked before each batch: a limit for now, below ``max_size``.

    Attributes:
        batches, items, size: how many were run so far, and what their sizes add up to.
        max_size: halved when a batch does not fit into the memory.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Awaitable[Sequence[Any]]],
        *,
        max_items: int,
        max_size: int | None = None,
        wait: float = 0.0,
        cap: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.batches = self.items = self.size = self._number = 0
        self.max_size = max_size
        self._run = run
        self._max_items = max_items
        self._wait = wait
        self._cap = cap
        self._waiting: OrderedDict[str, _Entry[T]] = OrderedDict()  # by the request's id, as is the next
        self._running: dict[str, _Entry[T]] = {}
        self._served: dict[str, int] = {}  # the last batch that a client who waits had a part in
        self._failed_alone = False  # some item of the batch that runs did
        self._work: asyncio.Task[None] | None = None  # there while there is something to do
        self._batch: asyncio.Task[list[Any]] | None = None  # there while one runs
        self._more = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._running

    def add(self, key: str, item: T, sink: Sink, size: int = 1, usage: Usage | None = None, client: str = "") -> None:
        """Have an item run with the next batch; ``sink`` hears what became of it.

        Args:
            size: what it counts against ``max_size``.
            usage: said with its result.
            client: whose turn it takes.
        """
        self._waiting[key] = _Entry(key, item, size, usage, client, sink)
        self._more.set()
        if self._work is None:
            self._work = _start(self._serve(), "lmbridge batches")

    def discard(self, key: str) -> bool:
        """Let go of an item, whose sink hears of an abort; False when there is none of that key.

        One that runs already runs on with the others of its batch; with none of them left, the batch is cancelled.
        """
        entry = self._waiting.pop(key, None) or self._running.pop(key, None)
        if entry is None:
            return False
        if self._batch is not None and not self._running:
            self._batch.cancel()
        entry.sink(Delta(finish_reason="abort"))
        return True

    def close(self) -> None:
        """Forget all items, and start no further batch."""
        self._waiting.clear()
        self._running.clear()
        for task in (self._work, self._batch):
            if task is not None:
                task.cancel()

    async def _serve(self) -> None:
        try:
            while self._waiting:
                if self._wait:
                    await self._gather()
                batch = self._take()
                self._running = {entry.key: entry for entry in batch}
                self._failed_alone = False
                await self._attempt(batch)
                await asyncio.sleep(0)  # the server fills the places that this has freed, before the next is taken
        except Exception as cause:  # a fault in here must leave nobody waiting
            logger.exception("A batch was lost.")
            for entry in list(self._running.values()):
                self._tell(entry, cause)
        finally:
            self._work = None
        if self._waiting:
            self._work = _start(self._serve(), "lmbridge batches")

    async def _gather(self) -> None:
        """Wait for more while the batch is not full, for as long as was asked for."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait
        while not self._is_full() and (left := end - loop.time()) > 0:
            self._more.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), left)

    def _is_full(self) -> bool:
        if len(self._waiting) >= self._max_items:
            return True
        return self.max_size is not None and sum(entry.size for entry in self._waiting.values()) >= self.max_size

    def _take(self) -> list[_Entry[T]]:
        """The next batch; the first item always fits."""
        limits = [limit for limit in (self.max_size, self._cap()) if limit is not None]
        room = min(limits, default=None)
        batch: list[_Entry[T]] = []
        size = 0
        for entry in self._in_turns()[: self._max_items]:
            size += entry.size
            if batch and room is not None and size > room:
                break
            del self._waiting[entry.key]
            batch.append(entry)
        waiting = {entry.client for entry in self._waiting.values()}
        self._number += 1
        self._served = {client: number for client, number in self._served.items() if client in waiting}
        self._served.update((entry.client, self._number) for entry in batch)
        return batch

    def _in_turns(self) -> list[_Entry[T]]:
        """Who waits: the first of each client, then the second of each, and so on; who was served last comes last."""
        ranks: Counter[str] = Counter()
        ranked: list[tuple[int, _Entry[T]]] = []
        for entry in self._waiting.values():
            ranked.append((ranks[entry.client], entry))
            ranks[entry.client] += 1
        return [entry for _, entry in sorted(ranked, key=lambda pair: (pair[0], self._served.get(pair[1].client, 0)))]

    async def _attempt(self, batch: list[_Entry[T]]) -> None:
        """Run a batch, or its halves where it fails, until only what fails by itself has failed."""
        batch = [entry for entry in batch if entry.key in self._running]  # the others were aborted meanwhile
        if not batch:
            return
        if len(batch) > 1 and self.max_size is not None and sum(entry.size for entry in batch) > self.max_size:
            await self._halve(batch)  # it would not fit into the memory, as we have learned meanwhile
            return
        try:
            results = await self._work_on([entry.item for entry in batch])
        except LMBridgeError as error:
            await self._take_apart(batch, error)
        except Exception as cause:
            await self._take_apart(batch, cause)
            if is_out_of_memory(cause) and not self._failed_alone:  # it was how many there were
                self._shrink(batch)
        else:
            self._count(batch)
            if len(results) != len(batch):
                wrong = EngineError(f"The function returned {len(results)} results for {len(batch)} items.")
                results = [wrong] * len(batch)
            for entry, result in zip(batch, results, strict=True):
                self._tell(entry, result)

    async def _work_on(self, items: list[T]) -> list[Any]:
        """What ``run`` makes of a batch, in a task of its own, which it may cancel or try to leave the loop by.

        Raises:
            Exception: whatever it raised.
        """
        self._batch = batch = _start(_tame(self._run, items), "lmbridge batch")
        try:
            await asyncio.wait([batch])
        finally:
            self._batch = None
            batch.cancel()
        if batch.cancelled():
            raise RuntimeError("it was cancelled")
        error = batch.exception()
        if error is not None and not isinstance(error, Exception):
            raise RuntimeError(f"{shown(error)} was raised") from error
        return batch.result()

    async def _take_apart(self, batch: list[_Entry[T]], cause: Exception) -> None:
        if len(batch) == 1:
            self._failed_alone = True
            self._tell(batch[0], cause)
        else:
            await self._halve(batch)

    async def _halve(self, batch: list[_Entry[T]]) -> None:
        half = len(batch) // 2
        await self._attempt(batch[:half])
        await self._attempt(batch[half:])

    def _shrink(self, batch: list[_Entry[T]]) -> None:
        """Remember how much was too much."""
        half = sum(entry.size for entry in batch) // 2
        self.max_size = max(1, half if self.max_size is None else min(half, self.max_size))

    def _count(self, batch: list[_Entry[T]]) -> None:
        self.batches += 1
        self.items += len(batch)
        self.size += sum(entry.size for entry in batch)

    def _tell(self, entry: _Entry[T], result: Any) -> None:
        if self._running.pop(entry.key, None) is not entry:  # it was aborted meanwhile
            return
        error = _error(result)
        if error is None:
            entry.sink(Delta(finish_reason="stop", usage=entry.usage or Usage(), value=result))
        elif isinstance(error, LMBridgeError):
            entry.sink(Delta(error=error))
        else:
            entry.sink(Delta(error=engine_error(f"This item failed: {shown(error)}.", error)))


def _error(result: Any) -> BaseException | None:
    try:
        return result if isinstance(result, BaseException) else None
    except BaseException:  # one whose __class__ raises
        return None


def _start(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """A task with no context variables: those of whoever comes first are not for the others."""
    return asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())


async def _tame(run: Callable[[list[T]], Awaitable[Sequence[Any]]], items: list[T]) -> list[Any]:
    try:
        return list(await run(items))
    except (SystemExit, KeyboardInterrupt) as cause:  # which would end the loop, and all who are on it
        raise RuntimeError(f"{shown(cause)} was raised") from cause
