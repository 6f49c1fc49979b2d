"""Has what the state machines share say what is wrong, as tests do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.bridge.asked", "tests.bridge.machine")
