"""What the name of a model means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmbridge.engines import models
from lmbridge.engines.models import find_model
from lmbridge.errors import InvalidRequestError, ModelNotFoundError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "org/model.v1"])
def test_hub_ids_pass_unchanged(name: str) -> None:
    """A model of a hub could not be loaded by its id."""
    assert find_model(name) == name


def test_demo_is_the_bundled_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first five minutes would need a network."""
    monkeypatch.setattr(models, "DEMO_FOLDER", folder)
    assert find_model("demo") == str(folder)
    assert models.DEMO_FOLDER.parent != Path(models.__file__)


def test_demo_wins_over_a_folder_of_that_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo would fail, or be another model, in a directory that has something called demo."""
    monkeypatch.setattr(models, "DEMO_FOLDER", folder)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("demo") == str(folder)
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        find_model("./demo")


def test_an_installation_without_the_bundled_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation would look like a mistake of the user's."""
    monkeypatch.setattr(models, "DEMO_FOLDER", tmp_path / "demo_model")
    with pytest.raises(ModelNotFoundError, match="installation"):
        find_model("demo")


def test_folders_are_taken_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on disk would be looked for on the hub."""
    assert find_model(str(folder)) == str(folder)
    assert find_model(folder) == str(folder)
    monkeypatch.chdir(folder.parent)
    assert find_model(folder.name) == folder.name
    assert find_model(f"./{folder.name}") == folder.name
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model(f"~/{folder.name}") == str(folder)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "nowhere/", "~nobody-at-all/x", "."]
)
def test_what_looks_like_a_path_must_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path would end in a download error about a hub the user never mentioned."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"does not exist|holds no config"):
        find_model(name)


def test_a_file_is_no_model(folder: Path) -> None:
    """Giving the weights' file would end in a traceback from inside a library."""
    with pytest.raises(ModelNotFoundError, match="is a file"):
        find_model(str(folder / "config.json"))


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_is_no_name_is_refused(name: object) -> None:
    """A forgotten argument would be looked up on the hub."""
    with pytest.raises(InvalidRequestError) as caught:
        find_model(name)  # type: ignore[arg-type]
    assert caught.value.param == "model"


def test_the_error_names_what_was_given() -> None:
    """The user could not see which of several models is missing."""
    with pytest.raises(ModelNotFoundError, match=os.path.join("x", "y", "z")):
        find_model("x/y/z")
