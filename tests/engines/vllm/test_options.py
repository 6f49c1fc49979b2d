"""What the vLLM engine says before vLLM is there, and whether its parts are; vLLM itself is not needed here."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.engines.vllm import VLLMEngine, library
from lmbridge.engines.vllm.options import VLLMOptions
from lmbridge.engines.vllm.sampling import structured
from lmbridge.errors import EngineStartError, InvalidRequestError
from lmbridge.grammar import Grammar
from tests.engines.vllm.signatures import Sources


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_batch_size": 0}, "max_batch_size"), ({"max_context": True}, "max_context"), ({"tp": "2"}, "tp"),
        ({"cache_share": 1.5}, "cache_share"), ({"dtype": "int8"}, "dtype"), ({"engine_args": ["a"]}, "engine_args"),
        ({"max_context": 64, "engine_args": {"max_model_len": 64}}, "engine_args"),
        ({"engine_args": {"model": "another"}}, "engine_args"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_named(options: dict[str, Any], param: str) -> None:
    """A mistyped option would be found by vLLM minutes later, or not at all."""
    with pytest.raises(InvalidRequestError) as refused:
        VLLMEngine("demo", **options)
    assert refused.value.param == param


def test_options_have_vllms_names() -> None:
    """An option would not reach vLLM, or take away a choice that vLLM makes better."""
    none = VLLMOptions("m").arguments()
    assert set(none) == {"model", "tokenizer_mode", "structured_outputs_config", "disable_log_stats"}
    own: dict[str, Any] = {"tokenizer_mode": "slow", "quantization": "awq"}
    given = VLLMOptions("m", dtype="torch.bfloat16", max_batch_size=8, tp=2, trust_remote_code=True, engine_args=own)
    named = {"dtype": "bfloat16", "max_num_seqs": 8, "tensor_parallel_size": 2, "trust_remote_code": True}
    assert given.arguments() == {**none, **named, **own}


def test_forms_are_in_words_that_llguidance_knows() -> None:
    """vLLM would refuse a form that every other engine follows, or follow another one."""
    assert structured(None) is None
    assert structured(Grammar("regex", "[0-9]+", "grammar")) == {"regex": "[0-9]+"}
    assert structured(Grammar("choice", ("red", 'b"lue'), "grammar")) == {"grammar": r'start: "red" | "b\"lue"'}
    assert structured(Grammar("calls", 'start: "a"', "tools")) == {"grammar": 'start: "a"'}
    found = structured(Grammar("json", {"type": "integer"}, "grammar"))
    assert found is not None
    assert '"integer"' in found["json"]


def test_without_vllm_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would read an ImportError from somewhere inside rather than what to install."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineStartError, match="pip install vllm"), Bridge("demo", engine="vllm") as bridge:
        bridge.infer("Hello!", timeout=60)


def test_a_part_that_is_gone_is_found_in_a_wheel(tmp_path: Path) -> None:
    """A new vLLM that lacks something would pass the check that is there to find it."""
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "vllm/v1/engine/async_llm.py",
            "class AsyncLLM:\n"
            "    def from_engine_args(cls, engine_args): ...\n"
            "    async def get_supported_tasks(self): ...\n"
            "    async def generate(self, prompt, sampling_params, request_name): ...\n"
            "    def shutdown(self, timeout=None): ...\n",
        )
        archive.writestr("vllm/outputs.py", "class RequestOutput:\n    def __init__(self, outputs, finished): ...\n")
    missing = set(Sources(str(wheel)).missing())
    place = "vllm.v1.engine.async_llm:AsyncLLM"
    assert {f"{place}.generate request_id", f"{place}.abort", "vllm.outputs:RequestOutput prompt_logprobs"} <= missing
    assert not {f"{place}.shutdown timeout", f"{place}.get_supported_tasks"} & missing
    assert len(missing) < len(library.PARAMETERS) + len(library.FIELDS) + len(library.MEMBERS)
