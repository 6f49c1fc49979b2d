"""The main job: a crowd of threads, mixed in everything, on the bundled model; answers are checked by meaning."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.demo_model import world
from examples.demo_model.world import Question
from lmbridge import Bridge, GenerationConfig
from tests.conftest import until

THREADS = 64
PROMPTS_EACH = 20


def draw(rng: random.Random) -> Question:
    """A question of any kind that has one right answer."""
    kind = rng.choice(["capital", "capital", "sum", "sum", "colour", "opposite", "story"])
    if kind == "capital":
        return world.capital_question(rng.choice(world.CAPITAL_PHRASINGS), rng.choice(list(world.CAPITALS)))
    if kind == "sum":
        return world.sum_question(rng.choice(world.SUM_PHRASINGS), rng.randrange(10, 50), rng.randrange(10, 50))
    if kind == "colour":
        return world.colour_question(rng.choice(world.COLOUR_PHRASINGS), rng.choice(list(world.COLOURS)))
    if kind == "opposite":
        return world.opposite_question(rng.choice(world.OPPOSITE_PHRASINGS), rng.choice(list(world.OPPOSITES)))
    return world.story_request(rng.choice(world.SHORT_STORY_PHRASINGS), rng.choice(world.ANIMALS))


def settings(rng: random.Random) -> GenerationConfig:
    """Settings under which a model that knows the answer still gives it."""
    return rng.choice(
        [
            GenerationConfig(),
            GenerationConfig(max_new_tokens=300, logprobs=2),
            GenerationConfig(temperature=0.2, random_seed=rng.randrange(1000)),
            GenerationConfig(temperature=1.0, top_k=1),
            GenerationConfig(top_p=0.5, random_seed=rng.randrange(1000)),
            GenerationConfig(min_p=0.6, random_seed=rng.randrange(1000)),
            GenerationConfig(stop_words=["\n", "never said"]),
            GenerationConfig(do_sample=False, repetition_penalty=1.0),
        ]
    )


def by_infer(bridge: Bridge, text: str, config: GenerationConfig) -> str:
    return bridge.infer(text, config).text


def by_stream(bridge: Bridge, text: str, config: GenerationConfig) -> str:
    return "".join(delta.text for delta in bridge.stream(text, config))


def by_future(bridge: Bridge, text: str, config: GenerationConfig) -> str:
    return bridge.submit(text, config).result(120).text


def by_list(bridge: Bridge, text: str, config: GenerationConfig) -> str:
    return bridge.infer([text, "What is the capital of France?"], config)[0].text


def by_conversation(bridge: Bridge, text: str, config: GenerationConfig) -> str:
    return bridge.infer([{"role": "user", "content": text}], config).text


@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_mixed_crowd(demo: Bridge) -> None:
    """64 threads with 20 prompts each, mixed in kind, length, settings and verb: each gets its own answer.

    What the model cannot answer even alone says nothing about whose answer is whose, and is left out.
    """
    rng = random.Random(5)
    questions = [draw(rng) for _ in range(THREADS * PROMPTS_EACH)]
    alone = demo.infer([question.text for question in questions])
    known = [world.is_right(question, answer.text) for question, answer in zip(questions, alone, strict=True)]
    assert sum(known) > 0.97 * len(questions)
    verbs: list[Callable[[Bridge, str, GenerationConfig], str]] = [
        by_infer, by_stream, by_future, by_list, by_conversation,
    ]  # fmt: skip

    def ask(thread: int) -> list[tuple[Question, str]]:
        own = random.Random(thread)
        mine = range(thread * PROMPTS_EACH, (thread + 1) * PROMPTS_EACH)
        return [
            (questions[number], own.choice(verbs)(demo, questions[number].text, settings(own)))
            for number in mine
            if known[number]
        ]

    with ThreadPoolExecutor(THREADS) as pool:
        answered = [pair for pairs in pool.map(ask, range(THREADS)) for pair in pairs]
    wrong = [(question.text, answer) for question, answer in answered if not world.is_right(question, answer)]
    assert len(answered) == sum(known)
    assert wrong == []
    assert demo.requests() == []
    assert demo.stats()["in_flight"] == 0


def test_leaving_a_story_saves_its_tokens(demo: Bridge) -> None:
    """A stream left by break stops the engine: it has generated a fraction of what the whole story takes."""
    prompt = "Tell me a long story about a fox."
    whole = demo.infer(prompt).usage.completion_tokens
    before = demo.stats()["tokens"]
    for _ in demo.stream(prompt):
        break
    until(lambda: not demo.stats()["in_flight"])
    assert demo.stats()["tokens"] - before < whole / 2


def test_a_seed_gives_the_same_text_in_a_crowd(demo: Bridge) -> None:
    """A seeded, sampled answer is the same alone and among 31 others."""
    config = GenerationConfig(temperature=0.8, random_seed=11)
    prompt = "Tell me a story about an owl."
    alone = demo.infer(prompt, config).text
    others = [f"Tell me a story about a {name}." for name in ("fox", "bear", "cat")]
    crowd = [others[number % 3] for number in range(31)]
    futures = [demo.submit(text, temperature=1.0) for text in crowd[:15]]
    among = demo.submit(prompt, config)
    futures += [demo.submit(text, temperature=1.0) for text in crowd[15:]]
    assert among.result(120).text == alone
    assert len({future.result(120).text for future in futures}) > 3  # the crowd itself is not seeded
