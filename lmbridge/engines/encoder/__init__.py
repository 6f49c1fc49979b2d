"""The encoder engine: texts to vectors, and pairs of texts to scores, file by file as a text passes.

1. ``engine`` takes the request; ``encoding`` makes tokens of its text (``prompts`` go before
   it), ``pace`` knows how many fit into a turn, and in ``pauses`` others may go first.
2. ``layouts`` has the model run over a batch: all texts in one row without padding (``attention`` keeps them apart),
   groups of similar length, or one by one. ``vectors`` pools what comes out and makes it as long as was asked for.
3. ``core`` is what all of that hangs together by.

Before that, ``starting`` brings it together: ``loading`` loads the model as ``options`` say, ``settings`` reads the
files that sentence-transformers keeps beside it, ``objects`` takes apart what was ``given`` ready-made, and ``proof``
finds the fastest layout that is right.

Rule: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from lmbridge.engines.encoder.engine import EncoderEngine

__all__ = ["EncoderEngine"]
