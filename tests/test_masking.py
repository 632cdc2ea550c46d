"""Masks and decoder selections against plain Python: sets, sorted() and decimal arithmetic."""

import math
from collections import Counter
from decimal import ROUND_FLOOR, Decimal
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmae.masking import STRATEGIES, decoder_budget, select, tube_mask, visible_places

PAPER = (64, 14, 14)  # 12544 tokens: 128 frames of 224 x 224 in tubelets of 2 x 16 x 16
SMALL = (4, 3, 4)

grids = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
ratios = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
seeds = st.integers(0, 2**32 - 1)


def floor(x: Decimal) -> int:
    return int(x.to_integral_value(rounding=ROUND_FLOOR))


def count_of(share: float, tokens: int) -> int:
    return floor(Decimal(str(share)) * tokens + Decimal("0.5"))


def rows(index: torch.Tensor) -> list[list[int]]:
    assert index.dtype == torch.int64
    assert index.dim() == 2
    return index.tolist()


def assert_ascending(row: list[int]) -> None:
    assert all(a < b for a, b in pairwise(row)), "not ascending, or a duplicate"


def assert_valid_choice(chosen: torch.Tensor, hidden: torch.Tensor, k: int) -> None:
    assert chosen.shape == (hidden.shape[0], k)
    for row, allowed in zip(rows(chosen), rows(hidden), strict=True):
        assert_ascending(row)
        assert set(row) <= set(allowed)


def random_scores(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, tokens, generator=torch.Generator().manual_seed(seed))


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def loose_bound(cells: int) -> float:
    """Six standard deviations above the mean of a chi-square with `cells` - 1 degrees of freedom."""
    return cells - 1 + 6 * math.sqrt(2 * (cells - 1))


# --- how many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "ratio", "visible"),
    [
        (196, 0.9, 20),
        (196, 0.75, 49),
        (196, 0.0, 196),
        (196, 1.0, 0),
        (100, 0.29, 71),
        (100, 0.57, 43),
        (100, 0.58, 42),
        (1000, 0.001, 999),
        (10, 0.7, 3),
        (1, 0.9, 1),
    ],
)
def test_visible_places_examples(places, ratio, visible):
    assert visible_places(places, ratio) == visible


@given(places=st.integers(1, 5000), ratio=ratios)
def test_visible_places_is_exact_in_decimal(places, ratio):
    assert visible_places(places, ratio) == places - floor(Decimal(str(ratio)) * places)


def test_budget_of_the_paper():
    budget = decoder_budget(12544, budget=0.15, random=0.05)
    assert (budget.total, budget.random) == (1882, 627)
    assert budget.total - budget.random == 1255


@pytest.mark.parametrize(
    ("tokens", "share", "count"),
    [
        (100, 0.145, 15),  # 14.5 rounds up, though 0.145 * 100 is 14.499999999999998 in floating point
        (100, 0.285, 29),  # 28.499999999999996
        (100, 0.565, 57),  # 56.49999999999999
        (10, 0.05, 1),
        (10, 0.25, 3),  # a half goes up, not to the even number
        (10, 0.24, 2),
        (100, 0.0, 0),
        (100, 1.0, 100),
    ],
)
def test_budget_rounds_halves_up(tokens, share, count):
    assert decoder_budget(tokens, budget=share, random=0.0).total == count
    assert decoder_budget(tokens, budget=1.0, random=share).random == count


@given(tokens=st.integers(1, 20000), shares=st.tuples(ratios, ratios))
def test_budget_is_exact_in_decimal(tokens, shares):
    random, budget = sorted(shares)
    total, drawn = decoder_budget(tokens, budget=budget, random=random)
    assert total == count_of(budget, tokens)
    assert drawn == count_of(random, tokens)
    assert 0 <= drawn <= total <= tokens


