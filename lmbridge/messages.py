"""What crosses between the caller's thread and the server thread: plain data.

Rule: no thread, no queue and no engine is known here. Times are seconds on the monotonic clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Union

from lmbridge.errors import LMBridgeError
from lmbridge.generation import GenerationConfig as GenerationConfig
from lmbridge.generation import Overrides as Overrides
from lmbridge.signatures import bind_arguments, result_text

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]

Task = Literal["generate", "embed", "rerank", "call"]
"""What a request can ask of an engine."""

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "user", "content": "…"}``."""

Prompt = Union[str, Sequence[Message], Sequence[int]]
"""One prompt: a string, a conversation, or token ids. Engines always get plain dicts and ints."""

Logprobs = dict[int, float]
"""One position: token id to log-probability; the actual token comes first."""

PromptLogprobs = Sequence[Union[Logprobs, None]]
"""One entry per prompt token: the token first, then the most likely ones; None for the first token."""


@dataclass(frozen=True, slots=True)
class Embed:
    """A text to embed.

    Attributes:
        text: a string, or token ids.
        normalize: scale the vector to length 1.
        dimensions: keep this many leading numbers, for models trained for it; None keeps all.
        prompt: put before the text: the name of one of the model's own prompts, or a string.
        truncate: how to treat a text that is too long for the model: refuse it or cut off its end.
    """

    task: ClassVar[Task] = "embed"
    noun: ClassVar[str] = "Text"

    text: str | list[int]
    normalize: bool = True
    dimensions: int | None = None
    prompt: str | None = None
    truncate: Literal["error", "end"] = "error"


@dataclass(frozen=True, slots=True)
class Rerank:
    """A document to score against a query; ``truncate`` cuts the document."""

    task: ClassVar[Task] = "rerank"
    noun: ClassVar[str] = "Document"

    query: str
    document: str
    truncate: Literal["error", "end"] = "end"


@dataclass(frozen=True, slots=True)
class Apply:
    """An item for a function."""

    task: ClassVar[Task] = "call"
    noun: ClassVar[str] = "Item"

    item: Any


Job = Embed | Rerank | Apply
"""A request that generates no text."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document in a ranking.

    Attributes:
        index: its position in the given list.
        score: the higher, the more relevant. For a model with one label: the output of the model's own activation, by
            default the sigmoid, from 0 to 1; for one with several: the softmax of the last.
        document: its text.
    """

    index: int
    score: float
    document: str


@dataclass(slots=True)
class Request:
    """One prompt, or one job, on its way to the engine.

    Attributes:
        id: unique within the bridge.
        prompt: see ``Prompt``; checked. "" for a job.
        config: validated, and private to this request.
        raw: pass a string to the model as it is, without the chat template.
        client: the account whose turn it takes.
        priority: higher goes first; it rises while the request waits.
        deadline: monotonic time at which it fails, or None.
        created: monotonic time of submission.
        context: the caller's context variables.
        job: what is asked for instead of text.
    """

    id: str
    prompt: Prompt
    config: GenerationConfig
    raw: bool
    client: str
    priority: int
    deadline: float | None
    created: float
    context: Context
    job: Job | None = None

    @property
    def task(self) -> Task:
        """The task asked of the engine."""
        return "generate" if self.job is None else self.job.task


def prompt_text(prompt: Prompt) -> str:
    """Any prompt as one string: itself, the last message of a conversation, or the token ids.

    For engines and functions that take a string but no conversation.
    """
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    if not isinstance(last, dict):
        return " ".join(map(str, prompt))
    content = last.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


@dataclass(slots=True)
class Usage:
    """Token counts; ``completion_tokens`` counts what the engine generated, including the end token."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Seconds since submission: until the engine took the request, until the first token, until the end."""

    queued: float = 0.0
    first_token: float | None = None
    total: float = 0.0


