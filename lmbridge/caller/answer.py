"""One prompt, one whole answer: sent, and waited for by the thread that asks.

Rule: the caller's thread.
"""

from __future__ import annotations

from lmbridge.caller.account import Account
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.crossing.endings import interrupted_error
from lmbridge.crossing.handle import ServerHandle
from lmbridge.errors import LMBridgeError, QueueFullError
from lmbridge.messages import Request, Response


def answer(account: Account, request: Request) -> Response:
    """Send one request and block for its answer; raises what it ends with."""
    server = account.server(True)
    channel = account.lease(server)
    # As account.call() would, which only who is observed needs: a call of ours is a hundredth of a request's cost.
    call = Call(request, channel, account) if account.observer is None else account.call(request, channel)
    try:
        server.send(call)
        wait(server, call)
    except BaseException as error:
        give_up(server, call, error)
        account.report(call)
        raise
    if account.observer is not None:
        account.report(call)
    if call.ended:
        account.take_back(server, call.channel)
    return call.response()


def wait(server: ServerHandle, call: Call) -> None:
    """Block until a call has an outcome, at most to its deadline."""
    deadline = call.request.deadline
    while True:
        call.signalled = False  # before looking, so that what comes now sends a new token
        if call.outcomes:
            return
        remaining = None if deadline is None else server.remaining(call)
        if call.outcomes:
            return
        try:
            call.channel.wait(True, remaining)
        except Empty:
            pass
        except Closed:
            call.settle(server.closed_error())


def send(server: ServerHandle, call: Call, waiting: Channel[Call] | None = None) -> bool:
    """Send a new call; whatever comes in between, it is either with the server or has ended (False)."""
    try:
        return server.send(call, waiting)
    except BaseException as error:
        give_up(server, call, error)
        raise


def give_up(server: ServerHandle, call: Call, error: BaseException) -> None:
    """Stop a call whose caller was struck by ``error``: an interrupt, or what it was refused with."""
    call.settle(error if isinstance(error, LMBridgeError) else interrupted_error())
    if not isinstance(error, QueueFullError):  # which is in no book
        server.abort(call)
