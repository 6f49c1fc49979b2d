"""Brings a model into its layout: loads it or takes it apart, then tries one layout after another.

Rule: imported when an engine starts; runs on the engine's worker thread.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from typing import Any

import torch

from lmbridge.engines.encoder.core import Core
from lmbridge.engines.encoder.encoding import TextEncoder
from lmbridge.engines.encoder.layouts import Layout, Single, unbatchable, unpackable
from lmbridge.engines.encoder.loading import Parts, counts_like_roberta, load, room_of, table_of
from lmbridge.engines.encoder.objects import Uncounted, Whole, activation_of_object, taken_apart
from lmbridge.engines.encoder.options import LAYOUTS, EncoderOptions
from lmbridge.engines.encoder.proof import Proof, Way, check_items, ways
from lmbridge.engines.encoder.vectors import Score, Tail
from lmbridge.engines.transformers.loading import free_memory
from lmbridge.engines.transformers.runner import loading, thread_count, use_threads
from lmbridge.errors import EngineStartError
from lmbridge.log import shown
from lmbridge.messages import Embed, Rerank, Task

logger = logging.getLogger("lmbridge")
notes = logging.getLogger("lmbridge.loading")  # commands show these, too


def begin(options: EncoderOptions, given: Any, task: Task | None, label: str) -> Core:
    """The model in the first correct layout.

    Args:
        given: an object of sentence-transformers, with its ``task``; None loads the model by name.

    Raises:
        EngineStartError: no layout is correct, or the model cannot be loaded.
    """
    try:
        with loading():
            return _load(options, label) if task is None else _around(options, given, task, label)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        raise


def unload(core: Core | None) -> None:
    """Free everything."""
    if core is not None:
        core.layout.close()
    del core
    free_memory()


def _load(options: EncoderOptions, label: str) -> Core:
    parts = load(options)
    use_threads(thread_count(parts.model, options.model))
    bench = _Bench(parts, options, label)
    return bench.core(bench.chosen(None))


def _around(options: EncoderOptions, given: Any, task: Task, label: str) -> Core:
    """Use the object's parts if they agree with the object itself, else its own methods."""
    whole = Whole(given, task)
    changes = [name for name in ("pooling", "max_length") if getattr(options, name) is not None]
    as_it_is = dataclasses.replace(options, pooling=None, max_length=None)
    try:
        parts = taken_apart(given, task)
        use_threads(thread_count(parts.model, options.model))
        bench = _Bench(parts, as_it_is, label)
        layout = bench.chosen(whole)
    except Exception as cause:
        wanted = [*changes, *(["layout"] if options.layout != "auto" else [])]
        if wanted:
            raise EngineStartError(
                f"{label} can only be used through its own methods, which do not support {' or '.join(wanted)} "
                f"({shown(cause).rstrip('.')}). Set it on the object, or give the model's folder."
            ) from cause
        notes.warning("%s is used through its own methods: %s.", label, shown(cause).rstrip("."))
        return _by_its_own(given, whole, task)
    if not changes:
        return bench.core(layout)
    layout.close()
    bench = _Bench(parts, options, label)
    return bench.core(bench.chosen(None))


def _by_its_own(given: Any, whole: Whole, task: Task) -> Core:
    encoder = Uncounted(given)
    width = whole.run([encoder.encode(_sample(task))]).shape[-1]
    score = Score(width, activation_of_object(given)) if task == "rerank" else None
    weight = next(given.parameters())
    return Core(given, task, encoder, whole, 0 if score else width, score, "", str(weight.device), _name(weight.dtype))


