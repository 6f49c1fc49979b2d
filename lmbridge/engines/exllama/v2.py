"""The ExLlamaV2 engine: folders in EXL2, GPTQ, or unquantised.

Rule: ``V2Model`` belongs to the generation thread; ExLlamaV2 is imported there, when the engine starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lmbridge.engines.base import Library
from lmbridge.engines.exllama.engine import ExLlamaEngine
from lmbridge.engines.exllama.library import V2
from lmbridge.engines.exllama.model import ExLlamaModel
from lmbridge.engines.exllama.options import ExLlamaOptions, whole_pages
from lmbridge.log import logger
from lmbridge.messages import GenerationConfig

OUTPUTS = 16
"""The least number of positions per step with memory for their scores; each answer needs one."""
_CACHES = {16: "ExLlamaV2Cache", 8: "ExLlamaV2Cache_Q8", 6: "ExLlamaV2Cache_Q6", 4: "ExLlamaV2Cache_Q4"}


class V2Model(ExLlamaModel):
    """A model that ExLlamaV2 has loaded.

    Without flash-attn there are no pages, and the generator works on one request at a time.
    """

    def __init__(self, folder: str, options: ExLlamaOptions) -> None:
        import exllamav2
        from exllamav2 import attn
        from exllamav2.generator import ExLlamaV2DynamicGenerator

        config = exllamav2.ExLlamaV2Config(folder)
        config.arch_compat_overrides(quiet=True)
        context = options.max_context or config.max_seq_len
        tokens = options.cache_tokens or whole_pages(context)
        paged = bool(attn.has_flash_attn_with_paged and not config.no_flash_attn)
        self.batch = options.max_batch_size if paged else 1
        self.room = min(context, tokens)
        self.vocabulary = config.vocab_size
        config.max_seq_len = whole_pages(context)
        config.max_input_len = min(options.max_chunk_size, config.max_seq_len)
        config.max_attention_size = config.max_input_len**2
        config.max_output_len = min(max(OUTPUTS, self.batch), config.max_input_len)
        model = exllamav2.ExLlamaV2(config)
        cache = _load(exllamav2, model, options, tokens)
        self.generator = ExLlamaV2DynamicGenerator(
            model,
            cache,
            exllamav2.ExLlamaV2Tokenizer(config),
            max_batch_size=self.batch,
            max_chunk_size=config.max_input_len,
            max_q_size=1,  # without a draft model a step adds one token to each answer
            paged=paged,
        )
        if not paged:
            logger.warning(
                "Without flash-attn (>= 2.5.7) ExLlamaV2 has no pages and runs one request at a time: "
                "pip install flash-attn, or use the engine exllamav3, which needs none."
            )

    def settings(self, config: GenerationConfig) -> Any:
        """Neutral unless requested; ExLlamaV2's own defaults sample and penalise repetition."""
        from exllamav2.generator import ExLlamaV2Sampler

        settings = ExLlamaV2Sampler.Settings(
            token_repetition_penalty=_or(config.repetition_penalty, 1.0),
            temperature=_or(config.temperature, 1.0) if config.samples else 1.0,
            top_k=_or(config.top_k, 0) if config.samples else 1,
            top_p=_or(config.top_p, 0.0) if config.samples else 0.0,
            min_p=_or(config.min_p, 0.0) if config.samples else 0.0,
        )
        if config.logit_bias:
            settings.token_bias = self.biases(config.logit_bias)
        return settings

    def job(self, prompt: Sequence[int], budget: int, ends: Sequence[int], config: GenerationConfig, mask: Any) -> Any:
        from exllamav2.generator import ExLlamaV2DynamicJob

        return ExLlamaV2DynamicJob(
            self.row(prompt),
            max_new_tokens=budget,
            min_new_tokens=config.min_new_tokens or 0,
            gen_settings=self.settings(config),
            seed=config.random_seed,
            stop_conditions=list(ends),
            filters=None if mask is None else [_filter(mask, self.generator)],
        )


def _load(library: Any, model: Any, options: ExLlamaOptions, tokens: int) -> Any:
    """Load the weights; returns the cache, which is on the same devices."""
    kind = getattr(library, _CACHES[options.cache_bits])
    if options.tp > 1:
        model.load_tp(options.share(), expect_cache_tokens=tokens, expect_cache_base=kind)
        return library.ExLlamaV2Cache_TP(model, base=kind, max_seq_len=tokens)
    if options.share() is not None:
        model.load(options.share())
        return kind(model, max_seq_len=tokens)
    cache = kind(model, max_seq_len=tokens, lazy=True)
    model.load_autosplit(cache)
    return cache


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _filter(mask: Any, generator: Any) -> Any:
    """The mask as one of ExLlamaV2's filters."""
    import torch
    from exllamav2.generator.filters import ExLlamaV2Filter

    class Following(ExLlamaV2Filter):  # type: ignore[misc]
        def begin(self, prefix_str: str) -> None:
            """Called before the first token."""

        def feed(self, token: torch.Tensor) -> None:
            mask.chosen(int(token))

        def use_background_worker(self) -> bool:
            return True

        def can_mask_logits(self) -> bool:
            return True

        def prepare_logit_mask(self) -> bool:
            mask.fill()
            return True

        def mask_logits(self, logits: torch.Tensor) -> torch.Tensor:
            return logits.masked_fill(~mask.allowed(len(logits)), float("-inf"))

    return Following(generator.model, generator.tokenizer)


class ExLlamaV2Engine(ExLlamaEngine):
    """A model under ExLlamaV2.

    Args:
        model: ``"demo"``, a folder in EXL2 or GPTQ, or one with unquantised safetensors, or a hub id.
        device: ``"cuda"``, or ``"cuda:1"`` to use that GPU alone; by default as many as the model needs.
        gpu_split: gigabytes for the weights on each GPU, for example ``[20, 24]``.
        tp: above 1, spread each layer over the GPUs.
        max_batch_size: requests in a step; 1 without flash-attn.
        max_chunk_size: prompt tokens in a step, a multiple of 256.
        max_context: the most tokens of prompt and answer together; by default the model's own limit.
        cache_tokens: tokens in the cache for all requests together, a multiple of 256; by default ``max_context``.
        cache_bits: 16, 8, 6 or 4 for each number in the cache.
        revision: branch, tag or commit on the hub.
    """

    name: ClassVar[str] = "exllamav2"
    libraries = (Library("exllamav2", "0.3.2", 'pip install "lmbridge[exllamav2]"'),)
    supports: ClassVar[frozenset[str]] = ExLlamaEngine.supports
    cache_widths = tuple(_CACHES)
    library = V2

    def _open(self, folder: str) -> ExLlamaModel:
        return V2Model(folder, self._options)
