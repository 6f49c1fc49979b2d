"""The figures of a load, as text and as JSON.

Rule: pure arithmetic over rows and rounds; sends and draws nothing.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import lmbridge
from lmbridge.cli.bench.bridge import NativeRound
from lmbridge.cli.bench.load import Round, Row
from lmbridge.cli.terminal import one_line

SCHEMA = "lmbridge-bench"
SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "janus", "openai")


@dataclass
class Result:
    """The measurements. ``steps`` and ``engine_tokens`` are the engine's own counts; None if it does not count."""

    settings: dict[str, Any]
    label: str
    began: str  # UTC, ISO 8601
    max_batch_size: int | None = None
    rounds: list[Round] = field(default_factory=list)
    natives: list[NativeRound] = field(default_factory=list)
    steps: float | None = None
    engine_tokens: float | None = None
    no_share: str = ""  # why the bridge's share is unknown
    interrupted: bool = False

    @property
    def rows(self) -> list[Row]:
        return [row for part in self.rounds for row in part.rows]

    @property
    def ended(self) -> list[Row]:
        """The requests that the figures cover: all but those interrupted by Ctrl-C."""
        return [row for row in self.rows if row.outcome != "interrupted"]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.rounds)

    @property
    def all_failed(self) -> bool:
        """Whether requests failed and none succeeded."""
        outcomes = {row.outcome for row in self.rows}
        return "error" in outcomes and "ok" not in outcomes


@dataclass(frozen=True)
class Quantiles:
    """The distribution of ``count`` values, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Quantiles | None:
        """The quantiles of the known values; None if no value is known."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return None
        p50, p90, p99 = (_quantile(known, share) for share in (0.5, 0.9, 0.99))
        return cls(len(known), sum(known) / len(known), p50, p90, p99, known[-1])


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Interpolate between the two nearest values."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Summary:
    """The figures of one run. Rates are per second, times in seconds; None means unknown.

    They cover the requests that ended within ``seconds``; only ``interrupted`` counts the others.

    Attributes:
        requests: those that ended, ``ok`` or ``failed``.
        tokens_counted: ``usage``, as reported by the engine or server, or ``pieces``, one per piece of a stream.
        start_delay: with ``--rate``, how late requests were sent.
        batch_mean: tokens per step of the engine.
        batch_max: the most requests that were in the engine at once.
        errors: by kind, with the count and the first message.
        bridge_share: 1 - tokens/s through the bridge / tokens/s without it; ``bridge_shares`` has it for each round.
        native_tokens_per_second: without the bridge.
    """

    requests: int
    ok: int
    failed: int
    interrupted: int
    seconds: float
    requests_per_second: float | None
    output_tokens_per_second: float | None
    total_tokens_per_second: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens_counted: str
    time_to_first_token: Quantiles | None
    inter_token_latency: Quantiles | None
    end_to_end_latency: Quantiles | None
    queue_time: Quantiles | None
    start_delay: Quantiles | None
    batch_mean: float | None
    batch_max: int | None
    finish_reasons: dict[str, int]
    errors: dict[str, dict[str, Any]]
    bridge_share: float | None
    bridge_shares: list[float]
    native_tokens_per_second: float | None


