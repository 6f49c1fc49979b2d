"""Every architecture of the table answers as ``generate`` does, alone and in a crowd, on the runner that is stated.

One of them: ``python -m pytest -m long tests/architectures -k mistral``. The documentation's table is written anew by
``LMBRIDGE_WRITE_TABLE=1 python -m pytest -m long tests/architectures``.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmbridge import Bridge, EngineStartError
from tests.architectures import table
from tests.architectures.asking import LEAST_MARGIN, PATIENCE, PROMPTS, answers_without, expected, observe
from tests.architectures.models import ARCHITECTURES, REFUSED, Architecture, Refused, save, save_refused

pytestmark = pytest.mark.long
SPECIAL = [architecture for architecture in ARCHITECTURES if architecture.without]


@pytest.fixture(autouse=True)
def _imported_modules_are_no_garbage() -> None:
    """Each engine looks for garbage when it ends; without this most of the time would go into looking at torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _other_tests_look_at_everything() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for a model, gone after the test: together they are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_answers_are_the_models_own(architecture: Architecture, folder: Path) -> None:
    """A user's model would write other text than by itself, alone or beside others, or have become slower unnoticed."""
    model = save(architecture, folder)
    answers, margin = expected(architecture, model)
    assert margin > LEAST_MARGIN, "rounding may decide a token; give the row another seed"
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS), "the prompt hardly matters; try another seed"
    seen = observe(model)
    assert seen.alone == answers
    assert seen.crowded == answers
    assert seen.runner == architecture.runner


@pytest.mark.parametrize("architecture", SPECIAL, ids=lambda row: row.name)
def test_what_is_special_decides_an_answer(architecture: Architecture, folder: Path) -> None:
    """A window, a soft cap or a scaling that was ignored would go unnoticed by the test above, and by the user."""
    model = save(architecture, folder)
    assert expected(architecture, model)[0] != answers_without(architecture, model, architecture.without)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda row: row.kind)
def test_what_is_no_causal_language_model_is_refused(refused: Refused, folder: Path) -> None:
    """A user who gives such a model would get noise or a traceback rather than be told what it is."""
    model = save_refused(refused, folder)
    with pytest.raises(EngineStartError, match=refused.why) as told, Bridge(model, timeout=PATIENCE, device="cpu"):
        pass
    assert refused.kind in str(told.value)
    assert refused.model in str(told.value)


def test_the_documentation_shows_these_rows() -> None:
    """The table in the documentation would tell a reader of another runner than the one that serves the model."""
    text = table.written()
    if os.environ.get("LMBRIDGE_WRITE_TABLE"):
        table.PATH.write_text(text)
    assert table.PATH.read_text() == text
