"""Many threads, one LLM engine: a dedicated server thread owns the event loop and the model.

Rule: public names only, bound when first used, so that ``import lmbridge`` loads neither torch, transformers nor flask.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge, Health, RequestInfo
    from lmbridge.caller.async_streams import AsyncStream
    from lmbridge.caller.futures import ResponseFuture
    from lmbridge.caller.gathered import Gathered
    from lmbridge.caller.observer import Observer
    from lmbridge.caller.stream_group import StreamGroup
    from lmbridge.caller.streams import Stream
    from lmbridge.chat import Chat, ChatStream
    from lmbridge.client import Client
    from lmbridge.device import Device, DeviceStatus, PartyStatus
    from lmbridge.engines.base import Engine
    from lmbridge.engines.function import FunctionEngine, function_engine
    from lmbridge.errors import (
        BridgeClosedError,
        DisconnectedError,
        EngineDeadError,
        EngineError,
        EngineStartError,
        ForkedError,
        InvalidRequestError,
        LMBridgeError,
        MissingDependencyError,
        ModelNotFoundError,
        PromptTooLongError,
        QueueFullError,
        RequestAbortedError,
        RequestTimeoutError,
        UnknownEngineError,
        UnsupportedEnvironmentError,
        UnsupportedOptionError,
        UnsupportedTaskError,
        WrongThreadError,
    )
    from lmbridge.messages import (
        Delta,
        GenerationConfig,
        Ranked,
        Request,
        Response,
        Timings,
        ToolCall,
        Usage,
        prompt_text,
    )

__version__ = "0.1.0"

_HOMES = {
    "bridge": ("Bridge", "Health", "RequestInfo"),
    "chat": ("Chat", "ChatStream"),
    "client": ("Client",),
    "device": ("Device", "DeviceStatus", "PartyStatus"),
    "engines.base": ("Engine",),
    "errors": (
        "BridgeClosedError", "DisconnectedError", "EngineDeadError", "EngineError", "EngineStartError", "ForkedError",
        "InvalidRequestError", "LMBridgeError", "MissingDependencyError", "ModelNotFoundError", "PromptTooLongError",
        "QueueFullError", "RequestAbortedError", "RequestTimeoutError", "UnknownEngineError",
        "UnsupportedEnvironmentError", "UnsupportedOptionError", "UnsupportedTaskError", "WrongThreadError",
    ),
    "caller.futures": ("ResponseFuture",),
    "caller.stream_group": ("StreamGroup",),
    "caller.gathered": ("Gathered",),
    "engines.function": ("FunctionEngine", "function_engine"),
    "messages": (
        "Delta", "GenerationConfig", "Ranked", "Request", "Response", "Timings", "ToolCall", "Usage", "prompt_text",
    ),
    "caller.async_streams": ("AsyncStream",),
    "caller.observer": ("Observer",),
    "caller.streams": ("Stream",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncStream", "Bridge", "BridgeClosedError", "Chat", "ChatStream", "Client", "Delta", "Device", "DeviceStatus",
    "DisconnectedError", "Engine", "EngineDeadError", "EngineError", "EngineStartError", "ForkedError",
    "FunctionEngine", "Gathered", "GenerationConfig", "Health", "InvalidRequestError", "LMBridgeError",
    "MissingDependencyError", "ModelNotFoundError", "Observer", "PartyStatus", "PromptTooLongError", "QueueFullError",
    "Ranked", "Request", "RequestAbortedError", "RequestInfo", "RequestTimeoutError", "Response", "ResponseFuture",
    "Stream", "StreamGroup", "Timings", "ToolCall", "UnknownEngineError", "UnsupportedEnvironmentError",
    "UnsupportedOptionError", "UnsupportedTaskError", "Usage", "WrongThreadError", "function_engine",
    "prompt_text",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lmbridge' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lmbridge.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
