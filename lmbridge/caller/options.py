"""The keyword arguments of every verb.

Rule: types only.
"""

from __future__ import annotations

from lmbridge.messages import Overrides


class CallOptions(Overrides, total=False):
    """The keyword arguments of every verb, beside GenerationConfig's own fields.

    timeout: seconds for loading, queueing and generation together; None waits forever; default: the bridge's.
    client: the account whose turn is taken, to group threads (default: this client, this thread or this task).
    raw: give a text to the model as it is, without the chat template.
    priority: higher goes first; waiting raises it.
    request_id: an id of your own for ``bridge.abort`` and the logs; unique among the living.
    """

    timeout: float | None
    client: str
    raw: bool
    priority: int
    request_id: str
