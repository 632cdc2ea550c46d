"""The adaptive tokenizer: a causal 3D CNN with finite scalar quantization and a score for every token."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vmae.checkpoint import Saved
from vmae.layers import CausalConv3d, FrameNorm, ResidualBlock, State, Upsample
from vmae.masking import Grid, check_ratio, share
from vmae.scorer import Scorer, token_scores
from vmae_kernels import fsq, soft_topk, topk

TUBELET = (2, 16, 16)  # frames, rows and columns of a token


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
    selection: Literal["perturbed", "straight_through"] = "perturbed"
    """How gradients pass the top-k: expected indicator under noise, or straight through to the scores."""
    sigma: float = 0.05
    """Of the perturbation, in standard deviations of a clip's scores."""
    samples: int = 64
    """Of the perturbation."""

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
        """For demonstrations and tests on a CPU."""
        return cls(**{"width": 32, "multipliers": (1, 2), "stem": 4, "blocks": 1, "scorer_width": 16, **changes})

    @classmethod
    def small(cls, **changes) -> "TokenizerConfig":
        return cls(**{"width": 64, "multipliers": (1, 2, 4), "stem": 2, "scorer_width": 32, **changes})

    @classmethod
    def base(cls, **changes) -> "TokenizerConfig":
        return cls(**changes)


class Tokens(NamedTuple):
    """A clip's tokens, N = T * H * W of the grid, time first.

    latents: [B, N, L], quantized, in [-1, 1]; codes: int32 [B, N]; scores: float32 [B, N]; grid: (T, H, W).
    """

    latents: Tensor
    codes: Tensor
    scores: Tensor
    grid: Grid


