"""What else a request may ask of the transformers engine: penalties that count, biases, a least length, what the chat
template is given, and the prompt's own log-probabilities. Each by what a user notices, on both runners.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.engines.transformers.plan import Plan
from lmbridge.engines.transformers.sampling import Sampler
from lmbridge.errors import EngineError, InvalidRequestError, PromptTooLongError
from lmbridge.messages import GenerationConfig, PromptLogprobs
from tests.engines.conftest import BYTES, EOS, Answer, Driver, driven, generate, save_model

RUNNERS = pytest.mark.parametrize("runner", ["paged", pytest.param("plain", marks=pytest.mark.long)])
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "wel"}]


def ids(text: str) -> list[int]:
    return [BYTES[character] for character in text]


def on(model: str, scenario: Callable[[Driver], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run the scenario on a started engine."""

    async def whole() -> None:
        async with driven(model, **options) as driver:
            await scenario(driver)

    asyncio.run(whole())


class Counted(transformers.LogitsProcessor):  # type: ignore[misc]
    """Frequency and presence penalties by their definition, for transformers' own ``generate``."""

    def __init__(self, start: int, frequency: float, presence: float) -> None:
        self._start, self._frequency, self._presence = start, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token in input_ids[0, self._start :].tolist():
            scores[0, token] -= self._frequency
        for token in set(input_ids[0, self._start :].tolist()):
            scores[0, token] -= self._presence
        return scores


def expected(model: Any, prompt: list[int], count: int, fields: dict[str, Any]) -> list[int]:
    """What ``generate`` answers with transformers' own processors where it has one."""
    made: list[Any] = []
    if "logit_bias" in fields:
        made.append(
            transformers.SequenceBiasLogitsProcessor(
                [[[token], float(bias)] for token, bias in fields["logit_bias"].items()]
            )
        )
    if "repetition_penalty" in fields:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    made.append(Counted(len(prompt), fields.get("frequency_penalty", 0.0), fields.get("presence_penalty", 0.0)))
    extra = {"min_new_tokens": fields["min_new_tokens"]} if "min_new_tokens" in fields else {}
    return generate(model, prompt, count, logits_processor=transformers.LogitsProcessorList(made), **extra)


FIELDS: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 2.0},
    {"presence_penalty": 2},
    {"frequency_penalty": -2.0, "presence_penalty": 2.0},  # once said and never said weigh the same
    {"logit_bias": {7: 100, 8: -100}},
    {"logit_bias": {200: 12.5}, "repetition_penalty": 3.0, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.5, "presence_penalty": 1.5},
    {},
]


@RUNNERS
def test_each_row_of_a_batch_is_changed_as_it_asked(llama: str, reference: Any, runner: str) -> None:
    """A penalty or a bias would work otherwise than its definition says, or on somebody else's answer."""
    prompts = [[number, 9, 17] for number in range(len(FIELDS))]

    async def scenario(driver: Driver) -> None:
        asked = [driver.add(prompt, max_new_tokens=40, **f) for prompt, f in zip(prompts, FIELDS, strict=True)]
        for answer, prompt, fields in zip(await driver.all(asked), prompts, FIELDS, strict=True):
            assert answer.token_ids == expected(reference, prompt, 40, fields), fields

    on(llama, scenario, runner=runner)


@RUNNERS
@pytest.mark.parametrize("least", [9, 12, 20])
def test_an_answer_has_its_least_length(ending: tuple[str, list[int]], runner: str, least: int) -> None:
    """An answer that was to be long would end early; or one that has its length would not end any more."""
    folder, short = ending
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = generate(model, [1, 2, 3], 30, min_new_tokens=least)
    ends = set(model.generation_config.eos_token_id)

    async def scenario(driver: Driver) -> None:
        plain = driver.add([1, 2, 3], max_new_tokens=30)
        answer = driver.add([1, 2, 3], max_new_tokens=30, min_new_tokens=least)
        exact = driver.add([1, 2, 3], max_new_tokens=least, min_new_tokens=least)
        await driver.all([plain, answer, exact])
        assert plain.token_ids == short
        assert answer.token_ids == [token for token in wanted if token not in ends]
        assert answer.usage.completion_tokens >= least
        assert len(exact.token_ids) == exact.usage.completion_tokens == least

    on(folder, scenario, runner=runner)


