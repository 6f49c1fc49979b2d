"""Answers a checked call: sends it to the bridge, and writes the result in OpenAI's form.

Rule: works with any Client, on the thread of the HTTP request. Errors here are the bridge's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from lmbridge import Client, Delta, InvalidRequestError, LMBridgeError, RequestAbortedError, Response, StreamGroup
from lmbridge.flask.openai.errors import error_payload
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.sampling import in_clients_words
from lmbridge.flask.openai.thoughts import ThoughtTokens
from lmbridge.flask.openai.writing import DONE, Writer, parted, silenced, silenced_delta, total_usage, without_reasoning
from lmbridge.flask.sse import Piece, Reader, first_pieces, pieces


class Answering:
    """One call to one bridge.

    Args:
        bridge: the HTTP request's client of the bridge.
        request_id: begins the ids of the bridge's requests.
        timeout: seconds, or None.
    """

    def __init__(self, call: Call, bridge: Client, writer: Writer, request_id: str, timeout: float | None) -> None:
        self._call = call
        self._bridge = bridge
        self._writer = writer
        self._thoughts = ThoughtTokens()  # counted even if the reasoning is not returned
        self._options: dict[str, Any] = {"raw": call.raw, "timeout": timeout, "request_id": request_id}

    def whole(self) -> dict[str, Any]:
        """Wait for all answers.

        Raises:
            LMBridgeError: the first error; the other answers are aborted.
        """
        try:
            responses = self._responses()
        except InvalidRequestError as error:
            raise self._in_clients_words(error) from None
        for response in responses:
            self._thoughts.add(response)
        heard = self._heard(responses)
        return self._writer.whole(heard, total_usage(heard, self._call.n), self._thoughts.count)

    def stream(self, heartbeat: float) -> tuple[Reader, Iterator[str | None]]:
        """Start the answers; return their reader, and the data of their events.

        Args:
            heartbeat: seconds of silence after which to yield None instead of data.

        Raises:
            LMBridgeError: the request failed before the first token, early enough for an HTTP status.
        """
        try:
            reader = self._open()
            first = first_pieces(reader)
        except InvalidRequestError as error:
            raise self._in_clients_words(error) from None
        return reader, self._payloads(reader, itertools.chain(first, pieces(reader, heartbeat)))

    def _responses(self) -> list[Response]:
        choices: list[Any] = self._call.choices
        if len(choices) == 1:
            return [self._bridge.infer(choices[0], self._call.config, **self._options)]
        with self._bridge.stream_many(choices, self._call.configs, **self._options) as group:
            for piece in group:
                _check(piece)
        return _complete(group)

    def _open(self) -> Reader:
        choices: list[Any] = self._call.choices
        if len(choices) == 1:
            return self._bridge.stream(choices[0], self._call.config, **self._options)
        return self._bridge.stream_many(choices, self._call.configs, **self._options)

    def _payloads(self, reader: Reader, pieces: Iterable[Piece | None]) -> Iterator[str | None]:
        """Yield the data of the events. After an error, leave out ``[DONE]``: the stream must not look complete."""
        try:
            for piece in pieces:
                if piece is None:
                    yield None
                    continue
                _check(piece)
                index, delta = piece
                self._thoughts.add(delta)
                for part in parted(self._heard_delta(delta)):
                    chunk = self._writer.chunk(index, part)
                    if chunk is not None:
                        yield chunk
            responses = self._heard(_complete(reader))
            if self._call.include_usage:
                yield self._writer.counts(total_usage(responses, self._call.n), self._thoughts.count)
            yield DONE
        except InvalidRequestError as error:
            yield error_payload(self._in_clients_words(error))
        except Exception as error:
            yield error_payload(error)

    def _heard(self, responses: list[Response]) -> list[Response]:
        if self._call.silent:
            return [silenced(response) for response in responses]
        return responses if self._call.reasoning else [without_reasoning(response) for response in responses]

    def _heard_delta(self, delta: Delta) -> Delta:
        if self._call.silent:
            return silenced_delta(delta)
        return delta if self._call.reasoning else without_reasoning(delta)

    def _in_clients_words(self, error: InvalidRequestError) -> LMBridgeError:
        return in_clients_words(error, self._call.fields, self._call.prompt_name)


def _check(piece: Piece) -> None:
    """Raise the error of an answer that ended before it was complete."""
    _, delta = piece
    if delta.error is not None:
        raise delta.error
    if delta.finish_reason == "abort":
        raise _aborted()


def _complete(reader: Reader) -> list[Response]:
    """The whole answers; raises unless all are complete."""
    found = reader.responses if isinstance(reader, StreamGroup) else [reader.response]
    for response in found:
        if not isinstance(response, Response):
            raise response
        if response.finish_reason == "abort":
            raise _aborted()
    return found  # type: ignore[return-value]


def _aborted() -> RequestAbortedError:
    return RequestAbortedError("The request was aborted before its answer was complete.")
