"""The adaptive tokenizer: a causal 3D CNN with finite scalar quantization and a score for every token."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vmae.checkpoint import Saved
from vmae.layers import CausalConv3d, FrameNorm, Hold, ResidualBlock, State, Upsample
from vmae.masking import Grid, check_ratio, share
from vmae.scorer import Scorer, nuisance, stability_loss, token_scores
from vmae.stream import TokenStream, VideoStream
from vmae.tokens import TUBELET, Tokens, check_video, joined
from vmae_kernels import fsq, soft_topk, topk
from vmae_kernels.philox import STREAM_PROBE, random_words


@dataclass(frozen=True)
class TokenizerConfig:
    """Of an `AdaptiveTokenizer`; the defaults are the `base` preset, MAGVIT's public recipe."""

    width: int = 64
    """Channels of the first stage."""
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    """Channels of each stage, as multiples of width; each stage halves rows and columns."""
    stem: int = 1
    """Spatial stride of the first convolution; stem * 2 ** stages is 16."""
    blocks: int = 2
    """Residual blocks per stage."""
    levels: tuple[int, ...] = (8, 8, 8, 8, 8, 8)
    """Of the finite scalar quantization: 18 bits."""
    scorer_width: int = 64
    tile: int = 16
    """Frames that pass through the network at a time; even."""
    keep: float = 0.49
    """Share of tokens kept in training: 768 of 1,568."""
    selection: Literal["perturbed", "straight_through"] = "straight_through"
    """How gradients pass the top-k: expected indicator under noise, or straight through to the scores."""
    sigma: float = 0.5
    """Of the perturbation, in standard deviations of a clip's scores."""
    samples: int = 64
    """Of the perturbation."""
    probes: float = 0.125
    """Share of tokens whose weight is random in a training step, to learn what a token is worth."""
    stability: float = 0.3
    """Weight of the loss that ranks what time changes above what pan, noise and flicker change."""

    def __post_init__(self):
        for name in ("multipliers", "levels"):  # lists, where they come from json
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.stem < 1 or self.stem * 2 ** len(self.multipliers) != TUBELET[1]:
            raise ValueError(
                f"stem and multipliers: expected stem * 2 ** stages = {TUBELET[1]}, "
                f"got {self.stem} * 2 ** {len(self.multipliers)}"
            )
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > 2**31:
            raise ValueError(
                f"levels: expected numbers of at least 2 with a product of at most 2^31, got {self.levels}"
            )
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma: expected a number above 0, got {self.sigma}")
        if not 0 <= self.stability < math.inf:
            raise ValueError(f"stability: expected a number from 0, got {self.stability}")
        if not 0 < self.probes <= 1:
            raise ValueError(f"probes: expected a share above 0 and up to 1, got {self.probes}")
        for name in ("width", "blocks", "scorer_width", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if min(self.multipliers, default=0) < 1:
            raise ValueError(f"multipliers: expected one number of at least 1 per stage, got {self.multipliers}")
        if self.tile < 4 or self.tile % 2:
            raise ValueError(f"tile: expected an even number of at least 4 frames, got {self.tile}")
        if self.selection not in ("perturbed", "straight_through"):
            raise ValueError(f"selection: expected perturbed or straight_through, got {self.selection!r}")
        check_ratio("keep", self.keep)

    @classmethod
    def tiny(cls, **changes) -> "TokenizerConfig":
        """For a CPU: the first convolution strides by 4, so nothing runs at full size, where the others work most."""
        return cls(**{"width": 32, "multipliers": (1, 2), "stem": 4, "blocks": 1, "scorer_width": 16, **changes})

    @classmethod
    def small(cls, **changes) -> "TokenizerConfig":
        """For one GPU: base's width and depth from half size on, a fraction of its arithmetic and memory."""
        return cls(**{"width": 64, "multipliers": (1, 2, 4), "stem": 2, "scorer_width": 32, **changes})

    @classmethod
    def base(cls, **changes) -> "TokenizerConfig":
        """MAGVIT's width and depth: 64 filters, multipliers 1 2 2 4, two residual blocks a stage, all sizes."""
        return cls(**changes)


def latents_of(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The quantized latents float32 [..., L] that codes stand for, equal to those of `AdaptiveTokenizer.encode`."""
    digits, rest = [], codes
    for level in levels:
        digits.append(rest % level - level // 2)
        rest = rest // level
    return torch.stack(digits, dim=-1).float() / torch.tensor([float(n // 2) for n in levels], device=codes.device)


class TokenizerOutput(NamedTuple):
    """Of a training step.

    loss: scalar; pixels: its part that is the reconstruction's mean squared error; reconstruction: [B, 3, T, H, W] in
    [-1, 1]; weights, codes: [B, N].
    """

    loss: Tensor
    pixels: Tensor
    reconstruction: Tensor
    weights: Tensor
    codes: Tensor


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        channels = [config.width * m for m in config.multipliers]
        wide = 7 if config.stem > 1 else 3
        self.stem = CausalConv3d(3, channels[0], (3, wide, wide), stride=(1, config.stem, config.stem))
        layers: list[nn.Module] = []
        inputs = channels[0]
        for stage, outputs in enumerate(channels):
            for _ in range(config.blocks):
                layers.append(ResidualBlock(inputs, outputs))
                inputs = outputs
            # Time is halved first: every later layer has half the frames to work on.
            layers.append(CausalConv3d(inputs, inputs, (3, 3, 3), stride=(2 if stage == 0 else 1, 2, 2)))
        layers += [ResidualBlock(inputs, inputs) for _ in range(config.blocks)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = FrameNorm(inputs), CausalConv3d(inputs, len(config.levels), (1, 1, 1))

    def forward(self, video: Tensor, state: State | None = None) -> Tensor:
        x = self.stem(video, state)
        for layer in self.layers:
            x = layer(x, state)
        return self.head(F.silu(self.norm(x)), state)


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        channels = [config.width * m for m in reversed(config.multipliers)]
        inputs = channels[0]
        self.hold = Hold()
        self.stem = CausalConv3d(len(config.levels), inputs, (3, 3, 3))
        layers: list[nn.Module] = [ResidualBlock(inputs, inputs) for _ in range(config.blocks)]
        for stage, outputs in enumerate(channels):
            last = stage == len(channels) - 1
            layers.append(Upsample(inputs, outputs, (2 if last else 1, 2, 2)))
            layers += [ResidualBlock(outputs, outputs) for _ in range(config.blocks)]
            inputs = outputs
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = FrameNorm(inputs), Upsample(inputs, 3, (1, config.stem, config.stem))

    def forward(self, latents: Tensor, weights: Tensor, state: State | None = None) -> Tensor:
        x = self.stem(self.hold(latents, weights, state), state)
        for layer in self.layers:
            x = layer(x, state)
        return self.head(F.silu(self.norm(x)), state)


class AdaptiveTokenizer(nn.Module, Saved):
    """Turns a video into quantized latents, codes and importance scores, on the token grid of the MAE.

    Source: LVMAE (NeurIPS 2024), section 3; MAGVIT (CVPR 2023) for the network; FSQ (ICLR 2024).
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.scorer = Scorer(config.scorer_width)

    def forward(self, video: Tensor, *, seed: int, keep: float | None = None, row: int = 0) -> TokenizerOutput:
        """One training step's loss: keep the highest-scoring tokens, quantize, reconstruct the pixels.

        All tokens of the first latent frame are kept. `video` as for `encode`; `seed` keys what is random; `keep` is
        another share of tokens than the configuration's; `row` is the first clip's place in the batch that this one is
        a part of.
        """
        grid = check_video(video)
        x = self.normalised(video)
        z = rearrange(self.encoder(x), "b l t h w -> b (t h w) l")
        quantized, codes = fsq(z.float(), self.config.levels)
        keep = self.config.keep if keep is None else keep
        stability = torch.zeros((), device=x.device)
        if keep == 1:  # no scores are needed
            weights = torch.ones_like(quantized[..., 0])
        elif self.training:
            now, before = (self.scorer(view) for view in nuisance(x, seed=seed))
            weights = self.keep_weights(token_scores(now, before=before), grid, seed=seed, keep=keep, row=row)
            stability = stability_loss(now, before, seed=seed)
        else:
            weights = self.keep_weights(token_scores(self.scorer(x)), grid, seed=seed, keep=keep, row=row)
        y = self.decoder(self.as_grid(quantized, grid), self.as_grid(weights[..., None], grid))
        pixels = F.mse_loss(y.float(), x)
        return TokenizerOutput(pixels + self.config.stability * stability, pixels, y, weights, codes)

    def keep_weights(self, scores: Tensor, grid: Grid, *, seed: int, keep: float | None = None, row: int = 0) -> Tensor:
        """The weight of each token [B, N]: 1 in the first latent frame and for the top k elsewhere, else 0.

        In training a share of the tokens are probes: their weight is uniform in [0, 1], and they alone pass gradients
        to the scores. At a weight of 0 or 1 the loss's gradient says little about what the token is worth (at 1 it
        vanishes as the encoder converges), while its mean along the way from 0 to 1 is exactly what the token is worth,
        given the others.
        """
        first, n = grid[1] * grid[2], math.prod(grid)
        k = max(math.floor(share(self.config.keep if keep is None else keep, n) + 0.5) - first, 0)
        rest = scores[:, first:]
        weights = torch.zeros_like(rest).scatter(1, topk(rest.detach(), k), 1.0)
        if self.training and 0 < k < rest.shape[1]:
            soft = _standardised(rest)
            if self.config.selection == "perturbed":
                config = self.config
                soft = soft_topk(soft, k, sigma=config.sigma, samples=config.samples, seed=seed, row=row)
            words = random_words(*rest.shape, seed=seed, block=0, stream=STREAM_PROBE, row=row, device=rest.device)
            shares, places = ((word >> 8).float() * 2.0**-24 for word in words[:2])
            passing = shares + (soft - soft.detach()) / self.config.probes
            weights = torch.where(places < self.config.probes, passing, weights)
        return torch.cat((torch.ones_like(scores[:, :first]), weights), dim=1)

    def encode(self, video: Tensor, *, window: int | None = None) -> Tokens:
        """All tokens of a clip. The clip passes in time tiles, so memory does not grow with its length.

        The tokens of a prefix are a prefix of the tokens, but for the scores of a prefix of two frames: they are 0.

        Args:
            video: [B, 3, T, H, W], uint8, or floating point in [0, 1]; T even, H and W multiples of 16.
            window: frames; each window of so many is encoded as a clip of its own (the paper's way, with 16), the last
                one perhaps shorter. None lets every token see all that came before.

        Raises:
            ValueError: shape, dtype, values or window are not as above.
        """
        check_video(video)
        stream = self.stream(window=window)
        return joined([stream.push(video), stream.flush()])

    def stream(self, *, window: int | None = None) -> TokenStream:
        """Encode a video as it comes: `push(frames)`, then `flush()`; bitwise the tokens of `encode`, for any pieces.

        Memory is that of one tile of time (`config.tile` frames), whatever the length. `state_dict` and
        `load_state_dict` save a stream and go on from it, `to` moves it between devices. For `window` see `encode`.
        """
        return TokenStream(self, window)

    def decode(self, tokens: Tokens, kept: Tensor | None = None, *, window: int | None = None) -> Tensor:
        """The video [B, 3, T, H, W] in [0, 1], in the latents' dtype, that the tokens stand for.

        Args:
            tokens: of whole latent frames; only latents and grid are looked at.
            kept: [B, N], 0 or False for tokens that were dropped: each shows what was last kept at its place. None if
                all were kept.
            window: the one that the tokens were encoded with.

        Raises:
            ValueError: shapes, dtype or window are not as above.
        """
        stream = self.decode_stream(window=window)
        return torch.cat([stream.push(tokens, kept), stream.flush()], dim=2)

    def decode_stream(self, *, window: int | None = None) -> VideoStream:
        """Decode tokens as they come: `push(tokens, kept)`, then `flush()`; bitwise the video of `decode`.

        Memory, saving and moving as for `stream`.
        """
        return VideoStream(self, window)

    def normalised(self, video: Tensor) -> Tensor:
        """A video as the networks take it: in [-1, 1], in the weights' dtype, channels last."""
        video = video.contiguous(memory_format=torch.channels_last_3d)
        scale = 127.5 if video.dtype == torch.uint8 else 0.5
        return video.to(self.encoder.stem.weight.dtype) / scale - 1

    def as_grid(self, latents: Tensor, grid: Grid) -> Tensor:
        """[B, N, L] -> [B, L, T, H, W], channels last."""
        return latents.unflatten(1, grid).permute(0, 4, 1, 2, 3)


def _standardised(scores: Tensor) -> Tensor:
    """Scores of each clip with mean 0 and standard deviation 1."""
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, correction=0, keepdim=True) + 1e-6)
