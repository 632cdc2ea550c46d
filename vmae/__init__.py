"""Long-context video masked autoencoders: decode only the tokens that matter."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmae.dataset import ClipDataset, batches
    from vmae.mae import VideoMAE, VideoMAEConfig
    from vmae.masking import decoder_budget, select, tube_mask
    from vmae.tokenizer import AdaptiveTokenizer, TokenizerConfig, Tokens
    from vmae.video import VideoError, load_clip

__version__ = "0.1.0"

__all__ = [
    "AdaptiveTokenizer",
    "ClipDataset",
    "TokenizerConfig",
    "Tokens",
    "VideoError",
    "VideoMAE",
    "VideoMAEConfig",
    "batches",
    "decoder_budget",
    "load_clip",
    "select",
    "tube_mask",
]

_MODULES = {
    "dataset": ("ClipDataset", "batches"),
    "mae": ("VideoMAE", "VideoMAEConfig"),
    "masking": ("decoder_budget", "select", "tube_mask"),
    "tokenizer": ("AdaptiveTokenizer", "TokenizerConfig", "Tokens"),
    "video": ("VideoError", "load_clip"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: the models need PyTorch and einops alone."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"vmae.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