@dataclass(slots=True)
class ToolCall:
    """A function call by the model or, in a stream, a piece of one.

    Attributes:
        index: the call's place in the answer, from 0.
        id: unique; answered by a message ``{"role": "tool", "tool_call_id": id, "content": "…"}``. In a stream only a
            call's first piece has it, like the name.
        name: one of the request's tools, unless the model made it up.
        arguments: JSON as the model wrote it, which may be cut off or invalid; in a piece, the new part.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    def parsed(self) -> dict[str, Any]:
        """The arguments of a complete call, parsed.

        Raises:
            ValueError: they are not a JSON object.
        """
        try:
            arguments = json.loads(self.arguments or "{}")
        except RecursionError:
            raise ValueError(f"the arguments of {self.name} are nested too deeply") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {self.name} are not a JSON object: {self.arguments}")
        return arguments

    def bound(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The arguments converted by the function's type hints, to enums, dataclasses and the like.

        Raises:
            ValueError: as ``parsed``, or they do not fit the function.
        """
        return bind_arguments(function, self.parsed())

    def answer(self, result: Any) -> Message:
        """The message with the call's result for the model: a string as it is, anything else as JSON.

        Raises:
            TypeError: the result cannot be written as JSON.
        """
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": result_text(result)}

    def message(self) -> Message:
        """A complete call as an item of an assistant message's ``tool_calls``."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Delta:
    """What one or more engine steps added to an answer.

    Attributes:
        text: new text; all deltas joined give the whole answer.
        token_ids: new token ids, without the end token.
        logprobs: one entry per token id if requested, else None.
        finish_reason: set on the last delta of a finished request.
        usage: set on the last delta if the engine counts tokens itself.
        error: set on the last delta of a failed request; a stream raises it.
        value: set on the last delta of a job: a vector, a score, or a function's result.
        prompt_token_ids: on the first delta if requested: the tokens that the model has read.
        prompt_logprobs: on the first delta if requested: one entry per prompt token; None for the first token.
        reasoning: new text of the model's thoughts, if returned separately.
        tool_calls: pieces of calls; pieces of one call share an ``index``.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: LMBridgeError | None = None
    value: Any = None
    prompt_token_ids: Sequence[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()


@dataclass(slots=True)
class Response:
    """A complete answer.

    Attributes:
        text: the answer.
        token_ids: its token ids, without the end token.
        finish_reason: ``stop`` (ended by the model or a stop word), ``length`` (no room left), ``tool_calls`` (it calls
            functions), ``abort``.
        usage: token counts.
        timings: seconds.
        logprobs: one entry per token id if requested, else None.
        request_id: the request it answers.
        value: the result of a job: a vector, a score, or a function's result.
        prompt_token_ids: the tokens that the model has read, if requested.
        prompt_logprobs: one entry per prompt token if requested; None for the first token.
        reasoning: the model's thoughts before its answer, if returned separately.
        tool_calls: the functions that the model calls.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[Logprobs] | None = None
    request_id: str = ""
    value: Any = None
    prompt_token_ids: Sequence[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()

    def message(self) -> Message:
        """The answer as the conversation's next message."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.message() for call in self.tool_calls]
        return message


Outcome = Response | BaseException
"""How a call ended. The reader fills in a Response's text, token ids and logprobs from the deltas."""


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    """Merge one or more deltas, in order, into one."""
    if len(deltas) == 1:
        return deltas[0]
    token_ids: list[int] = []
    logprobs: list[Logprobs] | None = None
    for delta in deltas:
        token_ids += delta.token_ids
        if delta.logprobs is not None:
            logprobs = [] if logprobs is None else logprobs
            logprobs += delta.logprobs
    first, last = deltas[0], deltas[-1]
    text = "".join([delta.text for delta in deltas])
    return Delta(
        text, token_ids, logprobs, last.finish_reason, last.usage, last.error, last.value,
        first.prompt_token_ids, first.prompt_logprobs,
        "".join([delta.reasoning for delta in deltas]), _joined_calls(deltas),
    )  # fmt: skip


def _joined_calls(deltas: Sequence[Delta]) -> Sequence[ToolCall]:
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    if len(pieces) < 2:
        return pieces
    calls: dict[int, list[ToolCall]] = {}
    for piece in pieces:
        calls.setdefault(piece.index, []).append(piece)
    return [
        ToolCall(index, of_call[0].id, of_call[0].name, "".join([piece.arguments for piece in of_call]))
        for index, of_call in calls.items()
    ]
