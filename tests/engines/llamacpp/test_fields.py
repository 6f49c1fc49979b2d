"""Each field that the llama.cpp engine claims does what it says, on llama.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason='needs xllamacpp; run: pip install "lmbridge[llamacpp]"')

from lmbridge import Bridge, EngineError, InvalidRequestError, PromptTooLongError
from tests.engines.dialect.templates import FORMS, THINKING
from tests.engines.llamacpp.models import write_demo

ABILITIES = "What can you do?"
SAID = "I am a small demo model. I know capitals, small sums, colours, opposites and animal stories."
CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris."

THINKS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content or '' %}"
    "{{ '<|assistant|>' }}{%- if m.reasoning_content is defined and m.reasoning_content is string %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}{{ content + '<|end|>' }}{%- else %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- else %}{{ '<think>\\n' }}{%- endif %}{%- endif %}"
)
"""As Qwen's: it opens the thought, unless told not to."""
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look out of a window.",
        "parameters": {
            "type": "object",
            "properties": {"side": {"enum": ["north", "south"]}},
            "required": ["side"],
            "additionalProperties": False,
        },
    },
}


def ask(bridge: Bridge, prompt: Any, **config: Any) -> Any:
    return bridge.infer(prompt, timeout=60, **config)


def test_the_answer_is_that_of_the_library_it_was_made_for(bridge: Bridge) -> None:
    """llama.cpp's own sampling (temperature 0.8, top_k 40) would answer something else each time."""
    with Bridge("demo") as other:
        for prompt in (ABILITIES, CAPITAL, "What is 3 + 4?"):
            ours, theirs = ask(bridge, prompt), ask(other, prompt)
            assert (ours.text, ours.token_ids, ours.usage) == (theirs.text, theirs.token_ids, theirs.usage)


@pytest.mark.parametrize("word", ["small sums", "s, c", "stories.", "I am", "stories.!", "capitals, small sums, col"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_word_ends_the_answer_exactly(bridge: Bridge, word: str, keep: bool) -> None:
    """A word that spans tokens, begins the answer, or is never completed would be shown, or take too much with it."""
    response = ask(bridge, ABILITIES, stop_words=[word], include_stop_str_in_output=keep)
    found = SAID.find(word)
    assert response.text == (SAID if found < 0 else SAID[: found + keep * len(word)])
    assert response.finish_reason == "stop"
    assert len(response.token_ids) <= response.usage.completion_tokens <= len(response.token_ids) + len(word)


def test_a_stop_token_ends_the_answer(bridge: Bridge) -> None:
    """A token of the caller's choice would be shown, or change nothing."""
    ids = ask(bridge, ABILITIES).token_ids
    response = ask(bridge, ABILITIES, stop_token_ids=[ids[5]])
    assert response.token_ids == ids[:5]
    assert SAID.startswith(response.text)
    assert response.finish_reason == "stop"


def test_the_seed_decides(bridge: Bridge) -> None:
    """A seeded answer would differ each time, or beside others."""
    hot: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 12}
    first = ask(bridge, CAPITAL, random_seed=2**32 + 7, **hot).text
    beside = [bridge.submit(CAPITAL, random_seed=seed, **hot) for seed in (1, 2**32 + 7, 2)]
    texts = [future.result(60).text for future in beside]
    assert texts[1] == first
    assert len({*texts, first}) == 3


def test_logprobs_are_those_of_the_model(bridge: Bridge) -> None:
    """The token's own would be missing, or those after sampling."""
    response = ask(bridge, CAPITAL, logprobs=3)
    assert [next(iter(entry)) for entry in response.logprobs] == response.token_ids
    assert all(len(entry) == 3 and max(entry.values()) <= 0 for entry in response.logprobs)
    assert [len(entry) for entry in ask(bridge, CAPITAL, logprobs=0).logprobs] == [1] * len(response.token_ids)
    assert "".join(bridge.token_texts(response.token_ids)) == response.text


def test_what_changes_the_choice_changes_it(bridge: Bridge) -> None:
    """A field would be taken and dropped."""
    first = ask(bridge, CAPITAL).token_ids[0]
    assert ask(bridge, CAPITAL, logit_bias={first: -100}).token_ids[0] != first
    assert ask(bridge, CAPITAL, repetition_penalty=1.9).text != PARIS
    assert ask(bridge, CAPITAL, ignore_eos=True, max_new_tokens=20).finish_reason == "length"
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ask(bridge, CAPITAL, temperature=3.0, **narrow).text == PARIS


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"grammar": {"choice": ["red/1", "green"]}}, lambda text: text in ("red/1", "green")),
        ({"grammar": {"regex": "[0-9]{3}/x"}}, lambda text: text[:3].isdigit() and text[3:] == "/x"),
        ({"grammar": 'start: "yes" | "no"'}, lambda text: text in ("yes", "no")),
        ({"grammar": 'root ::= "yes" | "no"'}, lambda text: text in ("yes", "no")),
        (
            {"grammar": {"json": {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}}},
            lambda text: json.loads(text)["a"] == "x",
        ),
    ],
)
def test_forms_are_kept(bridge: Bridge, form: Any, fits: Any) -> None:
    """An answer that a program reads would be prose."""
    assert fits(ask(bridge, CAPITAL, max_new_tokens=40, **form).text)


