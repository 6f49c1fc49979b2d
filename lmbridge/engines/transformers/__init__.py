"""The transformers engine. The path of a prompt:

1. ``engine`` takes the request; ``engines.encoding`` tokenises its prompt.
2. A runner generates: ``paged``, by transformers' continuous batching, or ``plain``, by its ``generate``; ``runner`` is
   their contract.
3. ``plan`` holds a request's sampling, ``sampling`` applies the plans, and ``choosing`` is the tensor program that does
   it; ``layers`` keeps the changes to scores, ``guides`` the grammars, and ``reading`` scores the prompt. ``processor``
   and ``attention`` are the seams into the packed batch, ``sizes`` sets its cache size.
4. ``running`` keeps the state of one answer.

Before that, ``starting`` brings model and runner together: ``library`` checks transformers, ``hub`` and ``loading``
load the model according to ``options``, ``proof`` checks its answers.

Rule: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from lmbridge.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
