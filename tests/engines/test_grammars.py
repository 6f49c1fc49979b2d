"""Answers that follow a grammar, by the bundled model on both runners, which knows nothing of JSON."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from lmbridge import Bridge, EngineError, GenerationConfig, InvalidRequestError, RequestAbortedError
from lmbridge import UnsupportedOptionError as Unsupported
from lmbridge.engines.lmdeploy.sampling import check_ranges, sampling_fields
from lmbridge.engines.transformers import TransformersEngine
from lmbridge.engines.transformers.guides import Grammars
from lmbridge.grammar import Grammar
from tests.conftest import until

QUESTION = "What is the capital of France?"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module", params=["paged", pytest.param("plain", marks=pytest.mark.long)])
def bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    with Bridge("demo", runner=request.param) as bridge:
        yield bridge


def is_valid(text: str, schema: Any) -> bool:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    return True


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_schema(bridge: Bridge, temperature: float) -> None:
    """The answer parses and validates, whatever the model would have said."""
    answer = bridge.infer("Who?", response_format=FORMAT, temperature=temperature, random_seed=1)
    assert answer.finish_reason == "stop"
    assert is_valid(answer.text, PERSON)


def test_any_object(bridge: Bridge) -> None:
    """Without a schema it is an object at least, or the beginning of one that was cut off."""
    answer = bridge.infer("Who?", response_format={"type": "json_object"}, temperature=1, random_seed=3)
    assert answer.text.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"regex": r"[a-c]{3}-[0-9]{2}"}, r"[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", 'may"be\n', "ünî"]}, r'yes|no|may"be\n|ünî'),
        ({"choice": ["\x7f\x01"]}, "\x7f\x01"),
        ('start: "a" "b"~2..4 "c"', r"ab{2,4}c"),
        ({"lark": 'start: "x" | "y"'}, "x|y"),
        ('root ::= "p" ("q" | "r")', "p[qr]"),
        ({"json": '{"enum": [1, 2]}'}, "1|2"),
        ({"json": True}, r"(?s).*"),
    ],
)
def test_other_grammars(bridge: Bridge, grammar: Any, pattern: str) -> None:
    """Expressions, choices and grammars are followed to their end."""
    answer = bridge.infer("Say it", grammar=grammar, temperature=1, random_seed=5, max_new_tokens=100)
    assert re.fullmatch(pattern, answer.text)


def test_beside_others(bridge: Bridge) -> None:
    """A grammar is one request's: those without get what they get alone, and those with one the same as alone."""
    plain = bridge.infer(QUESTION).text
    alone = [bridge.infer("Who?", grammar={"json": PERSON}, temperature=1, random_seed=seed).text for seed in range(8)]

    def ask(number: int) -> bool:
        if number % 2:
            return bridge.infer(QUESTION).text == plain
        seed = number // 2 % 8
        answer = bridge.infer("Who?", grammar={"json": PERSON}, temperature=1, random_seed=seed, logprobs=2)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        return answer.text == alone[seed] and is_valid(answer.text, PERSON)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(32)))


def test_with_all_that_changes_scores(bridge: Bridge) -> None:
    """Penalties, biases and filters choose among what the grammar allows."""
    for options in (
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": -1.0},
        {"logit_bias": dict.fromkeys(range(0, 3000, 3), -100.0)},
        {"top_k": 1},
        {"temperature": 1.5, "top_p": 0.1, "min_p": 0.5},
    ):
        answer = bridge.infer("Who?", grammar={"json": PERSON}, random_seed=2, **options)
        assert is_valid(answer.text, PERSON), options


def test_an_answer_that_is_cut(bridge: Bridge) -> None:
    """It says that it is: half a JSON is not told as a whole one."""
    answer = bridge.infer("Who?", response_format=FORMAT, max_new_tokens=4)
    assert answer.finish_reason == "length"
    assert answer.text.startswith('{"name"')


