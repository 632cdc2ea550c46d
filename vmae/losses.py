"""What the tokenizer learns from beside its pixel error: a discriminator, and a perceptual distance."""

import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Tells real clips from reconstructions: a residual 3D CNN that halves time, rows and columns, one logit a patch.

    Source: MAGVIT (CVPR 2023), appendix A, for the 3D residual discriminator; a logit per patch as in PatchGAN.
    """

    def __init__(self, width: int = 32, stages: int = 3):
        super().__init__()
        # Half of the rows and columns at once: at full size the judge would cost more than what it judges.
        self.stem = nn.Conv3d(3, width, (3, 4, 4), stride=(1, 2, 2), padding=1)
        channels = [width * min(2**i, 8) for i in range(stages + 1)]
        self.blocks = nn.ModuleList(_Down(*pair) for pair in itertools.pairwise(channels))
        self.head = nn.Conv3d(channels[-1], 1, 3, padding=1)
        for kernel in self.parameters():
            if kernel.ndim == 5:  # the layout of the clips: twice as fast
                kernel.data = kernel.data.contiguous(memory_format=torch.channels_last_3d)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> logits [B, patches], high for real."""
        x = F.leaky_relu(self.stem(video), 0.2)
        for block in self.blocks:
            x = block(x)
        return self.head(x).flatten(1).float()


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv3d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        # By what is left: any clip that a tokenizer takes can be judged.
        factors = [min(2, length) for length in x.shape[2:]]
        y, x = (F.avg_pool3d(part, factors, ceil_mode=True) for part in (y, x))
        return (y + self.skip(x)) / math.sqrt(2)


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: -log sigmoid(fake), the mean over logits (Goodfellow et al., NeurIPS 2014, section 3)."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)), the mean over logits; 2 log 2 where nothing can be told."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Half the squared gradient of a clip's logits, their sum, per logit; the mean over clips.

    With one logit a clip this is R1 (Mescheder et al., ICML 2018); with one per patch, where patches hardly overlap, it
    is the mean of their R1, so that its weight means the same for clips of any size.
    """
    real = real.detach().float().requires_grad_()
    with torch.autocast(real.device.type, enabled=False):  # gradients of gradients need the precision
        logits = discriminator(real)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / (2 * logits.shape[1])


# VGG16's convolutions by stage; the last of each stage is compared.
_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGDistance(nn.Module):
    """Mean squared distance of unit-length VGG16 features, summed over five depths.

    Source: Zhang et al., "The unreasonable effectiveness of deep features" (CVPR 2018), section 3, with equal weights.

    Args:
        file: safetensors with torchvision's names, `features.0.weight` to `features.28.bias`; others are ignored.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, file: str | Path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        super().__init__()
        if not Path(file).is_file():
            raise ValueError(f"perceptual: expected a safetensors file with VGG16's weights, found no file {file}")
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"perceptual: expected a safetensors file, {file} is none: {error}") from error
        self.stages = nn.ModuleList()
        inputs, place = 3, 0
        for stage in _VGG_STAGES:
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if place else []
            place += len(layers)
            for outputs in stage:
                conv = nn.Conv2d(inputs, outputs, 3, padding=1)
                for part, parameter in conv.named_parameters():
                    name = f"features.{place}.{part}"
                    if name not in weights or weights[name].shape != parameter.shape:
                        found = list(weights[name].shape) if name in weights else "nothing"
                        raise ValueError(f"{file}: expected {name} {list(parameter.shape)} of VGG16, found {found}")
                    parameter.data.copy_(weights[name])
                layers += [conv, nn.ReLU()]
                inputs, place = outputs, place + 2
            self.stages.append(nn.Sequential(*layers))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] in [-1, 1] -> [N]."""
        a, b = (((x + 1) / 2 - self.mean) / self.std for x in (a, b))
        total = a.new_zeros(len(a))
        for stage in self.stages:
            a, b = stage(a), stage(b)
            unit_a, unit_b = (F.normalize(x.float(), dim=1) for x in (a, b))
            total = total + (unit_a - unit_b).square().sum(1).mean((1, 2))
        return total


def perceptual_distance(source: str) -> nn.Module:
    """The frozen distance of two sets of pictures [N, 3, H, W] in [-1, 1] that `source` names.

    `source`: a safetensors file with VGG16's weights, or `package:callable` of an installed package, such as
    `lpips:LPIPS`: called without arguments, it gives a module of two arguments.
    """
    package, _, name = source.partition(":")
    if source.endswith(".safetensors") or not (package and name):
        distance: Any = VGGDistance(source)
    else:
        try:
            distance = getattr(importlib.import_module(package), name)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"perceptual: expected a callable of an installed package, got {source}: {error}"
            ) from error
        if not isinstance(distance, nn.Module):
            raise ValueError(f"perceptual: expected {source} to give a torch module, got {type(distance).__name__}")
    return distance.eval().requires_grad_(False)
