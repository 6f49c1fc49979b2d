"""One answer of an engine that yields token ids: turns them into deltas.

Rule: plain data, no library; server thread only. We detokenise the ids ourselves: the text is exact, stop words of any
length are found, and calls and thoughts are parsed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lmbridge.engines.dialect import Dialect, read_apart
from lmbridge.engines.text import Piece, TextStream, Vocabulary
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Logprobs, Usage


class Answer:
    """The state of one answer, from its first token to its last.

    Args:
        prompt: its token ids.
        dialect: the model's format for calls and thoughts.
        stop_ids: tokens that end the answer, unknown to the library; excluded from the text.

    Attributes:
        stopped: a stop word or one of ``stop_ids`` has ended it; the library must be stopped.
    """

    def __init__(
        self,
        config: GenerationConfig,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        dialect: Dialect,
        stop_ids: Collection[int] = (),
    ) -> None:
        self.stopped = False
        reads = dialect.reads(config)
        self._stream = TextStream(
            vocabulary,
            config.stop_words,
            config.skip_special_tokens and not (reads and dialect.wants_all_tokens(config)),
            keep_stop_word=config.include_stop_str_in_output,
            least=config.min_new_tokens or 0,
            shown=dialect.shown if reads else frozenset(),
        )
        self._reader = dialect.reader(config, prompt) if reads else None
        self._stop_ids = stop_ids
        self._most_likely = config.logprobs
        self._prompt_tokens = len(prompt)
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._told = 0  # tokens returned so far
        self._cut = False  # by a stop word: drop the text held back
        self._count = 0  # tokens generated, including the end token

    def take(self, token_ids: list[int], logprobs: list[dict[int, float]] | None) -> Delta | None:
        """Take the next tokens; returns what can be shown of them, if anything."""
        if self.stopped or not token_ids:
            return None
        ending = next((place for place, token in enumerate(token_ids) if token in self._stop_ids), None)
        shown = token_ids if ending is None else token_ids[:ending]
        self._count += len(shown) + (ending is not None)
        self._tokens += shown
        if self._most_likely is not None:
            self._logprobs += map(self._entry, shown, logprobs or ())
        piece = self._stream.push(shown)
        self._cut = piece.stopped
        self.stopped = piece.stopped or ending is not None
        return self._read(self._delta(piece)) if piece.text or piece.tokens else None

    def finish(self, reason: FinishReason) -> Delta:
        """The last delta, with everything held back."""
        if reason == "stop" and not self.stopped:
            self._count += 1  # libraries do not yield the end token
        rest = Piece("", 0) if self._cut else self._stream.finish()
        if self.stopped or rest.stopped:
            reason = "stop"
        delta = self._delta(rest)
        delta.finish_reason = reason
        delta.usage = Usage(self._prompt_tokens, self._count)
        return self._read(delta)

    def _delta(self, piece: Piece) -> Delta:
        start, self._told = self._told, self._told + piece.tokens
        wanted = self._most_likely is not None
        return Delta(
            piece.text, self._tokens[start : self._told], self._logprobs[start : self._told] if wanted else None
        )

    def _read(self, delta: Delta) -> Delta:
        if self._reader is not None:
            read_apart(self._reader, delta)
        return delta

    def _entry(self, token: int, entry: dict[int, float]) -> Logprobs:
        """The token's own log-probability first; libraries may return one more than requested."""
        others = entry.items() if self._most_likely else ()
        return {token: entry.get(token, float("-inf")), **dict(others)}
