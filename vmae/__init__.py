"""Long-context video masked autoencoders: decode only the tokens that matter."""

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
