"""What the transformers engine answers: the same as ``model.generate``, for each request as if it were alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmbridge.engines.transformers.sampling import Sampler
from lmbridge.errors import UnsupportedOptionError
from tests.engines.conftest import BYTES, EOS, Brake, driven, generate, save_model

PROMPTS = [[5, 9, 200], [7] * 40, list(range(1, 130)), [250, 3], list(range(200, 20, -1)), [77]]


def test_greedy_equals_generate_at_several_lengths(llama: str, reference: Any) -> None:
    """Answers of the bridge would differ from those of the model used directly."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            answers = await driver.all([driver.add(prompt, max_new_tokens=40) for prompt in PROMPTS])
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.token_ids == generate(reference, prompt, 40)
            assert answer.reason == "length"
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 40)

    asyncio.run(scenario())


def test_arrivals_in_the_middle_of_decoding_disturb_nobody(llama: str, reference: Any) -> None:
    """An answer would change when somebody else's prompt joins its batch."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            answers = []
            for prompt in PROMPTS:
                answers.append(driver.add(prompt, max_new_tokens=60))
                await answers[-1].first()
            await driver.all(answers)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.token_ids == generate(reference, prompt, 60)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {"head_dim": 24}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1}),
    ],
)
def test_other_shapes_of_models_equal_generate(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """A model with a sliding window, or with other heads, would answer wrongly."""
    model = save_model(tmp_path, family=family, **settings)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)

    async def scenario() -> None:
        async with driven(model, max_chunk_size=48) as driver:
            answers = [driver.add(prompt, max_new_tokens=40) for prompt in PROMPTS]
            await answers[-1].first()
            late = driver.add([78], max_new_tokens=40)  # its prompt is one token, as if it were decoding
            await driver.all([*answers, late])
        for prompt, answer in zip([*PROMPTS, [78]], [*answers, late], strict=True):
            assert answer.token_ids == generate(reference, prompt, 40)

    asyncio.run(scenario())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_of_transformers_can_be_asked_for(llama: str, reference: Any, attention: str) -> None:
    """attn_implementation would be ignored, or fail."""

    async def scenario() -> None:
        async with driven(llama, attn_implementation=attention, max_chunk_size=64) as driver:
            answers = await driver.all([driver.add(prompt, max_new_tokens=20) for prompt in PROMPTS])
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.token_ids == generate(reference, prompt, 20)

    asyncio.run(scenario())


def test_a_long_prompt_is_read_in_chunks(llama: str, reference: Any) -> None:
    """One long prompt would stop everybody's answers until it is read."""

    async def scenario() -> None:
        prompt = [token % 250 for token in range(400)]
        async with driven(llama, max_chunk_size=64, max_batch_size=8) as driver:
            first = driver.add([1, 2, 3], max_new_tokens=60)
            await first.first()
            before = driver.stat("steps")
            second = await driver.add(prompt, max_new_tokens=5).first()
            assert driver.stat("steps") - before >= 400 // 64
            await driver.all([first, second])
        assert second.token_ids == generate(reference, prompt, 5)
        assert first.token_ids == generate(reference, [1, 2, 3], 60)

    asyncio.run(scenario())


def test_each_step_has_a_token_for_everyone_while_a_long_prompt_is_read(llama: str) -> None:
    """Somebody's long prompt would make the others' texts stand still until it is read."""

    async def scenario() -> None:
        async with driven(llama, max_chunk_size=32, max_batch_size=8) as driver:
            brake = Brake(driver)
            streams = [driver.add([number, 7], max_new_tokens=100) for number in range(4)]
            while not all(stream.deltas for stream in streams):
                await brake.arrival()
                brake.step()
            await brake.arrival()
            long = driver.add([token % 250 for token in range(400)], max_new_tokens=2)
            seen, steps = [len(stream.token_ids) for stream in streams], 0
            while not long.deltas:
                brake.step()
                await brake.arrival()
                steps += 1
                assert [len(stream.token_ids) for stream in streams] == [count + steps for count in seen]
            assert steps >= 400 // 32
            brake.lift()
            await driver.all([*streams, long])

    asyncio.run(scenario())


@pytest.mark.parametrize("blocks", [12, 20])
def test_a_cache_smaller_than_the_demand_changes_no_answer(llama: str, reference: Any, blocks: int) -> None:
    """Under load, requests whose cache is taken away would go on wrongly, twice, or never."""
    prompts = [[(7 * number + token) % 250 for token in range(10 + number)] for number in range(12)]

    async def scenario() -> None:
        async with driven(llama, num_blocks=blocks, page_size=16) as driver:
            greedy = [driver.add(prompt, max_new_tokens=50) for prompt in prompts]
            seeded = [driver.add(prompt, max_new_tokens=50, random_seed=1, logprobs=1) for prompt in prompts[:4]]
            await driver.all(greedy + seeded)
            assert driver.stat("cache_free") == 1.0
        async with driven(llama) as driver:
            roomy = await driver.all(
                [driver.add(prompt, max_new_tokens=50, random_seed=1, logprobs=1) for prompt in prompts[:4]]
            )
        for prompt, answer in zip(prompts, greedy, strict=True):
            assert answer.token_ids == generate(reference, prompt, 50)
        for tight, wide in zip(seeded, roomy, strict=True):
            assert tight.token_ids == wide.token_ids
            assert [next(iter(entry)) for entry in tight.logprobs] == tight.token_ids

    asyncio.run(scenario())


