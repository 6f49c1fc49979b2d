"""From a text, or a query and a document, to token ids.

Rule: no torch is known here. A ``TextEncoder`` is immutable once built, so the server thread (``at_once``) and the
worker thread (``encode``) may use it together. Of a tokenizer's calls, ``encode`` holds the GIL throughout and
``encode_batch`` releases it, so long texts use the latter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from lmbridge.engines.encoder.prompts import Prompts
from lmbridge.engines.encoder.settings import Settings
from lmbridge.errors import InvalidRequestError, LMBridgeError, PromptTooLongError
from lmbridge.messages import Embed, Rerank, Task

INLINE_CHARACTERS = 8_000
"""A text of up to this many characters (three each if not all are ASCII) is tokenised at once, in a few
milliseconds."""
INLINE_IDS = 100_000
CHARACTERS = 16
"""Of a longer text, this many characters per token of the model's limit are tokenised first, and twice as many if that
is too few. So millions of characters take no longer than a text of the full length."""
MARGIN = 64
"""Characters before the cut of such a beginning: they may merge with what follows into one token."""
QUERIES = 64
"""This many queries are cached, since each comes with one document after another."""

Truncate = Literal["error", "end"]


@dataclass(frozen=True, slots=True)
class Item:
    """One text, tokenised for the model.

    Attributes:
        ids: its tokens, special ones included; empty if the model takes strings.
        types: 0 for those of the first text and 1 for those of the second, if the model distinguishes them.
        size: how much room it takes in a batch.
    """

    job: Embed | Rerank
    ids: list[int]
    types: list[int] | None
    size: int


class TextEncoder:
    """Turns jobs into items.

    Args:
        backend: a tokenizer of ``tokenizers``, which nothing else modifies.
        vocabulary: how many rows the model's embeddings have.
        room: the most tokens of a text.
        takes_types: the model distinguishes the query's tokens from the document's.
    """

    def __init__(self, backend: Any, vocabulary: int, room: int, settings: Settings, takes_types: bool) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._vocabulary = vocabulary
        self.room = room
        self._settings = settings
        self._takes_types = takes_types
        self._prompts = Prompts(settings.prompts, settings.default_prompt)
        self._specials: int = backend.num_special_tokens_to_add(False)
        self._pair_specials: int = backend.num_special_tokens_to_add(True)
        self._query = functools.lru_cache(maxsize=QUERIES)(self._tokens)

    def least(self, task: Task) -> int:
        """The fewest tokens of a text with at least one of its own; a pair has one of each text."""
        return self._specials + 1 if task == "embed" else self._pair_specials + 2

    def at_once(self, job: Embed | Rerank) -> Item | None:
        """``encode`` if that takes only milliseconds; None if another thread should do it."""
        return self.encode(job) if _is_short(job) else None

    def encode(self, job: Embed | Rerank) -> Item:
        """The tokens of a job's text, or of its query and document.

        Raises:
            InvalidRequestError: there are none, the model does not know them, or the text is not valid Unicode.
            PromptTooLongError: there are too many, and the text may not be cut.
        """
        return self._embed(job) if isinstance(job, Embed) else self._pair(job)

    def made_up(self, job: Embed | Rerank, first: int, count: int) -> Item:
        """An item of arbitrary tokens, for a tokenizer that produces none."""
        ids = [(first + place) % self._vocabulary for place in range(min(count, self.room))]
        types = [0] * len(ids) if isinstance(job, Rerank) and self._takes_types else None
        return Item(job, ids, types, len(ids))

    def prompted(self, job: Embed) -> str:
        """The text with its prompt prefixed."""
        assert isinstance(job.text, str)
        return self._prompts.before(job.prompt) + job.text

    def _embed(self, job: Embed) -> Item:
        if not isinstance(job.text, str):
            ids = self._given(job)
            if len(ids) > self.room:
                self._refuse_long(job.truncate, f"The text has {len(ids)} tokens", "texts")
                ids = ids[: self.room]
            return Item(job, ids, None, len(ids))
        found = self._tokens(self.prompted(job), "texts")
        left = self.room - self._specials
        if found.count > left:
            self._refuse_long(job.truncate, f"The text has {found.said(self._specials)} tokens", "texts")
            found.encoding.truncate(left)
        ids = list(self._backend.post_process(found.encoding, None, True).ids)
        return Item(job, self._known(ids, "texts"), None, len(ids))

    def _pair(self, job: Rerank) -> Item:
        remembered = len(job.query) <= INLINE_CHARACTERS
        query = self._query(job.query, "query") if remembered else self._tokens(job.query, "query")
        document = self._tokens(job.document, "documents")
        left = self.room - self._pair_specials
        if query.count + document.count > left:
            if job.truncate == "error":
                raise self._too_long_a_pair(query, document)
            ends = shares(query.count, document.count, left)
            if ends[0] < query.count:
                query = self._tokens(job.query, "query")  # not the cached one
                query.encoding.truncate(ends[0])
            document.encoding.truncate(ends[1])
        pair = self._backend.post_process(query.encoding, document.encoding, True)
        ids = self._known(list(pair.ids), "documents")
        return Item(job, ids, list(pair.type_ids) if self._takes_types else None, len(ids))

    def _tokens(self, text: str, param: str) -> _Tokens:
        """The tokens without special ones; for a text that is too long, at least those of its beginning."""
        length = max(INLINE_CHARACTERS, CHARACTERS * self.room)
        while length < len(text):
            beginning = self._lowered(text[:length])
            encoding = self._tokenize(beginning, param)
            if len(encoding) > self.room and encoding.token_to_chars(self.room)[1] <= _certain(beginning):
                return _Tokens(encoding, self.room + 1, False)
            length *= 2
        encoding = self._tokenize(self._lowered(text), param)
        return _Tokens(encoding, len(encoding), True)

    def _lowered(self, text: str) -> str:
        return text.lower() if self._settings.lowercase else text

    def _tokenize(self, text: str, param: str) -> Any:
        try:
            if len(text) <= INLINE_CHARACTERS:
                return self._backend.encode(text, add_special_tokens=False)
            return self._backend.encode_batch([text], add_special_tokens=False)[0]
        except (TypeError, UnicodeError) as cause:  # unpaired surrogates
            raise InvalidRequestError(f"The text is not valid Unicode: {cause}", param) from cause
        except Exception as cause:  # tokenizers raises nothing more precise
            raise InvalidRequestError(f"The model's tokenizer refused the text: {cause}", param) from cause

    def _given(self, job: Embed) -> list[int]:
        if job.prompt:
            raise InvalidRequestError(
                "A prompt can only be put before a string; put its token ids before yours, or give the text.",
                "prompt",
            )
        return self._known(list(job.text), "texts")  # type: ignore[arg-type]  # no string, for it was looked at before

    def _known(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise InvalidRequestError("The text is empty: the tokenizer produces no token. Add some text.", param)
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise InvalidRequestError(
                f"The model's token ids range from 0 to {self._vocabulary - 1}; got {min(ids)} to {max(ids)}.", param
            )
        return ids

    def _refuse_long(self, truncate: Truncate, what: str, param: str) -> None:
        if truncate == "error":
            raise _too_long(what, self.room, param, "Shorten it, or use truncate='end' to cut off its end.")

    def _too_long_a_pair(self, query: _Tokens, document: _Tokens) -> LMBridgeError:
        what = f"Query and document have {query.said()} and {document.said()} tokens"
        if query.count + self._pair_specials >= self.room:
            advice = "The query alone is too long: shorten it, or use truncate='end' to cut the longer one."
            return _too_long(what, self.room, "query", advice)
        return _too_long(what, self.room, "documents", "Shorten the document, or use truncate='end' to cut it.")


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a text.

    Attributes:
        count: how many there are; at most one more than the model reads.
        whole: they are those of the whole text.
    """

    encoding: Any
    count: int
    whole: bool

    def said(self, specials: int = 0) -> str:
        """The count, as text."""
        return str(self.count + specials) if self.whole else f"more than {self.count - 1}"


