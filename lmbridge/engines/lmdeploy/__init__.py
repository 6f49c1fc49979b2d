"""The LMDeploy engine. The path of a prompt:

``engine`` takes the request and drives LMDeploy's async engine on the server's loop: ``preparing`` turns it into one of
LMDeploy's, ``sampling`` translates the config, ``own`` holds what only LMDeploy understands, ``told`` and ``faults``
handle what comes back besides tokens, ``scoring`` scores a prompt. ``options`` and ``loading`` build the engine,
``watch`` monitors its end, and ``library`` checks the parts of LMDeploy that all this relies on.

Rule: importing this package loads neither torch nor LMDeploy.
"""

from __future__ import annotations

from lmbridge.engines.lmdeploy.engine import LMDeployEngine

__all__ = ["LMDeployEngine"]
