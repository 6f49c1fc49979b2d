"""LMDeploy's ``pipeline`` over a Bridge: change ``lmdeploy`` to ``lmbridge.compat.lmdeploy`` in the import.

::

    from lmbridge.compat.lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    with pipeline("demo", backend_config=PytorchEngineConfig(session_len=512)) as pipe:
        print(pipe(["Hi", "Tell me a story"], gen_config=GenerationConfig(max_new_tokens=32)))

``install()`` and ``lmbridge run script.py`` redirect the import in unchanged code.

Rule: names only, and always our own, so that nothing depends on what is installed; ``messages``, ``model``,
``pipeline`` and ``vl`` are modules as in LMDeploy, for code that imports from there.
"""

from __future__ import annotations

from lmbridge.compat.lmdeploy.api import pipeline
from lmbridge.compat.lmdeploy.messages import (
    GenerationConfig,
    KVTransferConfig,
    PytorchEngineConfig,
    QuantPolicy,
    Response,
    ResponseType,
    SpeculativeConfig,
    TurbomindEngineConfig,
    VisionConfig,
)
from lmbridge.compat.lmdeploy.model import ChatTemplateConfig
from lmbridge.compat.lmdeploy.pipeline import Pipeline
from lmbridge.compat.lmdeploy.sessions import Session
from lmbridge.compat.lmdeploy.standin import install
from lmbridge.compat.lmdeploy.tokenizer import Tokenizer

__version__ = "0.18.0"  # the LMDeploy version that this follows
version_info = (0, 18, 0)

__all__ = [
    "ChatTemplateConfig", "GenerationConfig", "KVTransferConfig", "Pipeline", "PytorchEngineConfig", "QuantPolicy",
    "Response", "ResponseType", "Session", "SpeculativeConfig", "Tokenizer", "TurbomindEngineConfig", "VisionConfig",
    "install", "pipeline", "version_info",
]  # fmt: skip