def shares(query: int, document: int, left: int) -> tuple[int, int]:
    """How many tokens of each text of a pair are kept if there is room for ``left``: tokenizers' "longest_first", as a
    CrossEncoder cuts: the longer one, or both if each has more than half.
    """
    if query + document <= left:
        return query, document
    half = left // 2
    if min(query, document) <= half:
        return (query, left - query) if query <= document else (left - document, document)
    return (half, left - half) if query <= document else (left - half, half)


def _certain(beginning: str) -> int:
    """Up to which character the tokens of a text's beginning are final: excluding the last word, which may go on; in a
    script without blanks, the first half.
    """
    half = len(beginning) // 2
    blank = beginning.rfind(" ", half, len(beginning) - MARGIN)
    return half if blank < 0 else blank


def _too_long(what: str, room: int, param: str, advice: str) -> LMBridgeError:
    return PromptTooLongError(f"{what}; the model reads at most {room}. {advice}", param=param)


def _is_short(job: Embed | Rerank) -> bool:
    if isinstance(job, Embed) and not isinstance(job.text, str):
        return len(job.text) <= INLINE_IDS
    return cost(job) <= INLINE_CHARACTERS


def cost(job: Embed | Rerank) -> int:
    """The amount of text to tokenise, in ASCII characters."""
    if isinstance(job, Rerank):
        return _cost(job.query) + _cost(job.document)
    return _cost(job.text) if isinstance(job.text, str) else 0


def _cost(text: str) -> int:
    return len(text) if text.isascii() else 3 * len(text)
