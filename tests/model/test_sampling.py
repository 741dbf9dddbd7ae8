"""Sampling against a slow twin in plain Python, row by row; against statistics; and against itself in other batches."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.request import SamplingParams
from model.sampling.draw import _draw_ranked, choose, draw, leaders, whole_weights
from model.sampling.random import philox, uniform
from model.sampling.sampler import Drawn, Row, edit, sample
from model.sampling.seen import Seen

VOCAB = 24
ALMOST_ONE = 1 - 2.0**-53
INF, NAN = math.inf, math.nan
ids = st.integers(0, VOCAB - 1)
# Truncation limits are odd numbers, so that no sum of the twin's falls on one within a rounding error.
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from((0.5, 1.0, 1.7)),
    top_k=st.sampled_from((0, 1, 3, 9, 20, 99)),
    top_p=st.sampled_from((1.0, 0.0113, 0.6173, 0.9371)),
    min_p=st.sampled_from((0.0, 0.0, 0.0517, 0.4123)),
    repetition_penalty=st.sampled_from((1.0, 1.3, 0.8)),
    presence_penalty=st.sampled_from((0.0, 0.7, -0.5)),
    frequency_penalty=st.sampled_from((0.0, 0.3, -2.0)),
    logit_bias=st.dictionaries(ids, st.sampled_from((-100.0, -1.5, 3.0)), max_size=3).map(lambda d: tuple(d.items())),
    min_tokens=st.integers(0, 5),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
)
batches = st.lists(st.builds(Row, params, st.lists(ids, max_size=5), st.lists(ids, max_size=8)), min_size=1, max_size=4)
numbers = st.integers(0, 2**32)


def some_logits(num: int, seed: int) -> Tensor:
    """Logits [num, VOCAB] in quarters from -1.5 to 1.5: flat enough for every limit to bite, and ties abound."""
    return torch.randint(-6, 7, (num, VOCAB), generator=torch.Generator().manual_seed(seed)) / 4


def twin_scores(logits: list[float], row: Row) -> list[float]:
    p, scores = row.params, list(logits)
    for i, score in enumerate(logits):
        if i in row.prompt_ids or i in row.output_ids:
            scores[i] = score / p.repetition_penalty if score > 0 else score * p.repetition_penalty
        count = list(row.output_ids).count(i)
        scores[i] -= p.frequency_penalty * count + (p.presence_penalty if count else 0)
        scores[i] += dict(p.logit_bias).get(i, 0)
        if len(row.output_ids) < p.min_tokens and i in p.stop_token_ids:
            scores[i] = -INF
    return scores


def twin_probabilities(scores: list[float], p: SamplingParams) -> list[float]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: p.top_k or None]
    weights = {i: math.exp((scores[i] - scores[order[0]]) / p.temperature) for i in order}
    kept, mass = {}, 0.0
    for i in order:
        if mass < p.top_p * sum(weights.values()):
            kept[i] = weights[i]
        mass += weights[i]
    kept = {i: w for i, w in kept.items() if w >= p.min_p}  # the likeliest weighs 1
    return [kept.get(i, 0) / sum(kept.values()) for i in range(len(scores))]


@given(batches, numbers)
@settings(max_examples=80, deadline=None)
def test_edited_scores_equal_the_twins(rows: list[Row], seed: int) -> None:
    logits = some_logits(len(rows), seed)
    expected = torch.tensor([twin_scores(x, row) for x, row in zip(logits.tolist(), rows, strict=True)])
    torch.testing.assert_close(edit(logits, rows), expected, rtol=1e-6, atol=1e-5)


@given(st.lists(params, min_size=1, max_size=4), numbers)
@settings(max_examples=60, deadline=None)
def test_drawn_shares_equal_the_twins_probabilities(mixed: list[SamplingParams], seed: int) -> None:
    scores, num = some_logits(len(mixed), seed), 400
    sweep = [i / (num - 1) * ALMOST_ONE for i in range(num) for _ in mixed]  # from 0 to the highest u there is
    found = draw(scores.repeat(num, 1), mixed * num, sweep).view(num, len(mixed))
    for row, (x, p) in enumerate(zip(scores.tolist(), mixed, strict=True)):
        shares = found[:, row].bincount(minlength=VOCAB) / num
        expected = twin_probabilities(x, p)
        assert all(share == 0 for share, e in zip(shares.tolist(), expected, strict=True) if e == 0)
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=2.5 / num)


@given(st.lists(params, min_size=1, max_size=4), numbers, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_number_of_candidates_sorted_at_first_does_not_show(mixed: list[SamplingParams], seed: int, width: int) -> None:
    mixed = mixed * 8
    scores = some_logits(len(mixed), seed)
    weights = (scores.softmax(-1) * 2**46).long()
    us = [uniform(seed, i) for i in range(len(mixed))]
    assert torch.equal(_draw_ranked(scores, weights, mixed, us, width), _draw_ranked(scores, weights, mixed, us, VOCAB))


def mixed_rows(num: int, vocab: int) -> list[Row]:
    def row(i: int) -> Row:
        p = SamplingParams(
            temperature=(0.0, 0.7, 1.0, 1.3)[i % 4],
            top_k=(0, 0, 40, 3, 500)[i % 5],
            top_p=(1.0, 0.9, 0.99)[i % 3],
            min_p=(0.0, 0.02)[i % 7 == 0],
            repetition_penalty=(1.0, 1.2)[i % 6 == 1],
            presence_penalty=(0.0, 0.4)[i % 6 == 2],
            logit_bias=((i, 2.0),) if i % 9 == 4 else (),
            seed=i // 2,
            min_tokens=i % 8,
            stop_token_ids=(0, vocab - 1),
            num_logprobs=(None, 0, 5, 20)[i % 11 % 4],
        )
        return Row(p, range(i, 3 * i), [(j * j) % vocab for j in range(i % 13)])

    return [row(i) for i in range(num)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("vocab", [511, 50257])
def test_a_row_is_the_same_to_the_bit_in_every_batch(vocab: int) -> None:
    rows = mixed_rows(64, vocab)
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(1)) * 4
    alone = [sample(logits[i : i + 1], rows[i : i + 1]) for i in range(64)]
    for at in (range(64), range(63, -1, -1), range(1, 64, 3), range(20, 27), range(5, 7)):
        together = sample(logits[list(at)], [rows[i] for i in at])
        assert together.token_ids == [alone[i].token_ids[0] for i in at]
        assert together.logprobs == [alone[i].logprobs[0] for i in at]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("vocab", [511, 50257])
def test_probabilities_and_log_probabilities_are_per_row_kernels(vocab: int) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(2)) * 4
    for function in (torch.softmax, torch.log_softmax):
        whole: Tensor = function(logits, -1)
        for num in (*range(1, 18), 31, 32, 33, 47, 63):
            assert torch.equal(function(logits[64 - num :], -1), whole[64 - num :])


def test_philox_gives_the_published_vectors() -> None:
    """From `kat_vectors` of Random123, the library of the paper's authors."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def chi_square(counts: list[int], shares: list[float]) -> float:
    """Pearson's statistic as a number of standard deviations from what is expected by chance."""
    total, free = sum(counts), len(counts) - 1
    statistic = sum((c - total * s) ** 2 / (total * s) for c, s in zip(counts, shares, strict=True))
    return (statistic - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (2**32, 0), (0x4F1BBCDCBFA53E0B, 0)])
