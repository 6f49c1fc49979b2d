"""A pen that draws SVG as text.

Rule: lines and words have the colour of the page's own text, and fills let its background through, so that a picture
looks right on light and on dark.
"""

from __future__ import annotations

from html import escape

FILLS = {"caller": "#2f80c2", "crossing": "#8a8a8a", "server": "#c2702f", "engine": "#5b9a3c", "stop": "#d04848"}
"""A colour for each thread, middling so that it shows on any background; ``stop`` is for what ends a request."""
SANS, MONO = "system-ui, sans-serif", "ui-monospace, monospace"


class Picture:
    """An SVG of so many units; ``alt`` is read to those who cannot see it."""

    def __init__(self, width: int, height: int, alt: str) -> None:
        self._size = f'viewBox="0 0 {width} {height}" style="max-width: {width}px; width: 100%"'
        self._alt = alt
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, rounded: int = 6) -> None:
        colour = FILLS[kind]
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{rounded}" fill="{colour}" '
            f'fill-opacity="0.18" stroke="{colour}"/>'
        )

    def text(self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle", style: str = "") -> None:
        """``style``: any of ``bold``, ``mono``, ``faint``."""
        font = MONO if "mono" in style else SANS
        more = (' font-weight="bold"' if "bold" in style else "") + (' opacity="0.7"' if "faint" in style else "")
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{font}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="currentColor"{more}>{escape(words)}</text>'
        )

    def line(self, *points: tuple[float, float], kind: str = "", head: bool = True, dashed: bool = False) -> None:
        """Through these points; with an arrow's head at the last."""
        colour = FILLS[kind] if kind else "currentColor"
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"{dash}/>')
        if head:
            self._head(points[-2], points[-1], colour)

    def _head(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        (x0, y0), (x, y) = start, end
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length, (y - y0) / length
        corners = f"{x:g},{y:g} {x - 8 * dx - 4 * dy:.1f},{y - 8 * dy + 4 * dx:.1f} "
        corners += f"{x - 8 * dx + 4 * dy:.1f},{y - 8 * dy - 4 * dx:.1f}"
        self._parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def __str__(self) -> str:
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {self._size}>'
        return "\n".join([opening, f"<title>{escape(self._alt)}</title>", *self._parts, "</svg>"])
