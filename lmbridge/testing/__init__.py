"""For tests: ``ScriptedEngine`` does what it is told; ``EngineContract``, ``JobContract`` say what others must do."""

from lmbridge.testing.contract import EngineContract
from lmbridge.testing.job_contract import JobContract
from lmbridge.testing.scripted import Script, ScriptedEngine, echo, prompt_text

__all__ = ["EngineContract", "JobContract", "Script", "ScriptedEngine", "echo", "prompt_text"]
