"""What every request with a body begins with: it is read, and the model that it is for is found.

Rule: runs in the HTTP request's context, and asks no bridge yet. What else the body holds is read by others.
"""

from __future__ import annotations

import logging
from typing import Literal

from lmbridge import Client
from lmbridge.errors import InvalidRequestError, LMBridgeError, PromptTooLongError, UnsupportedTaskError
from lmbridge.flask.caller import request_bridge
from lmbridge.flask.models import current_models
from lmbridge.flask.openai import guard
from lmbridge.flask.openai.fields import TEXT, Fields, Kind, parse_object
from lmbridge.flask.openai.table import SECONDS
from lmbridge.messages import Task

logger = logging.getLogger(__name__)

MAX_ITEMS = 2048  # texts, or documents, of one request

_TRUNCATE = Kind(lambda value: isinstance(value, bool) or value in ("end", "error"), 'true, false, "end" or "error"')


class Asked:
    """One request with a JSON object as its body.

    Args:
        task: what its model must do.

    Attributes:
        values: the body.
        timeout: seconds that it may take: the least of what the client and the server allow; None is for ever.
        model: the name of the model that it is for.

    Raises:
        LMBridgeError, HTTPException: the body is no such object, there is no such model, or it does something else.
    """

    def __init__(self, task: Task) -> None:
        models = current_models()
        models.check_open()
        self._settings = models.settings
        self.values = parse_object(guard.read_body(self._settings.max_request_bytes))
        fields = Fields(self.values)
        limits = (fields.take("timeout", SECONDS), self._settings.timeout)
        self.timeout: float | None = min((limit for limit in limits if limit is not None), default=None)
        self.model = models.chosen(fields.take("model", TEXT) or None, task, self.timeout)

    @property
    def client(self) -> Client:
        """What asks the model in the name of the HTTP request."""
        return request_bridge(self.model)

    def log(self, what: object) -> None:
        """Log what is asked, where that was configured."""
        if self._settings.log_prompts:
            logger.info("%s asks %s: %r", guard.request_id(), self.model, what)


def read_truncate(fields: Fields, default: Literal["error", "end"]) -> Literal["error", "end"]:
    """What to do with a text longer than the model reads: ``true`` or ``"end"`` cuts off its end."""
    given = fields.take("truncate", _TRUNCATE)
    return default if given is None else "end" if given in (True, "end") else "error"


def refuse_too_many(count: int, field: str) -> None:
    """Raise InvalidRequestError where a list is longer than one request may have it."""
    if count > MAX_ITEMS:
        raise InvalidRequestError(
            f"One request takes at most {MAX_ITEMS:,} items; {field} has {count:,}. Send several requests.", field
        )


def put_in_clients_words(error: LMBridgeError, field: str, whole: tuple[str, ...] = ()) -> None:
    """Have the error of one of a list's items say where that stands in the client's request: ``input[3]``.

    Args:
        field: what the list is called there.
        whole: fields of the request that concern all items, so that the first one is no more at fault than the others.
    """
    place, error.listed = error.index, field.rstrip("s").capitalize()
    if not isinstance(error, InvalidRequestError):
        return
    if isinstance(error, UnsupportedTaskError):
        error.index, error.param = None, "model"
    elif error.param in whole and not isinstance(error, PromptTooLongError):
        error.index = None
    else:
        error.param = field if place is None else f"{field}[{place}]"
