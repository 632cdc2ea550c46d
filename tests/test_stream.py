"""Streams: one result for any pieces, saved and moved in the middle, and refused when they do not fit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from vmae import AdaptiveTokenizer, TokenizerConfig, Tokens
from vmae.tokens import joined

SIDE = 32  # a grid of 2 x 2 tokens


def make(**changes) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    return AdaptiveTokenizer(TokenizerConfig.tiny(**{"width": 8, "scorer_width": 4, "tile": 8, **changes})).eval()


MODEL = make()


def video(batch: int = 1, frames: int = 22, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, frames, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 4, 1, 2, 3)


def half_of(tokens: Tokens) -> torch.Tensor:
    """A mask of some tokens."""
    return torch.rand(tokens.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5


def piece_of(tokens: Tokens, start: int, stop: int) -> Tokens:
    """Latent frames `start` to `stop`."""
    _, h, w = tokens.grid
    parts = (part[:, start * h * w : stop * h * w] for part in (tokens.latents, tokens.codes, tokens.scores))
    return Tokens(*parts, grid=(stop - start, h, w))


def assert_same(a: Tokens, b: Tokens) -> None:
    assert a.grid == b.grid
    for name in ("latents", "codes", "scores"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def bounds(cuts: list[int], length: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *sorted(min(c, length) for c in cuts), length]))


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 14), max_size=5),
    latent_frames=st.integers(1, 14),
    batch=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 4, 8, 16]),
)
def test_decoding_in_pieces_gives_the_whole_bitwise(cuts, latent_frames, batch, window):
    tokens = MODEL.encode(video(batch, 2 * latent_frames))
    kept = half_of(tokens)
    stream = MODEL.decode_stream(window=window)
    parts = [stream.push(piece_of(tokens, a, b), kept[:, 4 * a : 4 * b]) for a, b in bounds(cuts, latent_frames)]
    whole = MODEL.decode(tokens, kept, window=window)
    assert whole.shape == (batch, 3, 2 * latent_frames, SIDE, SIDE)
    assert torch.equal(torch.cat([*parts, stream.flush()], 2), whole)


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=5),
    latent_frames=st.integers(1, 15),
    batch=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 4, 8, 16]),
)
def test_encoding_in_pieces_gives_the_whole_bitwise(cuts, latent_frames, batch, window):
    clip = video(batch, 2 * latent_frames)
    stream = MODEL.stream(window=window)
    parts = [stream.push(clip[:, :, a:b]) for a, b in bounds(cuts, 2 * latent_frames)]
    assert_same(joined([*parts, stream.flush()]), MODEL.encode(clip, window=window))


def test_pieces_give_the_whole_in_mixed_precision():
    clip = video(2)
    with torch.autocast("cpu", torch.bfloat16):
        stream = MODEL.stream()
        tokens = joined([stream.push(clip[:, :, :5]), stream.push(clip[:, :, 5:]), stream.flush()])
        assert_same(tokens, MODEL.encode(clip))
        kept = half_of(tokens)
        back = MODEL.decode_stream()
        parts = [back.push(piece_of(tokens, 0, 3), kept[:, :12]), back.push(piece_of(tokens, 3, 11), kept[:, 12:])]
        assert torch.equal(torch.cat([*parts, back.flush()], 2), MODEL.decode(tokens, kept))
    assert tokens.latents.dtype == tokens.scores.dtype == torch.float32
    assert not torch.equal(tokens.latents, MODEL.encode(clip).latents)  # bfloat16 was at work


@pytest.mark.parametrize("window", [8, 16])
def test_windows_are_clips_of_their_own(window):
    clip = video(2, 22)
    windows = [MODEL.encode(part) for part in clip.split(window, dim=2)]
    tokens = MODEL.encode(clip, window=window)
    assert_same(tokens, joined(windows))
    decoded = torch.cat([MODEL.decode(part) for part in windows], dim=2)
    assert torch.equal(MODEL.decode(tokens, window=window), decoded)
    assert not torch.equal(tokens.latents, MODEL.encode(clip).latents)


def test_a_window_below_the_tile_is_a_clip_of_its_own_too():
    clip = video(1, 10)
    windows = joined([MODEL.encode(part) for part in clip.split(4, dim=2)])
    tokens = MODEL.encode(clip, window=4)  # tiles are shorter then, so sums may round in another order
    torch.testing.assert_close(tokens.scores, windows.scores, rtol=1e-4, atol=1e-4)
    assert (tokens.latents == windows.latents).float().mean() > 0.99


@pytest.mark.parametrize("cut", [0, 3, 8, 13, 16, 22])
@pytest.mark.parametrize("window", [None, 16])
def test_a_saved_stream_goes_on_elsewhere(cut, window):
    clip = video(2)
    stream = MODEL.stream(window=window)
    before = stream.push(clip[:, :, :cut])
    other = make().stream(window=window)  # as another process would have it
    other.load_state_dict(load(save(stream.state_dict())))
    after = other.push(clip[:, :, cut:])
    assert_same(joined([before, after, other.flush()]), MODEL.encode(clip, window=window))


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 9])
def test_a_saved_decoder_goes_on_elsewhere(cut):
    tokens = MODEL.encode(video(2))
    kept = half_of(tokens)
    stream = MODEL.decode_stream()
    before = stream.push(piece_of(tokens, 0, cut), kept[:, : 4 * cut])
    other = make().decode_stream()
    other.load_state_dict(load(save(stream.state_dict())))
    parts = [before, other.push(piece_of(tokens, cut, 11), kept[:, 4 * cut :]), other.flush()]
    assert torch.equal(torch.cat(parts, 2), MODEL.decode(tokens, kept))


def test_a_dropped_token_shows_what_was_last_kept_and_a_kept_one_itself():
    tokens = MODEL.encode(video(frames=8))
    kept = half_of(tokens)
    held = tokens.latents.clone()
    for n in range(16):
        if not kept[0, n]:
            held[0, n] = held[0, n - 4] if n >= 4 else 0
    assert torch.equal(MODEL.decode(tokens, kept), MODEL.decode(tokens._replace(latents=held)))
    blank = tokens._replace(latents=tokens.latents * (torch.arange(16) != 9)[None, :, None])
    dropped = torch.arange(16)[None] != 9
    assert not torch.equal(MODEL.decode(blank), MODEL.decode(blank, dropped))  # all 0 and kept is not dropped


def test_saving_does_not_disturb_and_an_unused_stream_has_no_state():
    clip = video()
    stream = MODEL.stream()
    assert stream.state_dict() == {}
    parts = [stream.push(clip[:, :, :11])]
    state = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
    parts += [stream.push(clip[:, :, 11:]), stream.flush()]
    assert_same(joined(parts), MODEL.encode(clip))
    assert stream.state_dict() == {}
    stream.load_state_dict(state)
    stream.load_state_dict({})
    assert_same(joined([stream.push(clip), stream.flush()]), MODEL.encode(clip))


def test_what_a_stream_holds_does_not_grow():
    def size(stream) -> int:
        return sum(tensor.nbytes for tensor in stream.state_dict().values())

    encoder, decoder = MODEL.stream(), MODEL.decode_stream()
    sizes = []
    for seed in range(4):
        decoder.push(encoder.push(video(frames=18, seed=seed)))
        sizes.append((size(encoder), size(decoder)))
    held = 3 * SIDE * SIDE  # bytes of a frame; the pieces leave 2, 4, 6 and 0 frames
    frames = [held * n for n in (2, 4, 6, 0)]
    assert len({total - rest for (total, _), rest in zip(sizes, frames, strict=True)}) == 1
    assert len({total for _, total in sizes}) == 1


def test_every_convolution_keeps_its_last_frames_only():
    stream = MODEL.stream()
    stream.push(video(frames=16))
    convolutions = {n: m for n, m in MODEL.encoder.named_modules() if hasattr(m, "stride")}
    state = stream.state_dict()
    assert {n for n in state if n.startswith("carried.encoder")} == {f"carried.encoder.{n}" for n in convolutions}
    for name, conv in convolutions.items():
        cache = state[f"carried.encoder.{name}"]
        assert cache.shape[1:3] == (conv.weight.shape[1], conv.weight.shape[2] - conv.stride[0]), name
        assert cache.untyped_storage().nbytes() == cache.nbytes


def test_moving_takes_everything_along():
    for stream, piece in ((MODEL.stream(), video(frames=11)), (MODEL.decode_stream(), MODEL.encode(video(frames=10)))):
        stream.push(piece)
        assert stream.to("meta") is stream
        assert {tensor.device.type for name, tensor in stream.state_dict().items() if name != "position"} == {"meta"}
        with pytest.raises(ValueError, match="on the tokenizer's device, cpu, is on meta"):
            stream.push(piece)


def test_pieces_from_another_device_are_named():
    with pytest.raises(ValueError, match="frames: expected to be on the tokenizer's device, cpu, got meta"):
        MODEL.stream().push(video().to("meta"))


def test_a_push_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    clip = video(frames=24)
    stream = MODEL.stream()
    parts = [stream.push(clip[:, :, :5])]
    calls, forward = [], MODEL.encoder.forward

    def failing(x, state):
        calls.append(0)
        if len(calls) == 2:  # in the second tile, when the first one's caches have been replaced
            raise torch.OutOfMemoryError("no memory")
        return forward(x, state)

    monkeypatch.setattr(MODEL.encoder, "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        stream.push(clip[:, :, 5:])
    monkeypatch.undo()
    parts += [stream.push(clip[:, :, 5:]), stream.flush()]
    assert_same(joined(parts), MODEL.encode(clip))


def test_a_stream_may_go_on_in_another_precision():
    clip = video()
    stream = MODEL.stream()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [stream.push(clip[:, :, :8])]
    parts += [stream.push(clip[:, :, 8:]), stream.flush()]
    exact = MODEL.encode(clip)
    tokens = joined(parts)
    assert (tokens.latents - exact.latents).abs().mean() < 0.1
    torch.testing.assert_close(tokens.scores, exact.scores, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_dtypes_stream(dtype):
    model = make().to(dtype)
    clip = video()
    stream = model.stream()
    parts = [stream.push(clip[:, :, :9]), stream.push(clip[:, :, 9:]), stream.flush()]
    assert_same(joined(parts), model.encode(clip))
    exact = MODEL.encode(clip)
    assert (joined(parts).latents - exact.latents).abs().mean() < 0.1
    assert model.decode(exact._replace(latents=exact.latents.to(dtype))).dtype == dtype


@pytest.mark.parametrize("window", [0, -8, 3, 9, 12])
def test_windows_that_do_not_fit_are_refused(window):
    for start in (MODEL.stream, MODEL.decode_stream):
        with pytest.raises(ValueError, match=rf"window: expected.*got {window}"):
            start(window=window)


def test_states_that_do_not_fit_are_refused():
    stream = MODEL.stream()
    stream.push(video())
    state = stream.state_dict()
    with pytest.raises(ValueError, match=r"that of a VideoStream.*differs in.*carried\.encoder"):
        MODEL.decode_stream().load_state_dict(state)
    with pytest.raises(ValueError, match=r"differs in \['carried.scorer'\]"):
        MODEL.stream().load_state_dict({n: t for n, t in state.items() if n != "carried.scorer"})
    other = make(width=16).stream()
    for change, words in (
        ({"position": torch.tensor(3)}, "position, got 3"),
        ({"held": state["held"][0]}, r"held of shape \[3, 6, 32, 32\]"),
        ({"held": state["held"].repeat(1, 1, 2, 1, 1)}, r"held of shape \[1, 3, 12, 32, 32\]"),
        ({"held": state["held"].repeat(2, 1, 1, 1, 1)}, r"of shape \[1, "),
    ):
        with pytest.raises(ValueError, match=words):
            stream.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match=r"got carried\.encoder\..* of shape"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"window, got held of shape \[1, 3, 6, 32, 32\]"):
        MODEL.stream(window=4).load_state_dict(state)
    assert other.state_dict() == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in stream.state_dict().items())  # refused whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t._replace(grid=(2, 2, 2)), r"latents \[B, 8, 6\] for the grid \(2, 2, 2\), got \[1, 44, 6\]"),
        (lambda t: t._replace(latents=t.latents[..., :5]), r"\[1, 44, 5\]"),
        (lambda t: t._replace(latents=t.latents.int()), "int32"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        MODEL.decode(change(MODEL.encode(video())))


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"kept: expected shape \[1, 44\], got \[1, 40\]"):
        MODEL.decode(MODEL.encode(video()), torch.ones(1, 40))


def test_latents_of_another_dtype_are_decoded_in_it():
    tokens = MODEL.encode(video())
    decoded = MODEL.decode(tokens._replace(latents=tokens.latents.bfloat16()))
    assert decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded.float(), MODEL.decode(tokens), atol=1e-2, rtol=1e-2)


def test_streams_refuse_pieces_of_another_shape_and_an_end_without_a_start():
    stream = MODEL.decode_stream()
    with pytest.raises(ValueError, match="tokens pushed before, got none"):
        stream.flush()
    tokens = MODEL.encode(video(frames=6))
    assert stream.push(tokens).shape == (1, 3, 0, SIDE, SIDE)
    with pytest.raises(ValueError, match="one shape and dtype"):
        stream.push(MODEL.encode(video(2, frames=6)))
