"""For tests: ``ScriptedEngine`` and ``ScriptedEncoder`` follow a script; ``EngineContract`` and ``JobContract`` test
what every engine must do.
"""

from lmbridge.messages import prompt_text
from lmbridge.testing.contract import EngineContract
from lmbridge.testing.job_contract import JobContract
from lmbridge.testing.scripted import Script, ScriptedEngine, echo
from lmbridge.testing.scripted_encoder import ScriptedEncoder, score_of, vector_of

__all__ = [
    "EngineContract", "JobContract", "Script", "ScriptedEncoder", "ScriptedEngine", "echo", "prompt_text", "score_of",
    "vector_of",
]  # fmt: skip
