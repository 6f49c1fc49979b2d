"""OpenAI's newer API, ``/v1/responses``: answers a list of items with items.

Rule: that of its blueprint. Only ``memory`` keeps anything of a conversation, and only for a while.

A request passes ``reading`` (with ``table``, ``items`` and ``functions``: JSON to the same call as a chat's),
``answering`` (the bridge) and ``telling``, which turns an answer's deltas into ``output`` items and their events.
``writing`` has the final object of both whole and streamed answers, ``routes`` the views.
"""
