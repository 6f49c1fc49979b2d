"""One answer of llama.cpp: turns its messages into deltas.

Rule: plain data; server thread only. We look for stop words here, as with every engine: llama.cpp looks only in text
not yet sent, before it takes calls and thoughts out of it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

from lmbridge.engines.llamacpp.forms import Form
from lmbridge.engines.text import StopWords
from lmbridge.errors import EngineError, InvalidRequestError, LMBridgeError, PromptTooLongError
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Logprobs, ToolCall, Usage

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


class Reading:
    """The state of an answer, from its first message to its last.

    Args:
        texts: token id to its text; filled here.

    Attributes:
        form: the form of the answer; known with its first message.
        stopped: a stop word or stop token has ended it; llama.cpp must be stopped.
        tokens: how many were generated, including the end token.
    """

    def __init__(self, config: GenerationConfig, texts: dict[int, str]) -> None:
        self.form: Form | None = None
        self.stopped = False
        self.tokens = 0
        words = config.stop_words
        self._stop_words = StopWords(words, config.include_stop_str_in_output) if words else None
        self._stop_ids = frozenset(config.stop_token_ids or ())
        self._most_likely = config.logprobs
        self._texts = texts
        calling = config.calling
        self._formed = config.form is not None or (calling is not None and calling.required)  # it has no thoughts
        self._call = "" if calling is not None and calling.required else None  # the answer is the JSON of one call
        self._prompt_tokens = 0
        self._reason: FinishReason | None = None
        self._received = self._shown = 0  # characters
        self._held: list[tuple[int, int, Logprobs]] = []  # tokens held back: where their text begins, id, logprobs

    def take(self, words: Iterable[dict[str, Any]]) -> Delta | None:
        """The new part of the answer, if any.

        Raises:
            LMBridgeError: llama.cpp has failed the request.
        """
        delta = Delta()
        for word in words:
            if self.stopped:
                break
            self._take(word, delta)
        self._release(delta, ended=False)
        told = delta.text or delta.token_ids or delta.reasoning or delta.tool_calls
        return delta if told else None

    def finish(self) -> Delta:
        """The last delta, with everything held back.

        Raises:
            EngineError: the answer is incomplete, or violates its form.
        """
        delta = Delta(finish_reason="stop" if self.stopped else self._reason)
        if delta.finish_reason is None:
            raise EngineError("llama.cpp ended the answer without a finish_reason.")
        if not self._prompt_tokens:
            raise InvalidRequestError("The prompt is empty: the tokenizer produces no token. Add some text.", "prompt")
        if self.form is not None and delta.finish_reason == "stop" and not self.stopped:
            self.form.finish()
        if self._stop_words is not None and not self.stopped:
            delta.text = self._stop_words.finish()
            self._shown += len(delta.text)
        self._release(delta, ended=True)
        if self._call is not None:
            self._tell_call(delta)
        delta.usage = Usage(self._prompt_tokens, self.tokens)
        return delta

    # --- parts ---

    def _take(self, word: dict[str, Any], delta: Delta) -> None:
        if "error" in word:
            raise failure(word["error"])
        self._count(word)
        for choice in word.get("choices", ()):
            said = choice.get("delta") or {}
            tokens = (choice.get("logprobs") or {}).get("content") or ()
            if self._ends(tokens):
                self.stopped = True
                return
            self._held += [(self._received, token["id"], self._logprobs(token)) for token in tokens]
            thought, text = said.get("reasoning_content") or "", choice.get("text") or said.get("content") or ""
            delta.reasoning += "" if self._formed else thought
            delta.tool_calls = (*delta.tool_calls, *map(_call, said.get("tool_calls") or ()))
            delta.text += self._text(thought + text if self._formed else text)
            self._reason = _REASONS.get(choice.get("finish_reason"), self._reason)

    def _count(self, word: dict[str, Any]) -> None:
        if "prompt_progress" in word:
            self._prompt_tokens = word["prompt_progress"]["total"]
        elif "usage" in word:
            self._prompt_tokens = word["usage"]["prompt_tokens"]
            self.tokens = word["usage"]["completion_tokens"]
        elif "timings" in word:
            self.tokens = word["timings"]["predicted_n"]

    def _ends(self, tokens: Iterable[dict[str, Any]]) -> bool:
        for token in tokens:
            self._texts[token["id"]] = token["token"]
        return any(token["id"] in self._stop_ids for token in tokens)

    def _text(self, text: str) -> str:
        self._received += len(text)
        if self.form is not None and text:
            self.form.take(text)
        if self._call is not None:
            self._call += text
            text = ""
        if self._stop_words is not None:
            text = self._stop_words.push(text)
            self.stopped = self._stop_words.stopped
        self._shown += len(text)
        return text

    def _logprobs(self, token: dict[str, Any]) -> Logprobs:
        if not self._most_likely:
            return {token["id"]: token.get("logprob", 0.0)}
        others = {other["id"]: other["logprob"] for other in token["top_logprobs"]}
        self._texts.update((other["id"], other["token"]) for other in token["top_logprobs"])
        return {token["id"]: token["logprob"], **others}

    def _release(self, delta: Delta, ended: bool) -> None:
        """Release the tokens whose text is shown, except the end token, or one that may be it."""
        cut = self._stop_words is not None and (self.stopped or not ended)
        ready = [held for held in self._held if not cut or held[0] < self._shown]
        bare = bool(ready) and len(ready) == len(self._held) and self._received == ready[-1][0]
        if bare and (not ended or delta.finish_reason == "stop"):
            ready.pop()
        del self._held[: len(ready)]
        delta.token_ids += [token for _, token, _ in ready]
        if self._most_likely is not None:
            delta.logprobs = [*(delta.logprobs or ()), *(logprobs for _, _, logprobs in ready)]

    def _tell_call(self, delta: Delta) -> None:
        """Parse the text as one call, if it is complete."""
        text = self._call or ""
        try:
            call = json.loads(text)
            arguments = json.dumps(call["parameters"], ensure_ascii=False)
            delta.tool_calls = (ToolCall(0, f"call_{secrets.token_hex(12)}", call["name"], arguments),)
            delta.finish_reason = "tool_calls"
        except (ValueError, LookupError, TypeError):  # cut off
            delta.text += text


def failure(error: Any) -> LMBridgeError:
    """llama.cpp's error as one of ours."""
    error = error if isinstance(error, dict) else {"message": str(error)}
    message, kind = str(error.get("message", "no reason given")), error.get("type")
    if kind == "exceed_context_size_error" or "too large to process" in message:
        most = error.get("n_ctx") or next(map(int, re.findall(r"batch size: (\d+)", message)), None)
        return PromptTooLongError(f"llama.cpp: {message}. Shorten it.", "prompt", most).hinted(
            "max_context raises the limit where the model allows it."
        )
    if kind == "invalid_request_error":
        return InvalidRequestError(
            f"llama.cpp refused the request: {message}.", "grammar" if "grammar" in message else "prompt"
        )
    return EngineError(f"llama.cpp failed the request: {message}.")


def _call(piece: dict[str, Any]) -> ToolCall:
    function = piece.get("function") or {}
    return ToolCall(
        piece.get("index", 0), piece.get("id") or "", function.get("name") or "", function.get("arguments") or ""
    )
