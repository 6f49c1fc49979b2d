"""A stress test of real bridges, without a model: ``python -m lmbridge.testing.storm --requests 1000000 --seed 1``.

Rule: everything that users may do or meet, at random and at once; drawn from the seed, and judged from outside.

The parts, from the seed to the last line:

1. ``plan``: the plan of a round; a round is the life of one bridge.
2. ``scene``: the state shared in a round. ``round``: its bridge and engines, and what they leave behind.
3. ``caller`` and ``ways`` (threads), ``loops`` (tasks): who asks, and how; ``jobs`` for what is no text. ``question``:
   what, with words of its own.
4. ``saboteurs`` and ``engine``: what goes wrong meanwhile.
5. ``watch``: how long each caller has waited. ``judge``: whether each outcome is right, and the number of calls.
6. ``crew``: who stays for all rounds. ``storm``: one round after another, until enough was asked.
"""
