"""Grammars that answers have to follow: which tokens may come next.

Rule: ``Grammars.guide`` on the worker thread, ``Guides`` on the generation thread. Which tokens may follow the ones
that a step has chosen is worked out on a thread of its own, while the model runs the next step.

llguidance knows the grammars and the model's tokens; nothing here looks into either.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from lmbridge.engines.base import engine_error
from lmbridge.errors import InvalidRequestError, MissingDependencyError
from lmbridge.grammar import Grammar
from lmbridge.log import logger

PATIENCE = 30.0
"""Seconds after which a mask that does not come is taken for one that never will."""
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As ``json.dumps`` writes: a model that may put spaces anywhere may go on putting them."""


class Guide:
    """What holds one answer to its grammar.

    Attributes:
        matcher: llguidance's; it is told of tokens and asked for masks by one thread at a time.
        words: a bit for each token that may come next. Not to be read before ``ready``.
        failure: why it can go on no more; None while it can.
    """

    def __init__(self, matcher: Any, home: Grammars) -> None:
        self.matcher = matcher
        self.home = home
        self.words: Any = None
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def fail(self, cause: object) -> None:
        """It cannot be followed on; whoever waits for it need not."""
        error = cause if isinstance(cause, BaseException) else RuntimeError(str(cause))
        self.failure = engine_error(f"The grammar of this request cannot be followed on: {cause}", error)
        self.ready.set()


