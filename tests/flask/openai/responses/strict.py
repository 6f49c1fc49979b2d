"""Objects of the API held against the official client's types, which themselves let anything pass.

Rule: nothing is asked of a server.
"""

from __future__ import annotations

from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

BESIDE = {"store"}  # OpenAI's own answers have it, and its types do not

_RESPONSE: TypeAdapter[Response] = TypeAdapter(Response)
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def check_response(value: dict[str, Any]) -> Response:
    """The object; fails unless it is one."""
    response = _RESPONSE.validate_python(value, strict=True)
    _check_extras(response, "response")
    return response


def check_event(value: dict[str, Any]) -> Any:
    """The event; fails unless it is one."""
    event = _EVENT.validate_python(value, strict=True)
    assert event.type == value["type"]
    _check_extras(event, value["type"])
    return event


def _check_extras(value: object, path: str) -> None:
    if isinstance(value, list):
        for place, item in enumerate(value):
            _check_extras(item, f"{path}[{place}]")
    if isinstance(value, BaseModel):
        assert set(value.model_extra or {}) <= BESIDE, f"{path} has {value.model_extra}"
        for name in value.model_fields_set:
            _check_extras(getattr(value, name), f"{path}.{name}")
