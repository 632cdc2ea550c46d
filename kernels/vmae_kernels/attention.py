"""Memory-efficient attention: dense, through an index into keys and values, and on packed sequences."""

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, INTEGERS, count, dtype_in, same_device, same_dtype, sizes
from ._library import register, register_composite


def _fake_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    b, h, m, d = q.shape
    o = torch.empty(b, m, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    return o, torch.empty(b, h, m, dtype=torch.float32, device=q.device)


def _fake_cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved_and_scale) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_cpu_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _cpu_backward(ctx, grad: Tensor, _):
    return *torch.ops.vmae_kernels.attention_cpu_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _fake_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *lengths_and_scale) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *lengths_and_scale
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.max_q, ctx.max_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    backward = torch.ops.vmae_kernels.attention_varlen_backward
    return *backward(grad, *ctx.saved_tensors, ctx.max_q, ctx.max_k, ctx.scale), None, None, None, None, None


register_composite(
    "attention(Tensor q, Tensor k, Tensor v, float? scale, Tensor? kv_indices) -> Tensor", reference.attention
)
# What `attention` is made of for bfloat16 on a CPU.
register(
    "attention_cpu(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    reference.attention_cpu,
    fake=_fake_cpu,
    backward=_cpu_backward,
    setup_context=_setup_cpu_context,
    autocast=3,
)
register(
    "attention_cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference.attention_cpu_backward,
    fake=_fake_cpu_backward,
)
_PACKED = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, float? scale"
)
register(
    f"attention_varlen({_PACKED}) -> Tensor",
    reference.attention_varlen,
    fake=_fake_varlen,
    backward=_backward,
    setup_context=_setup_context,
    autocast=3,
)
register(
    f"attention_varlen_backward(Tensor grad, {_PACKED}) -> (Tensor, Tensor, Tensor)",
    reference.attention_varlen_backward,
    fake=_fake_varlen_backward,
)


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
        [B, H, M, d] in q's dtype. On a CPU memory is O(M) and forward and backward are deterministic; on CUDA both are
        those of the backend that PyTorch picks, until this operation has a kernel of its own.

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
    return torch.ops.vmae_kernels.attention(q, k, v, scale, kv_indices)


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
    return torch.ops.vmae_kernels.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale)
