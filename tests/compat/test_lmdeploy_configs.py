"""LMDeploy's configs: the same fields, whoever's class they are of, and what becomes of them."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmbridge import InvalidRequestError, MissingDependencyError, UnsupportedOptionError, prompt_text
from lmbridge.compat import lmdeploy as ours
from lmbridge.compat.lmdeploy import (
    ChatTemplateConfig,
    GenerationConfig,
    PytorchEngineConfig,
    Response,
    SpeculativeConfig,
    TurbomindEngineConfig,
    pipeline,
)
from lmbridge.compat.lmdeploy.convert import common_options, lmdeploy_engine_config
from lmbridge.compat.lmdeploy.generation import Ability, generation_config
from lmbridge.compat.lmdeploy.keywords import Keywords
from lmbridge.testing import ScriptedEngine

NEEDED = "needs LMDeploy; .ci/run installs it without a GPU"
CLASSES = ("GenerationConfig", "PytorchEngineConfig", "TurbomindEngineConfig", "ChatTemplateConfig", "VisionConfig")


def plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value


@pytest.mark.parametrize("name", [*CLASSES, "Response", "SpeculativeConfig", "KVTransferConfig"])
def test_fields_and_defaults_are_lmdeploys(name: str) -> None:
    """The same fields in the same order with the same defaults, so that positional arguments mean the same too."""
    messages = pytest.importorskip("lmdeploy.messages", reason=NEEDED)
    if (installed := sys.modules["lmdeploy"].__version__) != ours.__version__:
        pytest.skip(f"the fields are those of LMDeploy {ours.__version__}, and {installed} is installed")
    theirs = getattr(messages, name, None) or pytest.importorskip("lmdeploy.model", reason=NEEDED).ChatTemplateConfig
    fields = [[(f.name, plain(f.default)) for f in dataclasses.fields(cls)] for cls in (getattr(ours, name), theirs)]
    assert fields[0] == fields[1]


def test_lmdeploys_own_objects_are_taken() -> None:
    """Objects of LMDeploy's classes do as well as ours, and ours become LMDeploy's, without what ends the process."""
    lmdeploy = pytest.importorskip("lmdeploy", reason=NEEDED)
    asked: dict[str, Any] = {"do_sample": True, "top_k": 3, "max_new_tokens": 4, "stop_words": ["x"]}
    engine = Ability(ScriptedEngine.supports, lambda word: ())
    converted = [
        generation_config(cls(**asked), engine, Keywords()) for cls in (lmdeploy.GenerationConfig, GenerationConfig)
    ]
    assert converted[0] == converted[1]
    theirs = lmdeploy.PytorchEngineConfig(session_len=99, thread_safe=True)
    own = lmdeploy_engine_config(PytorchEngineConfig(session_len=99, thread_safe=True, quant_policy=8), lmdeploy)
    copied = lmdeploy_engine_config(theirs, lmdeploy)
    for config in (own, copied):
        assert type(config) is lmdeploy.PytorchEngineConfig
        assert (config.session_len, config.thread_safe, config.enable_metrics) == (99, False, False)
    assert own.quant_policy == 8
    assert theirs.thread_safe is True
    assert type(lmdeploy_engine_config(TurbomindEngineConfig(tp=2), lmdeploy)) is lmdeploy.TurbomindEngineConfig


def test_a_field_the_installed_lmdeploy_lacks_is_named() -> None:
    """A field of a newer LMDeploy is refused by name when it is set, and left out when it is not."""

    @dataclasses.dataclass
    class PytorchEngineConfig:
        tp: int = 1
        thread_safe: bool = False

    older = SimpleNamespace(PytorchEngineConfig=PytorchEngineConfig)
    assert lmdeploy_engine_config(ours.PytorchEngineConfig(tp=2, thread_safe=True), older) == PytorchEngineConfig(tp=2)
    with pytest.raises(UnsupportedOptionError, match="session_len"):
        lmdeploy_engine_config(ours.PytorchEngineConfig(session_len=64), older)


def test_configs_check_themselves() -> None:
    """A value out of range is refused where it is written."""
    wrong: list[Callable[[], Any]] = [
        lambda: GenerationConfig(top_p=1.5),
        lambda: GenerationConfig(temperature=3),
        lambda: GenerationConfig(n=0),
        lambda: PytorchEngineConfig(tp=0),
        lambda: PytorchEngineConfig(cache_max_entry_count=1.0),
        lambda: TurbomindEngineConfig(dtype="float64"),
    ]
    for build in wrong:
        with pytest.raises(InvalidRequestError, match="must be") as caught:
            build()
        assert isinstance(caught.value, AssertionError)  # who catches LMDeploy's own goes on to


def test_what_cannot_be_honoured_is_named() -> None:
    """Nothing is dropped in silence: each option that the engine lacks is an error with its name."""
    with pytest.raises(UnsupportedOptionError, match="tp, adapters"):
        common_options(PytorchEngineConfig(tp=2, adapters={"a": "path"}, session_len=64))
    given: list[tuple[str, dict[str, Any]]] = [
        ("tp", {"backend_config": TurbomindEngineConfig(tp=2)}),
        ("chat_template_config", {"chat_template_config": ChatTemplateConfig("vicuna")}),
        ("speculative_config", {"speculative_config": SpeculativeConfig("eagle")}),
        ("allowed_media_domains", {"allowed_media_domains": ["example.org"]}),
        ("no_such_option", {"no_such_option": 1}),
        ("backend", {"backend": "tensorrt"}),
        ("backend_config", {"backend_config": GenerationConfig()}),
    ]
    for name, options in given:
        with pytest.raises(InvalidRequestError, match=name):
            pipeline("demo", **options)
    with pipeline(ScriptedEngine) as pipe:
        settings: dict[str, Any] = {"bad_words": ["x"], "logprob_start_len": 0, "output_logits": "all"}
        for field, value in settings.items():
            config = GenerationConfig()
            setattr(config, field, value)
            refused, answered = pipe(["a", "b"], gen_config=[config, GenerationConfig()])
            assert (refused.finish_reason, refused.error_code) == ("error", "unsupported_feature")
            assert field in str(refused.error_message)
            assert answered.text == "b"
        refused = pipe("a", adapter_name="lora")
        assert (refused.error_code, "adapter_name" in str(refused.error_message)) == ("unsupported_feature", True)
        with pytest.raises(UnsupportedOptionError, match="get_reward_score"):
            pipe.get_reward_score([1, 2])
        assert pipe("a", tools=None, adapter_name=None).text == "a"


def test_defaults_leave_the_engine_its_own() -> None:
    """LMDeploy's defaults are GPU choices; only what differs from them is asked of the transformers engine."""
    assert common_options(PytorchEngineConfig(thread_safe=True, eager_mode=True)) == {}
    asked = TurbomindEngineConfig(session_len=64, cache_max_entry_count=32, cache_block_seq_len=16, dtype="bfloat16")
    assert common_options(asked) == {
        "max_context": 64, "num_blocks": 32, "page_size": 16, "dtype": "bfloat16",
    }  # fmt: skip