def test_neighbouring_positions_and_seeds_are_unrelated(step: tuple[int, int]) -> None:
    us = [uniform((12345 + i * step[0]) % 2**63, 7 + i * step[1]) for i in range(6401)]
    pairs = [0] * 64
    for a, b in pairwise(us):
        pairs[int(a * 8) * 8 + int(b * 8)] += 1
    assert abs(chi_square(pairs, [1 / 64] * 64)) < 3.5
    assert all(0 <= u < 1 and (u * 2**53).is_integer() for u in us)


def test_frequencies_over_positions_match_the_softmax() -> None:
    logits, num = torch.linspace(-2, 2, 16)[torch.arange(16) * 7 % 16], 4000
    rows = [Row(SamplingParams(seed=3), (), range(position)) for position in range(num)]
    counts = torch.tensor(sample(logits.repeat(num, 1), rows).token_ids).bincount(minlength=16)
    assert abs(chi_square(counts.tolist(), logits.double().softmax(-1).tolist())) < 3.5


def draw_one(logits: list[float], output_ids: tuple[int, ...] = (), **options: Any) -> Drawn:
    return sample(torch.tensor([logits]), [Row(SamplingParams(**options), (), output_ids)])


@pytest.mark.usefixtures("threads")
def test_greedy_takes_the_lowest_of_equals_and_so_does_top_k_1() -> None:
    logits = torch.zeros(3, 50257)
    logits[:, [49999, 30011, 31007]] = 1.0
    rows = [Row(SamplingParams(temperature=t, top_k=k, seed=5), (), ()) for t, k in ((0, 0), (1, 1), (0.0, 7))]
    assert sample(logits, rows).token_ids == [30011] * 3


def test_the_extremes_of_u_never_draw_an_id_of_no_weight() -> None:
    scores = torch.tensor([[-INF, 0.0, -1.0, 2.0, -INF]]).repeat(4, 1)
    plain, cut = SamplingParams(), SamplingParams(top_k=3)
    assert draw(scores, [plain, plain, cut, cut], [0.0, ALMOST_ONE] * 2).tolist() == [1, 3, 3, 2]


def test_limits_that_are_met_exactly() -> None:
    half, whole = SamplingParams(top_p=0.5), SamplingParams(min_p=1.0)
    equal = torch.zeros(4, 2)
    assert draw(equal, [half, half, whole, whole], [0.0, ALMOST_ONE] * 2).tolist() == [0, 0, 0, 1]


