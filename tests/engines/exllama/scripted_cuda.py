"""ExLlama without CUDA: its real generators, jobs, page tables, samplers, filters and tokenizers on scripted kernels.

What is scripted: the compiled extension (the few of its functions that a generator calls, in Python), triton, pinned
memory, and model and cache. The cache holds the tokens that were put into it, by the real block tables, and the model's
next token follows from all that it finds there: a page that is mixed up, or given to two at once, shows in the answer.

Rule: nothing of lmbridge's engines is known here. The extensions are scripted for the whole process, before ExLlama is
imported; model and cache by a monkeypatch.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tests.engines.conftest import BYTES, EOS

LEAST, SPREAD = BYTES["a"], 26  # the scripted model says small letters
ENDING = BYTES["!"]  # a prompt with this one is answered in a few letters
TURN = 11  # what the chat template puts between such a prompt and its answer
SHORT = 8
PAGE = 256


class Script:
    """What the scripted model is to do beside answering; guarded by nothing, each is set in one step."""

    def __init__(self) -> None:
        self.failure: Exception | None = None  # raised by the next step
        self.gate = threading.Event()  # steps wait for it
        self.gate.set()
        self.steps = 0
        self.loaded = 0  # models that hold memory
        self.loads: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []  # how models were loaded
        self.rows: list[int] = []  # sequences in each step that generates
        self.caches: weakref.WeakSet[Cache] = weakref.WeakSet()

    def step(self, rows: int) -> None:
        """At the begin of each step."""
        self.gate.wait(60)
        self.steps += 1
        if rows:
            self.rows.append(rows)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


script = Script()


def scores(sequence: Sequence[int], width: int) -> torch.Tensor:
    """The scripted model's: clear about one token, the one after it next, all else far below."""
    said = len(sequence) - sequence.index(ENDING) - 1 - TURN if ENDING in sequence else 0
    row = torch.full((width,), -30.0)
    row[LEAST : LEAST + SPREAD] = -8.0
    place = sum((at % 7 + 1) * token for at, token in enumerate(sequence)) % SPREAD
    row[LEAST + place], row[LEAST + (place + 1) % SPREAD] = 8.0, 7.0
    if said >= SHORT:
        row[EOS] = 20.0
    return row


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the scripted model says greedily, without its ending token."""
    sequence = list(prompt)
    for _ in range(count):
        token = int(scores(sequence, EOS + 1).argmax())
        if token == EOS:
            break
        sequence.append(token)
    return sequence[len(prompt) :]


# ------------------------------------------------------------------------------------------------------ model and cache


class Cache:
    """Holds tokens where a real one holds what was computed of them; by either library's interface."""

    batch_size = 1
    initialized = False

    def __init__(self, model: Any, tokens: int = 0, *, max_seq_len: int = 0, lazy: bool = False, **_: Any) -> None:
        self.model = model
        self.max_seq_len = self.max_num_tokens = tokens or max_seq_len
        self.current_seq_len = 0
        self.tokens = torch.zeros((1, self.max_num_tokens, 1, 1), dtype=torch.long)
        self.num_slots, self.max_history = 256, 0
        model.caches.append(self)
        script.caches.add(self)

    def all_tensors(self) -> list[torch.Tensor]:
        return [self.tokens]

    def get_all_tensors(self) -> list[torch.Tensor]:
        return [self.tokens.view(-1, PAGE)]

    def copy_states(self, target: Cache, start: int, count: int, to: int, *_: int) -> None:
        target.tokens[:, to : to + count] = self.tokens[:, start : start + count].clone()

    def copy_page(self, target: Cache, page: int, to: int, count: int) -> None:
        self.copy_states(target, page * PAGE, count, to * PAGE)

    def write(self, places: torch.Tensor, ids: torch.Tensor) -> None:
        self.tokens[0, places, 0, 0] = ids

    def read(self, places: torch.Tensor) -> list[int]:
        found: list[int] = self.tokens[0, places, 0, 0].tolist()
        return found


