"""Encoding and decoding piece by piece: fixed tiles of time, and what passes from one to the next."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from torch import Tensor

from vmae.layers import CausalConv3d, State
from vmae.scorer import Scorer, token_scores
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
        self,
        tokenizer: "AdaptiveTokenizer",
        carriers: list[torch.nn.Module],
        window: int | None,
        *,
        step: int,
        channels: int,
    ):
        """`carriers`: modules that leave something in the state; `step`: frames per element of a piece's time."""
        tile = tokenizer.config.tile
        if window is not None:
            tile = min(tile, window)
            if window < 1 or window % TUBELET[0] or window % tile:
                expected = f"an even number of frames, below the tile of {tokenizer.config.tile} or a multiple of it"
                raise ValueError(f"window: expected {expected}, got {window}")
        self._tokenizer, self._channels = tokenizer, channels
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
        held = piece
        if self._held is not None and self._held.shape[2]:
            held = torch.cat((self._held, piece), dim=2)
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
            ValueError: the state is none of this tokenizer's, or of another kind of stream. The stream is as before.
        """
        modules = {f"carried.{name}": module for module, name in self._names.items()}
        carried = {name: tensor for name, tensor in state.items() if name in modules}
        expected = ({"held", "position"} | (modules.keys() if carried else set())) if state else set()
        if wrong := sorted(state.keys() ^ expected):
            raise ValueError(f"state: expected that of a {type(self).__name__} of this tokenizer, differs in {wrong}")
        for name in ("held", *carried) if state else ():
            shape = state[name].shape
            channels, frames = (self._channels, None) if name == "held" else self._carries(modules[name])
            right = len(shape) == 5 and shape[:2] == (state["held"].shape[0], channels)
            if not right or (shape[2] >= self._tile if frames is None else shape[2] != frames):
                raise ValueError(
                    f"state: expected that of this tokenizer and window, got {name} of shape {list(shape)}"
                )
        position = int(state["position"]) if state else 0
        if position < 0 or position % self._tile or (self._window is not None and position >= self._window):
            raise ValueError(
                f"state: expected a multiple of {self._tile} below {self._window} as position, got {position}"
            )
        device = self._tokenizer.encoder.stem.weight.device

        def restored(tensor: Tensor) -> Tensor:
            return tensor.to(device, memory_format=torch.channels_last_3d, copy=True)

        self._held = restored(state["held"]) if state else None
        self._state = {modules[name]: restored(tensor) for name, tensor in carried.items()}
        self._position = position

    def _carries(self, module: torch.nn.Module) -> tuple[int, int]:
        """Channels and frames of what a module leaves in the state."""
        if isinstance(module, CausalConv3d):
            return module.weight.shape[1], module.weight.shape[2] - module.stride[0]
        if isinstance(module, Scorer):
            return module.second.out_channels, 1
        return len(self._tokenizer.config.levels), 1  # Hold


class TokenStream(_Stream):
    """Tokens of a video that comes in pieces; see `AdaptiveTokenizer.stream`."""

    def __init__(self, tokenizer: "AdaptiveTokenizer", window: int | None):
        carriers = [m for m in tokenizer.encoder.modules() if isinstance(m, CausalConv3d)]
        super().__init__(tokenizer, [*carriers, tokenizer.scorer], window, step=1, channels=3)

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
        carriers: list[torch.nn.Module] = [m for m in tokenizer.decoder.modules() if isinstance(m, CausalConv3d)]
        carriers.append(tokenizer.decoder.hold)
        super().__init__(tokenizer, carriers, window, step=TUBELET[0], channels=len(tokenizer.config.levels) + 1)

    @torch.no_grad()
    def push(self, tokens: Tokens, kept: Tensor | None = None) -> Tensor:
        """Take tokens of any number of latent frames; returns the frames [B, 3, T, H, W] in [0, 1] that are ready.

        `kept`: [B, N], 0 or False for tokens that were dropped; None if all were kept.
        """
        latents, grid = tokens.latents, tokens.grid
        n, levels = math.prod(grid), len(self._tokenizer.config.levels)
        if latents.ndim != 3 or latents.shape[1:] != (n, levels) or not latents.is_floating_point():
            raise ValueError(
                f"tokens: expected floating point latents [B, {n}, {levels}] for the grid {grid}, "
                f"got {list(latents.shape)} {latents.dtype}"
            )
        if kept is None:
            kept = latents.new_ones(latents.shape[:2])
        if kept.shape != latents.shape[:2]:
            raise ValueError(f"kept: expected shape {list(latents.shape[:2])}, got {list(kept.shape)}")
        piece = self._tokenizer.as_grid(torch.cat((latents, kept[..., None].to(latents)), dim=2), grid)
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
        latents = tile.to(self._tokenizer.encoder.stem.weight.dtype)
        video = self._tokenizer.decoder(latents[:, :-1], latents[:, -1:], self._state)[:, :, : length * TUBELET[0]]
        return ((video.to(tile.dtype) + 1) / 2).clamp(0, 1)

    def _joined(self, parts: list[Tensor], latents: Tensor) -> Tensor:
        if not parts:
            batch, _, _, height, width = latents.shape
            return latents.new_empty((batch, 3, 0, height * TUBELET[1], width * TUBELET[2]))
        return torch.cat(parts, dim=2)
