"""Writes answers in OpenAI's form: whole, and as the chunks of a stream.

Rule: plain data in, JSON out; sends nothing. A chunk is assembled from text serialised once per answer, because with
many streams there are thousands of chunks per second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from lmbridge.flask.openai.logprobs import LogprobsForm
from lmbridge.flask.sse import usage_object
from lmbridge.messages import Delta, Response, ToolCall, Usage

DONE = "[DONE]"

Said = TypeVar("Said", Response, Delta)


class Writer:
    """Writes the answers to one request.

    Args:
        answer_id: the ``id`` of every object written, without its prefix.
        created: seconds since the epoch.
        model: the model's name.
        logprobs: None if not requested.
        usage: write ``usage`` into every chunk: null, except in the last.
        echo: returns the text to put before an answer, by its index; None: no echo.
        token_ids: write the token ids of the prompt and the answers.
    """

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    prefix: ClassVar[str]  # of the id
    prompt_beside_choices: ClassVar[bool]  # whether the prompt's token ids are beside the choices, or in each choice

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        logprobs: LogprobsForm | None = None,
        usage: bool = False,
        echo: Callable[[int], str] | None = None,
        token_ids: bool = False,
    ) -> None:
        self._facts = {"id": self.prefix + answer_id, "created": created, "model": model}
        self._logprobs = logprobs
        self._echo = echo
        self._token_ids = token_ids
        self._begun: set[int] = set()  # answers whose first chunk was written
        facts = _compact({**self._facts, "object": self.chunk_name})[:-1]
        no_usage = '"usage":null,' if usage else ""
        self._head = f'{facts},{no_usage}"choices":[{{"index":'
        self._tail = f'{facts},"choices":[],"usage":'

    # --- whole answers ---

    def whole(self, responses: Sequence[Response], usage: Usage, reasoning_tokens: int = 0) -> dict[str, Any]:
        """One object with all answers."""
        choices = [self._choice(index, response) for index, response in enumerate(responses)]
        of_prompt = self._of_prompt(responses[0]) if self.prompt_beside_choices else {}
        usages = usage_object(usage, reasoning_tokens)
        return {**self._facts, "object": self.object_name, "choices": choices, **of_prompt, "usage": usages}

    def _choice(self, index: int, response: Response) -> dict[str, Any]:
        of_prompt = {} if self.prompt_beside_choices else self._of_prompt(response)
        return {
            "index": index,
            **self._said(self._echoed(index) + response.text, response),
            "logprobs": self._probabilities(index, response),
            "finish_reason": response.finish_reason,
            **of_prompt,
            **({"token_ids": response.token_ids} if self._token_ids else {}),
        }

    # --- chunks ---

    def chunk(self, index: int, delta: Delta) -> str | None:
        """Write a delta of an answer; None if it contains nothing for the client."""
        first = index not in self._begun
        tokens = self._token_ids and (delta.token_ids or delta.prompt_token_ids)
        said = delta.text or delta.reasoning or delta.tool_calls or delta.logprobs or delta.finish_reason or tokens
        if not said and not (first and self._echo):
            return None
        self._begun.add(index)
        text = self._echoed(index) + delta.text if first else delta.text
        piece = self._piece(text, first, delta)
        logprobs = _compact(self._probabilities(index, delta)) if delta.logprobs or delta.prompt_logprobs else "null"
        reason = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        in_choice, beside = self._ids(delta, first) if self._token_ids else ("", "")
        return f'{self._head}{index},{piece},"logprobs":{logprobs},"finish_reason":{reason}{in_choice}}}]{beside}}}'

    def counts(self, usage: Usage, reasoning_tokens: int = 0) -> str:
        """The last chunk, with the token counts."""
        return f"{self._tail}{_compact(usage_object(usage, reasoning_tokens))}}}"

    # --- different for chats and completions ---

    def _said(self, text: str, response: Response) -> dict[str, Any]:
        """The part of a choice with its whole text, and its reasoning and calls."""
        raise NotImplementedError

    def _piece(self, text: str, first: bool, delta: Delta) -> str:
        """The part of a chunk with the delta's text, reasoning and calls, as JSON."""
        raise NotImplementedError

    # --- parts ---

    def _echoed(self, index: int) -> str:
        return "" if self._echo is None else self._echo(index)

    def _probabilities(self, index: int, said: Response | Delta) -> dict[str, Any] | None:
        """The log-probabilities of the new tokens, after those of an echoed prompt, whose first token has none."""
        if self._logprobs is None:
            return None
        if said.prompt_logprobs is not None and said.prompt_token_ids is not None:
            known = [entry for entry in said.prompt_logprobs[1:] if entry is not None]
            return self._logprobs.render(index, [*known, *(said.logprobs or ())], said.prompt_token_ids[0])
        return None if said.logprobs is None else self._logprobs.render(index, said.logprobs)

    def _of_prompt(self, said: Response | Delta) -> dict[str, Any]:
        ids = said.prompt_token_ids
        return {"prompt_token_ids": None if ids is None else list(ids)} if self._token_ids else {}

    def _ids(self, delta: Delta, first: bool) -> tuple[str, str]:
        """The ends of a chunk's choice and of the chunk, with the token ids."""
        of_prompt = "," + _compact(self._of_prompt(delta))[1:-1] if first else ""
        of_answer = f',"token_ids":{_compact(delta.token_ids)}'
        return (of_answer, of_prompt) if self.prompt_beside_choices else (of_prompt + of_answer, "")


