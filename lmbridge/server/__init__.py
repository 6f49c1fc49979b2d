"""What runs on the server thread, which owns the loop and the engine.

The stations of a prompt, in the order it meets them:

1. ``inbox``: what callers have put down is taken in; ``sweep`` finds what no bell announced.
2. ``calls``: a call's life, from its arrival to the final word.
3. ``turns``: who is next.
4. ``place``: the engine's place, what it works on and whether it moves.

And whose lives these are: ``loop`` is the loop end of one server thread, ``thread`` starts and ends such threads,
``watchdog`` looks at them from outside, ``supervisor`` keeps an engine there. ``environment``: where none can be.
"""
