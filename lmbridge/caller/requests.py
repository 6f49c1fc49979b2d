"""Makes requests; validates everything before sending anything.

Rule: pure functions on the caller's thread.
"""

from __future__ import annotations

import contextvars
import itertools
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

from lmbridge.caller.account import Account
from lmbridge.caller.options import CallOptions
from lmbridge.caller.prompts import check_prompt
from lmbridge.errors import InvalidRequestError, LMBridgeError
from lmbridge.log import shown
from lmbridge.messages import GenerationConfig, Request
from lmbridge.values import as_flag, as_int, as_number

_ids = itertools.count(1)
_PREFIX = f"req-{secrets.token_hex(3)}"
_LONGEST = threading.TIMEOUT_MAX / 2  # seconds; locks reject longer timeouts, math.inf included
_MOST_URGENT = 1_000_000  # bounded, so that adding seconds waited stays exact in a float
_DEFAULT_CONFIG = GenerationConfig()  # engines get it, and must not modify it
_ANY_PROMPT = [{"role": "user", "content": "x"}]  # valid with every option


def make_request(account: Account, prompt: Any, config: GenerationConfig | None, options: CallOptions) -> Request:
    """Validate one prompt and its options, and make the request.

    Raises:
        InvalidRequestError: an argument is invalid; the error names it, and nothing was sent.
    """
    timeout = options.pop("timeout", account.access.timeout)
    client, raw, priority, request_id = account.name, False, 0, None
    if options:
        client = checked_text(options.pop("client", client), "client")
        raw = checked_flag(options.pop("raw", raw), "raw")
        priority = _checked_priority(options.pop("priority", priority))
        request_id = options.pop("request_id", None)
    if options or config is not None:
        config = _merge(config, options)
        _check_template(config, prompt, raw)
    now = time.monotonic()
    return Request(
        new_id() if request_id is None else checked_text(request_id, "request_id"),
        prompt if type(prompt) is str and prompt else check_prompt(prompt),
        config or _DEFAULT_CONFIG,
        raw,
        client,
        priority,
        None if timeout is None else now + checked_seconds(timeout),
        now,
        contextvars.copy_context(),
    )


def new_id() -> str:
    """An id unique in this process."""
    return f"{_PREFIX}-{next(_ids)}"


def make_list(
    account: Account, prompts: Sequence[Any], config: Any, options: CallOptions, keep: bool
) -> list[Request | LMBridgeError]:
    """The requests of a list of prompts, which share one deadline.

    Args:
        config: one for all of them, or a list with one for each.
        options: a ``request_id`` gets ``-0``, ``-1`` … appended.
        keep: put the error of an invalid prompt into its slot instead of raising the first.

    Raises:
        InvalidRequestError: a shared option is invalid, or a prompt is, with its position as ``index``.
    """
    configs = config if isinstance(config, (list, tuple)) else [config] * len(prompts)
    if len(configs) != len(prompts):
        raise InvalidRequestError(f"There are {len(configs)} configs for {len(prompts)} prompts.", "config")
    name = options.pop("request_id", None)
    if name is not None:
        name = checked_text(name, "request_id")
    shared = make_request(account, _ANY_PROMPT, None, _copy(options))  # checks the shared options
    made: list[Request | LMBridgeError] = []
    for index, (prompt, one) in enumerate(zip(prompts, configs, strict=True)):
        try:
            request = make_request(account, prompt, one, _copy(options))
        except LMBridgeError as error:
            error.index = index
            if not keep:
                raise
            made.append(error)
            continue
        request.deadline = shared.deadline
        if name is not None:
            request.id = f"{name}-{index}"
        made.append(request)
    return made


def _copy(options: CallOptions) -> CallOptions:
    return cast(CallOptions, dict(options))


def _merge(config: GenerationConfig | None, overrides: Any) -> GenerationConfig:
    if config is None:
        config = _DEFAULT_CONFIG
    if not isinstance(config, GenerationConfig):
        raise InvalidRequestError(
            f"config must be a GenerationConfig, not {type(config).__name__}; or pass its fields as keywords.",
            "config",
        )
    return config.merged(overrides)


def _check_template(config: GenerationConfig, prompt: Any, raw: bool) -> None:
    """Refuse chat-template settings for a raw prompt, or one that is not a conversation."""
    begins, goes_on = config.add_generation_prompt is not None, config.continue_final_message
    if not (begins or goes_on or config.chat_template_kwargs):
        return
    checked = check_prompt(prompt)
    if isinstance(checked[0], dict):
        return
    if begins or goes_on:
        name = "continue_final_message" if goes_on else "add_generation_prompt"
        raise InvalidRequestError(f"{name} needs a conversation: give a list of messages, or leave it out.", name)
    if raw or not isinstance(checked, str):
        raise InvalidRequestError(
            "chat_template_kwargs need a chat template, which this prompt does not use; leave them out.",
            "chat_template_kwargs",
        )


def checked_seconds(value: Any, name: str = "timeout") -> float:
    """A time to wait, capped at what locks accept.

    Raises:
        InvalidRequestError: it is not a number of seconds; callers handle None themselves.
    """
    seconds = as_number(value)
    if seconds is None or not seconds >= 0:  # nan
        raise InvalidRequestError(f"{name} must be seconds >= 0 or None, not {shown(value)}.", name)
    return min(seconds, _LONGEST)


def checked_text(value: Any, name: str) -> str:
    """A plain non-empty string; a subclass is reduced to its text.

    Raises:
        InvalidRequestError: it is not a string, or is empty.
    """
    if isinstance(value, str) and value:
        return str.__str__(value)
    raise InvalidRequestError(f"{name} must be a non-empty string, not {shown(value)}.", name)


def _checked_priority(priority: Any) -> int:
    plain = as_int(priority)
    if plain is None or abs(plain) > _MOST_URGENT:
        wanted = f"an int from -{_MOST_URGENT} to {_MOST_URGENT}"
        raise InvalidRequestError(f"priority must be {wanted}, not {shown(priority)}.", "priority")
    return plain


def checked_flag(value: Any, name: str) -> bool:
    """The option of that name as a bool, or InvalidRequestError."""
    plain = as_flag(value)
    if plain is None:
        raise InvalidRequestError(f"{name} must be True or False, not {value!r}.", name)
    return plain
