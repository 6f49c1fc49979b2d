"""What of ExLlama the engines rely on, checked before anything is loaded.

Rule: ExLlama is imported inside the functions only, on the generation thread. What is named here is everything that the
other files touch, so that a changed version is reported by name at the start rather than in the middle of
somebody's request.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from lmbridge.engines.parts import Places, missing_members, missing_parameters
from lmbridge.errors import MissingDependencyError


@dataclass(frozen=True)
class Parts:
    """What the engine relies on in one library.

    Attributes:
        package: its name, to import and to install.
        tried: the tested version.
        parameters: callable to the parameters given to it.
        members: class to the names of its members.
    """

    package: str
    tried: str
    parameters: Places
    members: Places

    def check(self) -> None:
        """Check that the library is installed and has all of this.

        Raises:
            MissingDependencyError: it is not installed, cannot be built here, or has changed; the message says which.
        """
        try:
            importlib.import_module(self.package)
        except ImportError as cause:
            raise MissingDependencyError(
                f"The engine {self.package} needs {self.package} >= {self.tried} ({cause}); install it with: "
                f"pip install 'lmbridge[{self.package}]'"
            ) from cause
        except Exception as cause:  # PyPI's package compiles its CUDA part on first import
            raise MissingDependencyError(
                f"{self.package} cannot compile its CUDA part: {cause}. It needs a GPU, the CUDA toolkit (nvcc), a C++ "
                f"compiler and ninja; or install a wheel from {self.package}'s releases that was built for your torch."
            ) from cause
        missing = [*missing_parameters(self.parameters), *missing_members(self.members)]
        if missing:
            raise MissingDependencyError(
                f"This {self.package} lacks what the adapter relies on: {', '.join(missing)}. Use the version it was "
                f"tested with (pip install '{self.package}=={self.tried}'), or a newer lmbridge."
            )


_V2_CACHES = ("ExLlamaV2Cache", "ExLlamaV2Cache_Q8", "ExLlamaV2Cache_Q6", "ExLlamaV2Cache_Q4")
_V2_GENERATOR = "exllamav2.generator:ExLlamaV2DynamicGenerator"

V2 = Parts(
    "exllamav2",
    "0.3.2",
    {
        "exllamav2:ExLlamaV2Config": ("model_dir",),
        "exllamav2:ExLlamaV2Config.arch_compat_overrides": ("quiet",),
        "exllamav2:ExLlamaV2": ("config",),
        "exllamav2:ExLlamaV2.load": ("gpu_split",),
        "exllamav2:ExLlamaV2.load_tp": ("gpu_split", "expect_cache_tokens", "expect_cache_base"),
        "exllamav2:ExLlamaV2.load_autosplit": ("cache",),
        "exllamav2:ExLlamaV2.unload": (),
        "exllamav2:ExLlamaV2Tokenizer": ("config",),
        "exllamav2:ExLlamaV2Cache_TP": ("model", "base", "max_seq_len"),
        **{f"exllamav2:{cache}": ("model", "max_seq_len", "lazy") for cache in _V2_CACHES},
        _V2_GENERATOR: (
            "model", "cache", "tokenizer", "max_batch_size", "max_chunk_size", "max_q_size", "paged",
        ),
        f"{_V2_GENERATOR}.enqueue": ("job",),
        f"{_V2_GENERATOR}.cancel": ("job",),
        f"{_V2_GENERATOR}.iterate": (),
        f"{_V2_GENERATOR}.num_remaining_jobs": (),
        "exllamav2.generator:ExLlamaV2DynamicJob.__init__": (
            "input_ids", "max_new_tokens", "min_new_tokens", "gen_settings", "seed", "stop_conditions", "filters",
        ),
        "exllamav2.generator:ExLlamaV2Sampler.Settings": (
            "token_repetition_penalty", "temperature", "top_k", "top_p", "min_p", "token_bias",
        ),
    },
    {
        "exllamav2.generator.filters:ExLlamaV2Filter": (
            "begin", "feed", "use_background_worker", "can_mask_logits", "prepare_logit_mask", "mask_logits",
        ),
        "exllamav2.config:ExLlamaV2Config": (
            "max_seq_len", "max_input_len", "no_flash_attn", "vocab_size",
        ),
    },
)  # fmt: skip
"""Of ExLlamaV2."""

V3 = Parts(
    "exllamav3",
    "1.6.5",
    {
        "exllamav3:Config.from_directory": ("directory",),
        "exllamav3:Model.from_config": ("config",),
        "exllamav3:Model.load_gen": ("device", "use_per_device", "tensor_p", "max_chunk_size", "max_batch_size"),
        "exllamav3:Model.load": (),
        "exllamav3:Model.unload": (),
        "exllamav3:Cache": ("model", "max_num_tokens", "layer_type", "max_batch_size"),
        "exllamav3:CacheLayer_quant": ("k_bits", "v_bits"),
        "exllamav3:Tokenizer.from_config": ("config",),
        "exllamav3:Generator": (
            "model", "cache", "tokenizer", "max_batch_size", "max_chunk_size", "prefill_cooldown",
        ),
        "exllamav3:Generator.enqueue": ("job",),
        "exllamav3:Generator.cancel": ("job",),
        "exllamav3:Generator.iterate": (),
        "exllamav3:Generator.num_remaining_jobs": (),
        "exllamav3:Generator.close": (),
        "exllamav3:Job.__init__": (
            "input_ids", "max_new_tokens", "min_new_tokens", "sampler", "seed", "stop_conditions", "filters",
            "return_probs", "return_top_tokens",
        ),
        "exllamav3:ComboSampler": ("rep_p", "temperature", "top_k", "top_p", "min_p", "logit_bias"),
        "exllamav3:Filter": ("tokenizer", "trigger_token", "prefix_str", "eos_after_completed"),
    },
    {"exllamav3:Filter": ("reset", "accept_token", "get_next_logit_mask", "is_completed")},
)  # fmt: skip
"""Of ExLlamaV3."""
