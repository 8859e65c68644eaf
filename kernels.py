"""The operations that sparsity adds to a transformer, one public function each.

- `abstopk(x, k)`: keep the k entries of largest magnitude along the last axis (paper 2.1).
- `topk_mask(x, k)`: which entries those are; the optimizer's projection uses it too (paper A.2), on
  CPU as `topk_mask_numpy`, which costs less on a small tensor.
- `sink_attention(q, k, v, sink)`: causal attention with a learnable logit in the denominator (A.1).

AbsTopK keeps exactly k, ties to the lower index. Its work is to find the k-th magnitude: on CPU
numpy's vectorised quickselect does that many times as fast as torch.topk. Attention never builds
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
        # as an operator it is opaque to torch.compile, so the graph stays one; elsewhere that would only cost
        return (_topk_mask_op if torch.compiler.is_compiling() else _topk_mask_cpu)(x.detach(), k)
    mag = x.detach().abs()
    mag = mag.masked_fill(mag.isnan(), torch.inf)  # a NaN ranks first, so that it is not hidden
    return _break_ties(mag, mag.topk(k, sorted=False).values.amin(-1, keepdim=True), k)


def _break_ties(mag: Tensor, kth: Tensor, k: int) -> Tensor:
    above, at = mag > kth, mag == kth
    room = k - above.sum(-1, keepdim=True)
    return above | (at & (at.cumsum(-1) <= room))


def _topk_mask_cpu(x: Tensor, k: int) -> Tensor:
    n = x.shape[-1]
    if x.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16; the widening is exact
        x = x.float()
    rows, mask = x.reshape(-1, n).numpy(), torch.empty(x.shape, dtype=torch.bool)
    out = mask.view(-1, n).numpy()
    size = max(1, 2**16 // n)  # rows in a block: so few that it stays in the core's cache through all passes
    blocks = [slice(i, i + size) for i in range(0, len(rows), size)]

    def work(mine):
        for block in mine:
            out[block] = topk_mask_numpy(rows[block], k)

    if torch.get_num_threads() == 1 or len(blocks) == 1:
        work(blocks)
    else:  # numpy releases the GIL, so two threads run side by side
        other = _pool.submit(work, blocks[1::2])
        work(blocks[::2])
        other.result()
    return mask


_pool = ThreadPoolExecutor(1)


def topk_mask_numpy(x: np.ndarray, k: int) -> np.ndarray:
    """`topk_mask` of a numpy array, (rows, n) float32 or float64, in the calling thread."""
    n, mag = x.shape[1], np.abs(x)
    # magnitudes order as the integers of the same bits do, and numpy selects integers faster: no NaN to mind
    part = np.partition(mag.view(f"i{mag.itemsize}"), n - k).view(mag.dtype)
    kth = part[:, n - k : n - k + 1]
    mask = mag < kth
    np.logical_not(mask, out=mask)  # so that a NaN, which ranks first, is kept and seen
    if np.count_nonzero(mask) > k * len(mask):
        tied = np.flatnonzero(part[:, : n - k].max(1) == kth[:, 0])  # rows where the next one is as large
        mask[tied] = _break_ties(torch.from_numpy(mag[tied]), torch.from_numpy(kth[tied]), k)
    return mask


@torch.library.custom_op("circuits::topk_mask_cpu", mutates_args=())
def _topk_mask_op(x: Tensor, k: int) -> Tensor:
    return _topk_mask_cpu(x, k)


@_topk_mask_op.register_fake
def _(x, k):
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


class _Keep(torch.autograd.Function):
    """torch.where(mask, x, 0). It saves one byte an entry, neither input nor output."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return torch.where(mask, x, 0)

    @staticmethod
    def backward(ctx, grad):
        return _Keep.apply(grad, ctx.saved_tensors[0]), None


def abstopk(x: Tensor, k: int) -> Tensor:
    """x with all but the k largest magnitudes of the last axis set to zero (paper 2.1).

    Exactly k entries are kept, ties to the lower channel; the gradient flows through those alone.
    """
    return _Keep.apply(x, topk_mask(x, k))


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
