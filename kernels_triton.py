"""kernels.py on CUDA, in Triton. Magnitudes order as the integers of the same bits do; a NaN comes out above all of them.

- `abstopk`: a row lies in one program's registers, where its k-th magnitude is bisected: one read, one write, and one of the mask.
- `keep_largest_`: the k-th magnitude of a whole matrix, eight bits at a time, by counting: six reads and no sort.

Nothing here waits for the device. The tests run it by Triton's interpreter on a CPU; we have not yet run it on a GPU.
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
    if not rows:
        return y, mask
    width = triton.next_power_of_2(n)
    together = max(1, 2048 // width)  # rows of a program
    with torch.cuda.device_of(x):
        _abstopk[(triton.cdiv(rows, together),)](x, y, mask, x.stride(0), rows, n, k, BITS=8 * x.element_size(), ROWS=together,
                                                 WIDTH=width, num_warps=min(16, max(4, width // 512)))
    return y, mask


@triton.jit
def _magnitude(w, protected, i, inside, PROTECTED: tl.constexpr):
    m = tl.load(w + i, mask=inside, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if PROTECTED:
        m = tl.where(tl.load(protected + i, mask=inside, other=0) != 0, 0x7F800000, m)  # as infinity
    return m


@triton.jit
def _count_digits(w, protected, n, state, counts, SHIFT: tl.constexpr, PROTECTED: tl.constexpr, BLOCK: tl.constexpr):
    """counts[d] += the magnitudes that agree with the bits found so far and have d as their next eight."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = _magnitude(w, protected, i, i < n, PROTECTED)
    same = (i < n) & (((m >> SHIFT) >> 8) == tl.load(state))
    tl.atomic_add(counts + tl.arange(0, 512), tl.histogram(tl.where(same, (m >> SHIFT) & 255, 256), 512))


@triton.jit
def _next_digit(state, counts):
    """state: the k-th magnitude's bits so far, and how many of those that agree with them are still to be kept."""
    d, k = tl.arange(0, 256), tl.load(state + 1)
    count = tl.load(counts + d)
    at_least = tl.sum(count) - tl.cumsum(count, 0) + count
    digit = tl.sum((at_least >= k).to(tl.int32)) - 1
    tl.store(state, (tl.load(state) << 8) | digit)
    tl.store(state + 1, k - tl.sum(tl.where(d > digit, count, 0)))
    tl.store(counts + d, tl.zeros_like(count))
    tl.store(counts + 256 + d, tl.zeros_like(count))


@triton.jit
def _count_ties(w, protected, n, state, ties, PROTECTED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = _magnitude(w, protected, i, i < n, PROTECTED)
    tl.store(ties + tl.program_id(0), tl.sum(((i < n) & (m == tl.load(state))).to(tl.int32)))


@triton.jit
def _zero_the_rest(w, protected, n, state, ties, PROTECTED: tl.constexpr, BLOCK: tl.constexpr):
    """ties: the sums of `_count_ties` up to and with each block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m, kth, room = _magnitude(w, protected, i, i < n, PROTECTED), tl.load(state), tl.load(state + 1)
    at = ((i < n) & (m == kth)).to(tl.int32)
    rank = tl.load(ties + tl.program_id(0)) - tl.sum(at) + tl.cumsum(at, 0)
    tl.store(w + i, 0.0, mask=(i < n) & ((m < kth) | ((at != 0) & (rank > room))))


def keep_largest_(p: Tensor, k: int, protected: Tensor | None = None, block: int = 4096) -> None:
    """Zero all but the k largest magnitudes of `p` (float32, no gaps in memory), ties to the lower index; those where the
    bool mask `protected` holds rank as infinity."""
    n, options = p.numel(), dict(PROTECTED=protected is not None, BLOCK=block)
    state = torch.zeros(2, dtype=torch.int32, device=p.device)
    state[1:].fill_(k)
    blocks, counts = triton.cdiv(n, block), torch.zeros(512, dtype=torch.int32, device=p.device)
    ties = torch.empty(blocks, dtype=torch.int32, device=p.device)
    with torch.cuda.device_of(p):
        for shift in (24, 16, 8, 0):
            _count_digits[(blocks,)](p, protected, n, state, counts, SHIFT=shift, **options)
            _next_digit[(1,)](state, counts)
        _count_ties[(blocks,)](p, protected, n, state, ties, **options)
        _zero_the_rest[(blocks,)](p, protected, n, state, ties.cumsum(0, dtype=torch.int32), **options)