def test_thousands_of_choices_are_kept(bridge: Bridge) -> None:
    """From 2,000 on llama.cpp would let the answer go free, and say nothing."""
    texts = [f"item number {number * 7919 % 99991}" for number in range(9990)]
    texts += ["a/b|c(d)", 'q"\n\\é😀']
    assert ask(bridge, CAPITAL, max_new_tokens=60, grammar={"choice": texts}).text in texts
    assert ask(bridge, CAPITAL, grammar={"choice": texts[-2:]}).text in texts[-2:]


def test_an_answer_that_llama_cpp_lets_go_free_is_an_error(bridge: Bridge) -> None:
    """A program that relies on the form would read prose."""
    rule = "start: " + " | ".join(f'"item number {number}"' for number in range(2500))
    with pytest.raises(EngineError, match="cannot be followed on"):
        ask(bridge, CAPITAL, grammar={"lark": rule})


def test_an_answer_cut_off_within_its_form_is_none(bridge: Bridge) -> None:
    """A limit or a stop word would make an error of what is right so far."""
    form: dict[str, Any] = {"grammar": {"regex": "[0-9]{9}x"}}
    assert ask(bridge, CAPITAL, max_new_tokens=3, **form).finish_reason == "length"
    assert ask(bridge, CAPITAL, stop_words=list("0123456789"), **form).text == ""


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000,
        "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000,
        "root ::= r0\n" + "\n".join(f"r{place} ::= r{place + 1}" for place in range(2000)) + '\nr2000 ::= "a"',
    ],
)
def test_a_gbnf_grammar_that_is_too_large_is_refused(bridge: Bridge, grammar: str) -> None:
    """One request would end the process: llama.cpp's own reader goes into itself for each bracket and each rule."""
    with pytest.raises(InvalidRequestError, match=r"too large|too deeply") as caught:
        ask(bridge, CAPITAL, grammar=grammar)
    assert caught.value.param == "grammar"


def test_gbnf_with_many_parts_that_may_be_left_out_is_quick(bridge: Bridge) -> None:
    """llama.cpp would stand still for minutes over it, and everybody else's answers with it."""
    assert set(ask(bridge, CAPITAL, max_new_tokens=5, grammar="root ::= " + '"a"? ' * 500).text) <= {"a"}


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (r'root ::= "\u00e9\u0041\x42" [\u0061] "\U0001F600"', "éABa😀"),
        ('start: "a ::= b"', "a ::= b"),
        ('// a ::= b\nstart: "c"', "c"),
        ('start: "a"\n  | "a" // ::=', "a"),
    ],
)
def test_the_notation_is_told_by_the_rules(bridge: Bridge, grammar: str, text: str) -> None:
    """A Lark grammar with "::=" in a text would be taken for GBNF; a character's number in GBNF for others."""
    assert ask(bridge, CAPITAL, grammar=grammar).text == text


def test_numbers_beyond_what_llama_cpp_counts_are_the_most_there_is(bridge: Bridge) -> None:
    """2**40 tokens would be one."""
    assert ask(bridge, CAPITAL, max_new_tokens=2**40).text == PARIS
    assert ask(bridge, CAPITAL, max_new_tokens=5, temperature=0.1, top_k=2**40).text


@pytest.mark.parametrize("grammar", ["start: (((", {"regex": "((("}, "root ::= (((", "root ::= nobody"])
def test_a_grammar_that_is_none_is_refused(bridge: Bridge, grammar: Any) -> None:
    """llama.cpp would let the answer go free, and nobody would know."""
    with pytest.raises(InvalidRequestError) as caught:
        ask(bridge, CAPITAL, grammar=grammar)
    assert caught.value.param == "grammar"


