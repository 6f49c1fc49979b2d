"""What runs on callers' threads: a prompt is checked, sent, waited for and read here, and the engine is never touched.

The stations of a prompt, in the order it meets them:

1. ``verbs``: infer, stream, stream_many, submit, ainfer, astream; written once for ``Bridge`` and ``Client``.
2. ``requests``: everything is checked, ``prompts`` first. ``options``: what may be given.
3. ``account``: in whose name it is asked, and with which pair of queues. ``observer``: who hears of it.
4. The ways to send and to wait: ``answer`` (one), ``batch`` (a list), ``streams`` and ``stream_group`` (read while they
   grow), ``futures`` (resolved by the ``dispatcher``), ``async_streams`` (on ``other_loop``). ``sender`` sends lists.

``access`` is what all callers of one bridge share.
"""
