"""What LMDeploy's configs and keywords ask of other engines, and what stands in for the names that are not here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Bridge, InvalidRequestError, MissingDependencyError
from lmbridge.compat.lmdeploy import GenerationConfig, Pipeline, Tokenizer, keywords, pipeline, version_info, vl
from lmbridge.compat.lmdeploy.messages import ResponseType
from lmbridge.testing import ScriptedEngine
from tests.engines.conftest import byte_level_tokenizer, save_model

TEMPLATE = (
    "{{ reasoning_effort or '' }}{{ '' if enable_thinking is not defined else enable_thinking }}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    saved = save_model(folder)
    byte_level_tokenizer(TEMPLATE).save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def pipe(model: str) -> Iterator[Pipeline]:
    with pipeline(model, backend="transformers") as built:
        yield built


def length(pipe: Pipeline, **more: Any) -> int:
    """The tokens of a prompt, one for each byte, as its template has made it."""
    response = pipe("abc", gen_config=GenerationConfig(max_new_tokens=1), **more)
    assert response.finish_reason != "error", response.error_message
    assert isinstance(response.input_token_len, int)
    return response.input_token_len


def test_template_arguments_reach_the_template(pipe: Pipeline) -> None:
    """A model would think although it was told not to, or the call be refused that LMDeploy takes."""
    assert length(pipe) == 3
    assert length(pipe, enable_thinking=False) == 3 + len("False")
    assert length(pipe, chat_template_kwargs={"enable_thinking": True}, enable_thinking=False) == 3 + len("True")
    assert length(pipe, reasoning_effort="low") == 3 + len("low")
    assert length(pipe, reasoning_effort="low", do_preprocess=False) == 3


def test_what_lmdeploy_ignores_is_ignored_and_said_once(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that runs on LMDeploy would end here; or a mistyped argument go without a word, or a word for each call."""
    monkeypatch.setattr(keywords, "_told", set())
    with caplog.at_level(logging.WARNING, "lmbridge.compat.lmdeploy"):
        for _ in range(3):
            length(pipe, max_new_tokens=30, session_ids=[1], sequence_start=True, multiplex=True)
    assert [record.args for record in caplog.records] == [()] * 2
    assert [name in caplog.text for name in ("max_new_tokens", "session_ids", "sequence_start")] == [True, True, False]
    with pipeline(ScriptedEngine, max_log_len=10, model_name="x", vision_config=object()) as other:
        assert other("a").text == "a"
    assert "model_name" in caplog.text


def test_fields_that_every_engine_honours(pipe: Pipeline) -> None:
    """An answer would be shorter, of another form, or without its stop word, in spite of its config."""
    free = pipe("abc", gen_config=GenerationConfig(max_new_tokens=12, ignore_eos=True), do_preprocess=False)
    stop = free.text[2]
    stopping: dict[str, Any] = {"max_new_tokens": 12, "stop_words": [stop]}
    kept = pipe("abc", gen_config=GenerationConfig(include_stop_str_in_output=True, **stopping), do_preprocess=False)
    assert kept.text.endswith(stop)
    later = pipe("abc", gen_config=GenerationConfig(min_new_tokens=8, **stopping), do_preprocess=False)
    assert later.generate_token_len >= 8 > kept.generate_token_len
    more_than_most = GenerationConfig(min_new_tokens=99, max_new_tokens=2)  # LMDeploy takes it for none
    assert pipe("abc", gen_config=more_than_most).finish_reason == "length"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}, "7"),
        ({"type": "json_schema", "json_schema": {"const": 7}}, "7"),
        ({"type": "regex_schema", "regex_schema": "[0-9]-[0-9]"}, "-"),
    ],
)
def test_forms_of_answers(pipe: Pipeline, asked: dict[str, Any], expected: str) -> None:
    """LMDeploy's own ways to write a form would be refused, or have no effect."""
    response = pipe("abc", gen_config=GenerationConfig(response_format=asked))
    assert expected in response.text
    assert response.finish_reason == "stop"


