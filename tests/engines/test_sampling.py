"""How tokens are drawn: the same distributions as transformers' own processors give, from numbers of our own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.engines.transformers.sampling import Plan, Sampler, draw, draw_filtered, filtered, uniform
from lmbridge.messages import GenerationConfig

VOCABULARY = 500


def plan(**fields: Any) -> Plan:
    return Plan(GenerationConfig(**{"do_sample": True, **fields}))


def scores(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def theirs(row: torch.Tensor, fields: dict[str, Any], seen: list[int]) -> torch.Tensor:
    """What transformers' processors make of one row, in the order of ``generate``."""
    ids, row = torch.tensor([seen]), row.unsqueeze(0).clone()
    made: list[Any] = []
    if "repetition_penalty" in fields:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if "temperature" in fields:
        made.append(transformers.TemperatureLogitsWarper(fields["temperature"]))
    if fields.get("top_k"):
        made.append(transformers.TopKLogitsWarper(fields["top_k"]))
    if fields.get("top_p", 1.0) < 1.0:
        made.append(transformers.TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        made.append(transformers.MinPLogitsWarper(fields["min_p"]))
    for processor in made:
        row = processor(ids, row)
    return row[0]


def ours(raw: torch.Tensor, plans: list[Plan]) -> torch.Tensor:
    """The probabilities that our filters leave, over the whole vocabulary."""
    tokens, left = filtered(raw, plans)
    return torch.zeros_like(raw, dtype=torch.double).scatter(-1, tokens, left.softmax(-1))


def request(name: str, prompt: list[int], generated: list[int], true_prompt: int = 0) -> Any:
    """A request's state as transformers keeps it."""
    state = SimpleNamespace(
        request_id=name, initial_tokens=prompt, generated_tokens=generated, _true_initial_tokens=true_prompt
    )
    return SimpleNamespace(state=state, has_new_token=True)


def step(sampler: Sampler, requests: list[Any], raw: torch.Tensor) -> list[int]:
    """One engine step: what a manager that takes the most likely token would take."""
    sampler.prepare_tensor_args(requests, torch.empty(0))
    if sampler.do_processing:
        raw = sampler(torch.empty(0), raw.clone(), torch.empty(0))
    return [int(token) for token in raw.argmax(-1)]


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_k": VOCABULARY + 7},
    {"top_p": 0.3},
    {"top_p": 0.999, "temperature": 4.0},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"top_p": 0.0001},
    {"min_p": 1.0},
]


