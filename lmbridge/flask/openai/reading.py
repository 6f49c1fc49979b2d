"""Reads a request's JSON object into a checked call.

Rule: pure functions of the client's JSON and of what the model's engine supports; sends nothing. Every error is an
InvalidRequestError whose ``param`` is the client's own field.
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

COMPLETION_TOKENS = 16  # OpenAI's default for completions; for chats, it is what fits into the context


@dataclass(frozen=True)
class Call:
    """One checked request.

    Attributes:
        fields: the request's body.
        prompt_name: the prompt's name in it.
        prompts: at least one; each gets ``n`` answers.
        config: how to generate; see ``configs``.
        raw: send texts to the model without a chat template.
        stream: respond with server-sent events.
        include_usage: end the events with the token counts.
        echo: put the prompt before its answers.
        silent: return no answers: ``max_tokens`` is 0, but an engine generates at least one token.
        reasoning: return the model's reasoning.
        token_ids: return the token ids of the prompt and the answers.
        tokens_as_ids: write the tokens of log-probabilities as ids.
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
        """One prompt per answer, in the order of the answers."""
        return [prompt for prompt in self.prompts for _ in range(self.n)]

    @property
    def configs(self) -> list[GenerationConfig]:
        """One config per answer. Each answer to a prompt has its own seed; otherwise all would be the same."""
        seed = self.config.random_seed
        if seed is None or self.n == 1:
            return [self.config] * len(self.choices)
        return [replace(self.config, random_seed=(seed + i) % 2**63) for _ in self.prompts for i in range(self.n)]


def read_chat(values: dict[str, Any], supported: Set[str]) -> Call:
    """Read a body of ``chat/completions``."""
    body = Body(values, CHAT)
    if body.value("continue_final_message") and body.value("add_generation_prompt"):
        body.refuse("continue_final_message", "false if add_generation_prompt is true")
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
    """Read a body of ``completions``."""
    body = Body(values, COMPLETIONS)
    prompts = _read_prompts(body)
    most, logprobs, echo = _most_tokens(body, COMPLETION_TOKENS), body.value("logprobs"), body.value("echo", False)
    more: dict[str, Any] = {"max_new_tokens": max(1, most), "logprobs": logprobs if most else None}
    if echo:
        more |= _echoing(body, most, logprobs)
    elif not most:
        body.refuse(given_name("max_new_tokens", body), "at least 1 unless echo is true")
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
    """How to respond. ``user`` is checked but ignored: clients cannot choose their account."""
    body.value("user")
    stream = body.value("stream", False)
    options = body.value("stream_options")
    if options and not stream:
        raise InvalidRequestError(
            "stream_options requires stream; set stream to true, or leave stream_options out.", "stream_options"
        )
    return {
        "stream": stream,
        "include_usage": Fields(options or {}, "stream_options.").take("include_usage", BOOL, False),
        "token_ids": body.value("return_token_ids", False),
        "tokens_as_ids": body.value("return_tokens_as_token_ids", False),
    }


def _count(body: Body, prompts: int) -> int:
    """Read ``n``, and check that the request has at most MAX_CHOICES answers."""
    n: int = body.value("n", 1)
    if n * prompts > MAX_CHOICES:
        raise InvalidRequestError(
            f"{prompts} prompts with n = {n} ask for {n * prompts} answers; one request gets at most {MAX_CHOICES}. "
            "Send several requests.",
            "n" if n > 1 else "prompt",
        )
    return n


def _most_tokens(body: Body, default: int) -> int:
    """The limit of an answer's tokens. The newer name takes precedence."""
    older: int = body.value("max_tokens", default)
    newer: int = body.value("max_completion_tokens", older)
    return newer


# --- chats ---


def _chat_logprobs(body: Body) -> int | None:
    wanted = body.value("logprobs", False)
    top: int | None = body.value("top_logprobs")
    if top and not wanted:
        raise InvalidRequestError("top_logprobs requires logprobs; set logprobs to true.", "top_logprobs")
    return (top or 0) if wanted else None


def _template_variables(body: Body) -> dict[str, Any] | None:
    effort = body.value("reasoning_effort")
    given: dict[str, Any] = body.value("chat_template_kwargs", {})
    return {**given, **({} if effort is None else {"reasoning_effort": effort})} or None


# --- completions ---


def _read_prompts(body: Body) -> list[Prompt]:
    given = body.value("prompt")
    if given is None:
        raise InvalidRequestError("prompt is missing; send a prompt.", "prompt")
    single = isinstance(given, str) or is_int(given[0])
    return [given] if single else list(given)


def _echoing(body: Body, most: int, logprobs: int | None) -> dict[str, Any]:
    """The options of a request with ``echo``.

    Clients that want only the prompt's log-probabilities ask for one more token and drop the last entry. If the answer
    ended at once there would be nothing to drop, so it must not end.
    """
    if body.get("truncate_prompt_tokens") is not None:
        body.refuse("echo", "false with truncate_prompt_tokens")
    if logprobs is None:
        return {}
    return {"prompt_logprobs": logprobs, **({"ignore_eos": True} if most == 1 else {})}
