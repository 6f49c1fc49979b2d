"""Forms of answers in the words that llguidance knows: JSON schemas, and choices.

Rule: pure functions of plain data. What llguidance does not know is written in other words, or left out where the
standard lets anything come, or narrowed; what comes of it is valid by the schema as it was given. Everything else is
refused with its place.

``writer`` goes through a schema, ``words`` says its parts in other words, ``formats`` those of texts, ``closing`` keeps
objects to what they name; ``alternatives`` compares those of ``oneOf``, ``references`` follows ``$ref``, ``limits``
refuses what takes too long to compile.
"""

from lmbridge.engines.schemas.choices import choice_lines
from lmbridge.engines.schemas.writer import followable

__all__ = ["choice_lines", "followable"]