def test_stop_tokens_and_stop_words_wait_for_the_least_length(llama: str) -> None:
    """A stop that the caller named himself would end what he wanted longer."""

    async def scenario(driver: Driver) -> None:
        free = (await driver.ask([1, 2, 3], max_new_tokens=12, ignore_eos=True)).token_ids
        barred = driver.add([1, 2, 3], max_new_tokens=12, min_new_tokens=8, stop_token_ids=free[:3])
        words = driver.add([1, 2, 3], max_new_tokens=12, min_new_tokens=8, stop_words=list("abcdefghijklmnop,. ehrt"))
        every = driver.add([1, 2, 3], max_new_tokens=4, min_new_tokens=4, stop_token_ids=list(range(264)))
        await driver.all([barred, words, every])
        assert not set(barred.token_ids[:8]) & {*free[:3], EOS}
        assert len(words.token_ids) >= 8
        assert every.error is None  # nothing is left to choose, and others go on all the same

    on(llama, scenario)


def test_a_stop_word_is_kept_where_asked_for(llama: str) -> None:
    """A caller who splits at his own marker would lose it."""

    async def scenario(driver: Driver) -> None:
        letters: dict[str, Any] = {"max_new_tokens": 60, "logit_bias": dict.fromkeys(ids("abcdefghijklmnop"), 100)}
        free = await driver.ask("abc", **letters)
        word = free.text[20:23]
        without = await driver.ask("abc", **letters, stop_words=[word])
        kept = await driver.ask("abc", **letters, stop_words=[word], include_stop_str_in_output=True)
        assert kept.text == without.text + word == free.text[: free.text.index(word) + len(word)]
        assert kept.token_ids == free.token_ids[: len(kept.token_ids)]
        assert kept.reason == "stop"

    on(llama, scenario)


# ---------------------------------------------------------------------------------------------------------- the prompt


@RUNNERS
def test_only_the_last_tokens_of_a_prompt_are_read(llama: str, reference: Any, runner: str) -> None:
    """A prompt longer than asked for would be refused, or cut at its other end."""

    async def scenario(driver: Driver) -> None:
        text = "".join(chr(97 + number % 26) for number in range(9000))
        given: list[tuple[Any, list[int]]] = [([1, 2, 3, 4], [3, 4]), ("abcd", ids("cd")), (text, ids(text[-2:]))]
        asked = [
            driver.add(prompt, max_new_tokens=3, truncate_prompt_tokens=2, return_prompt_token_ids=True)
            for prompt, _ in given
        ]
        for answer, (_, read) in zip(await driver.all(asked), given, strict=True):
            assert answer.deltas[0].prompt_token_ids == read
            assert answer.token_ids == generate(reference, read, 3)
            assert answer.usage.prompt_tokens == 2
        short = await driver.ask([5], max_new_tokens=1, truncate_prompt_tokens=300, return_prompt_token_ids=True)
        assert short.whole.prompt_token_ids == [5]
        with pytest.raises(PromptTooLongError):
            driver.add([7] * 2000, truncate_prompt_tokens=1000)

    on(llama, scenario, runner=runner)


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({}, "<user>hi<assistant>wel<assistant>"),
        ({"add_generation_prompt": True}, "<user>hi<assistant>wel<assistant>"),
        ({"add_generation_prompt": False}, "<user>hi<assistant>wel"),
        ({"continue_final_message": True}, "<user>hi<assistant>wel"),
        ({"chat_template_kwargs": {"mood": "!"}}, "!<user>hi<assistant>wel<assistant>"),
        ({"chat_template_kwargs": {"mood": "!"}, "continue_final_message": True}, "!<user>hi<assistant>wel"),
    ],
)
def test_a_conversation_is_put_to_the_model_as_asked(tmp_path: Path, fields: dict[str, Any], rendered: str) -> None:
    """An answer that a client has begun would be begun anew, or the template would not hear of its variables."""
    folder = save_model(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ mood }}" + template.read_text())

    async def scenario(driver: Driver) -> None:
        answer = await driver.ask(CHAT, max_new_tokens=1, return_prompt_token_ids=True, **fields)
        assert answer.deltas[0].prompt_token_ids == ids(rendered)
        alone = await driver.ask(
            "q", raw=False, max_new_tokens=1, return_prompt_token_ids=True, chat_template_kwargs={"mood": "?"}
        )
        assert alone.whole.prompt_token_ids == ids("?<user>q<assistant>")

    on(folder, scenario, self_check=False)


