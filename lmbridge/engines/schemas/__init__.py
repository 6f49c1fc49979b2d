"""Rewrites JSON schemas and choices into what llguidance supports.

Rule: pure functions of plain data. What llguidance does not support is rewritten, left out where the standard allows
anything, or narrowed; every result is valid by the original schema. Everything else is refused with its place.

``writer`` walks a schema, ``words`` rewrites its keywords, ``formats`` those of strings, ``closing`` limits objects to
the properties they name; ``alternatives`` compares those of ``oneOf``, ``references`` follows ``$ref``, ``limits``
refuses what would take too long to compile.
"""

from lmbridge.engines.schemas.choices import choice_lines
from lmbridge.engines.schemas.writer import followable

__all__ = ["choice_lines", "followable"]
