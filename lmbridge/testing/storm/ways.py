"""All ways of asking, and how often each is taken.

Rule: the table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lmbridge.testing.storm import asking, jobs, meddling, reading, submitting
from lmbridge.testing.storm.caller import Caller

WAYS: Mapping[Callable[[Caller], None], int] = {
    asking.infer: 30, asking.infer_list: 4, asking.infer_list_with_exceptions: 3, asking.invalid: 1, asking.chat: 3,
    reading.stream: 12, reading.stream_and_infer: 2, reading.stream_and_leave: 6, reading.group: 4,
    submitting.submit: 8, submitting.submit_many: 2, submitting.submit_and_cancel: 4, submitting.submit_and_go: 2,
    meddling.own_client: 3, meddling.short_lived: 1, meddling.meddle: 4, meddling.look: 2,
    **jobs.WAYS,
}  # fmt: skip


def ask(caller: Caller) -> None:
    """Make one call or a few."""
    (way,) = caller.chance.choices(list(WAYS), list(WAYS.values()))
    way(caller)