def summarize(result: Result) -> Summary:
    rows, seconds = result.ended, result.seconds
    good = [row for row in rows if row.outcome == "ok"]
    prompt = _total(row.prompt_tokens for row in good)
    completion = _total(row.completion_tokens for row in good)
    shares = _shares(result)
    native_seconds = sum(part.seconds for part in result.natives)
    return Summary(
        requests=len(rows),
        ok=len(good),
        failed=sum(row.outcome == "error" for row in rows),
        interrupted=len(result.rows) - len(rows),
        seconds=seconds,
        requests_per_second=_rate(len(good), seconds),
        output_tokens_per_second=_rate(completion, seconds),
        total_tokens_per_second=None if prompt is None or completion is None else _rate(prompt + completion, seconds),
        prompt_tokens=prompt,
        completion_tokens=completion,
        tokens_counted="pieces" if completion is not None and prompt is None else "usage",
        time_to_first_token=Quantiles.of(row.first_token for row in good),
        inter_token_latency=Quantiles.of(gap for row in good for gap in row.gaps),
        end_to_end_latency=Quantiles.of(row.total for row in good),
        queue_time=Quantiles.of(row.queued for row in good),
        start_delay=Quantiles.of(row.sent - row.due for row in rows) if result.settings.get("rate") else None,
        batch_mean=result.engine_tokens / result.steps if result.steps and result.engine_tokens is not None else None,
        batch_max=_batch_max(result),
        finish_reasons=_counts(row.finish_reason or "" for row in good),
        errors=_errors(rows),
        bridge_share=_share(result.rounds[: len(result.natives)], result.natives) if shares else None,
        bridge_shares=shares,
        native_tokens_per_second=_rate(sum(part.tokens for part in result.natives), native_seconds),
    )


def _total(values: Iterable[int | None]) -> int | None:
    """The sum; None if a value is unknown, or there are none."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if known and len(known) == len(found) else None


def _rate(count: float | None, seconds: float) -> float | None:
    return None if count is None or seconds <= 0 else count / seconds


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _errors(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.error is not None:
            found.setdefault(row.error, {"count": 0, "message": one_line(row.message)})["count"] += 1
    return found


def _shares(result: Result) -> list[float]:
    """The bridge's share in each round with a native counterpart; empty if anything failed or was interrupted."""
    rows, natives = result.rows, result.natives
    if result.interrupted or any(row.outcome != "ok" for row in rows) or any(part.failed for part in natives):
        return []
    pairs = zip(result.rounds, natives, strict=False)
    shares = [_share([bridged], [native]) for bridged, native in pairs]
    return [share for share in shares if share is not None]


def _share(rounds: Sequence[Round], natives: Sequence[NativeRound]) -> float | None:
    tokens = sum(row.completion_tokens or 0 for part in rounds for row in part.rows)
    through = _rate(tokens, sum(part.seconds for part in rounds))
    without = _rate(sum(part.tokens for part in natives), sum(part.seconds for part in natives))
    return 1 - through / without if through is not None and without else None


def _batch_max(result: Result) -> int | None:
    """The most requests that were in the engine at once, computed from their timings.

    A client sees its answer end slightly after the engine has started the next request, hence the limit.
    """
    most = 0
    for part in result.rounds:
        moments = []
        for row in part.rows:
            if row.outcome == "ok" and row.queued is not None:
                moments += [(row.sent + row.queued, 1), (row.due + row.total, -1)]
        running = 0
        for _, change in sorted(moments):
            running += change
            most = max(most, running)
    return min(most, result.max_batch_size or most) or None


# --- text ---


def as_text(result: Result, summary: Summary) -> str:
    """Format the figures for a terminal."""
    settings, rows = result.settings, result.ended
    lines = [
        "",
        f"{result.label}:",
        f"{summary.requests} requests from {settings['clients']} clients"
        + (f", {settings['rate']:g} per second," if settings["rate"] else "")
        + f" in {summary.seconds:.2f} s,",
        f"approximately {settings['prompt_tokens']} {settings['prompts_by']} per prompt"
        + (f" ({_mean(row.prompt_tokens for row in rows)} tokens as counted)" if summary.prompt_tokens else "")
        + ",",
        f"{_mean(row.completion_tokens for row in rows if row.outcome == 'ok')} tokens per answer, "
        + ("streamed" if settings["stream"] else "not streamed"),
        "",
        _line("requests/s", _number(summary.requests_per_second, 2)),
        _line("output tokens/s", _number(summary.output_tokens_per_second, 1)),
        _line("total tokens/s", _number(summary.total_tokens_per_second, 1)),
        _line("", f"{'p50':>10}{'p90':>10}{'p99':>10}"),
        _line("time to first token, ms", _milliseconds(summary.time_to_first_token)),
        _line("inter-token latency, ms", _milliseconds(summary.inter_token_latency)),
        _line("end-to-end latency, ms", _milliseconds(summary.end_to_end_latency)),
        _line("queue time, ms", _milliseconds(summary.queue_time)),
        *([_line("sent late by, ms", _milliseconds(summary.start_delay))] if summary.start_delay else []),
        _line("batch size", _batch(summary)),
        _line("errors", _error_count(summary)),
        *(f"  {error['count']} x {kind}: {error['message']}"[:300] for kind, error in summary.errors.items()),
        _line("the bridge's share", _share_text(result, summary)),
    ]
    return "\n".join(line.rstrip() for line in [*lines, *_notes(result, summary)])


