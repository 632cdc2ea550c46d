"""The masked autoencoder: an encoder over few visible tokens, a decoder over the important hidden ones."""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from vmae.checkpoint import Saved
from vmae.masking import STRATEGIES, Grid, Strategy, TubeMask, check_masks, select, tube_mask
from vmae.scorer import token_scores
from vmae.tokens import TUBELET, Tokens, check_clip, check_video
from vmae_kernels import attention, attention_varlen, decoder_tokens, gather_tokens, tubelets
from vmae_kernels.layer_norm import layer_norm
from vmae_kernels.linear import linear
from vmae_kernels.mlp import mlp
from vmae_kernels.reference import bfloat16_on_cpu

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VideoMAEConfig:
    """Of a `VideoMAE`; the defaults are the `base` preset."""

    frames: int = 128
    size: int = 224
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    mask_ratio: float = 0.9
    """Share of places that the encoder does not see."""
    budget: float = 0.15
    """Share of all tokens that the decoder reconstructs."""
    random: float = 0.05
    """Share of all tokens that the adaptive strategy draws at random, within the budget."""
    strategy: Strategy = "adaptive"
    target: Literal["latent", "pixels"] = "latent"
    latent_width: int = 6
    """Numbers per latent of the tokenizer whose latents are the target."""
    encoder_norm: bool = True
    """Whether the encoder ends with a normalisation; weights that were trained to be averaged first have none."""

    def __post_init__(self):
        for name in ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads", "latent_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        check_clip(self.frames, self.size)
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads or width % 2:
                raise ValueError(f"width: expected an even multiple of the number of heads, {heads}, got {width}")
            if not 16 <= width // heads <= 128:
                raise ValueError(f"width: expected 16 to 128 per head, got {width} / {heads}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.target not in ("latent", "pixels"):
            raise ValueError(f"target: expected latent or pixels, got {self.target!r}")
        side = self.size // TUBELET[1]
        self.check_masks((self.frames // TUBELET[0], side, side))

    def check_masks(self, grid: Grid) -> None:
        """Raise `ValueError` unless these masks are possible on a grid."""
        ratios = {"mask_ratio": self.mask_ratio, "budget": self.budget, "random": self.random}
        check_masks(grid, strategy=self.strategy, **ratios)

    @classmethod
    def tiny(cls, **changes) -> "VideoMAEConfig":
        """For demonstrations and tests on a CPU."""
        tiny = {"width": 192, "depth": 6, "heads": 3, "decoder_width": 96, "decoder_depth": 2, "decoder_heads": 3}
        return cls(**{**tiny, **changes})

    @classmethod
    def small(cls, **changes) -> "VideoMAEConfig":
        small = {"width": 384, "heads": 6, "decoder_width": 192, "decoder_heads": 3}
        return cls(**{**small, **changes})

    @classmethod
    def base(cls, **changes) -> "VideoMAEConfig":
        return cls(**changes)

    @classmethod
    def large(cls, **changes) -> "VideoMAEConfig":
        return cls(**{"width": 1024, "depth": 24, "heads": 16, "decoder_width": 512, "decoder_heads": 8, **changes})


class Packed(NamedTuple):
    """Where sequences of tokens [total, D] lie, one behind the other, as `attention_varlen` wants to know."""

    starts: Tensor
    """int32 [B + 1]: of each, and the end of the last one."""
    longest: int


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Of a block, whose layers take bfloat16 under autocast."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class MLP(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        first: Any
        last: Any
        first, _, last = self
        return mlp(x, first.weight, first.bias, last.weight, last.bias)


def _recomputed(cheap: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(cheap(x)) of a linear layer or an MLP, that does not keep cheap(x): its backward does again what costs
    little, `cheap`, a norm or an activation, and under autocast the cast of a linear layer's weight. torch.compile
    weighs such things by itself.
    """
    y = cheap(x)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return layer(y)
    device = x.device.type
    weight: Any = layer.weight if isinstance(layer, nn.Linear) else None
    again: Any = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):
        again = torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
        y = y.to(torch.get_autocast_dtype(device))  # as the layer does, whose cast could not be told from others
    dtype, storage = y.dtype, y.untyped_storage()._cdata

    def pack(saved: Tensor) -> Any:
        view = saved.size(), saved.stride(), saved.storage_offset()
        if saved.untyped_storage()._cdata == storage:
            return "input", view
        if weight is not None and saved.dtype != weight.dtype and saved.numel() == weight.numel():
            return "weight", view
        return "", saved

    def unpack(kept: Any) -> Tensor:
        what, saved = kept
        if not what:
            return saved
        with torch.no_grad(), again:
            return (cheap(x) if what == "input" else weight).to(dtype).as_strided(*saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(y)


def _kept(cheap: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    return layer(cheap(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, qkv: Tensor, keys: Tensor | None = None, packed: Packed | None = None) -> Tensor:
        # Cut apart before heads and tokens change places: the gradients then come together in one copy, not in two.
        parts = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each [B, N, H, d], or packed [total, H, d]
        if packed is not None:
            q, k, v = parts
            starts, longest = packed
            return self.proj(attention_varlen(q, k, v, starts, starts, longest, longest).flatten(1))
        q, k, v = (part.transpose(1, 2) for part in parts)
        return self.proj(attention(q, k, v, kv_indices=keys).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block, normalised before each part.

    Of tokens [B, N, D], that attend to all of their row or to `keys` [B, S] of it; or of `packed` ones, [total, D].
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = LayerNorm(width), MLP(width)

    def forward(
        self, x: Tensor, keys: Tensor | None = None, packed: Packed | None = None, *, checkpointed: bool = False
    ) -> Tensor:
        of = _kept if checkpointed else _recomputed  # one or the other: within a checkpoint all is computed again
        x = x + self.attn(of(self.norm1, self.attn.qkv, x), keys, packed)
        first, gelu, last = self.mlp
        if isinstance(first, Linear) and bfloat16_on_cpu(x):  # where the MLP itself does the GELU again
            return x + of(self.norm2, self.mlp, x)
        return x + of(gelu, last, of(self.norm2, first, x))


class VideoMAE(nn.Module, Saved):
    """Video masked autoencoder with an adaptive decoder mask.

    Source: LVMAE (NeurIPS 2024), section 3; VideoMAE (NeurIPS 2022) for encoder, decoder, positions and pixel targets.
    """

    encoder_positions: Tensor
    decoder_positions: Tensor

    def __init__(self, config: VideoMAEConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward: less memory, a third more arithmetic
        pixels = 3 * math.prod(TUBELET)
        self.patch_embed = Linear(pixels, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6) if config.encoder_norm else nn.Identity()
        self.to_decoder = Linear(config.width, config.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(config.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(config.decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(config.decoder_width, eps=1e-6)
        self.head = Linear(config.decoder_width, config.latent_width if config.target == "latent" else pixels)
        places = (config.size // TUBELET[1]) * (config.size // TUBELET[2])
        self._set_positions(config.frames // TUBELET[0] * places)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not self.mask_token.is_meta:  # what it draws is looked at, and nothing is there to look at
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        clip: Tensor,
        tokens: Tokens | None = None,
        *,
        scores: Tensor | None = None,
        seed: int | None = None,
        row: int = 0,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """One pretraining step's loss, a scalar: mean squared error over the tokens that the decoder reconstructs.

        Args:
            clip: [B, 3, T, H, W], uint8, or floating point in [0, 1]; any T, H, W of whole tubelets.
            tokens: of the clip, by a frozen `AdaptiveTokenizer`; None where neither target nor strategy needs them.
            scores: [B, N] floating point, what the strategy ranks tokens by. Not given, it is the tokens' scores for
                "adaptive", and for "everest" those of the present patch embedding (see `everest_scores`).
            seed: of the masks; None draws one from torch's default generator.
            row: the first clip's place in the batch that this one is a part of: parts are masked as the whole is.
            reduction: "none" gives each clip's own loss, [B].

        Raises:
            ValueError: shapes do not match, or tokens or scores are missing, or another reduction is asked for.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected mean or none, got {reduction!r}")
        mask, selected = self.masks(clip, tokens, scores=scores, seed=seed, row=row)
        prediction, target = self.predict(clip, mask.visible, selected).float(), self.target(clip, tokens, selected)
        if reduction == "none":
            return (prediction - target).square().mean((1, 2))
        return F.mse_loss(prediction, target)

    def masks(
        self,
        clip: Tensor,
        tokens: Tokens | None = None,
        *,
        scores: Tensor | None = None,
        seed: int | None = None,
        row: int = 0,
    ) -> tuple[TubeMask, Tensor]:
        """The tube mask, and the tokens [B, K] that the decoder reconstructs; arguments as for `forward`."""
        grid = check_video(clip)
        config = self.config
        config.check_masks(grid)
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
            raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
        self._check_tokens(tokens, scores, len(clip), grid)
        if scores is None and config.strategy == "everest":
            scores = everest_scores(clip, self.patch_embed)
        if scores is None and tokens is not None:
            scores = tokens.scores if config.strategy == "adaptive" else None
        mask = tube_mask(grid, len(clip), mask_ratio=config.mask_ratio, seed=seed, row=row, device=clip.device)
        shares = {"budget": config.budget, "random": config.random}
        return mask, select(config.strategy, mask.hidden, grid, **shares, seed=seed, row=row, scores=scores)

    def predict(self, clip: Tensor, visible: Tensor, selected: Tensor) -> Tensor:
        """Reconstruct the tokens `selected` [B, K] from the tokens `visible` [B, V]: [B, K, target width]."""
        # Sums of blocks in the weights' precision, under autocast too, as the encoder's: on CPUs PyTorch adds up the
        # gradient of a LayerNorm's weights in its input's, and in bfloat16 half of it is lost among 10,000 tokens.
        encoded = self.to_decoder(self._encode(clip, visible)).to(self.mask_token.dtype)
        x = decoder_tokens(encoded, visible, selected, self.mask_token, self.decoder_positions)
        for block in self.decoder_blocks:
            x = self._block(block, x)
        return self.head(self.decoder_norm(x[:, visible.shape[1] :]))

    @overload
    def encode(self, clip: Tensor, *, keys: Tensor | None = None) -> Tensor: ...

    @overload
    def encode(self, clip: Sequence[Tensor], *, keys: None = None) -> list[Tensor]: ...

    def encode(self, clip: Tensor | Sequence[Tensor], *, keys: Tensor | None = None) -> Tensor | list[Tensor]:
        """The features of every token [B, N, D] of a clip (as `forward`'s); differentiable, nothing is masked.

        Args:
            clip: or a sequence of clips, each of its own T, H, W, for a list of features. They pass through the blocks
                as one batch without padding, and come out as each would alone, but for rounding.
            keys: int32 or int64 [B, S], distinct in each row, for one clip: its tokens attend to these of them alone,
                such as those with the highest scores, and attention takes N x S products, not N x N. How good features
                are with it has not been measured with any trained model.

        Raises:
            TypeError: clip or keys are of a wrong type or dtype.
            ValueError: shapes do not match, keys come with a sequence, or (on CPU) lie outside [0, N) or stand twice
                in a row.
        """
        if isinstance(clip, Sequence):
            if keys is not None:
                raise ValueError(f"keys: expected none with a sequence of clips, got {type(keys).__name__}")
            return self._encode_packed(clip)
        n = math.prod(check_video(clip))
        if keys is not None:
            _check_keys(keys, len(clip), n)
        return self._encode(clip, _every(clip, n), keys)

    def _encode(self, clip: Tensor, visible: Tensor, keys: Tensor | None = None) -> Tensor:
        n = math.prod(clip.shape[2:]) // math.prod(TUBELET)
        if n != len(self.encoder_positions):
            self._set_positions(n)
        x = self._embed(clip, visible)
        for block in self.blocks:
            x = self._block(block, x, keys)
        return self.norm(x)

    def _encode_packed(self, clips: Sequence[Tensor]) -> list[Tensor]:
        sizes = [(math.prod(check_video(clip)), len(clip)) for clip in clips]
        if not sizes:
            return []
        longest = max(n for n, _ in sizes)
        if longest > len(self.encoder_positions):  # a shorter clip's are the first of a longer one's
            self._set_positions(longest)
        x = torch.cat(
            [self._embed(clip, _every(clip, n)).flatten(0, 1) for clip, (n, _) in zip(clips, sizes, strict=True)]
        )
        ends = itertools.accumulate(n for n, batch in sizes for _ in range(batch))
        starts = torch.tensor([0, *ends], dtype=torch.int32, device=x.device)
        for block in self.blocks:
            x = self._block(block, x, packed=Packed(starts, longest))
        parts = self.norm(x).split([n * batch for n, batch in sizes])
        return [part.unflatten(0, (batch, n)) for part, (n, batch) in zip(parts, sizes, strict=True)]

    def _embed(self, clip: Tensor, visible: Tensor) -> Tensor:
        """What the blocks begin with: the tubelets `visible` [B, V] and their positions, [B, V, D]."""
        x = self.patch_embed(tubelets(clip, visible, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=self._input_dtype()))
        positions = self.encoder_positions.expand(clip.shape[0], -1, -1)
        return x + gather_tokens(positions, visible, unique=True)

    def _block(self, block: nn.Module, x: Tensor, keys: Tensor | None = None, packed: Packed | None = None) -> Tensor:
        if self.checkpointing and self.training:
            return activation_checkpoint(block, x, keys, packed, checkpointed=True, use_reentrant=False)
        return block(x, keys, packed)

    def _input_dtype(self) -> torch.dtype:
        weight = self.patch_embed.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def _set_positions(self, n: int) -> None:
        like = self.mask_token
        for name, width in (("encoder_positions", self.config.width), ("decoder_positions", self.config.decoder_width)):
            self.register_buffer(name, sine_cosine(n, width, like.device).to(like.dtype), persistent=False)

    def _check_tokens(self, tokens: Tokens | None, scores: Tensor | None, batch: int, grid: Grid) -> None:
        config = self.config
        if tokens is None:
            if config.target == "latent" or (config.strategy == "adaptive" and scores is None):
                raise ValueError(
                    f"tokens: expected the tokenizer's, for target {config.target!r} and strategy "
                    f"{config.strategy!r}, got None"
                )
            return
        if tuple(tokens.grid) != grid:
            raise ValueError(f"tokens: expected the clip's grid, {grid}, got {tuple(tokens.grid)}")
        wanted = (batch, math.prod(grid), config.latent_width)
        if config.target == "latent" and tokens.latents.shape != wanted:
            raise ValueError(f"tokens: expected latents of shape {list(wanted)}, got {list(tokens.latents.shape)}")

    def target(self, clip: Tensor, tokens: Tokens | None, selected: Tensor) -> Tensor:
        """What the decoder is to predict for the tokens `selected` [B, K]: float32 [B, K, target width]."""
        if self.config.target == "latent":
            assert tokens is not None  # checked before the forward pass
            return gather_tokens(tokens.latents, selected, unique=True).float()
        pixels = tubelets(clip, selected, mean=(0.0,) * 3, std=(1.0,) * 3).unflatten(2, (-1, 3))
        # Each tubelet's channels to mean 0 and variance 1, as in VideoMAE.
        return ((pixels - pixels.mean(-2, keepdim=True)) / (pixels.var(-2, keepdim=True).sqrt() + 1e-6)).flatten(2)


def _every(clip: Tensor, n: int) -> Tensor:
    """The indices [B, N] of all tokens of a clip."""
    return torch.arange(n, device=clip.device).expand(len(clip), n)


def _check_keys(keys: Tensor, batch: int, n: int) -> None:
    if not isinstance(keys, Tensor) or keys.dtype not in (torch.int32, torch.int64):
        got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
        raise TypeError(f"keys: expected a tensor of int32 or int64, got {got}")
    if keys.ndim != 2 or len(keys) != batch or not 1 <= keys.shape[1] <= n:
        raise ValueError(f"keys: expected shape [{batch}, 1 to {n}], got {list(keys.shape)}")
    if not keys.is_cpu or torch.compiler.is_compiling() or not batch:  # as in `check_video`
        return
    ascending = keys.sort(1).values
    low, high = int(ascending[:, 0].min()), int(ascending[:, -1].max())
    if low < 0 or high >= n:
        raise ValueError(f"keys: expected indices from 0 to {n - 1}, got {low} to {high}")
    if (ascending.diff(dim=1) == 0).any():
        raise ValueError("keys: expected distinct indices in each row, got one twice")


@torch.no_grad()
def everest_scores(clip: Tensor, embedding: nn.Linear) -> Tensor:
    """How much each tubelet's embedding differs from the one at its place a latent frame earlier: float32 [B, N].

    The Euclidean distance of patch embeddings, computed in full float32; the first latent frame takes the second one's
    scores. `clip` as for `VideoMAE`; `embedding` is its `patch_embed`.

    Source: Hwang et al., "EVEREST" (ICML 2024), section 3.
    """
    t, h, w = check_video(clip)
    with torch.autocast(clip.device.type, enabled=False):
        patches = tubelets(clip, _every(clip, t * h * w), mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=torch.float32)
        # Without the bias: it would cancel in the distance of two features.
        features = rearrange(F.linear(patches, embedding.weight.float()), "b (t h w) d -> b d t h w", t=t, h=h)
    return token_scores(features)


def sine_cosine(n: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed positions float32 [N, D]: sines at even places, cosines at odd ones (VideoMAE's one-dimensional table)."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1).float()
