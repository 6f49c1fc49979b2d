"""Translates LMDeploy's request errors to ours.

Rule: server thread. LMDeploy is imported inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmbridge.engines.base import engine_error
from lmbridge.errors import EngineDeadError, InvalidRequestError, PromptTooLongError, UnsupportedOptionError


@contextlib.contextmanager
def named_errors(on_unavailable: Callable[[BaseException], None]) -> Iterator[None]:
    """Raise LMDeploy's errors about a request as LMBridgeErrors.

    Args:
        on_unavailable: called with the cause when the engine can serve no more.
    """
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    try:
        yield
    except RequestError as error:
        reason = f"{error.message} ({error.__cause__})" if error.__cause__ else error.message
        if error.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED:
            raise PromptTooLongError(f"LMDeploy: {reason}", param="prompt") from error
        if error.code == ErrorCode.UNSUPPORTED_FEATURE:
            raise UnsupportedOptionError(f"LMDeploy refused the request: {reason}", param="prompt") from error
        if error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.PREPROCESS_FAILED):
            raise InvalidRequestError(f"LMDeploy refused the request: {reason}", param="prompt") from error
        if error.code == ErrorCode.ENGINE_UNAVAILABLE:
            on_unavailable(error)
            raise EngineDeadError(f"LMDeploy: {reason}") from error
        raise engine_error(f"LMDeploy failed the request: {reason}", error) from error
