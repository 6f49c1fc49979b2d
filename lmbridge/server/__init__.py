"""What runs on the server thread, which owns the loop and the engine.

The stations of a prompt, in the order it meets them:

1. ``inbox``: what callers have put down is taken in; ``sweep`` finds what no bell announced.
2. ``calls``: a call's life, from its arrival to the final word.
3. ``turns``: who is next.
4. ``place``: the engine's place, what it works on and whether it moves.

And whose lives these are:

- The thread's: ``thread`` is what callers ask of it, ``keeper`` starts, replaces and ends it, ``run`` is one thread at
  work with its ``loop``, ``watchdog`` looks at it from outside, ``at_exit`` ends what nobody closed.
- The engine's: ``supervisor`` keeps one, ``swaps`` are the orders for another, ``places`` loads, retires and closes
  them, ``border`` guards every step into an engine's code, ``losses`` says in words how one was lost.

``health`` is what is true of all this now, ``clock`` counts only the time in which we ran ourselves, ``environment``
refuses processes where none of it could be.
"""
