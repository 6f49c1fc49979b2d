"""JSON bodies made into calls."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmbridge import GenerationConfig, InvalidRequestError
from lmbridge.errors import EngineStartError, PromptTooLongError, UnsupportedOptionError
from lmbridge.flask.openai.fields import parse_object
from lmbridge.flask.openai.reading import Call, read_chat, read_completion
from lmbridge.flask.openai.sampling import WHAT_FITS, in_clients_words
from lmbridge.flask.openai.table import CHAT, COMPLETIONS, MAX_CHOICES

ALL = frozenset(GenerationConfig().__dict__)
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> Call:
    return read_chat({"messages": HELLO, **fields}, ALL)


def completion(**fields: Any) -> Call:
    return read_completion({"prompt": "Hello", **fields}, ALL)


def refused(read: Any, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        read(**fields)
    return caught.value


# --- the body ---


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"12",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"a": "\\ud800"}',
        b'{"\\uDFFF": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\x00"}',
        "{}".encode("utf-16"),
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_object_of_json_is_refused(raw: bytes) -> None:
    """Whatever is wrong with a body is said, and is the client's fault."""
    with pytest.raises(InvalidRequestError, match="body"):
        parse_object(raw)


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_break_the_parser(raw: bytes) -> None:
    """Any bytes are an object or refused."""
    with contextlib.suppress(InvalidRequestError):
        assert isinstance(parse_object(raw), dict)


def test_whole_surrogate_pairs_are_text() -> None:
    """JSON may escape a character beyond the first plane as a pair."""
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


# --- sampling ---


def test_fields_reach_the_engine_by_its_names() -> None:
    """Each of OpenAI's fields and of the known extensions ends in the field of GenerationConfig that means it."""
    config = chat(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, seed=3, stop=["a", "b"],
        stop_token_ids=[4], ignore_eos=True, skip_special_tokens=False, logprobs=True, top_logprobs=2,
        frequency_penalty=-1.5, presence_penalty=2, logit_bias={"7": -100, "0": 0.5}, min_tokens=3,
        include_stop_str_in_output=True, truncate_prompt_tokens=8, return_token_ids=True, reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False}, add_generation_prompt=False, continue_final_message=True,
    ).config  # fmt: skip
    assert config == GenerationConfig(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, random_seed=3,
        stop_words=["a", "b"], stop_token_ids=[4], ignore_eos=True, skip_special_tokens=False, logprobs=2,
        frequency_penalty=-1.5, presence_penalty=2, logit_bias={7: -100, 0: 0.5}, min_new_tokens=3,
        include_stop_str_in_output=True, truncate_prompt_tokens=8, return_prompt_token_ids=True,
        chat_template_kwargs={"enable_thinking": False, "reasoning_effort": "low"}, add_generation_prompt=False,
        continue_final_message=True, separate_reasoning=True,
    )  # fmt: skip


def test_defaults_are_openais() -> None:
    """Nothing given: temperature 1; a chat goes on while it fits, a completion for 16 tokens."""
    assert chat().config == GenerationConfig(max_new_tokens=WHAT_FITS, temperature=1.0, separate_reasoning=True)
    assert completion().config == GenerationConfig(max_new_tokens=16, temperature=1.0)


def test_the_default_temperature_is_no_demand() -> None:
    """An engine that knows no temperature answers a client who did not ask for one."""
    assert read_chat({"messages": HELLO}, frozenset({"max_new_tokens"})).config.temperature is None


def test_values_that_ask_for_nothing_are_none() -> None:
    """Clients that send every field with its neutral value are served by engines that honour none of them."""
    neutral = {
        "temperature": None, "top_p": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop": [],
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "logprobs": False, "tools": [],
        "response_format": {"type": "text"}, "seed": None, "modalities": ["text"], "user": "u", "best_of": None,
        "min_tokens": 0, "include_stop_str_in_output": False, "add_generation_prompt": True, "tool_choice": "auto",
        "parallel_tool_calls": False, "include_reasoning": True,
        "continue_final_message": False, "chat_template_kwargs": {}, "ignore_eos": False, "skip_special_tokens": True,
        "return_token_ids": False, "spaces_between_special_tokens": True, "truncation_side": "left", "echo": False,
        "thinking_token_budget": -1, "add_special_tokens": False, "length_penalty": 1.0, "use_beam_search": False,
    }  # fmt: skip
    assert read_chat({"messages": HELLO, **neutral}, frozenset({"max_new_tokens"})).config.given() == ["max_new_tokens"]


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (1e-300, 0), (1e-6, 0), (0.001, 0.001), (2, 2)])
def test_temperatures_too_small_to_divide_by_are_greedy(given: float, expected: float) -> None:
    """Scores divided by a tiny temperature would overflow."""
    assert chat(temperature=given).config.temperature == expected


