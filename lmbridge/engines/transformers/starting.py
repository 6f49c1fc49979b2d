"""Finds the right runner: loads the model, puts it on one, checks it, or else tries the next.

Rule: imported once an engine starts. Everything in ``Start`` runs on the engine's worker thread, except ``proof`` (what
it asks is asked on the server thread), ``let_go``, ``succeeded`` and ``error``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lmbridge.engines.dialect import Dialect
from lmbridge.engines.encoding import PromptEncoder
from lmbridge.engines.text import TextStream, Vocabulary
from lmbridge.engines.transformers import library
from lmbridge.engines.transformers.guides import Grammars
from lmbridge.engines.transformers.loading import Loaded, free_memory, load, with_defaults
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.paged import PagedRunner, unfit
from lmbridge.engines.transformers.plain import PlainRunner
from lmbridge.engines.transformers.plan import Plan
from lmbridge.engines.transformers.proof import Proof
from lmbridge.engines.transformers.runner import Runner, context_of, loading
from lmbridge.errors import EngineStartError, InvalidRequestError
from lmbridge.messages import GenerationConfig

logger = logging.getLogger("lmbridge")
notes = logging.getLogger("lmbridge.loading")  # commands show these, too

CLOSE_TIMEOUT = 5.0
"""Seconds to wait on closing for a step that is still running."""


@dataclass(frozen=True)
class Attempt:
    """One way of running the model."""

    name: str
    build: Callable[[Any, ModelOptions], Runner]


@dataclass(frozen=True)
class Core:
    """A model on its runner, with everything a request needs.

    Attributes:
        size: how many tokens the model has a score for.
        grammars: those that answers may have to follow.
        dialect: how tools are described to the model and called.
    """

    runner: Runner
    encoder: PromptEncoder
    vocabulary: Vocabulary
    size: int
    eos: frozenset[int]
    defaults: dict[str, Any]
    grammars: Grammars
    dialect: Dialect
    device: str
    dtype: str

    def describe(self) -> str:
        """Where and how it runs."""
        return f"{self.device}, {self.dtype}, {self.runner.name}"

    def with_defaults(self, config: GenerationConfig) -> GenerationConfig:
        """The request's settings, with the model author's for unset fields if it samples."""
        return with_defaults(config, self.defaults)

    def plan(self, config: GenerationConfig, stop_ids: frozenset[int]) -> Plan:
        """How the request's tokens are to be chosen.

        Raises:
            InvalidRequestError: it has a bias for a token that the model does not have.
        """
        unknown = next((token for token in config.logit_bias or () if token >= self.size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"logit_bias names the token {unknown}, but the model's ids range from 0 to {self.size - 1}.",
                param="logit_bias",
            )
        return Plan(config, barred=stop_ids)

    def stream(self, config: GenerationConfig) -> TextStream:
        """How the request's tokens become text."""
        dialect = self.dialect if self.dialect.reads(config) else None
        return TextStream(
            self.vocabulary,
            config.stop_words,
            config.skip_special_tokens and not (dialect is not None and dialect.wants_all_tokens(config)),
            keep_stop_word=config.include_stop_str_in_output,
            least=config.min_new_tokens or 0,
            shown=frozenset() if dialect is None else dialect.shown,
        )

    def free_share(self, held: Sequence[int]) -> float:
        """The share of the cache that is free while requests hold so many tokens each."""
        page = self.runner.page
        return max(0.0, 1.0 - sum(-(-tokens // page) * page for tokens in held) / self.runner.capacity)


class Start:
    """Loads one model and tries runners on it.

    Attributes:
        proof: the results that a runner must match; None without a self-check.
    """

    def __init__(self, options: ModelOptions, label: str) -> None:
        self._options = options
        self._label = label
        self._loaded: Loaded | None = None
        self._runner: Runner | None = None  # kept at once: whoever waits for it may be cancelled
        self._faults: list[str] = []
        self._cause: BaseException | None = None
        self.proof: Proof | None = None

    def load(self) -> list[Attempt]:
        """Load the model; returns the ways of running it to try, best first."""
        try:
            with loading():
                loaded = self._loaded = load(self._options)
                if self._options.self_check:
                    room = context_of(loaded.model, self._options)
                    self.proof = Proof.of(loaded.model, loaded.tokenizer, loaded.attention, room)
        except BaseException as error:
            for link in _chain(error):
                _clear(link)
            raise
        return self._attempts(loaded)

    def build(self, attempt: Attempt) -> Core:
        """Put the model on a runner, which is not started yet.

        Raises:
            Exception: it cannot be put on this runner.
        """
        loaded = self._loaded
        assert loaded is not None
        with loading():
            runner = self._runner = attempt.build(loaded.model, self._options)
        known, size = (get().weight.shape[0] for get in (
            loaded.model.get_input_embeddings, loaded.model.get_output_embeddings
        ))  # fmt: skip
        dialect = Dialect(loaded.tokenizer)
        return Core(
            runner,
            PromptEncoder(loaded.tokenizer, known, runner.room, dialect),
            Vocabulary(loaded.tokenizer),
            size,
            loaded.eos,
            loaded.defaults,
            Grammars(loaded.tokenizer, size, loaded.eos),
            dialect,
            str(loaded.model.device),
            str(loaded.model.dtype).removeprefix("torch."),
        )

    def failed(self, attempt: Attempt, fault: str) -> None:
        """Take the model off a runner that failed the check."""
        self._faults.append(f"{attempt.name}: {fault.rstrip('.')}.")
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close(CLOSE_TIMEOUT)
        loaded = self._loaded
        if loaded is not None and loaded.attention is not None:
            loaded.model.set_attn_implementation(loaded.attention)
        free_memory()

    def succeeded(self, attempt: Attempt) -> None:
        """Log how the model runs."""
        assert self._runner is not None
        self._runner.proved()
        if self._faults:
            notes.warning("%s runs %s. %s", self._model_name(), attempt.name, " ".join(self._faults))
        else:
            logger.info("%s runs %s.", self._model_name(), attempt.name)

    def error(self) -> EngineStartError:
        """Why there is no runner."""
        paged_only = self._options.runner == "paged"
        advice = "Use runner='auto' or 'plain'." if paged_only else "Check the model's files, or use another version."
        error = EngineStartError(
            f"transformers {library.installed()} does not reproduce the own results of {self._model_name()}: "
            f"{' '.join(self._faults)} {advice}"
        )
        error.__cause__ = self._cause
        return error

    def unload(self, death: BaseException | None) -> None:
        """Free everything. ``death``: what ended the runner, whose traceback may hold the model."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close(CLOSE_TIMEOUT)
        self._loaded = self.proof = None
        del runner
        if death is not None:
            self.let_go(death)
        free_memory()

    def let_go(self, error: BaseException) -> str:
        """The error's text, after releasing the model from it: callers may keep the error.

        Its traceback goes, not only what the frames hold: torch's frames around hooks hold the model by their code.
        """
        self._cause = error
        for link in _chain(error):
            _clear(link)
            link.__traceback__ = None
        return str(error) or repr(error)

    def _attempts(self, loaded: Loaded) -> list[Attempt]:
        options = self._options
        whole = functools.partial(PlainRunner, chunked=False)
        one_by_one = functools.partial(PlainRunner, chunked=False, interleaved=False)
        plain = [
            Attempt("plain", PlainRunner),
            Attempt("plain, each prompt whole", whole),
            Attempt("plain, each request whole", one_by_one),
        ]
        if not options.self_check:  # nothing would detect a model that cannot read in pieces
            plain = plain[1:2]
        if options.runner == "plain":
            return plain
        why = library.batching_faults() or unfit(loaded.model, options)
        if why:
            self._faults.append(f"paged: {why.rstrip('.')}.")
        paged = [] if why else self._paged(loaded)
        return paged if options.runner == "paged" else [*paged, *plain]

    def _paged(self, loaded: Loaded) -> list[Attempt]:
        own = self._options.attn_implementation is None and loaded.attention == "sdpa"
        theirs = Attempt("paged", PagedRunner)
        if not own or loaded.model.device.type != "cpu":
            return [theirs]
        if not library.attention_fits():
            self._faults.append(f"transformers {library.installed()} has changed what lmbridge's attention needs.")
            return [theirs]
        return [
            Attempt("paged", functools.partial(PagedRunner, own_attention=True)),
            Attempt("paged, with transformers' attention", PagedRunner),
        ]

    def _model_name(self) -> str:
        model = self._loaded.model if self._loaded is not None else None
        return f"the model {self._label} ({type(model).__name__})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _clear(error: BaseException) -> None:
    """Empty the frames that the error's traceback leads to."""
    for outer, _ in traceback.walk_tb(error.__traceback__):
        frame: FrameType | None = outer
        with contextlib.suppress(RuntimeError):  # this one is still running
            while frame is not None:
                frame.clear()
                frame = frame.f_back