def test_a_common_beginning_is_shared_and_changes_no_answer(llama: str, reference: Any) -> None:
    """Prompts with the same system message would be read in full each time, or mix their answers."""
    common = [token % 250 for token in range(150)]

    async def scenario() -> None:
        async with driven(llama, max_chunk_size=32, max_batch_size=8) as driver:
            await driver.ask(common, max_new_tokens=2)
            before = driver.stat("steps")
            answers = await driver.all([driver.add([*common, tail], max_new_tokens=3) for tail in range(6)])
            assert driver.stat("steps") - before < 10  # alone, each would take five for its prompt
        for tail, answer in enumerate(answers):
            assert answer.token_ids == generate(reference, [*common, tail], 3)

    asyncio.run(scenario())


# ---------------------------------------------------------------------------------------------------------- how it ends


def test_stop_words_over_several_tokens(llama: str) -> None:
    """The marker that ends an answer would be shown, or would not end it."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            free = await driver.ask("tell me", max_new_tokens=60)
            readable = [place for place in range(20, 50) if "�" not in free.text[place : place + 3]]
            word = free.text[readable[0] : readable[0] + 3]
            answer = await driver.ask("tell me", max_new_tokens=60, stop_words=["never this", word])
            assert answer.text == free.text[: free.text.index(word)]
            assert answer.reason == "stop"
            assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
            assert len(answer.token_ids) < answer.usage.completion_tokens < 60
            unmet = await driver.ask("tell me", max_new_tokens=60, stop_words=["never this", free.text[-2:] + "x"])
            assert (unmet.text, unmet.token_ids, unmet.reason) == (free.text, free.token_ids, "length")

    asyncio.run(scenario())


def test_a_stop_word_spares_the_rest_of_the_answer(llama: str) -> None:
    """The engine would go on generating what nobody will read."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            free = await driver.ask("tell me", max_new_tokens=10)
            before = driver.stat("tokens")
            answer = await driver.ask("tell me", max_new_tokens=400, stop_words=[free.text[:1]])
            assert answer.text == ""
            await driver.ask([1], max_new_tokens=3)  # leaves time for what should not happen
            assert driver.stat("tokens") - before < 200  # steps go on until the loop has had its turn
            assert driver.holders == set()

    asyncio.run(scenario())


def test_stop_token_ids_end_the_answer_and_are_left_out(llama: str, reference: Any) -> None:
    """A token that was to end the answer would stand in it."""

    async def scenario() -> None:
        free = generate(reference, [4, 5, 6], 30)
        stop = free[12]
        place = free.index(stop)
        async with driven(llama) as driver:
            answer = await driver.ask([4, 5, 6], max_new_tokens=30, stop_token_ids=[stop, 3], logprobs=0)
        assert answer.token_ids == free[:place]
        assert (answer.reason, answer.usage.completion_tokens) == ("stop", place + 1)
        assert len(answer.logprobs) == place

    asyncio.run(scenario())


@pytest.mark.parametrize("runner", ["paged", "plain"])
def test_the_models_own_end_tokens_end_the_answer(ending: tuple[str, list[int]], runner: str) -> None:
    """An answer would run on after its end, or show the token that ends it."""
    model, expected = ending

    async def scenario() -> None:
        async with driven(model, runner=runner) as driver:
            answer = await driver.ask([1, 2, 3], max_new_tokens=40)
            assert answer.token_ids == expected
            assert (answer.reason, answer.usage.completion_tokens) == ("stop", len(expected) + 1)
            exact = await driver.ask([1, 2, 3], max_new_tokens=len(expected) + 1)
            assert (exact.token_ids, exact.reason) == (expected, "stop")
            short = await driver.ask([1, 2, 3], max_new_tokens=len(expected))
            assert (short.token_ids, short.reason) == (expected, "length")

    asyncio.run(scenario())


