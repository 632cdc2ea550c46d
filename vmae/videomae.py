"""VideoMAE weights from and to Hugging Face's `VideoMAEForPreTraining`, without importing transformers.

Both compute the same function of the same weights: fixed positions that are computed for any number of tokens, the same
blocks, the same pixel targets. What differs:

- The patch embedding is a convolution there, [D, c, t, h, w], and a linear layer here, [D, t * h * w * c].
- Queries, keys and values are three layers there and one here. Keys have no bias there: it would add the same number to
  all logits of a query, and softmax does not see that. So ours is left out on the way there, and nothing changes.
- LayerNorm's epsilon is 1e-6 here; there it is 1e-12 by default, and always 1e-5 before the decoder's head. Where the
  variance is near 1, that moves a normalised number by a part in two million, and before the head by one in 200,000.
- Dropout, if they have any, acts in training alone; here there is none.

Source: Tong et al., "VideoMAE" (NeurIPS 2022).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmae.checkpoint import CONFIG, WEIGHTS, replacing, write_text
from vmae.mae import VideoMAE, VideoMAEConfig
from vmae.tokens import TUBELET

PREFIX = "videomae."  # of the encoder's tensors in a model that holds more than an encoder
CLASSIFIER = ("classifier.", "fc_norm.")
BIASES = {".q_bias": ".query.bias", ".v_bias": ".value.bias"}  # in files: in transformers 5's state dicts
INPUT_BIASES = (".query.bias", ".key.bias", ".value.bias")
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
}  # ours: theirs
DEFAULTS = {
    "model_type": "",
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "num_frames": 16,
    "tubelet_size": 2,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qv_bias": True,
    "use_mean_pooling": True,
    "decoder_hidden_size": 384,
    "decoder_num_hidden_layers": 4,
    "decoder_num_attention_heads": 6,
    "decoder_intermediate_size": 1536,
    "norm_pix_loss": True,
}  # of settings that a configuration does not name; the model's type it has to name


def from_videomae(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    frames: int | None = None,
    size: int | None = None,
    **changes: Any,
) -> VideoMAE:
    """Our model with Hugging Face's weights: float32, on the CPU, in evaluation mode.

    Args:
        state: state dict of a `VideoMAEForPreTraining`, `VideoMAEModel` or `VideoMAEForVideoClassification`, of any
            floating point dtype, with biases named as any version of transformers names them. Only the first has a
            decoder: for the others ours is new, and a classifier is ignored.
        config: its configuration, as `to_dict()` or config.json give it.
        frames, size: of our configuration; theirs if None. Positions are fixed, so any will do.
        changes: to our configuration, which otherwise is that of their training: target "pixels", strategy "none". With
            target "latent" the decoder's last layer is new, and the rest of the decoder is theirs.

    Raises:
        TypeError: config is no mapping, something in state is no tensor, or a change names no setting of ours.
        ValueError: ours cannot represent theirs, a change contradicts the weights, or tensors are missing, unexpected,
            of a wrong shape or not floating point.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping, as to_dict() gives, got {type(config).__name__}")
    changes = {"target": "pixels", "strategy": "none", **changes}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in state) else ""
    decoder = bool(prefix) and not any(name.startswith(CLASSIFIER) for name in state)
    theirs = _settings(config)
    _check_settings(theirs, decoder=decoder, pixels=changes["target"] == "pixels")
    model = VideoMAE(_config(theirs, decoder, frames, size, changes))
    views = _views(model, prefix, decoder)
    ignored: tuple[str, ...] = CLASSIFIER
    if decoder and model.config.target != "pixels":
        ignored = (*CLASSIFIER, "decoder.head.")
        views = {name: view for name, view in views.items() if not name.startswith(ignored)}
    if not theirs["qv_bias"]:  # a new model's biases are zero, and these stay so
        views = {name: view for name, view in views.items() if not name.endswith(INPUT_BIASES)}
    tensors = _checked({name: value for name, value in state.items() if not name.startswith(ignored)}, views)
    with torch.no_grad():
        for name, value in tensors.items():
            views[name].copy_(value)
    return model.eval()


