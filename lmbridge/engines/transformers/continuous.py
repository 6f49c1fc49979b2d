"""The insides of transformers' continuous batching: loading, sizing the cache, and the thread that generates.

Rule: the one module that knows how transformers' versions differ, imported only once an engine starts. ``load`` and
``Core.close`` block and run on the engine's worker thread; what else ``Core`` does is quick and belongs to the server
thread; the outputs come from the manager's own generation thread.

CUDA graphs and asynchronous batching stay off: both replay or overlap the step as it was recorded, while sampling here
is Python that runs in every step and needs the token of the step before.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.utils import logging as transformers_logging

from lmbridge.engines.transformers import attention
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.engines.transformers.sampling import Sampler

EXIT_GRACE = 5.0
"""Seconds that the end of the process waits for a model that is loading, or for a step under way."""
CPU_PAGE = 32
CPU_CHUNK = 256
CPU_CACHE_SHARE = 0.1
CPU_CACHE_LIMIT = 2 << 30
TINY_MODEL = 4_000_000
"""Parameters below which a second thread costs more than it does: waiting for each other takes longer than the work."""
psutil: Any = importlib.import_module("psutil")  # untyped; transformers needs it too, to size a cache on a CPU
_generating: set[Core] = set()  # single operations on a set are atomic; so too below
_loading: set[threading.Event] = set()
_leaving = threading.Event()
_KNOWN = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}


class Listener:
    """Where the generation thread reports to. The callbacks run on that thread."""

    def __init__(
        self,
        on_outputs: Callable[[list[Any]], None],
        on_failure: Callable[[str, BaseException, bool], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self.on_outputs = on_outputs  # the outputs of one step
        self.on_failure = on_failure  # request id, why, whether the thread is about to end with it
        self.on_end = on_end  # the thread ends, with the error that ended it

    def silence(self) -> None:
        """Report nothing any more."""
        self.on_outputs = lambda outputs: None
        self.on_failure = lambda request_id, error, fatal: None
        self.on_end = lambda error: None


class _Router(OutputRouter):  # type: ignore[misc]
    """Hands each step's outputs to the listener at once, rather than one by one through a lock and a queue."""

    def __init__(self, listener: Listener, is_stopping: Callable[[], bool]) -> None:
        super().__init__()
        self._listener = listener
        self._is_stopping = is_stopping

    def deliver(self, output: Any) -> None:
        self._listener.on_outputs([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._listener.on_outputs(outputs)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Keeps the exception, of which an output would carry the text only."""
        self._listener.on_failure(state.request_id, error, self._is_stopping())


class Core:
    """A loaded model with its manager.

    Attributes:
        room: the most tokens, prompt and answer together, that one request may have.
        eos: the token ids that end an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ModelOptions, listener: Listener) -> None:
        self.tokenizer = tokenizer
        self.sampler = Sampler()
        self.eos = _eos_ids(model, tokenizer)
        self.vocabulary_size: int = model.get_input_embeddings().weight.shape[0]
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._listener = listener
        self._model = model
        self._manager = _build_manager(model, options, self.sampler, listener)
        self._cache = self._manager.batch_processor.cache
        self.room = _room(model.config.get_text_config(), self._cache, options)

    def start(self) -> None:
        """Start the generation thread. It is a daemon because the caller is one: no model may hold the process."""
        if not threading.current_thread().daemon:
            raise RuntimeError("The generation thread must be started by a daemon thread, whose nature it inherits.")
        _generating.add(self)
        self._manager.start()

    def add(self, request_id: str, token_ids: list[int], max_new_tokens: int, stop_ids: list[int]) -> bool:
        """Queue a request for the next step; False if the generation thread is gone."""
        added = self._manager.add_request(
            token_ids,
            request_id=request_id,
            max_new_tokens=max_new_tokens,
            streaming=True,
            eos_token_id=stop_ids or -1,
        )
        return added is not None

    def cancel(self, request_id: str) -> None:
        """Free what the request holds before the next step."""
        self._manager.cancel_request(request_id)

    @property
    def fatal_error(self) -> BaseException | None:
        """What ended the generation thread, if it was an error."""
        error: BaseException | None = self._manager.background_thread_status.fatal_error
        return error

    def free_share(self) -> float:
        """The share of the cache that no request holds."""
        cache = self._cache
        if hasattr(cache, "get_num_free_blocks"):  # transformers before page_size; kept prefixes count as free
            return float(cache.get_num_free_blocks() / cache.num_blocks)
        kept = sum(len(part.ledger.cached_blocks) * part.bytes_per_block for part in cache.cache_allocators.values())
        free = cache.compute_free_capacity(relative=False) + kept
        return float(free / (cache.num_sectors * cache.bytes_per_sector))

    def halt(self, timeout: float) -> bool:
        """End the generation thread; False if it does not end in time."""
        _generating.discard(self)
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=timeout, hard_stop=True)
        return not self._manager.is_running()

    def close(self, timeout: float) -> bool:
        """End the generation thread and let go of model and cache; False if the thread does not end in time."""
        manager = self._manager
        ended = self.halt(timeout)
        manager.batch_processor = None
        manager._run_generation_loop = None  # a cycle otherwise
        self._manager = self._model = self._cache = self.tokenizer = None
        del manager
        free_memory()
        return ended


