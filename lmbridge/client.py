"""A client: the verbs of the Bridge, on an account that can be closed.

Rule: any thread but the server's.
"""

from __future__ import annotations

from lmbridge.caller.access import Access
from lmbridge.caller.account import Account
from lmbridge.caller.observer import Observer
from lmbridge.caller.verbs import Verbs
from lmbridge.chat import Chat
from lmbridge.errors import LMBridgeError
from lmbridge.messages import GenerationConfig


class Client(Verbs):
    """A fairness account with its own pair of queues; safe from any thread. Made by ``bridge.client()``.

    Its pair serves one call at a time; nested and concurrent calls borrow others. ``with bridge.client() as client``
    closes it at the end, which aborts its running requests.
    """

    def __init__(self, access: Access, name: str, bridge: object, observer: Observer | None = None) -> None:
        self._own_account = Account(access, name, observer)
        self._bridge = bridge  # keeps it alive

    @property
    def name(self) -> str:
        """The account's name, as ``bridge.requests()`` shows it."""
        return self._own_account.name

    def chat(self, config: GenerationConfig | None = None, *, system: str | None = None) -> Chat:
        """A conversation that keeps its history; see ``lmbridge.chat.Chat``."""
        return Chat(self, config, system=system)

    def close(self, error: LMBridgeError | None = None) -> None:
        """End every call made through this client and refuse further ones. The bridge stays open.

        Args:
            error: raised to its callers; default: BridgeClosedError.
        """
        self._own_account.close(error)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.name!r}{'' if self._own_account.closed is None else ' closed'}>"

    def _account(self) -> Account:
        return self._own_account
