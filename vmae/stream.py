"""Encoding and decoding piece by piece: fixed tiles of time, and what passes from one to the next."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from torch import Tensor

from vmae.layers import CausalConv3d, State
from vmae.scorer import token_scores
from vmae.tokens import TUBELET, Tokens, check_video, joined
from vmae_kernels import fsq

if TYPE_CHECKING:
    from vmae.tokenizer import AdaptiveTokenizer


class _Stream:
    """Pieces [B, C, T, H, W] of any T are cut into tiles of one length, and each tile goes through the network.

    What a stream holds is less than a tile of input and the last frames that each convolution still needs, whatever the
    length of the video. A call that raises leaves the stream as it was before.
    """

    def __init__(
        self, tokenizer: "AdaptiveTokenizer", carriers: list[torch.nn.Module], window: int | None, *, step: int
    ):
        """`carriers`: modules that leave something in the state; `step`: frames per element of a piece's time."""
        tile = tokenizer.config.tile
        if window is not None:
            tile = min(tile, window)
            if window < 1 or window % TUBELET[0] or window % tile:
                expected = f"an even number of frames, below the tile of {tokenizer.config.tile} or a multiple of it"
                raise ValueError(f"window: expected {expected}, got {window}")
        self._tokenizer = tokenizer
        self._names = {module: name for name, module in tokenizer.named_modules() if module in set(carriers)}
        self._tile, self._window = tile // step, None if window is None else window // step
        self._held: Tensor | None = None
        self._state: State = {}
        self._position = 0  # in the window

    def _advance(self, piece: Tensor | None, run: Callable[[Tensor, int], Any]) -> list[Any]:
        """The results of `run(tile, length)` for the tiles that are full now, or at the end (no piece) for the rest.

        Only the first `length` frames of a tile count.
        """
        before = self._held, dict(self._state), self._position
        try:
            return self._run(piece, run)
        except BaseException:
            self._held, self._state, self._position = before
            raise

    def _run(self, piece: Tensor | None, run: Callable[[Tensor, int], Any]) -> list[Any]:
        tile = self._tile
        results = []
        if piece is None:
            assert self._held is not None
            left = self._held.shape[2]
            if left:
                padding = self._held[:, :, -1:].expand(-1, -1, tile - left, -1, -1)
                results.append(run(torch.cat((self._held, padding), dim=2), left))
            self._held, self._state, self._position = None, {}, 0
            return results
        held = piece if self._held is None else torch.cat((self._held, piece), dim=2)
        full = held.shape[2] // tile * tile
        for start in range(0, full, tile):
            results.append(run(held[:, :, start : start + tile], tile))
            self._position += tile
            if self._position == self._window:  # what follows begins a window of its own
                self._state, self._position = {}, 0
        self._held = held[:, :, full:].clone()  # what is kept must not keep the whole piece alive
        return results

    def _check_piece(self, name: str, piece: Tensor) -> None:
        device = self._tokenizer.encoder.stem.weight.device
        if piece.device != device:
            raise ValueError(f"{name}: expected to be on the tokenizer's device, {device}, got {piece.device}")
        held = self._held
        if held is None:
            return
        if held.device != device:
            raise ValueError(
                f"stream: expected to be on the tokenizer's device, {device}, is on {held.device}; use to()"
            )
        if (held.dtype, held.shape[:2], held.shape[3:]) != (piece.dtype, piece.shape[:2], piece.shape[3:]):
            raise ValueError(
                f"{name}: expected pieces of one shape and dtype, {list(held.shape)} {held.dtype}, "
                f"got {list(piece.shape)} {piece.dtype}"
            )

    def to(self, device: torch.device | str) -> Self:
        """Move what the stream holds, to go on where the tokenizer has been moved to; returns the stream."""
        if self._held is not None:
            self._held = self._held.to(device)
        self._state = {module: tensor.to(device) for module, tensor in self._state.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What the stream holds, as dense tensors that safetensors can save; `load_state_dict` goes on from it."""
        state = {f"carried.{self._names[module]}": tensor.contiguous() for module, tensor in self._state.items()}
        if self._held is not None:
            state |= {"held": self._held.contiguous(), "position": torch.tensor(self._position)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the state of another stream of the same kind, window and weights, perhaps on another device.

        Raises:
            ValueError: the state is none of this tokenizer's, or of another kind of stream.
        """
        carried = {name: state[f"carried.{name}"] for name in self._names.values() if f"carried.{name}" in state}
        known = {f"carried.{name}" for name in carried} | ({"held", "position"} if state else set())
        if state.keys() != known or len(carried) not in (0, len(self._names)):
            wrong = sorted(state.keys() ^ (known | {f"carried.{name}" for name in self._names.values()}))
            raise ValueError(
                f"state: expected the state of a {type(self).__name__} of this tokenizer, differs in {wrong}"
            )
        position = int(state["position"]) if state else 0
        if position < 0 or position % self._tile or (self._window is not None and position >= self._window):
            raise ValueError(
                f"state: expected a multiple of {self._tile} below {self._window} as position, got {position}"
            )
        device = self._tokenizer.encoder.stem.weight.device
        modules = {name: module for module, name in self._names.items()}

        def restored(tensor: Tensor) -> Tensor:
            return tensor.to(device, memory_format=torch.channels_last_3d, copy=True)

        self._held = restored(state["held"]) if state else None
        self._state = {modules[name]: restored(tensor) for name, tensor in carried.items()}
        self._position = position


class TokenStream(_Stream):
    """Tokens of a video that comes in pieces; see `AdaptiveTokenizer.stream`."""

    def __init__(self, tokenizer: "AdaptiveTokenizer", window: int | None):
        carriers = [m for m in tokenizer.encoder.modules() if isinstance(m, CausalConv3d)]
        super().__init__(tokenizer, [*carriers, tokenizer.scorer], window, step=1)

    @torch.no_grad()
    def push(self, frames: Tensor) -> Tokens:
        """Take frames [B, 3, T, H, W], any T; returns the tokens of the tiles that are full now, perhaps none."""
        check_video(frames, chunk=True)
        self._check_piece("frames", frames)
        return self._joined(self._advance(frames, self._encode), frames)

    @torch.no_grad()
    def flush(self) -> Tokens:
        """The tokens of the frames still held; the stream then starts anew."""
        held = self._held
        if held is None:
            raise ValueError("flush: expected frames pushed before, got none")
        if held.shape[2] % TUBELET[0]:
            raise ValueError(
                f"flush: expected an even number of frames in all, {held.shape[2]} are left over after full tiles"
            )
        return self._joined(self._advance(None, self._encode), held)

    def _encode(self, tile: Tensor, length: int) -> Tokens:
        model, latent_frames = self._tokenizer, length // TUBELET[0]
        x = model.normalised(tile)
        z = model.encoder(x, self._state)[:, :, :latent_frames]
        features = model.scorer(x)[:, :, :latent_frames]
        scores = token_scores(features, self._state.get(model.scorer))
        self._state[model.scorer] = features[:, :, -1:].clone()
        quantized, codes = fsq(rearrange(z, "b l t h w -> b (t h w) l").float(), model.config.levels)
        return Tokens(quantized, codes, scores, (z.shape[2], z.shape[3], z.shape[4]))

    def _joined(self, parts: list[Tokens], frames: Tensor) -> Tokens:
        batch, _, _, height, width = frames.shape
        if not parts:
            empty = frames.new_empty((batch, 0, len(self._tokenizer.config.levels)), dtype=torch.float32)
            parts = [Tokens(empty, empty[..., 0].int(), empty[..., 0], (0, height // TUBELET[1], width // TUBELET[2]))]
        return joined(parts)


class VideoStream(_Stream):
    """The video that tokens stand for, as they come in pieces; see `AdaptiveTokenizer.decode_stream`."""

    def __init__(self, tokenizer: "AdaptiveTokenizer", window: int | None):
        carriers = [m for m in tokenizer.decoder.modules() if isinstance(m, CausalConv3d)]
        super().__init__(tokenizer, [*carriers, tokenizer.decoder.hold], window, step=TUBELET[0])

    @torch.no_grad()
    def push(self, tokens: Tokens) -> Tensor:
        """Take tokens of any number of latent frames; returns the frames [B, 3, T, H, W] in [0, 1] that are ready."""
        latents, grid = tokens.latents, tokens.grid
        levels = len(self._tokenizer.config.levels)
        if latents.ndim != 3 or latents.shape[1:] != (math.prod(grid), levels) or not latents.is_floating_point():
            raise ValueError(
                f"tokens: expected floating point latents [B, {math.prod(grid)}, {levels}] for the grid {grid}, "
                f"got {list(latents.shape)} {latents.dtype}"
            )
        piece = self._tokenizer.as_grid(latents, grid)
        self._check_piece("tokens", piece)
        return self._joined(self._advance(piece, self._decode), piece)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """The frames of the tokens still held; the stream then starts anew."""
        held = self._held
        if held is None:
            raise ValueError("flush: expected tokens pushed before, got none")
        return self._joined(self._advance(None, self._decode), held)

    def _decode(self, tile: Tensor, length: int) -> Tensor:
        kept = (tile != 0).any(dim=1, keepdim=True).to(tile.dtype)
        video = self._tokenizer.decoder(tile, kept, self._state)[:, :, : length * TUBELET[0]]
        return ((video.to(tile.dtype) + 1) / 2).clamp(0, 1)

    def _joined(self, parts: list[Tensor], latents: Tensor) -> Tensor:
        if not parts:
            batch, _, _, height, width = latents.shape
            return latents.new_empty((batch, 3, 0, height * TUBELET[1], width * TUBELET[2]))
        return torch.cat(parts, dim=2)
