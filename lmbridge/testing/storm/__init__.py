"""A storm over real bridges, without a model: ``python -m lmbridge.testing.storm --requests 1000000 --seed 1``.

Rule: what a user may do or meet, at random and all at once; everything is drawn from the seed, and judged from outside.

The parts, from the seed to the last line:

1. ``plan``: what a round has in store; a round is the life of one bridge.
2. ``scene``: what all who are in it share. ``round``: its bridge and engines, and what is left of them.
3. ``caller`` and ``ways`` (threads), ``loops`` (tasks): who asks, and how; ``jobs`` for what is no text. ``question``:
   what, with words of its own.
4. ``saboteurs`` and ``engine``: what goes wrong meanwhile.
5. ``watch``: since when each caller waits. ``judge``: whether an end is right, and how many calls there were.
6. ``crew``: who stays for all rounds. ``storm``: one round after another, until enough was asked.
"""
