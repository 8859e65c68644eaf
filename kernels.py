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
    mag = x.detach().abs()
    if x.device.type == "cpu":
        kth, tied = _kth_magnitude_cpu(mag, k)
        mask = mag >= kth
        rows = tied.nonzero(as_tuple=True)  # only rows where the k-th and (k+1)-th are equal
        if len(rows[0]):
            mask[rows] = _break_ties(mag[rows], kth[rows], k)
        return mask
    kth = mag.topk(k, sorted=False).values.amin(-1, keepdim=True)
    return _break_ties(mag, kth, k)


def _break_ties(mag: Tensor, kth: Tensor, k: int) -> Tensor:
    above, at = mag > kth, mag == kth
    room = k - above.sum(-1, keepdim=True)
    return above | (at & (at.cumsum(-1) <= room))


@torch.library.custom_op("circuits::kth_magnitude_cpu", mutates_args=())
def _kth_magnitude_cpu(mag: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest of each row (..., 1), and whether the (k+1)-th equals it (...)."""
    n = mag.shape[-1]
    if mag.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16; the widening is exact
        kth, tied = _kth_magnitude_cpu(mag.float(), k)
        return kth.to(mag.dtype), tied
    rows = mag.reshape(-1, n).numpy()
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else [rows]
    # one pivot only: numpy leaves its vectorised path for two. It releases the GIL, so halves run side by side
    parts = _pool.map(lambda r: np.partition(r, n - k, axis=-1), halves)
    part = torch.cat([torch.from_numpy(p) for p in parts]).view(*mag.shape[:-1], n)
    kth = part[..., n - k].clone()
    return kth.unsqueeze(-1), part[..., : n - k].amax(-1) == kth


_pool = ThreadPoolExecutor(2)


@_kth_magnitude_cpu.register_fake
def _(mag, k):
    return mag.new_empty(*mag.shape[:-1], 1), mag.new_empty(mag.shape[:-1], dtype=torch.bool)


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
    # logit, and whose value is zero. Causal SDPA then needs no mask and takes its flash path.
    B, H, T, D = q.shape
    slot = (sink.to(k.dtype) * D**0.5).view(1, H, 1, 1).expand(B, H, 1, 1)
    q = F.pad(q, (0, 1, 1, 0), value=1.0)  # (B, H, T+1, D+1)
    k = torch.cat([F.pad(slot, (D, 0)), F.pad(k, (0, 1))], dim=2)
    v = F.pad(v, (0, 0, 1, 0))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=D**-0.5)
    return out[:, :, 1:]
