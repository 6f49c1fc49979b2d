"""What a library's exception means for the device. Guesses by name, since libraries do not say.

Rule: any thread; imports no library.
"""

from __future__ import annotations

from lmbridge.log import said

MAX_CAUSES = 10  # examined in a chain; an exception may be its own cause


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or process ran out of memory; torch words a CPU's case differently."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in said(error) for words in ("out of memory", "can't allocate memory"))


def is_sticky(cause: BaseException) -> bool:
    """Whether the cause is a device error that makes every later call to the device fail; lack of memory is not.

    Recognised by torch's AcceleratorError, or by the messages of older versions.
    """
    link: BaseException | None = cause
    for _ in range(MAX_CAUSES):
        if link is None or is_out_of_memory(link):
            break
        text = said(link)
        if type(link).__name__ == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text:
            return True
        link = link.__cause__
    return False
