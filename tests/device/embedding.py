"""An engine that computes as an encoder does: batches of items on its own thread, in turns as long as it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lmbridge.device.turns import Party
from lmbridge.engines.base import Engine, Sink
from lmbridge.engines.batching import Batcher
from lmbridge.engines.thread import EngineThread
from lmbridge.messages import Apply, Request, Task


class Products(Engine):
    """Each item is a number of tokens, and as many rows go through the matrices of a small encoder.

    Args:
        width: of the matrices.
        device: as torch names it.
        pauses: let others go first between two layers, as long as which a turn may last then.
    """

    name = "products"
    tasks: frozenset[Task] = frozenset({"call"})

    def __init__(self, width: int = 256, device: str = "cpu", layers: int = 6, pauses: bool = True) -> None:
        self.max_batch_size = 64
        self.width, self.device, self._layers, self._pauses = width, device, layers, pauses
        self._thread = EngineThread("lmbridge products")
        self._pace = 0.0  # tokens a second; a moving average
        self._matrices: list[Any] = []

    async def start(self) -> None:
        self._batcher: Batcher[int] = Batcher(self._run, max_items=64, max_size=4096, cap=self._cap)
        await self._thread.run(self._load)

    def add_request(self, request: Request, sink: Sink) -> None:
        assert isinstance(request.job, Apply)
        self._batcher.add(request.id, request.job.item, sink, size=request.job.item)

    def abort_request(self, request_id: str) -> None:
        self._batcher.discard(request_id)

    async def close(self) -> None:
        self._batcher.close()
        self._thread.close()

    def _cap(self) -> int | None:
        share = self.party.share()
        parts = 2 * self._layers if self._pauses else 1
        return None if share is None else max(1, int(share * parts * self._pace))

    async def _run(self, items: list[int]) -> Sequence[Any]:
        return await self._thread.run(self._compute, items)

    def _load(self) -> None:
        import torch

        wide = 4 * self.width
        shapes = [(self.width, wide), (wide, self.width)] * self._layers
        self._matrices = [torch.randn(*shape, device=self.device) / shape[0] ** 0.5 for shape in shapes]

    def _compute(self, items: list[int]) -> list[int]:
        import torch

        with torch.inference_mode(), self.party.turn():
            began = time.perf_counter()
            rows = torch.ones(sum(items), self.width, device=self.device)
            waited = 0.0
            for number, matrix in enumerate(self._matrices):
                if number:
                    waited += self._pause()
                rows = torch.tanh(rows @ matrix)
            rows.sum().item()
            pace = sum(items) / (time.perf_counter() - began - waited)
        self._pace = pace if not self._pace else 0.8 * self._pace + 0.2 * pace
        return items

    def _pause(self) -> float:
        """Seconds that others have had."""
        return self.party.pause() if self._pauses and isinstance(self.party, Party) else 0.0
