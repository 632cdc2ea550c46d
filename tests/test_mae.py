"""The masked autoencoder against a plain implementation with boolean masks and no kernels."""

import math

import pytest
import torch
from einops import rearrange
from torch import nn

from vmae import Tokens, VideoMAE, VideoMAEConfig, decoder_budget, tube_mask
from vmae.mae import IMAGENET_MEAN, IMAGENET_STD, sine_cosine
from vmae.masking import select

FRAMES, SIDE = 8, 64
GRID = (4, 4, 4)
N = math.prod(GRID)
SMALL = {"frames": FRAMES, "size": SIDE, "width": 48, "depth": 2, "heads": 3, "decoder_width": 32, "decoder_heads": 2}


def make(**changes) -> VideoMAE:
    torch.manual_seed(0)
    model = VideoMAE(VideoMAEConfig.tiny(**{**SMALL, "mask_ratio": 0.75, "budget": 0.25, "random": 0.1, **changes}))
    with torch.no_grad():
        for p in model.parameters():  # zero biases and unit gains would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
    return model


def clip(batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 4, 1, 2, 3)


def tokens(batch: int = 2, grid=GRID) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    n = math.prod(grid)
    latents = torch.randint(-4, 4, (batch, n, 6), generator=generator) / 4
    codes = torch.zeros(batch, n, dtype=torch.int32)
    return Tokens(latents, codes, torch.rand(batch, n, generator=generator), grid)


def masks(model: VideoMAE, given: Tokens, seed: int):
    config = model.config
    mask = tube_mask(GRID, 2, mask_ratio=config.mask_ratio, seed=seed)
    settings = {"budget": config.budget, "random": config.random, "seed": seed, "scores": given.scores}
    return mask, select(config.strategy, mask.hidden, GRID, **settings)


def plain_block(block, x):
    """A transformer block written out, attention and all."""
    y = block.norm1(x)
    heads = block.attn.heads
    q, k, v = block.attn.qkv(y).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    y = block.norm2(x)
    return x + block.mlp[2](torch.nn.functional.gelu(block.mlp[0](y)))


