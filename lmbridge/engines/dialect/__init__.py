"""How a model is told of tools, how it calls them, and how it shows what it thinks.

Rule: engines that render chat templates themselves use it; no torch is known here. A ``Dialect`` is made on an engine's
worker thread, where a chat template may take its time, and is not changed after that. transformers' own parser takes
answers apart; what is ours is the table of forms in which models call, and the way back: from tools to a grammar.

``formats`` is that table, ``dialect`` finds the model's line of it, ``telling`` speaks to models whose template knows
no tools, ``spelling`` makes the grammar, ``reader`` takes an answer apart as it comes.
"""

from lmbridge.engines.dialect.dialect import Dialect
from lmbridge.engines.dialect.reader import Reader, read_apart

__all__ = ["Dialect", "Reader", "read_apart"]
