"""What lies between the callers' threads and the server thread; every module says which side may call what.

The stations of a prompt, in the order it meets them:

1. ``call``: one request on its way, shared by both ends, and its one outcome.
2. ``gate``: bounded admission.
3. ``channel``: the pair of janus queues; the only module that imports janus.
4. ``doorbell``: wakes a loop. ``wake_chain``: wakes the threads that wait, one by another, on the way back.
"""