def test_filters_equal_those_of_transformers_row_by_row() -> None:
    """The same settings would give other texts than ``model.generate`` does."""
    raw = scores(len(MIXED))
    found_in_rows = ours(raw, [plan(**fields) for fields in MIXED])
    for row, fields in enumerate(MIXED):
        expected = theirs(raw[row], fields, [0]).softmax(-1)
        found = found_in_rows[row]
        assert torch.equal(found > 0, expected > 0), fields
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 600),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_filters_equal_at_any_setting(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    """Some combination of settings would be honoured differently."""
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    raw = scores(1, seed)
    expected = theirs(raw[0], fields, [0]).softmax(-1)
    found = ours(raw, [plan(**fields)])[0]
    assert float((found - expected).abs().sum()) < 1e-3  # theirs sums in single precision


@pytest.mark.parametrize("size", [3072, 5003, 20_000])
@pytest.mark.parametrize("fields", [{"top_k": 20}, {"top_k": 60, "top_p": 0.7}, {"top_p": 0.4}, {"min_p": 0.2}])
def test_filters_equal_over_large_vocabularies(size: int, fields: dict[str, Any]) -> None:
    """A likely token would be missing where not the whole vocabulary is sorted."""
    raw = 3 * torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    found = ours(raw, [plan(**fields)] * 4)
    for row in range(4):
        expected = theirs(raw[row], fields, [0]).softmax(-1)
        assert torch.equal(found[row] > 0, expected > 0)


def test_flat_distributions_need_more_than_the_head() -> None:
    """top_p would keep too few tokens where thousands are about equally likely."""
    flat = torch.linspace(0, 0.001, 5000).unsqueeze(0)
    for fields, count in (({"top_p": 0.9}, 4500), ({"min_p": 0.9995}, 2500), ({"top_k": 3000}, 3000)):
        kept = int((ours(flat, [plan(**fields)]) > 0).sum())
        assert abs(kept - count) < 15, fields


def test_tokens_of_equal_score_are_kept_together() -> None:
    """Models of half precision have many equal scores; which of them is kept would depend on the rest of the batch."""
    raw = torch.zeros(1, VOCABULARY)
    raw[0, 100:400] = 1.0
    raw[0, 7] = 2.0
    for fields in ({"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.2}):
        kept = (ours(raw, [plan(**fields)]) > 0)[0].nonzero().squeeze(-1).tolist()
        assert kept == [7, *range(100, 400)], fields


def test_repetition_penalty_covers_prompt_and_answer() -> None:
    """A model would repeat itself as if no penalty had been asked for."""
    raw = scores(1)
    best = [int(token) for token in raw[0].topk(3).indices]
    fields: dict[str, Any] = {"repetition_penalty": 5.0}
    sampler = Sampler()
    sampler.add("a", Plan(GenerationConfig(**fields)))
    generated: list[int] = []
    for _ in range(4):
        expected = int(theirs(raw[0], fields, [best[0], *generated]).argmax())
        token = step(sampler, [request("a", [best[0]], generated)], raw)[0]
        assert token == expected
        assert token not in [best[0], *generated]
        generated.append(token)


def test_repetition_penalty_survives_the_loss_of_the_cache() -> None:
    """A request whose cache was taken away would forget what it has said."""
    raw = scores(1)
    sampler = Sampler()
    sampler.add("a", Plan(GenerationConfig(repetition_penalty=3.0)))
    first = step(sampler, [request("a", [1, 2], [])], raw)[0]
    again = step(sampler, [request("a", [1, 2, first], [], true_prompt=2)], raw)[0]
    assert again == int(theirs(raw[0], {"repetition_penalty": 3.0}, [1, 2, first]).argmax())


def test_greedy_rows_pass_untouched_beside_sampled_ones() -> None:
    """One sampled request would change the answers of the greedy ones in its batch."""
    raw = scores(3)
    sampler = Sampler()
    sampler.add("b", plan(random_seed=1))
    sampler.prepare_tensor_args([request(name, [1], []) for name in "abc"], torch.empty(0))
    after = sampler(torch.empty(0), raw.clone(), torch.empty(0))
    assert torch.equal(after[0], raw[0])
    assert torch.equal(after[2], raw[2])


def test_a_batch_of_greedy_requests_costs_nothing() -> None:
    """Sampling nobody asked for would slow every step down."""
    sampler = Sampler()
    sampler.add("a", plan())
    sampler.remove("a")
    sampler.prepare_tensor_args([request("a", [1], [])], torch.empty(0))
    assert not sampler.do_processing
    assert not Plan(GenerationConfig(temperature=0.0)).needed
    assert not Plan(GenerationConfig(temperature=0.9, top_k=1)).needed


def test_only_rows_with_a_new_token_are_drawn() -> None:
    """While one prompt is read in parts, the others would get each other's tokens."""
    sampler = Sampler()
    raw = scores(1)
    sampler.add("b", plan(random_seed=4))
    reading = SimpleNamespace(state=request("a", [1], []).state, has_new_token=False)
    alone = Sampler()
    alone.add("b", plan(random_seed=4))
    assert step(sampler, [reading, request("b", [1], [])], raw) == step(alone, [request("b", [1], [])], raw)


def test_a_seed_gives_the_same_token_alone_and_in_a_crowd() -> None:
    """A seeded answer would depend on who else is asking."""
    raw = scores(32)
    crowd, alone = Sampler(), Sampler()
    for row in range(32):
        crowd.add(str(row), plan(random_seed=row, temperature=2.0, top_p=0.9 if row % 2 else None))
    alone.add("7", plan(random_seed=7, temperature=2.0, top_p=0.9))
    tokens = step(crowd, [request(str(row), [1], [5, 6]) for row in range(32)], raw)
    assert step(alone, [request("7", [1], [5, 6])], raw[7:8])[0] == tokens[7]


def test_the_position_counts_from_the_true_prompt() -> None:
    """A seeded answer would change when its cache is taken away in the middle."""
    raw = scores(1, spread=1.0)
    for count in range(1, 6):
        generated = list(range(count))
        first, second = Sampler(), Sampler()
        for sampler in (first, second):
            sampler.add("a", plan(random_seed=3))
        before = step(first, [request("a", [9, 9], generated)], raw)
        after = step(second, [request("a", [9, 9, *generated[:-1]], generated[-1:], true_prompt=2)], raw)
        assert before == after


def test_each_position_has_a_number_of_its_own() -> None:
    """A seeded answer would draw the same luck for every token."""
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(numbers)) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2500 - 0.5) < 0.03
    assert uniform(2**80 + 1, 0) == uniform(1, 0)  # seeds of any size


def chi_squared(drawing: Any, raw: torch.Tensor, made: Plan, expected: torch.Tensor, trials: int) -> float:
    """How far the frequencies of so many draws are from what is expected; tokens are taken together in 12 groups."""
    rows = raw.expand(trials, -1)
    tokens = drawing(rows, [made] * trials, [uniform(11, position) for position in range(trials)])
    assert float(expected[tokens].min()) > 0
    groups = torch.arange(len(expected)) % 12
    counts = torch.zeros(12).index_add(0, groups[tokens], torch.ones(trials)).double()
    hoped = torch.zeros(12).double().index_add(0, groups, expected.double()) * trials
    assert float(hoped[hoped > 0].min()) > 5
    return float(((counts - hoped) ** 2 / hoped.clamp(min=1e-9))[hoped > 0].sum())


@pytest.mark.parametrize("size", [12, 512, 1300])
def test_frequencies_match_the_distribution(size: int) -> None:
    """Sampled answers would be more or less varied than the settings say."""
    raw = torch.randn(1, size, generator=torch.Generator().manual_seed(3)) * 1.5
    for fields in ({"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.02}, {"top_p": 0.9}, {"min_p": 0.1}):
        expected = theirs(raw[0], fields, [0]).softmax(-1)
        assert chi_squared(draw_filtered, raw, plan(**fields), expected, 20_000) < 40
    for temperature in (1.0, 0.6, 2.0):
        expected = theirs(raw[0], {"temperature": temperature}, [0]).softmax(-1)
        # 11 degrees of freedom: one sound generator in 28,000 exceeds 40
        assert chi_squared(draw, raw, plan(temperature=temperature), expected, 20_000) < 40


def test_a_token_left_out_is_never_drawn() -> None:
    """A number at either end of its range would draw a token the filters excluded."""
    row = torch.full((1, 1030), -math.inf)
    row[0, 3] = row[0, 1025] = 0.0
    for number, token in ((0.0, 3), (0.4999, 3), (0.5, 1025), (1 - 2**-53, 1025)):
        assert int(draw(row, [plan()], [number])[0]) == token
        assert int(draw_filtered(row, [plan(top_k=2)], [number])[0]) == token


def test_requests_without_a_seed_differ() -> None:
    """The same prompt asked twice would always be answered alike."""
    assert plan().seed != plan().seed


def test_logprobs_are_the_models_own() -> None:
    """Log-probabilities would tell of the settings rather than of the model."""
    raw = scores(2)
    expected = raw.double().log_softmax(-1)
    sampler = Sampler()
    plans = {
        "a": Plan(GenerationConfig(logprobs=3, temperature=0.3, top_k=2, random_seed=5, repetition_penalty=2.0)),
        "b": Plan(GenerationConfig(logprobs=0)),
    }
    for name, made in plans.items():
        sampler.add(name, made)
    best = int(raw[0].argmax())
    tokens = step(sampler, [request("a", [best], []), request("b", [1], [])], raw)
    assert tokens[1] == int(raw[1].argmax())
    for row, (name, count) in enumerate((("a", 3), ("b", 0))):
        (entry,) = plans[name].logprobs
        likely = [int(token) for token in raw[row].topk(count).indices]
        assert list(entry) == [tokens[row], *(token for token in likely if token != tokens[row])]
        for token, logprob in entry.items():
            assert logprob == pytest.approx(float(expected[row, token]))
