"""A conversation over any bridge or client.

Rule: knows the verbs and plain messages, nothing else. The history changes only when a turn has been answered whole.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from lmbridge.messages import Delta, GenerationConfig, Message, Response

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lmbridge.caller.options import CallOptions
    from lmbridge.caller.verbs import Verbs


class Chat:
    """Keeps the history of one conversation; one turn at a time.

    Attributes:
        messages: the conversation so far, as the model sees it.
    """

    def __init__(self, caller: Verbs, config: GenerationConfig | None = None, *, system: str | None = None) -> None:
        self._caller = caller
        self._config = config
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str, **options: Unpack[CallOptions]) -> Response:
        """Say ``text`` and block for the whole answer. Options and errors are those of ``Bridge.infer``."""
        turn = self._turn(text)
        response: Response = self._caller.infer(turn, self._config, **options)
        self._keep(turn, response)
        return response

    def stream(self, text: str, **options: Unpack[CallOptions]) -> Generator[Delta, None, None]:
        """Say ``text`` and yield the answer as it grows; a turn that is left or fails is not remembered.

        Leaving the loop or ``close()`` stops the engine.
        """
        turn = self._turn(text)
        stream = self._caller.stream(turn, self._config, **options)

        def deltas() -> Generator[Delta, None, None]:
            yield from stream
            self._keep(turn, stream.response)

        return deltas()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _turn(self, text: str) -> list[Message]:
        return [*self.messages, {"role": "user", "content": text}]

    def _keep(self, turn: list[Message], response: Response) -> None:
        if response.finish_reason != "abort":
            self.messages = [*turn, {"role": "assistant", "content": response.text}]
