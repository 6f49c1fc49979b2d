"""What the library says to a programmer, as it is said to somebody at a terminal.

Rule: pure functions over texts. An error that already speaks to everybody passes unchanged; a message of the library
that names its own functions, classes or arguments gets a line in the table, and only here.
"""

from __future__ import annotations

import re

from lmbridge.cli.values import did_you_mean
from lmbridge.errors import EngineStartError, InvalidRequestError, LMBridgeError, PromptTooLongError
from lmbridge.log import said

_NO_MEMORY = "there is not enough memory; close other programs, or take a smaller model"

_WORDS: tuple[tuple[str, str], ...] = (
    (r"\bMemoryError\(\)", _NO_MEMORY),
    (r"\[enforce fail at \S+\].*can't allocate memory.*", f"{_NO_MEMORY}."),
    (
        r"\bTorch not compiled with CUDA enabled\b",
        "the installed torch has no CUDA; install one that has, or leave device=cuda out",
    ),
    (r"\bgive trust_remote_code=True\b", "give --option trust_remote_code=True"),
    (r"\bengine='(\w+)'", r"--engine \1"),
    (r"\bmax_context=(\d+) avoids it\b", r"--option max_context=\1 avoids it"),
    (r"\bmax_new_tokens\b", "--max-new-tokens"),
    (r"\bLMBRIDGE_API_KEYS_FILE:", "--api-keys-file:"),
    (r"(?i)<(?:!doctype|html)\b.*", "it sent a web page, and not an answer of the API."),
)
_NO_OPTION = re.compile(r"The engine '(\w+)' has no option '(\w+)'; its options are (.*)\.")
_MUST_BE = re.compile(r"^(?!LMBRIDGE_)(\w+) must be (.*), not (.*)\.$")


def in_words(error: BaseException) -> str:
    """What ``error`` says, for a person at a terminal."""
    text = " ".join((error.message if isinstance(error, LMBridgeError) else str(error)).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, InvalidRequestError):
        text = _as_option(text)
    if isinstance(error, PromptTooLongError) and "max_context" in error.hint:
        text = f"{text} --option max_context=N raises the limit where the model allows it."
    if isinstance(error, EngineStartError) and error.__cause__ is not None:
        text = f"The model could not be loaded: {' '.join(said(error.__cause__).split())}."
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    return text


def _as_option(text: str) -> str:
    """What is said of an engine's argument, said of ``--option``."""
    if found := _NO_OPTION.fullmatch(text):
        engine, option, known = found.groups()
        hint = did_you_mean(option, known.split(", ")) or "."
        return f"--option: the engine {engine} has no {option}{hint} It has {known}."
    if found := _MUST_BE.match(text):
        name, expected, given = found.groups()
        return f"--option: {name} must be {_plain(expected)}, not {given}."
    return text


def _plain(expected: str) -> str:
    """``an int >= 1 or None`` in words."""
    expected = re.sub(r"\ban int from\b", "a whole number from", expected)
    return re.sub(r"\b(?:an int|a number|seconds) >= (\S+)", _least, expected)


def _least(found: re.Match[str]) -> str:
    what = found[0].split(" >= ")[0].replace("an int", "a whole number")
    return f"{what} of at least {found[1]}"