@pytest.mark.parametrize("runner", ["paged", "plain"])
def test_ignore_eos_goes_on_but_minds_stop_token_ids(ending: tuple[str, list[int]], runner: str) -> None:
    """A measurement that needs answers of one length would not get them."""
    model, _ = ending

    async def scenario() -> None:
        async with driven(model, runner=runner) as driver:
            answer = await driver.ask([1, 2, 3], max_new_tokens=40, ignore_eos=True)
            assert len(answer.token_ids) == 40
            assert answer.reason == "length"
            later = answer.token_ids[20]
            stopped = await driver.ask([1, 2, 3], max_new_tokens=40, ignore_eos=True, stop_token_ids=[later])
            assert stopped.token_ids == answer.token_ids[: answer.token_ids.index(later)]
            assert stopped.reason == "stop"

    asyncio.run(scenario())


def test_skip_special_tokens_decides_whether_they_are_text(tmp_path: Path) -> None:
    """A user who wants to see the special tokens, or not to see them, would get the other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    with torch.no_grad():  # always the end token
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 1
        model.model.norm.weight.zero_()
        model.lm_head.register_parameter("bias", None)
    model.model.embed_tokens.weight.data[:] = 1.0
    model.model.norm.weight.data[:] = 1.0
    model.save_pretrained(tmp_path)

    async def scenario() -> None:
        async with driven(str(tmp_path)) as driver:
            for skip, text in ((True, ""), (False, "<eos><eos><eos>")):
                answer = await driver.ask([1], max_new_tokens=3, ignore_eos=True, skip_special_tokens=skip)
                assert (answer.text, answer.token_ids) == (text, [EOS] * 3)

    asyncio.run(scenario())


def test_the_answer_ends_where_the_room_ends(llama: str, reference: Any) -> None:
    """An answer longer than the context would be nonsense, or kill the engine."""

    async def scenario() -> None:
        async with driven(llama, max_context=64) as driver:
            answer = await driver.ask([8] * 50, max_new_tokens=500)
            assert answer.token_ids == generate(reference, [8] * 50, 14)
            assert answer.reason == "length"
            assert (await driver.ask([8] * 63, max_new_tokens=500)).usage.completion_tokens == 1

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------- text and prompts


def test_the_deltas_are_the_whole_text(llama: str) -> None:
    """A stream would show something else than the finished answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)

    async def scenario() -> None:
        async with driven(llama) as driver:
            answer = await driver.ask("🦊", max_new_tokens=200, temperature=1.5, random_seed=2)
            assert len(answer.deltas) > 100
            assert answer.text == tokenizer.decode(answer.token_ids)

    asyncio.run(scenario())


def test_a_text_is_one_user_message_unless_raw(llama: str, reference: Any) -> None:
    """A chat model would be given the question without its template, or a completion with one."""

    def ids(text: str) -> list[int]:
        return [BYTES[byte] for byte in text]

    async def scenario() -> None:
        async with driven(llama) as driver:
            chat = await driver.ask("hi", raw=False, max_new_tokens=4)
            same = await driver.ask([{"role": "user", "content": "hi"}], max_new_tokens=4)
            parts = await driver.ask(
                [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
                max_new_tokens=4,
            )
            plain = await driver.ask("hi", raw=True, max_new_tokens=4)
        assert chat.token_ids == same.token_ids == parts.token_ids
        assert chat.token_ids == generate(reference, ids("<user>hi<assistant>"), 4)
        assert plain.token_ids == generate(reference, ids("hi"), 4)

    asyncio.run(scenario())


def test_a_model_without_a_chat_template_takes_texts_as_they_are(tmp_path: Path, reference: Any) -> None:
    """A base model could not be used, or messages would be glued together in some way nobody chose."""
    save_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()

    async def scenario() -> None:
        async with driven(str(tmp_path)) as driver:
            answer = await driver.ask("hi", raw=False, max_new_tokens=4)
            assert answer.token_ids == generate(reference, [BYTES["h"], BYTES["i"]], 4)
            with pytest.raises(ValueError, match="no chat template"):
                driver.add([{"role": "user", "content": "hi"}])

    asyncio.run(scenario())


# ----------------------------------------------------------------------------------------------------------- sampling


def raw_logprobs(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """The model's own log-probabilities at each token of an answer."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    logprobs: torch.Tensor = logits.double().log_softmax(-1)
    return logprobs


def test_logprobs_are_those_of_the_models_own_forward(llama: str, reference: Any) -> None:
    """Log-probabilities would belong to another token, or to the sampler instead of the model."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            answers = await driver.all(
                [
                    driver.add([3, 4], max_new_tokens=20, logprobs=5),
                    driver.add([5, 6], max_new_tokens=20, logprobs=2, temperature=3.0, top_k=50, random_seed=1),
                    driver.add([5, 6], max_new_tokens=20),
                ]
            )
        for answer, prompt, count in zip(answers[:2], ([3, 4], [5, 6]), (5, 2), strict=True):
            expected = raw_logprobs(reference, prompt, answer.token_ids)
            assert len(answer.logprobs) == len(answer.token_ids) == 20
            for place, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
                assert next(iter(entry)) == token
                assert count <= len(entry) <= count + 1
                for candidate, logprob in entry.items():
                    assert math.isclose(logprob, float(expected[place, candidate]), abs_tol=2e-3)
        assert answers[2].whole.logprobs is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 2.5, "top_k": 20},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 3.0, "min_p": 0.05},
        {"repetition_penalty": 1.3, "temperature": 1.5},
        {"temperature": 1.5, "stop_words": ["xyz"], "logprobs": 1},
    ],
)
def test_a_seed_gives_the_same_text_alone_and_among_31_others(llama: str, settings: dict[str, Any]) -> None:
    """An answer that was to be reproducible would depend on who else is asking."""

    async def scenario() -> None:
        async with driven(llama) as driver:
            alone = await driver.ask([1, 2, 3, 4], max_new_tokens=40, random_seed=42, **settings)
            crowd = []
            for number in range(31):
                others: list[dict[str, Any]] = [{}, {"temperature": 1.2}, {"top_p": 0.5}, {"logprobs": 1}]
                crowd.append(driver.add([number + 1] * (number + 3), max_new_tokens=50, **others[number % 4]))
                if number == 15:
                    await crowd[3].first()
                    among = driver.add([1, 2, 3, 4], max_new_tokens=40, random_seed=42, **settings)
            await driver.all([among, *crowd])
            other = await driver.ask([1, 2, 3, 4], max_new_tokens=40, random_seed=43, **settings)
        assert among.text == alone.text
        assert among.token_ids == alone.token_ids
        assert other.token_ids != alone.token_ids

    asyncio.run(scenario())


