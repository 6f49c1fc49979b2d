"""LMDeploy's Pipeline over a Bridge.

Rule: the caller's end; any number of threads. What it adds to LMDeploy's calls is keyword-only, and does not change the
meaning of calls without it.
"""

from __future__ import annotations

import atexit
import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmbridge.bridge import Bridge
from lmbridge.compat.lmdeploy import answers
from lmbridge.compat.lmdeploy.engines import choose_engine
from lmbridge.compat.lmdeploy.generation import Ability, generation_config
from lmbridge.compat.lmdeploy.keywords import read_keywords, told_once
from lmbridge.compat.lmdeploy.messages import Response
from lmbridge.compat.lmdeploy.prompts import each_prompt, is_single
from lmbridge.compat.lmdeploy.scores import lists_of_ids, perplexity, scoring_config
from lmbridge.compat.lmdeploy.sessions import ChatTurn, Session, Sessions, Turn
from lmbridge.compat.lmdeploy.standin import chosen
from lmbridge.compat.lmdeploy.streaming import Asked, ResponseStream
from lmbridge.compat.lmdeploy.tokenizer import words_of
from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError, LMBridgeError

_IGNORED = ("model_name", "vision_config")
"""Arguments of LMDeploy's ``pipeline`` that have no effect here."""
_GONE = {
    "async_engine": "pipe.bridge has health(), requests(), stats() and "
    "metrics, and pipe.get_ppl() and pipe.session() are as in LMDeploy",
    "generate": "await pipe.async_batch_infer(...), or iterate over pipe.bridge.astream(...)",
    "internal_thread": "the engine's thread is the bridge's; any thread may call the pipeline",
    "limiter": "pipe.bridge.requests() lists waiting and running requests",
    "session_mgr": "pipe.session() starts a session, and its abort() stops generation",
}
"""Attributes of LMDeploy's Pipeline that would expose the engine, which is not thread-safe; what to use instead."""


