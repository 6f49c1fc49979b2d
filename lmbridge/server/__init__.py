"""Everything on the server thread, which owns the loop and the engine.

The path of a prompt:

1. ``inbox``: takes in what callers have submitted; ``sweep`` finds what no bell announced.
2. ``calls``: the life of a call, from arrival to end.
3. ``turns``: which call is next.
4. ``place``: an engine, the calls in it, and whether it makes progress.

And the lifetimes:

- The thread's: ``thread`` is the callers' interface to it, ``keeper`` starts, replaces and ends it, ``run`` is one
  running thread with its ``loop``, ``watchdog`` monitors it from outside, ``at_exit`` ends what nobody closed.
- The engine's: ``supervisor`` keeps one running, ``swaps`` are requests for another, ``places`` loads, retires and
  closes them, ``border`` guards every step into an engine's code, ``losses`` words how one was lost.

``health`` is the actual state of all this, ``clock`` counts only the time in which we ourselves ran, ``environment``
refuses processes where none of it can work.
"""
