"""Whether the hub has a model, found out quickly before transformers asks it for one file after another.

Rule: the engine's worker thread, and only what huggingface_hub documents. The one question may take ``PATIENCE``
seconds; huggingface_hub itself repeats each question for 23 s when it gets no answer, and tries every address of the
host in turn.
"""

from __future__ import annotations

import logging
import queue
import threading

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lmbridge.engines.models import did_you_mean
from lmbridge.errors import ModelNotFoundError

logger = logging.getLogger("lmbridge.loading")

PATIENCE = 10.0
"""Seconds until a hub that does not answer counts as unreachable."""
_FINAL = (RepositoryNotFoundError, RevisionNotFoundError)


def only_from_cache(model: str, revision: str | None = None) -> bool:
    """Whether to load the copy in the hub's cache and ask for nothing; False means that the hub can be asked.

    Raises:
        ModelNotFoundError: there is no copy, and the hub has no such model, denies access, or is unreachable.
    """
    cached = _is_cached(model, revision)
    if huggingface_hub.is_offline_mode():
        if not cached:
            raise _not_found(model, "HF_HUB_OFFLINE is set and the hub's cache does not hold it")
        return True
    problem = _ask(model, revision)
    if problem is None or isinstance(problem, EntryNotFoundError):  # it is there, perhaps in another form
        return False
    if cached:
        logger.warning("the hub does not provide %r (%s); using the cached copy", model, _first_line(problem))
        return True
    if isinstance(problem, HfHubHTTPError) and not isinstance(problem, _FINAL):
        return False  # perhaps a temporary failure: huggingface_hub retries for half a minute
    raise _not_found(model, _why_not(problem, revision)) from problem


def _is_cached(model: str, revision: str | None) -> bool:
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision), str)
    except HFValidationError as cause:
        raise _not_found(model, "this is not a valid name on the hub") from cause


def _ask(model: str, revision: str | None) -> Exception | None:
    """Request the file that transformers will request first; returns the error, if any.

    In a thread that may be left behind: the name service has no time limit of ours, and each address has one by itself.
    """
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            url = huggingface_hub.hf_hub_url(model, "config.json", revision=revision)
            huggingface_hub.get_hf_file_metadata(url, timeout=PATIENCE)
            answer.put(None)
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, name="lmbridge hub", daemon=True).start()
    try:
        return answer.get(timeout=PATIENCE)
    except queue.Empty:
        return TimeoutError(f"no answer within {PATIENCE:g} s")


def _why_not(problem: Exception, revision: str | None) -> str:
    if isinstance(problem, GatedRepoError):
        return "it is only for users who accepted its conditions on the hub; accept them, then run: hf auth login"
    if isinstance(problem, RevisionNotFoundError):
        return f"the hub's model of that name has no revision {revision!r}"
    if isinstance(problem, RepositoryNotFoundError):
        return "the hub has no model of that name (for a private one, run: hf auth login)"
    return f"the hub cannot be reached ({_first_line(problem)}); check the network"


def _not_found(model: str, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"There is no folder {model!r} here{did_you_mean(model)}, and {why}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