def test_the_newer_limit_wins() -> None:
    """Both token limits are known; where they differ, the one that replaced the other counts."""
    assert completion(max_tokens=5).config.max_new_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=6).config.max_new_tokens == 6


def test_negative_seeds_are_seeds() -> None:
    """OpenAI's seed is any 64-bit integer."""
    assert chat(seed=-1).config.random_seed != chat(seed=-2).config.random_seed


TOOL = {"type": "function", "function": {"name": "f"}}
IMPOSSIBLE: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, "9", True, 10**30, [], {}],
    "max_completion_tokens": [0, "x"],
    "temperature": [-0.1, 2.1, "hot", True, [1], 1e999],
    "top_p": [-0.1, 1.1, "x", False],
    "top_k": [-2, 0.5, 2**40],
    "min_p": [-1, 2],
    "repetition_penalty": [0, -1, 1e-300, 1e300],
    "seed": [1.5, "x", True, 2**63, -(2**63) - 1, 10**100],
    "stop": ["", [""], 1, {}, ["x"] * 100, "x" * 2000, [None], [["x"]]],
    "stop_token_ids": ["x", [-1], [1.5], [2**31], list(range(1000)), [True]],
    "ignore_eos": [1, "yes"],
    "skip_special_tokens": [0],
    "n": [0, -1, 1.5, "2", MAX_CHOICES + 1, 10**20, True],
    "stream": [1, "true", []],
    "user": [1, {}],
    "frequency_penalty": [2.1, "x", True],
    "presence_penalty": [-2.1],
    "logit_bias": [
        {"50256": -101},
        "x",
        {"a": 1},
        {"-1": 1},
        {"2147483648": 1},
        {"1": True},
        {"1.0": 1},
        {"²": 1},
        [[1, 2]],
    ],
    "min_tokens": [-1, 0.5, True, 2**31],
    "include_stop_str_in_output": [1],
    "truncate_prompt_tokens": [0, -1, 1.5],
    "return_token_ids": ["yes"],
    "return_tokens_as_token_ids": [1],
    "best_of": [2],
    "suffix": ["x"],
    "prompt_logprobs": [1],
    "add_special_tokens": [1],
    "spaces_between_special_tokens": [False, 1],
    "truncation_side": ["right"],
    "enable_thinking": [True],
    "tool_choice": ["sometimes", {"type": "function"}, {"type": "custom", "custom": {"name": "f"}}],
    "response_format": [{"type": "xml"}, {"type": "json_schema", "json_schema": {}}, "text", {}],
    "tools": [[{"type": "function", "function": {}}], "x", [TOOL] * 129],
    "functions": [[{}]],
    "function_call": ["f", {"name": "f"}],
    "modalities": [["text", "audio"]],
    "guided_json": ["no JSON", 3],
    "guided_choice": [[], "x", [1]],
    "guided_regex": [3, ""],
    "structured_outputs": [{}, {"json": {}, "regex": "a"}, {"structural_tag": "x", "regex": "a"}, "a"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
@pytest.mark.parametrize("read", [chat, completion])
def test_impossible_values_are_named(read: Any, name: str, value: Any) -> None:
    """An impossible value is refused by the name the client gave it, never by the engine's."""
    error = refused(read, **{name: value})
    assert error.param == name
    assert name in str(error)


@pytest.mark.parametrize("name", ["continue_final_message", "add_generation_prompt", "top_logprobs"])
def test_what_only_chats_have(name: str) -> None:
    """A completion has no template and no last message: a field about them cannot be honoured there."""
    assert refused(completion, **{name: True}).param == name


def test_what_contradicts_itself() -> None:
    """Fields that exclude each other are refused by the client's names for them."""
    assert refused(chat, continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"
    error = refused(chat, min_tokens=6, max_tokens=5)
    assert (error.param, str(error)) == ("min_tokens", "min_tokens must be at most max_tokens, which is 5, not 6.")
    assert refused(completion, min_tokens=17).param == "min_tokens"
    assert refused(chat, chat_template_kwargs={"tokenize": True}).param == "chat_template_kwargs"
    assert refused(chat, echo=True).param == "echo"


def test_whole_numbers_may_have_a_point() -> None:
    """JSON has one kind of number, and some clients write 20.0 where they mean 20."""
    whole = chat(max_tokens=20.0, n=2.0, top_k=5.0, seed=7.0, stop_token_ids=[4.0], min_tokens=2.0)
    assert whole.n == 2
    same = chat(max_tokens=20, n=2, top_k=5, seed=7, stop_token_ids=[4], min_tokens=2)
    assert repr(whole.config) == repr(same.config)  # 20.0 equals 20, but no engine should be handed it
    assert json.dumps(completion(prompt=[[1.0, 2], [3]]).prompts) == "[[1, 2], [3]]"
    assert json.dumps(completion(prompt=[1.0, 2]).prompts) == "[[1, 2]]"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": []},
        {"parallel_tool_calls": False},
        {"functions": [{}], "function_call": "none"},
    ],
)
def test_tools_that_must_not_be_used_are_no_demand(fields: dict[str, Any]) -> None:
    """An engine without tools serves clients that forbid their use, or say how to call what is not there."""
    config = read_chat({"messages": HELLO, **fields}, frozenset({"max_new_tokens"})).config
    assert config.given() == ["max_new_tokens"]