def test_without_lmdeploy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without LMDeploy a pipeline says how to install it and how to do without; asked for transformers, it runs."""
    monkeypatch.setitem(sys.modules, "lmdeploy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lmbridge\[lmdeploy\]'(.|\n)*transformers"):
        pipeline("org/some-model")
    with pipeline("demo", backend="transformers") as pipe:
        assert pipe("Hi").text
    with pytest.raises(LookupError, match="does not exist"):
        pipeline(str(tmp_path / "missing"), backend="transformers")


def test_importing_loads_nothing() -> None:
    """The import line costs neither torch nor LMDeploy, and LMDeploy's module names stand for those who use them."""
    code = (
        "import sys\n"
        "from lmbridge.compat.lmdeploy import pipeline, GenerationConfig, Response, ChatTemplateConfig, Tokenizer\n"
        "from lmbridge.compat.lmdeploy import version_info, vl\n"
        "from lmbridge.compat.lmdeploy.messages import ResponseType\n"
        "from lmbridge.compat.lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig\n"
        "from lmbridge.compat.lmdeploy.pipeline import Pipeline\n"
        "from lmbridge.compat.lmdeploy.model import ChatTemplateConfig\n"
        "print(callable(pipeline), sorted({'torch', 'transformers', 'lmdeploy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True []\n", done.stderr


def test_chat_templates_as_json(tmp_path: Path) -> None:
    """A ChatTemplateConfig survives its JSON, from a text and from a file."""
    config = ChatTemplateConfig("vicuna", system="be brief", stop_words=["</s>"])
    text = config.to_json(str(tmp_path / "template.json"))
    assert ChatTemplateConfig.from_json(text) == ChatTemplateConfig.from_json(str(tmp_path / "template.json")) == config
    assert ChatTemplateConfig.from_json("{}").model_name
    with pytest.raises(InvalidRequestError, match="JSON"):
        ChatTemplateConfig.from_json("neither")


def test_responses_extend() -> None:
    """extend appends text, tokens and logprobs, and takes the rest of the later part."""
    first = Response("a", 1, 0, None, [1], [{1: -0.5}])
    kept = first.token_ids
    whole = first.extend(Response("b", 2, 9, "stop", [2], [{2: -0.25}]))
    assert whole is first
    assert whole == Response("ab", 2, 9, "stop", [1, 2], [{1: -0.5}, {2: -0.25}])
    assert kept == [1]
    assert 'finish_reason="stop"' in str(whole)


async def shout(prompt: Any) -> AsyncIterator[str]:
    yield prompt_text(prompt).upper()


def test_any_engine_runs_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for LMDeploy runs over every engine by its name, a server or a function as well."""
    monkeypatch.setitem(sys.modules, "an_app_of_mine", SimpleNamespace(shout=shout))
    with pipeline("an_app_of_mine:shout", backend="function") as pipe:
        assert pipe("hello").text == "HELLO"
        assert sorted(part.text for part in pipe.stream_infer(["one", "two"]) if part.text) == ["ONE", "TWO"]
    with pytest.raises(InvalidRequestError, match=r"auto, .*function.*lmdeploy.*not 'tensorrt'"):
        pipeline("demo", backend="tensorrt")
