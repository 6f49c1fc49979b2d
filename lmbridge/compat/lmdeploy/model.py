"""LMDeploy's ChatTemplateConfig.

Rule: plain data; converted for LMDeploy's engine; other engines use the model's own template.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from lmbridge.errors import InvalidRequestError


@dataclass
class ChatTemplateConfig:
    """One of LMDeploy's chat templates, with changes; None keeps the template's own value."""

    model_name: str
    model_path: str | None = None
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    tool: str | None = None
    eotool: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: list[str] | None = None

    def to_json(self, file_path: str | None = None) -> str:
        """The fields as JSON; also written to ``file_path`` if given."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=4)
        if file_path:
            Path(file_path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, file_or_string: str) -> ChatTemplateConfig:
        """From JSON or from the file of that name; a template without a name gets a new one.

        Raises:
            InvalidRequestError: it is neither.
        """
        try:
            text = Path(file_or_string).read_text(encoding="utf-8")
        except OSError:  # no such file, or too long for a file name
            text = file_or_string
        try:
            fields = json.loads(text)
        except ValueError as cause:
            raise InvalidRequestError("ChatTemplateConfig.from_json needs a file name or a JSON string.") from cause
        if fields.get("model_name") is None:
            fields["model_name"] = uuid.uuid4().hex
        return cls(**fields)
