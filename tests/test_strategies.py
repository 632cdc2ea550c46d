"""What the decoder is to reconstruct, by every strategy: against plain loops, in parts of a batch, compiled."""

import functools
import itertools
import math
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vmae import AdaptiveTokenizer, TokenizerConfig, Tokens, VideoMAE, VideoMAEConfig
from vmae.mae import IMAGENET_MEAN, IMAGENET_STD, everest_scores
from vmae.masking import SCORED, STRATEGIES, decoder_budget, select, tube_mask

GRID = (4, 3, 3)
N = math.prod(GRID)
FRAMES, SIDE = 8, 48

grids = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**40)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(batch: int = 2, frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> Tensor:
    pixels = torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=generator())
    return pixels.permute(0, 4, 1, 2, 3)


def scores(batch: int, n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(batch, n, generator=generator(seed))


def make(strategy: str, **changes) -> VideoMAE:
    torch.manual_seed(0)
    size = {"frames": FRAMES, "size": SIDE, "width": 32, "depth": 2, "heads": 2}
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    masks = {"mask_ratio": 0.75, "budget": 0.25, "random": 0.1 if strategy in SCORED else 0.0}
    config = {**size, **decoder, **masks, "target": "pixels", **changes}
    return VideoMAE(VideoMAEConfig.tiny(strategy=strategy, **config))


def gradients(model: nn.Module, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what holds for every strategy --------------------------------------------------------------------------------


@st.composite
def choices(draw) -> dict:
    """Arguments of `select`, with K from 1 to all hidden tokens, of a tube mask or of any tokens at all."""
    grid, batch, seed = draw(grids), draw(st.integers(1, 3)), draw(seeds)
    n = math.prod(grid)
    if draw(st.booleans()):
        hidden = tube_mask(grid, batch, mask_ratio=draw(st.integers(0, 100)) / 100, seed=seed).hidden
    else:
        places = grid[1] * grid[2]  # as many in each latent frame, which "uniform" relies on
        count = draw(st.integers(1, places))
        keys = torch.rand(batch, grid[0], places, generator=generator(seed % 2**31))
        frame = torch.arange(grid[0])[None, :, None] * places
        hidden = (keys.argsort(-1)[..., :count].sort(-1).values + frame).flatten(1)
    assume(hidden.shape[1] > 0)
    k = draw(st.sampled_from([1, hidden.shape[1], draw(st.integers(1, hidden.shape[1]))]))
    return {"hidden": hidden, "grid": grid, "budget": k / n, "seed": seed}


def assert_valid(chosen: Tensor, hidden: Tensor, k: int) -> None:
    assert chosen.dtype == torch.int64
    assert chosen.shape == (len(hidden), k)
    for row, allowed in zip(chosen.tolist(), hidden.tolist(), strict=True):
        assert all(a < b for a, b in itertools.pairwise(row))
        assert set(row) <= set(allowed)


@settings(max_examples=100, deadline=None)
@given(arguments=choices(), strategy=st.sampled_from(STRATEGIES), share=st.integers(0, 4))
def test_exactly_k_distinct_hidden_tokens_in_order(arguments, strategy, share):
    hidden, n = arguments["hidden"], math.prod(arguments["grid"])
    arguments |= {"scores": scores(len(hidden), n), "random": arguments["budget"] * share / 4}
    chosen = select(strategy, **arguments)
    k = hidden.shape[1] if strategy == "none" else round(arguments["budget"] * n)
    assert_valid(chosen, hidden, k)
    assert torch.equal(chosen, select(strategy, **arguments))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_of_torchs_generator_does_not_matter(strategy):
    hidden = tube_mask(GRID, 3, mask_ratio=0.75, seed=1).hidden
    how = {"budget": 0.25, "random": 0.1, "seed": 4, "scores": scores(3)}
    torch.manual_seed(1)
    first, state = select(strategy, hidden, GRID, **how), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, select(strategy, hidden, GRID, **how))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_than_the_hidden_tokens_are_refused(strategy):
    hidden = tube_mask(GRID, 1, mask_ratio=0.5, seed=0).hidden  # 16 of 36
    how = {"budget": 0.75, "seed": 0, "scores": scores(1)}
    if strategy == "none":
        assert torch.equal(select(strategy, hidden, GRID, **how), hidden)
        return
    with pytest.raises(ValueError, match=r"16 of 36 tokens that are hidden, got 0\.75 = 27"):
        select(strategy, hidden, GRID, **how)


# --- running cells ------------------------------------------------------------------------------------------------


def turns(hidden: list[int], grid: tuple[int, int, int], start: int) -> list[list[int]]:
    """The hidden tokens of each of the four turns, where cells start at place `start` in the first latent frame."""
    found: list[list[int]] = [[], [], [], []]
    for frame in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                token = (frame * grid[1] + y) * grid[2] + x
                if token in hidden:
                    place = [[0, 1], [2, 3]][y % 2][x % 2]
                    first = (start + frame) % 4  # the place whose turn it is in this latent frame
                    found[(place - first) % 4].append(token)
    return found


def is_even(ranks: list[int], count: int) -> bool:
    """Whether ranks are spread evenly over 0 to count - 1: gaps differ by at most one, and no start or end is bare."""
    gaps = [b - a for a, b in itertools.pairwise(ranks)]
    if gaps and max(gaps) - min(gaps) > 1:
        return False
    taken = [sum(rank < end for rank in ranks) for end in range(count + 1)]
    return all(abs(number - end * len(ranks) / count) < 1 for end, number in enumerate(taken))


def starts(chosen: list[int], hidden: list[int], grid: tuple[int, int, int]) -> list[int]:
    """The starting turns with which running cells choose these tokens: whole turns, then one that is thinned."""
    found = []
    for start in range(4):
        left, ok = set(chosen), True
        for turn in turns(hidden, grid, start):
            wanted = min(len(left), len(turn))
            taken = [rank for rank, token in enumerate(turn) if token in left]
            ok = ok and len(taken) == wanted and (not taken or is_even(taken, len(turn)))
            left -= set(turn)
            if wanted < len(turn):
                ok = ok and not left
        if ok:
            found.append(start)
    return found


@settings(max_examples=200, deadline=None)
@given(arguments=choices())
def test_running_cells_take_turn_after_turn(arguments):
    hidden, grid = arguments["hidden"], arguments["grid"]
    chosen = select("running_cell", **arguments)
    assert_valid(chosen, hidden, round(arguments["budget"] * math.prod(grid)))
    for row, allowed in zip(chosen.tolist(), hidden.tolist(), strict=True):
        assert starts(row, allowed, grid), "no starting turn explains the choice"


@pytest.mark.parametrize("k", range(1, 55))
def test_running_cells_thin_the_last_turn_evenly(k):
    """Any number of tokens of an odd grid, 6 x 3 x 3."""
    hidden = torch.arange(54).expand(4, -1)
    chosen = select("running_cell", hidden, (6, 3, 3), budget=k / 54, seed=k)
    assert_valid(chosen, hidden, k)
    for row in chosen.tolist():
        assert starts(row, list(range(54)), (6, 3, 3))


@pytest.mark.parametrize("grid", [(4, 2, 2), (8, 4, 6), (6, 2, 8), (1, 4, 4)])
def test_a_quarter_is_one_token_of_each_cell_in_turn(grid):
    frames, height, width = grid
    hidden = torch.arange(math.prod(grid)).expand(8, -1)
    for row in select("running_cell", hidden, grid, budget=0.25, seed=5).tolist():
        chosen = set(row)
        for y, x in itertools.product(range(0, height, 2), range(0, width, 2)):
            cell = [(y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)]
            order = [
                [at for at, (row, column) in enumerate(cell) if (t * height + row) * width + column in chosen]
                for t in range(frames)
            ]
            assert all(len(places) == 1 for places in order)
            for t in range(frames - 3):
                assert sorted(itertools.chain(*order[t : t + 4])) == [0, 1, 2, 3]
            assert order[4:] == order[:-4]


def test_a_half_is_two_turns():
    """The places of the second turn are those of the first one, a latent frame later."""
    grid, hidden = (5, 4, 4), torch.arange(80).expand(6, -1)
    quarter, half = (select("running_cell", hidden, grid, budget=budget, seed=5).tolist() for budget in (0.25, 0.5))
    for first, both in zip(quarter, half, strict=True):
        assert set(first) < set(both)
        second = set(both) - set(first)
        assert {token - 16 for token in first if token >= 16} == {token for token in second if token < 64}


def start_of(hidden: Tensor, **how) -> list[int]:
    """The starting turn of each row, where all tokens of 8 x 4 x 4 are hidden."""
    chosen = select("running_cell", hidden, (8, 4, 4), budget=0.25, **how)
    found = [starts(row, list(range(128)), (8, 4, 4)) for row in chosen.tolist()]
    assert all(len(turn) == 1 for turn in found)
    return [turn[0] for turn in found]


def test_clips_start_at_turns_of_their_own():
    by_row = start_of(torch.arange(128).expand(200, -1), seed=3)
    by_seed = [start_of(torch.arange(128)[None], seed=seed)[0] for seed in range(200)]
    for found in (by_row, by_seed):
        assert all(25 < found.count(turn) < 75 for turn in range(4))
    assert start_of(torch.arange(128).expand(200, -1), seed=3) == by_row
    assert start_of(torch.arange(128).expand(50, -1), seed=3, row=150) == by_row[150:]


def test_the_start_does_not_hang_on_the_tube_mask():
    """Its first place is as often visible whatever the starting turn."""
    visible = tube_mask((8, 4, 4), 400, mask_ratio=0.5, seed=9).visible
    first_visible = (visible == 0).any(1).tolist()
    found = start_of(torch.arange(128).expand(400, -1), seed=9)
    share = [[seen for seen, at in zip(first_visible, found, strict=True) if at == turn] for turn in range(4)]
    assert all(0.25 < sum(seen) / len(seen) < 0.75 for seen in share)


def test_running_cells_need_no_scores_and_no_random_share():
    hidden = tube_mask(GRID, 2, mask_ratio=0.75, seed=1).hidden
    plain = select("running_cell", hidden, GRID, budget=0.25, seed=4)
    for more in ({"random": 0.1}, {"scores": scores(2)}):
        assert torch.equal(select("running_cell", hidden, GRID, budget=0.25, seed=4, **more), plain)


# --- strategies with scores ---------------------------------------------------------------------------------------


def top(hidden: list[int], values: list[float], count: int) -> list[int]:
    """NaN first, then by value; ties go to the earlier token."""
    ranks = {token: (0, 0.0) if math.isnan(values[token]) else (1, -values[token]) for token in hidden}
    order = sorted(hidden, key=lambda token: (ranks[token], token))
    return sorted(order[:count])


@settings(max_examples=40, deadline=None)
@given(arguments=choices(), share=st.integers(0, 3))
def test_strategies_with_scores_differ_in_nothing_else(arguments, share):
    batch, n = len(arguments["hidden"]), math.prod(arguments["grid"])
    arguments |= {"scores": scores(batch, n), "random": arguments["budget"] * share / 4}
    first, *others = (select(strategy, **arguments) for strategy in SCORED)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("strategy", SCORED)
def test_nan_infinities_and_ties(strategy):
    values = torch.tensor([math.nan, -math.inf, 0.0, -0.0, 1.0, 1.0, math.inf, -2.0])
    hidden = tube_mask(GRID, 3, mask_ratio=0.75, seed=1).hidden  # 24 tokens
    scored = values[torch.randint(0, len(values), (3, N), generator=generator(5))]
    for k in (1, 5, 9, 16, 24):
        chosen = select(strategy, hidden, GRID, budget=k / N, seed=2, scores=scored)
        for row, allowed, score in zip(chosen.tolist(), hidden.tolist(), scored.tolist(), strict=True):
            assert row == top(allowed, score, k)
    for value in (math.nan, -math.inf, math.inf, 0.0):
        chosen = select(strategy, hidden, GRID, budget=0.25, seed=2, scores=torch.full((3, N), value))
        assert torch.equal(chosen, hidden[:, :9])


@pytest.mark.parametrize("strategy", SCORED)
@pytest.mark.parametrize("value", [None, math.nan, -math.inf])
def test_random_share_beside_the_highest_scores(strategy, value):
    hidden = tube_mask(GRID, 2, mask_ratio=0.75, seed=1).hidden
    scored = scores(2) if value is None else torch.full((2, N), value)
    best = [set(top(allowed, score, 5)) for allowed, score in zip(hidden.tolist(), scored.tolist(), strict=True)]
    drawn = [set(), set()]
    for seed in range(40):
        chosen = select(strategy, hidden, GRID, budget=0.25, random=4 / N, seed=seed, scores=scored)
        assert_valid(chosen, hidden, 9)
        for at, row in enumerate(chosen.tolist()):
            assert best[at] <= set(row)
            drawn[at] |= set(row) - best[at]
    assert [len(rest) for rest in drawn] == [24 - 5] * 2  # every other hidden token now and then


@pytest.mark.parametrize("strategy", SCORED)
def test_missing_scores_name_the_strategy(strategy):
    hidden = tube_mask(GRID, 2, mask_ratio=0.75, seed=1).hidden
    for scored in (None, torch.zeros(2, N - 1), torch.zeros(1, N)):
        with pytest.raises(ValueError, match=f"scores: expected shape .*2, 36.* strategy {strategy}, got"):
            select(strategy, hidden, GRID, budget=0.25, seed=0, scores=scored)


@pytest.mark.parametrize("strategy", ["adaptive", "flow"])
def test_a_model_without_scores_names_the_strategy(strategy):
    with pytest.raises(ValueError, match=f"(tokens|scores): expected.*{strategy}"):
        make(strategy)(clip(), seed=1)


def tokens(batch: int = 2) -> Tokens:
    latents = torch.randint(-4, 4, (batch, N, 6), generator=generator(2)) / 4
    return Tokens(latents, torch.zeros(batch, N, dtype=torch.int32), scores(batch, seed=7), GRID)


def test_tokens_scores_are_for_the_adaptive_strategy_alone():
    how = {"target": "latent"}
    with pytest.raises(ValueError, match=r"scores: expected shape .* strategy flow, got None"):
        make("flow", **how)(clip(), tokens(), seed=1)
    model = make("everest", **how)
    own = everest_scores(clip(), model.patch_embed)
    assert torch.equal(model(clip(), tokens(), seed=1), model(clip(), tokens(), scores=own, seed=1))
    model = make("adaptive", **how)
    assert torch.equal(model(clip(), tokens(), seed=1), model(clip(), tokens(), scores=tokens().scores, seed=1))


@pytest.mark.parametrize("strategy", SCORED)
def test_given_scores_count_above_all_others(strategy):
    model, scored = make(strategy, target="latent"), scores(2)
    mask, selected = model.masks(clip(), tokens(), scores=scored, seed=3)
    expected = tube_mask(GRID, 2, mask_ratio=0.75, seed=3)
    assert torch.equal(mask.visible, expected.visible)
    assert torch.equal(mask.hidden, expected.hidden)
    how = {"budget": 0.25, "random": 0.1, "seed": 3, "scores": scored}
    assert torch.equal(selected, select(strategy, expected.hidden, GRID, **how))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_is_of_the_masks(strategy):
    model = make(strategy)
    how = {"scores": scores(2), "seed": 6}
    mask, selected = model.masks(clip(), **how)
    assert selected.shape == (2, 24 if strategy == "none" else 9)
    error = model.predict(clip(), mask.visible, selected) - model.target(clip(), None, selected)
    torch.testing.assert_close(model(clip(), **how), error.square().mean(), rtol=1e-6, atol=1e-6)


def test_masks_without_a_seed_follow_torchs_generator():
    model = make("running_cell")
    torch.manual_seed(3)
    first, second = model.masks(clip()), model.masks(clip())
    torch.manual_seed(3)
    again = model.masks(clip())
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0].visible, second[0].visible)