def test_each_field_has_its_effect(llama: str, reference: Any) -> None:
    """A setting would be taken and silently do nothing."""
    prompt = [9, 8, 7]
    greedy = generate(reference, prompt, 30)

    async def scenario() -> None:
        async with driven(llama) as driver:

            async def tokens(**settings: Any) -> list[int]:
                return (await driver.ask(prompt, max_new_tokens=30, **settings)).token_ids

            for near_greedy in (
                {"temperature": 0.0},
                {"temperature": 1e-4},
                {"temperature": 5.0, "top_k": 1},
                {"temperature": 5.0, "top_p": 1e-6},
                {"temperature": 5.0, "min_p": 1.0},
                {"temperature": 5.0, "do_sample": False},
            ):
                assert await tokens(**near_greedy) == greedy, near_greedy
            free = await tokens(do_sample=True, temperature=5.0, random_seed=1)
            assert free != greedy
            for name, value in (("top_k", 5), ("top_p", 0.3), ("min_p", 0.3)):
                limited = await tokens(temperature=5.0, random_seed=1, **{name: value})
                assert limited != free, name
                ranks = [
                    int((row > row[token]).sum())
                    for row, token in zip(raw_logprobs(reference, prompt, limited), limited, strict=True)
                ]
                assert max(ranks) < (5 if name == "top_k" else 100)
            assert await tokens(repetition_penalty=1.4) == generate(reference, prompt, 30, repetition_penalty=1.4)
            assert await tokens(do_sample=True) != await tokens(do_sample=True)

    asyncio.run(scenario())


def test_a_batch_of_greedy_requests_never_enters_the_sampler(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user would pay for sampling that only some asked for."""

    async def scenario() -> None:
        async with driven(llama) as driver:

            def refuse(*args: Any) -> torch.Tensor:
                raise AssertionError("called")

            monkeypatch.setattr(Sampler, "choose", refuse)
            answers = await driver.all([driver.add(prompt, max_new_tokens=5) for prompt in PROMPTS])
            assert [answer.reason for answer in answers] == ["length"] * len(PROMPTS)

    asyncio.run(scenario())


def test_the_sampler_of_a_cuda_graph_chooses_the_same_tokens(llama: str) -> None:
    """Answers would change when graphs are switched on; here on a CPU, where only the sampler runs as in a graph."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.3, "random_seed": 1},
        {"temperature": 1.5, "top_k": 9, "random_seed": 2},
        {"top_p": 0.7, "temperature": 2.0, "random_seed": 3},
        {"min_p": 0.1, "repetition_penalty": 1.3, "random_seed": 4},
        {"repetition_penalty": 1.5},
    ]

    async def tokens(graphs: bool) -> list[list[int]]:
        async with driven(llama, cuda_graphs=graphs) as driver:
            answers = [driver.add([number, 4, 2], max_new_tokens=25, **each) for number, each in enumerate(settings)]
            return [answer.token_ids for answer in await driver.all(answers)]

    async def scenario() -> None:
        assert await tokens(True) == await tokens(False)
        async with driven(llama, cuda_graphs=True) as driver:
            with pytest.raises(UnsupportedOptionError, match="cuda_graphs=False"):
                driver.add([1], logprobs=2)

    asyncio.run(scenario())
