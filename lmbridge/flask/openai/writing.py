"""Answers as OpenAI's clients read them: whole, and as the chunks of a stream.

Rule: plain data in, JSON out; nothing is sent here. A chunk is put together from text that was serialised once per
answer, because at many streams its cost is paid many thousand times a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from lmbridge.flask.openai.logprobs import LogprobsForm
from lmbridge.flask.sse import usage_object
from lmbridge.messages import Delta, Logprobs, Response, Usage

DONE = "[DONE]"


class Writer:
    """Writes the answers to one request.

    Args:
        answer_id: the ``id`` of every object written.
        created: seconds since the epoch.
        model: the model's name.
        logprobs: None where none were asked for.
        usage: every chunk says whether it has the token counts; the last one does.
        echoed: per answer, the text put before it; empty when nothing is echoed.
    """

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    prefix: ClassVar[str]  # of the id

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        logprobs: LogprobsForm | None = None,
        usage: bool = False,
        echoed: Sequence[str] = (),
    ) -> None:
        self._facts = {"id": self.prefix + answer_id, "created": created, "model": model}
        self._logprobs = logprobs
        self._echoed = echoed
        self._begun: set[int] = set()  # answers that have had their first chunk
        facts = _compact({**self._facts, "object": self.chunk_name})[:-1]
        no_usage = '"usage":null,' if usage else ""
        self._head = f'{facts},{no_usage}"choices":[{{"index":'
        self._tail = f'{facts},"choices":[],"usage":'

    # --- whole answers ---

    def whole(self, responses: Sequence[Response], usage: Usage) -> dict[str, Any]:
        """One object with all answers."""
        choices = [
            {
                "index": index,
                **self._said(self._echo(index) + response.text),
                "logprobs": self._probabilities(index, response.logprobs),
                "finish_reason": response.finish_reason,
            }
            for index, response in enumerate(responses)
        ]
        return {**self._facts, "object": self.object_name, "choices": choices, "usage": usage_object(usage)}

    # --- chunks ---

    def chunk(self, index: int, delta: Delta) -> str | None:
        """What a delta of an answer adds; None when that is nothing a client could see."""
        first = index not in self._begun
        if not (first or delta.text or delta.logprobs or delta.finish_reason):
            return None
        self._begun.add(index)
        text = self._echo(index) + delta.text if first else delta.text
        said = self._piece(json.dumps(text), first)
        logprobs = _compact(self._probabilities(index, delta.logprobs)) if delta.logprobs else "null"
        reason = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        return f'{self._head}{index},{said},"logprobs":{logprobs},"finish_reason":{reason}}}]}}'

    def counts(self, usage: Usage) -> str:
        """The last chunk, with the token counts."""
        return f"{self._tail}{_compact(usage_object(usage))}}}"

    # --- what chats and completions say differently ---

    def _said(self, text: str) -> dict[str, Any]:
        """The part of a choice that holds its whole text."""
        raise NotImplementedError

    def _piece(self, text: str, first: bool) -> str:
        """The part of a chunk that holds its text, which is JSON already."""
        raise NotImplementedError

    # --- parts ---

    def _echo(self, index: int) -> str:
        return self._echoed[index] if self._echoed else ""

    def _probabilities(self, index: int, entries: Sequence[Logprobs] | None) -> dict[str, Any] | None:
        if self._logprobs is None or entries is None:
            return None
        return self._logprobs.render(index, entries)


class ChatWriter(Writer):
    """``chat.completion`` and its chunks; the first chunk of an answer names its role."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str, first: bool) -> str:
        role = '"role":"assistant",' if first else ""
        return f'"delta":{{{role}"content":{text}}}'


class CompletionWriter(Writer):
    """``text_completion``, which is what its chunks are called too."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    prefix = "cmpl-"

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str, first: bool) -> str:
        return f'"text":{text}'


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def total_usage(responses: Sequence[Response], n: int) -> Usage:
    """The tokens of all answers together, where each prompt has ``n`` answers in a row and counts once."""
    return Usage(
        prompt_tokens=sum(response.usage.prompt_tokens for response in responses[::n]),
        completion_tokens=sum(response.usage.completion_tokens for response in responses),
    )
