"""The keyword arguments of every verb.

Rule: types only.
"""

from __future__ import annotations

from lmbridge.messages import Overrides


class CallOptions(Overrides, total=False):
    """The keyword arguments of every verb, in addition to GenerationConfig's fields.

    timeout: seconds for loading, queueing and generation together; None waits forever; default: the bridge's.
    client: the account whose turn is used, to group threads (default: this client, thread or task).
    raw: pass a string to the model as it is, without the chat template.
    priority: higher goes first; it rises while the request waits.
    request_id: your own id for ``bridge.abort`` and the logs; unique among unfinished requests.
    """

    timeout: float | None
    client: str
    raw: bool
    priority: int
    request_id: str
