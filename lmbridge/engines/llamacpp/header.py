"""Reads a GGUF file's header, without loading anything.

Rule: standard library only; any thread. The weights are not touched.
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
_LONGEST = 1 << 26  # bytes of a string; more means that the file is not GGUF
_RANK = 4  # llama.cpp's pooling that gives scores


@dataclass(frozen=True)
class Header:
    """A model's header.

    Attributes:
        architecture: llama.cpp's name for it.
        context: the most tokens that it was trained for; 0 if unknown.
        pooling: llama.cpp's number for the pooling; None for models that generate.
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
        """Its task: ``generate``, ``embed`` or ``rerank``."""
        if self.pooling is None or self.pooling <= 0:
            return "embed" if "bert" in self.architecture else "generate"
        return "rerank" if self.pooling == _RANK else "embed"


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of the file.

    Raises:
        ModelNotFoundError: it is not a GGUF file, or the header is cut off.
    """
    try:
        with open(path, "rb") as file:
            return _header(_fields(file))
    except (struct.error, ValueError, LookupError, OSError) as cause:
        raise ModelNotFoundError(
            f"{os.fspath(path)} is not a readable GGUF file ({cause}); download it again."
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
    """The file's fields; lists are given by their length."""
    if file.read(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, _, count = _unpack(file, "<IQQ")
    if version < 2:
        raise ValueError(f"it has version {version}; the oldest supported is 2")
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
        raise ValueError("it has an unterminated string")
    return file.read(length).decode("utf-8", "replace")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
