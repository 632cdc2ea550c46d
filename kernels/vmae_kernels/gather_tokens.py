"""Rows of a token tensor by index."""

import torch
from torch import Tensor

from . import _csrc, reference
from ._checks import INTEGERS, dtype_in, same_device, sizes
from ._library import compiled, ops, register
from ._triton import bits, jit, on_device, power_of_2, tl
from ._tuning import Configuration, Limits, launch

# --- the kernels -----------------------------------------------------------------------------------------------------


@jit
def row_of_program(k, ROWS: tl.constexpr):
    """This program's place in [B, K]: row b, and ROWS numbers from 0, some beyond k - 1."""
    blocks = tl.cdiv(k, ROWS)
    b = tl.program_id(0) // blocks
    return b.to(tl.int64), (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)


@jit
def _gather_kernel(
    p_x, p_indices, p_y, n, k, d, stride_xb, stride_xn, stride_xd, stride_ib, stride_ik,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[b, i] = x[b, indices[b, i]]; where an index lies outside, some row of x."""
    b, o_row = row_of_program(k, ROWS)
    m_row = o_row < k
    index = tl.load(p_indices + b * stride_ib + o_row.to(tl.int64) * stride_ik, mask=m_row, other=0).to(tl.int64)
    index = tl.minimum(tl.maximum(index, 0), n - 1)
    p_from = p_x + b * stride_xb + (index * stride_xn)[:, None]  # [ROWS, 1]
    p_to = p_y + b * k * d + (o_row.to(tl.int64) * d)[:, None]
    for start in range(0, d, COLUMNS):
        o_column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        mask = m_row[:, None] & (o_column < d)
        tl.store(p_to + o_column, tl.load(p_from + o_column * stride_xd, mask=mask, other=0), mask=mask)


@jit
def _invert_kernel(p_indices, p_inverse, n, k, stride_ib, stride_ik, ROWS: tl.constexpr):
    """inverse[b, indices[b, i]] = i; an index that lies outside is left out."""
    b, o_row = row_of_program(k, ROWS)
    m_row = o_row < k
    index = tl.load(p_indices + b * stride_ib + o_row.to(tl.int64) * stride_ik, mask=m_row, other=-1).to(tl.int64)
    tl.store(p_inverse + b * n + index, o_row, mask=m_row & (index >= 0) & (index < n))


@jit
def _place_kernel(
    p_y, p_inverse, p_fill, p_x, n, d, stride_yb, stride_yk, stride_yd, stride_fb, stride_fn, stride_fd,
    FILL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x[b, j] = y[b, inverse[b, j]] where that is 0 or more, else fill[b, j], fill or 0 (FILL is how many dimensions it
    has: 3, 1 or 0): each row is written once."""
    b, o_row = row_of_program(n, ROWS)
    m_row = o_row < n
    source = tl.load(p_inverse + b * n + o_row, mask=m_row, other=-1).to(tl.int64)
    p_from = p_y + b * stride_yb + (source * stride_yk)[:, None]
    p_to = p_x + b * n * d + (o_row.to(tl.int64) * d)[:, None]
    for start in range(0, d, COLUMNS):
        o_column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        m_column = o_column < d
        x = tl.load(p_from + o_column * stride_yd, mask=(source >= 0)[:, None] & m_column, other=0)
        if FILL == 1:
            x = tl.where((source >= 0)[:, None], x, tl.load(p_fill + o_column * stride_fd, mask=m_column, other=0))
        if FILL == 3:
            p_other = p_fill + b * stride_fb + (o_row.to(tl.int64) * stride_fn)[:, None] + o_column * stride_fd
            m_other = (m_row & (source < 0))[:, None]
            x = tl.where(m_other, tl.load(p_other, mask=m_other & m_column, other=0), x)
        tl.store(p_to + o_column, x, mask=m_row[:, None] & m_column)


@jit
def _sum_kernel(
    p_grad, p_order, p_starts, p_x, n, k, d, stride_gb, stride_gk, stride_gd, WIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """x[b, j] = the sum of grad[b, order[b, t]] for t from starts[b, j] to starts[b, j + 1], in that order."""
    b = (tl.program_id(0) // n).to(tl.int64)
    j = tl.program_id(0) % n
    first, last = tl.load(p_starts + b * (n + 1) + j), tl.load(p_starts + b * (n + 1) + j + 1)
    for start in range(0, d, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        b_sum = tl.zeros((COLUMNS,), WIDE)
        for t in range(first, last):
            i = tl.load(p_order + b * k + t).to(tl.int64)
            p_row = p_grad + b * stride_gb + i * stride_gk
            b_sum += tl.load(p_row + o_column.to(tl.int64) * stride_gd, mask=o_column < d, other=0.0).to(WIDE)
        p_to = p_x + b * n * d + j.to(tl.int64) * d
        tl.store(p_to + o_column, b_sum.to(p_x.dtype.element_ty), mask=o_column < d)


def configuration(d: int, size: int) -> Configuration:
    """For rows of d elements of `size` bytes: 16 bytes a thread and load, and about 16 KiB a program."""
    columns = min(power_of_2(d), max(d & -d, 128), 4096 // size)  # no idle columns where d allows it
    return {"ROWS": max(min(16384 // (columns * size), 32), 1), "COLUMNS": columns, "num_warps": 4}


LIMITS: Limits = {"ROWS": (1, 64), "COLUMNS": (32, 2048), "num_warps": (1, 8)}


def _launch(x: Tensor, indices: Tensor, unique: bool) -> Tensor:
    (b, n, d), k = x.shape, indices.shape[1]
    reference.check_range(indices, n)
    if unique:
        reference.check_distinct(indices, n, always=False)
    if n == 0:
        return x.new_zeros(b, k, d)
    y = x.new_empty(b, k, d)
    if y.numel():
        source, target = bits(x), bits(y)
        width = source.shape[2]

        def run(options: Configuration) -> None:
            _gather_kernel[(b * -(-k // options["ROWS"]),)](
                source, indices, target, n, k, width, *source.stride(), *indices.stride(), **options
            )

        rule = configuration(width, source.element_size())
        launch("gather_tokens", source, (f"D{width}", b * k), rule, LIMITS, run)
    return y


def inverted(indices: Tensor, n: int) -> Tensor:
    """int32 [B, n]: which of a row's distinct indices [B, K] each of n places is, or -1."""
    b, k = indices.shape
    inverse = torch.full((b, n), -1, dtype=torch.int32, device=indices.device)
    if b * k:
        with on_device(indices):
            _invert_kernel[(b * -(-k // 1024),)](indices, inverse, n, k, *indices.stride(), ROWS=1024)
    return inverse


def place(y: Tensor, indices: Tensor, n: int, fill: Tensor | None) -> Tensor:
    """Rows of y [B, K, D] at distinct indices [B, K] of a tensor [B, n, D], elsewhere what `fill`, [D] or [B, n, D] of
    y's dtype, has there, or 0."""
    (b, k, d) = y.shape
    x = y.new_empty(b, n, d)
    if x.numel():
        source, target = bits(y), bits(x)
        width = source.shape[2]
        inverse = inverted(indices, n)
        dimensions = 0 if fill is None else fill.ndim
        filling = source if fill is None else bits(fill if dimensions == 3 else fill[None, None])

        def run(options: Configuration) -> None:
            _place_kernel[(b * -(-n // options["ROWS"]),)](
                source, inverse, filling, target, n, width, *source.stride(), *filling.stride(),
                FILL=dimensions, **options,
            )  # fmt: skip

        rule = configuration(width, source.element_size())
        launch("place", source, (f"D{width} F{dimensions}", b * k, b * n), rule, LIMITS, run)
    return x


def _launch_backward(grad: Tensor, indices: Tensor, n: int, unique: bool) -> Tensor:
    reference.check_range(indices, n)
    if unique:
        reference.check_distinct(indices, n, always=False)
        return place(grad, indices, n, None)
    if grad.is_complex():
        pairs = _launch_backward(torch.view_as_real(grad).flatten(2), indices, n, False).unflatten(2, (-1, 2))
        return torch.view_as_complex(pairs)
    b, k, d = grad.shape
    x = grad.new_empty(b, n, d)
    if x.numel():
        found, order = indices.sort(dim=1, stable=True)
        places = torch.arange(n + 1, dtype=found.dtype, device=grad.device).repeat(b, 1)
        starts = torch.searchsorted(found, places, out_int32=True)
        with on_device(grad):
            _sum_kernel[(b * n,)](
                grad, order, starts, x, n, k, d, *grad.stride(),
                WIDE=tl.float64 if grad.dtype == torch.float64 else tl.float32,
                COLUMNS=min(power_of_2(d), 1024), num_warps=4 if d > 256 else 1,
            )  # fmt: skip
    return x


# --- the operation ---------------------------------------------------------------------------------------------------


def _fake(x: Tensor, indices: Tensor, unique: bool) -> Tensor:
    return x.new_empty((x.shape[0], indices.shape[1], x.shape[2]))


def _fake_backward(grad: Tensor, indices: Tensor, n: int, unique: bool) -> Tensor:
    return grad.new_empty((grad.shape[0], n, grad.shape[2]))


def _gather(x: Tensor, indices: Tensor, unique: bool) -> Tensor:
    if not x.is_cpu or x.stride(2) != 1 or not compiled("gather_tokens", _csrc.missing):
        return reference.gather_tokens(x, indices, unique)
    if unique:
        reference.check_distinct(indices, x.shape[1], always=False)
    y = _fake(x, indices, unique)
    if not _csrc.ops.gather(y, x, indices):
        reference.check_range(indices, x.shape[1])  # raises
    return y


def _setup_context(ctx, inputs, output) -> None:
    x, indices, ctx.unique = inputs
    ctx.n = x.shape[1]
    ctx.save_for_backward(indices)


def _backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    return ops.gather_tokens_backward(grad, indices, ctx.n, ctx.unique), None, None


def _setup_context_backward(ctx, inputs, output) -> None:
    _, indices, _, ctx.unique = inputs
    ctx.save_for_backward(indices)


def _backward_backward(ctx, grad: Tensor):
    (indices,) = ctx.saved_tensors
    return ops.gather_tokens(grad, indices, ctx.unique), None, None, None


register(
    "gather_tokens(Tensor x, Tensor indices, bool unique) -> Tensor",
    _gather,
    kernel=_launch,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "gather_tokens_backward(Tensor grad, Tensor indices, SymInt n, bool unique) -> Tensor",
    reference.gather_tokens_backward,
    kernel=_launch_backward,
    fake=_fake_backward,
    backward=_backward_backward,
    setup_context=_setup_context_backward,
)


def gather_tokens(x: Tensor, indices: Tensor, *, unique: bool = False) -> Tensor:
    """Choose K of N tokens per row: y[b, i] = x[b, indices[b, i]].

    Args:
        x: [B, N, D], any dtype and strides (not copied, but for the rows chosen).
        indices: [B, K], int32 or int64, in [0, N).
        unique: a promise that each row's indices are distinct; the backward is then a plain copy.

    Returns:
        [B, K, D] in x's dtype. The gradient is deterministic and adds up duplicates (in float32 for half types).

    Raises:
        TypeError: indices are not int32 or int64.
        ValueError: shapes do not match, or (on CPU) an index lies outside [0, N); on CUDA such an index never reads
            outside x, and what it yields is not specified.

    Under autocast: never casts.
    """
    b, _, _ = sizes("x", x, "B N D")
    sizes("indices", indices, "B K", B=b)
    dtype_in("indices", indices, INTEGERS)
    same_device("indices", indices, "x", x)
    return ops.gather_tokens(x, indices, unique)