def test_bad_words(pipe: Pipeline) -> None:
    """A word would come that must not; or one of several tokens be let through without a word about it."""
    free = pipe("abc", gen_config=GenerationConfig(max_new_tokens=6), do_preprocess=False)
    config = GenerationConfig(max_new_tokens=6, bad_words=[free.text[0]], bad_token_ids=[free.token_ids[1]])
    other = pipe("abc", gen_config=config, do_preprocess=False)
    assert free.text[0] not in other.text
    assert free.token_ids[1] not in other.token_ids
    refused, answered = pipe(["abc"] * 2, gen_config=[GenerationConfig(bad_words=["ab"]), config])
    assert (refused.error_code, answered.finish_reason) == ("unsupported_feature", "length")
    assert "single token" in str(refused.error_message)


def test_get_ppl(pipe: Pipeline, model: str) -> None:
    """The scores would be others than those of the model's own probabilities."""
    prompts = [[1, 2, 3, 4], [9, 8]]
    with Bridge(model, engine="transformers") as bridge:
        told = bridge.infer(prompts, max_new_tokens=1, prompt_logprobs=0)
    expected = [
        -sum(next(iter(entry.values())) for entry in response.prompt_logprobs or () if entry)
        / (len(response.prompt_logprobs or ()) - 1)
        for response in told
    ]
    assert pipe.get_ppl(prompts) == pytest.approx(expected)
    assert pipe.get_ppl(prompts[0]) == pytest.approx(expected[:1])
    for wrong in ([1], [], [[1, 2], [3]], "abc"):
        with pytest.raises(AssertionError):
            pipe.get_ppl(wrong)


def test_the_prompts_length_is_told_from_the_first_part_on(pipe: Pipeline) -> None:
    """Whoever counts tokens as they come, or stops early, would count none of the prompt."""
    parts = list(pipe.stream_infer("abc", gen_config=GenerationConfig(max_new_tokens=4), do_preprocess=False))
    assert {part.input_token_len for part in parts} == {3}


def test_a_stream_goes_on(pipe: Pipeline) -> None:
    """A reader that looks at the first part, and reads the rest in a loop, would find nothing there."""
    config = GenerationConfig(max_new_tokens=6)
    whole = pipe("abc", gen_config=config)
    stream = pipe.stream_infer("abc", gen_config=config)
    text = ""
    for _ in range(2):
        for part in stream:
            text += part.text
            break
    assert text + "".join(part.text for part in stream) == whole.text
    assert list(stream) == []


def test_sessions_by_number() -> None:
    """LMDeploy's callers that name sessions by numbers could not; two at once in one session would be let through."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe:
        stream = pipe.stream_infer(["a", "b"], [3, None])
        with pytest.raises(InvalidRequestError, match="Session 3 has a request running"):
            pipe.stream_infer("c", 3)
        engine.wait_for(lambda e: e.active == 2)
        stream.close()
        numbers = [pipe.session().session_id for _ in range(3)]
        assert numbers == [0, 1, 2]
        held = pipe.session()
        pipe.stream_infer("d", held.session_id).close()


@pytest.mark.parametrize("name", ["async_engine", "generate", "session_mgr"])
def test_what_is_not_here_names_what_is(name: str) -> None:
    """The user would read that there is no such attribute, and have to find out what to use."""
    with pipeline(ScriptedEngine) as pipe:
        with pytest.raises(AttributeError, match=r"only in LMDeploy; instead: .*pipe\."):
            getattr(pipe, name)
        with pytest.raises(AttributeError, match="no attribute 'no_such'"):
            _ = pipe.no_such


def test_names_beside_the_pipeline(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import line that takes more than the pipeline would fail."""
    tokenizer = Tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.indexes_containing_token("h") == tokenizer.encode("h")
    assert (tokenizer.eos_token_id, tokenizer.vocab_size, len(tokenizer.get_vocab())) == (256, 257, 257)
    assert tokenizer(["h"])["input_ids"] == [tokenizer.encode("h")]
    assert (version_info, ResponseType.FINISH.name) == ((0, 18, 0), "FINISH")
    monkeypatch.setitem(sys.modules, "lmdeploy", None)
    monkeypatch.delitem(sys.modules, "lmdeploy.vl", raising=False)
    with pytest.raises(MissingDependencyError, match=r"load_image .*pip install(.|\n)*Image\.open"):
        _ = vl.load_image
    with pytest.raises(AttributeError):
        _ = vl.no_such