@pytest.mark.parametrize("template", [None, FORMS["hermes"].template, THINKING])
def test_a_call_that_must_come_comes(bridge: Bridge, files: Path, template: str | None) -> None:
    """llama.cpp lets the answer go free where a call was required, for most templates."""
    model = write_demo(files / f"tools-{abs(hash(template))}.gguf", template=template)
    with Bridge(model, engine="llamacpp", threads=1) as bridge:
        response = ask(bridge, CAPITAL, tools=[TOOL], tool_choice="required")
        (call,) = response.tool_calls
        assert (response.finish_reason, response.text, call.name) == ("tool_calls", "", "look")
        assert call.parsed()["side"] in ("north", "south")
        cut = ask(bridge, CAPITAL, tools=[TOOL], tool_choice="required", max_new_tokens=4)
        assert (cut.finish_reason, cut.tool_calls) == ("length", [])
        assert cut.text


def test_thoughts_come_apart(files: Path) -> None:
    """They would stand in the answer; or what has a form would be taken for one, since the prompt opens it."""
    with Bridge(write_demo(files / "thinks.gguf", template=THINKS), engine="llamacpp", threads=1) as bridge:
        thinking = ask(bridge, ABILITIES, separate_reasoning=True, max_new_tokens=10)
        assert (thinking.text, bool(thinking.reasoning)) == ("", True)
        assert ask(bridge, ABILITIES, max_new_tokens=10).text == f"<think>\n{thinking.reasoning}"
        for separate in (False, True):
            formed = ask(bridge, ABILITIES, separate_reasoning=separate, grammar={"choice": ["red", "green"]})
            assert (formed.text in ("red", "green"), formed.reasoning) == (True, "")
        assert ask(bridge, ABILITIES, tools=[TOOL], tool_choice="required").tool_calls
        off = ask(bridge, ABILITIES, separate_reasoning=True, chat_template_kwargs={"enable_thinking": False})
        assert (bool(off.text), off.reasoning) == (True, "")


def test_a_model_that_nothing_tells_of_tools_cannot_choose(bridge: Bridge) -> None:
    """It would be asked without them, and never call."""
    with pytest.raises(InvalidRequestError, match="does not support tools"):
        ask(bridge, CAPITAL, tools=[TOOL])


def test_an_answer_is_gone_on_with_when_asked(bridge: Bridge) -> None:
    """llama.cpp would go on with the last answer of every conversation."""
    begun = [{"role": "user", "content": CAPITAL}, {"role": "assistant", "content": "The capital"}]
    assert ask(bridge, begun, continue_final_message=True).text == PARIS.removeprefix("The capital")
    assert not ask(bridge, begun).text.startswith(" of")


def test_a_model_without_a_template_goes_on_with_the_text(files: Path) -> None:
    """llama.cpp would put a template of its own choice around it."""
    model = write_demo(files / "bare.gguf", template=None, bare=True)
    with Bridge(model, engine="llamacpp", threads=1) as bridge:
        assert ask(bridge, "<|user|>What is 2 + 3?<|end|><|assistant|>").text == "2 + 3 = 5."
        with pytest.raises(InvalidRequestError, match="no chat template"):
            ask(bridge, [{"role": "user", "content": CAPITAL}])


@pytest.mark.parametrize(
    "prompt",
    [
        [], (), [3072], [-1], [True], "half of a pair \ud800", "two \ud83d\ude00", [{"role": "pirate", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}],
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(bridge: Bridge, prompt: Any) -> None:
    """It would be an error of the engine's, or answered as if it were one."""
    if prompt in ([], ()):
        assert not bridge.infer(list(prompt))
        return
    with pytest.raises(InvalidRequestError):
        ask(bridge, prompt)
    assert ask(bridge, CAPITAL).text == PARIS


def test_a_prompt_that_does_not_fit_is_refused(bridge: Bridge) -> None:
    """The caller would get an answer to a part of it."""
    with pytest.raises(PromptTooLongError) as caught:
        ask(bridge, "word " * 2000)
    assert caught.value.most == 1024
    fits = ask(bridge, [7] * 1020, max_new_tokens=50, ignore_eos=True)
    assert (fits.finish_reason, fits.usage.total_tokens) == ("length", 1024)
