"""For tests: ``ScriptedEngine`` does what it is told, and ``EngineContract`` says what every engine must do."""

from lmbridge.testing.contract import EngineContract
from lmbridge.testing.scripted import Script, ScriptedEngine, echo, prompt_text

__all__ = ["EngineContract", "Script", "ScriptedEngine", "echo", "prompt_text"]
