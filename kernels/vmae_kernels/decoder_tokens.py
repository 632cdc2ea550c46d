"""The decoder's input: encoded visible tokens and mask tokens, each with its position, in one pass."""

import torch
from torch import Tensor

from . import reference
from ._checks import INTEGERS, dtype_in, same_device, sizes
from ._library import ops, register
from ._triton import jit, tl
from ._tuning import Configuration, launch
from .gather_tokens import LIMITS, configuration, row_of_program

# --- the kernel ------------------------------------------------------------------------------------------------------


@jit
def _decoder_tokens_kernel(
    p_visible, p_visible_indices, p_selected_indices, p_mask, p_positions, p_z, v, k, n, d,
    stride_vb, stride_vi, stride_vd, stride_ib, stride_ii, stride_sb, stride_si, stride_m,
    stride_pb, stride_pn, stride_pd,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, o_row = row_of_program(v + k, ROWS)
    m_row, m_visible = o_row < v + k, o_row < v
    o_wide = o_row.to(tl.int64)
    p_first = p_visible_indices + b * stride_ib + o_wide * stride_ii
    p_second = p_selected_indices + b * stride_sb + (o_wide - v) * stride_si
    first = tl.load(p_first, mask=m_visible, other=0).to(tl.int64)
    second = tl.load(p_second, mask=m_row & ~m_visible, other=0).to(tl.int64)
    index = tl.minimum(tl.maximum(tl.where(m_visible, first, second), 0), n - 1)
    p_from = p_visible + b * stride_vb + (o_wide * stride_vi)[:, None]
    p_position = p_positions + b * stride_pb + (index * stride_pn)[:, None]
    p_to = p_z + b * (v + k) * d + (o_wide * d)[:, None]
    for start in range(0, d, COLUMNS):
        o_column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        m_column = o_column < d
        token = tl.load(p_from + o_column * stride_vd, mask=m_visible[:, None] & m_column, other=0.0).to(WIDE)
        mask_token = tl.load(p_mask + o_column * stride_m, mask=m_column, other=0.0).to(WIDE)
        position = tl.load(p_position + o_column * stride_pd, mask=m_row[:, None] & m_column, other=0.0)
        z = tl.where(m_visible[:, None], token, mask_token) + position.to(WIDE)
        tl.store(p_to + o_column, z.to(p_z.dtype.element_ty), mask=m_row[:, None] & m_column)


def _launch(
    visible: Tensor, visible_indices: Tensor, selected_indices: Tensor, mask_token: Tensor, positions: Tensor
) -> Tensor:
    (b, v, d), k, n = visible.shape, selected_indices.shape[1], positions.shape[-2]
    for indices in (visible_indices, selected_indices):
        reference.check_range(indices, n)
    if n == 0:
        return visible.new_zeros(b, v + k, d)
    z = visible.new_empty(b, v + k, d)
    if z.numel():
        positions = positions if positions.ndim == 3 else positions.expand(b, -1, -1)
        wide = torch.float64 in (visible.dtype, mask_token.dtype, positions.dtype)

        def run(options: Configuration) -> None:
            _decoder_tokens_kernel[(b * -(-(v + k) // options["ROWS"]),)](
                visible, visible_indices, selected_indices, mask_token, positions, z, v, k, n, d,
                *visible.stride(), *visible_indices.stride(), *selected_indices.stride(), *mask_token.stride(),
                *positions.stride(), WIDE=tl.float64 if wide else tl.float32, **options,
            )  # fmt: skip

        rule = configuration(d, visible.element_size())
        launch("decoder_tokens", visible, (f"D{d}", b * (v + k)), rule, LIMITS, run)
    return z


# --- the operation ---------------------------------------------------------------------------------------------------


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
        grad_positions = ops.gather_tokens_backward(rows, indices, ctx.shape[-2], False)
        grad_positions = grad_positions[0] if shared else grad_positions
    return grad[:, : ctx.v], None, None, grad_mask, grad_positions


register(
    "decoder_tokens(Tensor visible, Tensor visible_indices, Tensor selected_indices, Tensor mask_token, "
    "Tensor positions) -> Tensor",
    reference.decoder_tokens,
    kernel=_launch,
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
    return ops.decoder_tokens(visible, visible_indices, selected_indices, mask_token, positions)
