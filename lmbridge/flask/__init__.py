"""Flask: an extension that gives an app its bridges, and blueprints: OpenAI's API, reranking, operations, a web page.

Rule: public names only. Import the blueprints from their modules: ``lmbridge.flask.openai``, ``lmbridge.flask.rerank``,
``lmbridge.flask.operations`` and ``lmbridge.flask.playground`` each have a ``blueprint`` to register.
"""

from __future__ import annotations

from lmbridge.flask.caller import current_bridge
from lmbridge.flask.extension import LMBridge
from lmbridge.flask.signals import answered, disconnected, failed

__all__ = ["LMBridge", "answered", "current_bridge", "disconnected", "failed"]
