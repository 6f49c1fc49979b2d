"""What lies between the callers' threads and the server thread; every module says which side may call what.

The stations of a prompt, in the order it meets them:

1. ``call``: one request on its way, shared by both ends, and its one outcome. ``endings``: the others it can have.
2. ``handle``: what callers hold of the server.
3. ``gate``: bounded admission, and the book of all calls.
4. ``channel``: the pair of janus queues, lent by ``channels``; the only module that imports janus.
5. ``doorbell``: wakes a loop. ``wake_chain``: wakes the threads that wait, one by another, on the way back.

``status`` is what the server tells of the engine's life.
"""
