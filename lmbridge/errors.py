"""Every error lmbridge raises, and nothing else.

Rule: this module imports nothing of lmbridge. Each message says what happened, what it means for the request and
what to do. Every class pickles, and ``fresh`` gives each waiter an instance of its own.

::

    LMBridgeError
    ├── InvalidRequestError (ValueError)      the request itself is wrong; it never reached the engine
    │   ├── UnsupportedOptionError            this engine cannot honour that GenerationConfig field
    │   ├── UnsupportedTaskError              this engine does not do that: embed, rerank, generate, call
    │   └── PromptTooLongError                the prompt does not fit the model's context
    ├── ModelNotFoundError (LookupError)      no such model folder
    ├── UnknownEngineError (LookupError)      no engine is registered under that name
    ├── MissingDependencyError (ImportError)  an optional package is not installed; names the pip command
    ├── RequestTimeoutError (TimeoutError)    the deadline passed; carries the partial text
    ├── RequestAbortedError                   the request was aborted by somebody else; carries the partial text
    │   └── DisconnectedError                 whoever asked for it over a network has gone
    ├── QueueFullError                        no room for another waiting request
    ├── EngineError                           the engine failed this one request
    │   ├── EngineStartError                  the engine could not be loaded
    │   └── EngineDeadError                   the engine died with this request in it, or is down
    ├── BridgeClosedError (RuntimeError)      the bridge or the client was closed
    ├── WrongThreadError (RuntimeError)       a blocking call on the thread that must not block
    ├── ForkedError (RuntimeError)            the bridge belongs to the parent process
    └── UnsupportedEnvironmentError (RuntimeError)  patched threads or subinterpreters
"""

from __future__ import annotations

import copy
from typing import TypeVar

_E = TypeVar("_E", bound=BaseException)


class LMBridgeError(Exception):
    """Base of all errors of lmbridge.

    Attributes:
        request_id: the request it ended, where there was one.
        index: position in the list given to ``infer``, where there was a list.
        listed: what stands at that position.
        partial: the text generated before the error ("" when there was none).
        retryable: whether the same request may succeed when it is sent again.
    """

    request_id: str | None = None
    index: int | None = None
    listed: str = "Prompt"
    partial: str = ""
    retryable: bool = False

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.index is None else f"{self.listed} {self.index} of the list: {text}"


class InvalidRequestError(LMBridgeError, ValueError):
    """The request is wrong in itself. ``param`` names the argument or field at fault."""

    def __init__(self, message: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedOptionError(InvalidRequestError):
    """The engine in use cannot honour the GenerationConfig field named by ``param``."""


class UnsupportedTaskError(InvalidRequestError):
    """The engine in use does something else: it embeds rather than generates, say."""


class PromptTooLongError(InvalidRequestError):
    """The prompt has more tokens than the engine has room for; ``most`` is how many, where the engine tells."""

    def __init__(self, message: str = "", param: str | None = None, most: int | None = None) -> None:
        super().__init__(message, param)
        self.most = most


class ModelNotFoundError(LMBridgeError, LookupError):
    """The model named is a folder that does not exist, or a folder without a model."""


class UnknownEngineError(LMBridgeError, LookupError):
    """No engine is registered under the name given."""


class MissingDependencyError(LMBridgeError, ImportError):
    """A package that an optional part needs is not installed."""


class RequestTimeoutError(LMBridgeError, TimeoutError):
    """The deadline passed before the request was finished; generation has been aborted."""

    retryable = True


class RequestAbortedError(LMBridgeError):
    """The request was ended from outside: ``bridge.abort``, or its client was closed."""


class DisconnectedError(RequestAbortedError):
    """Whoever asked for the request over a network has gone; generation has been aborted."""


class QueueFullError(LMBridgeError):
    """Too many requests are waiting. ``retry_after`` is a guess, in seconds, of when to try again."""

    retryable = True
    retry_after: float = 1.0


class EngineError(LMBridgeError):
    """The engine failed this request; the cause is chained."""


class EngineStartError(EngineError):
    """The engine could not be built or loaded; the cause is chained."""


class EngineDeadError(EngineError):
    """The engine died while it worked on the request, or had died before; the cause is chained."""


class BridgeClosedError(LMBridgeError, RuntimeError):
    """The bridge (or the client) was closed before or while the request ran."""


class WrongThreadError(LMBridgeError, RuntimeError):
    """A blocking call on the server thread, which would wait for itself forever."""


class ForkedError(LMBridgeError, RuntimeError):
    """The bridge was started in another process; threads and models do not survive a fork."""


class UnsupportedEnvironmentError(LMBridgeError, RuntimeError):
    """The process replaces real threads (gevent, eventlet), or this is a subinterpreter."""


def fresh(error: _E) -> _E:
    """A copy of ``error`` to raise in one more thread, with the same cause.

    An exception instance must not be raised in two threads: each raise would extend the other's traceback.
    """
    try:
        twin = copy.copy(error)
    except Exception:  # a foreign exception whose constructor does not take its own args back
        return error
    twin.__cause__ = error.__cause__
    return twin
