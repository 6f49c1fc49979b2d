"""The LMDeploy engine, file by file as a prompt passes.

``engine`` takes the request and drives LMDeploy's async engine on the server's loop: ``preparing`` makes a request of
LMDeploy's of it, ``sampling`` says in LMDeploy's words how it is to generate, ``own`` what LMDeploy alone understands,
``told`` and ``faults`` what comes back beside tokens, ``scoring`` has a prompt scored. ``options`` and ``loading``
build the engine, ``watch`` looks after its end, and ``library`` knows which parts of LMDeploy all this relies on.

Rule: importing this package loads neither torch nor LMDeploy.
"""

from __future__ import annotations

from lmbridge.engines.lmdeploy.engine import LMDeployEngine

__all__ = ["LMDeployEngine"]
