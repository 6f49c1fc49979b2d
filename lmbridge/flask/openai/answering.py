"""A checked call made into its answer: asks the bridge, and says what comes in OpenAI's words.

Rule: works with any client's verbs, on the thread of the HTTP request. What fails here is one of the bridge's errors.
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
    """One call on one bridge.

    Args:
        bridge: asks in the name of the HTTP request.
        request_id: the requests on the bridge are named after it.
        timeout: seconds, or None.
    """

    def __init__(self, call: Call, bridge: Client, writer: Writer, request_id: str, timeout: float | None) -> None:
        self._call = call
        self._bridge = bridge
        self._writer = writer
        self._thoughts = ThoughtTokens()  # counted also where they are not told
        self._options: dict[str, Any] = {"raw": call.raw, "timeout": timeout, "request_id": request_id}

    def whole(self) -> dict[str, Any]:
        """Wait for all answers.

        Raises:
            LMBridgeError: the first error; the other answers have been aborted.
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
        """Begin the answers; returns what they are read from, and the data of their events.

        Args:
            heartbeat: seconds of silence after which None stands in place of data.

        Raises:
            LMBridgeError: what failed before the first token and early enough to have a status of its own.
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
        """An error ends them without the final word: what merely ends would look like success."""
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
    """Raise what has ended an answer before it was complete."""
    _, delta = piece
    if delta.error is not None:
        raise delta.error
    if delta.finish_reason == "abort":
        raise _aborted()


def _complete(reader: Reader) -> list[Response]:
    """The answers as they are as a whole; raises unless all of them are complete."""
    found = reader.responses if isinstance(reader, StreamGroup) else [reader.response]
    for response in found:
        if not isinstance(response, Response):
            raise response
        if response.finish_reason == "abort":
            raise _aborted()
    return found  # type: ignore[return-value]


def _aborted() -> RequestAbortedError:
    return RequestAbortedError("The request was aborted before its answer was complete.")
