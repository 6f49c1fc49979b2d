"""Turns a request into LMDeploy's own form: tokens and config.

Rule: server thread. LMDeploy is imported inside. What would end LMDeploy's loop for everyone is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmbridge.engines.dialect import Dialect
from lmbridge.engines.lmdeploy.faults import named_errors
from lmbridge.engines.lmdeploy.loading import room, vocabulary_size
from lmbridge.engines.lmdeploy.own import PREPROCESSING, given
from lmbridge.engines.lmdeploy.sampling import sampling_fields
from lmbridge.errors import InvalidRequestError, LMBridgeError, PromptTooLongError
from lmbridge.messages import Message, Request


class Preparer:
    """Prepares requests for one LMDeploy engine.

    Args:
        core: LMDeploy's ``AsyncEngine``.
        dialect: how tools are described to the model.
        on_unavailable: called with the reason when the engine can serve no more.
    """

    def __init__(self, core: Any, dialect: Dialect, on_unavailable: Callable[[BaseException], None]) -> None:
        self._core = core
        self._dialect = dialect
        self._on_unavailable = on_unavailable
        self._template_stops = list(core.stop_words or ())
        self._room = room(core)
        self._vocabulary_size = vocabulary_size(core)

    async def prepare(self, request: Request) -> Any:
        """LMDeploy's ``PreprocessedRequest``, with a session of its own.

        Raises:
            InvalidRequestError: the prompt is empty, malformed, or has ids the model does not know.
            PromptTooLongError: there is no room for it and one more token.
        """
        from lmdeploy import GenerationConfig as LMDeployConfig

        config, core = request.config, self._core
        prompt, ids = self._prompt(request)
        variables = dict(config.chat_template_kwargs or {})
        tools = variables.pop("tools", None) or self._dialect.tools(config)
        extra = given(config, PREPROCESSING)
        self._check_adapter(extra.get("adapter_name"))
        fields = sampling_fields(config, self._template_stops, self._dialect.form(config))
        session = core.session_mgr.get()
        session.epoch = core.epoch
        with named_errors(self._on_unavailable):
            prepared = await core.preprocess(
                messages=prompt,
                session_id=session,
                gen_config=LMDeployConfig(**fields),
                tools=tools,
                chat_template_kwargs=variables or None,
                do_preprocess=not (request.raw and isinstance(prompt, str)),
                input_ids=ids,
                **extra,
            )
        try:
            self._fit(prepared)
        except LMBridgeError:
            core.session_mgr.remove(session)
            raise
        return prepared

    def ids(self, prompt: Sequence[Any]) -> list[int]:
        """The validated token ids, which fit.

        Raises:
            InvalidRequestError, PromptTooLongError: an id is unknown, or they do not fit.
        """
        ids = [self._known(token) for token in prompt]
        if len(ids) >= self._room:
            raise self._too_long(len(ids))
        return ids

    def _prompt(self, request: Request) -> tuple[Any, list[int] | None]:
        """The prompt for LMDeploy to tokenise, or its tokens."""
        prompt, config = request.prompt, request.config
        if isinstance(prompt, str):
            if request.raw or config.calling is None:
                return prompt, None
            return [{"role": "user", "content": prompt}], None
        if prompt and isinstance(prompt[0], dict):
            return self._dialect.told([_message(message) for message in prompt], config), None
        return None, [self._known(token) for token in prompt]

    def _fit(self, prepared: Any) -> None:
        """Refuse what would end LMDeploy's loop for everyone, and limit the answer to the room left."""
        count: int = prepared.input_token_len
        if not count:
            raise InvalidRequestError(
                "The prompt is empty: the tokenizer produces no token. Add some text.", param="prompt"
            )
        if count >= self._room:
            raise self._too_long(count)
        prepared.gen_config.max_new_tokens = min(prepared.gen_config.max_new_tokens, self._room - count)

    def _too_long(self, count: int) -> PromptTooLongError:
        return PromptTooLongError(
            f"The prompt has {count} tokens; there is room for {self._room}, one of them for the answer. Shorten it.",
            param="prompt",
            most=self._room,
        ).hinted("max_context or cache_share raises the limit where the model allows it.")

    def _known(self, token: object) -> int:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._vocabulary_size:
            raise InvalidRequestError(
                f"Token ids of a prompt are ints from 0 to {self._vocabulary_size - 1}, not {token!r:.80}.",
                param="prompt",
            )
        return token

    def _check_adapter(self, name: str | None) -> None:
        """Refuse an adapter that was not loaded: LMDeploy would look for it in its loop, which would then end."""
        loaded = getattr(self._core.backend_config, "adapters", None) or {}
        if name is not None and name not in loaded:
            known = ", ".join(loaded) or "none; set adapters in the backend_config"
            raise InvalidRequestError(f"There is no adapter {name!r}; loaded adapters: {known}.", param="adapter_name")


def _message(message: Any) -> Message:
    """The message, checked for what templates need; LMDeploy would silently drop an invalid one."""
    spoken = isinstance(message, dict) and isinstance(message.get("role"), str)
    if not spoken or ("content" not in message and len(message) < 3):  # a turn of tool calls has no content
        raise InvalidRequestError(
            f"A message is a dict with 'role' and 'content', not {message!r:.80}.", param="prompt"
        )
    return dict(message)
