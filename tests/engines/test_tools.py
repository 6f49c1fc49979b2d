"""Models that call functions: what they must call, what they may call, and a chat that runs what they call."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import functools
import gc
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import flask
import jsonschema
import pydantic
import pytest
import torch
import transformers
from typing_extensions import TypedDict

from lmbridge import (
    Bridge,
    Chat,
    GenerationConfig,
    InvalidRequestError,
    RequestTimeoutError,
    Response,
    Timings,
    ToolCall,
    Usage,
)
from lmbridge.engines.dialect.spelling import MOST_CALLS
from lmbridge.flask import LMBridge
from lmbridge.messages import join_deltas
from lmbridge.rounds import MOST_ROUNDS, Rounds
from lmbridge.signatures import bind_arguments, describe_function
from tests.engines.conftest import BYTES, EOS, byte_level_tokenizer, save_model
from tests.engines.dialect.templates import FORMS, THINKING, TOOL

NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER, "b": NUMBER},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (TOOL, ADD)}
ASKED = [{"role": "user", "content": "What is the weather?"}]
NAMED = {"type": "function", "function": {"name": "add"}}


def with_template(folder: Path, chat_template: str, *marks: str) -> str:
    """A small random model with that chat template; the marks are tokens of their own."""
    model = save_model(folder, max_position_embeddings=2048)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.save_pretrained(model)
    return model


MARKS = {"mistral-list": ["[TOOL_CALLS]"], "hermes": ["<tool_call>", "</tool_call>"]}


OFTEN = ("demo", "hermes")  # the others take a model each, and run in the long suite
EACH = [form if form in OFTEN else pytest.param(form, marks=pytest.mark.long) for form in ("demo", *FORMS)]


@pytest.fixture(scope="module", params=EACH)
def form(request: pytest.FixtureRequest) -> str:
    """The form in which a model calls; the bundled one's template knows no tools."""
    return str(request.param)


