"""kernels.py on CUDA, in Triton: AbsTopK in one read and one write of its tensor.

Run by Triton's interpreter on a CPU in the tests (TRITON_INTERPRET=1); not yet timed on a GPU by us.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # a row lies in one program's registers


@triton.jit
def _abstopk(x, y, mask, stride, rows, n, k, BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column < n)
    value = tl.load(x + row[:, None].to(tl.int64) * stride + column, mask=inside, other=0.0)
    # magnitudes order as the integers of the same bits do; a NaN comes out above all of them
    bits = value.to(tl.int32, bitcast=True) if BITS == 32 else value.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = tl.where(inside, bits & ((1 << (BITS - 1)) - 1), -1)
    kth = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(1, BITS):  # the k-th largest magnitude, from its highest bit down
        trial = kth | (1 << (BITS - 1 - i))
        kth = tl.where(tl.sum((magnitude >= trial[:, None]).to(tl.int32), 1) >= k, trial, kth)
    above, at = magnitude > kth[:, None], magnitude == kth[:, None]
    room = k - tl.sum(above.to(tl.int32), 1)
    kept = above | (at & (tl.cumsum(at.to(tl.int32), 1) <= room[:, None]))
    to = row[:, None].to(tl.int64) * n + column
    tl.store(y + to, tl.where(kept, value, 0.0), mask=inside)
    tl.store(mask + to, kept, mask=inside)


def abstopk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(rows, n), rows without gaps inside, float32, bfloat16 or float16 -> what is kept, and the bool mask; n <= WIDEST."""
    rows, n = x.shape
    y, mask = torch.empty(rows, n, dtype=x.dtype, device=x.device), torch.empty(rows, n, dtype=torch.bool, device=x.device)
    width = triton.next_power_of_2(n)
    together = max(1, 2048 // width)  # rows of a program
    if rows:
        _abstopk[(triton.cdiv(rows, together),)](x, y, mask, x.stride(0), rows, n, k, BITS=8 * x.element_size(), ROWS=together,
                                                 WIDTH=width, num_warps=min(16, max(4, width // 512)))
    return y, mask
