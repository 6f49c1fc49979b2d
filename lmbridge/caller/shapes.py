"""Shapes the results of jobs, and validates what the engine returned.

Rule: pure functions on the caller's thread; numpy is imported inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmbridge.caller.batch import Result
from lmbridge.errors import EngineError
from lmbridge.messages import Apply, Embed, Job, Ranked, Rerank, Response
from lmbridge.values import as_number

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]


def looked_at(kind: type[Job], response: Response) -> Response:
    """The answer to a job of that kind, its value of the documented type.

    Raises:
        EngineError: the engine returned something else.
    """
    try:
        response.value = _AS[kind](response.value)
    except EngineError as error:
        error.request_id = response.request_id
        raise
    return response


def all_looked_at(kind: type[Job], results: Sequence[Result], keep: bool) -> list[Result]:
    """The same for a list; errors are kept in their slots, or the first is raised."""
    found: list[Result] = []
    for index, result in enumerate(results):
        try:
            found.append(looked_at(kind, result) if isinstance(result, Response) else result)
        except EngineError as error:
            error.index, error.listed = index, kind.noun
            if not keep:
                raise
            found.append(error)
    return found


def values(results: Sequence[Result]) -> list[Any]:
    """The value or error of each job."""
    return [result.value if isinstance(result, Response) else result for result in results]


def matrix(results: Sequence[Result]) -> Vectors:
    """Vectors of equal length as a float32 array of shape ``(n, dim)``; ``(0, 0)`` for none.

    Raises:
        EngineError: their lengths differ.
    """
    import numpy as np

    vectors = values(results)
    if not vectors:
        return np.zeros((0, 0), dtype=np.float32)
    lengths = sorted({len(vector) for vector in vectors})
    if len(lengths) > 1:
        raise EngineError(f"The engine returned vectors of {lengths[0]} and of {lengths[-1]} numbers; fix the engine.")
    return np.stack(vectors)


def ranking(results: Sequence[Result], documents: Sequence[str], top: int | None) -> list[Ranked]:
    """Scores as a ranking, the most relevant first; equal scores keep the list's order."""
    scores: list[float] = values(results)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top]
    return [Ranked(index, scores[index], documents[index]) for index in order]


def _vector(value: Any) -> Vectors:
    import numpy as np

    try:
        vector = np.asarray(value, dtype=np.float32)
    except Exception as cause:
        raise _wrong(value, "a vector") from cause
    if vector.ndim != 1 or not vector.size:
        raise _wrong(value, "a vector")
    return vector


def _score(value: Any) -> float:
    score = as_number(value)
    if score is None or math.isnan(score):
        raise _wrong(value, "a score")
    return float(score)


def _wrong(value: Any, wanted: str) -> EngineError:
    shape = getattr(value, "shape", None)
    what = type(value).__name__ + (f" of shape {shape}" if isinstance(shape, tuple) else "")
    if isinstance(value, (int, float, str)) or value is None:
        what = repr(value)[:80]
    return EngineError(f"The engine returned {what} instead of {wanted}; fix the engine.")


_AS: Mapping[type[Job], Callable[[Any], Any]] = {Embed: _vector, Rerank: _score, Apply: lambda value: value}