class _Bench:
    """A loaded model on which layouts are tried."""

    def __init__(self, parts: Parts, options: EncoderOptions, label: str) -> None:
        self._parts, self._options, self._label = parts, options, label
        model = parts.model.eval()
        backend = getattr(parts.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EngineStartError(
                f"The tokenizer of {label} has no fast version (tokenizer.json); this engine needs it."
            )
        takes_types = "token_type_ids" in parts.tokenizer.model_input_names
        vocabulary = model.get_input_embeddings().weight.shape[0]
        room = room_of(parts, options.max_length)
        self._encoder = TextEncoder(backend, vocabulary, room, parts.settings, takes_types)
        if room < self._encoder.least(parts.task):
            raise EngineStartError(
                f"max_length={room} is too small: {label} needs at least {self._encoder.least(parts.task)} tokens for "
                "the special ones and one of the text. Give a larger max_length."
            )
        if parts.task == "rerank" and options.pooling:
            raise EngineStartError(f"{label} makes scores and does not pool; leave pooling={options.pooling!r} out.")
        said = (options.pooling,) if options.pooling else parts.settings.pooling
        size = model.config.get_text_config().hidden_size
        like = next(model.parameters())
        self._tail = Tail(parts.settings, said or ("mean",), size, like) if parts.task == "embed" else None
        self._score = Score(model.config.num_labels, parts.activation) if parts.task == "rerank" else None
        if self._score is not None and self._score.labels > 1:
            notes.info("%s: a score is the %s.", label, self._score.name)
        self._pooling = f"{' + '.join(said or ('mean',))} pooling" + ("" if said else " (none stated)")

    def core(self, layout: Layout) -> Core:
        """The model in this layout, with everything a request needs."""
        model, tail = self._parts.model, self._tail
        logger.info("%s (%s) is run %s.", self._label, type(model).__name__, layout.name)
        return Core(
            model,
            self._parts.task,
            self._encoder,
            layout,
            tail.dimensions if tail is not None else 0,
            self._score,
            self._pooling if tail is not None else "",
            str(model.device),
            _name(model.dtype),
        )

    @torch.inference_mode()
    def chosen(self, judge: Layout | None) -> Layout:
        """The first layout whose results equal those of each text alone.

        Args:
            judge: gives those results, if not the model itself.
        """
        model, options = self._parts.model, self._options
        apart = unbatchable(model, self._encoder.room)
        why = apart or unpackable(model, self._tail is None)
        faults = [f"packed: {why}."] if why and options.layout in ("auto", "packed") else []
        wanted = [way for way in ways(model, self._tail, counts_like_roberta(model)) if self._is_wanted(way, why)]
        if apart:
            faults = [f"{' and '.join(LAYOUTS[:2])}: {apart}."]
            wanted = [way for way in wanted if way.name == "single"]
        if not options.model.self_check and wanted:
            return wanted[0].build()
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        items = check_items(self._encoder, self._parts.task, window, table_of(model))
        alone = (judge or Single(model, self._tail)).run(items)
        proof = Proof(items, self._score, alone, model.dtype)
        for way in wanted:
            layout, fault = _tried(way, proof)
            if layout is not None:
                if faults:
                    notes.info("%s is run %s. %s", self._label, way.name, " ".join(faults))
                return layout
            faults.append(f"{way.name}: {fault.rstrip('.')}.")
        advice = "Its files may be broken." if options.layout == "auto" else "Use layout='auto'."
        raise EngineStartError(f"{self._label} gives different results in batches: {' '.join(faults)} {advice}")

    def _is_wanted(self, way: Way, unpackable: str) -> bool:
        """Without the self-check, packing must be requested by name."""
        if way.name == "packed" and unpackable:
            return False
        if self._options.layout == "auto":
            return self._options.model.self_check or way.name != "packed"
        return way.name == self._options.layout


def _tried(way: Way, proof: Proof) -> tuple[Layout | None, str]:
    """The layout, or its fault."""
    layout: Layout | None = None
    try:
        layout = way.build()
        fault = proof.fault(layout)
        if not fault:
            return layout, ""
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as cause:
        fault = shown(cause)
    if layout is not None:
        layout.close()
    return None, fault


def _sample(task: Task) -> Any:
    return Embed("a text") if task == "embed" else Rerank("a query", "a document")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