def test_variables_without_a_template_are_refused(tmp_path: Path) -> None:
    """A switch such as enable_thinking would be ignored without a word."""
    folder = save_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()

    async def scenario(driver: Driver) -> None:
        with pytest.raises(InvalidRequestError, match="need a chat template") as refused:
            driver.add("hi", raw=False, chat_template_kwargs={"enable_thinking": False})
        assert refused.value.param == "chat_template_kwargs"

    on(folder, scenario, self_check=False)


def close(found: PromptLogprobs | None, model: Any, prompt: Sequence[int], likely: int) -> bool:
    """Whether they are those of the model's own forward."""
    assert found is not None
    with torch.no_grad():
        own = model(torch.tensor([list(prompt)])).logits[0].double().log_softmax(-1)
    assert len(found) == len(prompt)
    assert found[0] is None
    for place, entry in enumerate(found[1:]):
        assert entry is not None
        best = own[place].topk(likely).indices.tolist()
        assert list(entry) == [prompt[place + 1], *(token for token in best if token != prompt[place + 1])]
        assert all(abs(logprob - float(own[place, token])) < 1e-4 for token, logprob in entry.items())
    return True


@RUNNERS
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_prompt_logprobs_are_the_models_own(tmp_path: Path, runner: str, family: str) -> None:
    """A multiple-choice test would rank answers by numbers that are not the model's, or change answers beside it."""
    window = {"sliding_window": 24} if family == "mistral" else {}
    folder = save_model(tmp_path, family=family, sharpness=2.0, **window)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    long = [token * 7 % 251 for token in range(400)]  # read in several pieces

    async def scenario(driver: Driver) -> None:
        beside = [driver.add([5, number], max_new_tokens=40) for number in range(3)]
        asked = [
            driver.add(long, max_new_tokens=5, prompt_logprobs=3),
            driver.add([4, 9, 2], max_new_tokens=5, prompt_logprobs=0, logprobs=1, temperature=1.0, random_seed=3),
            driver.add([8], max_new_tokens=5, prompt_logprobs=20),
        ]
        await driver.all([*beside, *asked])
        for answer, prompt, likely in zip(asked, (long, [4, 9, 2], [8]), (3, 0, 20), strict=True):
            first, *others = answer.deltas
            assert first.prompt_token_ids == prompt
            assert close(first.prompt_logprobs, model, prompt, likely)
            assert all(delta.prompt_logprobs is None and delta.prompt_token_ids is None for delta in others)
        assert asked[0].token_ids == generate(model, long, 5)
        for number, answer in enumerate(beside):
            assert answer.token_ids == generate(model, [5, number], 40)
            assert answer.whole.prompt_logprobs is None

    on(folder, scenario, runner=runner)


