"""One prompt, one complete answer: the calling thread sends and waits.

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
    """Send one request and block for its answer, or raise its error."""
    server = account.server(True)
    channel = account.lease(server)
    # Inlined account.call(), needed only with an observer: a function call is a hundredth of a request's cost.
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
    """Block until a call has an outcome, at most until its deadline."""
    deadline = call.request.deadline
    while True:
        call.signalled = False  # before looking, so that later news sends a new token
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
    """Send a new call; whatever interrupts, it is either with the server or has ended (False)."""
    try:
        return server.send(call, waiting)
    except BaseException as error:
        give_up(server, call, error)
        raise


def give_up(server: ServerHandle, call: Call, error: BaseException) -> None:
    """Stop a call whose caller raises ``error``: an interrupt or a refusal."""
    call.settle(error if isinstance(error, LMBridgeError) else interrupted_error())
    if not isinstance(error, QueueFullError):  # a refused call is not registered
        server.abort(call)
