"""The token scorer: how much each place changes from one latent frame to the next."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scorer(nn.Module):
    """Two strided convolutions from pixels to one feature vector per token (LVMAE, section 3).

    Their kernels are as large as their strides: a feature sees its own tubelet and nothing else. With larger kernels what
    moves beside a still token would raise its score, and a kernel of odd size is not even centred on the token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv3d(3, width, (2, 4, 4), stride=(2, 4, 4))
        # Without a bias: it would cancel in the distance of two features.
        self.second = nn.Conv3d(width, width, (1, 4, 4), stride=(1, 4, 4), bias=False)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> features [B, D, T / 2, H / 16, W / 16]."""
        return self.second(F.silu(self.first(video)))


def token_scores(features: Tensor, previous: Tensor | None = None) -> Tensor:
    """Euclidean distance of each token's feature from the one at the same place a latent frame earlier.

    Args:
        features: [B, D, T, H, W].
        previous: [B, D, 1, H, W], the latent frame before them; None at a clip's start, where the first latent frame
            takes the second one's scores (as EVEREST does), or 0 if it is the only one.

    Returns:
        float32 [B, T * H * W].
    """
    features = features.float()
    if previous is not None:
        features = torch.cat((previous.float(), features), dim=2)
    scores = torch.linalg.vector_norm(features[:, :, 1:] - features[:, :, :-1], dim=1)
    if previous is None:
        first = scores[:, :1] if scores.shape[1] else torch.zeros_like(features[:, 0])
        scores = torch.cat((first, scores), dim=1)
    return scores.flatten(1)