def test_top_k_among_equals_keeps_the_lowest_ids() -> None:
    us = [i / 10 for i in range(10)]
    drawn = draw(torch.zeros(10, 300), [SamplingParams(top_k=5)] * 10, us)
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("temperature", [1e-45, 1e-5, 1e9])
def test_extreme_temperatures_and_scores_stay_finite(temperature: float) -> None:
    drawn = draw_one([-3e38, 1.0, 3e38, -INF], temperature=temperature)
    assert drawn.token_ids == [2] and drawn.bad == [False]


@pytest.mark.parametrize("spoilt", [[NAN, 1.0, 2.0], [0.0, INF, 1.0], [-INF] * 3, [0.0, -INF, NAN]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_is_flagged_and_harms_no_other(spoilt: list[float], temperature: float) -> None:
    p = SamplingParams(temperature=temperature, top_k=2, num_logprobs=1, min_tokens=1, stop_token_ids=(1, 2))
    good = [0.5, 3.0, -INF]
    drawn = sample(torch.tensor([good, spoilt, good]), [Row(p, (0,), ())] * 3)
    alone = sample(torch.tensor([good]), [Row(p, (0,), ())])
    assert drawn.bad == [False, True, False] and drawn.logprobs[1] is None
    assert drawn.token_ids == [0, 0, 0] and drawn.logprobs[::2] == alone.logprobs * 2


def test_min_tokens_forbids_stop_ids_until_they_are_due() -> None:
    options: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (1,)}
    assert draw_one([1.0, 5.0, 2.0], (0,), **options).token_ids == [2]
    assert draw_one([1.0, 5.0, 2.0], (0, 0), **options).token_ids == [1]


def test_a_row_with_nothing_but_stop_ids_keeps_them() -> None:
    drawn = draw_one([1.0, 5.0, -INF], temperature=0.0, min_tokens=2, stop_token_ids=(0, 1))
    assert drawn.token_ids == [1]


def test_logprobs_are_of_the_raw_logits_likeliest_first() -> None:
    raw = [0.5, 2.0, -1.0, 2.0]
    drawn = draw_one(raw, (1, 1), temperature=0.0, frequency_penalty=2.0, logit_bias=((2, 90.0),), num_logprobs=3)
    expected = torch.tensor(raw).double().log_softmax(-1)
    assert drawn.token_ids == [2] and drawn.logprobs[0] is not None
    assert drawn.logprobs[0].logprob == pytest.approx(expected[2].item(), abs=1e-6)
    assert [i for i, _ in drawn.logprobs[0].top] == [1, 3, 0]
    assert [x for _, x in drawn.logprobs[0].top] == pytest.approx(expected[[1, 3, 0]].tolist(), abs=1e-6)


def test_more_logprobs_than_ids_are_all_of_them() -> None:
    drawn = draw_one([0.0, 1.0], num_logprobs=20)
    assert drawn.logprobs[0] is not None and len(drawn.logprobs[0].top) == 2


def test_rows_that_edit_nothing_pay_nothing_and_logits_stay_unchanged() -> None:
    logits = torch.randn(16, 99)
    before, rows = logits.clone(), mixed_rows(16, 99)
    assert edit(logits, [Row(SamplingParams(), (1, 2), (3,))] * 16) is logits
    sample(logits, rows)
    assert torch.equal(logits, before)


def test_half_precision_logits_draw_as_their_float32_values() -> None:
    logits, rows = torch.randn(16, 99).bfloat16(), mixed_rows(16, 99)
    assert sample(logits, rows) == sample(logits.float(), rows)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000, 4096])
def test_a_choice_by_blocks_is_that_of_one_long_sum(n: int) -> None:
    torch.manual_seed(n)
    scores = torch.randn(200, n) * 6
    weights = whole_weights(scores, torch.ones(200, 1))
    uniforms = torch.rand(200, 1, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    mass = weights.long().cumsum(-1)
    wanted = torch.searchsorted(mass, (uniforms * mass[:, -1:]).long(), right=True)[:, 0]
    assert torch.equal(choose(weights, None, uniforms), wanted)
    assert (weights.gather(-1, wanted[:, None]) > 0).all()


def test_ranking_all_is_a_stable_sort() -> None:
    torch.manual_seed(3)
    scores = torch.randint(-9, 9, (20, 700)) / 4.0
    scores[0, :9], scores[1, 5], scores[2] = -0.0, -torch.inf, scores[2].clamp(max=-1.0)
    values, ids = leaders(scores, 700)
    wanted_values, wanted_ids = scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, wanted_values) and torch.equal(ids, wanted_ids)


def test_what_is_kept_of_a_text_gives_the_scores_of_looking_at_all_of_it_again() -> None:
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.1, logit_bias=((7, 2.0),))
    prompt, outputs, seen = (5, 9, 5), list[int](), Seen((5, 9, 5))
    for step in range(40):
        raw = torch.randn(1, 50, generator=torch.Generator().manual_seed(step))
        if step % 3:  # a row need not be drawn at every step
            kept, anew = (edit(raw, [Row(params, prompt, outputs, seen=each)]) for each in (seen, None))
            assert torch.equal(kept, anew) and not torch.equal(kept, raw)
        outputs.append(step * step % 11)
