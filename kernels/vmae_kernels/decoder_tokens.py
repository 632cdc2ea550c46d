"""The decoder's input: encoded visible tokens and mask tokens, each with its position, in one pass."""

import torch
from torch import Tensor

from . import reference
from ._checks import INTEGERS, dtype_in, same_device, sizes
from ._library import register


def _fake(
    visible: Tensor, visible_indices: Tensor, selected_indices: Tensor, mask_token: Tensor, positions: Tensor
) -> Tensor:
    b, v, d = visible.shape
    return visible.new_empty((b, v + selected_indices.shape[1], d))


def _setup_context(ctx, inputs, output) -> None:
    visible, visible_indices, selected_indices, mask_token, positions = inputs
    ctx.v, ctx.dtypes, ctx.shape = visible.shape[1], (mask_token.dtype, positions.dtype), positions.shape
    ctx.save_for_backward(visible_indices, selected_indices)


def _backward(ctx, grad: Tensor):
    visible_indices, selected_indices = ctx.saved_tensors
    mask_dtype, positions_dtype = ctx.dtypes
    grad_mask = grad_positions = None
    if ctx.needs_input_grad[3]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_mask = grad[:, ctx.v :].sum((0, 1), dtype=wide).to(mask_dtype)
    if ctx.needs_input_grad[4]:
        indices = torch.cat((visible_indices.long(), selected_indices.long()), dim=1)
        rows, shared = grad.to(positions_dtype), len(ctx.shape) == 2
        if shared:  # every batch row adds to the same table
            rows, indices = rows.reshape(1, -1, rows.shape[2]), indices.reshape(1, -1)
        grad_positions = torch.ops.vmae_kernels.gather_tokens_backward(rows, indices, ctx.shape[-2], False)
        grad_positions = grad_positions[0] if shared else grad_positions
    return grad[:, : ctx.v], None, None, grad_mask, grad_positions


register(
    "decoder_tokens(Tensor visible, Tensor visible_indices, Tensor selected_indices, Tensor mask_token, "
    "Tensor positions) -> Tensor",
    reference.decoder_tokens,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def decoder_tokens(
    visible: Tensor, visible_indices: Tensor, selected_indices: Tensor, mask_token: Tensor, positions: Tensor
) -> Tensor:
    """What a masked autoencoder's decoder reads: V visible tokens, then K mask tokens, each plus its position.

    z[b, i] = visible[b, i] + positions[visible_indices[b, i]] for i < V, and
    z[b, V + j] = mask_token + positions[selected_indices[b, j]].

    Args:
        visible: [B, V, D], floating point.
        visible_indices: [B, V], int32 or int64, in [0, N).
        selected_indices: [B, K], int32 or int64, in [0, N).
        mask_token: [D], floating point.
        positions: [N, D] for every row, or [B, N, D]; floating point.

    Returns:
        [B, V + K, D] in visible's dtype; sums are rounded to it once. Differentiable in visible, mask_token and
        positions.

    Raises:
        TypeError: a dtype is not floating point, or indices are not int32 or int64.
        ValueError: shapes do not match, or (on CPU) an index lies outside [0, N).

    Under autocast: never casts.

    Source: LVMAE (NeurIPS 2024), section 3; He et al., "Masked autoencoders are scalable vision learners" (CVPR 2022),
    section 3.
    """
    b, v, d = sizes("visible", visible, "B V D")
    sizes("visible_indices", visible_indices, "B V", B=b, V=v)
    sizes("selected_indices", selected_indices, "B K", B=b)
    sizes("mask_token", mask_token, "D", D=d)
    if isinstance(positions, Tensor) and positions.ndim == 2:
        sizes("positions", positions, "N D", D=d)
    else:
        sizes("positions", positions, "B N D", B=b, D=d)
    for name, x in (("visible", visible), ("mask_token", mask_token), ("positions", positions)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
        same_device(name, x, "visible", visible)
    for name, x in (("visible_indices", visible_indices), ("selected_indices", selected_indices)):
        dtype_in(name, x, INTEGERS)
        same_device(name, x, "visible", visible)
    return torch.ops.vmae_kernels.decoder_tokens(visible, visible_indices, selected_indices, mask_token, positions)
