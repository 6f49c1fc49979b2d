"""What an answer is taken apart into, for each form in which models call functions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from lmbridge import Delta, GenerationConfig, InvalidRequestError, ToolCall
from lmbridge.engines.dialect import Dialect, read_apart
from lmbridge.engines.dialect.telling import told, told_by_user, written_out
from lmbridge.engines.lmdeploy.sampling import sampling_fields
from lmbridge.messages import FinishReason, join_deltas
from tests.engines.conftest import TEMPLATE, byte_level_tokenizer
from tests.engines.dialect.templates import FORMS, THINKING, TOOL, template

TOOLS = GenerationConfig(tools=[TOOL])
THOUGHTS = GenerationConfig(separate_reasoning=True)
FIRST, SECOND = {"city": 'a "b" }', "floor": 2}, {"city": "Rome"}


def dialect(chat_template: str | None) -> Dialect:
    return Dialect(byte_level_tokenizer(chat_template))


def pieces(text: str, length: int) -> Iterator[str]:
    for start in range(0, len(text), length):
        yield text[start : start + length]


def read(
    dialect: Dialect, text: str, config: GenerationConfig = TOOLS, *, prompt: str = "<assistant>", length: int = 1
) -> list[Delta]:
    """The deltas of an answer that comes in pieces, read by the dialect."""
    reader = dialect.reader(config, byte_level_tokenizer().encode(prompt))
    deltas = [Delta(piece) for piece in pieces(text, length)] + [Delta(finish_reason="stop")]
    for delta in deltas:
        read_apart(reader, delta)
    return deltas


def whole(*args: Any, **kwargs: Any) -> Delta:
    return join_deltas(read(*args, **kwargs))


@pytest.mark.parametrize("length", [1, 3, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read_in_the_form_that_the_template_writes(form: str, length: int) -> None:
    """A model's calls would be shown to the user as text, or be cut wherever a piece of them ends."""
    answer = whole(dialect(FORMS[form].template), FORMS[form].answer, length=length)
    assert answer.text == FORMS[form].said
    assert [(call.index, call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [
        (0, "look", FIRST),
        (1, "look", SECOND),
    ]
    assert len({call.id for call in answer.tool_calls} - {""}) == 2
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_without_calls_is_text(form: str) -> None:
    """A word of the answer would be lost because calls were looked for."""
    said = 'No. <tool and [TOOL are <｜tool; {"name": "Bob"} is \n\n none\n.'  # noqa: RUF001
    answer = whole(dialect(FORMS[form].template), said)
    assert (answer.text, list(answer.tool_calls), answer.finish_reason) == (said, [], "stop")


@pytest.mark.parametrize("form", ["hermes", "llama"])
def test_arguments_come_as_they_are_written(form: str) -> None:
    """Who shows a long argument as it grows, a file say, would see nothing until it is whole."""
    deltas = read(dialect(FORMS[form].template), FORMS[form].answer)
    first = [call for delta in deltas for call in delta.tool_calls if call.index == 0]
    assert (first[0].name, first[0].arguments) == ("look", "")
    assert all(not call.name and not call.id and call.arguments for call in first[1:])
    assert len(first) > 20


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("<tool_call>\nlook!\n</tool_call> Well.", "<tool_call>look!</tool_call> Well."),
        ('<tool_call>{"city": "Rome"}</tool_call>', '<tool_call>{"city": "Rome"}</tool_call>'),
        ('<tool_call>["look"]</tool_call>', '<tool_call>["look"]</tool_call>'),
        ('<tool_call>{"name": "look", "arguments": "in"}</tool_call>',) * 2,
        ("a <tool_call>", "a<tool_call>"),
        ('<tool_call>{"name": "lo',) * 2,
        (f"<tool_call>{'[' * 100_000}</tool_call>",) * 2,
    ],
    ids=["text", "no name", "list", "text for arguments", "nothing", "cut", "deep"],
)
def test_what_is_no_call_is_shown(answer: str, shown: str) -> None:
    """What a model wrote would be lost, or fail the request."""
    read = whole(dialect(FORMS["hermes"].template), answer, length=1000)
    assert (list(read.tool_calls), read.finish_reason) == ([], "stop")
    assert read.text.replace("\n", "") == shown.replace("\n", "")


