"""Grammars of answers: which tokens may come next.

Rule: ``Grammars.guide`` on the worker thread; all else on the generation thread. What may follow is worked out where it
is needed, when the model's scores are there to choose from: handing it to a thread of its own costs more than the work
does, and on a GPU the model still computes while it is done.

llguidance knows the grammars and the model's tokens; nothing here looks into either.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmbridge.engines.base import engine_error
from lmbridge.engines.schemas import choice_lines, followable
from lmbridge.engines.schemas.gbnf import lark_of_gbnf
from lmbridge.errors import InvalidRequestError, MissingDependencyError
from lmbridge.grammar import Grammar, is_gbnf

_SHARED = 1 << 20
"""Tokens of all masks together from which several threads are quicker than one, which need to be woken."""
_KEPT, _KEPT_SECONDS = 64, 1.0
"""How many compiled grammars are kept, since clients tend to reuse a few; and how many seconds of compilation in total,
which also measures their memory: about 150 MB per second."""
_LIMITS = {"max_items_in_row": 20_000, "step_lexer_fuel": 1_000_000}
"""Of llguidance's: what thousands of properties that may be left out need, and multiples of thousands in a range."""


class Guide:
    """Constrains one answer to its grammar.

    Attributes:
        matcher: llguidance's; one thread at a time.
        home: the Grammars that made it.
        after: the token after which the grammar applies; the answer cannot end before it. None once it applies.
        failure: why it can no longer be followed; None while it can.
    """

    def __init__(self, matcher: Any, home: Grammars, after: int | None) -> None:
        self.matcher, self.home, self.after = matcher, home, after
        self.failure: Exception | None = None

    def check(self, cause: object = None) -> None:
        """Record why it can no longer be followed, if so: ``cause`` or the matcher's error."""
        if self.failure is None and (cause or self.matcher.is_error()):
            error = cause if isinstance(cause, BaseException) else RuntimeError(_brief(self.matcher.get_error()))
            self.failure = engine_error(f"The grammar of this request cannot be followed on: {error}", error)


class Grammars:
    """The grammars that one model's answers may follow.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: the model's vocabulary size, which may exceed the tokenizer's.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, size: int, ends: frozenset[int]) -> None:
        self.size = size
        self._tokenizer, self._ends = tokenizer, ends
        self._tokens: Any = None  # created on first use, like the next: takes a second for a large vocabulary
        self._executor: Any = None
        self._unending = torch.empty(0, dtype=torch.uint8)  # a row in which all but the ends may come
        self._beginnings: dict[str, tuple[Any, float]] = {}  # by their grammars, the last used last

    def guide(self, grammar: Grammar, after: int | None = None) -> Guide:
        """A Guide for one answer.

        Args:
            after: the grammar applies after this token; until then any token but the end tokens may come.

        Raises:
            InvalidRequestError: the grammar is invalid or not supported.
            MissingDependencyError: llguidance is not installed.
        """
        llguidance = _library()
        if self._tokens is None:
            self._prepare(llguidance)
        try:
            text = _WRITTEN[grammar.kind](llguidance.LLMatcher, grammar.value, grammar.param)
            matcher, error = self._beginning(llguidance, text)
        except InvalidRequestError:
            raise
        except Exception as cause:
            error = str(cause)
        if error:
            raise InvalidRequestError(
                f"The {_called(grammar, error)} cannot be followed: {_brief(error)}", grammar.param
            )
        return Guide(matcher.deep_copy(), self, after)

    def chosen(self, told: Sequence[tuple[Guide, int]]) -> None:
        """Advance the guides by the chosen tokens."""
        for guide, token in told:
            if token in self._ends:
                continue
            if guide.after is None:
                guide.matcher.consume_token(token)
                guide.check()
            elif guide.after == token:
                guide.after = None

    def fill(self, guided: Sequence[tuple[Guide, int]], allowed: torch.Tensor) -> None:
        """Fill in which tokens may come next.

        Args:
            guided: guides and the rows that are theirs.
            allowed: see ``choosing.Changes``, on the CPU.
        """
        for guide, row in guided:
            if guide.after is not None:
                allowed[row] = self._without_ends(allowed.shape[1])
        held = [(guide, row) for guide, row in guided if guide.after is None]
        (rows, width), address = allowed.shape, allowed.data_ptr()
        try:
            if len(held) * self.size >= _SHARED:
                places = [(guide.matcher, row) for guide, row in held]
                self._executor.unsafe_compute_mask_ptr(places, address, width, rows)
            else:
                for guide, row in held:
                    guide.matcher.unsafe_compute_mask_ptr(address + row * width, width)
        except Exception as cause:
            for guide, _ in held:
                guide.check(cause)
        for guide, row in held:
            guide.check()
            if guide.failure is not None:  # further tokens are not delivered
                allowed[row] = 255

    def _without_ends(self, width: int) -> torch.Tensor:
        if len(self._unending) != width:
            row = bytearray(b"\xff" * width)
            for token in self._ends:
                row[token // 8] &= 255 ^ (1 << token % 8)
            self._unending = torch.frombuffer(row, dtype=torch.uint8)
        return self._unending

    def _beginning(self, llguidance: Any, text: str) -> tuple[Any, str]:
        """A new matcher of the grammar, and its error.

        A copy of it takes microseconds, another milliseconds.
        """
        if text in self._beginnings:
            self._beginnings[text] = self._beginnings.pop(text)
            return self._beginnings[text][0], ""
        start = time.thread_time()
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._tokens, text, log_level=0, limits=limits)
        error = matcher.get_error() or _early_error(matcher)
        if not error:
            self._keep(text, matcher, time.thread_time() - start)
        return matcher, error

    def _keep(self, text: str, matcher: Any, seconds: float) -> None:
        kept = self._beginnings
        kept[text] = matcher, seconds
        while len(kept) > _KEPT or (len(kept) > 1 and sum(cost for _, cost in kept.values()) > _KEPT_SECONDS):
            del kept[next(iter(kept))]

    def _prepare(self, llguidance: Any) -> None:
        from llguidance.hf import from_tokenizer

        if not self._ends:
            raise InvalidRequestError("A grammar needs a model with an end-of-sequence token, which this one lacks.")
        try:
            tokens = from_tokenizer(self._tokenizer, n_vocab=self.size, eos_token=sorted(self._ends))
        except Exception as cause:
            raise InvalidRequestError(f"This model does not support grammars: {cause}", "grammar") from cause
        self._executor = llguidance.LLExecutor()
        self._tokens = tokens


# --- grammars in llguidance's words ---


def _library() -> Any:
    try:
        import llguidance
    except ImportError as cause:
        raise MissingDependencyError("Grammars need: pip install 'llguidance>=1.9,<2'") from cause
    return llguidance


def _json(matcher: Any, schema: Any, param: str) -> str:
    return str(matcher.grammar_from_json_schema(json.dumps(followable(schema, param))))


def _lark(matcher: Any, text: str, param: str) -> str:
    """A Lark grammar, also from llama.cpp's notation."""
    return str(matcher.grammar_from_lark(lark_of_gbnf(text, param) if is_gbnf(text) else text))


