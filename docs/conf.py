"""Sphinx configuration; built with warnings as errors: ``sphinx-build -n -W docs docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))  # for pictures

import lmbridge

project = "lmbridge"
copyright = "2026, the lmbridge authors"
author = "the lmbridge authors"
release = lmbridge.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "pictures"]
html_theme = "alabaster"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
nitpick_ignore_regex = [
    # the standard library's and our dependencies' names: no inventory is fetched while building
    (r"py:.*", r"(concurrent|asyncio|threading|contextvars|collections|typing)\..*"),
    (r"py:.*", r"(signal|weakref|os|atexit|janus|torch|flask)\..*"),
    (r"py:(class|exc|obj)", r"(BaseException|Exception|LookupError|ValueError|ImportError|TimeoutError|RuntimeError)"),
    (r"py:(class|exc|obj)", r"(StopIteration|StopAsyncIteration|TypeError|abc\.ABC|optional|Generic|ABC)"),
    (r"py:(class|exc|obj)", r"(TypedDict|str|int|float|bool|list|dict|None)"),
]
