"""Layers of the tokenizer: causal in time, normalised per frame, and able to run on a clip in tiles."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae_kernels import causal_conv3d

# What the convolutions carry from one time tile to the next.
State = dict[nn.Module, Tensor]


class CausalConv3d(nn.Module):
    """`vmae_kernels.causal_conv3d` with its weight; with a state it continues where the last tile ended."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] = (1, 1, 1),
        bias: bool = True,
    ):
        super().__init__()
        self.stride = tuple(stride)
        bound = 1 / math.sqrt(inputs * math.prod(kernel))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        if state is None:
            return causal_conv3d(x, self.weight, self.bias, stride=self.stride)
        cache = state.get(self)
        if cache is not None:
            cache = cache.to(x.dtype)  # a stream may go on in another precision
        y, state[self] = causal_conv3d(x, self.weight, self.bias, stride=self.stride, cache=cache, return_cache=True)
        return y


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself, so that no statistic looks across time."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(channels, 32) if channels > 32 else max(channels // 4, 1), channels)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)
        y = super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        return y.contiguous(memory_format=torch.channels_last_3d)  # on CUDA the norm's result is not


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(inputs), CausalConv3d(inputs, outputs, (3, 3, 3))
        self.norm2, self.conv2 = FrameNorm(outputs), CausalConv3d(outputs, outputs, (3, 3, 3))
        self.skip = CausalConv3d(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), state)
        y = self.conv2(F.silu(self.norm2(y)), state)
        return y + (x if self.skip is None else self.skip(x, state))


class Upsample(nn.Module):
    """A convolution whose channels are rearranged into `factor` times as many frames, rows and columns."""

    def __init__(self, inputs: int, outputs: int, factor: Sequence[int]):
        super().__init__()
        self.factor = tuple(factor)
        self.conv = CausalConv3d(inputs, outputs * math.prod(factor), (3, 3, 3))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        y = self.conv(x, state).unflatten(1, (-1, *self.factor))  # B C t h w T H W
        y = y.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return y.contiguous(memory_format=torch.channels_last_3d)


class Hold(nn.Module):
    """In place of what is dropped, what was last kept at the same place; 0 if nothing was.

    The decoder then needs no layers to carry what stands still through time, and what a token is worth is what it
    changes. With weights between 0 and 1 it is the mean of both.
    """

    def forward(self, latents: Tensor, weights: Tensor, state: State | None = None) -> Tensor:
        """`latents` [B, L, T, H, W], `weights` [B, 1, T, H, W] in [0, 1] -> [B, L, T, H, W]."""
        held = torch.zeros_like(latents[:, :, :1]) if state is None or self not in state else state[self]
        frames = []
        for latent, weight in zip(latents.split(1, dim=2), weights.split(1, dim=2), strict=True):
            held = held + weight * (latent - held)
            frames.append(held)
        if state is not None:
            state[self] = held.clone()
        return torch.cat(frames, dim=2).contiguous(memory_format=torch.channels_last_3d)