def test_after_a_token(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that thinks first thinks freely, but it does not end before it has answered, and that in its form."""
    free = bridge.infer(QUESTION)
    words = list(dict.fromkeys(free.token_ids))
    guide = Grammars.guide

    def begin_after(token: int) -> None:
        monkeypatch.setattr(Grammars, "guide", lambda self, grammar, _=None: guide(self, grammar, token))

    begin_after(words[2])
    answer = bridge.infer(QUESTION, grammar={"regex": "[a-c]{3}"})
    thought = free.token_ids[: free.token_ids.index(words[2]) + 1]
    assert answer.token_ids[: len(thought)] == thought
    assert re.fullmatch("[a-c]{3}", answer.text[-3:])
    assert len(answer.token_ids) <= len(thought) + 4
    begin_after(max(free.token_ids) + 1)
    longer = len(free.token_ids) + 10
    thoughts = bridge.infer(QUESTION, grammar={"regex": "[a-c]{3}"}, max_new_tokens=longer)
    assert thoughts.token_ids[: len(free.token_ids)] == free.token_ids
    assert (thoughts.finish_reason, len(thoughts.token_ids)) == ("length", longer)


def test_a_grammar_that_fails_on_the_way(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is told so, its neighbours get their answers."""
    alone = bridge.infer("Who?", response_format=FORMAT).text
    guide, chosen, astray = Grammars.guide, Grammars.chosen, set[Any]()

    def guided(grammars: Grammars, grammar: Any, after: int | None = None) -> Any:
        made = guide(grammars, grammar, after)
        if grammar.kind == "regex":
            astray.add(made)
        return made

    def misled(grammars: Grammars, told: Any) -> None:
        """Of another token than was chosen, which that request's grammar has no place for."""
        chosen(grammars, [(guide, 0 if guide in astray else token) for guide, token in told])

    monkeypatch.setattr(Grammars, "guide", guided)
    monkeypatch.setattr(Grammars, "chosen", misled)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(bridge.infer, "Who?", response_format=FORMAT)
        with pytest.raises(EngineError, match="grammar of this request cannot be followed on"):
            bridge.infer("Who?", grammar={"regex": "[ab]{50}"})
        assert other.result(30).text == alone


def test_streams_and_aborts(bridge: Bridge) -> None:
    """A stream's pieces are the whole answer, and one that is left leaves nothing behind."""
    whole = bridge.infer("Who?", response_format=FORMAT).text
    with bridge.stream("Who?", response_format=FORMAT) as stream:
        assert "".join(delta.text for delta in stream) == whole
    endless = {"json": {"type": "string", "minLength": 100_000}}
    future = bridge.submit("Who?", grammar=endless, max_new_tokens=900)
    until(lambda: any(request.state == "running" for request in bridge.requests()))
    bridge.abort(future.request_id)
    with pytest.raises(RequestAbortedError):
        future.result(30)
    until(lambda: bridge.stats()["in_flight"] == 0)
    assert bridge.infer("Who?", response_format=FORMAT).text == whole


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({"regex": "(("}, r"regular expression cannot be followed.*unclosed group[^^]*$"),
        ({"regex": "(a?){1000}a{1000}"}, "regular expression cannot be followed.*too many"),
        ({"regex": r"[^\s\S]"}, "it cannot match anything"),
        ('start: "a" nothing', "grammar cannot be followed.*unknown name"),
        ({"json": {"type": "nope"}}, "JSON schema is not supported.*nope"),
        ({"json": {"$ref": "#/not/there"}}, "JSON schema is not supported.*/not/there"),
        ({"json": {"properties": {"a": {"uniqueItems": True}}}}, "supported: #/properties/a/uniqueItems: "),
    ],
)
def test_what_cannot_be_followed(bridge: Bridge, grammar: Any, words: str) -> None:
    """It is refused with the place at fault, and alone."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(bridge.infer, QUESTION)
        with pytest.raises(InvalidRequestError, match=words) as caught:
            bridge.infer("Say it", grammar=grammar)
        assert caught.value.param == "grammar"
        assert other.result(30).text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"{\\"name\\": \\"', '\\", \\"arguments\\": "'),
        ('<[3]> "', '" <[4]>'),
        ('"function" <[3]> "', '\\n```json\\n"'),
    ],
)
def test_which_tool_cannot_be_followed(
    bridge: Bridge, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tools of a request the one at fault is named, however the model writes its calls."""
    good, bad = '%json {"type": "object"}', '%json {"enum": [], "description": "1 | arguments_0: "}'
    calls = [f"call_{place}: {before}{name}{after} arguments_{place}" for place, name in enumerate(("look", "find-it"))]
    text = "\n".join(["start: call_0 | call_1", calls[0], f"arguments_0: {good}", calls[1], f"arguments_1: {bad}"])
    guide = Grammars.guide
    monkeypatch.setattr(Grammars, "guide", lambda self, *_: guide(self, Grammar("calls", text, "tools")))
    with pytest.raises(InvalidRequestError, match=r"^The parameters of find-it cannot be followed: Unsat"):
        bridge.infer("Who?", grammar={"regex": "a"})


