"""The Ray engine, file by file as a prompt passes.

``engine`` takes the request, ``sending`` sends it to the cluster as an ``errand``, and ``lmbridge.replica`` answers it
there, with a Bridge of its own over any engine. ``options`` says what was asked for, ``serving`` deploys the replicas
and looks after them, and ``library`` knows which parts of Ray all this relies on.

Rule: importing this package loads no Ray.
"""

from __future__ import annotations

from lmbridge.engines.ray.engine import RayEngine
from lmbridge.engines.ray.serving import application

__all__ = ["RayEngine", "application"]
