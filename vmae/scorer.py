"""The token scorer: how much each place changes from one latent frame to the next."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vmae.tokens import TUBELET
from vmae_kernels.philox import STREAM_NUISANCE, normals, random_words


class Scorer(nn.Module):
    """Two strided convolutions from pixels to one feature vector per token (LVMAE, section 3).

    Their kernels are as large as their strides: a feature sees its own tubelet and nothing else. With larger kernels
    what moves beside a still token would raise its score, and kernels of odd size are not even centred on the token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv3d(3, width, (2, 4, 4), stride=(2, 4, 4))
        # Without a bias: it would cancel in the distance of two features.
        self.second = nn.Conv3d(width, width, (1, 4, 4), stride=(1, 4, 4), bias=False)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> features [B, D, T / 2, H / 16, W / 16], in the weights' dtype.

        A score is a small difference of large features, of which bfloat16 leaves little. So autocast is ignored, and
        the convolutions are products of patches and a matrix: on every device these are in full float32.
        """
        with torch.autocast(video.device.type, enabled=False):
            return _patchwise(self.second, F.silu(_patchwise(self.first, video)))


def _patchwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose kernel is as large as its stride; the result is channels last."""
    kt, kh, kw = conv.weight.shape[2:]
    patches = rearrange(x, "b c (t kt) (h kh) (w kw) -> b t h w (c kt kh kw)", kt=kt, kh=kh, kw=kw)
    return F.linear(patches, conv.weight.flatten(1), conv.bias).permute(0, 4, 1, 2, 3)


def token_scores(features: Tensor, previous: Tensor | None = None, *, before: Tensor | None = None) -> Tensor:
    """Euclidean distance of each token's feature from the one at the same place a latent frame earlier.

    Args:
        features: [B, D, T, H, W].
        previous: [B, D, 1, H, W], the latent frame before them; None at a clip's start, where the first latent frame
            takes the second one's scores (as EVEREST does), or 0 if it is the only one.
        before: [B, D, T, H, W], other features of the same video to be the earlier ones; see `nuisance`.

    Returns:
        float32 [B, T * H * W].
    """
    features = features.float()
    before = features if before is None else before.float()
    scores = torch.linalg.vector_norm(features[:, :, 1:] - before[:, :, :-1], dim=1)
    if previous is not None:
        first = torch.linalg.vector_norm(features[:, :, :1] - previous.float(), dim=1)
    else:
        first = scores[:, :1] if scores.shape[1] else torch.zeros_like(features[:, 0])
    return torch.cat((first, scores), dim=1).flatten(1)


# The most that `nuisance` adds to a video in [-1, 1]: pixels per frame, and standard deviations.
PAN, NOISE, FLICKER = 4.0, 0.1, 0.1


def nuisance(video: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Two views of a video that differ by what a score should not see: camera motion, sensor noise and flicker.

    Where a tubelet of the first view is compared with the preceding one of the second, a panning, noisy, flickering
    camera seems to have taken both; and so where it is compared with itself. No tubelet is far from its place.

    Args:
        video: [B, 3, T, H, W] in [-1, 1].
        seed: of pan (none along an axis half of the time), noise and flicker, the same on every device.
    """
    _, channels, frames, height, width = video.shape
    device, stream = video.device, STREAM_NUISANCE
    words = random_words(1, 4, seed=seed, block=0, stream=stream, device=device)[0][0]
    *pans, strength, gain = (words >> 8).float() * 2.0**-24
    velocity = [PAN * (2 * u - 1).sign() * (2 * (2 * u - 1).abs() - 1).clamp_min(0) for u in pans]
    side = 64  # of a tile of noise
    flicker = normals(1, frames, seed=seed, block=1, stream=stream, device=device)[:2, 0, :, None, None, None]
    brightness = 1 + FLICKER * gain * flicker.clamp(-3, 3)

    def moved(part: Tensor, time: float) -> Tensor:
        """`part` [B, T, H, W, C], rolled to where the pan is at this time."""
        for dim, pan in zip((2, 3), velocity, strict=True):
            shift = (pan * time).round().long()
            part = part.index_select(dim, (torch.arange(part.shape[dim], device=device) - shift) % part.shape[dim])
        return part

    def view(index: int, times: tuple[float, float]) -> Tensor:
        """With the frames of each tubelet at these times."""
        steps = video.permute(0, 2, 3, 4, 1).unflatten(1, (-1, TUBELET[0]))
        shifted = torch.stack([moved(steps[:, :, i], time) for i, time in enumerate(times)], dim=2).flatten(1, 2)
        noise = normals(side * side, channels, seed=seed, block=2 + index, stream=stream, device=device)
        noise = noise.unflatten(1, (side, side)).repeat(-(-frames // 4), -(-height // side), -(-width // side), 1)
        added = NOISE * strength * noise[:frames, :height, :width]
        bright = brightness[index]
        return (shifted * bright + (bright - 1 + added)).permute(0, 4, 1, 2, 3)  # black, which is -1, stays black

    return view(0, (0.5, 1.5)), view(1, (-1.5, -0.5))


def stability_loss(now: Tensor, before: Tensor, *, seed: int) -> Tensor:
    """How often nuisance changes a feature more than time does, as a logistic loss: a scalar.

    The change of each tubelet between two views of the same moment is compared with the change of another tubelet of
    the clip, drawn at random, over a quarter and over half of the clip's length: what a score sees of pan, noise and
    flicker should rank below what it sees of events. The reconstruction alone does not teach that: it prices a token by
    the low frequencies that the codes can carry, and these change most of all with pan and flicker.

    Args:
        now, before: [B, D, T, H, W], the features of the two views of `nuisance`.
        seed: of the pairs.
    """
    frames = now.shape[2]
    if frames == 1:
        return now.sum() * 0.0

    def change(steps: int) -> Tensor:
        return ((now - before.roll(steps, 2)).float().square().sum(1) + 1e-6).log().flatten(1)

    still = change(0)
    keys = random_words(1, still.shape[1], seed=seed, block=4, stream=STREAM_NUISANCE, device=now.device)[0][0]
    still = still[:, keys.argsort()]
    return torch.stack(
        [F.softplus(still - change(steps)).mean() for steps in (max(frames // 4, 1), frames // 2)]
    ).mean()
