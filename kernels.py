"""The operations that sparsity adds to a transformer, one public function each.

- `abstopk(x, k)`: keep the k entries of largest magnitude along the last axis (paper 2.1).
- `topk_mask(x, k)`: which entries those are; the optimizer's projection uses it too (paper A.2).
- `sink_attention(q, k, v, sink)`: causal attention with a learnable logit in the denominator (A.1).

AbsTopK keeps exactly k, ties to the lower index. Its work is to find the k-th magnitude: on CPU
numpy's vectorised quickselect does that three times as fast as torch.topk. Attention never builds
a T x T matrix: memory is linear in T, forward and backward.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def topk_mask(x: Tensor, k: int) -> Tensor:
    """Bool mask of the k largest |x| along the last axis; exactly k, ties to the lower index.

    x: (..., n), any float dtype, no NaN. 1 <= k <= n, else ValueError.
    """
    n = x.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, not {k}")
    if k == n:
        return torch.ones_like(x, dtype=torch.bool)
    if x.device.type == "cpu":
        return _topk_mask_cpu(x.detach(), k)
    mag = x.detach().abs()
    mag = mag.masked_fill(mag.isnan(), torch.inf)  # a NaN ranks first, so that it is not hidden
    return _break_ties(mag, mag.topk(k, sorted=False).values.amin(-1, keepdim=True), k)


def _break_ties(mag: Tensor, kth: Tensor, k: int) -> Tensor:
    above, at = mag > kth, mag == kth
    room = k - above.sum(-1, keepdim=True)
    return above | (at & (at.cumsum(-1) <= room))


@torch.library.custom_op("circuits::topk_mask_cpu", mutates_args=())  # opaque to torch.compile: one graph
def _topk_mask_cpu(x: Tensor, k: int) -> Tensor:
    n = x.shape[-1]
    mag = x.abs().reshape(-1, n)
    if mag.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16; the widening is exact
        mag = mag.float()
    # one pivot only: numpy leaves its vectorised path for two. It releases the GIL, so halves run side by side
    halves = torch.tensor_split(mag, max(1, min(2, len(mag))))
    parts = _pool.map(lambda rows: np.partition(rows.numpy(), n - k, axis=-1), halves)
    part = torch.cat([torch.from_numpy(p) for p in parts])
    kth = part[:, n - k : n - k + 1]
    mask = (mag < kth).logical_not_()  # so that a NaN, which numpy ranks first, is kept and seen
    tied = (part[:, : n - k].amax(-1) == kth[:, 0]).nonzero()[:, 0]  # rows where the next one is as large
    if len(tied):
        mask[tied] = _break_ties(mag[tied], kth[tied], k)
    return mask.view(x.shape)


_pool = ThreadPoolExecutor(2)


@_topk_mask_cpu.register_fake
def _(x, k):
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k):
        mask = topk_mask(x, k)
        ctx.save_for_backward(mask)  # one byte an entry; neither input nor output is kept
        return torch.where(mask, x, 0)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0], grad, 0), None


def abstopk(x: Tensor, k: int) -> Tensor:
    """x with all but the k largest magnitudes of the last axis set to zero (paper 2.1).

    Exactly k entries are kept, ties to the lower channel; the gradient flows through those alone.
    """
    return _AbsTopK.apply(x, k)


class _SinkAttentionCPU(torch.autograd.Function):
    """Flash attention whose log-sum-exp is widened by the sink, forward and backward.

    With P = exp(s - logaddexp(lse, sink)) the usual flash backward holds as it is: it recomputes
    P from the log-sum-exp that it is handed, and rowsum(dO * O) with the output that it is handed.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        total = torch.logaddexp(lse, sink.float().view(1, -1, 1))  # (B, H, T)
        out = out * (lse - total).exp().unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(q, k, v, sink, out, total)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sink, out, total = ctx.saved_tensors
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, total, 0.0, True)
        p_sink = (sink.float().view(1, -1, 1) - total).exp()
        return dq, dk, dv, -(p_sink * (grad * out).sum(-1)).sum((0, 2)).to(sink.dtype)


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Causal attention, scale 1/sqrt(d_head), with exp(sink) added to the denominator (paper A.1).

    q, k, v: (B, H, T, d_head); sink: (H,) -> (B, H, T, d_head).
    """
    if q.device.type == "cpu" and dropout_p == 0:
        return _SinkAttentionCPU.apply(q, k, v, sink.to(q.dtype))
    # Elsewhere: a dummy position 0 whose key meets an extra query channel (constant 1) with the sink
    # logit, and whose value is zero. Causal SDPA then needs no mask and takes its flash path, given
    # equal widths that are a multiple of 8.
    B, H, T, D = q.shape
    spare = 7 - D % 8  # channels of padding after the extra one
    slot = (sink.to(k.dtype) * D**0.5).view(1, H, 1, 1).expand(B, H, 1, 1)
    q = F.pad(F.pad(q, (0, 1, 1, 0), value=1.0), (0, spare))  # (B, H, T+1, D+1+spare)
    k = F.pad(torch.cat([F.pad(slot, (D, 0)), F.pad(k, (0, 1))], dim=2), (0, spare))
    v = F.pad(v, (0, 1 + spare, 1, 0))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=D**-0.5)
    return out[:, :, 1:, :D]