def load(options: ModelOptions, listener: Listener) -> Core:
    """Load model and tokenizer, make the cache, and start generating."""
    loaded = threading.Event()
    _loading.add(loaded)
    try:
        core = _load_core(options, listener)
        if _leaving.is_set():
            raise RuntimeError("The interpreter is ending.")
        core.start()
        return core
    finally:
        _loading.discard(loaded)
        loaded.set()


def _load_core(options: ModelOptions, listener: Listener) -> Core:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _progress_bar_on_terminals_only():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            options.model, trust_remote_code=options.trust_remote_code, revision=options.revision or "main"
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=_dtype(options.dtype, device),
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
            revision=options.revision or "main",
        )
    if options.attn_implementation is None and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa knows no soft cap
    return Core(model.to(device).eval(), tokenizer, options, listener)


@atexit.register
def _end_threads() -> None:
    """An interpreter that ends while a daemon thread is inside torch aborts the process (before Python 3.14).

    It runs before a bridge's own end, since this module is imported later, and hence is quiet about requests in flight.
    """
    _leaving.set()
    end = time.monotonic() + EXIT_GRACE
    for loaded in list(_loading):
        loaded.wait(max(0.0, end - time.monotonic()))
    for core in list(_generating):
        core._listener.silence()
        core.halt(EXIT_GRACE)


def free_memory() -> None:
    """Give memory of dropped tensors back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dtype(wanted: Any, device: str) -> Any:
    if wanted is None:
        return torch.float32 if device.startswith("cpu") else "auto"
    return getattr(torch, wanted) if isinstance(wanted, str) and wanted != "auto" else wanted


@contextlib.contextmanager
def _progress_bar_on_terminals_only() -> Iterator[None]:
    """Bars in a log file are clutter. The setting is the process's, hence restored."""
    hide = transformers_logging.is_progress_bar_enabled() and not (sys.stderr and sys.stderr.isatty())
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The model's own end tokens, which may be one or several, and the tokenizer's."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(token for token in found if token >= 0)