@pytest.mark.parametrize(
    ("choice", "names", "required"),
    [
        (None, ["f", "g"], False),
        ("auto", ["f", "g"], False),
        ("required", ["f", "g"], True),
        ({"type": "function", "function": {"name": "g"}}, ["g"], True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}}, ["f"], False),
    ],
)
def test_tools(choice: Any, names: list[str], required: bool) -> None:
    """What may be called, and what must, reaches the engine as the client said it."""
    second = {"type": "function", "function": {"name": "g", "strict": True}}
    calling = chat(tools=[TOOL, second], tool_choice=choice, parallel_tool_calls=False).config.calling
    assert calling is not None
    assert [tool["function"]["name"] for tool in calling.tools] == names
    assert (calling.required, calling.parallel) == (required, False)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [TOOL, {"type": "custom", "custom": {"name": "f"}}]}, "tools[1].type", r"tools\[1\].type.*custom"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type", "null"),
        ({"tools": ["f"]}, "tools[0]", "object"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", r"tools\[0\].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools", r"tools\[1\]"),
        ({"tool_choice": "required"}, "tools", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice", "'h'"),
        ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos", "calls"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "tool_choice"),
    ],
)
def test_malformed_tools(fields: dict[str, Any], param: str, words: str) -> None:
    """The place of the fault is in the message, and a kind of tool that would run elsewhere is refused by its name."""
    error = refused(chat, **fields)
    assert error.param == param
    assert re.search(words, str(error))


def test_reasoning_is_asked_for_where_it_can_be_told_apart() -> None:
    """Chats ask for it unless the engine cannot; who must not see it is refused where it would be in the text."""
    able = frozenset({"max_new_tokens"})
    assert chat().config.separate_reasoning
    assert not read_chat({"messages": HELLO}, able).config.separate_reasoning
    assert not completion().config.separate_reasoning
    hidden = read_chat({"messages": HELLO, "include_reasoning": False}, able)
    assert (hidden.reasoning, hidden.config.separate_reasoning) == (False, True)


@pytest.mark.parametrize("option", ["temperature", "separate_reasoning"])
def test_what_nobody_asked_for_is_nobodys_fault(option: str) -> None:
    """What is set by default and the engine turns out not to know is told as a fault of the moment."""
    error = in_clients_words(UnsupportedOptionError("…", option), chat().fields, "messages")
    assert isinstance(error, EngineStartError)


