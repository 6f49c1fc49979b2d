"""LMDeploy's ``pipeline``.

Rule: one name; the class does the work, and its docstring says what the arguments mean.
"""

from __future__ import annotations

from lmbridge.compat.lmdeploy.pipeline import Pipeline

pipeline = Pipeline
