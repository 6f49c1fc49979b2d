"""Batches texts to embed and documents to rerank into HTTP requests.

Rule: server thread only; numpy is imported inside. Each server works on one batch at a time, while the next gathers.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmbridge.engines.base import Sink
from lmbridge.engines.batching import Batcher
from lmbridge.engines.openai.asking import Question, texts_of
from lmbridge.engines.openai.flavours import Flavour
from lmbridge.errors import EngineError, InvalidRequestError, UnsupportedOptionError, fresh
from lmbridge.messages import Embed, Request, Rerank, Usage

Ask = Callable[[Question], Awaitable[Any]]
_NO_NUMBERS = "The server returned NaN or infinite numbers for this item."


@dataclass(eq=False, slots=True)
class _Item:
    """One job; ``usage`` is set when its batch is done, ``failed`` when a server failed on its batch."""

    job: Embed | Rerank
    usage: Usage = field(default_factory=Usage)
    failed: bool = False

    @property
    def text(self) -> Any:
        return self.job.text if isinstance(self.job, Embed) else self.job.document

    @property
    def alike(self) -> tuple[Any, ...]:
        """The key shared by items of one HTTP request."""
        job = self.job
        if isinstance(job, Rerank):
            return (job.query, job.truncate)
        return (isinstance(job.text, str), job.normalize, job.dimensions, job.prompt, job.truncate)


class Jobs:
    """Batches of jobs.

    Args:
        ask: sends a question to a server and returns its answer.
        lanes: how many batches run at once.
        most: items in a batch.
    """

    def __init__(self, ask: Ask, flavour: Flavour, lanes: int, most: int) -> None:
        self._ask = ask
        self._flavour = flavour
        self._batchers = [Batcher(self._run, max_items=most) for _ in range(lanes)]

    def __len__(self) -> int:
        return sum(map(len, self._batchers))

    def __contains__(self, request_id: str) -> bool:
        return any(request_id in batcher for batcher in self._batchers)

    @property
    def batches(self) -> int:
        return sum(batcher.batches for batcher in self._batchers)

    def add(self, request: Request, sink: Sink) -> None:
        """Queue a job.

        Raises:
            UnsupportedOptionError: these servers do not support it.
        """
        assert isinstance(request.job, (Embed, Rerank))
        item = _Item(request.job)
        if isinstance(item.job, Embed):
            self._check(item.job)
        batcher = min(self._batchers, key=len)
        batcher.add(request.id, item, sink, usage=item.usage, client=request.client)

    def discard(self, request_id: str) -> bool:
        """Drop a job; False if there is none with that id."""
        return any(batcher.discard(request_id) for batcher in self._batchers)

    def close(self) -> None:
        for batcher in self._batchers:
            batcher.close()

    def _check(self, job: Embed) -> None:
        given = {"normalize": not job.normalize, "prompt": job.prompt is not None}
        for name, differs in given.items():
            if differs and name not in self._flavour.embeds:
                hint = "put it into the text" if name == "prompt" else "leave it out"
                raise UnsupportedOptionError(f"{name} is not supported by these servers; {hint}.", param=name)
        if job.truncate == "end" and not self._flavour.truncates:
            raise UnsupportedOptionError("truncate is not supported by these servers; shorten the text.", "truncate")

    async def _run(self, items: list[_Item]) -> Sequence[Any]:
        """Run one batch: one HTTP request per kind of items."""
        kinds: dict[tuple[Any, ...], list[_Item]] = {}
        for item in items:
            kinds.setdefault(item.alike, []).append(item)
        done = await asyncio.gather(*(self._send(alike) for alike in kinds.values()), return_exceptions=True)
        results: dict[_Item, Any] = {}
        for alike, outcome in zip(kinds.values(), done, strict=True):
            if isinstance(outcome, BaseException):
                if _is_of_one(outcome, alike):
                    raise outcome  # the batch is then split, down to the items that fail alone
                outcome = [fresh(outcome) for _ in alike]
            results.update(zip(alike, outcome, strict=True))
        return [results[item] for item in items]

    async def _send(self, items: list[_Item]) -> Sequence[Any]:
        job = items[0].job
        embeds = isinstance(job, Embed)
        answer = await self._ask(self._embeddings(job, items) if isinstance(job, Embed) else self._ranking(job, items))
        try:
            found = answer["data"] if embeds else answer["results"]
            told = {int(each["index"]): each["embedding" if embeds else "relevance_score"] for each in found}
            results = [told[place] for place in range(len(items))]
            results = [_vector(each, job.normalize) if isinstance(job, Embed) else _score(each) for each in results]
            _share(int((answer.get("usage") or {}).get("prompt_tokens") or 0), items)
        except Exception as cause:
            raise EngineError(f"The server's answer to {len(items)} items cannot be read.") from cause
        return results

    def _embeddings(self, job: Embed, items: list[_Item]) -> Question:
        body: dict[str, Any] = {"input": texts_of([item.text for item in items]), "encoding_format": "base64"}
        if job.dimensions is not None:
            body["dimensions"] = job.dimensions
        own = {"normalize": job.normalize, "prompt": job.prompt}
        body |= {name: value for name, value in own.items() if name in self._flavour.embeds and value is not None}
        return Question("/embeddings", {**body, **(self._flavour.truncates if job.truncate == "end" else {})})

    def _ranking(self, job: Rerank, items: list[_Item]) -> Question:
        body: dict[str, Any] = {"query": job.query, "documents": [item.text for item in items]}
        if job.truncate == "end":
            body |= dict(self._flavour.truncates)
        elif "truncate" in self._flavour.truncates:
            body["truncate"] = "error"
        return Question("/rerank", body)


def _is_of_one(error: BaseException, items: list[_Item]) -> bool:
    """Whether halves may succeed: a refusal is one item's fault, and a server crash may be.

    If the server itself is failing, retrying halves would only ask twice for each text.
    """
    status = getattr(error.__cause__, "status_code", None)
    if status == 500 and not any(item.failed for item in items):
        for item in items:
            item.failed = True
        return True
    return not isinstance(error, Exception) or (isinstance(error, InvalidRequestError) and status != 404)


def _score(told: Any) -> Any:
    score = float(told)
    return score if math.isfinite(score) else EngineError(_NO_NUMBERS)


def _vector(told: Any, normalize: bool) -> Any:
    """A float32 vector, normalised if requested; servers without base64 send numbers."""
    import numpy as np

    known = isinstance(told, str)
    vector = np.frombuffer(base64.b64decode(told), "<f4") if known else np.asarray(told, np.float32)
    if vector.ndim != 1 or not vector.size:
        raise ValueError("it is not a vector")
    if not np.isfinite(vector).all():
        return EngineError(_NO_NUMBERS)
    length = float(np.linalg.norm(vector)) if normalize else 1.0
    return vector.astype(np.float32) if length in (0.0, 1.0) else (vector / length).astype(np.float32)


def _share(tokens: int, items: list[_Item]) -> None:
    """Split a request's token count among its items by length, preserving the sum."""
    left, lengths = tokens, [max(1, len(item.text)) for item in items]
    whole = sum(lengths)
    for item, length in zip(items, lengths, strict=True):
        item.usage.prompt_tokens = left * length // whole
        left, whole = left - item.usage.prompt_tokens, whole - length
