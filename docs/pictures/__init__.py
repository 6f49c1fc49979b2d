"""The pictures of these pages, drawn of the source while the pages are built: ``.. picture:: life``.

Rule: each module has ``draw(package)``, which gives an SVG of the package in that folder and raises where picture and
source no longer agree; ``svg`` is the pen they share. Nothing of lmbridge is imported, and nothing drawn is kept.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive, directives

PACKAGE = Path(__file__).parents[2] / "lmbridge"


class PictureDirective(Directive):
    """Puts a picture into the page itself, so that it has the page's colours and its words can be searched."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"width": directives.length_or_percentage_or_unitless}

    def run(self) -> list[nodes.Node]:
        svg = importlib.import_module(f"pictures.{self.arguments[0]}").draw(PACKAGE)
        width = self.options.get("width", "100%")
        return [nodes.raw("", f'<div style="margin: 1em 0; width: {width}">{svg}</div>', format="html")]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx's own entry, for an extension."""
    app.add_directive("picture", PictureDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
