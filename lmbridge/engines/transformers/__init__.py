"""The transformers engine, file by file as a prompt passes.

1. ``engine`` takes the request; ``engines.encoding`` makes tokens of its prompt.
2. A runner has the model generate: ``paged``, by transformers' continuous batching, or ``plain``, by its ``generate``;
   ``runner`` is what they have in common.
3. ``plan`` is what a request wants of each token, ``sampling`` has it chosen, and ``choosing`` is the tensor program
   that does it; ``layers`` keeps what scores are changed by, ``guides`` says what a grammar allows, and ``reading`` how
   likely the prompt was. ``processor`` and ``attention`` are the seams by which they reach into the packed batch,
   ``sizes`` says how large its cache is.
4. ``running`` keeps what is known of one answer.

Before that, ``starting`` brings model and runner together: ``library`` looks at transformers, ``hub`` and ``loading``
load the model as ``options`` say, ``proof`` has it prove itself.

Rule: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from lmbridge.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
