"""A request for a replica: plain data that pickles, whatever the caller gave.

Rule: standard library and messages only; made on the server thread, read in another process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmbridge.messages import GenerationConfig, Job, Prompt, Request

GRACE = 1.0
"""Extra seconds for a replica beyond the caller's deadline, so that the caller's bridge reports the timeout."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A request to a replica.

    Attributes:
        prompt, job: the request's own.
        call: the common keyword arguments of the replica's verb.
        config: GenerationConfig's fields, those that differ from their defaults.
    """

    prompt: Prompt
    job: Job | None
    call: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def of(cls, request: Request) -> Errand:
        """The errand of a request being sent."""
        call: dict[str, Any] = {
            "request_id": request.id,
            "client": request.client,
            "priority": request.priority,
            "timeout": None if request.deadline is None else max(0.0, request.deadline - time.monotonic()) + GRACE,
        }
        if request.job is not None:
            return cls("", request.job, call, {})
        return cls(request.prompt, None, {**call, "raw": request.raw}, _plain(request.config))


def _plain(config: GenerationConfig) -> dict[str, Any]:
    """The given fields; a class that stands for a schema is replaced by the schema."""
    fields = {name: getattr(config, name) for name in config.given()}
    form = config.form
    if form is not None and not isinstance(config.response_format, Mapping | None):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.value}}
    if form is not None and not isinstance(config.grammar, str | Mapping | None):
        fields["grammar"] = {"json": form.value}
    return fields
