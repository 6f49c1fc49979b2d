"""A request's JSON object made into a checked call.

Rule: pure functions of the client's JSON and of what the model's engine supports; nothing is sent here. Every fault is
an InvalidRequestError with ``param`` in the client's own words.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.conversation import read_messages
from lmbridge.flask.openai.fields import BOOL, Fields, is_int
from lmbridge.flask.openai.sampling import WHAT_FITS, Body, given_name, read_config
from lmbridge.flask.openai.table import CHAT, COMPLETIONS, MAX_CHOICES
from lmbridge.messages import GenerationConfig, Prompt

COMPLETION_TOKENS = 16  # what OpenAI's completions default to; chats go on for as long as they fit


@dataclass(frozen=True)
class Call:
    """One checked request.

    Attributes:
        fields: what it was read from.
        prompt_name: what the prompt is called there.
        prompts: at least one; ``n`` answers are wanted of each.
        config: how to generate; see ``configs``.
        raw: texts go to the model as they are.
        stream: answer with server-sent events.
        include_usage: end the events with the token counts.
        echo: put the prompt before its answers.
        silent: leave the answers out; the one token that an engine makes at least is nobody's.
        reasoning: tell what the model thinks before its answers.
        token_ids: tell the prompt's and the answers' token ids.
        tokens_as_ids: write the tokens of log-probabilities as their ids.
    """

    fields: Body
    prompt_name: str
    prompts: list[Prompt]
    config: GenerationConfig
    n: int = 1
    raw: bool = False
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    silent: bool = False
    reasoning: bool = True
    token_ids: bool = False
    tokens_as_ids: bool = False

    @property
    def choices(self) -> list[Prompt]:
        """One prompt for each answer, in the order of the answers."""
        return [prompt for prompt in self.prompts for _ in range(self.n)]

    @property
    def configs(self) -> list[GenerationConfig]:
        """One config for each answer. A prompt's answers draw with seeds of their own, or they would be the same."""
        seed = self.config.random_seed
        if seed is None or self.n == 1:
            return [self.config] * len(self.choices)
        return [replace(self.config, random_seed=(seed + i) % 2**63) for _ in self.prompts for i in range(self.n)]


def read_chat(values: dict[str, Any], supported: Set[str]) -> Call:
    """A body of ``chat/completions``."""
    body = Body(values, CHAT)
    if body.value("continue_final_message") and body.value("add_generation_prompt"):
        body.refuse("continue_final_message", "false where add_generation_prompt is true")
    told = body.value("include_reasoning", True)
    config = read_config(
        body,
        supported,
        max_new_tokens=_most_tokens(body, WHAT_FITS),
        logprobs=_chat_logprobs(body),
        chat_template_kwargs=_template_variables(body),
        separate_reasoning="separate_reasoning" in supported or not told,
    )
    return Call(
        body,
        "messages",
        [read_messages(body.get("messages"))],
        config,
        n=_count(body, 1),
        reasoning=told,
        **_manners(body),
    )


def read_completion(values: dict[str, Any], supported: Set[str]) -> Call:
    """A body of ``completions``."""
    body = Body(values, COMPLETIONS)
    prompts = _read_prompts(body)
    most, logprobs, echo = _most_tokens(body, COMPLETION_TOKENS), body.value("logprobs"), body.value("echo", False)
    more: dict[str, Any] = {"max_new_tokens": max(1, most), "logprobs": logprobs if most else None}
    if echo:
        more |= _echoing(body, most, logprobs)
    elif not most:
        body.refuse(given_name("max_new_tokens", body), "at least 1 where the prompt is not echoed")
    return Call(
        body,
        "prompt",
        prompts,
        read_config(body, supported, **more),
        n=_count(body, len(prompts)),
        raw=isinstance(prompts[0], str),
        echo=echo,
        silent=not most,
        **_manners(body),
    )


def _manners(body: Body) -> dict[str, Any]:
    """How to answer. ``user`` is checked and otherwise ignored: it buys no turns."""
    body.value("user")
    stream = body.value("stream", False)
    options = body.value("stream_options")
    if options and not stream:
        raise InvalidRequestError(
            "stream_options is for streams; set stream to true, or leave it out.", "stream_options"
        )
    return {
        "stream": stream,
        "include_usage": Fields(options or {}, "stream_options.").take("include_usage", BOOL, False),
        "token_ids": body.value("return_token_ids", False),
        "tokens_as_ids": body.value("return_tokens_as_token_ids", False),
    }


def _count(body: Body, prompts: int) -> int:
    """``n``, such that there are at most MAX_CHOICES answers in all."""
    n: int = body.value("n", 1)
    if n * prompts > MAX_CHOICES:
        raise InvalidRequestError(
            f"One request gets at most {MAX_CHOICES} answers; {prompts} prompts with n = {n} ask for {n * prompts}. "
            "Send several requests.",
            "n" if n > 1 else "prompt",
        )
    return n


def _most_tokens(body: Body, default: int) -> int:
    """The newer name wins where both are given."""
    older: int = body.value("max_tokens", default)
    newer: int = body.value("max_completion_tokens", older)
    return newer


# --- chats ---


def _chat_logprobs(body: Body) -> int | None:
    wanted = body.value("logprobs", False)
    top: int | None = body.value("top_logprobs")
    if top and not wanted:
        raise InvalidRequestError("top_logprobs needs logprobs set to true.", "top_logprobs")
    return (top or 0) if wanted else None


def _template_variables(body: Body) -> dict[str, Any] | None:
    effort = body.value("reasoning_effort")
    given: dict[str, Any] = body.value("chat_template_kwargs", {})
    return {**given, **({} if effort is None else {"reasoning_effort": effort})} or None


# --- completions ---


def _read_prompts(body: Body) -> list[Prompt]:
    given = body.value("prompt")
    if given is None:
        raise InvalidRequestError("prompt is missing.", "prompt")
    single = isinstance(given, str) or is_int(given[0])
    return [given] if single else list(given)


def _echoing(body: Body, most: int, logprobs: int | None) -> dict[str, Any]:
    """The options of a request whose prompt is echoed.

    Clients that want the prompt's log-probabilities and one token more cut that token's off the end. Of an answer that
    ends at once there would be none to cut, so it must not end.
    """
    if body.get("truncate_prompt_tokens") is not None:
        body.refuse("echo", "false beside truncate_prompt_tokens")
    if logprobs is None:
        return {}
    return {"prompt_logprobs": logprobs, **({"ignore_eos": True} if most == 1 else {})}
