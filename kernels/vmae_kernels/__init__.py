"""Drop-in operations for long-context video models. Needs torch, and nothing else."""

from .attention import attention, attention_varlen
from .causal_conv3d import causal_conv3d
from .decoder_tokens import decoder_tokens
from .fsq import fsq
from .gather_tokens import gather_tokens
from .scatter_tokens import scatter_tokens
from .soft_topk import soft_topk
from .topk import topk, topk_partition
from .tubelets import tubelets

__all__ = [
    "attention",
    "attention_varlen",
    "causal_conv3d",
    "decoder_tokens",
    "fsq",
    "gather_tokens",
    "scatter_tokens",
    "soft_topk",
    "topk",
    "topk_partition",
    "tubelets",
]
