"""How tokens are drawn: the same distributions as transformers' own processors give, from numbers of our own."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.engines.transformers import choosing
from lmbridge.engines.transformers.choosing import OPEN_END, Changes, Choice, Parts, choose
from lmbridge.engines.transformers.plan import Plan, uniform
from lmbridge.engines.transformers.sampling import Sampler
from lmbridge.messages import GenerationConfig

VOCABULARY = 500
HEAD = 64
SIZES = [VOCABULARY, 3072, 20_001]
NOTHING = Changes(*[torch.empty(0)] * len(Changes._fields))  # what is not looked at


def plan(prompt: Sequence[int] = (), **fields: Any) -> Plan:
    return Plan(GenerationConfig(**{"do_sample": True, **fields}), prompt)


def greedy(prompt: Sequence[int] = (), **fields: Any) -> Plan:
    return Plan(GenerationConfig(do_sample=False, **fields), prompt)


def scores(rows: int, seed: int = 0, spread: float = 3.0, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def theirs(row: torch.Tensor, fields: dict[str, Any], seen: list[int]) -> torch.Tensor:
    """What transformers' processors make of one row, in the order of ``generate``."""
    ids, row = torch.tensor([seen]), row.unsqueeze(0).clone()
    made: list[Any] = []
    if "repetition_penalty" in fields:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if "temperature" in fields:
        made.append(transformers.TemperatureLogitsWarper(fields["temperature"]))
    if fields.get("top_k"):
        made.append(transformers.TopKLogitsWarper(min(fields["top_k"], row.shape[-1])))
    if fields.get("top_p", 1.0) < 1.0:
        made.append(transformers.TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        made.append(transformers.MinPLogitsWarper(fields["min_p"]))
    for processor in made:
        row = processor(ids, row)
    return row[0]


def arguments(plans: Sequence[Plan], size: int) -> tuple[torch.Tensor, Parts]:
    """The settings of the plans' rows, and the parts of the program that they need."""
    sampler = Sampler(size, len(plans))
    sampler.prepare(plans)
    return torch.tensor([made.settings(size) for made in plans], dtype=torch.double), sampler.parts


def weights(raw: torch.Tensor, plans: Sequence[Plan], head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What our filters leave each token, over the whole vocabulary, and whether that head was enough."""
    rows, parts = arguments(plans, raw.shape[-1])
    parts = parts._replace(head=head)
    total = choosing.spread((raw / rows[:, :1].float()).softmax(-1)) if parts.open else None
    if head >= raw.shape[-1]:
        return choosing.filtered(raw, rows, total, parts), torch.ones(len(plans), dtype=torch.bool)
    tokens, left, enough = choosing.filtered_head(raw, rows, total, parts)
    return torch.zeros_like(raw, dtype=torch.double).scatter(-1, tokens, left), enough


def ours(raw: torch.Tensor, plans: Sequence[Plan], head: int | None = None) -> torch.Tensor:
    """The probabilities that our filters leave. The head must be large enough, and is all if none is given."""
    left, enough = weights(raw, plans, head or raw.shape[-1])
    assert bool(enough.all())
    return left / left.sum(-1, keepdim=True)


def step(sampler: Sampler, plans: Sequence[Plan], raw: torch.Tensor) -> list[int]:
    """One engine step: the tokens that a manager would get."""
    sampler.prepare(plans)
    tokens = sampler.choose(raw) if sampler.active else raw.argmax(-1)
    return [int(token) for token in tokens]


def alone(made: Plan, row: torch.Tensor) -> int:
    """The token that a plan gets in a batch of its own."""
    return step(Sampler(len(row), 1), [made], row.unsqueeze(0))[0]


def drawn(raw: torch.Tensor, made: Plan, numbers: Sequence[float]) -> torch.Tensor:
    """The tokens that these uniform numbers choose, one in each row of ``raw``."""
    rows, parts = arguments([made], raw.shape[-1])
    head = raw.shape[-1] if parts.head else 0
    moment = torch.tensor([(number, -1) for number in numbers], dtype=torch.double)
    return choose(raw, rows.expand(len(raw), -1), moment, NOTHING, parts._replace(head=head)).tokens


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_k": VOCABULARY + 7},
    {"top_k": VOCABULARY, "top_p": 0.99, "temperature": 3.0},
    {"top_p": 0.3},
    {"top_p": 0.999, "temperature": 4.0},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"top_p": 0.0001},
    {"min_p": 1.0},
    {"top_k": 300, "top_p": 0.95, "temperature": 2.0},
    {"top_p": 0.9, "min_p": 0.01},
]

# ------------------------------------------------------------------------------------------------------------- filters


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
    top_k=st.just(0) | st.integers(2, 600),  # 1 is greedy
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_filters_equal_at_any_setting(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    """Some combination of settings would be honoured differently."""
    fields: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    raw = scores(1, seed)
    expected = theirs(raw[0], fields, [0]).softmax(-1)
    found = ours(raw, [plan(**fields)])[0]
    assert float((found - expected).abs().sum()) < 1e-3  # theirs sums in single precision


@pytest.mark.parametrize("size", [3072, 5003, 20_000])
@pytest.mark.parametrize("fields", [{"top_k": 20}, {"top_k": 60, "top_p": 0.7}, {"top_p": 0.4}, {"min_p": 0.2}])
@pytest.mark.parametrize("head", [256, None])
def test_filters_equal_over_large_vocabularies(size: int, fields: dict[str, Any], head: int | None) -> None:
    """A likely token would be missing where not the whole vocabulary is looked at."""
    raw = scores(4, seed=size, size=size)
    found = ours(raw, [plan(**fields)] * 4, head)
    for row in range(4):
        expected = theirs(raw[row], fields, [0]).softmax(-1)
        assert torch.equal(found[row] > 0, expected > 0)


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.05, 3),
    top_k=st.just(0) | st.integers(2, 100),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.5),
    size=st.sampled_from(SIZES),
    halves=st.booleans(),
)
def test_a_head_that_is_enough_finds_what_the_whole_vocabulary_does(
    temperature: float, top_k: int, top_p: float, min_p: float, size: int, halves: bool
) -> None:
    """A seeded answer would depend on how many tokens are looked at, which others in the batch decide."""
    raw = scores(8, seed=size, size=size)
    raw = raw.bfloat16().float() if halves else raw  # many equal scores
    plans = [plan(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p or 0.001)] * 8
    of_all = weights(raw, plans, size)[0]
    for head in (HEAD, 256):
        of_head, enough = weights(raw, plans, head)
        assert torch.equal(of_head[enough], of_all[enough])


def test_flat_distributions_need_more_than_the_head() -> None:
    """top_p would keep too few tokens where thousands are about equally likely."""
    flat = torch.linspace(0, 0.001, 5000).unsqueeze(0)
    for fields, count in (({"top_p": 0.9}, 4500), ({"min_p": 0.9995}, 2500), ({"top_k": 3000}, 3000)):
        kept = int((ours(flat, [plan(**fields)]) > 0).sum())
        assert abs(kept - count) < 15, fields
        assert not bool(weights(flat, [plan(**fields)], HEAD)[1])


def test_top_p_next_to_one_keeps_everything() -> None:
    """A share that rounding puts out of reach would leave no token to draw."""
    raw = scores(50, spread=1.0)
    assert bool((ours(raw, [plan(top_p=1 - 1e-14)] * 50) > 0).all())


def test_rows_without_filters_do_not_ask_for_a_second_try() -> None:
    """Each step of a greedy request beside one with top_p would be computed twice."""
    plans = [greedy(), plan(), plan(top_p=0.5)]
    rows, parts = arguments(plans, VOCABULARY)
    assert 0 < parts.head < VOCABULARY
    moment = torch.tensor([(0.5, -1)] * 3, dtype=torch.double)
    assert choose(scores(3), rows, moment, NOTHING, parts).enough.tolist() == [True] * 3


def test_a_flat_row_among_others_gets_what_it_gets_from_the_whole_vocabulary() -> None:
    """A row whose head was too small would keep the token found in vain, or get a neighbour's."""
    raw = scores(6, size=5000)
    raw[1], raw[4] = torch.linspace(0, 0.001, 5000), torch.linspace(0.001, 0, 5000)
    plans = [plan(top_p=0.9, logprobs=2, repetition_penalty=1.5, random_seed=row) for row in range(6)]
    tokens = step(Sampler(5000, 6), plans, raw)
    for row in range(6):
        number = [uniform(row, 0)]
        assert tokens[row] == int(drawn(raw[row : row + 1], plan(top_p=0.9), number)[0])
        assert next(iter(plans[row].logprobs[0])) == tokens[row]


@pytest.mark.parametrize("head", [400, None])
def test_tokens_of_equal_score_are_kept_together(head: int | None) -> None:
    """Models of half precision have many equal scores; which of them is kept would depend on the rest of the batch."""
    raw = torch.zeros(1, VOCABULARY)
    raw[0, 100:400] = 1.0
    raw[0, 7] = 2.0
    for fields in ({"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.2}, {"top_k": 5, "top_p": 0.5}):
        kept = (ours(raw, [plan(**fields)], head) > 0)[0].nonzero().squeeze(-1).tolist()
        assert kept == [7, *range(100, 400)], fields
        assert not bool(weights(raw, [plan(**fields)], HEAD)[1])


# ------------------------------------------------------------------------------------------------- repetition penalty


def test_repetition_penalty_covers_prompt_and_answer() -> None:
    """A model would repeat itself as if no penalty had been asked for."""
    raw = scores(1)
    best = int(raw[0].argmax())
    made = greedy([best], repetition_penalty=5.0)
    sampler = Sampler(VOCABULARY, 1)
    seen = [best]
    for _ in range(4):
        expected = int(theirs(raw[0], {"repetition_penalty": 5.0}, seen).argmax())
        assert step(sampler, [made], raw) == [expected]
        assert expected not in seen
        seen.append(expected)


def test_a_penalty_stays_with_its_request_wherever_its_row_is() -> None:
    """A request would forget what it has said, or be told what another has, when others come and go."""
    raw = scores(3)
    prompts = {name: [int(token)] for name, token in zip("abc", raw.argmax(-1), strict=True)}
    plans = {name: greedy(list(prompts[name]), repetition_penalty=3.0) for name in "abc"}
    sampler = Sampler(VOCABULARY, 4)
    plain = greedy()
    for batch in ("ab", "ba", "b", "xbca", "cx", "abc", "c", "ab"):
        tokens = step(sampler, [plans.get(name, plain) for name in batch], raw[:1].expand(len(batch), -1))
        for name, token in zip(batch, tokens, strict=True):
            if name == "x":
                assert token == int(raw[0].argmax())
            else:
                assert token == int(theirs(raw[0], {"repetition_penalty": 3.0}, prompts[name]).argmax())
                prompts[name].append(token)


def test_a_request_takes_no_penalty_over_from_one_that_is_gone() -> None:
    """The next request in a row would avoid the words of the last."""
    raw = scores(1)
    sampler = Sampler(VOCABULARY, 1)
    step(sampler, [greedy([3, int(raw.argmax())], repetition_penalty=3.0)], raw)
    gc.collect()
    for made in (greedy([5], repetition_penalty=1.0001), greedy(logprobs=0)):
        assert step(sampler, [made], raw) == [int(raw.argmax())]


def test_tokens_that_the_model_does_not_have_are_no_matter_to_the_penalty() -> None:
    """A prompt with an image's placeholder token would end the generation thread."""
    raw = scores(1)
    made = greedy([-1, VOCABULARY, VOCABULARY + 90, int(raw.argmax())], repetition_penalty=9.0)
    assert step(Sampler(VOCABULARY, 1), [made], raw) != [int(raw.argmax())]


# ------------------------------------------------------------------------------------------------------ rows of a batch


def test_greedy_rows_get_their_most_likely_token_beside_sampled_ones() -> None:
    """One sampled request would change the answers of the greedy ones in its batch."""
    raw = scores(3).round()
    raw[0, [20, 400]] = raw[2, [7, 8]] = 99.0  # the first of two
    before = raw.clone()
    tokens = step(Sampler(VOCABULARY, 3), [greedy(), plan(random_seed=1), greedy()], raw)
    assert tokens[::2] == [20, 7]
    assert tokens[::2] == before[::2].argmax(-1).tolist()
    assert torch.equal(raw, before)


def test_a_batch_of_greedy_requests_costs_nothing() -> None:
    """Sampling nobody asked for would slow every step down."""
    sampler = Sampler(VOCABULARY, 2)
    assert not sampler.active
    made = greedy()
    for count in (1, 2):
        sampler.prepare([made])
        assert not sampler.active
        assert made.position == count
    sampler.prepare([made, plan()])
    assert sampler.active
    sampler.prepare([made])
    assert not sampler.active
    assert sampler.steps == 4
    assert sampler.choose(scores(1)).tolist() == [int(scores(1).argmax())]  # it may be asked all the same
    assert not Plan(GenerationConfig(temperature=0.0)).needed
    assert not Plan(GenerationConfig(temperature=0.9, top_k=1)).needed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_seeded_row_is_the_same_alone_and_in_a_crowd(size: int, threads: int) -> None:
    """A seeded answer, or its log-probabilities, would depend on who else is asking."""
    kinds = [*MIXED, {"do_sample": False}, {"logprobs": 20}, {"repetition_penalty": 1.3, "top_p": 0.9}]
    kinds += [{"do_sample": False, "repetition_penalty": 2.0, "logprobs": 2}, {"top_k": 300}, {"temperature": 0.0}]
    count = 2 * len(kinds)
    raw = scores(count, size=size, spread=2.0)

    def made(row: int) -> Plan:
        return plan([row, row + 1], **{"random_seed": row, **kinds[row % len(kinds)]})

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        crowd, lonely = [made(row) for row in range(count)], [made(row) for row in range(count)]
        sampler = Sampler(size, count)
        for _ in range(3):
            tokens = step(sampler, crowd, raw)
            assert [alone(lonely[row], raw[row]) for row in range(count)] == tokens
            for row in range(count):
                lonely[row].prompt = [*lonely[row].prompt, tokens[row]]  # each time alone is a sampler of its own
    finally:
        torch.set_num_threads(before)
    assert [other.logprobs for other in lonely] == [mine.logprobs for mine in crowd]


def test_the_token_depends_on_seed_and_position_alone() -> None:
    """A seeded answer would change with the steps in which its request had to wait."""
    raw = scores(1, spread=1.0)
    sampler, made, other = Sampler(VOCABULARY, 2), plan(random_seed=3, top_k=200), plan(top_p=0.5)
    rows = raw.expand(2, -1)
    found = [step(sampler, batch, rows[: len(batch)])[0] for batch in ([made], [made, other], [made])]
    step(sampler, [other], raw)
    found.append(step(sampler, [other, made], rows)[1])
    numbers = [uniform(3, position) for position in range(4)]
    assert found == drawn(raw.expand(4, -1), plan(top_k=200), numbers).tolist()
    assert made.position == 4


def test_a_row_that_is_not_a_number_harms_no_other() -> None:
    """A model that overflows for one prompt would break the answers of all, or end the generation thread."""
    plans = [plan(random_seed=row, logprobs=1, repetition_penalty=1.1, **MIXED[row]) for row in range(len(MIXED))]
    raw = scores(len(MIXED), size=3072)
    expected = step(Sampler(3072, len(MIXED)), plans, raw)
    for broken in (math.nan, math.inf, -math.inf):
        for row in range(len(MIXED)):
            again = [plan(random_seed=at, repetition_penalty=1.1, **fields) for at, fields in enumerate(MIXED)]
            spoilt = raw.clone()
            spoilt[row] = broken
            tokens = step(Sampler(3072, len(MIXED)), again, spoilt)
            assert 0 <= tokens.pop(row) < 3072
            assert tokens == expected[:row] + expected[row + 1 :]


def test_scores_of_half_precision_are_taken_as_they_are() -> None:
    """A model loaded in bfloat16 could not be sampled from."""
    raw = scores(4).bfloat16()
    plans = [plan(random_seed=row % 2, top_p=0.9) for row in range(4)]
    halves = step(Sampler(VOCABULARY, 4), plans[:2], raw[:2])
    assert halves == step(Sampler(VOCABULARY, 4), plans[2:], raw[:2].float())


def test_more_requests_than_rows_are_refused() -> None:
    """A step would fail with an error that speaks of tensors."""
    with pytest.raises(ValueError, match="2 rows, and got 3 plans"):
        Sampler(VOCABULARY, 2).prepare([plan(), plan(), plan()])


def test_an_empty_step_chooses_nothing() -> None:
    """A step that only reads prompts would end the generation thread."""
    sampler = Sampler(VOCABULARY, 2)
    step(sampler, [plan(top_p=0.5)], scores(1))
    sampler.prepare([])
    assert not sampler.active
    assert sampler.choose(scores(0)).tolist() == []


# ------------------------------------------------------------------------------------------------------------- drawing


def test_each_position_has_a_number_of_its_own() -> None:
    """A seeded answer would draw the same luck for every token."""
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(numbers)) == 2500
    assert all(0 <= number <= OPEN_END for number in numbers)
    assert abs(sum(numbers) / 2500 - 0.5) < 0.03
    assert uniform(2**80 + 1, 0) == uniform(1, 0)  # seeds of any size
    made = plan(random_seed=7)
    assert made.number() == uniform(7, 0)


def chi_squared(raw: torch.Tensor, made: Plan, expected: torch.Tensor, trials: int) -> float:
    """How far the frequencies of so many draws are from what is expected; tokens are taken together in 12 groups."""
    numbers = [uniform(11, position) for position in range(trials)]
    parts = [drawn(raw.expand(500, -1), made, numbers[start : start + 500]) for start in range(0, trials, 500)]
    tokens = torch.cat(parts)
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
    kinds: list[dict[str, Any]] = [{"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.02}]
    kinds += [{"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 2.0}]
    for fields in kinds:
        expected = theirs(raw[0], fields, [0]).softmax(-1)
        # 11 degrees of freedom: one sound generator in 28,000 exceeds 40
        assert chi_squared(raw, plan(**fields), expected, 20_000) < 40, fields


@pytest.mark.parametrize("size", [9, 1030, 1024, 4099])
def test_a_token_left_out_is_never_drawn(size: int) -> None:
    """A number at either end of its range would draw a token the filters excluded."""
    first, last = 3, size - 2
    row = torch.full((1, size), -math.inf)
    row[0, first] = row[0, last] = 0.0
    for made in (plan(), plan(top_k=2), plan(top_p=0.99), plan(min_p=0.5)):
        for number, token in ((0.0, first), (0.4999, first), (0.5, last), (OPEN_END, last)):
            assert int(drawn(row, made, [number])[0]) == token
    row[0, first] = -math.log(3.0)  # a total that is no power of two
    for made in (plan(), plan(top_k=2), plan(min_p=0.3)):
        assert int(drawn(row, made, [OPEN_END])[0]) == last


def test_the_coldest_temperature_takes_the_most_likely_token() -> None:
    """A temperature next to nothing would overflow, and draw any token."""
    raw = scores(1)
    for made in (plan(temperature=1e-300), plan(temperature=1e-300, top_k=5), plan(temperature=1e-300, top_p=0.9)):
        assert alone(made, raw[0]) == int(raw.argmax())


def test_requests_without_a_seed_differ() -> None:
    """The same prompt asked twice would always be answered alike."""
    assert plan().seed != plan().seed


# --------------------------------------------------------------------------------------------------------------- plans


def test_logprobs_are_the_models_own() -> None:
    """Log-probabilities would tell of the settings rather than of the model."""
    raw = scores(2)
    expected = raw.double().log_softmax(-1)
    best = int(raw[0].argmax())
    plans = [
        plan([best], logprobs=3, temperature=0.3, top_k=2, random_seed=5, repetition_penalty=2.0),
        greedy(logprobs=0),
    ]
    tokens = step(Sampler(VOCABULARY, 2), plans, raw)
    assert tokens[1] == int(raw[1].argmax())
    for row, count in enumerate((3, 0)):
        (entry,) = plans[row].logprobs
        likely = [int(token) for token in raw[row].topk(count).indices]
        assert list(entry) == [tokens[row], *(token for token in likely if token != tokens[row])]
        for token, logprob in entry.items():
            assert logprob == pytest.approx(float(expected[row, token]))


def test_only_those_who_ask_for_logprobs_get_them() -> None:
    """Every answer would carry log-probabilities as soon as one request wants some."""
    plans = [greedy(logprobs=1), greedy(), plan()]
    sampler = Sampler(VOCABULARY, 3)
    for _ in range(2):
        step(sampler, plans, scores(3))
    assert [len(made.logprobs) for made in plans] == [2, 0, 0]


def test_a_copy_of_a_request_has_the_same_plan() -> None:
    """A request whose cache was taken away would start anew, with its log-probabilities going nowhere."""
    made = plan()
    assert copy.deepcopy({"plan": made})["plan"] is made


def test_a_plan_that_is_to_end_gets_its_last_token() -> None:
    """An aborted request would go on to its full length."""
    raw = scores(3)
    for first in (greedy(), plan(random_seed=2), greedy(logprobs=1, repetition_penalty=2.0)):
        plans = [first, greedy(), plan(random_seed=1, min_p=0.1)]
        sampler = Sampler(VOCABULARY, 3)
        others = step(sampler, plans[1:], raw[1:])
        plans[2].position = 0
        first.end = 77
        assert step(sampler, plans, raw) == [77, *others]
        first.end = VOCABULARY + 3  # some tokenizers end with a token the model does not have
        assert step(sampler, plans, raw)[0] == VOCABULARY + 3


def test_a_greedy_batch_is_woken_by_an_end() -> None:
    """The abort of a greedy request would wait for someone who samples."""
    sampler, made = Sampler(VOCABULARY, 1), greedy()
    sampler.prepare([made])
    made.end = 5
    assert step(sampler, [made], scores(1)) == [5]


def test_a_request_that_is_gone_is_not_kept() -> None:
    """Prompts and log-probabilities of answers long given would fill the memory."""
    sampler, made = Sampler(VOCABULARY, 1), plan([1], logprobs=1, repetition_penalty=2.0)
    gone = weakref.ref(made)
    step(sampler, [made], scores(1))
    del made
    gc.collect()
    assert gone() is None
    assert step(sampler, [greedy(logprobs=0)], scores(1)) == [int(scores(1).argmax())]


# --------------------------------------------------------------------------------------------------- one tensor program


def recorded(size: int) -> tuple[list[Any], Parts]:
    """The arguments of a step in which every part of the program has something to do."""
    kinds = [*MIXED, {"do_sample": False, "logprobs": 4}, {"frequency_penalty": 0.4, "logit_bias": {3: 2.0}}]
    kinds += [{"repetition_penalty": 1.3, "random_seed": 4}]
    plans = [plan(range(row), **{"random_seed": row, **fields}) for row, fields in enumerate(kinds)]
    rows, parts = arguments(plans, size)
    moment = torch.tensor([(made.number(), -1) for made in plans], dtype=torch.double)
    moment[3, 1] = 9
    factors = torch.ones(len(plans), size)
    factors[-1, :50] = 1.3
    biases, counts = torch.zeros(len(plans), size), torch.zeros(len(plans), size)
    biases[-2, 3], counts[-2, 5:9] = 2.0, 1.0
    changes = NOTHING._replace(biases=biases, factors=factors, counts=counts)
    return [scores(len(plans), size=size), rows, moment, changes], parts


def run(tensors: Sequence[Any], parts: Parts, program: Any = choose) -> Choice:
    """The program as it is, or compiled."""
    found: Choice = program(*tensors, parts)
    return found


def same(one: Choice, other: Choice) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("head", [HEAD, 3072])
def test_the_program_compiles_whole(head: int) -> None:
    """It could not stand in a CUDA graph: something in it would look at a value."""
    tensors, parts = recorded(3072)
    parts = parts._replace(head=head)
    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        tensors[0] = scores(len(tensors[0]), seed, size=3072)
        tensors[1][:, 0] = tensors[1][:, 0].roll(seed)
        tensors[2][:, 0] = (tensors[2][:, 0] + 0.3 * seed) % 1
        assert same(run(tensors, parts, compiled), run(tensors, parts))
    torch._dynamo.reset()


@pytest.mark.parametrize("head", [HEAD, 3072])
def test_the_program_is_exported_whole(head: int) -> None:
    """Its shapes would depend on values, so that no recorded step could be run again."""
    tensors, parts = recorded(3072)
    parts = parts._replace(head=head)

    class Step(torch.nn.Module):
        def forward(self, *tensors: Any) -> Choice:
            return run(tensors, parts)

    exported = torch.export.export(Step(), tuple(tensors)).module()
    assert same(Choice(*exported(*tensors)), run(tensors, parts))
    tensors[0], tensors[2] = scores(len(tensors[0]), 5, size=3072), tensors[2].flip(0)
    assert same(Choice(*exported(*tensors)), run(tensors, parts))


def test_a_recorded_step_serves_later_requests() -> None:
    """A CUDA graph would read the settings of requests long gone, or have recorded a part of the program only."""
    sampler = Sampler(VOCABULARY, 4, static=True)
    sampler.prepare([])  # as while a manager warms up
    assert sampler.active
    buffers, parts = sampler.buffers(4), sampler.parts
    kinds: list[dict[str, Any]] = [MIXED[3], {"temperature": 2.0}, {"repetition_penalty": 2.0}, MIXED[6]]
    kinds += [{"do_sample": False}, MIXED[1], {"min_p": 0.2, "repetition_penalty": 1.5}]
    kinds += [{"frequency_penalty": 2.0, "presence_penalty": 1.0}, {"do_sample": False, "logit_bias": {5: 90}}]
    for seed in range(9):
        kinds = [*kinds[1:], kinds[0]]
        raw = scores(4, seed)
        mine, others = ([plan([3, 4], **{"random_seed": seed, **fields}) for fields in kinds[:4]] for _ in range(2))
        sampler.prepare(mine)
        found = choose(raw, *buffers, parts).tokens.tolist()
        assert found == sampler.choose(raw).tolist() == step(Sampler(VOCABULARY, 4), others, raw)
