"""Every error lmbridge raises, and nothing else.

Rule: this module imports nothing of lmbridge. Each message says what happened and what to do. Every class can be
pickled, and ``fresh`` gives each waiter an instance of its own.

::

    LMBridgeError
    ├── InvalidRequestError (ValueError)      the request is invalid; it never reached the engine
    │   ├── UnsupportedOptionError            this engine does not support that field
    │   ├── UnsupportedTaskError              this engine cannot embed, rerank, generate or call
    │   └── PromptTooLongError                the prompt does not fit the model's context
    ├── ModelNotFoundError (LookupError)      no such model folder
    ├── UnknownEngineError (LookupError)      no engine is registered under that name
    ├── MissingDependencyError (ImportError)  an optional package is missing; names the pip command
    ├── RequestTimeoutError (TimeoutError)    the deadline passed; carries the partial text
    ├── RequestAbortedError                   the request was aborted elsewhere; carries the partial text
    │   └── DisconnectedError                 the network client disconnected
    ├── QueueFullError                        no room for another waiting request
    ├── EngineError                           the engine failed this one request
    │   ├── EngineStartError                  the engine could not be loaded
    │   └── EngineDeadError                   the engine died while it had this request, or is down
    ├── BridgeClosedError (RuntimeError)      the bridge or the client was closed
    ├── WrongThreadError (RuntimeError)       a blocking call on the thread that must not block
    ├── ForkedError (RuntimeError)            the bridge belongs to the parent process
    └── UnsupportedEnvironmentError (RuntimeError)  patched threads or a subinterpreter
"""

from __future__ import annotations

import copy
from typing import Self, TypeVar

_E = TypeVar("_E", bound=BaseException)


class LMBridgeError(Exception):
    """Base class of all lmbridge errors.

    Attributes:
        request_id: the request that failed, if there was one.
        index: position in the list given to ``infer``, if there was a list.
        listed: what the list holds, such as "Prompt".
        partial: the text generated before the error, or "".
        retryable: whether sending the same request again may succeed.
        hint: what the program can do, in terms of this library, or "". ``str(error)`` ends with it.
    """

    request_id: str | None = None
    index: int | None = None
    listed: str = "Prompt"
    partial: str = ""
    retryable: bool = False
    hint: str = ""

    @property
    def message(self) -> str:
        """The text without the hint. Clients of a server and users of a command see only this."""
        text = super().__str__()
        return text if self.index is None else f"{self.listed} {self.index} of the list: {text}"

    def hinted(self, hint: str) -> Self:
        """This error, with the hint."""
        self.hint = hint
        return self

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class InvalidRequestError(LMBridgeError, ValueError):
    """The request is invalid. ``param`` names the argument or field."""

    def __init__(self, message: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedOptionError(InvalidRequestError):
    """The engine in use does not support the GenerationConfig field named by ``param``."""


class UnsupportedTaskError(InvalidRequestError):
    """The engine in use cannot do this task: for example, it embeds but does not generate."""


class PromptTooLongError(InvalidRequestError):
    """The prompt has more tokens than fit; ``most`` is the limit, if the engine reports it."""

    def __init__(self, message: str = "", param: str | None = None, most: int | None = None) -> None:
        super().__init__(message, param)
        self.most = most


class ModelNotFoundError(LMBridgeError, LookupError):
    """The model's folder does not exist, or holds no model."""


class UnknownEngineError(LMBridgeError, LookupError):
    """No engine is registered under that name."""


class MissingDependencyError(LMBridgeError, ImportError):
    """A package needed by an optional part is not installed."""


class RequestTimeoutError(LMBridgeError, TimeoutError):
    """The deadline passed before the request finished; generation was aborted."""

    retryable = True


class RequestAbortedError(LMBridgeError):
    """The request was aborted by ``bridge.abort``, or by closing its client."""


class DisconnectedError(RequestAbortedError):
    """The network client disconnected; generation was aborted."""


class QueueFullError(LMBridgeError):
    """Too many requests are waiting. ``retry_after`` estimates, in seconds, when to try again."""

    retryable = True
    retry_after: float = 1.0


class EngineError(LMBridgeError):
    """The engine failed this request; the cause is chained."""


class EngineStartError(EngineError):
    """The engine could not be built or loaded; the cause is chained."""


class EngineDeadError(EngineError):
    """The engine died during the request or before it; the cause is chained."""


class BridgeClosedError(LMBridgeError, RuntimeError):
    """The bridge or the client was closed before the request finished."""


class WrongThreadError(LMBridgeError, RuntimeError):
    """A blocking call on the server thread, which would deadlock."""


class ForkedError(LMBridgeError, RuntimeError):
    """The bridge was started in another process; threads and models do not survive a fork."""


class UnsupportedEnvironmentError(LMBridgeError, RuntimeError):
    """Threads are patched (gevent, eventlet), or this is a subinterpreter."""


def fresh(error: _E) -> _E:
    """A copy of ``error``, with the same cause, to raise in another thread.

    Raising one instance in two threads would mix their tracebacks.
    """
    try:
        twin = copy.copy(error)
    except Exception:  # its constructor does not accept its own args
        return error
    twin.__cause__ = error.__cause__
    return twin
