"""What else a thread may do: ask as a client of its own, be short-lived, meddle with others, and look.

Rule: each is a function of its caller, on that caller's thread.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from lmbridge.errors import RequestAbortedError
from lmbridge.testing.storm.asking import infer, infer_list
from lmbridge.testing.storm.caller import Caller, Visitor
from lmbridge.testing.storm.reading import group, stream
from lmbridge.testing.storm.submitting import submit
from lmbridge.testing.storm.watch import Post


def own_client(caller: Caller) -> None:
    """Ask by a client of one's own, which somebody else may use or close meanwhile; or by another's."""
    with caller.scene.bridge.client() as own:
        if caller.chance.random() < 0.5:
            caller.scene.clients.append(own)
        used = own
        with suppress(IndexError):  # nobody has given one away
            used = caller.scene.clients[0] if caller.chance.random() < 0.3 else own
        visitor = Visitor(caller.judge, caller.watch, caller.chance, caller.post, used)
        for _ in range(caller.chance.randint(1, 4)):
            way = caller.chance.choice([infer, infer_list, stream, submit, group])
            way(visitor)


def short_lived(caller: Caller) -> None:
    """Ask in a thread that ends at once."""
    scene = caller.scene

    def work() -> None:
        post = caller.watch.add(Post(caller.watch, "a short-lived thread", lambda: scene.closed_at))
        infer(Caller(caller.judge, caller.watch, caller.chance, post))
        post.leave()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with caller.post.waits("a short-lived thread", time.monotonic() + 60.0):
        thread.join()


def meddle(caller: Caller) -> None:
    """End somebody else's call: by its id, by its stream, or with its client."""
    scene = caller.scene
    with caller.post.waits("an abort or a close", time.monotonic()), suppress(IndexError):
        roll = caller.chance.random()
        if roll < 0.4:
            scene.bridge.abort(scene.ids.pop())
        elif roll < 0.7:
            error = RequestAbortedError("closed by somebody else") if roll < 0.5 else None
            scene.streams.pop().close(error)
        else:
            scene.clients.popleft().close()


def look(caller: Caller) -> None:
    """Look at everything that can be seen; none of it may block."""
    bridge = caller.scene.bridge
    with caller.post.waits("a look", time.monotonic() + 1.0):  # `stats` waits for the loop so long
        bridge.health()
        bridge.requests()
        bridge.supports()
        bridge.describe()
        repr(bridge)
        _ = bridge.metrics.cancels
        bridge.stats()
