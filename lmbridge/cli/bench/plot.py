"""Plots a load: the distribution of the latencies, and a timeline of the requests.

Rule: the one module of the command that knows matplotlib. It draws without a display and changes no global state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmbridge.cli.bench.report import Quantiles, Result
from lmbridge.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (12.0, 8.0)  # inches
LINES = {"p50": "-", "p90": "--", "p99": ":"}


def check_matplotlib() -> None:
    """Raise MissingDependencyError unless plots can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as cause:
        raise MissingDependencyError(
            f'--plot needs the matplotlib package ({cause}); install it with: pip install "lmbridge[bench]"'
        ) from cause


def draw(result: Result, path: str) -> None:
    """Write the plot as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(f"{len(result.ended)} requests from {result.settings['clients']} clients to {result.label}")
    (first, between), (total, timeline) = figure.subplots(2, 2)
    good = [row for row in result.rows if row.outcome == "ok"]
    _draw_spread(first, "time to first token", (row.first_token for row in good))
    _draw_spread(between, "inter-token latency", (gap for row in good for gap in row.gaps))
    _draw_spread(total, "end-to-end latency", (row.total for row in good))
    _draw_timeline(timeline, result)
    figure.savefig(path, format="png", dpi=100)


def _draw_spread(axes: Axes, title: str, values: Iterable[float | None]) -> None:
    """Draw the cumulative distribution of latencies, in milliseconds."""
    known = [value * 1000 for value in values if value is not None]
    axes.set(title=title, xlabel="ms", ylabel="share of all", ylim=(0, 1.02))
    spread = Quantiles.of(known)
    if spread is None:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    axes.ecdf(known)
    for name, style in LINES.items():
        value = getattr(spread, name)
        axes.axvline(value, color="grey", linestyle=style, label=f"{name}: {value:.1f} ms")
    axes.legend(loc="lower right")


def _draw_timeline(axes: Axes, result: Result) -> None:
    """Draw a line for each request: until its first token, then until its end."""
    axes.set(title="requests in the order they were sent", xlabel="s since the load began", ylabel="request")
    place, shift = 0, 0.0
    waits, answers, failures = [], [], []  # (place, from, to)
    for part in result.rounds:
        for row in sorted(part.rows, key=lambda row: row.due):
            begin, end = shift + row.due, shift + row.due + row.total
            first = end if row.first_token is None else begin + row.first_token
            if row.outcome == "error":
                failures.append((place, begin, end))
            else:
                waits.append((place, begin, first))
                answers.append((place, first, end))
            place += 1
        shift += part.seconds
    kinds = ((waits, "until the first token", "C1"), (answers, "answer", "C0"), (failures, "failed", "C3"))
    for lines, label, colour in kinds:
        if lines:
            places, begins, ends = zip(*lines, strict=True)
            axes.hlines(places, begins, ends, color=colour, label=label)
    if place:
        axes.legend(loc="upper right")
    axes.invert_yaxis()