def test_what_is_kept_compiled(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that is asked for again is at hand, and costly ones push each other out before memory fills."""
    kept: list[Any] = []
    keep = Grammars._keep

    def watch(self: Grammars, text: str, matcher: Any, seconds: float) -> None:
        keep(self, text, matcher, 0.4)
        kept.append(len(self._beginnings))

    monkeypatch.setattr(Grammars, "_keep", watch)
    for number in (1, 2, 3, 3, 4):
        assert bridge.infer("Who?", grammar={"regex": f"a{number}"}).text == f"a{number}"
    assert kept[-2:] == [2, 2]
    assert len(kept) == 4


def test_with_cuda_graphs_there_are_none() -> None:
    """Steps that are replayed from a recording ask nobody what may come next."""
    with pytest.raises(InvalidRequestError, match="response_format needs an engine with cuda_graphs=False"):
        engine = TransformersEngine("demo", cuda_graphs=True)
        with Bridge(engine) as bridge:
            bridge.infer("Who?", response_format=FORMAT)


# --- any schema ---


def any_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are short."""
    kinds = [*PLAIN, *(NESTED if depth < 2 else ())] if depth else ["object"]
    kind = rng.choice(kinds)
    return NESTED[kind](rng, lambda: any_schema(rng, depth + 1)) if kind in NESTED else PLAIN[kind](rng)


def any_object(rng: random.Random, inner: Callable[[], Any]) -> dict[str, Any]:
    names = rng.sample(["name", "a b", "ü", "x-1", "list", "nested", "_"], rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": {name: inner() for name in names}, "required": required, **CLOSED}


def any_array(rng: random.Random, inner: Callable[[], Any]) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {"type": "array", "items": inner(), "minItems": low, "maxItems": low + rng.randint(0, 2)}


def any_tagged(rng: random.Random, inner: Callable[[], Any]) -> dict[str, Any]:
    """As pydantic's discriminated unions."""
    tags = rng.sample("abc", 2)
    tagged = [{"is": {"const": tag}, "of": inner()} for tag in tags]
    return {"oneOf": [{"type": "object", "properties": each, "required": ["is"], **CLOSED} for each in tagged]}


CLOSED, OBJECT = {"additionalProperties": False}, {"type": "object"}
PLAIN: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "string": lambda rng: {"type": "string", "maxLength": rng.randint(0, 6)},
    "integer": lambda rng: {"type": "integer", "minimum": rng.randint(-5, 0), "maximum": rng.randint(1, 2000)},
    "boolean": lambda rng: {"type": "boolean"},
    "enum": lambda rng: {"enum": rng.sample(["a", "b\n", 'c"', 1, 2.5, None, True, "é", {}, []], rng.randint(1, 5))},
    "const": lambda rng: {"const": rng.choice(["a", 7, {"b": [None]}])},
    "nullable": lambda rng: {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": 9},
    "pattern": lambda rng: {"type": "string", "pattern": rng.choice([r"^[a-z]{1,4}$", r"^(?=.*\d)[a-z0-9]{2,4}$"])},
    "format": lambda rng: {"type": "string", "format": rng.choice(["date-time", "date", "duration", "uuid4", "email"])},
}
NESTED: dict[str, Callable[[random.Random, Callable[[], Any]], dict[str, Any]]] = {
    "object": any_object,
    "array": any_array,
    "tuple": lambda rng, inner: {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
    "anyOf": lambda rng, inner: {"anyOf": [inner() for _ in range(rng.randint(1, 3))]},
    "oneOf": any_tagged,
    "ref": lambda rng, inner: {"allOf": [inner()], "title": "one", "default": None},
    "names": lambda rng, inner: {"propertyNames": {"enum": ["a", "b c"]}, "additionalProperties": inner(), **OBJECT},
    "pairs": lambda rng, inner: {"type": "object", "patternProperties": {"^[xy]$": inner()}, **CLOSED},
}


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_any_schema_and_any_prompt(count: int) -> None:
    """Whatever the schema and the prompt, at temperature 1 what ends by itself is valid."""
    rng = random.Random(count)
    schemas = [any_schema(rng) for _ in range(count)]
    prompts = ["".join(rng.choices('abc xyz?!{}[]"', k=rng.randint(1, 40))) for _ in range(count)]
    bridge = Bridge("demo")

    def ask(number: int) -> str:
        config = GenerationConfig(
            max_new_tokens=400, temperature=1.0, random_seed=number,
            response_format={"type": "json_schema", "json_schema": {"schema": schemas[number]}},
        )  # fmt: skip
        answer = bridge.infer(prompts[number], config)
        if answer.finish_reason == "stop":
            assert is_valid(answer.text, schemas[number])
        return str(answer.finish_reason)

    with bridge, ThreadPoolExecutor(32) as pool:
        ends = list(pool.map(ask, range(count)))
    assert ends.count("stop") > 0.95 * count


# --- what is asked for, before any engine hears of it ---


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "json_schema"),
        ({"grammar": {}}, "grammar", "regex"),
        ({"grammar": {"regex": "a", "choice": ["a"]}}, "grammar", "regex"),
        ({"grammar": {"choice": []}}, "grammar", "non-empty strings"),
        ({"grammar": {"json": "{"}}, "grammar", "not valid JSON"),
        ({"grammar": {"json": {"minimum": float("nan")}}}, "grammar", "cannot be written as JSON"),
        ({"grammar": {"json": 3}}, "grammar", "must be an object"),
        ({"grammar": "start: /a/", "response_format": {"type": "json_object"}}, "grammar", "give one"),
        ({"grammar": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "give one"),
        ({"grammar": {"regex": "a"}, "min_new_tokens": 2}, "min_new_tokens", "give one"),
    ],
)
def test_what_is_no_grammar(fields: Any, param: str, words: str) -> None:
    """It is told where it is given, with what would be one."""
    with pytest.raises(InvalidRequestError, match=words) as caught:
        GenerationConfig().merged(fields)
    assert caught.value.param == param


def test_a_schema_is_the_requests_own() -> None:
    """Changing it after the call changes nothing, and text is no grammar."""
    schema: dict[str, Any] = {"type": "object"}
    config = GenerationConfig(grammar={"json": schema}).merged({})
    schema["type"] = "array"
    form = config.form
    assert form is not None
    assert form.value == {"type": "object"}
    assert GenerationConfig(response_format={"type": "text"}).form is None


def test_in_the_words_of_lmdeploy() -> None:
    """Its engine follows schemas and expressions; texts to choose from become one, and what it cannot is refused."""

    def words(**fields: Any) -> Any:
        return sampling_fields(GenerationConfig(**fields), ())["response_format"]

    assert words() is None
    assert words(grammar={"choice": ["a.b", "c"]}) == {"type": "regex_schema", "regex_schema": r"a\.b|c"}
    assert words(response_format={"type": "json_object"})["json_schema"]["schema"] == {"type": "object"}
    with pytest.raises(Unsupported, match="LMDeploy follows"):
        check_ranges(GenerationConfig(grammar='start: "a"'))
