"""The function engine: any user function, shared by many threads.

``engine`` batches the items of ``call`` and ``map`` for a function from a list to a list; ``texts`` lets a function
answer prompts, piece by piece if it yields; ``naming`` finds a function by ``"module:name"`` and its kind.

Rule: everything here runs on the server thread, except the functions themselves: a plain one runs on a thread of the
engine's own, an ``async`` one on the server's loop.
"""

from __future__ import annotations

from lmbridge.engines.function.engine import FunctionEngine, function_engine

__all__ = ["FunctionEngine", "function_engine"]