def _line(name: str, value: str) -> str:
    return f"{name:<26}{value}"


def _number(value: float | None, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>10}"


def _milliseconds(spread: Quantiles | None) -> str:
    values = (None,) * 3 if spread is None else (spread.p50, spread.p90, spread.p99)
    return "".join(_number(None if value is None else value * 1000, 1) for value in values)


def _mean(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.0f}" if known else "-"


def _batch(summary: Summary) -> str:
    if summary.batch_mean is None and summary.batch_max is None:
        return _number(None, 1)
    return f"{_number(summary.batch_mean, 1)} on average, {summary.batch_max or '-'} at most"


def _error_count(summary: Summary) -> str:
    return f"{summary.failed:>10}" + (f" of {summary.requests} requests" if summary.failed else "")


def _share_text(result: Result, summary: Summary) -> str:
    if summary.bridge_share is None:
        return f"{'-':>10}" + (f" ({result.no_share})" if result.no_share else "")
    each = " and ".join(f"{share:.1%}" for share in summary.bridge_shares)
    rounds = f"{each} in its halves; " if len(summary.bridge_shares) > 1 else ""
    return f"{summary.bridge_share:>10.1%} ({rounds}{summary.native_tokens_per_second:.1f} tokens/s without it)"


def _notes(result: Result, summary: Summary) -> list[str]:
    notes = []
    if result.interrupted:
        notes.append(
            f"Interrupted: all figures cover the {summary.requests} requests that had ended by then.\n"
            f"They leave out the {summary.interrupted} in flight, and their tokens."
        )
    if summary.tokens_counted == "pieces":
        notes.append("The server does not count tokens: each piece of a stream counts as one.")
    wanted = result.settings["max_new_tokens"]
    answers = [
        row.completion_tokens for row in result.rows if row.outcome == "ok" and row.completion_tokens is not None
    ]
    short = sum(tokens < wanted for tokens in answers)
    if short and result.settings["ignore_eos"]:
        notes.append(f"{short} answers are shorter than --max-new-tokens: the model's context was full.")
    elif short:
        notes.append(f"{short} of {len(answers)} answers ended by themselves before --max-new-tokens.")
    return ["", *notes] if notes else []


# --- JSON ---


def as_json(result: Result, summary: Summary) -> dict[str, Any]:
    """All figures and requests in plain types; times in seconds."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "began": result.began,
        "interrupted": result.interrupted,
        "settings": {**result.settings, "target": result.label, "max_batch_size": result.max_batch_size},
        "versions": versions(),
        "machine": machine(),
        "summary": dataclasses.asdict(summary),
        "rounds": [
            {
                "number": part.number,
                "seconds": part.seconds,
                "requests": sum(row.outcome != "interrupted" for row in part.rows),
            }
            for part in result.rounds
        ],
        "native_rounds": [dataclasses.asdict(part) for part in result.natives],
        "requests": [_row(row) for row in result.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    """A row, with the mean of its gaps."""
    fields = {name: value for name, value in dataclasses.asdict(row).items() if not name.startswith("_")}
    gaps = fields.pop("gaps")
    return {**fields, "inter_token_latency": sum(gaps) / len(gaps) if gaps else None}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"lmbridge": lmbridge.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Describe the machine that the clients ran on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    """The GPUs that torch sees, if an engine has loaded it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
