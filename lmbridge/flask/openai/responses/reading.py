"""A body of ``responses`` made into the call that a chat makes.

Rule: pure functions of the client's JSON and of what the model's engine supports; nothing is sent here. Every fault is
an InvalidRequestError with ``param`` in the client's own words.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.responses.items import Find, read_input
from lmbridge.flask.openai.responses.table import LOGPROBS_INCLUDED, RESPONSES
from lmbridge.flask.openai.sampling import WHAT_FITS, Body, read_config

SUMMARY = ("reasoning.summary", "reasoning.generate_summary")  # the latter is what it was called first
_INSIDE = ("text.format", "reasoning.effort", *SUMMARY)
_CHECKED = ("user", "metadata", "truncation", "text", "reasoning", "store", *SUMMARY)  # of which no config tells


def read_response(values: dict[str, Any], supported: Set[str], find: Find) -> Call:
    """The checked call.

    Args:
        find: for items of the input that are only referred to.
    """
    body = Body(_flat(values), RESPONSES)
    for name in _CHECKED:
        body.value(name)
    given = body.value("input")
    if given is None:
        raise InvalidRequestError("input is missing.", "input")
    told = body.value("include_reasoning", True)
    config = read_config(
        body,
        supported,
        max_new_tokens=body.value("max_output_tokens", WHAT_FITS),
        logprobs=_logprobs(body),
        chat_template_kwargs=_template_variables(body),
        separate_reasoning="separate_reasoning" in supported or not told,
    )
    return Call(
        body,
        "input",
        [read_input(given, body.value("instructions"), find)],
        config,
        stream=body.value("stream", False),
        reasoning=told,
        tokens_as_ids=body.value("return_tokens_as_token_ids", False),
    )


def wants_summary(body: Body) -> bool:
    """Whether the client shows what the model thinks as a summary."""
    return any(body.value(name) is not None for name in SUMMARY)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The fields, and beside them those inside of others, by the names that the table has for them."""
    flat = dict(values)
    for name in _INSIDE:
        holder, _, member = name.partition(".")
        held = values.get(holder)
        flat[name] = held.get(member) if isinstance(held, dict) else None
    return flat


def _logprobs(body: Body) -> int | None:
    top: int = body.value("top_logprobs", 0)
    return top if top or LOGPROBS_INCLUDED in body.value("include", []) else None


def _template_variables(body: Body) -> dict[str, Any] | None:
    effort = body.value("reasoning.effort")
    given: dict[str, Any] = body.value("chat_template_kwargs", {})
    return {**given, **({} if effort is None else {"reasoning_effort": effort})} or None
