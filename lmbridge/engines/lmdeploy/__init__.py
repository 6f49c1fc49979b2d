"""The LMDeploy engine, file by file as a prompt passes.

``engine`` takes the request and drives LMDeploy's async engine on the server's loop, ``options`` and ``sampling`` say
in LMDeploy's words what was asked for, ``loading`` builds it, ``library`` knows which parts of LMDeploy all this relies
on.

Rule: importing this package loads neither torch nor LMDeploy.
"""

from __future__ import annotations

from lmbridge.engines.lmdeploy.engine import LMDeployEngine

__all__ = ["LMDeployEngine"]
