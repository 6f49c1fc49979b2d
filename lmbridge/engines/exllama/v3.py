"""The ExLlamaV3 engine: folders in EXL3, or unquantised.

Rule: ``V3Model`` belongs to the generation thread; ExLlamaV3 is imported there, when the engine starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lmbridge.engines.base import Library
from lmbridge.engines.exllama.engine import ExLlamaEngine
from lmbridge.engines.exllama.library import V3
from lmbridge.engines.exllama.model import ExLlamaModel
from lmbridge.engines.exllama.options import ExLlamaOptions, whole_pages
from lmbridge.messages import GenerationConfig


class V3Model(ExLlamaModel):
    """A model that ExLlamaV3 has loaded."""

    def __init__(self, folder: str, options: ExLlamaOptions) -> None:
        import exllamav3

        config = exllamav3.Config.from_directory(folder)
        context = options.max_context or config.max_position_embeddings
        tokens = options.cache_tokens or whole_pages(context + 1)
        self.room = min(context, tokens - 1)  # the last position stays free
        self.vocabulary = config.vocab_size
        model = exllamav3.Model.from_config(config)
        kind: dict[str, Any] = {}
        if options.cache_bits < 16:
            bits = options.cache_bits
            kind = {"layer_type": exllamav3.CacheLayer_quant, "k_bits": bits, "v_bits": bits}
        # before the model is loaded, which makes the cache's tensors
        cache = exllamav3.Cache(model, tokens, max_batch_size=options.max_batch_size, **kind)
        split: dict[str, Any] = {"use_per_device": options.share()}
        if options.gpu_split is None:  # None leaves it to the loader
            split = {"device": None if options.device == "cuda" else options.device}
        model.load(
            tensor_p=options.tp > 1,
            max_chunk_size=options.max_chunk_size,
            max_batch_size=options.max_batch_size,
            **split,
        )
        self.generator = exllamav3.Generator(
            model,
            cache,
            exllamav3.Tokenizer.from_config(config),
            max_batch_size=options.max_batch_size,
            max_chunk_size=options.max_chunk_size,
            prefill_cooldown=0,  # with the default 4, batches of short answers never fill up
        )
        self.batch = self.generator.max_batch_size

    def sampler(self, config: GenerationConfig) -> Any:
        """Neutral unless requested."""
        from exllamav3 import ComboSampler

        given: dict[str, Any] = {"rep_p": config.repetition_penalty, "logit_bias": config.logit_bias}
        if config.samples:
            given |= {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        else:
            given["temperature"] = 0.0
        return ComboSampler(**{name: value for name, value in given.items() if value is not None})

    def job(self, prompt: Sequence[int], budget: int, ends: Sequence[int], config: GenerationConfig, mask: Any) -> Any:
        from exllamav3 import Job

        return Job(
            self.row(prompt),
            max_new_tokens=budget,
            min_new_tokens=config.min_new_tokens or 0,
            sampler=self.sampler(config),
            seed=config.random_seed,
            stop_conditions=list(ends),
            filters=None if mask is None else [_filter(mask, self.generator)],
            return_probs=config.logprobs is not None,
            return_top_tokens=config.logprobs or 0,
        )

    def close(self) -> None:
        self.generator.close()
        super().close()


def _filter(mask: Any, generator: Any) -> Any:
    """The mask as one of ExLlamaV3's filters."""
    import torch
    from exllamav3 import Filter

    class Following(Filter):  # type: ignore[misc]
        def reset(self) -> None:
            """Called only before the first token, since nothing is ever rolled back."""

        def accept_token(self, token: int) -> None:
            mask.chosen(token)

        def get_next_logit_mask(self) -> torch.Tensor:
            bits: torch.Tensor = mask.fill()
            return bits.view(torch.int32)

        def is_completed(self) -> bool:
            return False  # the end token is then among those allowed

    return Following(generator.tokenizer, None, None, False)


class ExLlamaV3Engine(ExLlamaEngine):
    """A model under ExLlamaV3.

    Args:
        model: ``"demo"``, a folder in EXL3 or with unquantised safetensors, or a hub id.
        device: ``"cuda:1"`` and the like to use that GPU alone; by default as many as the model needs.
        gpu_split: gigabytes for the weights on each GPU, for example ``[20, 24]``.
        tp: above 1, spread each layer over the GPUs.
        max_batch_size: requests in a step.
        max_chunk_size: prompt tokens in a step, a multiple of 256.
        max_context: the most tokens of prompt and answer together; by default the model's own limit.
        cache_tokens: tokens in the cache for all requests together, a multiple of 256; by default ``max_context``.
        cache_bits: 16, or from 8 to 2 for each number in the cache.
        revision: branch, tag or commit on the hub.
    """

    name: ClassVar[str] = "exllamav3"
    libraries = (Library("exllamav3", "1.6.5", 'pip install "lmbridge[exllamav3]"'),)
    supports: ClassVar[frozenset[str]] = ExLlamaEngine.supports | {"logprobs"}
    cache_widths = (16, 8, 7, 6, 5, 4, 3, 2)
    library = V3

    def _open(self, folder: str) -> ExLlamaModel:
        return V3Model(folder, self._options)