def _build_manager(model: Any, options: ModelOptions, sampler: Sampler, listener: Listener) -> Any:
    # Neutral: what the model's author recommends for sampling is for the caller to ask for.
    neutral = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(
        generation_config=neutral, continuous_batching_config=_batching_config(model, options)
    )
    status = manager.background_thread_status
    if _attends_by_segments(model, options):
        transformers.AttentionInterface.register(attention.NAME, attention.segment_attention)
        model.set_attn_implementation(attention.NAME)  # after the manager has looked at it, before the cache does
    manager.output_router = _Router(listener, lambda: bool(status.local_status != status.DONT_STOP))
    manager.logit_processor = sampler
    generate: Any = manager._run_generation_loop
    threads = _thread_count(model, options)

    def generate_and_tell() -> None:
        nonlocal generate
        threading.current_thread().name = "lmbridge generation"
        try:
            _use_threads(threads)
            with torch.inference_mode():  # a few per cent less to do at each operation than without gradients alone
                generate()
            error = status.fatal_error
        except BaseException as exit_call:  # transformers keeps exceptions to itself, but not SystemExit
            error = exit_call
        finally:
            generate = None  # an error's traceback leads here, and would keep the model
        listener.on_end(error)

    manager._run_generation_loop = generate_and_tell
    manager.warmup()  # makes the cache, here rather than in its thread, so that a lack of memory is told at once
    return manager


def _attends_by_segments(model: Any, options: ModelOptions) -> bool:
    """Whether our attention takes the place of transformers' sdpa, which on a CPU computes much to mask it."""
    chosen = options.attn_implementation is not None
    return not chosen and model.device.type == "cpu" and model.config._attn_implementation in ("sdpa", "paged|sdpa")


def _thread_count(model: Any, options: ModelOptions) -> int | None:
    """How many threads torch should use in a step; None for its own choice."""
    tiny = model.device.type == "cpu" and model.num_parameters() < TINY_MODEL
    return options.threads or (1 if tiny else None)


def _use_threads(count: int | None) -> None:
    """Have torch use so many threads for what the calling thread computes.

    torch keeps the number for each thread, but takes the last one set for threads to come, hence one sets it back.
    """
    usual = torch.get_num_threads()
    if count is not None and count != usual:
        torch.set_num_threads(count)
        restorer = threading.Thread(target=torch.set_num_threads, args=(usual,), daemon=True)
        restorer.start()
        restorer.join()


def _batching_config(model: Any, options: ModelOptions) -> Any:
    on_cpu = model.device.type == "cpu"
    page = options.page_size or (CPU_PAGE if on_cpu else 256)
    chunk = options.max_chunk_size or (CPU_CHUNK if on_cpu else None)
    settings = {
        "num_blocks": options.num_blocks,
        "max_batch_tokens": None if chunk is None else max(chunk, options.max_batch_size),
        "max_requests_per_batch": options.max_batch_size,
        "max_memory_percent": options.cache_share,
        "use_cuda_graph": False,
        "use_async_batching": False,
        "auto_switch_to_flash": not on_cpu and options.attn_implementation is None,
        "page_size": page,
        "block_size": page,
    }
    if on_cpu:
        settings["max_memory_percent"] = None  # of the machine's memory, where num_blocks is the real bound
        if options.num_blocks is None:
            settings["num_blocks"] = _cpu_blocks(model, options, page)
    if "page_size" in _KNOWN:  # block_size is its name before 5.18
        del settings["block_size"]
    return ContinuousBatchingConfig(**{name: value for name, value in settings.items() if name in _KNOWN})


def _cpu_blocks(model: Any, options: ModelOptions, page: int) -> int:
    """Enough blocks for a full batch of full contexts, within the share of memory allowed."""
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize
    wanted = options.max_batch_size * (_context(config, options) or 4096)
    memory = psutil.virtual_memory().available
    budget = int(memory * (options.cache_share or CPU_CACHE_SHARE))
    if options.cache_share is None:
        budget = min(budget, CPU_CACHE_LIMIT)
    return max(1, min(-(-wanted // page), budget // (per_token * page)))


def _context(config: Any, options: ModelOptions) -> int | None:
    limits: list[int | None] = [getattr(config, "max_position_embeddings", None), options.max_context]
    return min((limit for limit in limits if limit), default=None)


def _room(config: Any, cache: Any, options: ModelOptions) -> int:
    if hasattr(cache, "num_pages"):  # before page_size: every layer group takes blocks from one pool
        capacity: int = cache.num_pages // cache.num_groups
    else:
        from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

        capacity = infer_max_single_request_tokens(cache)
    context = _context(config, options)
    return capacity if context is None else min(capacity, context)
