"""What the results of a list of jobs are handed over as.

Rule: pure functions on the caller's thread; numpy is imported inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmbridge.caller.batch import Result
from lmbridge.messages import Ranked, Response

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]


def value(results: Sequence[Result]) -> Any:
    """What the one job gave."""
    return values(results)[0]


def values(results: Sequence[Result]) -> list[Any]:
    """What each job gave, or the error it ended with."""
    return [result.value if isinstance(result, Response) else result for result in results]


def matrix(results: Sequence[Result]) -> Vectors:
    """Vectors of one length as the rows of an array, float32 of shape ``(n, dim)``; ``(0, 0)`` for none."""
    import numpy as np

    if not results:
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack(values(results))


def ranking(results: Sequence[Result], documents: Sequence[Any], top: int | None) -> list[Ranked]:
    """Scores as a ranking, the most relevant first; of equal ones, the first in the list."""
    scores = [float(score) for score in values(results)]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top]
    return [Ranked(index, scores[index], document_text(documents[index])) for index in order]


def document_text(document: Any) -> str:
    """A document's text: it is a string, or a mapping that has one as ``text``."""
    text: str = document if isinstance(document, str) else document["text"]
    return text
