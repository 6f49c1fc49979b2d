"""What runs on the server thread, which owns the loop and the engine.

The stations of a prompt, in the order it meets them:

1. ``inbox``: what callers have put down is taken in; ``sweep`` finds what no bell announced.
2. ``calls``: a call's life, from its arrival to the final word.
3. ``turns``: who is next.
4. ``place``: the engine's place, what it works on and whether it moves.

And whose lives these are:

- The thread: ``thread`` is what callers ask of it; ``keeper`` starts, replaces and ends it, and ``at_exit`` what nobody
  ended; ``environment``: where there can be none. ``run`` is one from start to end, on its ``loop``; ``watchdog`` looks
  at it from outside, and ``health`` tells how it is.
- The engine: ``supervisor`` keeps one there, by the orders in ``swaps``; ``places`` loads and closes them, each behind
  the ``border``; ``losses`` says how one was lost, ``clock`` for how long one was silent.
"""
