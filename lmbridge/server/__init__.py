"""What runs on the server thread, which owns the loop and the engine.

The stations of a prompt, in the order it meets them:

1. ``server``: takes calls out of the channels, hands them to the engine and brings answers back.
2. ``turns``: who is next.
3. ``place``: the engine's place, and whether it moves.

And whose life they share: ``thread`` is the server thread's, ``watchdog`` looks after it from outside, ``supervisor`` is
the engine's.
"""
