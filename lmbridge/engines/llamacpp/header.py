"""What a GGUF file says of its model, before anything is loaded.

Rule: standard library only; any thread may ask. The weights are not touched.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from lmbridge.errors import ModelNotFoundError

_MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 26  # bytes of a string, in a file that is none
_RANK = 4  # of llama.cpp's poolings the one that gives scores


@dataclass(frozen=True)
class Header:
    """What a model is.

    Attributes:
        architecture: llama.cpp's name of it.
        context: the most tokens that it was trained for; 0 where that is not said.
        pooling: llama.cpp's number of the way it makes one vector of a text; None for models that generate.
        vocabulary: how many tokens it has.
        has_template: it comes with a chat template.
    """

    architecture: str
    context: int
    pooling: int | None
    vocabulary: int
    has_template: bool

    @property
    def task(self) -> str:
        """What it is for: ``generate``, ``embed`` or ``rerank``."""
        if self.pooling is None or self.pooling <= 0:
            return "embed" if "bert" in self.architecture else "generate"
        return "rerank" if self.pooling == _RANK else "embed"


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of the file.

    Raises:
        ModelNotFoundError: it is no GGUF file, or the file is cut off within it.
    """
    try:
        with open(path, "rb") as file:
            return _header(_fields(file))
    except (struct.error, ValueError, LookupError, OSError) as cause:
        raise ModelNotFoundError(
            f"{os.fspath(path)} is no GGUF file that can be read ({cause}); fetch it again."
        ) from cause


def _header(fields: dict[str, Any]) -> Header:
    architecture = str(fields["general.architecture"])
    return Header(
        architecture,
        int(fields.get(f"{architecture}.context_length", 0)),
        fields.get(f"{architecture}.pooling_type"),
        int(fields.get("tokenizer.ggml.tokens", 0)),
        "tokenizer.chat_template" in fields,
    )


def _fields(file: BinaryIO) -> dict[str, Any]:
    """The file's fields; of a list how long it is."""
    if file.read(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, _, count = _unpack(file, "<IQQ")
    if version < 2:
        raise ValueError(f"it has version {version}, and 2 is the oldest that is read")
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = _string(file)
        fields[name] = _value(file, *_unpack(file, "<I"))
    return fields


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, "<" + _NUMBERS[kind])[0]
    of, length = _unpack(file, "<IQ")
    if of in _NUMBERS:
        file.seek(struct.calcsize("<" + _NUMBERS[of]) * length, os.SEEK_CUR)
    else:
        for _ in range(length):
            _value(file, of)
    return length


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    if length > _LONGEST:
        raise ValueError("it has a string without end")
    return file.read(length).decode("utf-8", "replace")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