def to_videomae(model: VideoMAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the configuration of the Hugging Face model that is equal to ours.

    A model whose target is pixels becomes a `VideoMAEForPreTraining`. Theirs cannot predict latents: of a model that
    does, the encoder is taken, as a `VideoMAEModel`. Tensors are copies, with the model's dtype and device; their
    names are those of transformers 5.
    """
    ours = model.config
    pixels = ours.target == "pixels"
    views = _views(model, PREFIX if pixels else "", decoder=pixels)
    state = {
        name: view.detach().clone(memory_format=torch.contiguous_format)
        for name, view in views.items()
        if not name.endswith(".key.bias")
    }
    config = DEFAULTS | {
        "model_type": "videomae",
        "architectures": ["VideoMAEForPreTraining" if pixels else "VideoMAEModel"],
        "image_size": ours.size,
        "num_frames": ours.frames,
        "hidden_size": ours.width,
        "num_hidden_layers": ours.depth,
        "num_attention_heads": ours.heads,
        "intermediate_size": 4 * ours.width,
        "layer_norm_eps": 1e-6,
        "use_mean_pooling": not ours.encoder_norm,
        "decoder_hidden_size": ours.decoder_width,
        "decoder_num_hidden_layers": ours.decoder_depth,
        "decoder_num_attention_heads": ours.decoder_heads,
        "decoder_intermediate_size": 4 * ours.decoder_width,
    }
    return state, config


def read_videomae(
    folder: str | Path, *, frames: int | None = None, size: int | None = None, **changes: Any
) -> VideoMAE:
    """Our model from a folder with Hugging Face's config.json and model.safetensors; arguments as `from_videomae`'s.

    Nothing is unpickled: of pytorch_model.bin the error tells how to convert it.

    Raises:
        TypeError: a change names no setting of ours.
        ValueError: a file is missing or damaged, or `from_videomae` refuses what it holds; the folder is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = name == WEIGHTS and any(folder.glob("pytorch_model*.bin"))
            raise ValueError(
                f"{folder}: expected {name}, found "
                + ("pickled weights only, which can run code when read: " + CONVERT if pickled else "no such file")
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG}: expected an object, got {type(config).__name__}")
        return from_videomae(load_file(folder / WEIGHTS), config, frames=frames, size=size, **changes)
    except (SafetensorError, ValueError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{folder}: is no readable VideoMAE of Hugging Face's: {error}") from error


CONVERT = "have transformers rewrite them by VideoMAEForPreTraining.from_pretrained(folder).save_pretrained(other)"


def write_videomae(model: VideoMAE, folder: str | Path) -> None:
    """Write config.json, then model.safetensors, for transformers' `from_pretrained`; each is whole or not there.

    What they hold `to_videomae` tells. Biases have the names that transformers writes to files, in every version.

    Raises:
        ValueError: something else than files is in the way.
        OSError: a file cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state, config = to_videomae(model)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    with replacing(folder / WEIGHTS) as temporary:
        in_files = {new: old for old, new in BIASES.items()}
        save_file({_renamed(name, in_files): value for name, value in state.items()}, temporary, {"format": "pt"})


def _views(model: VideoMAE, prefix: str, decoder: bool) -> dict[str, Tensor]:
    """Our parameters by their names and in their shapes; they share our parameters' memory, so they serve both ways."""
    patches = f"{prefix}embeddings.patch_embeddings.projection"
    views = {
        f"{patches}.weight": model.patch_embed.weight.unflatten(1, (*TUBELET, 3)).permute(0, 4, 1, 2, 3),
        f"{patches}.bias": model.patch_embed.bias,
        **_block_views(f"{prefix}encoder.layer", model.blocks),
        **_parameters(f"{prefix}layernorm", model.norm),
    }
    if decoder:
        views |= {
            **_parameters("encoder_to_decoder", model.to_decoder),
            "mask_token": model.mask_token.view(1, 1, -1),
            **_block_views("decoder.decoder_layers", model.decoder_blocks),
            **_parameters("decoder.norm", model.decoder_norm),
            **_parameters("decoder.head", model.head),
        }
    return views


def _block_views(prefix: str, blocks: nn.ModuleList) -> dict[str, Tensor]:
    views = {}
    for i, block in enumerate(blocks):
        for kind in ("weight", "bias"):
            parts = block.get_parameter(f"attn.qkv.{kind}").chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                views[f"{prefix}.{i}.attention.attention.{name}.{kind}"] = part
        for ours, theirs in BLOCK.items():
            views |= _parameters(f"{prefix}.{i}.{theirs}", block.get_submodule(ours))
    return views


def _parameters(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their settings, those that are not named too, each of the type that it should have."""
    settings = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    settings["qv_bias"] = config.get("qkv_bias", settings["qv_bias"])  # the name before transformers 5
    for name in ("image_size", "patch_size"):
        sides = settings[name]
        if isinstance(sides, (list, tuple)) and len(set(map(repr, sides))) == 1:
            settings[name] = sides[0]
    for name, default in DEFAULTS.items():
        if type(settings[name]) is not type(default):  # a boolean is no integer
            expected = "a square" if name == "image_size" else f"a value like {default!r}"
            raise ValueError(f"{name}: expected {expected}, got {settings[name]!r}")
    return settings


def _check_settings(theirs: Mapping[str, Any], *, decoder: bool, pixels: bool) -> None:
    """Raise `ValueError` unless our model can represent theirs; `decoder` and `pixels`: what is taken of it."""
    expected = {
        "model_type": "videomae",
        "num_channels": 3,
        "tubelet_size": TUBELET[0],
        "patch_size": TUBELET[1],
        "hidden_act": "gelu",
        "intermediate_size": 4 * theirs["hidden_size"],
    }
    if decoder:  # settings of a decoder that is not there are nobody's
        expected["decoder_intermediate_size"] = 4 * theirs["decoder_hidden_size"]
    if decoder and pixels:
        expected["norm_pix_loss"] = True
    for name, value in expected.items():
        if theirs[name] != value:
            raise ValueError(f"{name}: expected {value!r}, got {theirs[name]!r}")
    if not 0 <= theirs["layer_norm_eps"] <= 1e-5:
        raise ValueError(f"layer_norm_eps: expected at most 1e-05, near our 1e-06, got {theirs['layer_norm_eps']!r}")


def _config(
    theirs: Mapping[str, Any], decoder: bool, frames: int | None, size: int | None, changes: Mapping[str, Any]
) -> VideoMAEConfig:
    fixed = {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "encoder_norm": not theirs["use_mean_pooling"],
    }
    decoding = {
        "decoder_width": theirs["decoder_hidden_size"],
        "decoder_depth": theirs["decoder_num_hidden_layers"],
        "decoder_heads": theirs["decoder_num_attention_heads"],
    }
    for name, value in {**fixed, **(decoding if decoder else {})}.items():
        if changes.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, as the weights have it, got {changes[name]}")
    shape = {
        "frames": theirs["num_frames"] if frames is None else frames,
        "size": theirs["image_size"] if size is None else size,
    }
    return VideoMAEConfig(**{**decoding, **fixed, **shape, **changes})


def _checked(state: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State by the names of `views`; raises unless it holds all of these, keys' biases excepted, and nothing else."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected floating point, got {value.dtype}")
        new = _renamed(name, BIASES)
        if new in tensors:
            raise ValueError(f"{name}: expected one of this and {new}, got both")
        tensors[new] = value
    problems = {
        # Some versions gave the keys a bias too.
        "missing": [name for name in views if name not in tensors and not name.endswith(".key.bias")],
        "unexpected": [name for name in tensors if name not in views],
        "of a wrong shape": [
            f"{name} {list(value.shape)} for {list(views[name].shape)}"
            for name, value in tensors.items()
            if name in views and value.shape != views[name].shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"state: expected the tensors that its configuration asks for, got {'; '.join(found)}")
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
