"""A checked call made into its answer: asks the bridge, and says what comes as items or as events.

Rule: works with any client's verbs, on the thread of the HTTP request. What fails here is one of the bridge's errors.
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
    """One call on one bridge.

    Args:
        bridge: asks in the name of the HTTP request.
        request_id: the request on the bridge is named after it.
        timeout: seconds, or None.
        remember: told the items that were said, before the client has heard the last of them.
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
        """Wait for the answer, and return the object that it is.

        Raises:
            LMBridgeError: it has failed.
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
        """Begin the answer; returns what it is read from, and its events.

        Args:
            heartbeat: seconds of silence after which None stands in place of an event.

        Raises:
            LMBridgeError: what failed before the first token and early enough to have a status of its own.
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
        """Of the whole answer; only its deltas say which log-probabilities are those of its text."""
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
        """The last event says how the answer has ended; what merely ends would look like a lost connection.

        Also of an answer that was cut short, or left, what was said may be referred to.
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
