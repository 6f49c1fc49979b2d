"""LMDeploy's Pipeline over a Bridge.

Rule: the caller's end; any thread, and any number of them. What it adds to LMDeploy's calls is keyword-only, and leaves
the meaning of a call without it alone.
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
"""Arguments of LMDeploy's ``pipeline`` that change nothing."""
_GONE = {
    "async_engine": "what it is used for has a word of its own: pipe.bridge has health(), requests(), stats() and "
    "metrics, and pipe.get_ppl() and pipe.session() are as in LMDeploy",
    "generate": "await pipe.async_batch_infer(...), or iterate over pipe.bridge.astream(...)",
    "internal_thread": "the engine's thread is the bridge's; any thread may call the pipeline",
    "limiter": "pipe.bridge.requests() tells what waits and what runs",
    "session_mgr": "pipe.session() begins a session, and its abort() ends what it generates",
}
"""Attributes of LMDeploy's Pipeline that would hand out an engine that any thread may not touch; what to use."""


class Pipeline:
    """LMDeploy's Pipeline, which any number of threads may use. ``pipeline`` is another name of it.

    Args:
        model_path: a folder or a hub id; ``"demo"`` is the bundled model; an Engine, or a function that
            builds one.
        backend_config: a PytorchEngineConfig or a TurbomindEngineConfig, ours or LMDeploy's own.
        chat_template_config: a ChatTemplateConfig, ours or LMDeploy's own; for the LMDeploy engine.
        log_level: of LMDeploy's logger and ours, for the whole process.
        max_log_len: ignored, as ``model_name`` and ``vision_config`` are; prompts are never logged.
        trust_remote_code: run code that comes with the model.
        speculative_config: refused; the engines do not decode speculatively.
        allowed_media_domains: refused; the engines would not keep to it.
        backend: an engine's name; None takes transformers for the bundled model, and else LMDeploy.
        timeout: default deadline of every call, in seconds; None waits forever.
        stall_timeout: seconds of silence after which an engine with work is taken for dead; None trusts it.
        engine_options: the engine's own options.

    Raises:
        MissingDependencyError: LMDeploy is to be used and is not installed; the message says how to install it.
        UnsupportedOptionError: the engine cannot honour what was given; the message names it.
        ModelNotFoundError, InvalidRequestError: what was given cannot work.
        EngineStartError: the model could not be loaded.

    Attributes:
        bridge: the Bridge below, for what LMDeploy has no word for: ``health``, ``requests``, ``metrics``, ``swap``.
        backend_config: with what the engine has made of it, where LMDeploy's is loaded: ``session_len``,
            ``max_batch_size``, ``num_gpu_blocks``.
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

    # --- whole answers ---

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
        """Generate and block for the whole answer; a list of prompts gives a list of answers in the same order.

        Args:
            prompts: a text, a list of messages, a pair of text and image, or a list of these.
            gen_config: how to generate; a list has one for each prompt.
            do_preprocess: False gives a text to the model as it is, without the chat template.
            use_tqdm: show a progress bar.
            adapter_name: one of the ``adapters`` in the ``backend_config``, for LMDeploy's engine.
            timeout: seconds for all of it; None takes the pipeline's.
            kwargs: ``enable_thinking``, ``chat_template_kwargs``, ``reasoning_effort`` and ``tools`` for the chat
                template; ``media_io_kwargs`` and ``mm_processor_kwargs`` for LMDeploy's engine. Others are ignored,
                with a warning.

        Returns:
            A Response, or a list of them. A prompt that fails by itself has one with ``finish_reason="error"``.

        Raises:
            InvalidRequestError: prompts or configs are wrong; nothing was sent.
            RequestTimeoutError: the time is up; the engine has stopped.
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
        """``infer`` by its old name."""
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
        """``infer`` for a task on any event loop, the engine's own included; cancelling the task stops the engine."""
        asked = self._asked(prompts, gen_config, do_preprocess, adapter_name, timeout, kwargs)
        results = await self.bridge.ainfer(asked.prompts, asked.configs, return_exceptions=True, **asked.options)
        responses = [answers.answer(result, index) for index, result in enumerate(results)]
        return responses[0] if is_single(prompts) else responses

    def _infer_one(self, asked: Asked) -> Response:
        """A single prompt, without what a list costs."""
        try:
            return answers.whole(self.bridge.infer(asked.prompts[0], asked.configs[0], **asked.options))
        except LMBridgeError as error:
            return answers.failed(error)

    # --- answers that grow ---

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
        """Send the prompts and return the parts of their answers as they come; ``index`` says whose a part is.

        Args:
            sessions: one for each prompt, or its number, to ``abort()`` it by; each is taken until its answer was read
                or left.
            stream_response: False gives each answer as one whole, when it is complete.
            prompts, gen_config, do_preprocess, timeout: as for ``infer``.

        Raises:
            InvalidRequestError: prompts, sessions or configs are wrong, or a session is taken; nothing was sent.
            LMBridgeError: what reading on may raise; see ``infer``.
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
        """Say ``prompt`` in a conversation. A turn that is left or fails is not remembered.

        Args:
            prompt: a text, or a pair of text and image.
            session: the conversation; None begins one.
            stream_response: return the parts of the answer as they come.
            gen_config, timeout: as for ``infer``.

        Returns:
            The session, with the answer as ``response``; or a ResponseStream, whose last part completes the turn.

        Raises:
            InvalidRequestError: the session has a turn running; and what ``infer`` raises.
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
        """Claim the sessions, only then ask, and send; whatever raises leaves nothing claimed and nothing running."""
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
            InvalidRequestError: they are none, or what ``infer`` raises; also where a prompt fails by itself.
            UnsupportedOptionError: the engine scores no prompts.
        """
        config, prompts = scoring_config("ppl", self._ability()), lists_of_ids(input_ids, least=2)
        answered = self.bridge.infer(prompts, config, timeout=self._timeout)
        return [
            float(one.value if one.value is not None else perplexity(one.prompt_logprobs or ())) for one in answered
        ]

    def get_reward_score(self, input_ids: Any) -> list[float]:
        """What a reward model thinks of each prompt; on LMDeploy's engine, for the models that it knows.

        Raises:
            InvalidRequestError: the model is none; and as ``get_ppl``.
        """
        config, prompts = scoring_config("reward", self._ability()), lists_of_ids(input_ids, least=1)
        return [float(one.value) for one in self.bridge.infer(prompts, config, timeout=self._timeout)]

    # --- lifetime ---

    def close(self) -> None:
        """Stop what runs and free the model; every waiting call raises BridgeClosedError. Any thread, any time."""
        self.bridge.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pipeline over {self.bridge!r}>"

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there."""
        if name in _GONE:
            raise AttributeError(f"Pipeline.{name} is LMDeploy's own and not here; instead: {_GONE[name]}.")
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
        """What the engine can do, or the last one could while a new one is built."""
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


# Not a WeakSet, which breaks when one thread looks while another adds. Any thread, each step atomic.
_open: dict[weakref.ref[Pipeline], Any] = {}


@atexit.register
def _close_all() -> None:
    """End the pipelines nobody closed: with LMDeploy one need not. Runs before the Bridge's own, which would warn."""
    for found in list(_open):
        if (pipe := found()) is not None:
            pipe.close()
