"""Answers a checked call: sends it to the bridge, and writes the result as items or events.

Rule: works with any Client, on the thread of the HTTP request. Errors here are the bridge's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lmbridge import Client, Delta, InvalidRequestError, RequestAbortedError, Response, Stream
from lmbridge.flask.openai.errors import describe
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.responses.output import Event, write_event
from lmbridge.flask.openai.responses.telling import Telling
from lmbridge.flask.openai.sampling import in_clients_words
from lmbridge.flask.sse import Payload, Piece, first_pieces, pieces


class Answering:
    """One call to one bridge.

    Args:
        bridge: the HTTP request's client of the bridge.
        request_id: the id of the bridge's request.
        timeout: seconds, or None.
        remember: called with the answer's items, before the client gets the last event.
    """

    def __init__(
        self,
        call: Call,
        bridge: Client,
        telling: Telling,
        request_id: str,
        timeout: float | None,
        remember: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self._call = call
        self._bridge = bridge
        self._telling = telling
        self._remember = remember
        self._prompt: Any = call.prompts[0]
        self._options: dict[str, Any] = {"timeout": timeout, "request_id": request_id}

    def whole(self) -> dict[str, Any]:
        """Wait for the answer, and return its object.

        Raises:
            LMBridgeError: the request failed.
        """
        try:
            *_, last = self._events()
        except InvalidRequestError as error:
            raise self._in_clients_words(error) from None
        assert isinstance(last, dict)
        response: dict[str, Any] = last["response"]
        self._remember(response["output"])
        return response

    def stream(self, heartbeat: float) -> tuple[Stream, Iterator[Payload | None]]:
        """Start the answer; return its reader, and its events.

        Args:
            heartbeat: seconds of silence after which to yield None instead of an event.

        Raises:
            LMBridgeError: the request failed before the first token, early enough for an HTTP status.
        """
        try:
            reader = self._open()
            first = first_pieces(reader)
        except InvalidRequestError as error:
            raise self._in_clients_words(error) from None
        return reader, self._payloads(reader, itertools.chain(first, pieces(reader, heartbeat)))

    def _open(self) -> Stream:
        return self._bridge.stream(self._prompt, self._call.config, **self._options)

    def _events(self) -> Iterator[Event]:
        """The events of the whole answer. With log-probabilities, stream: only deltas show which belong to its text."""
        if self._call.config.logprobs is None:
            response = self._bridge.infer(self._prompt, self._call.config, **self._options)
            yield from self._telling.add(_at_once(response))
            yield from self._telling.end(response.finish_reason, response.usage)
            return
        with self._open() as stream:
            for delta in stream:
                yield from self._telling.add(delta)
            yield from self._end(stream)

    def _end(self, stream: Stream) -> Iterator[Event]:
        if stream.response.finish_reason == "abort":
            raise RequestAbortedError("The request was aborted before its answer was complete.")
        return self._telling.end(stream.response.finish_reason, stream.response.usage)

    def _payloads(self, stream: Stream, pieces: Iterable[Piece | None]) -> Iterator[Payload | None]:
        numbers = itertools.count()
        for event in self._told(stream, pieces):
            yield None if event is None else write_event(event, next(numbers))

    def _told(self, stream: Stream, pieces: Iterable[Piece | None]) -> Iterator[Event | None]:
        """Yield the events. The last one says how the answer ended: without it, the connection would seem lost.

        Items are remembered even if the answer failed or the client left, since later requests may refer to them.
        """
        yield from self._telling.begin()
        try:
            for piece in pieces:
                if piece is None:
                    yield None
                else:
                    yield from self._telling.add(piece[1])
            last = list(self._end(stream))
        except InvalidRequestError as error:
            last = list(self._telling.fail(describe(self._in_clients_words(error))))
        except Exception as error:
            last = list(self._telling.fail(describe(error)))
        finally:
            self._remember(self._telling.output)
        yield from last

    def _in_clients_words(self, error: InvalidRequestError) -> Exception:
        return in_clients_words(error, self._call.fields, self._call.prompt_name)


def _at_once(response: Response) -> Delta:
    """A whole answer as one delta."""
    return Delta(response.text, response.token_ids, reasoning=response.reasoning, tool_calls=response.tool_calls)