def test_a_fields_range_is_told_in_the_clients_words() -> None:
    """What only the engine can see, such as an id beyond its vocabulary, is told by the client's name too."""
    error = in_clients_words(InvalidRequestError("…", "min_new_tokens"), chat(min_tokens=3).fields, "messages")
    assert isinstance(error, InvalidRequestError)
    assert error.param == "min_tokens"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*CHAT, *COMPLETIONS, "prompt", "stream_options", "x"})


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([read_chat, read_completion]))
@example({"messages": HELLO, "stream_options": {"include_usage": 1}, "stream": True}, read_chat)
def test_any_values_are_a_call_or_refused(values: dict[str, Any], read: Any) -> None:
    """No mixture of fields raises anything but the one error, and what passes is a config that the core takes."""
    try:
        call = read({"messages": HELLO, "prompt": "x", **values}, ALL)
    except InvalidRequestError as error:
        json.dumps([str(error), error.param]).encode()
    else:
        call.config.check()
        assert 1 <= len(call.choices) == len(call.configs) <= MAX_CHOICES


# --- choices ---


def test_choices_are_in_the_order_of_the_prompts() -> None:
    """Two answers to each of two prompts: the first prompt's stand first."""
    call = completion(prompt=["a", "b"], n=2)
    assert call.choices == ["a", "a", "b", "b"]


def test_choices_of_a_seed_differ() -> None:
    """A seed makes answers repeatable, not all the same: each of a prompt's answers has one of its own."""
    call = completion(prompt=["a", "b"], n=2, seed=5)
    assert [config.random_seed for config in call.configs] == [5, 6, 5, 6]


def test_too_many_choices_in_all() -> None:
    """Many prompts with many answers each are bounded together."""
    assert refused(completion, prompt=["x"] * 65, n=2).param == "n"
    assert refused(completion, prompt=["x"] * (MAX_CHOICES + 1)).param == "prompt"


@pytest.mark.parametrize("prompt", ["a text", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts_of_completions(prompt: Any) -> None:
    """The four forms of a prompt; texts go to the model as they are."""
    call = completion(prompt=prompt)
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    assert call.prompts == ([prompt] if single else prompt)
    assert call.raw == isinstance(call.prompts[0], str)


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], ["a", 1], [1, "a"], [[1], "a"], [-1], [True], 5, {}, [1.5]]
)
def test_malformed_prompts(prompt: Any) -> None:
    """What is no prompt is refused by its name."""
    assert refused(completion, prompt=prompt).param == "prompt"


def test_what_completions_cannot_do() -> None:
    """Insertion and ranking would be wrong answers if they were left out."""
    assert refused(completion, suffix="x").param == "suffix"
    assert refused(completion, best_of=3).param == "best_of"
    assert completion(suffix="", best_of=2, n=2, echo=True).echo


def test_echo() -> None:
    """With log-probabilities the prompt's are asked for, and with no token to make one is made that nobody gets."""
    plain, scored = completion(echo=True), completion(echo=True, logprobs=3)
    assert (plain.echo, plain.config.prompt_logprobs) == (True, None)
    assert (scored.config.logprobs, scored.config.prompt_logprobs, scored.config.ignore_eos) == (3, 3, False)
    alone = completion(echo=True, logprobs=3, max_tokens=0)
    assert (alone.silent, alone.config.max_new_tokens, alone.config.prompt_logprobs) == (True, 1, 3)
    assert alone.config.logprobs is None
    assert completion(echo=True, logprobs=0, max_tokens=1).config.ignore_eos
    assert refused(completion, max_tokens=0).param == "max_tokens"
    assert refused(chat, max_tokens=0).param == "max_tokens"
    assert refused(completion, echo=True, truncate_prompt_tokens=5).param == "echo"


