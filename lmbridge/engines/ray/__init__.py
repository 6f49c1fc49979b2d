"""The Ray engine. The path of a prompt:

``engine`` takes the request, ``sending`` sends it to the cluster as an ``errand``, and ``lmbridge.replica`` answers it
there, with its own Bridge over any engine. ``options`` holds the options, ``serving`` deploys and monitors the
replicas, and ``library`` checks the parts of Ray that all this relies on.

Rule: importing this package loads no Ray.
"""

from __future__ import annotations

from lmbridge.engines.ray.engine import RayEngine
from lmbridge.engines.ray.serving import application

__all__ = ["RayEngine", "application"]
