"""Which engine a name means, and which one a model is for: what a user would say it is, or an error that lists them."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Bridge, Engine, MissingDependencyError, ModelNotFoundError, UnknownEngineError
from lmbridge.engines import ENGINES, engine_class, engine_names, named_engine
from lmbridge.engines.base import Library


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_engine_can_be_named_without_its_library(name: str) -> None:
    """Naming an engine loads nothing of its library, so that a missing one is told by a message with the pip line."""
    code = (
        f"import sys; from lmbridge.engines import engine_class; found = engine_class({name!r}); "
        "print(found.name, *[name for name in sys.modules if name in "
        "('torch', 'transformers', 'lmdeploy', 'vllm', 'exllamav2', 'exllamav3', 'xllamacpp', 'openai', 'ray')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [name]
    for library in engine_class(name).libraries:
        assert isinstance(library, Library)
        assert "pip install" in library.install


def folder(path: Path, config: dict[str, Any], **files: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    for name, content in files.items():
        (path / f"{name}.json").write_text(content)
    return path


def test_auto_goes_by_what_the_model_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a word of an engine, each kind of model gets its own, and what is not the usual one is said."""
    caplog.set_level(logging.INFO, "lmbridge.loading")
    exl3 = folder(tmp_path / "exl3", {"quantization_config": {"quant_method": "exl3"}})
    exl2 = folder(tmp_path / "exl2", {"quantization_config": {"quant_method": "exl2"}})
    plain = folder(tmp_path / "plain", {"quantization_config": None})
    encoder = folder(tmp_path / "encoder", {}, modules="[]")
    assert named_engine("auto", "demo") == "transformers"
    assert named_engine("auto", str(plain)) == "transformers"
    assert named_engine("auto", "org/a-model") == "transformers"
    assert not caplog.records
    assert named_engine("auto", "https://example.org/v1") == "openai"
    assert named_engine("auto", str(exl3)) == "exllamav3"
    assert named_engine("auto", str(exl2)) == "exllamav2"
    assert named_engine("auto", str(encoder)) == "encoder"
    assert [word for record in caplog.records for word in ENGINES if f"'{word}'" in record.getMessage()] == [
        "openai", "exllamav3", "exllamav2", "encoder",
    ]  # fmt: skip
    with pytest.raises(ModelNotFoundError):
        named_engine("auto", str(tmp_path / "none"))


def test_auto_and_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .gguf file is llama.cpp's where that is installed, and transformers reads it elsewhere."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    assert named_engine("auto", str(file)) == "llamacpp"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert named_engine("auto", str(file)) == "transformers"


@pytest.mark.parametrize("name", ["127.0.0.1:9/v1", "my_app:answer"])
def test_what_is_no_model_at_all(name: str) -> None:
    """A server without http:// and a function without its engine are told what is missing, not asked for at a hub."""
    with pytest.raises(ModelNotFoundError, match=r"http://.*engine='function'"):
        Bridge(name)


def test_a_config_nested_too_deeply(tmp_path: Path) -> None:
    """A hostile file is no crash."""
    (folder(tmp_path / "deep", {}) / "config.json").write_text("[" * 100_000)
    assert named_engine("auto", str(tmp_path / "deep")) == "transformers"


PACKAGE = """
from lmbridge import Delta, Engine

class Echo(Engine):
    name = "echo"

    def __init__(self, model, *, times=1):
        self.model, self.times = model, times

    async def start(self):
        pass

    async def generate(self, request):
        yield Delta(f"{self.model}: {request.prompt * self.times}")
        yield Delta(finish_reason="stop")

not_an_engine = 5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that adds engines, as pip leaves one in site-packages."""
    (tmp_path / "an_engine_of_mine.py").write_text(PACKAGE)
    info = tmp_path / "an_engine_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: an-engine-of-mine\nVersion: 1.0\n")
    points = {
        "echo": "an_engine_of_mine:Echo",
        "five": "an_engine_of_mine:not_an_engine",
        "gone": "an_engine_of_mine:Gone",
        "transformers": "an_engine_of_mine:Echo",
    }
    lines = ["[lmbridge.engines]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("package")
def test_another_package_adds_an_engine() -> None:
    """Its engine is used by its name, with its options, and a name of ours stays ours."""
    with Bridge("m", engine="echo", times=2) as bridge:
        assert bridge.infer("ab", timeout=30).text == "m: abab"
    assert {"echo", "five", "gone"} <= set(engine_names())
    assert engine_class("transformers").__module__.startswith("lmbridge.")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("name", "words"), [("five", "not a subclass"), ("gone", "cannot be imported")])
def test_a_package_that_adds_no_engine(name: str, words: str) -> None:
    """Whoever uses its name is told which package is at fault."""
    with pytest.raises(MissingDependencyError, match=words) as caught:
        Bridge("m", engine=name)
    assert "an-engine-of-mine" in str(caught.value)


@pytest.mark.usefixtures("package")
def test_an_unknown_name_lists_them_all() -> None:
    """A mistyped engine is an error at once, with all names that there are."""
    with pytest.raises(UnknownEngineError, match=r"exlama.*llamacpp.*echo"):
        Bridge("demo", engine="exlama")


def test_auto_is_the_default(tmp_path: Path) -> None:
    """A bridge that was told no engine chooses again when its model is exchanged."""

    class Said(Engine):
        name = "said"

        async def start(self) -> None:
            pass

    bridge = Bridge(Said())
    with bridge, pytest.raises(ModelNotFoundError):
        bridge.swap(str(tmp_path / "none"))
