"""Makes requests from texts, pairs and items; validates everything before sending anything.

Rule: pure functions on the caller's thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from lmbridge.caller.account import Account
from lmbridge.caller.options import CallOptions
from lmbridge.caller.prompts import is_batch
from lmbridge.caller.requests import make_request, new_id
from lmbridge.errors import InvalidRequestError, LMBridgeError
from lmbridge.log import shown
from lmbridge.messages import Embed, Job, Request, Rerank
from lmbridge.values import as_flag, as_int, as_list, as_rows

_OPTIONS = ("timeout", "client", "priority", "request_id")


class JobOptions(TypedDict, total=False):
    """The keyword arguments of embed, rerank, call and map, in addition to their own.

    timeout: seconds for loading, queueing and the work together; None waits forever; default: the bridge's.
    client: the account whose turn is used, to group threads (default: this client, thread or task).
    priority: higher goes first; it rises while the request waits.
    request_id: your own id for ``bridge.abort`` and the logs; a list appends ``-0``, ``-1`` …
    """

    timeout: float | None
    client: str
    priority: int
    request_id: str


class EmbedOptions(JobOptions, total=False):
    """The keyword arguments of embed, in addition to those of every job.

    normalize: scale vectors to length 1, so that dot products are cosine similarities (default: True).
    dimensions: keep this many leading numbers, for models trained for it; None keeps all.
    prompt: put before each text: the name of one of the model's own prompts (such as "query"), or a string.
    truncate: ``"end"`` cuts texts that are too long for the model, ``"error"`` (the default) refuses them.
    """

    normalize: bool
    dimensions: int | None
    prompt: str | None
    truncate: Literal["error", "end"]


class RerankOptions(JobOptions, total=False):
    """The keyword arguments of rerank, in addition to those of every job.

    truncate: ``"end"`` (the default) cuts documents that are too long for the model, ``"error"`` refuses them.
    """

    truncate: Literal["error", "end"]


def make_job(account: Account, job: Job, options: JobOptions) -> Request:
    """The request for one job.

    Raises:
        InvalidRequestError: an option is invalid; the error names it, and nothing was sent.
    """
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise InvalidRequestError(f"{job.task} has no option {name!r} here; its options are {known}.", name)
    taken: CallOptions = {**options}  # type: ignore[typeddict-item]  # a part of them
    request = make_request(account, "-", None, taken)
    request.prompt, request.job = "", job
    return request


def make_jobs(
    account: Account,
    kind: type[Job],
    things: Sequence[Any],
    make: Callable[[Any], Job],
    options: JobOptions,
    keep: bool,
) -> list[Request | LMBridgeError]:
    """The requests for a list of jobs, which share one deadline.

    Args:
        make: builds the job for one of ``things``; raises InvalidRequestError for an invalid one.
        keep: put the error of an invalid one into its slot instead of raising the first.

    Raises:
        InvalidRequestError: a shared option is invalid, or one of them is, with its position as ``index``.
    """
    made: list[Request | LMBridgeError] = []
    first: Request | None = None
    for index, thing in enumerate(things):
        try:
            job = make(thing)
        except LMBridgeError as error:
            error.index, error.listed = index, kind.noun
            if not keep:
                raise
            made.append(error)
            continue
        first = first or make_job(account, job, options)  # checks the options, which all jobs share
        own = f"{first.id}-{index}" if "request_id" in options else new_id()
        made.append(dataclasses.replace(first, id=own, job=job, context=first.context.copy()))
    return made


def embed_maker(options: EmbedOptions) -> Callable[[Any], Embed]:
    """A function that makes the job for a text. Takes embed's own options out of ``options``, validated.

    Raises:
        InvalidRequestError: an option is invalid.
    """
    normalize, dimensions = options.pop("normalize", True), options.pop("dimensions", None)
    prompt = options.pop("prompt", None)
    flag = as_flag(normalize)
    if flag is None:
        raise InvalidRequestError(f"normalize must be True or False, not {shown(normalize)}.", "normalize")
    size = None if dimensions is None else as_int(dimensions)
    if dimensions is not None and (size is None or size < 1):
        raise InvalidRequestError(f"dimensions must be an int >= 1 or None, not {shown(dimensions)}.", "dimensions")
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidRequestError(f"prompt must be a string or None, not {shown(prompt)}.", "prompt")
    end = _checked_truncate(options.pop("truncate", "error"))
    before = None if prompt is None else str.__str__(prompt)
    return lambda text: Embed(_checked_text(text), flag, size, before, end)


def rerank_maker(query: Any, options: RerankOptions) -> Callable[[Any], Rerank]:
    """A function that makes the job for a document; raises as ``embed_maker`` does."""
    if not isinstance(query, str):
        raise InvalidRequestError(f"The query must be a string, not {shown(query)}.", "query")
    plain, end = str.__str__(query), _checked_truncate(options.pop("truncate", "end"))
    return lambda document: Rerank(plain, _checked_document(document), end)


def is_list_of_texts(texts: object) -> bool:
    """Whether ``texts`` is a list of texts rather than one text, which may be token ids.

    Raises:
        InvalidRequestError: it is neither.
    """
    if isinstance(texts, str):
        return False
    items = as_list(texts)
    if items is None:
        raise InvalidRequestError(
            f"A text is a string or a list of token ids; several are a list of those. Got {shown(texts)}.", "texts"
        )
    return is_batch(items)


def checked_list(things: Any, name: str) -> Sequence[Any]:
    """A list of anything; an array with more dimensions gives its rows.

    Raises:
        InvalidRequestError: it is not a list; strings are not.
    """
    items = as_rows(things)
    if items is None:
        raise InvalidRequestError(f"{name} must be a list, not {shown(things)}.", name)
    return items


def document_list(documents: Any) -> list[Any]:
    """A new list of the documents' texts; invalid documents stay, for the maker to refuse.

    Raises:
        InvalidRequestError: it is not a list.
    """
    return [_text_of(document) for document in checked_list(documents, "documents")]


def checked_top(top_n: Any) -> int | None:
    """How many of the best to return; None for all.

    Raises:
        InvalidRequestError: it is not a valid number.
    """
    top = None if top_n is None else as_int(top_n)
    if top_n is not None and (top is None or top < 1):
        raise InvalidRequestError(f"top_n must be an int >= 1 or None, not {shown(top_n)}.", "top_n")
    return top


def _checked_truncate(truncate: Any) -> Literal["error", "end"]:
    if truncate == "error":
        return "error"
    if truncate == "end":
        return "end"
    raise InvalidRequestError(f"truncate must be 'error' or 'end', not {shown(truncate)}.", "truncate")


def _checked_text(text: Any) -> str | list[int]:
    if isinstance(text, str):
        return str.__str__(text)
    items = as_list(text)
    tokens = None if items is None else [as_int(token) for token in items]
    if not tokens or any(token is None or token < 0 for token in tokens):
        raise InvalidRequestError(f"A text is a string, or a list of token ids >= 0; got {shown(text)}.", "texts")
    return [token for token in tokens if token is not None]


def _checked_document(document: Any) -> str:
    if not isinstance(document, str):
        raise InvalidRequestError(f"A document is a string; got {shown(document)}.", "documents")
    return document


def _text_of(document: Any) -> Any:
    """The ``text`` of a mapping, as other libraries give documents; anything else unchanged."""
    text = document.get("text") if isinstance(document, Mapping) else document
    return str.__str__(text) if isinstance(text, str) else document
