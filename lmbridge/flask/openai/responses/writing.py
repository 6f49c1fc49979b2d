"""Writes the ``response`` object: the whole answer, and part of a stream's first and last events.

Rule: plain data in, plain data out; sends nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from lmbridge.flask.errors import HttpError
from lmbridge.flask.openai.reading import Call
from lmbridge.flask.openai.responses.functions import told_choice, told_tools
from lmbridge.messages import Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class Form:
    """Writes the ``response`` objects of one request, which repeat the request's settings.

    Args:
        model: the model's name.
    """

    def __init__(self, call: Call, model: str) -> None:
        body, config = call.fields, call.config
        self._facts = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.value("instructions"),
            "max_output_tokens": body.value("max_output_tokens"),
            "metadata": body.value("metadata", {}),
            "parallel_tool_calls": body.value("parallel_tool_calls", True),
            "reasoning": {"effort": body.value("reasoning.effort"), "summary": body.value("reasoning.summary")},
            "temperature": body.value("temperature", config.temperature),
            "text": {"format": _told_format(body.value("text.format", {"type": "text"}))},
            "tool_choice": told_choice(body.value("tool_choice", "auto")),
            "tools": told_tools(body.value("tools", [])),
            "top_logprobs": body.value("top_logprobs", 0),
            "top_p": body.value("top_p", 1.0),
            "user": body.value("user"),
            # the same for all requests
            "background": False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
        }

    def write(
        self,
        status: Status,
        output: Sequence[dict[str, Any]] = (),
        usage: dict[str, Any] | None = None,
        error: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """The object in its current state."""
        return {
            **self._facts,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": error,
            "output": list(output),
            "usage": usage,
        }


def write_usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """The token counts in this API's form."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def write_error(error: HttpError) -> dict[str, str]:
    """An error that came too late for an HTTP status; this API has only a few codes for it."""
    codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
    return {"code": codes.get(error.status, "server_error"), "message": error.message}


def _told_format(given: dict[str, Any]) -> dict[str, Any]:
    told = ("type", "name", "schema", "strict", "description") if given["type"] == "json_schema" else ("type",)
    return {name: given[name] for name in told if name in given}
