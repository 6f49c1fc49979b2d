"""Reads a body of ``responses`` into the same kind of call as a chat's.

Rule: pure functions of the client's JSON and of what the model's engine supports; sends nothing. Every error is an
InvalidRequestError whose ``param`` is the client's own field.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.responses.items import Find, read_input
from lmbridge.flask.openai.responses.table import LOGPROBS_INCLUDED, RESPONSES
from lmbridge.flask.openai.sampling import WHAT_FITS, Body, read_config

SUMMARY = ("reasoning.summary", "reasoning.generate_summary")  # the latter is its older name
_INSIDE = ("text.format", "reasoning.effort", *SUMMARY)
_CHECKED = ("user", "metadata", "truncation", "text", "reasoning", "store", *SUMMARY)  # not in a GenerationConfig


def read_response(values: dict[str, Any], supported: Set[str], find: Find) -> Call:
    """Read and check the call.

    Args:
        find: finds the items of references in the input.
    """
    body = Body(_flat(values), RESPONSES)
    for name in _CHECKED:
        body.value(name)
    given = body.value("input")
    if given is None:
        raise InvalidRequestError("input is missing; send a string or a list of items.", "input")
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
    """Whether the client asks for a summary of the model's reasoning."""
    return any(body.value(name) is not None for name in SUMMARY)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The fields, and the nested ones under the table's dotted names."""
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
