"""The drop-in over LMDeploy itself: its real control plane, with only the executor that drives the GPU replaced."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("lmdeploy") is None:  # one that is installed and cannot be imported is a failure
    pytest.skip("needs LMDeploy; .ci/run installs it without a GPU", allow_module_level=True)

import lmdeploy

from lmbridge.compat.lmdeploy import ChatTemplateConfig, GenerationConfig, PytorchEngineConfig, pipeline
from tests.engines.conftest import save_model
from tests.engines.lmdeploy_scripted import Cues, scripted_gpu


@pytest.fixture
def gpu() -> Iterator[Cues]:
    logger = logging.getLogger("lmdeploy")
    before = logger.level
    with scripted_gpu() as cues:
        yield cues
    logger.setLevel(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def test_a_pipeline_on_lmdeploy(gpu: Cues, model: str) -> None:
    """Where LMDeploy is installed it is the engine; thread_safe, which ends LMDeploy's process, is accepted."""
    config = PytorchEngineConfig(session_len=256, max_batch_size=4, thread_safe=True)
    with pipeline(model, backend_config=config, log_level="CRITICAL") as pipe:
        whole = pipe("abc", gen_config=GenerationConfig(max_new_tokens=5), do_preprocess=False)
        assert (whole.text, whole.finish_reason, whole.input_token_len) == ("abc", "stop", 3)
        assert len(gpu.prefills) == 1
        limited, sampled = pipe(
            ["abcd", "xyz"],
            gen_config=[GenerationConfig(max_new_tokens=2), GenerationConfig(do_sample=True, top_k=3, temperature=0.5)],
            do_preprocess=False,
        )
        assert (limited.text, limited.finish_reason) == ("ab", "length")
        assert sampled.text == "xyz"
        assert gpu.prefills[-1] != gpu.prefills[0]
        parts = list(pipe.stream_infer(["abc", "xy"], do_preprocess=False))
        texts = ["".join(part.text for part in parts if part.index == place) for place in range(2)]
        assert texts == ["abc", "xy"]
        too_long, empty = pipe(["a" * 300, ""], do_preprocess=False)
        assert (too_long.error_code, empty.error_code) == ("context_length_exceeded", "invalid_request")


def test_lmdeploys_own_configs_and_templates(gpu: Cues, model: str) -> None:
    """LMDeploy's own config objects and a chat template of ours reach it."""
    own = lmdeploy.PytorchEngineConfig(session_len=256, max_batch_size=4, thread_safe=True)
    template = ChatTemplateConfig("base", user="[", eoh="]")
    with pipeline(model, own, template, log_level="CRITICAL") as pipe:
        assert pipe("abc", gen_config=lmdeploy.GenerationConfig(max_new_tokens=9)).text == "[abc]"
        assert pipe("abc", gen_config=GenerationConfig(logprobs=1), do_preprocess=False).logprobs
