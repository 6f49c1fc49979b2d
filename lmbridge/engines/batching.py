"""Dynamic batching: items waiting when the model is free run together; a failed batch is split.

Rule: server thread only; ``run`` decides where batches run. Nothing polls and nothing idles:
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
    """Hands items to ``run`` in batches, in order of arrival; clients with several items take turns.

    Args:
        run: takes a list of items and returns one result for each, which may be an exception.
        max_items: the most items in a batch.
        max_size: the largest total size of a batch, in tokens say; a larger item runs alone.
        wait: seconds for which a batch that is not full waits for more items.
        cap: called before each batch: a temporary limit below ``max_size``.

    Attributes:
        batches, items, size: how many were run so far, and their total size.
        max_size: halved when a batch does not fit into memory.
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
        self._waiting: OrderedDict[str, _Entry[T]] = OrderedDict()  # by request id, like the next
        self._running: dict[str, _Entry[T]] = {}
        self._served: dict[str, int] = {}  # the last batch that a waiting client took part in
        self._failed_alone = False  # some item of the running batch did
        self._work: asyncio.Task[None] | None = None  # set while there is work
        self._batch: asyncio.Task[list[Any]] | None = None  # set while one runs
        self._more = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._running

    def add(self, key: str, item: T, sink: Sink, size: int = 1, usage: Usage | None = None, client: str = "") -> None:
        """Run an item with the next batch; ``sink`` gets its result.

        Args:
            size: what it counts against ``max_size``.
            usage: returned with its result.
            client: whose turn it takes.
        """
        self._waiting[key] = _Entry(key, item, size, usage, client, sink)
        self._more.set()
        if self._work is None:
            self._work = _start(self._serve(), "lmbridge batches")

    def discard(self, key: str) -> bool:
        """Drop an item, whose sink gets an abort; False if there is none with that key.

        A running item continues with its batch; a batch with no items left is cancelled.
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
                await asyncio.sleep(0)  # lets the server fill the freed places before the next batch
        except Exception as cause:  # a bug here must leave nobody waiting
            logger.exception("A batch was lost to an internal error.")
            for entry in list(self._running.values()):
                self._tell(entry, cause)
        finally:
            self._work = None
        if self._waiting:
            self._work = _start(self._serve(), "lmbridge batches")

    async def _gather(self) -> None:
        """Wait up to ``wait`` seconds for more items while the batch is not full."""
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
        """Waiting items: each client's first, then each one's second, and so on; last-served clients last."""
        ranks: Counter[str] = Counter()
        ranked: list[tuple[int, _Entry[T]]] = []
        for entry in self._waiting.values():
            ranked.append((ranks[entry.client], entry))
            ranks[entry.client] += 1
        return [entry for _, entry in sorted(ranked, key=lambda pair: (pair[0], self._served.get(pair[1].client, 0)))]

    async def _attempt(self, batch: list[_Entry[T]]) -> None:
        """Run a batch; if it fails, run its halves, until only items that fail alone have failed."""
        batch = [entry for entry in batch if entry.key in self._running]  # the others were aborted meanwhile
        if not batch:
            return
        if len(batch) > 1 and self.max_size is not None and sum(entry.size for entry in batch) > self.max_size:
            await self._halve(batch)  # we have learned that it would not fit into memory
            return
        try:
            results = await self._work_on([entry.item for entry in batch])
        except LMBridgeError as error:
            await self._take_apart(batch, error)
        except Exception as cause:
            await self._take_apart(batch, cause)
            if is_out_of_memory(cause) and not self._failed_alone:  # the batch was too large
                self._shrink(batch)
        else:
            self._count(batch)
            if len(results) != len(batch):
                wrong = EngineError(f"The function returned {len(results)} results for {len(batch)} items.")
                results = [wrong] * len(batch)
            for entry, result in zip(batch, results, strict=True):
                self._tell(entry, result)

    async def _work_on(self, items: list[T]) -> list[Any]:
        """Run a batch in a separate task, which ``run`` may cancel or try to end the loop from.

        Raises:
            Exception: whatever ``run`` raised.
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
        """Lower the size limit."""
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
    """A task without context variables: one caller's must not leak to the others."""
    return asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())


async def _tame(run: Callable[[list[T]], Awaitable[Sequence[Any]]], items: list[T]) -> list[Any]:
    try:
        return list(await run(items))
    except (SystemExit, KeyboardInterrupt) as cause:  # which would end the loop for everyone
        raise RuntimeError(f"{shown(cause)} was raised") from cause