def plain_prediction(model, video, visible, selected):
    """Embed every token with a convolution, then throw the hidden ones away; decode with a scatter and a gather."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (video.double() / 255 - mean) / std
    kernel = model.patch_embed.weight.view(-1, 2, 16, 16, 3).permute(0, 4, 1, 2, 3)
    x = nn.functional.conv3d(x, kernel, model.patch_embed.bias, stride=(2, 16, 16)).flatten(2).transpose(1, 2)
    x = x + sine_cosine(N, model.config.width)
    seen = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, visible, True)
    x = x[seen].view(len(x), -1, x.shape[-1])
    for block in model.blocks:
        x = plain_block(block, x)
    x = model.to_decoder(model.norm(x))
    full = model.mask_token.expand(len(x), N, -1).clone()
    full[seen] = x.flatten(0, 1)
    full = full + sine_cosine(N, model.config.decoder_width)
    wanted = torch.zeros(seen.shape, dtype=torch.bool).scatter(1, selected, True)
    z = torch.stack([torch.cat((full[b][seen[b]], full[b][wanted[b]])) for b in range(len(full))])
    for block in model.decoder_blocks:
        z = plain_block(block, z)
    return model.head(model.decoder_norm(z[:, seen[0].sum() :]))


@pytest.mark.parametrize("target", ["latent", "pixels"])
@pytest.mark.parametrize("strategy", ["adaptive", "random", "uniform", "none"])
def test_loss_equals_a_plain_implementation(strategy, target):
    model = make(strategy=strategy, target=target, random=0.1 if strategy == "adaptive" else 0.0).double()
    given = tokens()
    mask, selected = masks(model, given, seed=7)
    prediction = plain_prediction(model, clip(), mask.visible, selected)
    torch.testing.assert_close(model.predict(clip(), mask.visible, selected), prediction, rtol=1e-9, atol=1e-9)
    if target == "latent":
        wanted = torch.stack([given.latents[b, selected[b]] for b in range(2)]).double()
    else:
        pixels = rearrange(clip().double() / 255, "b c (t p) (h q) (w r) -> b (t h w) (p q r) c", p=2, q=16, r=16)
        pixels = (pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True).sqrt() + 1e-6)
        wanted = torch.stack([pixels.flatten(2)[b, selected[b]] for b in range(2)])
    expected = ((prediction - wanted) ** 2).mean()
    got = model(clip(), given, seed=7)
    assert got.ndim == 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_encoder_sees_visible_tokens_only():
    model = make()
    given = tokens()
    mask, selected = masks(model, given, seed=7)
    changed = rearrange(clip().clone(), "b c (t p) (h q) (w r) -> b (t h w) (p q r c)", p=2, q=16, r=16)
    for b in range(2):
        changed[b, mask.hidden[b]] = 255
    video = rearrange(changed, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=4, h=4, p=2, q=16, r=16)
    assert torch.equal(model.predict(clip(), mask.visible, selected), model.predict(video, mask.visible, selected))
    assert not torch.equal(model(clip(), given, seed=8), model(video, given, seed=8))


def test_only_selected_targets_count():
    model = make()
    given = tokens()
    mask, selected = masks(model, given, seed=7)
    loss = model(clip(), given, seed=7)
    other = given.latents.clone()
    for b in range(2):
        rest = torch.ones(N, dtype=torch.bool)
        rest[selected[b]] = False
        other[b, rest] += 1
    assert torch.equal(loss, model(clip(), given._replace(latents=other), seed=7))
    assert not set(mask.visible[0].tolist()) & set(selected[0].tolist())


def test_seed_fixes_the_masks():
    model, given = make(), tokens()
    assert torch.equal(model(clip(), given, seed=1), model(clip(), given, seed=1))
    assert not torch.equal(model(clip(), given, seed=1), model(clip(), given, seed=2))
    torch.manual_seed(5)
    first = model(clip(), given)
    torch.manual_seed(5)
    assert torch.equal(first, model(clip(), given))


def test_every_parameter_learns():
    model = make()
    model(clip(), tokens(), seed=1).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_encode_gives_every_token_and_any_grid():
    model = make().eval()
    assert model.encode(clip()).shape == (2, N, 48)
    longer = torch.cat((clip(), clip()), dim=2)
    assert model.encode(longer).shape == (2, 2 * N, 48)
    assert model(longer, tokens(grid=(8, 4, 4)), seed=1).isfinite()
    assert model.encode(clip()).shape == (2, N, 48)


def test_positions_are_videomae_s():
    table = sine_cosine(5, 6)
    for position in range(5):
        for place in range(6):
            angle = position / 10000 ** (2 * (place // 2) / 6)
            expected = math.sin(angle) if place % 2 == 0 else math.cos(angle)
            assert float(table[position, place]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("preset", "millions"), [("small", 22), ("base", 86), ("large", 303)]
)  # ViT-S, ViT-B and ViT-L as everybody counts them
def test_presets_have_the_size_of_their_name(preset, millions):
    with torch.device("meta"):
        config = getattr(VideoMAEConfig, preset)(frames=16)
        blocks = nn.ModuleList(type(make().blocks[0])(config.width, config.heads) for _ in range(config.depth))
    count = sum(p.numel() for p in blocks.parameters()) + (1536 + 1) * config.width
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_defaults_are_the_paper_s():
    config = VideoMAEConfig()
    assert config == VideoMAEConfig.base(frames=128, size=224)
    assert decoder_budget(12_544, budget=config.budget, random=config.random) == (1882, 627)


def test_saved_and_loaded_model_is_the_same(tmp_path):
    model = make().eval()
    model.save_pretrained(tmp_path)
    loaded = VideoMAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.encode(clip()), model.encode(clip()))


def test_compiled_step_equals_the_eager_one():
    model, given = make(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        torch.testing.assert_close(compiled(clip(), given, seed=seed), model(clip(), given, seed=seed))


def test_autocast_stays_near_full_precision():
    model, given = make(), tokens()
    full = model(clip(), given, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(clip(), given, seed=1)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "tokens: expected"),
        (tokens(grid=(2, 4, 4)), r"grid, \(4, 4, 4\), got \(2, 4, 4\)"),
        (tokens()._replace(latents=torch.zeros(2, N, 5)), r"latents of shape \[2, 64, 6\], got \[2, 64, 5\]"),
        (tokens()._replace(scores=torch.zeros(1, N)), r"scores: expected shape \[2, 64\].*got \[1, 64\]"),
    ],
)
def test_wrong_tokens_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        make()(clip(), given, seed=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 7}, "frames.*7"),
        ({"size": 100}, "size.*100"),
        ({"heads": 5}, "heads, 5, got 48"),
        ({"mask_ratio": 1.2}, "mask_ratio.*1.2"),
        ({"budget": 0.05}, "random.*0.1"),
        ({"strategy": "best"}, "strategy.*'best'"),
        ({"target": "codes"}, "target.*'codes'"),
    ],
)
def test_wrong_configurations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0.9}, r"budget: expected 1 to 48 of 64 tokens.*got 0\.9 = 58"),
        ({"budget": 0.0, "random": 0.0}, "budget: expected 1 to 48 .*= 0"),
        ({"mask_ratio": 1.0}, "mask_ratio: expected at least one of 16 places to stay visible"),
        ({"mask_ratio": 0.0, "strategy": "none"}, "mask_ratio: expected at least one of 16 places to be hidden"),
    ],
)
def test_impossible_masks_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_masks_impossible_on_another_grid_are_refused():
    model = make(budget=0.01, random=0.0)  # 1 of 64 tokens, and none of 16
    with pytest.raises(ValueError, match="budget: expected 1 to 12 of 16 tokens"):
        model(clip()[:, :, :2], tokens(grid=(1, 4, 4)), seed=1)


def test_low_precision_model_takes_any_grid():
    model = make().bfloat16().eval()
    for frames in (2, 8, 4):
        assert model.encode(clip()[:, :, :frames]).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), 255.0, -0.5])
def test_videos_out_of_range_are_refused(bad):
    video = clip().float() / 255
    video[0, 0, 3, 5, 5] = bad
    with pytest.raises(ValueError, match=r"expected floating point values in \[0, 1\]"):
        make()(video, tokens(), seed=1)


def test_seed_must_be_an_integer():
    with pytest.raises(TypeError, match="seed: expected an integer, got float"):
        make()(clip(), tokens(), seed=1.5)
