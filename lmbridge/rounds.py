"""One turn of a chat that runs functions: the model calls them and gets their results until it answers.

Rule: the caller's thread, which runs the functions; sends no requests itself.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from lmbridge.errors import InvalidRequestError, RequestTimeoutError
from lmbridge.messages import GenerationConfig, Message, Response, ToolCall
from lmbridge.tools import is_forced
from lmbridge.values import as_list, as_number

if TYPE_CHECKING:
    from lmbridge.caller.options import CallOptions

MOST_ROUNDS = 8
"""After this many rounds of calls the model gets no tools, so it must answer."""


class Rounds:
    """The next request of a turn, and the answer to the last.

    Attributes:
        messages: the conversation so far.
        options: those of the next request.
        response: the last answer.
        over: the last answer is the turn's.

    Raises:
        InvalidRequestError: one of the tools is not a Python function.
    """

    response: Response

    def __init__(self, messages: list[Message], config: GenerationConfig | None, options: CallOptions) -> None:
        self.messages = messages
        self.over = False
        self._given = options
        self._functions = _functions(options.get("tools", None if config is None else config.tools))
        self._choice = options.get("tool_choice", None if config is None else config.tool_choice)
        self._rounds = 0
        seconds = as_number(options.get("timeout"))  # validated where it is used
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def options(self) -> CallOptions:
        """The options of the next request.

        Raises:
            RequestTimeoutError: the functions took all the time allowed.
        """
        options = dict(self._given)
        forced = is_forced(self._choice)
        if forced and not self._rounds:  # the form applies to the answer, which comes later
            options |= {"response_format": None, "grammar": None}
        elif self._rounds and self._functions:
            options["tool_choice"] = "none" if forced or self._rounds >= MOST_ROUNDS else "auto"
        if self._rounds and self._end is not None:
            options["timeout"] = left = self._end - time.monotonic()
            if left <= 0:
                raise RequestTimeoutError(f"The turn and its functions took over {self._given.get('timeout')} s.")
        return cast("CallOptions", options)

    def take(self, response: Response) -> None:
        """Record an answer and run the functions it calls."""
        self.response = response
        self._rounds += 1
        message = response.message()
        if response.finish_reason != "tool_calls":  # a call that was cut off has no result
            message.pop("tool_calls", None)
        self.messages = [*self.messages, message]
        self.over = response.finish_reason != "tool_calls" or not self._functions
        if not self.over:
            self.messages += [self._result(call) for call in response.tool_calls]

    def _result(self, call: ToolCall) -> Message:
        """The message that answers a call: the function's result, or why the call is invalid."""
        function = self._functions.get(call.name)
        try:
            if function is None:
                raise ValueError(f"there is no function {call.name}; there are {', '.join(self._functions)}")
            arguments = call.bound(function)
        except ValueError as wrong:
            return call.answer({"error": str(wrong)})
        return call.answer(function(**arguments))


def _functions(tools: object) -> dict[str, Callable[..., Any]]:
    listed: Sequence[Any] = as_list(tools) or ()
    for tool in listed:
        if not callable(tool) or inspect.iscoroutinefunction(tool):
            raise InvalidRequestError(
                f"A chat runs its tools, so each must be a synchronous Python function, not {tool!r:.80}. "
                "To get the calls and run them yourself, use Bridge.infer.",
                "tools",
            )
    return {getattr(tool, "__name__", ""): tool for tool in listed}
