"""Memory-efficient attention: dense, through an index into keys and values, and on packed sequences.

On a CPU with AMX, bfloat16 is computed by the extension of csrc/, where it was built.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _csrc, reference
from ._checks import FLOATS, INTEGERS, count, dtype_in, same_device, same_dtype, sizes
from ._library import compiled, ops, register, register_composite
from ._triton import architecture, jit, on_device, power_of_2, tl
from ._tuning import Configuration, launch
from .gather_tokens import place

# --- the kernels -----------------------------------------------------------------------------------------------------


@jit
def _block_of_program(longest, heads, BLOCK: tl.constexpr):
    """This program's share: (sequence, head, BLOCK rows of it), of `longest` rows at most."""
    blocks = tl.cdiv(longest, BLOCK)
    head = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), rows


@jit
def _sequence(p_cu, b, length, PACKED: tl.constexpr):
    """Where sequence b starts among the rows, and how many it has: all, from 0 on, of what is not packed."""
    if PACKED:
        start = tl.load(p_cu + b)
        return start.to(tl.int64), tl.load(p_cu + b + 1) - start
    return tl.zeros((), tl.int64), length


@jit
def _key_rows(p_indices, o_n, n, total, stride_is, INDEXED: tl.constexpr):
    """The rows of keys o_n, of n, among `total` rows: these very ones, or those that indices name."""
    if INDEXED:
        rows = tl.load(p_indices + o_n.to(tl.int64) * stride_is, mask=o_n < n, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(rows, 0), total - 1)  # one that lies outside reads some row
    return o_n.to(tl.int64)


@jit
def _load_rows(p, rows, mask, stride_row, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]: the rows of a tensor, and zeros beyond D and where not mask."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(p + (rows * stride_row)[:, None] + o_d * stride_d, mask=mask[:, None] & (o_d < D), other=0.0)


@jit
def _forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_indices, p_cu_q, p_cu_k, heads, m, n, total, scale,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_ib, stride_is, stride_lse,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries: softmax with a running maximum, in powers of 2; lse [M] in the same."""
    b, h, o_m = _block_of_program(m, heads, BLOCK_M)
    first, m = _sequence(p_cu_q, b, m, PACKED)
    first_key, n = _sequence(p_cu_k, b, n, PACKED)
    batch = tl.zeros((), tl.int64) if PACKED else b
    m_m = o_m < m
    rows = first + o_m
    b_q = _load_rows(p_q + batch * stride_qb + h * stride_qh, rows, m_m, stride_qm, stride_qd, D, BLOCK_D)
    p_k += batch * stride_kb + h * stride_kh
    p_v += batch * stride_vb + h * stride_vh
    b_o = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    b_max = tl.full((BLOCK_M,), float("-inf"), WIDE)
    b_sum = tl.zeros((BLOCK_M,), WIDE)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < n
        keys = first_key + _key_rows(p_indices + b * stride_ib, o_n, n, total, stride_is, INDEXED)
        b_k = _load_rows(p_k, keys, m_n, stride_kn, stride_kd, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee", out_dtype=WIDE) * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_next = tl.where(b_next == float("-inf"), 0.0, b_next)  # no key has counted yet
        b_p = tl.exp2(b_s - b_next[:, None])
        b_kept = tl.exp2(b_max - b_next)
        b_sum = b_sum * b_kept + tl.sum(b_p, 1)
        b_v = _load_rows(p_v, keys, m_n, stride_vn, stride_vd, D, BLOCK_D)
        b_o = b_o * b_kept[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee", out_dtype=WIDE)
        b_max = b_next
    b_o = b_o / tl.where(b_sum == 0, 1.0, b_sum)[:, None]  # 0 for no keys
    o_d = tl.arange(0, BLOCK_D)
    p_o += batch * stride_ob + h * stride_oh + (rows * stride_om)[:, None] + o_d
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_m[:, None] & (o_d < D))
    tl.store(p_lse + (batch * heads + h) * stride_lse + rows, b_max + tl.log2(b_sum), mask=m_m)


@jit
def _delta_kernel(
    p_grad, p_o, p_delta, m, heads, stride_gb, stride_gh, stride_gm, stride_gd, stride_ob, stride_oh, stride_om,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = the sum of grad * o over a row."""
    b, h, o_m = _block_of_program(m, heads, BLOCK_M)
    m_m, rows = o_m < m, o_m.to(tl.int64)
    b_grad = _load_rows(p_grad + b * stride_gb + h * stride_gh, rows, m_m, stride_gm, stride_gd, D, BLOCK_D)
    b_o = _load_rows(p_o + b * stride_ob + h * stride_oh, rows, m_m, stride_om, 1, D, BLOCK_D)
    tl.store(p_delta + (b * heads + h) * m + rows, tl.sum(b_grad.to(WIDE) * b_o.to(WIDE), 1), mask=m_m)