def test_json_is_an_answer_where_calls_are_json_too() -> None:
    """Who asked such a model for JSON would be told of a call that it has not made."""
    said = '{"name": "Bob", "age": 3}'
    assert whole(dialect(FORMS["llama"].template), said).text == said


def test_a_call_that_is_cut_off_is_told_as_far_as_it_came() -> None:
    """A caller would not know why there is no answer."""
    read = whole(dialect(FORMS["hermes"].template), '<tool_call>\n{"name": "look", "arguments": {"city": "Ro')
    assert [(call.name, call.arguments) for call in read.tool_calls] == [("look", '{"city": "Ro')]
    with pytest.raises(ValueError, match="Unterminated"):
        read.tool_calls[0].parsed()


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_call_that_was_cut_off_is_none_that_was_made(reason: FinishReason) -> None:
    """A stop word in the midst of a call, and a function would be called without the argument that restricts it."""
    for form, said in (
        ("hermes", '<tool_call>\n{"name": "look", "arguments": {"city": "Ro'),
        ("qwen-xml", "<tool_call>\n<function=look>\n<parameter=city>\nRome\n</parameter>\n<parameter=floor>\n2"),
        ("mistral", '[TOOL_CALLS]look[ARGS]{"city": "Ro'),
    ):
        reader = dialect(FORMS[form].template).reader(TOOLS, [])
        delta = Delta(said, finish_reason=reason)
        read_apart(reader, delta)
        assert delta.finish_reason == reason
        if form != "hermes":  # its arguments are told as they come
            assert (delta.text.replace("\n", ""), delta.tool_calls) == (said.replace("\n", ""), ())


