"""OpenAI's newer API, ``/v1/responses``: one answer to a list of items, as items.

Rule: as of the blueprint that it is part of. Of what was said, ``memory`` alone keeps anything, and that for a while.

A request passes ``reading`` (with ``table``, ``items`` and ``functions``: JSON to the call that a chat makes),
``answering`` (the bridge) and ``telling``, which makes of an answer's deltas the ``output`` items and the events that
tell of them; ``writing`` has the object that both kinds of answer end with, ``routes`` the views.
"""
