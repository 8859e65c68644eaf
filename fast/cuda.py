"""The operations of ops.py on CUDA, in Triton.

- `abstopk`: a row lies in one program's registers, where its k-th magnitude is bisected: one read,
  one write, and one of the mask.
- `keep_largest_`: the k-th magnitude of a whole matrix, eight bits at a time, by counting: six
  reads and no sort.

Magnitudes order as the integers of the same bits do; a NaN comes out above all of them. Nothing
here waits for the device. The tests run it by Triton's interpreter on a CPU, compile it for three
generations of GPUs and, where there is a GPU, run it there; speeds are in docs/speed.md.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # a row lies in one program's registers


# rows and k may be anything: a kernel made anew for each that is 1 or divides by 16 gains nothing
@triton.jit(do_not_specialize=["rows", "k"])
def _abstopk(x, y, mask, stride, rows, n, k,
             BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column < n)
    # one address a row and narrow offsets in it: wide ones for every entry would fill the registers
    source = x + row.to(tl.int64) * stride
    value = tl.load(source[:, None] + column, mask=inside, other=0.0)
    if BITS == 32:
        bits = value.to(tl.int32, bitcast=True)
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = tl.where(inside, bits & ((1 << (BITS - 1)) - 1), -1)
    kth = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(1, BITS):  # the k-th largest magnitude, from its highest bit down
        trial = kth | (1 << (BITS - 1 - i))
        reach = tl.sum((magnitude >= trial[:, None]).to(tl.int32), 1)
        kth = tl.where(reach >= k, trial, kth)
    above = magnitude > kth[:, None]
    at = magnitude == kth[:, None]
    # ties go to the lower channel, as far as there is room
    room = k - tl.sum(above.to(tl.int32), 1)
    kept = above | (at & (tl.cumsum(at.to(tl.int32), 1) <= room[:, None]))
    start = row.to(tl.int64) * n
    tl.store((y + start)[:, None] + column, tl.where(kept, value, 0.0), mask=inside)
    tl.store((mask + start)[:, None] + column, kept, mask=inside)


def shape_of(width: int) -> tuple[int, int]:
    """Rows and warps of a program, for rows of a width that is a power of 2.

    Four warps were the fastest at every width but the widest, which four cannot hold.
    """
    return max(1, 2048 // width), 16 if width == WIDEST else 4


def abstopk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(rows, n), without gaps inside a row, float32, bfloat16 or float16, n <= WIDEST -> what is
    kept, and the bool mask of it."""
    rows, n = x.shape
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    mask = torch.empty(rows, n, dtype=torch.bool, device=x.device)
    if not rows:
        return y, mask
    width = triton.next_power_of_2(n)
    together, warps = shape_of(width)
    programs = triton.cdiv(rows, together)
    with torch.cuda.device_of(x):
        _abstopk[(programs,)](
            x, y, mask, x.stride(0), rows, n, k,
            BITS=8 * x.element_size(), ROWS=together, WIDTH=width, num_warps=warps)
    return y, mask


@triton.jit
def _magnitude(w, protected, i, inside, PROTECTED: tl.constexpr):
    m = tl.load(w + i, mask=inside, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if PROTECTED:
        above_all = tl.load(protected + i, mask=inside, other=0) != 0
        m = tl.where(above_all, 0x7F800000, m)  # the bits of infinity
    return m


@triton.jit
def _count_digits(w, protected, n, state, counts,
                  SHIFT: tl.constexpr, PROTECTED: tl.constexpr, BLOCK: tl.constexpr):
    """counts[d] += the magnitudes that agree with the bits found so far and go on with d."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = _magnitude(w, protected, i, i < n, PROTECTED)
    same = (i < n) & (((m >> SHIFT) >> 8) == tl.load(state))
    digit = tl.where(same, (m >> SHIFT) & 255, 256)  # 256: does not count
    tl.atomic_add(counts + tl.arange(0, 512), tl.histogram(digit, 512))


@triton.jit
def _next_digit(state, counts):
    """state: the k-th magnitude's bits so far, and how many that agree with them are to be kept."""
    d = tl.arange(0, 256)
    k = tl.load(state + 1)
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
    m = _magnitude(w, protected, i, i < n, PROTECTED)
    kth = tl.load(state)
    room = tl.load(state + 1)
    at = ((i < n) & (m == kth)).to(tl.int32)
    rank = tl.load(ties + tl.program_id(0)) - tl.sum(at) + tl.cumsum(at, 0)
    tl.store(w + i, 0.0, mask=(i < n) & ((m < kth) | ((at != 0) & (rank > room))))


def keep_largest_(p: Tensor, k: int, protected: Tensor | None = None, block: int = 4096) -> None:
    """Zero all but the k largest magnitudes of `p` (float32, no gaps in memory), ties to the lower
    index; those where the bool mask `protected` holds rank as infinity."""
    n = p.numel()
    options = dict(PROTECTED=protected is not None, BLOCK=block)
    state = torch.zeros(2, dtype=torch.int32, device=p.device)
    state[1:].fill_(k)  # filled, not copied: a copy from the CPU would wait for the device
    blocks = triton.cdiv(n, block)
    counts = torch.zeros(512, dtype=torch.int32, device=p.device)
    ties = torch.empty(blocks, dtype=torch.int32, device=p.device)
    with torch.cuda.device_of(p):
        for shift in (24, 16, 8, 0):
            _count_digits[(blocks,)](p, protected, n, state, counts, SHIFT=shift, **options)
            _next_digit[(1,)](state, counts)
        _count_ties[(blocks,)](p, protected, n, state, ties, **options)
        ties = ties.cumsum(0, dtype=torch.int32)
        _zero_the_rest[(blocks,)](p, protected, n, state, ties, **options)
