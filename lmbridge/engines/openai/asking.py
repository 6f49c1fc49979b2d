"""Translates a request for a kind of server: the route and the body.

Rule: pure functions. What a server does not support is refused by the caller's name for it; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmbridge.engines.openai.flavours import CHAT_ONLY, Flavour
from lmbridge.errors import InvalidRequestError, UnsupportedOptionError
from lmbridge.messages import GenerationConfig, Request

CHATS, COMPLETIONS = "/chat/completions", "/completions"
_AS_THEY_ARE = ("top_p", "frequency_penalty", "presence_penalty", "tools", "tool_choice", "parallel_tool_calls")
_RENAMED = {"random_seed": "seed", "stop_words": "stop"}
_OURS = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens",
    "seed": "random_seed", "stop": "stop_words", "top_logprobs": "logprobs", "messages": "prompt", "input": "prompt",
    "structured_outputs": "grammar", "json_schema": "grammar", "repeat_penalty": "repetition_penalty",
    "template_vars": "chat_template_kwargs", "return_token_ids": "return_prompt_token_ids",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """The request to send.

    Attributes:
        added: names in the body that the caller did not give, which a server may reject.
        room: the field for the answer's length, if that is only the default; None otherwise.
    """

    path: str
    body: Mapping[str, Any]
    added: frozenset[str] = frozenset()
    room: str | None = None

    @property
    def is_chat(self) -> bool:
        return self.path == CHATS

    def with_what_is_left(self, tokens: int) -> Question:
        """The same with the answer's length set to the room left; for chats null means that."""
        assert self.room is not None
        return replace(self, body={**self.body, self.room: None if self.is_chat else tokens}, room=None)

    def to(self, model: str, unwanted: frozenset[str]) -> dict[str, Any]:
        """The body for a model, without fields that its server rejects."""
        left_out = self.added & unwanted
        return {"model": model, **{name: value for name, value in self.body.items() if name not in left_out}}


def put_question(request: Request, flavour: Flavour, extra: Mapping[str, Any]) -> Question:
    """Translate the request for the flavour.

    Raises:
        UnsupportedOptionError: the server does not support an option; ``param`` names it.
    """
    config, prompt = request.config, request.prompt
    is_text = isinstance(prompt, str)
    body: dict[str, Any] = {}
    if (is_text and not request.raw) or (prompt and isinstance(prompt[0], dict)):
        messages = [{"role": "user", "content": prompt}] if is_text else [dict(message) for message in prompt]  # type: ignore[arg-type]
        path, room, body["messages"] = CHATS, flavour.max_tokens, messages
    else:
        _refuse_chats_fields(config, flavour)
        path, room, body["prompt"] = COMPLETIONS, "max_tokens", texts_of([prompt])[0]
    body[room] = config.max_new_tokens
    body |= _sampling(config, flavour) | _form(config, flavour) | _logprobs(config, flavour, path == CHATS)
    added = {"stream_options"}
    if flavour.tells_ids:
        body["return_token_ids"] = True
        if not config.return_prompt_token_ids:
            added.add("return_token_ids")
    body |= {"stream": True, "stream_options": {"include_usage": True}, **extra}
    is_default = room not in extra and "max_new_tokens" not in config.given()
    return Question(path, body, frozenset(added), room if is_default else None)


def our_name(param: str | None) -> str | None:
    """The caller's name for a field that a server rejects: ``messages[0].role`` is the prompt."""
    if not param:
        return None
    name = param.partition("[")[0].partition(".")[0]
    return _OURS.get(name, name)


def _sampling(config: GenerationConfig, flavour: Flavour) -> dict[str, Any]:
    """The sampling fields; greedy is a temperature of 0, since servers sample by default."""
    given = set(config.given())
    body: dict[str, Any] = {name: getattr(config, name) for name in _AS_THEY_ARE if name in given}
    body |= {there: getattr(config, name) for name, there in _RENAMED.items() if name in given}
    body |= {there: getattr(config, name) for name, there in flavour.names.items() if name in given}
    body["temperature"] = (1.0 if config.temperature is None else config.temperature) if config.samples else 0
    if config.logit_bias is not None:
        body["logit_bias"] = {str(token): bias for token, bias in config.logit_bias.items()}
    if not flavour.names_tools and isinstance(config.tool_choice, Mapping):
        raise _unsupported("tool_choice", "by name; give that tool alone, with tool_choice='required'")
    return body


def _form(config: GenerationConfig, flavour: Flavour) -> dict[str, Any]:
    form, given = config.form, config.response_format
    if form is None:
        return {}
    if flavour.formats and isinstance(given, Mapping):
        return {"response_format": _named(given)}
    say = flavour.forms.get(form.kind)
    fields = None if say is None else say(form.value)
    if fields is None:
        raise _unsupported(form.param, f"of that kind ({form.kind})")
    return fields


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add a name to the schema, which only OpenAI's API requires."""
    described = given.get("json_schema")
    if not isinstance(described, Mapping):
        return dict(given)
    return {**given, "json_schema": {"name": "answer", **described}}


def _logprobs(config: GenerationConfig, flavour: Flavour, is_chat: bool) -> dict[str, Any]:
    if config.logprobs is None:
        return {}
    ids = {"return_tokens_as_token_ids": True} if flavour.tells_ids else {}
    if is_chat:
        return {"logprobs": True, "top_logprobs": config.logprobs, **ids}
    return {"logprobs": config.logprobs, **ids}


def _refuse_chats_fields(config: GenerationConfig, flavour: Flavour) -> None:
    for name in config.given():
        if name in CHAT_ONLY or name in flavour.chat_only:
            raise UnsupportedOptionError(
                f"{name} needs a conversation on these servers, not raw text or token ids; leave it out.",
                param=name,
            )


def _unsupported(name: str, how: str) -> InvalidRequestError:
    return UnsupportedOptionError(f"{name} {how} is not supported by these servers; leave it out.", param=name)


def texts_of(items: Sequence[Any]) -> list[Any]:
    """Texts or token ids as a JSON list."""
    return [item if isinstance(item, str) else list(item) for item in items]
