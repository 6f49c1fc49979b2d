"""``python -m lmbridge``: the same as the command ``lmbridge``."""

from __future__ import annotations

from lmbridge.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
