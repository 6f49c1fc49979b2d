"""The encoder engine: texts from many callers in batches through one embedding or reranking model.

Rule: everything here runs on the server thread, except where a docstring says otherwise. torch and transformers are
imported when the engine starts and no earlier.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lmbridge.engines.ailments import is_out_of_memory, is_sticky
from lmbridge.engines.base import Engine, Library, Sink
from lmbridge.engines.batching import Batcher
from lmbridge.engines.encoder.encoding import CHARACTERS, cost
from lmbridge.engines.encoder.given import check_options_of_object, task_of_object
from lmbridge.engines.encoder.options import EncoderOptions
from lmbridge.engines.encoder.pace import Pace
from lmbridge.engines.models import announce, find_model
from lmbridge.engines.standing import where_is
from lmbridge.engines.thread import EngineThread
from lmbridge.engines.transformers.library import PIP, TRIED
from lmbridge.engines.transformers.memory import weight_bytes
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.errors import EngineDeadError
from lmbridge.messages import Delta, Embed, Request, Rerank, Task, Usage

if TYPE_CHECKING:
    from lmbridge.engines.encoder.core import Core
    from lmbridge.engines.encoder.encoding import Item
    from lmbridge.engines.encoder.pauses import Pauses

T = TypeVar("T")

LONG_TEXTS = 16
LONG_CHARACTERS = 32_000
"""The most long texts, and characters, tokenised between two batches: about as long as a batch takes."""


class EncoderEngine(Engine):
    """A Hugging Face model that embeds texts, or scores pairs of texts, for many callers in batches.

    A vector is float32 of shape (dimensions,). For a model with one label, a score is the output of the model's own
    activation, as saved by sentence-transformers: the raw label if that is Identity, and by default the sigmoid, from 0
    to 1. For a model with several labels it is the softmax of the last, from 0 to 1, which by convention is relevance.

    Args:
        model: a folder, a hub id, or a SentenceTransformer or CrossEncoder object of sentence-transformers. The files
            of sentence-transformers (pooling, prompts, lengths) are read, even if it is not installed.
        task: ``"embed"``, ``"rerank"``, or ``"auto"``: as the model's config.json says, at the start.
        pooling: how a text's token vectors are combined: ``"mean"``, ``"cls"``, ``"max"``, ``"lasttoken"``,
            ``"weightedmean"`` or ``"mean_sqrt_len_tokens"``; default: from the model's files, else the mean.
        max_length: the most tokens of a text, special ones included; default: from the model's files.
        device: a torch name; default: ``"cuda"`` if available, else ``"cpu"``. An object stays where it is,
            and in its dtype.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or a torch dtype;
            default: float32 on a CPU, as stored elsewhere.
        max_batch_size: the most texts in a batch.
        max_batch_tokens: the most tokens in a batch; a longer text runs alone. Default: as many as it takes to be
            fast: 2,048 packed on a CPU, 8,192 padded on a CPU, 16,384 elsewhere.
        batch_timeout: seconds for which a batch that is not full waits for more texts; 0 runs what is there.
        threads: torch's threads on a CPU, for this engine only; default: one for models under 4 million parameters,
            else torch's own choice.
        layout: ``"packed"``, all texts of a batch in one row without padding; ``"grouped"``, texts of similar length
            padded; ``"single"``, one by one; ``"auto"``, the first of these that passes the self-check.
        self_check: end loading by comparing some texts' results with those of each text alone. Without it, wrong
            packing would go unnoticed, so ``layout="auto"`` then means ``"grouped"``.
        trust_remote_code: run code that comes with the model.
        revision: branch, tag or commit on the hub.
    """

    name: ClassVar[str] = "encoder"
    libraries = (Library("torch", "2.6 to 2.13", "pip install torch"), Library("transformers", TRIED, PIP))
    supports: ClassVar[frozenset[str]] = frozenset()
    tasks: frozenset[Task] = frozenset({"embed", "rerank"})

    def __init__(
        self,
        model: Any,
        *,
        task: str = "auto",
        pooling: str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: Any = None,
        max_batch_size: int = 64,
        max_batch_tokens: int | None = None,
        batch_timeout: float = 0.0,
        threads: int | None = None,
        layout: str = "auto",
        self_check: bool = True,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self._object_task = task_of_object(model)
        self._given = model if self._object_task else None
        self._label = os.fspath(model) if self._given is None else f"a {type(model).__name__}"
        if self._given is not None:
            check_options_of_object(self._given, device=device, dtype=dtype, revision=revision, task=task)
        self._options = EncoderOptions(
            ModelOptions(
                model=find_model(model) if self._given is None else "",
                device=None if device is None else str(device),
                dtype=dtype,
                max_batch_size=max_batch_size,
                threads=threads,
                self_check=self_check,
                trust_remote_code=trust_remote_code,
                revision=revision,
            ),
            task=task,
            pooling=pooling,
            max_length=max_length,
            max_batch_tokens=max_batch_tokens,
            batch_timeout=batch_timeout,
            layout=layout,
        )
        self.max_batch_size = max_batch_size
        if self._object_task or task != "auto":
            self.tasks = frozenset({self._object_task or task})  # type: ignore[arg-type]  # it is one of them
        self._thread = EngineThread("lmbridge encoder")
        # For an engine never closed because its loop got stuck. Not at exit: the bridge then closes it.
        weakref.finalize(self, self._thread.close).atexit = False
        self._core: Core | None = None
        self._batcher: Batcher[Item] | None = None
        self._long: Batcher[Request] = Batcher(self._tokenize, max_items=LONG_TEXTS, max_size=LONG_CHARACTERS)
        self._pace = Pace()
        self._pauses: Pauses | None = None  # set while the model is loaded
        self._steps = 0  # how often the worker thread has started or finished something
        self._at_work: int | None = None  # the thread inside the model
        self._dead: BaseException | None = None

    def describe(self) -> str:
        core = self._core
        return f"{self._label} on encoder" + (f" ({core.describe()})" if core is not None else "")

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Load the model on the worker thread, and find the fastest correct layout.

        Raises:
            MissingDependencyError: a package is missing or too old.
            EngineStartError: this engine cannot run the model, or not in the requested layout.
            Exception: whatever transformers raises while loading, out of memory included.
        """
        core = await self._thread.run(self._load)
        self.tasks = frozenset({core.task})
        self._batcher = Batcher(
            self._run,
            max_items=self.max_batch_size,
            max_size=self._options.max_batch_tokens or core.usual_tokens,
            wait=self._options.batch_timeout,
            cap=self._cap,
        )

    async def close(self) -> None:
        self._long.close()
        if self._batcher is not None:
            self._batcher.close()
        try:
            await self._thread.run(self._unload)
        finally:  # callers of a hanging batch can stop waiting
            self._thread.close()

    def _load(self) -> Core:
        """On the worker thread."""
        if self._given is None:
            announce(self._options.model.model)
        from lmbridge.engines.transformers import library

        library.import_library()
        from lmbridge.engines.encoder.pauses import Pauses
        from lmbridge.engines.encoder.starting import begin

        # kept at once: the awaiting task may be cancelled
        core = self._core = begin(self._options, self._given, self._object_task, self._label)
        self._pauses = Pauses(core.module, self.party)
        return core

    def _unload(self) -> None:
        """On the worker thread."""
        core, self._core = self._core, None
        pauses, self._pauses = self._pauses, None
        self._given = None
        if pauses is not None:
            pauses.close()
        if core is not None:
            from lmbridge.engines.encoder.starting import unload

            unload(core)

    # --------------------------------------------------------------------------------------------------------- requests

    def add_request(self, request: Request, sink: Sink) -> None:
        """Begin the request; an invalid text raises at once if it is short, and fails in the sink if it is long.

        Raises:
            InvalidRequestError: the text has no tokens, not even special ones (an empty text has these with most
                models, and gets a vector), or is not valid Unicode; token ids are unknown, or there are too many
                dimensions.
            PromptTooLongError: the text is too long for the model and may not be cut.
            EngineDeadError: the engine takes no more requests.
        """
        core, batcher = self._alive()
        job = request.job
        assert isinstance(job, (Embed, Rerank))
        core.check(job)
        item = core.encoder.at_once(job)
        if item is not None:
            self._submit(batcher, request, item, sink)
            return
        at_most = core.encoder.room * CHARACTERS  # of a longer text only the beginning is tokenised
        size = min(cost(job), at_most) if at_most else cost(job)
        then = functools.partial(self._submit_tokens, request, sink)
        self._long.add(request.id, request, then, size, client=request.client)

    def abort_request(self, request_id: str) -> None:
        if not self._long.discard(request_id) and self._batcher is not None:
            self._batcher.discard(request_id)

    def progress(self, request_id: str) -> int | None:
        """How much the worker thread has started and finished: every request waits for a batch or a long text.

        While the engine waits for its turn on the device, this is a clock, so that it does not count as stalled.
        """
        batcher = self._batcher
        inside = request_id in self._long or (batcher is not None and request_id in batcher)
        if inside and self.party.waiting:
            return time.monotonic_ns()
        return self._steps if inside else None

    def where(self) -> str:
        return where_is(self._at_work) if self._at_work is not None else ""

    def estimate(self) -> int | None:
        """Bytes of the weights once loaded, from the files; None for a model not yet downloaded."""
        return None if self._given is not None else weight_bytes(self._options.model)

    def footprint(self) -> int | None:
        core = self._core
        return core.footprint() if core is not None else None

    def stats(self) -> dict[str, float]:
        """``in_flight``; ``batches``, ``items`` and ``tokens`` so far, ``max_batch_size``, ``max_batch_tokens``
        (lowered after a batch did not fit into memory), and ``padding_share``: the share of computed positions that
        were padding.
        """
        batcher, layout = self._batcher, self._core.layout if self._core is not None else None
        limit = batcher.max_size if batcher is not None else self._options.max_batch_tokens
        return {
            "in_flight": float((len(batcher) if batcher is not None else 0) + len(self._long)),
            "batches": float(batcher.batches if batcher is not None else 0),
            "items": float(batcher.items if batcher is not None else 0),
            "tokens": float(batcher.size if batcher is not None else 0),
            "max_batch_size": float(self.max_batch_size),
            "max_batch_tokens": float(limit or 0),
            "padding_share": layout.padding / layout.tokens if layout is not None and layout.tokens else 0.0,
        }

    def _alive(self) -> tuple[Core, Batcher[Item]]:
        if self._dead is not None or self._core is None or self._batcher is None:
            state = "has died" if self._dead is not None else "is not running"
            raise EngineDeadError(f"The encoder engine {state}; it takes no requests.") from self._dead
        return self._core, self._batcher

    def _submit(self, batcher: Batcher[Item], request: Request, item: Item, sink: Sink) -> None:
        batcher.add(request.id, item, sink, item.size, Usage(prompt_tokens=len(item.ids)), request.client)

    # ------------------------------------------------------------------------------------------------------- long texts

    async def _tokenize(self, requests: list[Request]) -> list[Any]:
        return await self._thread.run(lambda: self._at(lambda: list(map(self._item, requests))), while_awaited=True)

    def _item(self, request: Request) -> Item | Exception:
        """On the worker thread."""
        core, job = self._core, request.job
        assert isinstance(job, (Embed, Rerank))
        try:
            if core is None or request.id not in self._long:  # aborted meanwhile
                raise EngineDeadError("This text's request has ended.")
            return core.encoder.encode(job)
        except Exception as error:
            return error

    def _submit_tokens(self, request: Request, sink: Sink, delta: Delta) -> None:
        """A long text has been tokenised, or has failed."""
        if delta.value is None:
            sink(delta)
            return
        try:
            batcher = self._alive()[1]
        except EngineDeadError as error:
            sink(Delta(error=error))
        else:
            self._submit(batcher, request, delta.value, sink)

    # ---------------------------------------------------------------------------------------------------------- batches

    async def _run(self, items: list[Item]) -> Sequence[Any]:
        try:
            return await self._thread.run(self._work, items, while_awaited=True)
        except Exception as cause:
            traceback.clear_frames(cause.__traceback__)  # they hold what the model was computing
            if is_sticky(cause):
                self._die(cause)
            elif is_out_of_memory(cause):
                await self._thread.run(_free_memory)
            raise

    def _work(self, items: list[Item]) -> list[Any]:
        """On the worker thread."""
        core = self._core
        if core is None:
            raise EngineDeadError("The encoder engine was closed.")
        pauses = self._pauses
        with self.party.turn():
            before = pauses.waited if pauses is not None else 0.0
            begun = time.perf_counter()
            values = self._at(functools.partial(core.run, items))
            others = pauses.waited - before if pauses is not None else 0.0
            self._pace.take(sum(item.size for item in items), time.perf_counter() - begun - others)
        return values

    def _at(self, work: Callable[[], T]) -> T:
        """Do it and count it as progress. On the worker thread."""
        self._steps += 1
        self._at_work = threading.get_ident()
        try:
            return work()
        finally:
            self._at_work = None
            self._steps += 1

    def _cap(self) -> int | None:
        """How many tokens fit into the engine's turn on the device; None while it is alone there."""
        share, pauses = self.party.share(), self._pauses
        return None if share is None else self._pace.tokens_in(share * (pauses.parts if pauses is not None else 1))

    def _die(self, cause: BaseException) -> None:
        """Every later call to the device would fail: fail all requests and report the death once."""
        if self._dead is None:
            self._dead = cause
            self._long.close()
            if self._batcher is not None:
                self._batcher.close()
            self.on_death(cause)


def _free_memory() -> None:
    """On the worker thread."""
    from lmbridge.engines.transformers.loading import free_memory

    free_memory()