class Model:
    """Answers by what the cache holds; by either library's interface."""

    loaded_tp = False
    output_device = torch.device("cpu")

    def __init__(self, config: Any) -> None:
        self.config = config
        self.caps: dict[str, Any] = {}
        self.caches: list[Cache] = []
        self.width = -(-config.vocab_size // 32) * 32

    @classmethod
    def from_config(cls, config: Any) -> Model:
        return cls(config)

    def load(self, *given: Any, **named: Any) -> None:
        if hasattr(self, "load_gen"):  # V3's, of which load takes the parameters
            inspect.signature(self.load_gen).bind(*given, **named)
        self._load("load", *given, **named)

    def load_autosplit(self, cache: Cache) -> None:
        self._load("load_autosplit")

    def load_tp(self, *given: Any, **named: Any) -> None:
        self._load("load_tp", *given, **named)

    def _load(self, how: str, *given: Any, **named: Any) -> None:
        script.loads.append((how, given, named))
        script.loaded += 1
        for cache in self.caches:
            cache.initialized = True

    def unload(self) -> None:
        script.loaded -= 1

    def get_cache_layers(self) -> list[Any]:
        return []

    def prefetch_tokens(self, ids: list[int]) -> None:
        """A real one fetches rows of its embeddings."""

    def forward_chunk(
        self, input_ids: torch.Tensor, attn_params: Any, cache: Cache, preprocess_only: bool = False, **_: Any
    ) -> dict[str, torch.Tensor]:
        """V2's."""
        if attn_params.paged:
            tables, starts = attn_params.block_index, attn_params.cache_seqlens.tolist()
        else:
            tables, starts = torch.arange(cache.max_seq_len // PAGE)[None], [attn_params.past_len]
        return {"logits": self._run(input_ids, cache, tables, starts, preprocess_only)}

    def prefill(self, input_ids: torch.Tensor, params: dict[str, Any]) -> None:
        """V3's."""
        self._run(input_ids, params["cache"], params["block_table"], params["cache_seqlens"].tolist(), True)

    def forward(self, input_ids: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """V3's."""
        starts = params["cache_seqlens"].tolist()
        return self._run(input_ids, params["cache"], params["block_table"], starts, False).half()

    def _run(
        self, ids: torch.Tensor, cache: Cache, tables: torch.Tensor, starts: list[int], silent: bool
    ) -> torch.Tensor:
        script.step(0 if silent else len(ids))
        found = []
        for row, table, start in zip(ids, tables.view(len(ids), -1), starts, strict=True):
            end = start + len(row)
            positions = torch.arange(end)
            places = table[positions // PAGE].long() * PAGE + positions % PAGE
            cache.write(places[start:], row)
            if not silent:
                found.append(scores(cache.read(places), self.width))
        return torch.stack(found)[:, None] if found else torch.empty(0)


# ----------------------------------------------------------------------------------------- functions of the extensions


def count_match(one: torch.Tensor, other: torch.Tensor, most: int) -> int:
    count = min(most, one.shape[-1], other.shape[-1])
    same = (one[0, :count] == other[0, :count]).tolist()
    return same.index(False) if False in same else count


def rotate_v2(cache: torch.Tensor, order: torch.Tensor, _: torch.Tensor) -> None:
    pages = order.tolist()
    cache[pages] = cache[pages[1:] + pages[:1]].clone()


def rotate_v3(cache: torch.Tensor, moves: torch.Tensor, temp: torch.Tensor) -> None:
    for to, start in moves.view(-1, 2).tolist():
        page = temp if start < 0 else cache[start]
        (temp if to < 0 else cache[to]).copy_(page)


def penalised(given: torch.Tensor, sequence: torch.Tensor, penalty: float) -> torch.Tensor:
    seen = torch.tensor(sorted(set(sequence.flatten().tolist())))
    changed = given.float().clone()
    changed[..., seen] = torch.where(changed[..., seen] > 0, changed[..., seen] / penalty, changed[..., seen] * penalty)
    return changed


def sample_v2(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, top_a: float, min_p: float, *rest: Any
) -> list[float]:
    random, tokens, probs = rest[2:5]
    row = logits[0, 0]
    if top_k == 1 or temperature < 0.01:
        tokens[0, 0], probs[0, 0] = row.argmax(), 1.0
        return []
    likely, order = (row / temperature).softmax(-1).sort(descending=True)
    keep = torch.ones_like(likely, dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    if 0 < top_p < 1:
        keep &= likely.cumsum(-1) - likely < top_p
    keep &= likely >= min_p * likely[0]
    likely = likely * keep / (likely * keep).sum()
    place = min(int((likely.cumsum(-1) < random).sum()), int(keep.sum()) - 1)
    tokens[0, 0], probs[0, 0] = order[place], likely[place]
    return []


def add_to(logits: torch.Tensor, bias: torch.Tensor) -> None:
    logits += bias


def penalise_v2(sequence: torch.Tensor, penalty: float, *rest: Any) -> None:
    rest[-1].copy_(penalised(rest[-1], sequence, penalty))


def penalise_v3(given: torch.Tensor, changed: torch.Tensor, sequence: torch.Tensor, penalty: float, *_: Any) -> None:
    changed.copy_(penalised(given, sequence, penalty))


def noise(given: torch.Tensor, changed: torch.Tensor, seed: int) -> None:
    draws = torch.rand(given.shape, generator=torch.Generator().manual_seed(seed))
    changed.copy_(given.float() - (-draws.clamp_min(1e-20).log()).log())


def noise_log(given: torch.Tensor, changed: torch.Tensor, seed: int) -> None:
    noise(given.float().log(), changed, seed)


def mask_bits(given: torch.Tensor, masked: torch.Tensor, bits: torch.Tensor) -> None:
    places = torch.arange(given.shape[-1])
    allowed = bits[0][places // 32] >> (places % 32) & 1
    masked.copy_(given.masked_fill(allowed == 0, float("-inf")))


def stage_decode(
    arena: torch.Tensor, width: int, tables: list[torch.Tensor], starts: list[int], offsets: list[int],
    batch: torch.Tensor | None, sequences: list[torch.Tensor], pages: list[torch.Tensor], places: list[int],
) -> None:  # fmt: skip
    rows = len(tables)
    assert not offsets
    index = arena[: rows * width].view(rows, width).zero_()
    for row, table in enumerate(tables):
        flat = table.view(-1)[:width]
        index[row, : len(flat)] = flat
        arena[rows * width + row] = starts[row]
    for row, (sequence, page, place) in enumerate(zip(sequences, pages, places, strict=True)):
        assert batch is not None
        batch[row, 0] = page[0, place] = sequence[0, starts[row]]


_V2: dict[str, Callable[..., Any]] = {
    "count_match": count_match,
    "cache_rotate": rotate_v2,
    "sample_basic": sample_v2,
    "fast_fadd_cpu": add_to,
    "apply_rep_penalty": penalise_v2,
}
_V3: dict[str, Callable[..., Any]] = {
    "count_match_tensor": count_match,
    "cache_rotate": rotate_v3,
    "generator_stage_decode": stage_decode,
    "gumbel_noise_f16": noise,
    "gumbel_noise_f32": noise,
    "gumbel_noise_log": noise_log,
    "apply_rep_pens": penalise_v3,
    "apply_logit_bitmask": mask_bits,
}


class _Extension(types.ModuleType):
    """A compiled extension of which only what is scripted can be called."""

    def __init__(self, name: str, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(name)
        origin = f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=MagicMock(), origin=origin)
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unscripted(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} is not scripted")

        return unscripted


class _Torch(types.ModuleType):
    """torch, in which pinned memory is ordinary and there is no device to wait for."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(synchronize=lambda *_: None)

    def empty(self, *size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.empty(*size, **options)

    def zeros(self, *size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def import_v2() -> None:
    """Import exllamav2, which finds an extension; for good."""
    sys.modules.setdefault("exllamav2_ext", _Extension("exllamav2_ext", _V2))
    importlib.import_module("exllamav2")


def import_v3() -> None:
    """Import exllamav3, which finds an extension, and triton; for good."""
    os.environ["EXL3_FUSED_SAMPLER"] = "0"  # each step of a sampler by itself, in torch
    sys.modules.setdefault("exllamav3_ext", _Extension("exllamav3_ext", _V3))
    missing = [name for name in ("triton", "triton.language") if name not in sys.modules]
    sys.modules.update((name, MagicMock()) for name in missing)
    for name in ("exllamav3", "exllamav3.architecture.architectures"):  # the second would be imported later
        importlib.import_module(name)
    for name in missing:  # others look whether it is there
        del sys.modules[name]


def script_v2(patch: pytest.MonkeyPatch, paged: bool) -> None:
    """Put the scripted model and cache in the place of exllamav2's.

    Args:
        paged: as though flash-attn were installed.
    """
    import_v2()
    patch.setattr("exllamav2.ExLlamaV2", Model)
    for name in ("ExLlamaV2Cache", "ExLlamaV2Cache_Q4", "ExLlamaV2Cache_TP"):
        patch.setattr(f"exllamav2.{name}", Cache)
    patch.setattr("exllamav2.attn.has_flash_attn_with_paged", paged)


def script_v3(patch: pytest.MonkeyPatch) -> None:
    """Put the scripted model, cache and memory in the place of exllamav3's."""
    import_v3()
    loader = importlib.import_module("exllamav3").Model.load_gen
    patch.setattr(Model, "load_gen", loader, raising=False)  # whose parameters are looked at
    patch.setattr("exllamav3.Model", Model)
    patch.setattr("exllamav3.Cache", Cache)
    patch.setattr("exllamav3.generator.generator.cuda_sync_active", lambda: None)
    for name in ("generator", "job"):
        patch.setattr(f"exllamav3.generator.{name}.torch", _Torch())
