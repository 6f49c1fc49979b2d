"""What V2 and V3 have in common: a loaded model, and what its folder says about it.

Rule: an ``ExLlamaModel`` belongs to the generation thread; the functions here may be called on any.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmbridge.messages import GenerationConfig

SETTINGS = ("config.json", "generation_config.json")


class ExLlamaModel(ABC):
    """A model in ExLlama, with its cache and generator.

    Attributes:
        generator: ExLlama's.
        room: the most tokens, prompt and answer together, of one request.
        batch: how many requests the generator works on at once.
        vocabulary: how many tokens the model knows.
    """

    generator: Any
    room: int
    batch: int
    vocabulary: int

    @abstractmethod
    def job(self, prompt: Sequence[int], budget: int, ends: Sequence[int], config: GenerationConfig, mask: Any) -> Any:
        """ExLlama's job for a request, with new settings: ExLlama's defaults are not neutral, and some keep state.

        Args:
            budget: the most tokens of its answer.
            ends: tokens that end it.
            mask: what its grammar allows, or None.
        """

    def row(self, prompt: Sequence[int]) -> Any:
        """The prompt in ExLlama's form."""
        import torch

        return torch.tensor([list(prompt)], dtype=torch.long)

    def biases(self, given: Mapping[int, float]) -> Any:
        """What is added to each token's score."""
        import torch

        row = torch.zeros(self.generator.padded_vocab_size)
        for token, bias in given.items():
            row[token] = bias
        return row

    def footprint(self) -> int:
        """Device bytes held by this process, which mostly has no other model."""
        import torch

        return sum(torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count()))

    def close(self) -> None:
        """Free the model, and the threads of the generator."""
        generator, self.generator = self.generator, None
        for name in ("sampling_pool", "filter_pool"):
            pool = getattr(generator, name, None)
            if pool is not None:
                pool.shutdown(wait=False)
        generator.model.unload()
        del generator
        gc.collect()
        _empty_cache()


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # the device has failed
            torch.cuda.empty_cache()


def ending_ids(folder: str, tokenizer: Any) -> frozenset[int]:
    """The end tokens named in the folder; ExLlama stops at none by itself, and V2 reads only one."""
    found = {tokenizer.eos_token_id}
    for name in SETTINGS:
        path = Path(folder, name)
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        for part in (settings, settings.get("text_config") or {}):
            ids = part.get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [ids])
    return frozenset(token for token in found if isinstance(token, int))


def fetched(model: str, revision: str | None) -> str:
    """The model's folder, downloaded from the hub if needed."""
    if os.path.isdir(model):
        return model
    import huggingface_hub

    from lmbridge.engines.transformers.hub import only_from_cache

    cached = only_from_cache(model, revision)
    return str(huggingface_hub.snapshot_download(model, revision=revision, local_files_only=cached))