@pytest.mark.parametrize("form", [*FORMS, "thoughts"])
@pytest.mark.parametrize("said", [" " * 16, "\n", "<parameter=x>", '"', "{", "<tool_call>", "[TOOL_CALLS]a"])
def test_no_text_takes_long_to_read(form: str, said: str) -> None:
    """A model that repeats itself would hold everybody's loop for seconds; here, the test would not end in time."""
    of_form = dialect(THINKING if form == "thoughts" else FORMS[form].template)
    text = ("<tool_call>\n<function=look>" if form == "qwen-xml" else "") + said * (8_000 // len(said))
    whole(of_form, text, THOUGHTS if form == "thoughts" else TOOLS, length=len(said))
    whole(of_form, text, THOUGHTS if form == "thoughts" else TOOLS, length=100_000)


def test_ids_are_such_as_the_template_takes() -> None:
    """The next turn would be refused: Mistral's templates take ids of nine characters only."""
    for form, length in (("mistral", 9), ("mistral-list", 9), ("hermes", 29)):
        call = whole(dialect(FORMS[form].template), FORMS[form].answer).tool_calls[0]
        assert len(call.id) == length
        assert call.id.replace("_", "").isalnum()


def test_calls_that_must_come_are_a_schema_for_lmdeploy() -> None:
    """LMDeploy follows no grammar of calls; a call would be prose, or be refused."""
    dialect = Dialect(byte_level_tokenizer(), spells=False)
    config = GenerationConfig(tools=[TOOL], tool_choice="required")
    form = dialect.form(config)
    format = sampling_fields(config, [], form)["response_format"]
    call = {"name": "look", "parameters": {"city": "Rome"}}
    jsonschema.validate(call, format["json_schema"]["schema"])
    delta = Delta(json.dumps(call), finish_reason="stop")
    read_apart(dialect.reader(config, []), delta)
    assert "".join(call.name + call.arguments for call in delta.tool_calls) == 'look{"city": "Rome"}'


# --- thoughts ---


@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize(("prompt", "begin"), [("<assistant><think>\n", ""), ("<assistant>", "<think>\n")])
def test_thoughts_are_told_apart(prompt: str, begin: str, length: int) -> None:
    """What a model thinks would be taken for its answer, whether the template or the model opens it."""
    answer = whole(
        dialect(THINKING), begin + "Hm?\n\nYes.\n</think>\n\nIt is 4.", THOUGHTS, prompt=prompt, length=length
    )
    assert (answer.reasoning, answer.text) == ("Hm?\n\nYes.", "It is 4.")


def test_calls_are_not_looked_for_in_thoughts() -> None:
    """A model that thinks about calling would call."""
    said = '<think>I might <tool_call>{"name": "look", "arguments": {}}</tool_call></think>No.'
    answer = whole(dialect(THINKING), said)
    assert (answer.text, list(answer.tool_calls)) == ("No.", [])
    assert "<tool_call>" in answer.reasoning


def test_a_model_that_does_not_think_is_not_read() -> None:
    """Each answer of every chat over HTTP would cost the search for marks that never come."""
    assert not dialect(TEMPLATE).reads(THOUGHTS)
    assert dialect(THINKING).reads(THOUGHTS)
    assert not dialect(THINKING).reads(GenerationConfig())


# --- a tokenizer that brings its own parser ---

OWN = {
    "start_anchor": "<assistant>",
    "fields": {
        "thinking": {"open": "<mull>", "close": "</mull>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<run (?P<name>\w+)>",
            "close": "</run>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}


def own() -> Dialect:
    tokenizer = byte_level_tokenizer(template("{{ m.tool_calls[0].function.name }}"))
    tokenizer.response_template = OWN
    return Dialect(tokenizer)


def test_the_tokenizers_own_parser_goes_first() -> None:
    """A model in a form of its own would have its calls shown as text, though its author says how to read them."""
    answer = whole(own(), 'mm</mull>So: <run look>{"city": "Rome"}</run>', prompt="<user>x<assistant><mull>")
    assert (answer.reasoning, answer.text) == ("mm", "So: ")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("look", '{"city": "Rome"}')]


@pytest.mark.parametrize("length", [1, 1000])
def test_what_it_cannot_read_is_shown(length: int) -> None:
    """A slip of the model's would fail the request, or all that comes after it would be lost."""
    answer = whole(own(), "So: <run look>{oops}</run> and more", length=length)
    assert answer.text == "So: {oops} and more"
    assert not answer.tool_calls


# --- models that know no tools ---


def test_whether_a_template_knows_tools() -> None:
    """A model would be asked to choose among tools that it was never told of."""
    assert dialect(FORMS["hermes"].template).knows_tools
    ignorant = dialect(TEMPLATE)
    with pytest.raises(InvalidRequestError, match="does not support tools") as caught:
        ignorant.refuse_unknown_tools(TOOLS)
    assert caught.value.param == "tools"
    ignorant.refuse_unknown_tools(GenerationConfig(tools=[TOOL], tool_choice="required"))
    ignorant.refuse_unknown_tools(GenerationConfig(tools=[TOOL], tool_choice="none"))
    assert not dialect(None).knows_tools


def test_tools_are_described_in_a_message() -> None:
    """A model that has to call would not know what its functions are for."""
    question = {"role": "user", "content": "Rain?"}
    system, asked = told([question], [TOOL])
    assert system["role"] == "system"
    assert "Look out of a window." in system["content"]
    assert asked == question
    merged, _ = told([{"role": "system", "content": "Be brief."}, question], [TOOL])
    assert merged["content"].startswith("Be brief.\n\n")
    assert "Look out" in merged["content"]
    (only,) = told_by_user([system, asked])
    assert only["role"] == "user"
    assert only["content"].endswith("\n\nRain?")


def test_calls_and_results_are_written_out() -> None:
    """A template that knows none would leave them out, so that the model asks again for ever."""
    call = ToolCall(0, "1", "look", '{"city": "Rome"}').message()
    messages: list[Any] = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "2"}]},
        {"role": "tool", "tool_call_id": "1", "content": "dry"},
        {"role": "tool", "tool_call_id": "2", "content": "wet"},
        {"role": "assistant", "content": "Both."},
    ]
    asked, calls, results, last = written_out(messages)
    assert calls["content"].count('{"name": "look", "arguments": {"city": "Rome"}}') == 2
    assert (results["role"], results["content"]) == (
        "user", "The result of look is:\ndry\n\nThe result of look is:\nwet",
    )  # fmt: skip
    assert (asked, last) == (messages[0], messages[-1])