@RUNNERS
def test_a_prompt_that_cannot_be_read_fails_alone(llama: str, runner: str) -> None:
    """One request's fault while its prompt is read would end the engine for all."""

    async def scenario(driver: Driver) -> None:
        model = driver.runner._model
        forward = model.forward

        def picky(*args: Any, **kwargs: Any) -> Any:
            if set(kwargs) == {"input_ids", "use_cache"}:  # as a prompt is read beside what generates
                raise ValueError("not twice")
            return forward(*args, **kwargs)

        model.forward = picky
        beside = driver.add([1, 2], max_new_tokens=20)
        failed = driver.add([3, 4, 5], max_new_tokens=20, prompt_logprobs=1)
        await driver.all([beside, failed])
        assert isinstance(failed.error, EngineError)
        assert "not twice" in str(failed.error)
        assert beside.error is None
        assert (await driver.ask([3, 4, 5], max_new_tokens=3)).error is None
        assert not driver.deaths

    on(llama, scenario, runner=runner)


@RUNNERS
def test_an_abort_ends_the_reading_of_a_prompt(llama: str, runner: str) -> None:
    """A client that leaves while its prompt is read would hold up others, or leave its tokens in the cache."""

    async def scenario(driver: Driver) -> None:
        answer: Answer = driver.add([3] * 400, max_new_tokens=50, prompt_logprobs=1)
        await asyncio.sleep(0)
        driver.abort(answer)
        assert answer.reason == "abort"
        assert answer.whole.prompt_logprobs is None
        assert (await driver.ask([3, 4], max_new_tokens=3, prompt_logprobs=0)).whole.prompt_logprobs is not None

    on(llama, scenario, runner=runner)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_bias_for_no_token_is_refused_by_its_number(llama: str) -> None:
    """A client with another model's tokenizer would get answers that its bias did nothing to."""

    async def scenario(driver: Driver) -> None:
        with pytest.raises(InvalidRequestError, match=r"the token 264, .* from 0 to 263") as refused:
            driver.add([1], logit_bias={3: 1.0, 264: 1.0})
        assert refused.value.param == "logit_bias"
        assert (await driver.ask([1], max_new_tokens=1, logit_bias={263: 100})).token_ids == [263]

    on(llama, scenario)


# ------------------------------------------------------------------------------------------- what others in it ask for

_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 299), st.floats(-100, 100), max_size=5),
        "min_new_tokens": st.integers(0, 8),
        "repetition_penalty": st.floats(0.5, 3),
        "temperature": st.floats(0, 3),
        "top_p": st.floats(0.1, 1),
        "random_seed": st.integers(0, 9),
        "logprobs": st.integers(0, 3),
    },
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(_OPTIONS, min_size=1, max_size=6), data=st.data())
def test_a_mixed_batch_equals_each_alone(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """An answer would depend on what others in its batch ask for, or on the steps it had to wait."""
    size, steps = 300, 8
    stops = frozenset({0, 7, 299, 5000})
    raw = torch.randn(steps, len(rows), size, generator=torch.Generator().manual_seed(1)) * 2

    def made(row: int) -> Plan:
        fields = {"random_seed": row, "do_sample": "temperature" in rows[row], **rows[row]}
        return Plan(GenerationConfig(**fields), [row, 3], stops)

    def step(sampler: Sampler, plans: list[Plan], scores: torch.Tensor) -> list[int]:
        sampler.prepare(plans)
        return (sampler.choose(scores) if sampler.active else scores.argmax(-1)).tolist()

    alone = []
    for row in range(len(rows)):
        sampler, plan = Sampler(size, 1), made(row)
        alone.append([step(sampler, [plan], raw[place, row : row + 1])[0] for place in range(steps)])
        assert not stops & set(alone[-1][: rows[row].get("min_new_tokens", 0)])
    together = Sampler(size, len(rows))
    plans, found = [made(row) for row in range(len(rows))], [[] for _ in rows]  # type: list[Plan], list[list[int]]
    while any(len(answer) < steps for answer in found):
        left = [row for row in range(len(rows)) if len(found[row]) < steps]
        batch = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        scores = torch.stack([raw[len(found[row]), row] for row in batch])
        for row, token in zip(batch, step(together, [plans[row] for row in batch], scores), strict=True):
            found[row].append(token)
    assert found == alone
