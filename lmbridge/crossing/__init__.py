"""Everything between callers' threads and the server thread; each module says who may call what.

The path of a prompt:

1. ``call``: one request in flight, shared by both ends, and its one outcome. ``endings``: the error outcomes.
2. ``handle``: the callers' interface to the server.
3. ``gate``: bounded admission, and the registry of all calls.
4. ``channel``: the pair of janus queues, lent by ``channels``; the only module that imports janus.
5. ``doorbell``: wakes a loop. ``wake_chain``: on the way back, wakes waiting threads one by one.

``status`` is the engine's state as the server reports it.
"""