class Grammars:
    """The grammars that one model's answers may follow.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: of the model's vocabulary, which may be larger than the tokenizer's.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, size: int, ends: frozenset[int]) -> None:
        self.size = size
        self._tokenizer, self._ends = tokenizer, ends
        self._tokens: Any = None  # made when first wanted, as is the next: it takes a second where there are many
        self._executor: Any = None
        self._last: Any = None  # the words of an answer that can only end
        self._worker = _Worker()

    def guide(self, grammar: Grammar) -> Guide:
        """What holds one answer to the grammar.

        Raises:
            InvalidRequestError: it is no grammar, or none that can be followed.
            MissingDependencyError: llguidance is not installed.
        """
        llguidance = _library()
        if self._tokens is None:
            self._prepare(llguidance)
        try:
            text = _WRITTEN[grammar.kind](llguidance.LLMatcher, grammar.value)
            matcher = llguidance.LLMatcher(self._tokens, text, log_level=0)
            error = matcher.get_error() if matcher.is_error() else ""
        except Exception as cause:
            error = str(cause)
        if error:
            raise InvalidRequestError(
                f"The {_CALLED[grammar.kind]} cannot be followed: {_first_lines(error)}", grammar.param
            )
        guide = Guide(matcher, self)
        self._fill([guide])
        return guide

    def chosen(self, guides: Sequence[Guide], tokens: Sequence[int]) -> None:
        """These tokens were chosen; what may follow each is worked out from now on. Generation thread."""
        going = [(guide, token) for guide, token in zip(guides, tokens, strict=True) if token not in self._ends]
        for guide, _ in going:
            guide.ready.clear()
        if going:
            self._worker.do(lambda: self._go_on(going))

    def close(self) -> None:
        """The model is about to go. Any thread."""
        self._worker.close()

    def _prepare(self, llguidance: Any) -> None:
        from llguidance.hf import from_tokenizer

        if not self._ends:
            raise InvalidRequestError("A grammar needs a model with an end-of-sequence token; this one has none.")
        try:
            tokens = from_tokenizer(self._tokenizer, n_vocab=self.size, eos_token=sorted(self._ends))
        except Exception as cause:
            raise InvalidRequestError(f"Answers of this model can follow no grammar: {cause}", "grammar") from cause
        self._executor = llguidance.LLExecutor(1)
        self._last = numpy.zeros(-(-self.size // 32) * 32, numpy.uint8)
        self._last[sorted(self._ends)] = 1
        self._last = numpy.packbits(self._last, bitorder="little").view(numpy.int32)
        self._tokens = tokens

    # --- on the worker ---

    def _go_on(self, chosen: Sequence[tuple[Guide, int]]) -> None:
        from llguidance.numpy import consume_token_par

        try:
            taken = consume_token_par(self._executor, [(guide.matcher, token) for guide, token in chosen])
        except Exception as cause:
            for guide, _ in chosen:
                guide.fail(cause)
            return
        for (guide, _), well in zip(chosen, taken, strict=True):
            if not well:
                guide.fail(guide.matcher.get_error())
        self._fill([guide for guide, _ in chosen if guide.failure is None])

    def _fill(self, guides: Sequence[Guide]) -> None:
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        open_ended = [guide for guide in guides if not guide.matcher.is_stopped()]
        masks = allocate_token_bitmask(len(open_ended), self.size)
        try:
            places = [(guide.matcher, place) for place, guide in enumerate(open_ended)]
            fill_next_token_bitmask_par(self._executor, places, masks)
        except Exception as cause:
            for guide in open_ended:
                guide.fail(guide.matcher.get_error() or cause)
        for guide in guides:
            guide.words = self._last
        for guide, words in zip(open_ended, masks, strict=True):
            guide.words = words
        for guide in guides:
            guide.ready.set()


def bar(guides: Sequence[Guide], rows: Sequence[int], barred: torch.Tensor) -> None:
    """Set the flags of those tokens that may not come next; waits for what is still being worked out.

    Args:
        rows: of ``barred``, which is (rows, vocabulary): one for each guide.
    """
    end = time.monotonic() + PATIENCE
    for guide in guides:
        if not guide.ready.wait(max(0.0, end - time.monotonic())):
            guide.fail(TimeoutError("its mask did not come"))
    well = [(guide, row) for guide, row in zip(guides, rows, strict=True) if guide.failure is None]
    for guide, row in zip(guides, rows, strict=True):
        if guide.failure is not None:  # whatever comes is not told any more
            barred[row] = False
    if well:
        words = numpy.stack([guide.words for guide, _ in well])
        bits = numpy.unpackbits((~words).view(numpy.uint8), axis=1, bitorder="little", count=barred.shape[1])
        barred[[row for _, row in well]] = torch.from_numpy(bits.view(numpy.bool_)).to(barred.device)


class _Worker:
    """A thread that works masks out, one step's after another. The first starts it; it runs until it is closed."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        weakref.finalize(self, self._jobs.put, None).atexit = False  # of an engine that was left behind

    def do(self, job: Callable[[], None]) -> None:
        """Have it done. The generation thread, which does it itself after the end."""
        if self._closed:
            job()
            return
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="lmbridge grammars", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        if self._closed:  # meanwhile: the thread may have ended before it came to this one
            self._do_the_rest()

    def _do_the_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job()

    def close(self) -> None:
        """End the thread once it has done what it was given. Any thread."""
        self._closed = True
        self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception:
            logger.exception("The masks of a step could not be worked out.")
        del job  # it holds its guides, whose answers may be over


# --- grammars in llguidance's words ---


def _library() -> Any:
    try:
        import llguidance
    except ImportError as cause:
        raise MissingDependencyError("Grammars need: pip install 'llguidance>=1.9,<2'") from cause
    return llguidance


def _json(matcher: Any, schema: Any) -> str:
    return str(matcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), overrides=_SPACING))


def _lark(matcher: Any, text: str) -> str:
    """Of llama.cpp's notation, too."""
    from llguidance.gbnf_to_lark import any_to_lark

    return str(matcher.grammar_from_lark(any_to_lark(text)))


def _choice(matcher: Any, texts: Any) -> str:
    quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return str(matcher.grammar_from_lark(f"start: {quoted}"))


_WRITTEN: dict[str, Callable[[Any, Any], str]] = {
    "json": _json,
    "choice": _choice,
    "regex": lambda matcher, pattern: matcher.grammar_from_regex(pattern),
    "lark": _lark,
}
_CALLED = {"json": "JSON schema", "choice": "choice", "regex": "regular expression", "lark": "grammar"}


def _first_lines(error: str) -> str:
    return " ".join(line.strip() for line in error.strip().splitlines()[:6])[:500]
