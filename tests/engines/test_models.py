"""What the name of a model means."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from lmbridge.engines import models
from lmbridge.engines.models import announce, did_you_mean, find_model
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


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny.Q4_K_M.GGUF"])
def test_a_gguf_file_is_a_model(tmp_path: Path, name: str) -> None:
    """The commonest files of models could not be named."""
    (tmp_path / name).write_bytes(b"GGUF")
    assert find_model(str(tmp_path / name)) == str(tmp_path / name)
    assert find_model(tmp_path / name) == str(tmp_path / name)
    assert find_model(tmp_path) == str(tmp_path / name)


def test_a_missing_gguf_file_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped file would be looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        find_model("tiny.gguf")


def test_of_several_gguf_files_one_must_be_chosen(tmp_path: Path) -> None:
    """Any of them would be loaded, with half the quality or twice the size."""
    for name in ("b.Q8_0.gguf", "a.Q4_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"holds 2 \.gguf files; .*: a\.Q4_0\.gguf, b\.Q8_0\.gguf\."):
        find_model(tmp_path)


def test_a_gguf_file_beside_weights_is_not_taken(folder: Path) -> None:
    """A folder that holds a whole model would load as something else."""
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    assert find_model(folder) == str(folder / "tiny.gguf")  # config.json alone is no model
    (folder / "model.safetensors").write_bytes(b"")
    assert find_model(folder) == str(folder)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_names_its_base_and_how_to_merge_it(tmp_path: Path, with_config: bool) -> None:
    """Who trained a LoRA would be told of a file that no adapter has."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"adapter \(LoRA\) without its base model, 'org/base'") as caught:
        find_model(tmp_path)
    for words in ("pip install peft", "merge_and_unload()", "save_pretrained", "from_pretrained('org/base')"):
        assert words in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base_is_told_too(tmp_path: Path, content: str) -> None:
    """A broken file would end in a traceback."""
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"adapter \(LoRA\)"):
        find_model(tmp_path)


def test_a_whole_model_with_an_adapter_beside_it_is_a_model(folder: Path) -> None:
    """A folder that transformers loads would be refused."""
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    assert find_model(folder) == str(folder)


# --------------------------------------------------------------------------------------------------------- close names


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models in it, and with what is none."""
    for name in ("Qwen3-0.6B", "models/llama-tiny"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "smol.gguf").write_bytes(b"GGUF")
    (tmp_path / "gguf-folder").mkdir()
    (tmp_path / "gguf-folder" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "photographs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("dmo", "'demo'"),
        ("Demo", "'demo'"),
        ("qwen3-0.6b", "'Qwen3-0.6B'"),
        ("models/lama-tiny", "'models/llama-tiny'"),
        ("smoll.gguf", "'smol.gguf'"),
        ("gguf-foldr", "'gguf-folder'"),
        ("photographs2", ""),
        ("gpt2", ""),
        ("org/model", ""),
    ],
)
def test_a_close_name_is_suggested(shelf: Path, name: str, suggestion: str) -> None:
    """A typing mistake would cost a search, or the suggestion would be something that holds no model."""
    assert did_you_mean(name) == (f" (did you mean {suggestion}?)" if suggestion else "")


def test_a_mistyped_path_gets_a_suggestion(shelf: Path) -> None:
    """A typing mistake in a long path would be hard to see."""
    with pytest.raises(ModelNotFoundError, match=f"did you mean '{shelf}/models/llama-tiny'"):
        find_model(f"{shelf}/models/lama-tiny")


def test_asking_the_hub_is_announced(shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The user would watch a command that does nothing, and not know what it waits for."""
    with caplog.at_level(logging.INFO, logger="lmbridge"):
        announce("dmo")
        announce("gpt2")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "no folder 'dmo' here; asking the hub… (did you mean 'demo'?)"),
        ("INFO", "no folder 'gpt2' here; asking the hub…"),
    ]


def test_a_model_on_this_disk_is_not_announced(shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning at each start would speak of a hub that nobody asks."""
    with caplog.at_level(logging.INFO, logger="lmbridge"):
        announce(find_model("Qwen3-0.6B"))
        announce(find_model("smol.gguf"))
    assert not caplog.records