# --- scores of the patch embedding --------------------------------------------------------------------------------


def plain_everest(video: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Tubelet by tubelet, in fp64; `video` [B, 3, T, H, W] in [0, 1]."""
    b, _, t, h, w = video.shape
    grid = (t // 2, h // 16, w // 16)
    features = np.empty((b, *grid, len(weight)))
    for clip, frame, y, x in np.ndindex(b, *grid):
        values = []
        for dt, dy, dx, channel in np.ndindex(2, 16, 16, 3):
            value = video[clip, channel, 2 * frame + dt, 16 * y + dy, 16 * x + dx]
            values.append((value - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel])
        features[clip, frame, y, x] = weight @ np.array(values) + bias
    scores = np.zeros((b, *grid))
    for clip, frame, y, x in np.ndindex(b, *grid):
        later = max(frame, 1) if grid[0] > 1 else 0
        difference = features[clip, later, y, x] - features[clip, max(later - 1, 0), y, x]
        scores[clip, frame, y, x] = math.sqrt((difference**2).sum())
    return scores.reshape(b, -1)


def embedding(width: int = 8) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(1536, width)
    nn.init.normal_(layer.weight, std=0.05)
    return layer


def doubles(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


@pytest.mark.parametrize("shape", [(2, 6, 32, 48), (1, 2, 16, 32), (1, 4, 48, 16)])
def test_everest_scores_against_a_loop(shape):
    video, layer = clip(*shape), embedding()
    expected = plain_everest(video.double().numpy() / 255, *doubles(layer))
    found = everest_scores(video, layer)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_everest_scores_of_the_first_latent_frame_are_the_seconds():
    found = everest_scores(clip(), embedding()).view(2, *GRID)
    assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found[:, 1], found[:, 2])
    assert torch.equal(everest_scores(clip(frames=2), embedding()), torch.zeros(2, 9))


def test_everest_scores_of_what_stands_still_are_0():
    still = clip(frames=2).repeat(1, 1, 4, 1, 1)
    assert torch.equal(everest_scores(still, embedding(32)), torch.zeros(2, N))


def test_everest_scores_ignore_autocast():
    layer, model = embedding(), make("everest")
    plain, (_, masks) = everest_scores(clip(), layer), model.masks(clip(), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(everest_scores(clip(), layer), plain)
        assert torch.equal(model.masks(clip(), seed=1)[1], masks)


def test_everest_scores_of_a_low_precision_model_are_computed_in_float32():
    layer = embedding().bfloat16()
    expected = plain_everest(clip(1, 4, 16, 32).double().numpy() / 255, *doubles(layer))
    found = everest_scores(clip(1, 4, 16, 32), layer)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_everest_scores_of_bytes_and_numbers_agree():
    layer = embedding()
    expected = everest_scores(clip(), layer)
    torch.testing.assert_close(everest_scores(clip().float() / 255, layer), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everest_scores(clip().double() / 255, layer), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everest_scores(clip().contiguous(), layer), expected, rtol=0, atol=0)


def test_everest_scores_of_a_clip_do_not_depend_on_the_others():
    layer, whole = embedding(32), everest_scores(clip(5), embedding(32))
    for at in range(5):
        torch.testing.assert_close(everest_scores(clip(5)[at : at + 1], layer)[0], whole[at], rtol=1e-6, atol=1e-6)


def test_everest_ranks_by_the_present_embedding():
    model = make("everest")
    before = model.masks(clip(), seed=1)[1]
    with torch.no_grad():
        nn.init.normal_(model.patch_embed.weight, generator=generator(8))
    after = model.masks(clip(), seed=1)[1]
    assert not torch.equal(before, after)
    assert torch.equal(after, model.masks(clip(), scores=everest_scores(clip(), model.patch_embed), seed=1)[1])


def test_no_gradient_passes_through_everest_scores():
    model = make("everest")
    own = everest_scores(clip(), model.patch_embed)
    assert not own.requires_grad
    implicit, explicit = model(clip(), seed=2), model(clip(), scores=own, seed=2)
    assert torch.equal(implicit, explicit)
    found, expected = gradients(model, implicit), gradients(model, explicit)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["patch_embed.weight"].abs().sum() > 0


# --- optical flow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 32, 48), (1, 2, 48, 16)])
def test_flow_scores_against_a_loop(shape):
    cv2 = pytest.importorskip("cv2")
    from vmae.flow import flow_scores

    blurred = nn.functional.avg_pool3d(clip(*shape).float(), (1, 5, 5), stride=1, padding=(0, 2, 2)).byte()
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    batch, frames, height, width = shape
    expected = np.empty((batch, frames // 2, height // 16, width // 16))
    for number, video in enumerate(blurred.permute(0, 2, 3, 4, 1).contiguous().numpy()):
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
        lengths = [np.hypot(*np.moveaxis(dis.calc(a, b, None), -1, 0)) for a, b in itertools.pairwise(grey)]
        lengths.insert(0, lengths[0])
        for t, y, x in np.ndindex(*expected.shape[1:]):
            parts = [length[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] for length in lengths[2 * t : 2 * t + 2]]
            expected[number, t, y, x] = np.mean(parts)
    found = flow_scores(blurred)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.reshape(batch, -1), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([flow_scores(blurred[at : at + 1]) for at in range(batch)]), found)


def test_the_flow_strategy_takes_what_moves():
    pytest.importorskip("cv2")
    from vmae.flow import flow_scores

    texture = clip(1, 2, 48, 80)[:, :, :1]
    texture = nn.functional.avg_pool3d(texture.float(), (1, 5, 5), stride=1, padding=(0, 2, 2)).byte()
    video = texture[..., :48].repeat(1, 1, FRAMES, 1, 1)
    for t in range(FRAMES):  # the lower third moves by two pixels a frame
        video[0, :, t, 32:] = texture[0, :, 0, 32:, 2 * t : 2 * t + 48]
    model = make("flow", random=0.0)
    mask, selected = model.masks(video, scores=flow_scores(video), seed=2)
    moving = {token for token in mask.hidden[0].tolist() if token % 9 >= 6}
    assert len(moving) >= 4
    assert len(moving & set(selected[0].tolist())) == min(len(moving), 9)


# --- parts of a batch ---------------------------------------------------------------------------------------------

PARTS = [(0, 2), (2, 3), (3, 6)]
OFFSETS = [0, 3, 2**20]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_are_masked_as_the_whole_is(strategy, offset):
    how = {"mask_ratio": 0.75, "seed": 5}
    mask = tube_mask(GRID, 6, **how, row=offset)
    scored = {"budget": 0.25, "random": 0.1, "seed": 5}
    chosen = select(strategy, mask.hidden, GRID, **scored, row=offset, scores=scores(6))
    for a, b in PARTS:
        part = tube_mask(GRID, b - a, **how, row=offset + a)
        assert torch.equal(part.visible, mask.visible[a:b])
        assert torch.equal(part.hidden, mask.hidden[a:b])
        found = select(strategy, part.hidden, GRID, **scored, row=offset + a, scores=scores(6)[a:b])
        assert torch.equal(found, chosen[a:b])


def test_rows_begin_at_0():
    mask = tube_mask(GRID, 3, mask_ratio=0.75, seed=5)
    assert torch.equal(mask.visible, tube_mask(GRID, 3, mask_ratio=0.75, seed=5, row=0).visible)
    assert not torch.equal(mask.visible, tube_mask(GRID, 3, mask_ratio=0.75, seed=5, row=1).visible)
    for strategy in ("random", "running_cell", "flow"):
        how = {"budget": 0.25, "random": 0.1, "seed": 5, "scores": scores(1).expand(8, -1)}
        first = select(strategy, mask.hidden[:1].expand(8, -1), GRID, **how)
        assert torch.equal(first, select(strategy, mask.hidden[:1].expand(8, -1), GRID, **how, row=0))
        assert not torch.equal(first, select(strategy, mask.hidden[:1].expand(8, -1), GRID, **how, row=8))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(strategy):
    model, scored = make(strategy), None if strategy == "everest" else scores(4)
    whole_mask, whole_selected = model.masks(clip(4), scores=scored, seed=8, row=4)
    losses = []
    for a in (0, 2):
        how = {"scores": None if scored is None else scored[a : a + 2], "seed": 8, "row": 4 + a}
        mask, selected = model.masks(clip(4)[a : a + 2], **how)
        assert torch.equal(mask.visible, whole_mask.visible[a : a + 2])
        assert torch.equal(mask.hidden, whole_mask.hidden[a : a + 2])
        assert torch.equal(selected, whole_selected[a : a + 2])
        losses.append(model(clip(4)[a : a + 2], **how))
    whole = model(clip(4), scores=scored, seed=8, row=4)
    assert sum(losses).item() / 2 == pytest.approx(whole.item(), rel=1e-6)
    found, expected = gradients(model, *[loss / 2 for loss in losses]), gradients(model, whole)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def tokenizer(selection: str) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    config = {"width": 8, "scorer_width": 8, "samples": 16, "keep": 0.5, "probes": 0.5}
    return AdaptiveTokenizer(TokenizerConfig.tiny(selection=selection, **config))


@pytest.mark.parametrize("strategy", ["adaptive", "none"])
def test_each_clips_own_loss(strategy):
    model, scored = make(strategy), scores(3)
    losses = model(clip(3), scores=scored, seed=8, row=4, reduction="none")
    alone = [model(clip(3)[i : i + 1], scores=scored[i : i + 1], seed=8, row=4 + i) for i in range(3)]
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(losses.mean(), model(clip(3), scores=scored, seed=8, row=4))
    with pytest.raises(ValueError, match="reduction: expected mean or none, got 'sum'"):
        model(clip(3), scores=scored, reduction="sum")


@pytest.mark.parametrize("selection", ["straight_through", "perturbed"])
@pytest.mark.parametrize("train", [True, False])
def test_parts_keep_the_tokens_that_the_whole_keeps(selection, train):
    model, scored = tokenizer(selection).train(train), scores(6)
    whole = model.keep_weights(scored, GRID, seed=3, row=2)
    for a, b in PARTS:
        assert torch.equal(model.keep_weights(scored[a:b], GRID, seed=3, row=2 + a), whole[a:b])
    same = model.keep_weights(scored[:1].expand(2, -1), GRID, seed=3)
    assert torch.equal(same[0], same[1]) is not train  # each clip has probes of its own


@pytest.mark.parametrize("selection", ["straight_through", "perturbed"])
def test_parts_pass_the_gradients_to_the_scores_that_the_whole_passes(selection):
    model, scored, slope = tokenizer(selection).train(), scores(6).requires_grad_(), scores(6, seed=9)
    (whole,) = torch.autograd.grad(model.keep_weights(scored, GRID, seed=3), scored, slope)
    for a, b in PARTS:
        weights = model.keep_weights(scored[a:b], GRID, seed=3, row=a)
        (part,) = torch.autograd.grad(weights, scored, slope[a:b])
        torch.testing.assert_close(part[a:b], whole[a:b], rtol=1e-5, atol=1e-6)


@functools.cache
def tokenizer_steps(selection: str):
    """A step of four clips, and of each half: losses, weights and codes, and the parameters' gradients."""
    model = tokenizer(selection).train()
    video = clip(4, 6, 32, 32)
    whole = model(video, seed=5, row=2)
    halves = [model(video[a : a + 2], seed=5, row=2 + a) for a in (0, 2)]
    return whole, halves, gradients(model, whole.loss), gradients(model, *[half.loss / 2 for half in halves])


@pytest.mark.parametrize("selection", ["straight_through", "perturbed"])
def test_the_tokenizers_loss_is_the_mean_of_the_halves(selection):
    whole, halves, _, _ = tokenizer_steps(selection)
    assert torch.equal(torch.cat([half.weights for half in halves]), whole.weights)
    assert torch.equal(torch.cat([half.codes for half in halves]), whole.codes)
    torch.testing.assert_close(torch.cat([half.reconstruction for half in halves]), whole.reconstruction)
    for name in ("loss", "pixels"):
        mean = sum(getattr(half, name).item() for half in halves) / 2
        assert mean == pytest.approx(getattr(whole, name).item(), rel=1e-6)
    probes = (whole.weights > 0) & (whole.weights < 1)
    assert probes.any()


@pytest.mark.parametrize("selection", ["straight_through", "perturbed"])
def test_the_tokenizers_gradient_is_the_mean_of_the_halves(selection):
    _, _, expected, found = tokenizer_steps(selection)
    wrong = [
        name for name, gradient in expected.items()
        if (found[name] - gradient).abs().max() > 1e-4 * gradient.abs().max()
    ]  # fmt: skip
    assert wrong == []


# --- recomputing and compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("strategy", ["running_cell", "everest"])
def test_recomputing_blocks_changes_no_bit(strategy, autocast):
    model = make(strategy, decoder_depth=2).train()
    calls = []
    for block in (*model.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda block, _: calls.append(block))

    def step() -> tuple[Tensor, dict[str, Tensor], int]:
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(clip(), seed=4)
        assert len(calls) == 4
        return loss, gradients(model, loss), len(calls)

    loss, expected, once = step()
    model.checkpointing = True
    again, found, twice = step()
    assert (once, twice) == (4, 8)
    assert torch.equal(again, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.keys() == expected.keys()
    model.eval()
    assert step()[2] == 4


@pytest.mark.parametrize("strategy", ["running_cell", "everest"])
def test_a_traced_step_equals_the_eager_one(strategy):
    model = make(strategy, depth=1)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**33 + 5):
        found, expected = traced(clip(), seed=seed), model(clip(), seed=seed)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        gradient, wanted = gradients(model, found), gradients(model, expected)
        for name in wanted:
            torch.testing.assert_close(gradient[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_compiled_masks_equal_the_eager_ones():
    """Compiled for real, which takes a while: a second seed makes the compiler take it for a variable."""
    models = [make(strategy, depth=1, width=32) for strategy in ("running_cell", "everest")]
    video = clip()

    def masks(seed: int) -> list[Tensor]:
        return [index for model in models for (visible, _), index in [model.masks(video, seed=seed)]]

    compiled = torch.compile(masks, fullgraph=True)
    with torch.no_grad():
        for seed in (1, 2, 2**33 + 5):
            for found, expected in zip(compiled(seed), masks(seed), strict=True):
                assert torch.equal(found, expected)


def test_the_budget_counts_as_for_the_other_strategies():
    hidden = tube_mask((64, 14, 14), 1, mask_ratio=0.9, seed=1).hidden
    chosen = select("running_cell", hidden, (64, 14, 14), budget=0.15, seed=0)
    assert_valid(chosen, hidden, decoder_budget(12544, budget=0.15, random=0.0).total)