class Pipeline:
    """LMDeploy's Pipeline, safe for any number of threads. ``pipeline`` is an alias.

    Args:
        model_path: a folder, a hub id, ``"demo"`` for the bundled model, an Engine, or a function that builds one.
        backend_config: a PytorchEngineConfig or a TurbomindEngineConfig, ours or LMDeploy's own.
        chat_template_config: a ChatTemplateConfig, ours or LMDeploy's own; for the LMDeploy engine.
        log_level: the level of LMDeploy's logger and ours, for the whole process.
        max_log_len: ignored, like ``model_name`` and ``vision_config``; prompts are never logged.
        trust_remote_code: run code that comes with the model.
        speculative_config: refused; the engines do not decode speculatively.
        allowed_media_domains: refused; the engines do not enforce it.
        backend: an engine's name; None means transformers for the bundled model, otherwise LMDeploy.
        timeout: default deadline of every call, in seconds; None waits forever.
        stall_timeout: seconds without output after which a working engine counts as dead; None: never.
        engine_options: the engine's own options.

    Raises:
        MissingDependencyError: LMDeploy is needed and not installed; the message says how to install it.
        UnsupportedOptionError: the engine does not support an argument; the message names it.
        ModelNotFoundError, InvalidRequestError: an argument is invalid.
        EngineStartError: the model could not be loaded.

    Attributes:
        bridge: the underlying Bridge, for what LMDeploy lacks: ``health``, ``requests``, ``metrics``, ``swap``.
        backend_config: as LMDeploy's engine, if that is loaded, has completed it: ``session_len``, ``max_batch_size``,
            ``num_gpu_blocks``.
    """

    def __init__(
        self,
        model_path: str | Path | Engine | Callable[[], Engine],
        backend_config: Any = None,
        chat_template_config: Any = None,
        log_level: str = "WARNING",
        max_log_len: int | None = None,
        trust_remote_code: bool = False,
        speculative_config: Any = None,
        allowed_media_domains: list[str] | None = None,
        *,
        backend: str | None = None,
        timeout: float | None = None,
        stall_timeout: float | None = 300.0,
        **engine_options: Any,
    ) -> None:
        self._given_config = backend_config
        self._timeout = timeout
        self._sessions = Sessions()
        ignored = {"max_log_len": max_log_len, **{name: engine_options.pop(name, None) for name in _IGNORED}}
        for name in ignored:
            if ignored[name] is not None:
                told_once("The argument %s of pipeline() has no effect", name)
        given = {
            "chat_template_config": chat_template_config,
            "speculative_config": speculative_config,
            "allowed_media_domains": allowed_media_domains,
        }
        model_path, backend = chosen(model_path, backend)
        engine, options = choose_engine(model_path, backend, backend_config, given, trust_remote_code, log_level)
        self._word_ids = words_of(model_path, trust_remote_code)
        self.bridge = Bridge(model_path, engine, stall_timeout=stall_timeout, **options, **engine_options)
        try:
            self.bridge.start()
            self._supports = self.bridge.supports()
            _open[weakref.ref(self, _open.pop)] = None
        except BaseException:
            self.bridge.close()
            raise

    # --- complete answers ---

    def infer(
        self,
        prompts: Any,
        gen_config: Any = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool = False,
        *,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate and block for the complete answer; a list of prompts gives a list of answers in order.

        Args:
            prompts: a string, a list of messages, a pair of text and image, or a list of these.
            gen_config: how to generate; a list gives one per prompt.
            do_preprocess: False passes a string to the model as it is, without the chat template.
            use_tqdm: show a progress bar.
            adapter_name: one of the ``adapters`` in the ``backend_config``, for LMDeploy's engine.
            timeout: seconds for the whole call; None means the pipeline's.
            kwargs: ``enable_thinking``, ``chat_template_kwargs``, ``reasoning_effort`` and ``tools`` for the chat
                template; ``media_io_kwargs`` and ``mm_processor_kwargs`` for LMDeploy's engine. Others are ignored,
                with a warning.

        Returns:
            A Response, or a list of them. A prompt that fails on its own gets one with ``finish_reason="error"``.

        Raises:
            InvalidRequestError: prompts or configs are invalid; nothing was sent.
            RequestTimeoutError: the deadline passed; generation was aborted.
            BridgeClosedError, ForkedError: the pipeline was closed, or belongs to the parent process.
        """
        asked = self._asked(prompts, gen_config, do_preprocess, adapter_name, timeout, kwargs)
        if is_single(prompts) and not use_tqdm:
            return self._infer_one(asked)
        results = self.bridge.infer(
            asked.prompts, asked.configs, return_exceptions=True, progress=use_tqdm, **asked.options
        )
        responses = [answers.answer(result, index) for index, result in enumerate(results)]
        return responses[0] if is_single(prompts) else responses

    def __call__(self, prompts: Any, gen_config: Any = None, **kwargs: Any) -> Any:
        """``infer``."""
        return self.infer(prompts, gen_config=gen_config, **kwargs)

    def batch_infer(self, *args: Any, **kwargs: Any) -> Any:
        """``infer`` under its old name."""
        warnings.warn("batch_infer is deprecated; call infer.", DeprecationWarning, stacklevel=2)
        return self.infer(*args, **kwargs)

    async def async_batch_infer(
        self,
        prompts: Any,
        gen_config: Any = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        *,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """``infer`` for a task on any event loop, the engine's own included; cancelling the task stops generation."""
        asked = self._asked(prompts, gen_config, do_preprocess, adapter_name, timeout, kwargs)
        results = await self.bridge.ainfer(asked.prompts, asked.configs, return_exceptions=True, **asked.options)
        responses = [answers.answer(result, index) for index, result in enumerate(results)]
        return responses[0] if is_single(prompts) else responses

    def _infer_one(self, asked: Asked) -> Response:
        """A single prompt, without the overhead of a list."""
        try:
            return answers.whole(self.bridge.infer(asked.prompts[0], asked.configs[0], **asked.options))
        except LMBridgeError as error:
            return answers.failed(error)

    # --- streams ---

    def stream_infer(
        self,
        prompts: Any,
        sessions: Session | int | Sequence[Session | int | None] | None = None,
        gen_config: Any = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        stream_response: bool = True,
        *,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> ResponseStream:
        """Send the prompts and return the parts of their answers as they come; ``index`` names the prompt.

        Args:
            sessions: one per prompt, or its number, so that ``abort()`` works; each is in use until its answer is read
                to the end or abandoned.
            stream_response: False returns each answer whole, once complete.
            prompts, gen_config, do_preprocess, timeout: as for ``infer``.

        Raises:
            InvalidRequestError: prompts, sessions or configs are invalid, or a session is in use; nothing was sent.
            LMBridgeError: raised while reading; see ``infer``.
        """
        asked = self._asked(prompts, gen_config, do_preprocess, adapter_name, timeout, kwargs)
        owners = map(self._sessions.find, _per_prompt(sessions, len(asked.prompts), "sessions"))
        turns = [None if session is None else Turn(session, index) for index, session in enumerate(owners)]
        return self._stream(turns, lambda: asked, not stream_response)

    def chat(
        self,
        prompt: Any,
        session: Session | None = None,
        gen_config: Any = None,
        stream_response: bool = False,
        adapter_name: str | None = None,
        *,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Say ``prompt`` in a conversation. A turn that fails or is abandoned is forgotten.

        Args:
            prompt: a string, or a pair of text and image.
            session: the conversation; None starts one.
            stream_response: return the parts of the answer as they come.
            gen_config, timeout: as for ``infer``.

        Returns:
            The session, with the answer as ``response``; or a ResponseStream, whose last part completes the turn.

        Raises:
            InvalidRequestError: the session has a turn running; otherwise as ``infer``.
        """
        session = self.session() if session is None else session

        preprocess = kwargs.pop("do_preprocess", True)

        def ask() -> Asked:
            asked = self._asked(session.messages(prompt), gen_config, preprocess, adapter_name, timeout, kwargs)
            session.update(prompt=prompt, response=None)
            return asked

        turns = [ChatTurn(session, prompt)]
        if stream_response:
            return self._stream(turns, ask)
        stream = self._stream(turns, ask, whole=True)
        try:
            for _ in stream:
                pass
            return session
        finally:
            stream.close()

    def _stream(self, turns: Sequence[Turn | None], ask: Callable[[], Asked], whole: bool = False) -> ResponseStream:
        """Claim the sessions, then build and send the requests; on any error, release and stop everything."""
        stream = ResponseStream(turns, whole)
        try:
            for turn in turns:
                if turn is not None:
                    turn.claim(stream.stop)
            stream.send(self.bridge, ask())
            return stream
        except BaseException:
            stream.close()
            raise

    def session(self) -> Session:
        """A new conversation."""
        return self._sessions.new()

    # --- scores ---

    def get_ppl(self, input_ids: Any) -> list[float]:
        """The mean cross-entropy of each prompt's tokens.

        Args:
            input_ids: token ids, at least two, or a list of such lists.

        Raises:
            InvalidRequestError: they are not lists of token ids, a prompt fails on its own, or as ``infer``.
            UnsupportedOptionError: the engine cannot score prompts.
        """
        config, prompts = scoring_config("ppl", self._ability()), lists_of_ids(input_ids, least=2)
        answered = self.bridge.infer(prompts, config, timeout=self._timeout)
        return [
            float(one.value if one.value is not None else perplexity(one.prompt_logprobs or ())) for one in answered
        ]

    def get_reward_score(self, input_ids: Any) -> list[float]:
        """A reward model's score of each prompt; on LMDeploy's engine, for the models it supports.

        Raises:
            InvalidRequestError: the model is not a reward model; otherwise as ``get_ppl``.
        """
        config, prompts = scoring_config("reward", self._ability()), lists_of_ids(input_ids, least=1)
        return [float(one.value) for one in self.bridge.infer(prompts, config, timeout=self._timeout)]

    # --- lifetime ---

    def close(self) -> None:
        """Abort running calls, which raise BridgeClosedError, and free the model. Any thread, any time."""
        self.bridge.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pipeline over {self.bridge!r}>"

    def __getattr__(self, name: str) -> Any:
        """Called only for missing attributes."""
        if name in _GONE:
            raise AttributeError(f"Pipeline.{name} exists only in LMDeploy; instead: {_GONE[name]}.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def backend_config(self) -> Any:
        resolved = getattr(self.bridge._server_thread.engine, "backend_config", None)
        return self._given_config if resolved is None else copy.copy(resolved)

    # --- from LMDeploy's arguments to the Bridge's ---

    def _asked(
        self,
        prompts: Any,
        gen_config: Any,
        do_preprocess: bool,
        adapter_name: str | None,
        timeout: float | None,
        others: dict[str, Any],
    ) -> Asked:
        plain, ability = each_prompt(prompts), self._ability()
        keywords = read_keywords({"adapter_name": adapter_name, **others}, template=do_preprocess)
        given = _per_prompt(gen_config, len(plain), "gen_config")
        configs = [generation_config(config, ability, keywords) for config in given]
        return Asked(
            plain, configs, {"raw": not do_preprocess, "timeout": self._timeout if timeout is None else timeout}
        )

    def _ability(self) -> Ability:
        """The abilities of the current or last engine."""
        self._supports = self.bridge.supports() or self._supports
        return Ability(self._supports, self._word_ids)


def _per_prompt(given: Any, count: int, name: str) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        if name == "sessions" and given is not None and count != 1:
            raise InvalidRequestError(f"There are {count} prompts and one session; give a list of sessions.", name)
        return [given] * count
    if len(given) != count:
        raise InvalidRequestError(f"There are {count} prompts and {len(given)} {name}; give one for each.", name)
    return list(given)


# Not a WeakSet, which breaks when one thread iterates while another adds. Any thread; atomic steps.
_open: dict[weakref.ref[Pipeline], Any] = {}


@atexit.register
def _close_all() -> None:
    """Close open pipelines, as LMDeploy requires no close. Runs before the Bridge's own exit hook, which would warn."""
    for found in list(_open):
        if (pipe := found()) is not None:
            pipe.close()