@pytest.fixture(scope="module")
def bridge(form: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    model = form
    if form != "demo":
        model = with_template(tmp_path_factory.mktemp(form), FORMS[form].template, *MARKS.get(form, ()))
    with Bridge(model, self_check=False) as bridge:
        yield bridge


def parrot(folder: Path, chat_template: str, answer: str) -> str:
    """A real model that says one thing to ASKED with TOOL, by the positions of its tokens alone."""
    tokenizer = byte_level_tokenizer(chat_template)
    prompt = tokenizer.apply_chat_template(ASKED, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    start, said = len(tokenizer.encode(prompt)), [*tokenizer.encode(answer), EOS]
    size = start + len(said)
    config = transformers.GPT2Config(
        vocab_size=264, n_positions=size, n_embd=size, n_layer=1, n_head=1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.wpe.weight.copy_(torch.eye(size))
        for place, token in enumerate(said):
            model.lm_head.weight[token, start - 1 + place] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check(calls: Any) -> list[str]:
    """The names of calls that keep to their parameters."""
    for call in calls:
        jsonschema.validate(call.parsed(), PARAMETERS[call.name])
    return [call.name for call in calls]


@pytest.mark.parametrize("seed", [1, 2])
def test_required_calls_keep_to_their_parameters(bridge: Bridge, seed: int) -> None:
    """A program that wants a call would get prose, or arguments that its function does not take."""
    response = bridge.infer(
        ASKED, tools=[TOOL, ADD], tool_choice="required", parallel_tool_calls=False, temperature=1.0, random_seed=seed,
        max_new_tokens=400,
    )  # fmt: skip
    assert response.finish_reason == "tool_calls"
    assert len(check(response.tool_calls)) == 1
    assert response.text == ""


def test_the_one_that_is_named_is_called(bridge: Bridge) -> None:
    """Another function would be called than the one that was asked for."""
    response = bridge.infer(ASKED, tools=[TOOL, ADD], tool_choice=NAMED, temperature=1.0, random_seed=3)
    assert check(response.tool_calls) == ["add"]


def test_a_stream_tells_the_same(bridge: Bridge) -> None:
    """Who streams would get other calls than who waits, or the same pieces twice."""
    asked: dict[str, Any] = {"tools": [TOOL, ADD], "tool_choice": "required", "max_new_tokens": 300}
    whole = bridge.infer(ASKED, **asked)
    deltas = list(bridge.stream(ASKED, **asked))
    joined = join_deltas(deltas)
    said = [(call.index, call.name, call.arguments) for call in joined.tool_calls]
    assert said == [(call.index, call.name, call.arguments) for call in whole.tool_calls]
    assert joined.token_ids == whole.token_ids
    assert joined.finish_reason == whole.finish_reason


def test_without_telling_the_model_it_cannot_choose(demo: Bridge) -> None:
    """The caller would wait for calls that a model which has heard of no tools will never make."""
    with pytest.raises(InvalidRequestError, match="does not support tools") as caught:
        demo.infer(ASKED, tools=[TOOL])
    assert caught.value.param == "tools"


@pytest.mark.parametrize("name", EACH[1:])
def test_what_the_model_chooses_to_call_is_read(name: str, tmp_path: Path) -> None:
    """A call that the model makes by itself would be shown as text, and never be run."""
    form = FORMS[name]
    with Bridge(parrot(tmp_path, form.template, form.answer), self_check=False) as bridge:
        for response in (bridge.infer(ASKED, tools=[TOOL]), join_deltas(list(bridge.stream(ASKED, tools=[TOOL])))):
            assert (response.text, check(response.tool_calls)) == (form.said, ["look", "look"])
            assert response.finish_reason == "tool_calls"
        assert bridge.infer(ASKED, tools=[TOOL], tool_choice="none").tool_calls == []


def test_the_model_is_told_of_its_tools_and_calls(bridge: Bridge) -> None:
    """It would call at random, and ask again for what it has been told."""
    call = ToolCall(0, "abcdefghi", "look", '{"city": "Rome"}').message()
    history: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "It is dry."},
    ]
    options: dict[str, Any] = {"return_prompt_token_ids": True, "max_new_tokens": 1}
    told = bridge.infer(ASKED, tools=[TOOL], tool_choice="required", **options).prompt_token_ids
    untold = bridge.infer(ASKED, tools=[TOOL], tool_choice="none", **options).prompt_token_ids
    reminded = bridge.infer(history, **options).prompt_token_ids
    assert told is not None and untold is not None and reminded is not None  # noqa: PT018
    assert "window" in "".join(bridge.token_texts(told))
    assert "window" not in "".join(bridge.token_texts(untold))
    text = "".join(bridge.token_texts(reminded))
    assert "Rome" in text
    assert "dry" in text


# --- several, or one ---


@pytest.fixture(scope="module")
def demo() -> Iterator[Bridge]:
    with Bridge("demo", self_check=False) as bridge:
        yield bridge


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_are_made_where_they_may(demo: Bridge, parallel: bool) -> None:
    """One call too many would be made where one was asked for, or none but the first where several may be."""
    unending = {4: -100.0}  # the model's end
    config = GenerationConfig(tools=[go], tool_choice="required", max_new_tokens=900, logit_bias=unending)
    response = demo.infer(ASKED, config, parallel_tool_calls=parallel)
    assert len(response.tool_calls) == (MOST_CALLS if parallel else 1)
    assert [call.index for call in response.tool_calls] == list(range(len(response.tool_calls)))


def test_a_choice_among_fewer(demo: Bridge) -> None:
    """A tool would be called that this request does not allow."""
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    for seed in range(4):
        calls = demo.infer(ASKED, tools=[TOOL, ADD], tool_choice=allowed, temperature=1.5, random_seed=seed).tool_calls
        assert set(check(calls)) <= {"add"}


def test_a_call_or_an_answer_of_a_form(tmp_path: Path) -> None:
    """Who gives tools and a schema for the answer at once would get neither, or be refused."""
    schema = {"type": "object", "properties": {"sky": {"enum": ["dry", "wet"]}}, "required": ["sky"]}
    wanted = {"type": "json_schema", "json_schema": {"schema": {**schema, "additionalProperties": False}}}
    with Bridge(with_template(tmp_path, FORMS["hermes"].template), self_check=False) as bridge:
        config = GenerationConfig(tools=[ADD], response_format=wanted, max_new_tokens=400, parallel_tool_calls=False)
        answered = bridge.infer(ASKED, config, logit_bias={BYTES["{"]: 100.0})
        called = bridge.infer(ASKED, config, logit_bias={BYTES["<"]: 100.0})
    jsonschema.validate(json.loads(answered.text), schema)
    assert (answered.finish_reason, answered.tool_calls) == ("stop", [])
    assert (called.finish_reason, called.text) == ("tool_calls", "")
    check(called.tool_calls)


def test_any_expression_beside_tools(tmp_path: Path) -> None:
    """An expression with a slash in it would be refused, or be another one."""
    with Bridge(with_template(tmp_path, FORMS["hermes"].template), self_check=False) as bridge:
        for pattern, text in ((r"a\\/b", "a\\/b"), ("a/b", "a/b"), (r"a\/b", "a/b")):
            config = GenerationConfig(tools=[ADD], grammar={"regex": pattern}, logit_bias={BYTES["a"]: 100.0})
            assert bridge.infer(ASKED, config).text == text


# --- thoughts ---


def test_a_form_holds_for_the_answer_and_not_for_the_thoughts(tmp_path: Path) -> None:
    """A reasoning model would be made to think in JSON, and have nothing left to say."""
    model = with_template(tmp_path, THINKING, "</think>")
    with Bridge(model, self_check=False) as bridge:
        (end,) = [token for token, text in enumerate(bridge.token_texts(range(264))) if text == "</think>"]
        for fields in ({"grammar": {"choice": ["yes", "no"]}}, {"tools": [ADD], "tool_choice": "required"}):
            thinking = bridge.infer(ASKED, separate_reasoning=True, max_new_tokens=20, **fields)
            assert len(thinking.reasoning.strip()) > 5  # it goes on for as long as it likes
            assert (thinking.text, thinking.finish_reason) == ("", "length")
            done = bridge.infer(ASKED, separate_reasoning=True, logit_bias={end: 100.0}, max_new_tokens=300, **fields)
            assert done.text in ("yes", "no") if "grammar" in fields else check(done.tool_calls)


def test_without_being_asked_nothing_is_taken_apart(tmp_path: Path) -> None:
    """A program that reads the marks itself would not find them any more."""
    with Bridge(with_template(tmp_path, THINKING), self_check=False) as bridge:
        said = {"choice": ["mm</think>yes"]}
        assert bridge.infer(ASKED, grammar=said).text == "mm</think>yes"
        apart = bridge.infer(ASKED, grammar=said, separate_reasoning=True)
        assert (apart.reasoning, apart.text) == ("mm", "yes")


# --- what is wrong ---


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools", r"tools\[0\] must be"),
        ({"tools": [TOOL, TOOL]}, "tools", "is named 'look'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", r"tools\[0\].function.name"),
        ({"tools": "look"}, "tools", "a list of at most 128"),
        ({"tools": [TOOL] * 129}, "tools", "a list of at most 128"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", '"required"'),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice", "'add', but the tools are look"),
        ({"tool_choice": "required"}, "tools", "give tools"),
        ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos", "after its calls"),
        ({"tools": [TOOL], "tool_choice": "required", "grammar": {"regex": "a"}}, "grammar", "give one"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/nowhere"}}}],
             "tool_choice": "required"},
            "tools", "parameters of f: .*there is nothing at #/nowhere",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_by_name(demo: Bridge, fields: dict[str, Any], param: str, words: str) -> None:
    """The caller would not know which tool is wrong, or the model would call what cannot be run."""
    with pytest.raises(InvalidRequestError, match=words) as caught:
        demo.infer(ASKED, **fields)
    assert caught.value.param == param


# --- a chat that runs functions ---


class Unit(enum.Enum):
    C = "c"
    F = "f"


@dataclasses.dataclass
class Sky:
    city: str
    degrees: int


def test_a_chat_runs_the_functions_that_are_called(demo: Bridge) -> None:
    """The user would have to write the loop of calls and results that everybody writes."""
    seen: list[Any] = []

    def weather(city: Literal["Rome", "Oslo"], unit: Unit) -> Sky:
        """Tell the weather."""
        seen.append((city, unit))
        return Sky(city, 23)

    chat = Chat(demo)
    options: dict[str, Any] = {
        "temperature": 1.0,
        "random_seed": 5,
        "max_new_tokens": 200,
        "parallel_tool_calls": False,
    }
    response = chat.ask("Weather?", tools=[weather], tool_choice="required", **options)
    ((city, unit),) = seen
    assert city in ("Rome", "Oslo")
    assert isinstance(unit, Unit)
    user, calling, result, answer = chat.messages
    assert (user["role"], calling["tool_calls"][0]["function"]["name"]) == ("user", "weather")
    assert json.loads(result["content"]) == {"city": city, "degrees": 23}
    assert result["tool_call_id"] == calling["tool_calls"][0]["id"]
    assert answer == {"role": "assistant", "content": response.text}
    deltas = list(chat.stream("And now?", tools=[weather], tool_choice="required", **options))
    assert len(seen) == 2
    assert any(delta.tool_calls for delta in deltas)
    assert chat.messages[-1]["content"] == "".join(delta.text for delta in deltas)


def test_what_a_function_raises_reaches_the_caller(demo: Bridge) -> None:
    """A bug in the user's function would be told to a model, and the turn be half remembered."""

    def broken() -> str:
        raise ZeroDivisionError("mine")

    chat = Chat(demo)
    with pytest.raises(ZeroDivisionError, match="mine"):
        chat.ask("Go.", tools=[broken], tool_choice="required")
    assert chat.messages == []
    assert chat.ask("Hello.", max_new_tokens=4).text


def test_a_function_that_stops_the_iteration_is_an_error(demo: Bridge) -> None:
    """A stream would end without a word, as if the model had answered."""

    def spent() -> object:
        return next(iter(()))

    chat = Chat(demo)
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(chat.stream("Go.", tools=[spent], tool_choice="required"))
    assert chat.messages == []


def test_a_stream_that_nobody_holds_leaves_the_chat_free(demo: Bridge) -> None:
    """A view that forgets its stream would lock the visitor out of the conversation."""
    chat = Chat(demo)
    next(chat.stream("Tell me a story about a fox."))
    gc.collect()
    assert chat.ask("Hello.", max_new_tokens=4).text


def test_a_turn_has_one_deadline(demo: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who waits three seconds would wait as long for each round, and for the functions without a limit."""
    now = [0.0]
    monkeypatch.setattr("lmbridge.rounds.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def slow() -> None:
        """Take an hour."""
        now[0] += 3600

    chat = Chat(demo)
    with pytest.raises(RequestTimeoutError, match="and its functions"):
        chat.ask("Go.", tools=[slow], tool_choice="required", timeout=60)
    assert chat.messages == []


def test_wrong_calls_are_told_to_the_model() -> None:
    """A model that gets a name or an argument wrong would end the turn, though it could mend that."""
    rounds = Rounds([], None, {"tools": [add]})
    for call, error in (
        (ToolCall(0, "1", "sub", "{}"), "no function sub; there are add"),
        (ToolCall(0, "1", "add", '{"a": 1}'), "b: Field required"),
        (ToolCall(0, "1", "add", '{"a": 1, "b": 2, "c": 3}'), "c: Extra inputs are not permitted"),
        (ToolCall(0, "1", "add", '{"a": 1, "b": "x"}'), "b: Input should be a valid integer"),
        (ToolCall(0, "1", "add", "{"), "Expecting property name"),
        (ToolCall(0, "1", "add", "[1, 2]"), "not a JSON object"),
    ):
        rounds.take(calling(call))
        assert error in json.loads(rounds.messages[-1]["content"])["error"]
    rounds.take(calling(ToolCall(0, "1", "add", '{"a": 1, "b": 2}')))
    assert rounds.messages[-1]["content"] == "3"


def test_a_model_that_goes_on_calling_has_to_answer() -> None:
    """A model that never stops calling would hold its caller for ever."""
    rounds = Rounds([], None, {"tools": [add]})
    choices = []
    for _ in range(MOST_ROUNDS + 1):
        choices.append(rounds.options.get("tool_choice"))
        rounds.take(calling(ToolCall(0, "1", "add", '{"a": 1, "b": 2}')))
    assert choices == [None, *["auto"] * (MOST_ROUNDS - 1), "none"]


def test_a_call_that_was_forced_is_forced_once() -> None:
    """A model that must call would call again and again."""
    form = {"type": "json_object"}
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        rounds = Rounds([], GenerationConfig(tools=[add], tool_choice=choice), {"response_format": form})
        assert rounds.options["response_format"] is None  # of the answer, which comes later
        rounds.take(calling(ToolCall(0, "1", "add", '{"a": 1, "b": 2}')))
        assert rounds.options["tool_choice"] == "none"
        assert rounds.options["response_format"] == form


def test_a_call_that_was_cut_off_is_not_remembered() -> None:
    """Every later turn would be refused by templates that look into the arguments of earlier calls."""
    rounds = Rounds([], None, {"tools": [add]})
    cut = calling(ToolCall(0, "1", "add", '{"a'))
    cut.finish_reason = "length"
    rounds.take(cut)
    assert rounds.over
    assert rounds.messages == [{"role": "assistant", "content": ""}]


def test_a_stream_of_a_chat_is_sent_over_http(demo: Bridge) -> None:
    """A browser would see nothing of a turn with functions but what its user wrote for it by hand."""
    app = flask.Flask(__name__)
    app.config["LMBRIDGE_MODEL"] = demo
    lm = LMBridge(app)

    @app.get("/ask")
    def ask() -> flask.Response:
        chat = Chat(demo)
        return lm.stream_response(chat.stream("Go.", tools=[go], tool_choice="required", max_new_tokens=300))

    text = app.test_client().get("/ask").text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert "".join(call.get("name", "") for event in events for call in event.get("tool_calls", ())).startswith("go")
    assert [event["finish_reason"] for event in events if "finish_reason" in event] == ["tool_calls", "stop"]


@pytest.mark.parametrize("tool", [TOOL, asyncio.sleep])
def test_a_chat_takes_functions_only(tool: Any) -> None:
    """Nobody would run what is only described, and the chat would end in the middle of a turn."""
    with pytest.raises(InvalidRequestError, match="A chat runs its tools"):
        Rounds([], None, {"tools": [tool]})


def go() -> None:
    """Go."""


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def calling(call: ToolCall) -> Response:
    """An answer that is this call."""
    return Response("", [], "tool_calls", Usage(), Timings(), tool_calls=[call])


# --- functions as tools ---


class Place(TypedDict):
    city: str
    country: NotRequired[str]


def test_a_function_is_described_by_its_signature() -> None:
    """The model would not know what a parameter is for, or give a text where a number is wanted."""

    def book(  # type: ignore[no-untyped-def]
        place: Place,
        *,
        unit: Unit = Unit.C,
        tags: list[str] | None = None,
        sky: Sky | None = None,
        shares: dict[str, float] = {},  # noqa: B006
        guests: Annotated[int, pydantic.Field(ge=1, le=9, description="how many")] = 2,
        note: Annotated[str, "said aloud"] = "",
        when: datetime.date | None = None,
        anything=None,
    ) -> None:
        """Book a table
        for two.

        And more that no model needs.

        Args:
            place: where it is,
                with its country.
            tags (list): words.

        Returns:
            Nothing: at all.
        """

    function = describe_function(book)["function"]
    assert function["description"] == "Book a table for two."
    parameters = function["parameters"]
    jsonschema.Draft202012Validator.check_schema(parameters)
    assert (parameters["required"], parameters["additionalProperties"]) == (["place"], False)
    said = parameters["properties"]
    assert said["place"]["description"] == "where it is, with its country."
    assert said["tags"] == {
        "description": "words.", "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
    }  # fmt: skip
    assert said["guests"] == {"type": "integer", "minimum": 1, "maximum": 9, "description": "how many", "default": 2}
    assert said["note"]["description"] == "said aloud"
    assert said["when"]["anyOf"][0] == {"type": "string", "format": "date"}
    good = {"place": {"city": "Rome"}, "unit": "f", "sky": {"city": "Oslo", "degrees": 3}, "when": "2026-02-03"}
    jsonschema.validate(good, parameters)
    for bad in ({"place": {"town": "Rome"}}, {**good, "guests": 0}, {**good, "extra": 1}, {**good, "unit": "k"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, parameters)
    made = bind_arguments(book, good)
    assert made == {"place": {"city": "Rome"}, "unit": Unit.F, "sky": Sky("Oslo", 3), "when": datetime.date(2026, 2, 3)}
    with pytest.raises(ValueError, match="guests: Input should be greater than or equal to 1"):
        bind_arguments(book, {**good, "guests": 0})


class Shape(pydantic.BaseModel):
    unit: Unit
    inner: list[Shape] = []


class Spot(pydantic.BaseModel):
    unit: Unit


def paint(spot: Spot) -> None:
    """Paint."""


def area(shapes: list[Shape], title: str = "", *, pair: tuple[int, Sky] | None = None) -> None:
    """Compute an area."""


def test_hints_inside_of_hints_are_made(demo: Bridge) -> None:
    """A function would get dicts where it wants its own classes, and fail; or could not be a tool at all."""
    made = bind_arguments(
        area, {"shapes": [{"unit": "c", "inner": [{"unit": "f"}]}], "pair": [1, {"city": "Rome", "degrees": 2}]}
    )
    assert made["shapes"] == [Shape(unit=Unit.C, inner=[Shape(unit=Unit.F)])]
    assert made["pair"] == (1, Sky("Rome", 2))
    (call,) = demo.infer(
        ASKED, tools=[paint], tool_choice="required", temperature=1.0, random_seed=2, parallel_tool_calls=False
    ).tool_calls
    assert isinstance(call.bound(paint)["spot"].unit, Unit)


@pytest.mark.parametrize("fields", [{"response_format": Spot}, {"grammar": Spot}, {"grammar": {"json": Spot}}])
def test_a_class_stands_for_its_schema(demo: Bridge, fields: Any) -> None:
    """Who has a model of pydantic's would have to wrap its schema in two dicts, and to close it."""
    answer = demo.infer("Which?", GenerationConfig(**fields), temperature=1.0, random_seed=4)
    assert isinstance(Spot.model_validate_json(answer.text).unit, Unit)
    assert list(json.loads(answer.text)) == ["unit"]


def test_a_bare_schema_is_told_where_it_belongs(demo: Bridge) -> None:
    """The caller would read a list of forms, and not which of them takes a schema."""
    with pytest.raises(InvalidRequestError, match="Put the schema inside"):
        demo.infer("Which?", response_format=Spot.model_json_schema())


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("as it is", "as it is"),
        (Unit.C, "c"),
        ({"unit": Unit.F, "day": datetime.date(2026, 2, 3)}, '{"unit":"f","day":"2026-02-03"}'),
        (Sky("Rome", 3), '{"city":"Rome","degrees":3}'),
        ([Shape(unit=Unit.C)], '[{"unit":"c","inner":[]}]'),
        (float("nan"), "null"),
        (torch.tensor([1, 2]), "[1,2]"),
        (None, "null"),
    ],
)
def test_results_are_told_as_json(result: Any, told: str) -> None:
    """The model would be told a Python object's address, or another word than it knows."""
    assert ToolCall(0, "1", "look").answer(result) == {
        "role": "tool", "tool_call_id": "1", "name": "look", "content": told,
    }  # fmt: skip


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize("result", [object(), print, LOOP])
def test_results_that_json_cannot_say_are_an_error(result: Any) -> None:
    """The model would answer from an object's address."""
    with pytest.raises(TypeError, match="must be a string or JSON"):
        ToolCall(0, "1", "look").answer(result)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a: a, "needs a name"),
        (print, "cannot be read|must have names"),
        (functools.partial(add, 1), "needs a name"),
    ],
)
def test_what_is_no_tool_is_refused(function: Any, words: str) -> None:
    """The model would be given a function that it cannot call."""
    with pytest.raises(InvalidRequestError, match=words):
        describe_function(function)


def test_a_hint_that_no_schema_says() -> None:
    """The model would give what the function cannot use."""

    def take(when: Callable[[], None]) -> None: ...

    with pytest.raises(InvalidRequestError, match="The parameters of take have no JSON schema"):
        describe_function(take)
