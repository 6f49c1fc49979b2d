"""LMDeploy's ``pipeline`` over a Bridge: put ``lmbridge.compat.lmdeploy`` for ``lmdeploy`` in the import line, no more.

::

    from lmbridge.compat.lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    with pipeline("demo", backend_config=PytorchEngineConfig(session_len=512)) as pipe:
        print(pipe(["Hi", "Tell me a story"], gen_config=GenerationConfig(max_new_tokens=32)))

``install()`` gives it to code whose import line stays as it is, and so does ``lmbridge run script.py``.

Rule: names only. They are always our own, so that nothing depends on what is installed; ``messages``, ``model``,
``pipeline`` and ``vl`` are modules as in LMDeploy, for those who import from there.
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

__version__ = "0.18.0"  # the LMDeploy whose calls and fields these are
version_info = (0, 18, 0)

__all__ = [
    "ChatTemplateConfig", "GenerationConfig", "KVTransferConfig", "Pipeline", "PytorchEngineConfig", "QuantPolicy",
    "Response", "ResponseType", "Session", "SpeculativeConfig", "Tokenizer", "TurbomindEngineConfig", "VisionConfig",
    "install", "pipeline", "version_info",
]  # fmt: skip
