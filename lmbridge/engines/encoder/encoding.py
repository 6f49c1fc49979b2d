"""From a text, or a query and a document, to token ids.

Rule: no torch is known here. After it is built nothing in a ``TextEncoder`` changes, so that the server thread
(``at_once``) and the worker thread (``encode``) may both be in it. Of a tokenizer's calls ``encode`` holds the GIL to
the end and ``encode_batch_fast`` gives it up, so that long texts take the second.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from lmbridge.engines.encoder.settings import Settings
from lmbridge.errors import InvalidRequestError, LMBridgeError, PromptTooLongError
from lmbridge.messages import Embed, Rerank

INLINE_CHARACTERS = 8_000
"""A text of up to this many characters (three for each where not all are ASCII) is tokenised at once; it takes a few
milliseconds."""
INLINE_IDS = 100_000
QUERIES = 64
"""So many queries are remembered, for they come with one document after another."""

Truncate = Literal["error", "end"]


@dataclass(frozen=True, slots=True)
class Item:
    """One text on its way through the model.

    Attributes:
        ids: its tokens, special ones included; none where the model takes texts.
        types: 0 for those of the first text and 1 for those of the second, where the model tells them apart.
        size: how much room it takes in a batch.
    """

    job: Embed | Rerank
    ids: list[int]
    types: list[int] | None
    size: int


class TextEncoder:
    """Makes items of jobs.

    Args:
        backend: a tokenizer of ``tokenizers``, which nobody else changes.
        vocabulary: how many rows the model's embeddings have.
        room: the most tokens of a text.
        takes_types: the model tells the tokens of the query from those of the document.
    """

    def __init__(self, backend: Any, vocabulary: int, room: int, settings: Settings, takes_types: bool) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._vocabulary = vocabulary
        self.room = room
        self._settings = settings
        self._takes_types = takes_types
        self._specials = backend.num_special_tokens_to_add(False)
        self._pair_specials = backend.num_special_tokens_to_add(True)
        self._query = functools.lru_cache(maxsize=QUERIES)(self._tokenize)

    def at_once(self, job: Embed | Rerank) -> Item | None:
        """``encode`` where that takes milliseconds; None where another thread should do it."""
        return self.encode(job) if _is_short(job) else None

    def encode(self, job: Embed | Rerank) -> Item:
        """The tokens of a job's text, or of its query and document.

        Raises:
            InvalidRequestError: there are none, or the model does not know them, or the text is no Unicode.
            PromptTooLongError: there are more than the model reads, and none may be cut off.
        """
        return self._embed(job) if isinstance(job, Embed) else self._pair(job)

    def made_up(self, job: Embed | Rerank, first: int, count: int) -> Item:
        """An item of any tokens, for a tokenizer that makes none of a text."""
        ids = [(first + place) % self._vocabulary for place in range(min(count, self.room))]
        types = [0] * len(ids) if isinstance(job, Rerank) and self._takes_types else None
        return Item(job, ids, types, len(ids))

    def prompted(self, job: Embed) -> str:
        """The text with its prompt before it."""
        assert isinstance(job.text, str)
        prompts, default = self._settings.prompts, self._settings.default_prompt
        prompt = prompts.get(default, "") if job.prompt is None and default is not None else ""
        if job.prompt is not None:
            prompt = prompts.get(job.prompt, job.prompt)
        return prompt + job.text

    def _embed(self, job: Embed) -> Item:
        if not isinstance(job.text, str):
            ids = self._given(job)
            if len(ids) > self.room:
                self._refuse_long(job.truncate, f"The text has {len(ids)} tokens", "texts")
                ids = ids[: self.room]
            return Item(job, ids, None, len(ids))
        encoding = self._tokenize(self.prompted(job), "texts")
        count = len(encoding) + self._specials
        if count > self.room:
            self._refuse_long(job.truncate, f"The text has {count} tokens", "texts")
            encoding.truncate(max(0, self.room - self._specials))
        ids = list(self._backend.post_process(encoding, None, True).ids)
        return Item(job, self._known(ids, "texts"), None, len(ids))

    def _pair(self, job: Rerank) -> Item:
        query = (self._query if len(job.query) <= INLINE_CHARACTERS else self._tokenize)(job.query, "query")
        document = self._tokenize(job.document, "documents")
        count = len(query) + len(document) + self._pair_specials
        left = self.room - len(query) - self._pair_specials
        if count > self.room:
            what = f"Query and document have {len(query)} and {len(document)} tokens"
            self._refuse_long(job.truncate, what, "documents")
            if left < 1:
                raise _too_long(f"{what}; the query alone leaves no room", self.room, "query", "")
            document.truncate(left)
        pair = self._backend.post_process(query, document, True)
        ids = self._known(list(pair.ids), "documents")
        return Item(job, ids, list(pair.type_ids) if self._takes_types else None, len(ids))

    def _tokenize(self, text: str, param: str) -> Any:
        """The tokens without special ones."""
        if self._settings.lowercase:
            text = text.lower()
        try:
            if len(text) <= INLINE_CHARACTERS:
                return self._backend.encode(text, add_special_tokens=False)
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        except (TypeError, UnicodeError) as cause:  # a text with halves of surrogate pairs
            raise InvalidRequestError(f"The text is not valid Unicode: {cause}", param) from cause
        except Exception as cause:  # tokenizers raises nothing more precise
            raise InvalidRequestError(f"The model's tokenizer refused the text: {cause}", param) from cause

    def _given(self, job: Embed) -> list[int]:
        if job.prompt:
            raise InvalidRequestError(
                "A prompt goes before a text, not before token ids; put its token ids before them, or give the text.",
                "prompt",
            )
        return self._known(list(job.text), "texts")  # type: ignore[arg-type]  # no string, for it was looked at before

    def _known(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise InvalidRequestError(
                "The text is empty: the tokenizer makes no token of it. Give it some text.", param
            )
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise InvalidRequestError(
                f"The model's token ids go from 0 to {self._vocabulary - 1}; got {min(ids)} to {max(ids)}.", param
            )
        return ids

    def _refuse_long(self, truncate: Truncate, what: str, param: str) -> None:
        if truncate == "error":
            raise _too_long(what, self.room, param, ", or give truncate='end' to have its end cut off")


def _too_long(what: str, room: int, param: str, advice: str) -> LMBridgeError:
    return PromptTooLongError(f"{what}, and the model reads {room}. Shorten it{advice}.", param=param)


def _is_short(job: Embed | Rerank) -> bool:
    if isinstance(job, Rerank):
        return _cost(job.query) + _cost(job.document) <= INLINE_CHARACTERS
    return _cost(job.text) <= INLINE_CHARACTERS if isinstance(job.text, str) else len(job.text) <= INLINE_IDS


def _cost(text: str) -> int:
    return len(text) if text.isascii() else 3 * len(text)
