"""LMDeploy's ChatTemplateConfig.

Rule: plain data; an LMDeploy engine gets it converted, other engines use the model's own template.
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
    """Which of LMDeploy's chat templates is used, and what is changed in it; None leaves the template's own."""

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
        """The fields as JSON, written to ``file_path`` too where one is given."""
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=4)
        if file_path:
            Path(file_path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, file_or_string: str) -> ChatTemplateConfig:
        """Made of a JSON text or of the file of that name; a template without a name gets a new one.

        Raises:
            InvalidRequestError: it is neither.
        """
        try:
            text = Path(file_or_string).read_text(encoding="utf-8")
        except OSError:  # no such file, or a text too long to name one
            text = file_or_string
        try:
            fields = json.loads(text)
        except ValueError as cause:
            raise InvalidRequestError("Give ChatTemplateConfig.from_json a file or a JSON text.") from cause
        if fields.get("model_name") is None:
            fields["model_name"] = uuid.uuid4().hex
        return cls(**fields)
