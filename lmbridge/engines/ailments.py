"""What an exception of a library means for the device. Guesses by name, since no library tells.

Rule: any thread; imports no library.
"""

from __future__ import annotations

from lmbridge.log import said

MAX_CAUSES = 10  # of a chain that are looked at; an exception may be its own cause


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the process, had too little memory; torch has words of its own for a CPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in said(error) for words in ("out of memory", "can't allocate memory"))


def is_sticky(cause: BaseException) -> bool:
    """Whether the cause is a device error after which every later call to the device fails too; lack of memory is not.

    By torch's AcceleratorError, and by messages of older versions.
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