@jit
def _keys_backward_kernel(
    p_grad, p_q, p_k, p_v, p_lse, p_delta, p_dk, p_dv, p_indices, p_cu_q, p_cu_k, heads, m, n, total, scale, factor,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_db, stride_dh, stride_dn, stride_ib, stride_is, stride_lse,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys: their gradients, and their values', summed over all queries in turn."""
    b, h, o_n = _block_of_program(n, heads, BLOCK_N)
    first, m = _sequence(p_cu_q, b, m, PACKED)
    first_key, n = _sequence(p_cu_k, b, n, PACKED)
    batch = tl.zeros((), tl.int64) if PACKED else b
    m_n = o_n < n
    keys = first_key + _key_rows(p_indices + b * stride_ib, o_n, n, total, stride_is, INDEXED)
    b_k = _load_rows(p_k + batch * stride_kb + h * stride_kh, keys, m_n, stride_kn, stride_kd, D, BLOCK_D)
    b_v = _load_rows(p_v + batch * stride_vb + h * stride_vh, keys, m_n, stride_vn, stride_vd, D, BLOCK_D)
    p_q += batch * stride_qb + h * stride_qh
    p_grad += batch * stride_gb + h * stride_gh
    p_lse += (batch * heads + h) * stride_lse
    p_delta += (batch * heads + h) * stride_lse
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    for start in range(0, m, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m, rows = o_m < m, first + o_m
        b_q = _load_rows(p_q, rows, m_m, stride_qm, stride_qd, D, BLOCK_D)
        b_lse = tl.load(p_lse + rows, mask=m_m, other=float("inf"))  # whose weights are 0
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee", out_dtype=WIDE) * scale
        b_p = tl.exp2(b_s - b_lse[None, :])  # [BLOCK_N, BLOCK_M]
        b_grad = _load_rows(p_grad, rows, m_m, stride_gm, stride_gd, D, BLOCK_D)
        b_dv += tl.dot(b_p.to(b_grad.dtype), b_grad, input_precision="ieee", out_dtype=WIDE)
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee", out_dtype=WIDE)
        b_ds = b_p * (b_dp - tl.load(p_delta + rows, mask=m_m, other=0.0)[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee", out_dtype=WIDE)
    o_d = tl.arange(0, BLOCK_D)
    mask = m_n[:, None] & (o_d < D)
    place = batch * stride_db + h * stride_dh + ((first_key + o_n) * stride_dn)[:, None] + o_d
    tl.store(p_dk + place, (b_dk * factor).to(p_dk.dtype.element_ty), mask=mask)
    tl.store(p_dv + place, b_dv.to(p_dv.dtype.element_ty), mask=mask)


@jit
def _queries_backward_kernel(
    p_grad, p_q, p_k, p_v, p_lse, p_delta, p_dq, p_indices, p_cu_q, p_cu_k, heads, m, n, total, scale, factor,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_db, stride_dh, stride_dm, stride_ib, stride_is, stride_lse,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries: their gradients, summed over all keys in turn."""
    b, h, o_m = _block_of_program(m, heads, BLOCK_M)
    first, m = _sequence(p_cu_q, b, m, PACKED)
    first_key, n = _sequence(p_cu_k, b, n, PACKED)
    batch = tl.zeros((), tl.int64) if PACKED else b
    m_m, rows = o_m < m, first + o_m
    b_q = _load_rows(p_q + batch * stride_qb + h * stride_qh, rows, m_m, stride_qm, stride_qd, D, BLOCK_D)
    b_grad = _load_rows(p_grad + batch * stride_gb + h * stride_gh, rows, m_m, stride_gm, stride_gd, D, BLOCK_D)
    b_lse = tl.load(p_lse + (batch * heads + h) * stride_lse + rows, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_delta + (batch * heads + h) * stride_lse + rows, mask=m_m, other=0.0)
    p_k += batch * stride_kb + h * stride_kh
    p_v += batch * stride_vb + h * stride_vh
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < n
        keys = first_key + _key_rows(p_indices + b * stride_ib, o_n, n, total, stride_is, INDEXED)
        b_k = _load_rows(p_k, keys, m_n, stride_kn, stride_kd, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee", out_dtype=WIDE) * scale
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_v = _load_rows(p_v, keys, m_n, stride_vn, stride_vd, D, BLOCK_D)
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee", out_dtype=WIDE)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee", out_dtype=WIDE)
    o_d = tl.arange(0, BLOCK_D)
    p_dq += batch * stride_db + h * stride_dh + (rows * stride_dm)[:, None] + o_d
    tl.store(p_dq, (b_dq * factor).to(p_dq.dtype.element_ty), mask=m_m[:, None] & (o_d < D))


def configuration(d: int, size: int, *, backward: bool, architecture: int) -> Configuration:
    """Blocks for heads of d numbers of `size` bytes.

    By what the compiler says (`make resources`), not yet by time: the largest that spill no registers on any of the
    architectures. float32 is multiplied without matrix instructions, and needs many more. sm_120 is as sm_80 is, with
    less shared memory than those between.
    """
    block_d = max(power_of_2(d), 16)
    long = block_d > 64
    many = 8 if block_d > (32 if architecture >= 120 else 64) else 4  # warps
    if size > 2:
        m, n, warps = 16 if long else 32, 32 if backward and not long else 16, 8
    elif backward:
        m, n, warps = 64, 64, 4 if 100 <= architecture < 120 else many
    else:
        m, n, warps = 128, 64, many
    stages = 1 if long and backward and size <= 2 and not 90 <= architecture < 120 else 2
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


_LIMITS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "num_warps": (2, 16), "num_stages": (1, 4)}
_LOG2_E = math.log2(math.e)


class _Case(NamedTuple):
    """What the kernels are to know of a call, of tensors [B, H, M, d], or [1, H, total, d] of packed sequences."""

    sequences: int
    m: int
    """Queries of a sequence, or a bound on it."""
    n: int
    """Keys, likewise."""
    offsets: tuple[Tensor, Tensor]
    indices: Tensor
    strides: tuple[int, ...]
    """Of the indices."""
    options: dict[str, Any]
    kind: tuple[int | str, ...]
    """For which one configuration will do."""


def _case(
    q: Tensor, k: Tensor, indices: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> _Case:
    sequences, m, n = len(q), q.shape[2], k.shape[2]
    offsets, rows, strides = (q, q), q, q.stride()  # not read, unless they are others
    if cu_q is not None and cu_k is not None:
        reference.check_offsets(m, n, cu_q, cu_k, max_q, max_k)
        sequences, m, n, offsets = len(cu_q) - 1, max_q, max_k, (cu_q, cu_k)
    if indices is not None:
        reference.check_range(indices, n)
        reference.check_distinct(indices, n, always=False)
        n, rows, strides = indices.shape[1], indices, indices.stride()
    options = {
        "PACKED": cu_q is not None,
        "INDEXED": indices is not None,
        "D": q.shape[3],
        "WIDE": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "enable_fp_fusion": True,
    }
    layout = "packed" if cu_q is not None else "indexed" if indices is not None else "dense"
    kind = (layout, f"d{q.shape[3]}", sequences * q.shape[1], m, n)
    return _Case(sequences, m, n, offsets, rows, strides[:2], options, kind)


def _rows_of(like: Tensor, n: int | None = None) -> Tensor:
    """New [B, H, N, d] whose heads lie inside tokens, as the next layer wants them."""
    b, h, m, d = like.shape
    return like.new_empty(b, m if n is None else n, h, d).transpose(1, 2)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    case = _case(q, k, indices, cu_q, cu_k, max_q, max_k)
    o, lse = _fake_kernel(q, k, v)
    if o.numel() and case.m:

        def run(blocks: Configuration) -> None:
            _forward_kernel[(case.sequences * q.shape[1] * -(-case.m // blocks["BLOCK_M"]),)](
                q, k, v, o, lse, case.indices, *case.offsets, q.shape[1], case.m, case.n, k.shape[2],
                scale * _LOG2_E, *q.stride(), *k.stride(), *v.stride(), *o.stride()[:3], *case.strides, q.shape[2],
                **blocks, **case.options,
            )  # fmt: skip

        rule = configuration(q.shape[3], q.element_size(), backward=False, architecture=architecture(q))
        launch("attention", q, case.kind, rule, _LIMITS, run)
    return o, lse


def _launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, indices: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    case = _case(q, k, indices, cu_q, cu_k, max_q, max_k)
    (b, heads, m, d), rows = q.shape, k.shape[2] if indices is None else case.n
    dq, dk, dv = _rows_of(q), _rows_of(k, rows), _rows_of(v, rows)
    rule = configuration(d, q.element_size(), backward=True, architecture=architecture(q))
    shared = (heads, case.m, case.n, k.shape[2], scale * _LOG2_E, scale)
    strides = (*grad.stride(), *q.stride(), *k.stride(), *v.stride())
    delta = torch.empty_like(lse)

    def run_keys(blocks: Configuration) -> None:
        _keys_backward_kernel[(case.sequences * heads * -(-case.n // blocks["BLOCK_N"]),)](
            grad, q, k, v, lse, delta, dk, dv, case.indices, *case.offsets, *shared, *strides, *dk.stride()[:3],
            *case.strides, m, **blocks, **case.options,
        )  # fmt: skip

    def run_queries(blocks: Configuration) -> None:
        _queries_backward_kernel[(case.sequences * heads * -(-case.m // blocks["BLOCK_M"]),)](
            grad, q, k, v, lse, delta, dq, case.indices, *case.offsets, *shared, *strides, *dq.stride()[:3],
            *case.strides, m, **blocks, **case.options,
        )  # fmt: skip

    if m and b:
        with on_device(q):
            _delta_kernel[(b * heads * -(-m // 32),)](
                grad, o, delta, m, heads, *grad.stride(), *o.stride()[:3], D=d, WIDE=case.options["WIDE"], BLOCK_M=32,
                BLOCK_D=rule["BLOCK_D"], num_warps=4,
            )  # fmt: skip
    if case.sequences * case.n:
        launch("attention keys", q, case.kind, rule, _LIMITS, run_keys)
    if case.sequences * case.m:
        launch("attention queries", q, case.kind, rule, _LIMITS, run_queries)
    if indices is not None:
        dk, dv = (_placed(x, indices, k.shape[2]) for x in (dk, dv))
    return dq, dk, dv


def _placed(x: Tensor, indices: Tensor, n: int) -> Tensor:
    """Rows of x [B, H, S, d] at their indices among n, zeros elsewhere."""
    return place(x.transpose(1, 2).flatten(2), indices, n, None).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


# --- the operation ---------------------------------------------------------------------------------------------------


def _fake_kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _rows_of(q), torch.empty(q.shape[:3], dtype=wide, device=q.device)


def _fake_kernel_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _rows_of(q), _rows_of(k), _rows_of(v)


def _setup_kernel_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, *indices, ctx.max_q, ctx.max_k = inputs
    ctx.save_for_backward(q, k, v, *output, *indices)
    ctx.set_materialize_grads(False)


def _kernel_backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 9
    *tensors, indices, cu_q, cu_k = ctx.saved_tensors
    backward = ops.attention_kernel_backward
    return *backward(grad, *tensors, ctx.scale, indices, cu_q, cu_k, ctx.max_q, ctx.max_k), *(None,) * 6


_INDEXED = "float scale, Tensor? kv_indices, Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k"
register(
    f"attention_kernel(Tensor q, Tensor k, Tensor v, {_INDEXED}) -> (Tensor, Tensor)",
    _launch,
    fake=_fake_kernel,
    backward=_kernel_backward,
    setup_context=_setup_kernel_context,
    autocast=3,
)
register(
    f"attention_kernel_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_INDEXED})"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    fake=_fake_kernel_backward,
)


def _compiled(q: Tensor) -> bool:
    """Whether the extension attends from q, on a CPU, rather than PyTorch: this is where it is decided.

    Raises:
        ValueError: VMAE_KERNELS=csrc, and it cannot.
    """
    if q.dtype != torch.bfloat16 or not q.numel():  # the extension has no other
        return False
    return compiled("attention", _csrc.without_amx)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not _compiled(q):
        return reference.attention_cpu(q, k, v, scale)
    o, lse = _fake_kernel(q, k, v)
    _csrc.ops.attention(o, lse, *reference.whole_rows(q, k, v), scale)
    return o, lse


def _attention_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    if not _compiled(q):
        return reference.attention_cpu_backward(grad, q, k, v, o, lse, scale)
    grads = _fake_kernel_backward(grad, q, k, v)
    _csrc.ops.attention_backward(*grads, *reference.whole_rows(grad, q, k, v, o), lse.contiguous(), scale)
    return grads


def _setup_cpu_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _cpu_backward(ctx, grad: Tensor, _):
    return *ops.attention_cpu_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _fake_varlen(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[1], len(q), dtype=wide)


def _fake_varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_q, cu_k)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 8
    backward = ops.attention_varlen_reference_backward
    return *backward(grad, *ctx.saved_tensors, ctx.max_q, ctx.max_k, ctx.scale), None, None, None, None, None


# What computes attention on CUDA where Triton is there: its kernel, or PyTorch's scaled_dot_product_attention.
_ON_CUDA = {
    "dense": ("triton", "not yet measured; PyTorch's backward is not deterministic by default"),
    "indexed": ("triton", "not yet measured; PyTorch would need a gathered copy of keys and values"),
    "packed": ("triton", "not yet measured; PyTorch would need padding and a mask, or a call for each sequence"),
    "float64": ("torch", "the kernel's matrix instructions want less"),
}


def _is_for_torch(q: Tensor, kind: str) -> bool:
    return q.is_cuda and _ON_CUDA["float64" if q.dtype == torch.float64 else kind][0] == "torch"


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, kv_indices: Tensor | None) -> Tensor:
    if _is_for_torch(q, "dense" if kv_indices is None else "indexed"):
        return reference.attention(q, k, v, scale, kv_indices)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ops.attention_kernel(q, k, v, scale, kv_indices, None, None, 0, 0)[0]


def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None
) -> Tensor:
    if _is_for_torch(q, "packed"):
        return _varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = ops.attention_kernel(q, k, v, scale, None, cu_q, cu_k, max_q, max_k)[0]
    return o[0].transpose(0, 1)


def _varlen_reference(*args: Any) -> Tensor:
    return ops.attention_varlen_reference(*args)[0]


register_composite(
    "attention(Tensor q, Tensor k, Tensor v, float? scale, Tensor? kv_indices) -> Tensor",
    reference.attention,
    kernel=_attention,
)
# What `attention` is made of for bfloat16 on a CPU.
register(
    "attention_cpu(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _attention_cpu,
    fake=_fake_kernel,
    backward=_cpu_backward,
    setup_context=_setup_cpu_context,
    autocast=3,
)
register(
    "attention_cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_cpu_backward,
    fake=_fake_kernel_backward,
)
_HEADS = "Tensor q, Tensor k, Tensor v"
_PACKED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, float? scale"
register_composite(f"attention_varlen({_HEADS}, {_PACKED}) -> Tensor", _varlen_reference, kernel=_attention_varlen)
register(
    f"attention_varlen_reference({_HEADS}, {_PACKED}) -> (Tensor, Tensor)",
    reference.attention_varlen,
    fake=_fake_varlen,
    backward=_backward,
    setup_context=_setup_context,
    autocast=3,
)
register(
    f"attention_varlen_reference_backward(Tensor grad, {_HEADS}, Tensor o, Tensor lse, {_PACKED})"
    " -> (Tensor, Tensor, Tensor)",
    reference.attention_varlen_backward,
    fake=_fake_varlen_backward,
)


# For torch.utils.flop_counter, as it counts PyTorch's attention: two products forward, five backward. The lengths of
# packed sequences are data, so their bounds count.


def _products(n: int, q: list[int], k: list[int], kv_indices: list[int] | None = None, cu_q=None, max_k=0) -> int:
    keys = kv_indices[1] if kv_indices else max_k if cu_q else k[2]
    return 2 * n * math.prod(q) * keys


@register_flop_formula([ops.attention_cpu, ops.attention_kernel])
def _forward_flops(q, k, v, scale, kv_indices=None, cu_q=None, cu_k=None, max_q=0, max_k=0, **_) -> int:
    return _products(2, q, k, kv_indices, cu_q, max_k)


@register_flop_formula([ops.attention_cpu_backward, ops.attention_kernel_backward])
def _backward_flops(grad, q, k, v, o, lse, scale, kv_indices=None, cu_q=None, cu_k=None, max_q=0, max_k=0, **_) -> int:
    return _products(5, q, k, kv_indices, cu_q, max_k)


@register_flop_formula(ops.attention_varlen_reference)
def _varlen_flops(q, k, v, cu_q, cu_k, max_q, max_k, *_, **__) -> int:
    return _products(2, q, k, None, cu_q, max_k)


@register_flop_formula(ops.attention_varlen_reference_backward)
def _varlen_backward_flops(grad, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, *_, **__) -> int:
    return _products(5, q, k, None, cu_q, max_k)


def _check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype_in("q", q, FLOATS)
    count("d", q.shape[-1], 16, 128, "the size of a head")
    for name, x in (("k", k), ("v", v)):
        dtype_in(name, x, FLOATS)
        if not torch.is_autocast_enabled(q.device.type):
            same_dtype(name, x, "q", q)
        same_device(name, x, "q", q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, kv_indices: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v per head, as `torch.nn.functional.scaled_dot_product_attention` without a mask.

    Args:
        q: [B, H, M, d], float32, float16 or bfloat16 (float64 on CPU); d from 16 to 128.
        k, v: [B, H, N, d], the dtype of q.
        scale: multiplies the scores; 1 / sqrt(d) by default.
        kv_indices: [B, S], int32 or int64, distinct in each row: attend to these rows of k and v only. Rows not named
            get a zero gradient.

    Returns:
        [B, H, M, d] in q's dtype. Memory is O(M), and forward and backward are deterministic, but for what PyTorch's
        backends do on CUDA without Triton or in float64.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes do not match, d lies outside 16 to 128, there are no keys, or (on CPU) an index lies outside
            [0, N).

    Under autocast: casts as scaled_dot_product_attention does.

    Source: Dao, "FlashAttention-2" (ICLR 2024), for the memory bound.
    """
    b, h, _, d = sizes("q", q, "B H M d")
    _, _, n, _ = sizes("k", k, "B H N d", B=b, H=h, d=d)
    sizes("v", v, "B H N d", B=b, H=h, N=n, d=d)
    _check_values(q, k, v)
    if kv_indices is not None:
        _, n = sizes("kv_indices", kv_indices, "B S", B=b)
        dtype_in("kv_indices", kv_indices, INTEGERS)
        same_device("kv_indices", kv_indices, "q", q)
    count("keys per row", n, 1)
    return ops.attention(q, k, v, scale, kv_indices)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """`attention` on sequences of different lengths, packed one behind the other without padding.

    Args:
        q: [total_q, H, d], float32, float16 or bfloat16 (float64 on CPU); d from 16 to 128.
        k, v: [total_k, H, d], the dtype of q.
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32, where each sequence starts and the last one ends: 0, ascending,
            total.
        max_q, max_k: bounds on the lengths of the sequences, so that no length is read back from the device.
        scale: multiplies the scores; 1 / sqrt(d) by default.

    Returns:
        [total_q, H, d] in q's dtype. Queries of a sequence without keys give 0.

    Raises:
        TypeError: dtypes differ or are of a wrong kind.
        ValueError: shapes do not match, d lies outside 16 to 128, or (on CPU) the offsets do not ascend from 0 to the
            total, or a sequence is longer than its bound.

    Under autocast: casts as scaled_dot_product_attention does.
    """
    _, h, d = sizes("q", q, "total_q H d")
    total_k, _, _ = sizes("k", k, "total_k H d", H=h, d=d)
    sizes("v", v, "total_k H d", total_k=total_k, H=h, d=d)
    _check_values(q, k, v)
    (starts,) = sizes("cu_seqlens_q", cu_seqlens_q, "starts")
    sizes("cu_seqlens_k", cu_seqlens_k, "starts", starts=starts)
    count("length of cu_seqlens_q", starts, 1)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        dtype_in(name, x, (torch.int32,))
        same_device(name, x, "q", q)
    count("max_q", max_q, 0)
    count("max_k", max_k, 0)
    return ops.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale)
