"""Weights from and to Hugging Face, against the installed transformers where there is one."""

import json
import math
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vmae import VideoMAE, VideoMAEConfig, tube_mask
from vmae.mae import IMAGENET_MEAN, IMAGENET_STD
from vmae.videomae import from_videomae, read_videomae, to_videomae, write_videomae

FRAMES, SIDE, SEED = 16, 64, 7
GRID = (8, 4, 4)
N = math.prod(GRID)
THEIRS = {
    "image_size": SIDE,
    "num_frames": FRAMES,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}
OURS = {"frames": FRAMES, "size": SIDE, "width": 48, "depth": 2, "heads": 3, "decoder_width": 32, "decoder_heads": 2}
MASKED = {"mask_ratio": 0.75}

# float32: the two add up in another order, and their epsilons differ by 1e-6, and by 1e-5 before the head. Differences
# seen are 5e-6 of features of size 1, and 6e-5 without a norm, where they are of size 11; without the queries' bias of
# one block they are 0.09.
FLOAT = {"rtol": 1e-4, "atol": 1e-4}
# float64 with equal epsilons leaves the order of sums: differences seen are 1e-14.
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


def shaken(model: nn.Module) -> nn.Module:
    """Weights that let every part show: no zero bias, no unit gain, attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def peer(kind: str = "VideoMAEForPreTraining", **changes):
    transformers = pytest.importorskip("transformers")
    return shaken(getattr(transformers, kind)(transformers.VideoMAEConfig(**{**THEIRS, **changes})))


def ours(**changes) -> VideoMAE:
    settings = {"target": "pixels", "strategy": "none", **MASKED, **OURS, **changes}
    return shaken(VideoMAE(VideoMAEConfig.tiny(**settings)))


def converted(theirs: nn.Module, **changes) -> VideoMAE:
    return from_videomae(theirs.state_dict(), theirs.config.to_dict(), **{**MASKED, **changes})


def clip(frames: int = FRAMES, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, frames, side, side), dtype=torch.uint8, generator=generator)


def normalised(video: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As Hugging Face takes it: [B, T, C, H, W]."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((video.transpose(1, 2).double() / 255 - mean) / std).to(dtype)


def hidden(grid=GRID) -> torch.Tensor:
    everything = torch.ones(2, math.prod(grid), dtype=torch.bool)
    return everything.scatter(1, tube_mask(grid, 2, mask_ratio=MASKED["mask_ratio"], seed=SEED).visible, False)


def current(state) -> dict[str, torch.Tensor]:
    """A state dict with the biases' names of transformers 5."""
    return {n.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias"): v for n, v in state.items()}


def assert_same(left, right) -> None:
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForPreTraining", "VideoMAEForVideoClassification"])
@torch.no_grad()
def test_features_are_theirs(kind, pooling):
    theirs = peer(kind, use_mean_pooling=pooling)
    model = converted(theirs)
    assert model.config.encoder_norm is not pooling
    expected = getattr(theirs, "videomae", theirs)(normalised(clip())).last_hidden_state
    torch.testing.assert_close(model.encode(clip()), expected, **FLOAT)
    torch.testing.assert_close(model.encode(clip().float() / 255), expected, **FLOAT)


@pytest.mark.parametrize("pooling", [True, False])
@torch.no_grad()
def test_pixel_loss_is_theirs(pooling):
    theirs = peer(use_mean_pooling=pooling)
    model = converted(theirs)
    assert (model.config.target, model.config.strategy) == ("pixels", "none")
    expected = theirs(normalised(clip()), bool_masked_pos=hidden()).loss
    torch.testing.assert_close(model(clip(), seed=SEED), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_everything_is_theirs_in_double_precision():
    theirs = peer(use_mean_pooling=False, layer_norm_eps=1e-6)
    theirs.decoder.norm.eps = 1e-6
    model = converted(theirs).double()
    theirs = theirs.double()
    pixels = normalised(clip(), torch.float64)
    features = theirs.videomae(pixels).last_hidden_state
    torch.testing.assert_close(model.encode(clip()), features, **DOUBLE)
    output = theirs(pixels, bool_masked_pos=hidden())
    mask = tube_mask(GRID, 2, mask_ratio=MASKED["mask_ratio"], seed=SEED)
    torch.testing.assert_close(model.predict(clip(), mask.visible, mask.hidden), output.logits, **DOUBLE)
    # Our targets are float32, whatever the model's precision.
    torch.testing.assert_close(model(clip(), seed=SEED).double(), output.loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_weights_of_16_frames_serve_128():
    theirs = peer("VideoMAEModel", image_size=32)
    model = converted(theirs, frames=128)
    assert (model.config.frames, model.config.size) == (128, 32)
    longer = peer("VideoMAEModel", image_size=32, num_frames=128)  # the same weights
    features = model.encode(clip(128, 32))
    assert features.shape == (2, 256, 48)
    assert features.isfinite().all()
    torch.testing.assert_close(features, longer(normalised(clip(128, 32))).last_hidden_state, **FLOAT)
    # Cosines and sines of angles up to 256, rounded to float32.
    table = longer.embeddings.position_embeddings[0]
    torch.testing.assert_close(model.encoder_positions, table, rtol=0, atol=1e-7)
    short = converted(theirs)
    assert torch.equal(short.encode(clip(128, 32)), features)  # whatever the configuration says


@pytest.mark.parametrize("pooling", [True, False])
def test_there_and_back_is_bitwise_the_same(pooling):
    theirs = peer(use_mean_pooling=pooling, layer_norm_eps=1e-6)
    state, config = to_videomae(converted(theirs))
    assert_same(state, current(theirs.state_dict()))
    assert all(value.is_contiguous() for value in state.values())
    given = theirs.config.to_dict()
    assert {name: value for name, value in config.items() if name != "architectures" and given.get(name) != value} == (
        {} if "qv_bias" in given else {"qv_bias": True}
    )


def test_back_and_there_is_the_same_but_for_the_keys_bias():
    model = ours().double()
    again = from_videomae(*to_videomae(model), **MASKED)
    assert again.config == model.config
    for block in (*again.blocks, *again.decoder_blocks):
        assert not block.attn.qkv.bias.chunk(3)[1].any()
    with torch.no_grad():
        # from_videomae gives float32, which holds these weights exactly.
        torch.testing.assert_close(again.double().encode(clip()), model.encode(clip()), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(again(clip(), seed=SEED), model(clip(), seed=SEED), rtol=1e-6, atol=0)
        for block in (*model.blocks, *model.decoder_blocks):
            block.attn.qkv.bias.chunk(3)[1].zero_()
    assert_same(again.state_dict(), model.state_dict())


def test_state_is_a_copy():
    model = ours()
    state, _ = to_videomae(model)
    before = model.patch_embed.weight.clone()
    for value in state.values():
        value.zero_()
    assert torch.equal(model.patch_embed.weight, before)


@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path, norm):
    transformers = pytest.importorskip("transformers")
    model = ours(encoder_norm=norm)
    write_videomae(model, tmp_path)
    theirs, report = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    features = theirs.videomae(normalised(clip())).last_hidden_state
    torch.testing.assert_close(features, model.encode(clip()), **FLOAT)
    loss = theirs(normalised(clip()), bool_masked_pos=hidden()).loss
    torch.testing.assert_close(loss, model(clip(), seed=SEED), rtol=1e-5, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert read_videomae(tmp_path, **MASKED).config == model.config


@torch.no_grad()
def test_what_transformers_writes_is_read(tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    model = read_videomae(tmp_path, frames=32, **MASKED)
    assert model.config.frames == 32
    assert_same(model.state_dict(), converted(theirs).state_dict())


def test_files_name_the_biases_as_published_ones_do(tmp_path):
    write_videomae(ours(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.metadata() == {"format": "pt"}  # transformers 4 reads no other
    assert "videomae.encoder.layer.1.attention.attention.q_bias" in names
    assert "decoder.decoder_layers.0.attention.attention.v_bias" in names
    assert not [name for name in names if name.endswith(("query.bias", "key.bias", "value.bias"))]


def test_a_target_of_latents_has_a_new_head_and_keeps_the_rest():
    state, config = to_videomae(ours())
    torch.manual_seed(0)
    model = from_videomae(state, config | {"norm_pix_loss": False}, target="latent", strategy="adaptive")
    pixels = from_videomae(state, config)
    assert model.head.weight.shape == (6, 32)
    kept, new = pixels.state_dict(), model.state_dict()
    for name in ("head.weight", "head.bias"):
        del kept[name], new[name]
    assert_same(kept, new)


@torch.no_grad()
def test_of_a_model_of_latents_the_encoder_is_written(tmp_path):
    model = ours(target="latent", strategy="random")
    write_videomae(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["VideoMAEModel"]
    assert torch.equal(read_videomae(tmp_path).patch_embed.weight, model.patch_embed.weight)
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.VideoMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    torch.testing.assert_close(theirs(normalised(clip())).last_hidden_state, model.encode(clip()), **FLOAT)


@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForVideoClassification"])
def test_without_a_decoder_ours_is_new(kind):
    # Published configurations of encoders carry settings of a decoder that nobody checked.
    theirs = peer(kind, decoder_intermediate_size=77, norm_pix_loss=False)
    torch.manual_seed(3)
    model = converted(theirs)
    torch.manual_seed(3)
    fresh = VideoMAE(model.config)
    assert_same(model.decoder_blocks.state_dict(), fresh.decoder_blocks.state_dict())
    assert (model.config.decoder_width, model.config.decoder_depth, model.config.decoder_heads) == (32, 2, 2)
    assert converted(theirs, decoder_width=64, decoder_depth=1, decoder_heads=4).config.decoder_width == 64
    assert model(clip(), seed=SEED).isfinite()


def test_older_names_of_biases_and_biases_of_keys_are_read():
    model = ours()
    state, config = to_videomae(model)
    older = {n.replace(".query.bias", ".q_bias").replace(".value.bias", ".v_bias"): v for n, v in state.items()}
    assert older.keys() != state.keys()
    config["qkv_bias"] = config.pop("qv_bias")
    assert_same(from_videomae(older, config).state_dict(), from_videomae(state, config).state_dict())
    keyed = state | {
        f"{at}.attention.attention.key.bias": block.attn.qkv.bias.detach().chunk(3)[1]
        for stack, blocks in (
            ("videomae.encoder.layer", model.blocks),
            ("decoder.decoder_layers", model.decoder_blocks),
        )
        for at, block in ((f"{stack}.{i}", block) for i, block in enumerate(blocks))
    }
    assert_same(from_videomae(keyed, config).state_dict(), model.state_dict())
    one = "decoder.decoder_layers.1.attention.attention"
    with pytest.raises(ValueError, match=r"q_bias: expected one of this and .*query\.bias, got both"):
        from_videomae(state | {f"{one}.q_bias": state[f"{one}.query.bias"]}, config)


@torch.no_grad()
def test_no_biases_are_zero_biases():
    theirs = peer("VideoMAEModel", qkv_bias=False)
    assert not any("query.bias" in name for name in current(theirs.state_dict()))
    model = converted(theirs)
    torch.testing.assert_close(model.encode(clip()), theirs(normalised(clip())).last_hidden_state, **FLOAT)


@pytest.mark.parametrize("name", ["qv_bias", "qkv_bias"])  # transformers 5, and before
def test_configurations_say_whether_there_are_biases(name):
    state, config = to_videomae(ours())
    with pytest.raises(ValueError, match=r"unexpected: videomae\.encoder\.layer\.0\.attention\.attention\.query\.bias"):
        from_videomae(state, config | {name: False})
    unbiased = {n: v for n, v in state.items() if not n.endswith(("query.bias", "value.bias"))}
    for block in from_videomae(unbiased, config | {name: False}).blocks:
        assert not block.attn.qkv.bias.any()
    with pytest.raises(ValueError, match=r"missing: videomae\.encoder\.layer\.0\.attention\.attention\.query\.bias"):
        from_videomae(unbiased, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_is_read_as_float32(dtype):
    state, config = to_videomae(ours().to(dtype))
    assert {value.dtype for value in state.values()} == {dtype}
    model = from_videomae(state, config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(to_videomae(model)[0], {name: value.float() for name, value in state.items()})


def test_settings_that_are_not_named_have_their_defaults():
    state, config = to_videomae(ours())
    kept = {name: config[name] for name in (*THEIRS, "model_type", "use_mean_pooling")}
    model = from_videomae(state, kept | {"image_size": [SIDE, SIDE], "patch_size": [16, 16]}, mask_ratio=0.5)
    assert model.config == VideoMAEConfig.tiny(**OURS, target="pixels", strategy="none", mask_ratio=0.5)
    assert not model.training
    with pytest.raises(ValueError, match=r"videomae\.layernorm\.weight"):  # which averaging, the default, does not have
        from_videomae(state, {name: value for name, value in kept.items() if name != "use_mean_pooling"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "vit_mae"}, "model_type: expected 'videomae', got 'vit_mae'"),
        ({"model_type": None}, "model_type: expected a value like '', got None"),
        ({"patch_size": 14}, "patch_size: expected 16, got 14"),
        ({"patch_size": [16, 8]}, r"patch_size: expected a value like 16, got \[16, 8\]"),
        ({"image_size": [64, 96]}, r"image_size: expected a square, got \[64, 96\]"),
        ({"image_size": 60}, "size: expected a positive multiple of 16, got 60"),
        ({"tubelet_size": 1}, "tubelet_size: expected 2, got 1"),
        ({"num_channels": 1}, "num_channels: expected 3, got 1"),
        ({"intermediate_size": 96}, "intermediate_size: expected 192, got 96"),
        ({"decoder_intermediate_size": 64}, "decoder_intermediate_size: expected 128, got 64"),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu', got 'relu'"),
        ({"norm_pix_loss": False}, "norm_pix_loss: expected True, got False"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps: expected at most 1e-05.*got 0.001"),
        ({"hidden_size": "48"}, "hidden_size: expected a value like 768, got '48'"),
        ({"hidden_size": True}, "hidden_size: expected a value like 768, got True"),
        ({"num_attention_heads": 5}, "heads, 5, got 48"),
        ({"num_hidden_layers": 3}, r"missing: videomae\.encoder\.layer\.2\..* and \d+ more"),
        ({"decoder_num_hidden_layers": 1}, r"unexpected: decoder\.decoder_layers\.1\."),
        ({"use_mean_pooling": True}, r"unexpected: videomae\.layernorm\.weight, videomae\.layernorm\.bias$"),
        ({"hidden_size": 96, "intermediate_size": 384}, r"projection\.weight \[48, 3, 2, 16, 16\] for \[96, 3, 2, 16"),
    ],
)
def test_configurations_that_ours_cannot_represent_are_refused(changes, words):
    state, config = to_videomae(ours())
    with pytest.raises(ValueError, match=words):
        from_videomae(state, config | changes)


def wrong(state, name, value):
    changed = {**state, name: value}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("mask_token", None, ValueError, "missing: mask_token$"),
        ("decoder.head.bias", None, ValueError, r"missing: decoder\.head\.bias$"),
        ("mask_token", torch.zeros(32), ValueError, r"of a wrong shape: mask_token \[32\] for \[1, 1, 32\]"),
        ("extra", torch.zeros(1), ValueError, "unexpected: extra$"),
        ("mask_token", torch.zeros(1, 1, 32, dtype=torch.int8), ValueError, "mask_token: expected floating.*int8"),
        ("mask_token", [0.0] * 32, TypeError, "mask_token: expected a tensor, got list"),
    ],
)
def test_wrong_tensors_are_refused(name, value, error, words):
    state, config = to_videomae(ours())
    with pytest.raises(error, match=words):
        from_videomae(wrong(state, name, value), config)


def test_no_tensors_are_refused():
    with pytest.raises(ValueError, match=r"missing: embeddings\.patch_embeddings\.projection\.weight"):
        from_videomae({}, to_videomae(ours())[1])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"width": 96}, ValueError, "width: expected 48, as the weights have it, got 96"),
        ({"decoder_heads": 1}, ValueError, "decoder_heads: expected 2, as the weights have it, got 1"),
        ({"encoder_norm": False}, ValueError, "encoder_norm: expected True"),
        ({"target": "codes"}, ValueError, "target.*'codes'"),
        ({"frames": 15}, ValueError, "frames: expected a positive multiple of 2, got 15"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_wrong_changes_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        from_videomae(*to_videomae(ours()), **changes)


def test_a_configuration_object_is_refused():
    with pytest.raises(TypeError, match=r"config: expected a mapping, as to_dict\(\) gives, got SimpleNamespace"):
        from_videomae({}, types.SimpleNamespace(hidden_size=48))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "expected config.json, found no such file"),
        ("config.json", b"{", "is no readable"),
        ("config.json", b"\xff\xfe", "is no readable"),
        ("config.json", b"[]", "config.json: expected an object, got list"),
        ("config.json", b"{}", "model_type: expected 'videomae', got ''"),
        ("model.safetensors", None, "expected model.safetensors, found no such file"),
        ("model.safetensors", b"", "is no readable"),
        ("model.safetensors", b"no weights", "is no readable"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, file, content, words):
    write_videomae(ours(), tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_videomae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_cut_weights_are_refused(tmp_path):
    write_videomae(ours(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no readable"):
        read_videomae(tmp_path)


def test_wrong_tensors_in_a_folder_are_refused(tmp_path):
    write_videomae(ours(), tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: weight$"):
        read_videomae(tmp_path)


def test_pickles_are_never_read(tmp_path):
    write_videomae(ours(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only.*from_pretrained\(folder\)\.save_pretrained\(other\)"):
        read_videomae(tmp_path)


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="to be a folder, found a file"):
        write_videomae(ours(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_encoder_without_a_norm_is_saved_and_loaded(tmp_path):
    model = ours(encoder_norm=False)
    model.save_pretrained(tmp_path)
    assert_same(VideoMAE.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_transformers_is_not_imported():
    code = "import sys, vmae.videomae; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
