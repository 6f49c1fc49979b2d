"""The first step of every request with a body: reads the body, and finds the model.

Rule: runs in the HTTP request's context, and does not use the bridge yet. Other modules read the rest of the body.
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
        task: the task that its model must support.

    Attributes:
        values: the body.
        timeout: seconds, the lower of the client's and the server's limits; None: no limit.
        model: the name of its model.

    Raises:
        LMBridgeError, HTTPException: the body is not a JSON object, or its model does not exist or support the task.
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
        """The HTTP request's client of the model."""
        return request_bridge(self.model)

    def log(self, what: object) -> None:
        """Log the prompt, if so configured."""
        if self._settings.log_prompts:
            logger.info("%s asks %s: %r", guard.request_id(), self.model, what)


def read_truncate(fields: Fields, default: Literal["error", "end"]) -> Literal["error", "end"]:
    """What to do with a text that is too long for the model: ``true`` or ``"end"`` cuts off its end."""
    given = fields.take("truncate", _TRUNCATE)
    return default if given is None else "end" if given in (True, "end") else "error"


def refuse_too_many(count: int, field: str) -> None:
    """Raise InvalidRequestError if a list is too long for one request."""
    if count > MAX_ITEMS:
        raise InvalidRequestError(
            f"{field} has {count:,} items; one request takes at most {MAX_ITEMS:,}. Send several requests.", field
        )


def put_in_clients_words(error: LMBridgeError, field: str, whole: tuple[str, ...] = ()) -> None:
    """Make the error of a list's item name its place in the client's request, such as ``input[3]``.

    Args:
        field: the list's name there.
        whole: fields that concern all items, whose errors name no item.
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
