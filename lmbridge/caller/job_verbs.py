"""The verbs that generate no text: embed, rerank, call and map, as blocking calls, futures and coroutines.

Rule: signatures and documentation only; the neighbouring modules do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, overload

from lmbridge.caller.account import Account
from lmbridge.caller.answer import answer
from lmbridge.caller.async_streams import AsyncStream
from lmbridge.caller.batch import Batch, Result, progress_bar
from lmbridge.caller.gathered import Gathered
from lmbridge.caller.jobs import (
    EmbedOptions,
    JobOptions,
    RerankOptions,
    checked_list,
    checked_top,
    document_list,
    embed_maker,
    is_list_of_texts,
    make_job,
    make_jobs,
    rerank_maker,
)
from lmbridge.caller.shapes import all_looked_at, looked_at, matrix, ranking, values
from lmbridge.messages import Apply, Embed, Job, Ranked, Rerank, Response

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lmbridge.caller.shapes import Vectors

Texts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


class JobVerbs:
    """embed, rerank, call and map for threads; aembed, arerank, acall and amap for other event loops."""

    def _account(self) -> Account:
        """The account of a thread's call."""
        raise NotImplementedError

    def _task_account(self) -> Account:
        """The account of a task's call."""
        return self._account()

    # --- vectors ---

    @overload
    def embed(self, texts: Texts, *, progress: bool = False, **options: Unpack[EmbedOptions]) -> Vectors: ...

    @overload
    def embed(
        self,
        texts: Texts,
        *,
        return_exceptions: bool = False,
        details: bool = False,
        progress: bool = False,
        **options: Unpack[EmbedOptions],
    ) -> Any: ...

    def embed(
        self,
        texts: Any,
        *,
        return_exceptions: bool = False,
        details: bool = False,
        progress: bool = False,
        **options: Unpack[EmbedOptions],
    ) -> Any:
        """Embed a text, or each text of a list; blocks until all are done.

        Args:
            texts: a string (or token ids), or a list of those.
            return_exceptions: return a list with a vector or an error per text, instead of raising the first error.
            details: return Responses, with usage and timings; the vector is their ``value``.
            progress: show a progress bar.
            options: see ``EmbedOptions`` and ``JobOptions``.

        Returns:
            float32, of shape ``(dim,)`` for one text and ``(n, dim)`` for a list; ``(0, 0)`` for an empty one.

        Raises:
            InvalidRequestError: an argument is invalid.
            UnsupportedTaskError: the engine does not embed.
            LMBridgeError: as ``infer``; for a list, the first error, with its position as ``index``.
        """
        make, account = embed_maker(options), self._account()
        if not is_list_of_texts(texts):
            response = looked_at(Embed, answer(account, make_job(account, make(texts), options)))
            return response if details else response.value
        results = _run(account, Embed, checked_list(texts, "texts"), make, options, return_exceptions, progress)
        return results if details else values(results) if return_exceptions else matrix(results)

    def submit_embed(self, texts: Texts, **options: Unpack[EmbedOptions]) -> Gathered[Vectors]:
        """``embed`` as a future. Submitting a long list blocks until there is room for its last text."""
        make, account = embed_maker(options), self._account()
        if not is_list_of_texts(texts):
            return Gathered(account, Embed, [make_job(account, make(texts), options)], _only, self)
        requests = make_jobs(account, Embed, checked_list(texts, "texts"), make, options, False)
        return Gathered(account, Embed, requests, matrix, self)

    @overload
    async def aembed(self, texts: Texts, **options: Unpack[EmbedOptions]) -> Vectors: ...

    @overload
    async def aembed(
        self, texts: Texts, *, return_exceptions: bool = False, details: bool = False, **options: Unpack[EmbedOptions]
    ) -> Any: ...

    async def aembed(
        self, texts: Any, *, return_exceptions: bool = False, details: bool = False, **options: Unpack[EmbedOptions]
    ) -> Any:
        """``embed`` for a task on another event loop; cancelling the task aborts it."""
        make, account = embed_maker(options), self._task_account()
        if not is_list_of_texts(texts):
            response = looked_at(Embed, await self._whole(account, make(texts), options))
            return response if details else response.value
        results = await _run_async(account, Embed, checked_list(texts, "texts"), make, options, return_exceptions)
        return results if details else values(results) if return_exceptions else matrix(results)

    # --- relevance ---

    @overload
    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, **options: Unpack[RerankOptions]
    ) -> list[Ranked]: ...

    @overload
    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        details: bool = False,
        **options: Unpack[RerankOptions],
    ) -> Any: ...

    def rerank(
        self,
        query: str,
        documents: Any,
        *,
        top_n: int | None = None,
        details: bool = False,
        **options: Unpack[RerankOptions],
    ) -> Any:
        """Rank documents by relevance to a query; blocks until all are scored.

        Args:
            documents: strings.
            top_n: return only this many of the best; None returns all.
            details: return Responses in the order of the documents, with usage; the score is their ``value``.
            options: see ``RerankOptions`` and ``JobOptions``.

        Returns:
            the most relevant first; equal scores keep the order of the list.

        Raises:
            LMBridgeError: as ``embed`` does.
        """
        make, account, top = rerank_maker(query, options), self._account(), checked_top(top_n)
        texts = document_list(documents)
        results = _run(account, Rerank, texts, make, options)
        return results if details else ranking(results, texts, top)

    def submit_rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, **options: Unpack[RerankOptions]
    ) -> Gathered[list[Ranked]]:
        """``rerank`` as a future. Submitting a long list blocks until there is room for its last document."""
        make, account, top = rerank_maker(query, options), self._account(), checked_top(top_n)
        texts = document_list(documents)
        requests = make_jobs(account, Rerank, texts, make, options, False)
        return Gathered(account, Rerank, requests, lambda results: ranking(results, texts, top), self)

    @overload
    async def arerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, **options: Unpack[RerankOptions]
    ) -> list[Ranked]: ...

    @overload
    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        details: bool = False,
        **options: Unpack[RerankOptions],
    ) -> Any: ...

    async def arerank(
        self,
        query: str,
        documents: Any,
        *,
        top_n: int | None = None,
        details: bool = False,
        **options: Unpack[RerankOptions],
    ) -> Any:
        """``rerank`` for a task on another event loop; cancelling the task aborts it."""
        make, account, top = rerank_maker(query, options), self._task_account(), checked_top(top_n)
        texts = document_list(documents)
        results = await _run_async(account, Rerank, texts, make, options)
        return results if details else ranking(results, texts, top)

    # --- any function ---

    def call(self, item: Any, **options: Unpack[JobOptions]) -> Any:
        """Apply the engine's function to one item, batched with other callers' items; blocks for the result.

        Raises:
            EngineError: the function failed; its error is chained. LMBridgeError: as ``infer``.
        """
        account = self._account()
        return answer(account, make_job(account, Apply(item), options)).value

    def map(
        self,
        items: Collection[Any],
        *,
        return_exceptions: bool = False,
        progress: bool = False,
        **options: Unpack[JobOptions],
    ) -> list[Any]:
        """``call`` for each item of a list, in its order.

        Args:
            return_exceptions: put errors into their slots instead of raising the first.
            progress: show a progress bar.
        """
        listed = checked_list(items, "items")
        return values(_run(self._account(), Apply, listed, Apply, options, return_exceptions, progress))

    def submit_call(self, item: Any, **options: Unpack[JobOptions]) -> Gathered[Any]:
        """``call`` as a future."""
        account = self._account()
        return Gathered(account, Apply, [make_job(account, Apply(item), options)], _only, self)

    async def acall(self, item: Any, **options: Unpack[JobOptions]) -> Any:
        """``call`` for a task on another event loop; cancelling the task aborts it."""
        return (await self._whole(self._task_account(), Apply(item), options)).value

    async def amap(
        self, items: Collection[Any], *, return_exceptions: bool = False, **options: Unpack[JobOptions]
    ) -> list[Any]:
        """``map`` for a task on another event loop; cancelling the task aborts it."""
        listed = checked_list(items, "items")
        return values(await _run_async(self._task_account(), Apply, listed, Apply, options, return_exceptions))

    async def _whole(self, account: Account, job: Job, options: JobOptions) -> Response:
        return await AsyncStream(account, make_job(account, job, options), self, streaming=False).whole()


def _run(
    account: Account,
    kind: type[Job],
    things: Sequence[Any],
    make: Callable[[Any], Job],
    options: JobOptions,
    keep: bool = False,
    progress: bool = False,
) -> list[Result]:
    requests = make_jobs(account, kind, things, make, options, keep)
    with progress_bar(len(requests), progress, kind.noun.lower()) as advance:
        return all_looked_at(kind, Batch(account, keep, advance, kind.noun).run(requests), keep)


async def _run_async(
    account: Account,
    kind: type[Job],
    things: Sequence[Any],
    make: Callable[[Any], Job],
    options: JobOptions,
    keep: bool = False,
) -> list[Result]:
    requests = make_jobs(account, kind, things, make, options, keep)
    return all_looked_at(kind, await Batch(account, keep, noun=kind.noun).run_async(requests), keep)


def _only(results: Sequence[Result]) -> Any:
    return values(results)[0]
