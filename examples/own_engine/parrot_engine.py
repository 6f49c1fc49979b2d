"""An engine over a remote API, as a package of its own adds it: ``Bridge("quiet", engine="parrot")``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from lmbridge import Delta, Engine, EngineError, InvalidRequestError, PromptTooLongError, Request, Usage, prompt_text


class ParrotEngine(Engine):
    name = "parrot"
    supports = frozenset({"max_new_tokens"})  # all else that a caller gives is refused by name
    max_batch_size = 16  # calls that the API takes at once: what comes beyond waits in the bridge

    def __init__(self, model: str, *, patience: float = 10.0) -> None:
        if model not in ("quiet", "loud"):  # cheap checks only: a mistake is told where the Bridge is built
            raise InvalidRequestError(f"The parrot's voice is 'quiet' or 'loud', not {model!r}.", "model")
        self._voice, self._patience = model, patience

    async def start(self) -> None:
        from parrot_api import ParrotClient  # the library is imported where it is needed

        self._client = ParrotClient(self._voice)
        async with asyncio.timeout(self._patience):
            await self._client.ping()  # no engine is ready that does not answer

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        from parrot_api import OverloadedError, TooManyWordsError

        prompt = prompt_text(request.prompt)  # of a conversation what was said last; the API takes no more
        asked, most, said = len(prompt.split()), request.config.max_new_tokens, 0
        try:
            async for word in self._client.complete(prompt, most):  # leaving this is the abort
                said += 1
                yield Delta(f"{word} ")
        except TooManyWordsError as error:
            raise PromptTooLongError(f"The parrot reads 400 words; this has {error}.", "prompt", 400) from error
        except OverloadedError as error:
            self.on_busy(error.retry_after)  # the bridge holds further requests back for so long
            refused = EngineError("The parrot has no room for this request now; send it again.")
            refused.retryable = True
            raise refused from error
        yield Delta(finish_reason="length" if said < asked else "stop", usage=Usage(asked, said))