# --- the tube mask ------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(grid=grids, batch=st.integers(1, 4), ratio=ratios, seed=seeds)
def test_tube_mask_against_sets(grid, batch, ratio, seed):
    frames, height, width = grid
    places = height * width
    count = places - floor(Decimal(str(ratio)) * places)
    mask = tube_mask(grid, batch, mask_ratio=ratio, seed=seed)
    assert mask.visible.shape == (batch, frames * count)
    assert mask.hidden.shape == (batch, frames * (places - count))
    for visible, hidden in zip(rows(mask.visible), rows(mask.hidden), strict=True):
        assert_ascending(visible)
        assert_ascending(hidden)
        assert sorted(visible + hidden) == list(range(frames * places))
        tube = {token % places for token in visible}
        assert len(tube) == count
        for frame in range(frames):
            assert {token - frame * places for token in visible if token // places == frame} == tube


def test_tube_mask_of_the_paper():
    mask = tube_mask(PAPER, 2, mask_ratio=0.9, seed=3)
    assert mask.visible.shape == (2, 64 * 20)
    assert mask.hidden.shape == (2, 64 * 176)
    for row in rows(mask.visible):
        assert Counter(token // 196 for token in row) == dict.fromkeys(range(64), 20)
        assert len({token % 196 for token in row}) == 20


def test_tube_mask_is_seeded():
    first, again, other = (tube_mask(PAPER, 4, mask_ratio=0.9, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.visible, again.visible)
    assert torch.equal(first.hidden, again.hidden)
    assert not any(torch.equal(a, b) for a, b in zip(first.visible, other.visible, strict=True))


def test_tube_mask_leaves_torchs_generator_alone():
    torch.manual_seed(1)
    first = tube_mask(PAPER, 2, mask_ratio=0.9, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first.visible, tube_mask(PAPER, 2, mask_ratio=0.9, seed=5).visible)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_tube_mask_differs_between_rows():
    visible = tube_mask(PAPER, 16, mask_ratio=0.9, seed=0).visible
    assert len({tuple(row) for row in rows(visible)}) == 16


def test_tube_mask_of_a_row_does_not_depend_on_the_batch():
    many, few = (tube_mask(PAPER, batch, mask_ratio=0.9, seed=11) for batch in (6, 2))
    assert torch.equal(many.visible[:2], few.visible)
    assert torch.equal(many.hidden[:2], few.hidden)


@pytest.mark.parametrize("by", ["seed", "row"])
def test_tube_mask_places_are_uniform(by):
    grid, draws = (1, 14, 14), 3000
    if by == "seed":
        masks = [tube_mask(grid, 1, mask_ratio=0.9, seed=seed).visible[0] for seed in range(draws)]
    else:
        masks = list(tube_mask(grid, draws, mask_ratio=0.9, seed=123).visible)
    counts = torch.stack(masks).flatten().bincount(minlength=196).tolist()
    assert sum(counts) == draws * 20
    assert chi_square(counts) < loose_bound(196)


def test_tube_mask_pairs_of_places_are_uniform():
    """Every pair of 6 places is visible together equally often: the places of a mask do not hang together."""
    visible = tube_mask((1, 2, 3), 6000, mask_ratio=0.7, seed=9).visible  # 6 - floor(4.2) = 2 visible
    counts = Counter(map(tuple, rows(visible)))
    assert len(counts) == 15
    assert chi_square(list(counts.values())) < loose_bound(15)


# --- the decoder's tokens -----------------------------------------------------------------------------------------


def naive_scored(hidden: list[int], scores: list[float], count: int) -> set[int]:
    return set(sorted(hidden, key=lambda token: (-scores[token], token))[:count])


cases = st.tuples(grids, st.integers(1, 3), seeds, st.tuples(ratios, ratios), ratios)


def masked(case):
    """A tube mask with budget and random share, cut to what the hidden tokens can hold."""
    grid, batch, seed, shares, ratio = case
    mask = tube_mask(grid, batch, mask_ratio=ratio, seed=seed)
    tokens = math.prod(grid)
    random, budget = sorted(shares)
    while count_of(budget, tokens) > mask.hidden.shape[1]:
        budget = round(max(0.0, budget - 0.05), 3)
    return grid, tokens, seed, mask.hidden, budget, min(random, budget)


@settings(max_examples=120, deadline=None)
@given(case=cases, levels=st.sampled_from([2, 5, 10**6]))
def test_adaptive_against_sorted(case, levels):
    grid, tokens, seed, hidden, budget, random = masked(case)
    k, r = count_of(budget, tokens), count_of(random, tokens)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (hidden.shape[0], tokens), generator=generator).float()
    chosen = select("adaptive", hidden, grid, budget=budget, random=random, seed=seed, scores=scores)
    assert_valid_choice(chosen, hidden, k)
    for row, allowed, score in zip(rows(chosen), rows(hidden), scores.tolist(), strict=True):
        assert naive_scored(allowed, score, k - r) <= set(row)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_adaptive_without_a_random_share_is_the_top(case):
    grid, tokens, seed, hidden, budget, _ = masked(case)
    scores = random_scores(hidden.shape[0], tokens, seed)
    chosen = select("adaptive", hidden, grid, budget=budget, random=0.0, seed=seed, scores=scores)
    for row, allowed, score in zip(rows(chosen), rows(hidden), scores.tolist(), strict=True):
        assert row == sorted(naive_scored(allowed, score, count_of(budget, tokens)))


@settings(max_examples=60, deadline=None)
@given(case=cases, strategy=st.sampled_from(["random", "uniform"]))
def test_random_and_uniform_are_valid(case, strategy):
    grid, tokens, seed, hidden, budget, _ = masked(case)
    chosen = select(strategy, hidden, grid, budget=budget, seed=seed)
    assert_valid_choice(chosen, hidden, count_of(budget, tokens))


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_none_is_every_hidden_token(case):
    grid, _, seed, hidden, budget, _ = masked(case)
    assert torch.equal(select("none", hidden, grid, budget=budget, seed=seed), hidden)


@settings(max_examples=100, deadline=None)
@given(case=cases)
def test_uniform_frames_and_thinning_are_even(case):
    grid, tokens, seed, hidden, budget, _ = masked(case)
    frames, places = grid[0], grid[1] * grid[2]
    k, per_frame = count_of(budget, tokens), hidden.shape[1] // frames
    chosen = select("uniform", hidden, grid, budget=budget, seed=seed)
    assert torch.equal(chosen, select("uniform", hidden, grid, budget=budget, seed=seed + 1))
    for row, allowed in zip(rows(chosen), rows(hidden), strict=True):
        assert len(row) == k
        used = sorted({token // places for token in row})
        assert len(used) == (math.ceil(k / per_frame) if k else 0)
        gaps = [b - a for a, b in pairwise(used)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert not used or used[0] + frames - 1 - used[-1] <= math.ceil(frames / len(used))
        candidates = [token for token in allowed if token // places in used]
        position = {token: at for at, token in enumerate(candidates)}
        steps = [position[b] - position[a] for a, b in pairwise(row)]
        assert not steps or max(steps) - min(steps) <= 1


def test_uniform_of_the_paper():
    """1882 of 176 hidden tokens a frame: 11 frames of 64, all but 54 of their 1936 tokens."""
    hidden = tube_mask(PAPER, 2, mask_ratio=0.9, seed=1).hidden
    chosen = select("uniform", hidden, PAPER, budget=0.15, seed=0)
    assert_valid_choice(chosen, hidden, 1882)
    for row in rows(chosen):
        per_frame = Counter(token // 196 for token in row)
        assert len(per_frame) == 11
        assert max(per_frame.values()) - min(per_frame.values()) <= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_papers_size(strategy):
    hidden = tube_mask(PAPER, 2, mask_ratio=0.9, seed=1).hidden
    scores = random_scores(2, 12544, 0)
    chosen = select(strategy, hidden, PAPER, budget=0.15, random=0.05, seed=4, scores=scores)
    assert_valid_choice(chosen, hidden, 64 * 176 if strategy == "none" else 1882)
    if strategy == "adaptive":
        for row, allowed, score in zip(rows(chosen), rows(hidden), scores.tolist(), strict=True):
            assert naive_scored(allowed, score, 1255) <= set(row)


def test_high_scores_of_visible_tokens_do_not_count():
    mask = tube_mask(SMALL, 3, mask_ratio=0.5, seed=2)
    scores = random_scores(3, 48, 2).scatter(1, mask.visible, 1000.0)
    chosen = select("adaptive", mask.hidden, SMALL, budget=0.25, random=0.1, seed=0, scores=scores)
    assert_valid_choice(chosen, mask.hidden, 12)


@pytest.mark.parametrize("value", [0.0, -3.0, float("inf"), float("-inf")])
def test_equal_scores_go_to_the_earlier_tokens(value):
    hidden = tube_mask(SMALL, 2, mask_ratio=0.5, seed=2).hidden
    scores = torch.full((2, 48), value)
    chosen = select("adaptive", hidden, SMALL, budget=0.25, seed=0, scores=scores)
    assert torch.equal(chosen, hidden[:, :12])


def test_zero_and_minus_zero_are_a_tie():
    hidden = tube_mask(SMALL, 1, mask_ratio=0.5, seed=2).hidden
    scores = torch.tensor([[0.0, -0.0]]).repeat(1, 24)
    for sign in (1, -1):
        chosen = select("adaptive", hidden, SMALL, budget=0.25, seed=0, scores=sign * scores)
        assert torch.equal(chosen, hidden[:, :12])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_point_score(dtype):
    hidden = tube_mask(SMALL, 2, mask_ratio=0.9, seed=2).hidden
    scores = random_scores(2, 48, 5).to(dtype)
    chosen = select("adaptive", hidden, SMALL, budget=0.25, seed=0, scores=scores)
    for row, allowed, score in zip(rows(chosen), rows(hidden), scores.tolist(), strict=True):
        assert row == sorted(naive_scored(allowed, score, 12))


def test_scores_need_not_be_contiguous_and_stay_as_they_are():
    hidden = tube_mask(SMALL, 2, mask_ratio=0.9, seed=2).hidden
    scores = random_scores(48, 2, 5).T
    before = scores.clone()
    chosen = select("adaptive", hidden, SMALL, budget=0.25, random=0.1, seed=0, scores=scores)
    assert torch.equal(scores, before)
    again = select("adaptive", hidden, SMALL, budget=0.25, random=0.1, seed=0, scores=scores.contiguous())
    assert torch.equal(chosen, again)


@pytest.mark.parametrize("strategy", ["adaptive", "random"])
def test_the_same_for_the_same_seed_only(strategy):
    hidden = tube_mask(PAPER, 3, mask_ratio=0.9, seed=1).hidden
    scores = random_scores(3, 12544, 0)
    first, again, other = (
        select(strategy, hidden, PAPER, budget=0.15, random=0.05, seed=seed, scores=scores) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_does_not_depend_on_the_others(strategy):
    hidden = tube_mask(SMALL, 5, mask_ratio=0.9, seed=1).hidden
    scores = random_scores(5, 48, 0)

    def chosen(hidden, scores):
        return select(strategy, hidden, SMALL, budget=0.4, random=0.2, seed=5, scores=scores)

    everything = chosen(hidden, scores)
    assert torch.equal(chosen(hidden[:2], scores[:2]), everything[:2])
    other_hidden = torch.cat([hidden[:3], tube_mask(SMALL, 2, mask_ratio=0.9, seed=77).hidden])
    other_scores = torch.cat([scores[:3], -scores[3:]])
    assert torch.equal(chosen(other_hidden, other_scores)[:3], everything[:3])


@pytest.mark.parametrize("strategy", ["adaptive", "random"])
def test_rows_draw_differently(strategy):
    hidden = tube_mask(PAPER, 1, mask_ratio=0.9, seed=1).hidden.expand(8, -1)
    scores = random_scores(1, 12544, 0).expand(8, -1)
    chosen = select(strategy, hidden, PAPER, budget=0.15, random=0.05, seed=5, scores=scores)
    assert len({tuple(row) for row in rows(chosen)}) == 8


def test_random_counts_for_adaptive_alone():
    hidden = tube_mask(SMALL, 2, mask_ratio=0.9, seed=1).hidden
    for strategy in ("random", "uniform", "none"):
        with_share, without = (
            select(strategy, hidden, SMALL, budget=0.25, random=random, seed=5) for random in (0.1, 0.0)
        )
        assert torch.equal(with_share, without)


@pytest.mark.parametrize("by", ["seed", "row"])
def test_random_tokens_are_uniform_given_the_mask_of_the_same_seed(by):
    """Also shows that the choice and the tube mask of one seed have nothing to do with each other."""
    draws = 2000
    counts = [0] * 44  # 11 of 12 places hidden, in 4 frames
    if by == "seed":
        drawn = [(seed, tube_mask(SMALL, 1, mask_ratio=0.95, seed=seed).hidden) for seed in range(draws)]
    else:
        drawn = [(5, tube_mask(SMALL, draws, mask_ratio=0.95, seed=5).hidden)]
    for seed, hidden in drawn:
        chosen = select("random", hidden, SMALL, budget=0.25, seed=seed)
        for row, allowed in zip(rows(chosen), rows(hidden), strict=True):
            for token in row:
                counts[allowed.index(token)] += 1
    assert sum(counts) == draws * 12
    assert chi_square(counts) < loose_bound(44)


def test_the_choice_does_not_draw_the_numbers_of_the_mask():
    """Else the hidden token with the index of the visible place, the highest of 12, would nearly always be drawn."""
    draws = 2000
    visible, hidden = tube_mask(SMALL, draws, mask_ratio=0.95, seed=5)  # one of 12 places
    chosen = select("random", hidden, SMALL, budget=0.25, seed=5)  # 12 of 44 hidden tokens
    drawn = chosen == hidden.gather(1, visible[:, :1])
    expected, spread = draws * 12 / 44, math.sqrt(draws * 12 / 44 * 32 / 44)
    assert abs(drawn.sum().item() - expected) < 6 * spread


def test_adaptive_random_share_is_uniform_over_the_rest():
    draws, scores = 2000, random_scores(1, 48, 3)
    hidden = tube_mask(SMALL, 1, mask_ratio=0.9, seed=3).hidden  # 10 of 12 places, 40 tokens
    top = naive_scored(rows(hidden)[0], scores[0].tolist(), 12 - 5)
    counts: Counter[int] = Counter()
    chosen = select(
        "adaptive",
        hidden.expand(draws, -1),
        SMALL,
        budget=0.25,
        random=0.1,
        seed=8,
        scores=scores.expand(draws, -1),
    )
    for row in rows(chosen):
        assert top <= set(row)
        counts.update(set(row) - top)
    assert len(counts) == 40 - 7
    assert sum(counts.values()) == draws * 5
    assert chi_square(list(counts.values())) < loose_bound(33)


@pytest.mark.parametrize("strategy", ["adaptive", "random", "uniform"])
def test_a_budget_of_all_and_of_nothing(strategy):
    hidden = tube_mask(SMALL, 2, mask_ratio=0.5, seed=1).hidden  # 24 of 48
    scores = random_scores(2, 48, 0)
    for budget, expected in ((0.5, hidden), (0.0, hidden[:, :0])):
        chosen = select(strategy, hidden, SMALL, budget=budget, seed=5, scores=scores)
        assert torch.equal(chosen, expected)
    chosen = select("adaptive", hidden, SMALL, budget=0.5, random=0.5, seed=5, scores=scores)
    assert torch.equal(chosen, hidden)


# --- refusals -----------------------------------------------------------------------------------------------------


def refusal(function, *args, error=ValueError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), float("inf")])
def test_ratios_out_of_range(ratio):
    hidden = tube_mask(SMALL, 1, mask_ratio=0.5, seed=0).hidden
    for name, call in {
        "mask_ratio": lambda: tube_mask(SMALL, 1, mask_ratio=ratio, seed=0),
        "budget": lambda: decoder_budget(48, budget=ratio, random=0.0),
        "random": lambda: decoder_budget(48, budget=0.5, random=ratio),
    }.items():
        message = refusal(call)
        assert name in message
        assert str(ratio) in message
        assert "expected" in message
    assert str(ratio) in refusal(visible_places, 48, ratio)
    assert str(ratio) in refusal(select, "random", hidden, SMALL, budget=ratio, seed=0)


def test_random_share_above_the_budget():
    message = refusal(decoder_budget, 48, budget=0.125, random=0.25)
    assert "0.125" in message
    assert "0.25" in message


def test_unknown_strategy():
    hidden = tube_mask(SMALL, 1, mask_ratio=0.5, seed=0).hidden
    message = refusal(select, "besst", hidden, SMALL, budget=0.1, seed=0)
    assert "besst" in message
    assert all(strategy in message for strategy in STRATEGIES)


def test_adaptive_without_scores():
    hidden = tube_mask(SMALL, 1, mask_ratio=0.5, seed=0).hidden
    message = refusal(select, "adaptive", hidden, SMALL, budget=0.1, seed=0)
    assert "scores" in message


@pytest.mark.parametrize("shape", [(2, 24), (1, 48), (48,), (2, 48, 1), (2, 47), (2, 49)])
def test_scores_of_a_wrong_shape(shape):
    hidden = tube_mask(SMALL, 2, mask_ratio=0.5, seed=0).hidden
    message = refusal(select, "adaptive", hidden, SMALL, budget=0.1, seed=0, scores=torch.zeros(shape))
    assert "scores" in message
    for shown in (shape, (2, 48)):
        assert ", ".join(map(str, shown)) in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_scores_that_are_not_floating_point(dtype):
    hidden = tube_mask(SMALL, 2, mask_ratio=0.5, seed=0).hidden
    scores = torch.zeros(2, 48, dtype=dtype)
    error = (ValueError, TypeError)  # a wrong dtype is a TypeError in the kernels
    message = refusal(select, "adaptive", hidden, SMALL, budget=0.1, seed=0, scores=scores, error=error)
    assert str(dtype).removeprefix("torch.") in message


@pytest.mark.parametrize("strategy", ["adaptive", "random", "uniform"])
def test_fewer_hidden_tokens_than_the_budget(strategy):
    hidden = tube_mask(SMALL, 1, mask_ratio=0.5, seed=0).hidden
    scores = torch.zeros(1, 48)
    message = refusal(select, strategy, hidden, SMALL, budget=0.75, seed=0, scores=scores)
    assert "36" in message
    assert "24" in message
