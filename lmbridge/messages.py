"""What crosses between the caller's thread and the server thread: plain data, no behaviour beyond checking itself.

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
"""What an engine may do with a request."""

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "user", "content": "…"}``."""

Prompt = Union[str, Sequence[Message], Sequence[int]]
"""One prompt: a string, a conversation, or token ids. Engines get plain dicts and ints, whatever was given."""

Logprobs = dict[int, float]
"""One position: token id to log-probability; the token that stands there comes first."""

PromptLogprobs = Sequence[Union[Logprobs, None]]
"""One entry per token of a prompt: itself first, then the most likely tokens; the prompt's first token has None."""


@dataclass(frozen=True, slots=True)
class Embed:
    """A text to make a vector of.

    Attributes:
        text: a string, or token ids.
        normalize: give a vector of length 1.
        dimensions: keep the first so many, for models that were trained for that; None keeps all.
        prompt: put before the text: the name of one of the model's own prompts, or a text.
        truncate: what to do with a text longer than the model reads: refuse it, or cut off its end.
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
    """A document whose relevance to a query is wanted; ``truncate`` cuts the document."""

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
"""What a request asks for that generates no text."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document in the order of its relevance.

    Attributes:
        index: its position in the list that was given.
        score: the higher, the more relevant. Of a model with one label what its own activation makes of it, by default
            the sigmoid, from 0 to 1; of one with several the softmax of the last.
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
        config: checked, and nobody else's.
        raw: give a text to the model as it is, without the chat template.
        client: the account whose turn it takes.
        priority: higher goes first; waiting raises it.
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
        """What the engine is asked to do."""
        return "generate" if self.job is None else self.job.task


def prompt_text(prompt: Prompt) -> str:
    """A prompt of any kind as one text: itself, what the last message of a conversation says, or the token ids.

    For engines and functions that take a text and no conversation.
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
    """Token counts; ``completion_tokens`` counts what the engine generated, the ending token included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Seconds since submission: until the engine took the request, until its first token, until its end."""

    queued: float = 0.0
    first_token: float | None = None
    total: float = 0.0


@dataclass(slots=True)
class ToolCall:
    """A function that the model calls, or in a stream a piece of such a call.

    Attributes:
        index: the call's place in the answer, from 0.
        id: unique; answered by a message ``{"role": "tool", "tool_call_id": id, "content": "…"}``. Of a call's pieces
            only the first has it, as the name.
        name: of one of the request's tools, unless the model made it up.
        arguments: JSON as the model wrote it, which may be cut off or wrong; of a piece what is new.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

    def parsed(self) -> dict[str, Any]:
        """The arguments of a whole call.

        Raises:
            ValueError: the model wrote none that are JSON, or no object.
        """
        try:
            arguments = json.loads(self.arguments or "{}")
        except RecursionError:
            raise ValueError(f"the arguments of {self.name} are nested too deeply") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {self.name} are no JSON object: {self.arguments}")
        return arguments

    def bound(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The arguments as the function's type hints want them: enums, dataclasses and the like are made.

        Raises:
            ValueError: as ``parsed``, or they are not what it takes.
        """
        return bind_arguments(function, self.parsed())

    def answer(self, result: Any) -> Message:
        """The message that tells the model what its call gave: a string as it is, else as JSON.

        Raises:
            TypeError: JSON cannot say it.
        """
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": result_text(result)}

    def message(self) -> Message:
        """A whole call as it stands in the ``tool_calls`` of an assistant's message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Delta:
    """What one or more engine steps added to an answer.

    Attributes:
        text: new text; the texts of all deltas joined are the whole answer.
        token_ids: new token ids, the ending token left out.
        logprobs: one entry per token id when asked for, else None.
        finish_reason: set on the last delta of a finished request.
        usage: set on the last delta where the engine counts tokens itself.
        error: set on the last delta of a failed request; a stream raises it.
        value: set on the last delta of a job: a vector, a score, or what a function made of an item.
        prompt_token_ids: set on the first delta where asked for: the tokens that the model has read.
        prompt_logprobs: set on the first delta where asked for: one entry per token of the prompt; the first token,
            which nothing comes before, has None.
        reasoning: new text of what the model thinks before its answer, where that is given apart.
        tool_calls: pieces of calls; those of one call have one ``index``.
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
    """A whole answer.

    Attributes:
        text: the answer.
        token_ids: its token ids, the ending token left out.
        finish_reason: ``stop`` (the model or a stop word ended it), ``length`` (no room left), ``tool_calls`` (it calls
            functions), ``abort``.
        usage: token counts.
        timings: seconds.
        logprobs: one entry per token id when asked for, else None.
        request_id: the request it answers.
        value: what a job gave: a vector, a score, or what a function made of an item.
        prompt_token_ids: the tokens that the model has read, where asked for.
        prompt_logprobs: one entry per token of the prompt where asked for; that of the first token is None.
        reasoning: what the model thought before its answer, where that is given apart.
        tool_calls: the functions that it calls.
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
"""How a call ended. Its reader fills a Response's text, token ids and logprobs in from the deltas."""


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what ``deltas`` said, in order. ``deltas`` holds at least one."""
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
