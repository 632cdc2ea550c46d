"""Drop-in operations for long-context video models. Needs torch, and Triton for the kernels on CUDA; nothing else."""

import torch

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

# MKL looks up the processor in a process's first call to its vector mathematics, without a lock: of several threads
# that make this call together, some can see a half-done answer and compute with 26 bits. So here one thread makes it.
torch.ones(1, device="cpu").sqrt()