def test_logprobs_of_both_forms() -> None:
    """A chat says whether and then how many; a completion says how many."""
    assert chat(logprobs=True).config.logprobs == 0
    assert completion(logprobs=5).config.logprobs == 5
    assert chat(logprobs=False, top_logprobs=0).config.logprobs is None
    assert refused(chat, top_logprobs=2).param == "top_logprobs"
    assert refused(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused(chat, logprobs=1).param == "logprobs"
    assert refused(completion, logprobs=True).param == "logprobs"


def test_stream_options() -> None:
    """include_usage is for streams, and a flag."""
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={"unknown": 1}).include_usage
    assert refused(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(chat, stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"


# --- conversations ---


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def calling(*calls: Any, role: str = "assistant") -> list[Any]:
    return [*HELLO, {"role": role, "content": None if role == "assistant" else "x", "tool_calls": list(calls)}]


def test_messages_become_one_text_each() -> None:
    """Lists of text parts are joined, the developer is the system, and what a template may look at is kept."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "extra": 1},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [{**CALL, "index": 0}]},
        {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "4", "tool_calls": None, "reasoning": "So."},
        {"role": "assistant", "refusal": "No.", "tool_calls": [], "reasoning_content": ""},
    ]
    assert read_chat({"messages": messages}, ALL).prompts == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "4", "reasoning_content": "So."},
            {"role": "assistant", "content": "No."},
        ]
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hello", "messages"),
        (["Hello"], "messages[0]"),
        ([*HELLO, {"content": "x"}], "messages[1].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        *(
            ([{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}], "messages[0].content[1]")
            for part in (
                {"type": "image_url", "image_url": {"url": "x"}},
                {"type": "image_url", "image_url": {"url": "x"}, "text": "hidden"},
                {"type": "input_image", "image_url": "x"},
                {"type": "image", "image": "x"},
                {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
                {"type": "audio_url", "audio_url": {"url": "x"}},
                {"type": "video_url", "video_url": {"url": "x"}},
                {"type": "file", "file": {"file_id": "x"}},
                {"image_url": {"url": "x"}},
            )
        ),
        ([{"role": "assistant", "audio": {"id": "x"}}], "messages[0].audio"),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f"}}], "messages[0].function_call"),
        ([*HELLO, {"role": "assistant", "content": "Hi", "prefix": True}], "messages[1].prefix"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0]"),
        (calling("f"), "messages[1].tool_calls[0]"),
        (calling({**CALL, "type": "custom"}), "messages[1].tool_calls[0].type"),
        (calling(CALL, {**CALL, "id": None}), "messages[1].tool_calls[1].id"),
        (calling({"id": "1"}), "messages[1].tool_calls[0].function"),
        (calling({**CALL, "function": {"arguments": "{}"}}), "messages[1].tool_calls[0].function.name"),
        (calling({**CALL, "function": {"name": "f", "arguments": {}}}), "messages[1].tool_calls[0].function.arguments"),
        (calling(CALL, role="user"), "messages[1].tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": CALL}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "reasoning": {"x": 1}}], "messages[0].reasoning"),
        ([{"role": "tool", "content": "4"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "4", "tool_call_id": 1}], "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "1"}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": []}]}], "messages[0].content[0]"),
    ],
)
def test_malformed_messages(messages: Any, param: str) -> None:
    """The place of the fault is named; images are refused rather than left out."""
    assert refused(chat, messages=messages).param == param


# --- what the engine finds ---


@pytest.mark.parametrize(
    ("field", "given", "param"),
    [
        ("max_new_tokens", {"max_tokens": 1}, "max_tokens"),
        ("max_new_tokens", {"max_completion_tokens": 1}, "max_completion_tokens"),
        ("random_seed", {"seed": 1}, "seed"),
        ("stop_words", {"stop": "x"}, "stop"),
        ("logprobs", {"logprobs": True}, "logprobs"),
        ("logprobs", {"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
        ("top_k", {"top_k": 4}, "top_k"),
        ("min_new_tokens", {"min_tokens": 4}, "min_tokens"),
        ("return_prompt_token_ids", {"return_token_ids": True}, "return_token_ids"),
        ("chat_template_kwargs", {"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_the_engine_cannot_do_has_the_clients_name(field: str, given: dict[str, Any], param: str) -> None:
    """An engine refuses by its own names; the client hears the one it used."""
    error = in_clients_words(UnsupportedOptionError("…", field), chat(**given).fields, "messages")
    assert isinstance(error, UnsupportedOptionError)
    assert error.param == param
    assert f"does not support {param};" in str(error)


def test_a_prompt_too_long_is_the_messages_fault() -> None:
    """The engine knows a prompt; a chat's client sent messages."""
    error = in_clients_words(PromptTooLongError("…", "prompt"), chat().fields, "messages")
    assert isinstance(error, PromptTooLongError)
    assert error.param == "messages"