class TokenizerOutput(NamedTuple):
    """Of a training step: the scalar loss, the reconstruction [B, 3, T, H, W] in [-1, 1] and the weights [B, N]."""

    loss: Tensor
    reconstruction: Tensor
    weights: Tensor


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
        self.stem = CausalConv3d(len(config.levels), inputs, (3, 3, 3))
        layers: list[nn.Module] = [ResidualBlock(inputs, inputs) for _ in range(config.blocks)]
        for stage, outputs in enumerate(channels):
            last = stage == len(channels) - 1
            layers.append(Upsample(inputs, outputs, (2 if last else 1, 2, 2)))
            layers += [ResidualBlock(outputs, outputs) for _ in range(config.blocks)]
            inputs = outputs
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = FrameNorm(inputs), Upsample(inputs, 3, (1, config.stem, config.stem))

    def forward(self, latents: Tensor, state: State | None = None) -> Tensor:
        x = self.stem(latents, state)
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

    def forward(self, video: Tensor, *, seed: int) -> TokenizerOutput:
        """One training step's loss: keep the highest-scoring tokens, quantize, reconstruct the pixels.

        All tokens of the first latent frame are kept. `video` as for `encode`; `seed` keys the top-k's noise.
        """
        grid = check_video(video)
        x = self._normalise(video)
        z = rearrange(self.encoder(x), "b l t h w -> b (t h w) l")
        scores = token_scores(self.scorer(x))
        weights = self.keep_weights(scores, grid, seed=seed)
        quantized, _ = fsq(z.float() * weights[..., None], self.config.levels)
        y = self.decoder(self._as_grid(quantized, grid))
        return TokenizerOutput(F.mse_loss(y.float(), x), y, weights)

    def keep_weights(self, scores: Tensor, grid: Grid, *, seed: int) -> Tensor:
        """The weight of each token [B, N]: 1 in the first latent frame, elsewhere how far it is among the top k.

        In training the weights pass gradients to the scores; in evaluation they are 0 or 1.
        """
        first, n = grid[1] * grid[2], math.prod(grid)
        k = max(math.floor(share(self.config.keep, n) + 0.5) - first, 0)
        rest = scores[:, first:]
        if self.training and self.config.selection == "perturbed" and rest.shape[1]:
            settings = {"sigma": self.config.sigma, "samples": self.config.samples, "seed": seed}
            weights = soft_topk(_standardised(rest), k, **settings)
        else:
            weights = torch.zeros_like(rest).scatter(1, topk(rest.detach(), k), 1.0)
            if self.training and rest.shape[1]:
                surrogate = _standardised(rest)
                weights = weights + surrogate - surrogate.detach()
        return torch.cat((torch.ones_like(scores[:, :first]), weights), dim=1)

    def encode(self, video: Tensor) -> Tokens:
        """All tokens of a clip. The clip passes in time tiles, so memory does not grow with its length.

        The tokens of a prefix are a prefix of the tokens, but for the scores of a prefix of two frames: they are 0.

        Args:
            video: [B, 3, T, H, W], uint8, or floating point in [0, 1]; T even, H and W multiples of 16.

        Raises:
            ValueError: shape, dtype or values are not as above.
        """
        check_video(video)
        stream = self.stream()
        parts = [stream.push(video), stream.flush()]
        return _joined(parts)

    def stream(self) -> "TokenStream":
        """Encode a video as it comes: bitwise the tokens of `encode`, whatever the chunks."""
        return TokenStream(self)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """The video [B, 3, T, H, W] in [0, 1], in the latents' dtype, that the tokens stand for."""
        frames = self._as_grid(tokens.latents, tokens.grid)
        state: State = {}
        parts = [self.decoder(part, state) for part in frames.split(self.config.tile // TUBELET[0], dim=2)]
        return ((torch.cat(parts, dim=2) + 1) / 2).clamp(0, 1).to(tokens.latents.dtype)

    def _normalise(self, video: Tensor) -> Tensor:
        video = video.contiguous(memory_format=torch.channels_last_3d)
        scale = 127.5 if video.dtype == torch.uint8 else 0.5
        return video.to(self.encoder.stem.weight.dtype) / scale - 1

    def _as_grid(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, L] -> [B, L, T, H, W], channels last."""
        return tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3)


class TokenStream:
    """Tokens of a video that comes in chunks; see `AdaptiveTokenizer.stream`."""

    def __init__(self, tokenizer: AdaptiveTokenizer):
        self._tokenizer = tokenizer
        self._pending: Tensor | None = None
        self._state: State = {}
        self._features: Tensor | None = None

    @torch.no_grad()
    def push(self, frames: Tensor) -> Tokens:
        """Take frames [B, 3, T, H, W], any T; returns the tokens of the tiles that are full now, perhaps none."""
        check_video(frames, chunk=True)
        if self._pending is not None:
            frames = _appended(self._pending, frames)
        tile = self._tokenizer.config.tile
        full = frames.shape[2] // tile * tile
        parts = [self._encode(part, tile // TUBELET[0]) for part in frames[:, :, :full].split(tile, dim=2) if full]
        self._pending = frames[:, :, full:].clone()  # what is kept must not keep the whole chunk alive
        return _joined(parts) if parts else self._none()

    @torch.no_grad()
    def flush(self) -> Tokens:
        """The tokens of the frames still held; the stream then starts anew."""
        if self._pending is None:
            raise ValueError("flush: expected frames pushed before, got none")
        left = self._pending.shape[2]
        if left % TUBELET[0]:
            raise ValueError(f"flush: expected an even number of frames in all, {left} are left over after full tiles")
        tokens = self._none()
        if left:
            missing = self._tokenizer.config.tile - left
            padded = torch.cat((self._pending, self._pending[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
            tokens = self._encode(padded, left // TUBELET[0])
        self._pending, self._state, self._features = None, {}, None
        return tokens

    def _encode(self, tile: Tensor, latent_frames: int) -> Tokens:
        """The first `latent_frames` latent frames of a tile's tokens."""
        model = self._tokenizer
        x = model._normalise(tile)
        z = model.encoder(x, self._state)[:, :, :latent_frames]
        features = model.scorer(x)[:, :, :latent_frames]
        scores = token_scores(features, self._features)
        self._features = features[:, :, -1:].clone()
        quantized, codes = fsq(rearrange(z, "b l t h w -> b (t h w) l").float(), model.config.levels)
        return Tokens(quantized, codes, scores, (z.shape[2], z.shape[3], z.shape[4]))

    def _none(self) -> Tokens:
        """Tokens of no frames."""
        assert self._pending is not None
        batch, _, _, height, width = self._pending.shape
        empty = self._pending.new_empty
        levels = len(self._tokenizer.config.levels)
        return Tokens(
            empty((batch, 0, levels), dtype=torch.float32),
            empty((batch, 0), dtype=torch.int32),
            empty((batch, 0), dtype=torch.float32),
            (0, height // TUBELET[1], width // TUBELET[2]),
        )


def check_video(video: Tensor, *, chunk: bool = False) -> Grid:
    """The token grid of a video [B, 3, T, H, W]; a chunk may have any number of frames."""
    if not isinstance(video, Tensor):
        raise TypeError(f"video: expected a tensor [B, 3, T, H, W], got {type(video).__name__}")
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video: expected shape [B, 3, T, H, W], got {list(video.shape)}")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video: expected dtype uint8 or floating point in [0, 1], got {video.dtype}")
    t, h, w = video.shape[2:]
    if not chunk and (t % TUBELET[0] or t == 0):
        raise ValueError(f"video: expected an even number of frames, got T = {t}")
    if h % TUBELET[1] or w % TUBELET[2] or not h or not w:
        raise ValueError(f"video: expected rows and columns in multiples of {TUBELET[1]}, got [H, W] = {[h, w]}")
    # Elsewhere than on a CPU a look at the values waits for the device: there only streams, which run once, take it.
    looks = (video.is_cpu or chunk) and not torch.compiler.is_compiling()
    if looks and video.is_floating_point() and video.numel():
        low, high = (float(bound) for bound in video.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too; the slack is for resized videos
            raise ValueError(f"video: expected floating point values in [0, 1], got {low:g} to {high:g}")
    return t // TUBELET[0], h // TUBELET[1], w // TUBELET[2]


def check_clip(frames: int, size: int) -> None:
    """Raise `ValueError` unless clips of this size are made of whole tubelets."""
    for name, value, step in (("frames", frames, TUBELET[0]), ("size", size, TUBELET[1])):
        if value < 1 or value % step:
            raise ValueError(f"{name}: expected a positive multiple of {step}, got {value}")


def _standardised(scores: Tensor) -> Tensor:
    """Scores of each clip with mean 0 and standard deviation 1."""
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, correction=0, keepdim=True) + 1e-6)


def _appended(pending: Tensor, frames: Tensor) -> Tensor:
    same = (pending.dtype, pending.shape[:2], pending.shape[3:]) == (frames.dtype, frames.shape[:2], frames.shape[3:])
    if not same:
        raise ValueError(
            f"frames: expected chunks of one shape and dtype, {list(pending.shape)} {pending.dtype}, "
            f"got {list(frames.shape)} {frames.dtype}"
        )
    return torch.cat((pending, frames), dim=2)


def _joined(parts: list[Tokens]) -> Tokens:
    latents, codes, scores, grids = zip(*parts, strict=True)
    frames = sum(grid[0] for grid in grids)
    return Tokens(torch.cat(latents, 1), torch.cat(codes, 1), torch.cat(scores, 1), (frames, *grids[0][1:]))
