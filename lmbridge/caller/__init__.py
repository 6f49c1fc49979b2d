"""Everything on callers' threads: prompts are validated, sent and awaited here, and answers read.

The path of a prompt:

1. ``verbs``: infer, stream, stream_many, submit, ainfer, astream; written once for ``Bridge`` and ``Client``.
2. ``requests``: validates everything, ``prompts`` first. ``options``: the keyword arguments.
3. ``account``: the fairness account, with its pair of queues. ``observer``: gets notified.
4. The ways to send and wait: ``answer`` (one), ``batch`` (a list), ``streams`` and ``stream_group`` (read as they
   grow), ``futures`` (resolved by the ``dispatcher``), ``async_streams`` (on ``other_loop``). ``sender`` sends lists.

``access`` is what all callers of one bridge share.
"""