def _choice(matcher: Any, texts: Any, _: str) -> str:
    return str(matcher.grammar_from_lark("\n".join(choice_lines("start", texts))))


_WRITTEN: dict[str, Callable[[Any, Any, str], str]] = {
    "json": _json,
    "choice": _choice,
    "regex": lambda matcher, pattern, _: matcher.grammar_from_regex(pattern),
    "lark": _lark,
    "calls": lambda matcher, text, _: matcher.grammar_from_lark(text),
}
_LOOKED_AT = 3  # tokens
_QUOTED = re.compile(r"^\s*\d+ \| ", re.MULTILINE)  # the lines of a grammar
_CALLED = {
    "json": "JSON schema",
    "choice": "choice",
    "regex": "regular expression",
    "lark": "grammar",
    "calls": "schema of a tool",
}
_ARGUMENTS = re.compile(r"^ *\d+ \| arguments_(\d+): .*\n *\^", re.MULTILINE)  # the line at fault, of several quoted
_PLAINLY = {
    "NoExtensionBias": "it cannot match anything",
    "NoExtension": "it cannot match anything",
}


def _called(grammar: Grammar, error: str) -> str:
    """What of the request is wrong: of several tools the one whose schema llguidance speaks of."""
    rule = _ARGUMENTS.search(error.partition("<state>")[0]) if grammar.kind == "calls" else None
    line = rule and re.search(rf"^call_{rule[1]}: (.*) arguments_", grammar.value, re.MULTILINE)
    name = line and (re.search(r'\\"name\\": \\"([\w.-]+)', line[1]) or re.search(r'.*(?<!\\)"([\w.-]+)', line[1]))
    return f"parameters of {name[1]}" if name else _CALLED[grammar.kind]


def _brief(error: str) -> str:
    """Its first lines, without the state of the parser, nor the grammar around a schema, which we have written."""
    error = error.partition("<state>")[0].partition("<backtrace>")[0].strip()
    if "failed to compile JSON schema: " in error:
        error = _QUOTED.split(error.partition("failed to compile JSON schema: ")[2])[0]
    if error.startswith("panic: "):
        return "it is too large."
    for theirs, ours in _PLAINLY.items():
        error = error.replace(theirs, ours)
    lines = [line.strip() for line in error.splitlines()[:6]]
    return " ".join(line for line in lines if line.strip("^"))[:500].strip()


def _early_error(matcher: Any) -> str:
    """What is wrong with the grammar as its first tokens show, on a copy; its first mask is worked out at once."""
    mask = matcher.compute_bitmask()  # here, since the first takes long; a copy knows it
    copy = matcher.deep_copy()
    for _ in range(_LOOKED_AT):
        bits = int.from_bytes(mask, "little")
        if copy.is_error() or copy.is_stopped() or not bits:
            break
        copy.consume_token((bits & -bits).bit_length() - 1)
        mask = copy.compute_bitmask()
    return str(matcher.get_error() or copy.get_error())
