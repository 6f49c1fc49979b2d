"""The encoder engine: texts to vectors, and pairs of texts to scores. The path of a text:

1. ``engine`` takes the request; ``encoding`` tokenises its text (after ``prompts`` prefixed it), ``pace`` estimates how
   many tokens fit into a turn, and in ``pauses`` others may go first.
2. ``layouts`` runs the model over a batch: all texts in one row without padding (``attention`` keeps them apart),
   in groups of similar length, or one by one. ``vectors`` pools the output and scales it.
3. ``core`` joins all of these.

Before that, ``starting`` assembles it: ``loading`` loads the model according to ``options``, ``settings`` reads the
files of sentence-transformers, ``objects`` takes apart an object (``given``), and ``proof`` finds the fastest correct
layout.

Rule: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from lmbridge.engines.encoder.engine import EncoderEngine

__all__ = ["EncoderEngine"]