class ChatWriter(Writer):
    """``chat.completion`` and its chunks; the first chunk of an answer names its role."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl-"
    prompt_beside_choices = True

    def _said(self, text: str, response: Response) -> dict[str, Any]:
        message = {**response.message(), "refusal": None}
        if not text and response.tool_calls:
            message["content"] = None
        return {"message": message}

    def _piece(self, text: str, first: bool, delta: Delta) -> str:
        if not text or delta.reasoning or delta.tool_calls:
            return f'"delta":{_compact(_parts(text, first, delta))}'
        role = '"role":"assistant",' if first else ""
        return f'"delta":{{{role}"content":{json.dumps(text)}}}'


class CompletionWriter(Writer):
    """``text_completion``; its chunks have the same name."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    prefix = "cmpl-"
    prompt_beside_choices = False

    def _said(self, text: str, response: Response) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str, first: bool, delta: Delta) -> str:
        return f'"text":{json.dumps(text)}'


def _parts(text: str, first: bool, delta: Delta) -> dict[str, Any]:
    """A chunk's delta with more than text. Without content, leave the member out: some clients read null as text."""
    parts: dict[str, Any] = {"role": "assistant", "content": None} if first else {}
    if text or (first and delta.finish_reason):
        parts["content"] = text
    if delta.reasoning:
        parts["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        parts["tool_calls"] = _pieces(delta.tool_calls)
    return parts


def _pieces(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """One piece per call, since clients expect one per chunk; a call's first piece has its id and name."""
    pieces: dict[int, dict[str, Any]] = {}
    for call in calls:
        if call.index in pieces:
            pieces[call.index]["function"]["arguments"] += call.arguments
        elif call.id:
            pieces[call.index] = {"index": call.index, **call.message()}
        else:
            pieces[call.index] = {"index": call.index, "function": {"arguments": call.arguments}}
    return list(pieces.values())


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def total_usage(responses: Sequence[Response], n: int) -> Usage:
    """The token counts of all answers; each prompt has ``n`` consecutive answers and counts once."""
    return Usage(
        prompt_tokens=sum(response.usage.prompt_tokens for response in responses[::n]),
        completion_tokens=sum(response.usage.completion_tokens for response in responses),
    )


def parted(delta: Delta) -> Sequence[Delta]:
    """Split a delta that ends an answer with calls: clients expect the finish reason in a chunk after the calls."""
    if not delta.tool_calls or delta.finish_reason is None:
        return (delta,)
    return replace(delta, finish_reason=None), Delta(finish_reason=delta.finish_reason)


def without_reasoning(said: Said) -> Said:
    """A response or delta without its reasoning."""
    return replace(said, reasoning="") if said.reasoning else said


def silenced(response: Response) -> Response:
    """The response without its answer, which was not requested."""
    usage = Usage(prompt_tokens=response.usage.prompt_tokens)
    return replace(response, text="", token_ids=[], logprobs=None, finish_reason="length", usage=usage)


def silenced_delta(delta: Delta) -> Delta:
    """The delta without its part of an answer that was not requested."""
    return replace(delta, text="", token_ids=[], logprobs=None, finish_reason="length" if delta.finish_reason else None)
