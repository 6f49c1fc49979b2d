"""What runs on callers' threads: a prompt is checked, sent, waited for and read here, and the engine is never touched.

The stations of a prompt, in the order it meets them:

1. ``verbs``: infer, stream, stream_many, submit, ainfer, astream; written once for ``Bridge`` and ``Client``.
2. ``prompts``: one prompt or a list of them.
3. ``batch``, ``streams``, ``stream_group``, ``futures``, ``other_loop``: the ways to wait for what comes back.
"""
