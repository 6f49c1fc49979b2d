"""The table of calls in docs/moving/from-lmdeploy.rst: each cell is what LMDeploy's own Pipeline gives, or ours."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

from tests.compat.calling import CALLS, TEMPLATE
from tests.compat.side_by_side import PAGE, observed, table
from tests.engines.conftest import byte_level_tokenizer, save_model


def test_the_page_says_what_calls_give(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A user who moves by the table would meet a difference that is not there, or is not told.

    Where it fails, what it shows as missing is the table as it should stand on the page.
    """
    model = save_model(tmp_path_factory.mktemp("models") / "llama")
    byte_level_tokenizer(TEMPLATE).save_pretrained(model)
    seen = table("call", observed("tests.compat.calling", CALLS, model))
    assert seen in PAGE.read_text(), seen
