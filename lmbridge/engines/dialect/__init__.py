"""How tools are described to a model, how it calls them, and how it marks its thoughts.

Rule: used by engines that render chat templates themselves; no torch is known here. A ``Dialect`` is built on an
engine's worker thread, since chat templates may be slow, and never changes. transformers' own parser takes answers
apart; ours are the table of call formats, and the way back from tools to a grammar.

``formats`` is that table, ``dialect`` finds the model's entry, ``telling`` describes tools to models whose template
knows none, ``spelling`` makes the grammar, ``reader`` takes an answer apart as it arrives.
"""

from lmbridge.engines.dialect.dialect import Dialect
from lmbridge.engines.dialect.reader import Reader, read_apart

__all__ = ["Dialect", "Reader", "read_apart"]
