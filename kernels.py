"""The operations that sparsity adds to a transformer, one public function each.

- `abstopk(x, k)`: keep the k entries of largest magnitude along the last axis (paper 2.1).
- `topk_mask(x, k)`: which entries those are.
- `keep_largest_(p, k, j, neuron_axis)`: the optimizer's projection of one tensor (A.2).
- `linear(x, weight, bias)`: F.linear that skips a sparse matrix's zeros, forward and for the input's gradient.
- `gated(x, gate, constant)`: a node that is open, or held at a constant (A.5).
- `sink_attention(q, k, v, sink)`: causal attention with a learnable logit in the denominator (A.1).

Each is a few lines of PyTorch that run anywhere. Where they can, kernels.c (CPU, float32, a C compiler) and kernels_triton.py
(CUDA) take over: the same entries are kept, ties included, products agree up to rounding, and it is several times as fast.
PLAIN_KERNELS=1 in the environment switches both off.
Attention never builds a T x T matrix: memory is linear in T, forward and backward.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

PLAIN = os.environ.get("PLAIN_KERNELS", "0") != "0"
FLAGS = ("-O3", "-shared", "-fPIC")  # of kernels.c
SPARSE = 0.2  # up to this density products by nonzeros took 0.6 of the time of dense ones or less (NOTES.md)


# --- AbsTopK --------------------------------------------------------------------------------------

def abstopk(x: Tensor, k: int) -> Tensor:
    """x with all but the k largest magnitudes of the last axis set to zero (paper 2.1).

    x: (..., n), any float dtype. Exactly k entries are kept, ties to the lower channel; the gradient flows through those
    alone. A NaN ranks first, so that it is not hidden. 1 <= k <= n, else ValueError.
    """
    return _AbsTopK.apply(x, _checked(k, x.shape[-1]))


def topk_mask(x: Tensor, k: int) -> Tensor:
    """Bool mask of what `abstopk` keeps."""
    return _kept(x.detach(), _checked(k, x.shape[-1]))[1]


def _checked(k: int, n: int) -> int:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, not {k}")
    return k


def _kept_plain(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(..., n) -> what is kept, and the mask of it."""
    # magnitudes order as the integers of the same bits do, and a NaN comes out above all of them
    mag = x.abs().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    kth = mag.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, at = mag > kth, mag == kth
    room = k - above.sum(-1, keepdim=True)
    mask = above | (at & (at.cumsum(-1) <= room))
    return torch.where(mask, x, 0), mask


def _kept(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # as an operator it is opaque to torch.compile, so that the graph stays one
    return (_kept_op if torch.compiler.is_compiling() else _kept_fast)(x, k)


def _kept_fast(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    half, n = x.dtype in (torch.bfloat16, torch.float16), x.shape[-1]
    if half or x.dtype == torch.float32:
        if x.is_cuda and (triton := _triton()) is not None and n <= triton.WIDEST:
            y, mask = triton.abstopk(_rows(x), k)
            return y.view(x.shape), mask.view(x.shape)
        if x.device.type == "cpu" and (c := _c()) is not None:
            rows, y, mask = _rows(x.float()), torch.empty(x.shape), torch.empty(x.shape, dtype=torch.bool)
            c.abstopk(rows.data_ptr(), rows.stride(0), y.data_ptr(), mask.data_ptr(), *rows.shape, k)
            return torch.where(mask, x, 0) if half else y, mask
    return _kept_plain(x, k)


@torch.library.custom_op("circuits::abstopk", mutates_args=())
def _kept_op(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return tuple(z.contiguous() for z in _kept_fast(x, k))  # as the next function promises


@_kept_op.register_fake
def _(x, k):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=torch.bool, device=x.device)


class _AbsTopK(torch.autograd.Function):
    """It saves one byte an entry, neither input nor output."""

    @staticmethod
    def forward(ctx, x, k):
        y, mask = _kept(x, k)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx, grad):
        return _Keep.apply(grad, ctx.saved_tensors[0]), None


class _Keep(torch.autograd.Function):
    """torch.where(mask, x, 0)."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        if (c := _c_for(x)) is None:
            return torch.where(mask, x, 0)
        rows, y = _rows(x), torch.empty(x.shape)
        c.keep(rows.data_ptr(), rows.stride(0), mask.data_ptr(), y.data_ptr(), *rows.shape)
        return y

    @staticmethod
    def backward(ctx, grad):
        return _Keep.apply(grad, ctx.saved_tensors[0]), None


# --- gates, for pruning ---------------------------------------------------------------------------

def gated(x: Tensor, gate: Tensor, constant: Tensor) -> Tensor:
    """gate * x + (1 - gate) * constant (paper A.5). x: (..., n); gate, a float or a bool, and constant: (n,)."""
    gate, constant = gate.to(x.dtype), constant.to(x.dtype)
    if gate.requires_grad and not constant.requires_grad and gate.shape == constant.shape == x.shape[-1:] and _c_for(x) is not None:
        return _Gated.apply(x, gate, constant)
    return torch.lerp(constant, x, gate)


class _Gated(torch.autograd.Function):
    """torch.lerp, whose backward pass takes one walk through memory instead of four."""

    @staticmethod
    def forward(ctx, x, gate, constant):
        ctx.save_for_backward(x, gate, constant)
        return torch.lerp(constant, x, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gate, constant = (z.contiguous() for z in ctx.saved_tensors)
        grad, n, parts = grad.contiguous(), x.shape[-1], torch.get_num_threads()
        dx, dgate = torch.empty(x.shape), torch.empty(parts, n)
        _c().gate_grads(*(z.data_ptr() for z in (grad, x, gate, constant, dx, dgate)), parts, x.numel() // n, n)
        return dx, dgate.sum(0), None


# --- the optimizer's projection -------------------------------------------------------------------

@torch.no_grad()
def keep_largest_(p: Tensor, k: int, j: int = 0, neuron_axis: int | None = None) -> None:
    """Zero all but the k largest magnitudes of `p`, in place; a neuron's j largest, where not zero, stay in any case (paper A.2).

    Exactly k stay, ties to the lower index, where `p` has as many nonzeros. neuron_axis: of a matrix, with j > 0. Does not
    wait for a CUDA device. ValueError where k or j is no such number.
    """
    _checked(k, p.numel())
    if j:
        _checked(j, p.shape[1 - neuron_axis])
    if (c := _c_for(p)) is not None and p.is_contiguous():
        neurons, n = (p.numel(), 1) if j == 0 else (p.shape[neuron_axis], p.shape[1 - neuron_axis])
        apart, step = (1, 1) if j == 0 else (n, 1) if neuron_axis == 0 else (1, neurons)
        parts = torch.get_num_threads() if p.numel() > 2**15 else 1
        mag, mask, columns = torch.empty(p.numel()), torch.empty(p.numel(), dtype=torch.bool), torch.empty(parts * 16 * (n + 16))
        c.project(*(t.data_ptr() for t in (p, mag, mask, columns)), parts, neurons, n, apart, step, j, k)
        return torch.autograd.graph.increment_version(p)  # what autograd and `linear` go by
    protected = None
    if j > 0:
        mag = p.abs()
        by_neuron = mag if neuron_axis == 0 else mag.t().contiguous()
        protected = topk_mask(by_neuron, j) & (by_neuron > 0)  # a protected zero would waste budget
        protected = protected if neuron_axis == 0 else protected.t().contiguous()
    if p.is_cuda and p.dtype == torch.float32 and p.is_contiguous() and (triton := _triton()) is not None:
        triton.keep_largest_(p, k, protected)
        return torch.autograd.graph.increment_version(p)
    mag = p.abs() if protected is None else mag.masked_fill(protected, torch.inf)
    p.masked_fill_(~topk_mask(mag.flatten(), k).view_as(p), 0)


# --- products with a sparse matrix ----------------------------------------------------------------

class Nonzeros(NamedTuple):
    """The nonzeros of a matrix, row by row: row r's are entries start[r] to start[r + 1]."""
    start: Tensor   # (rows + 1,) int64
    column: Tensor  # (nonzeros,) int32
    value: Tensor   # (nonzeros,) float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, known: dict | None = None) -> Tensor:
    """F.linear(x, weight, bias), by the nonzeros of `weight` alone where they are at most SPARSE of it. CPU, float32.

    x: (..., n), weight: (rows, n), bias: (rows,) -> (..., rows). The weight's own gradient is dense. `known`, a dict
    that the caller keeps, spares a frozen weight's nonzeros from being looked for again (it sees no change through `.data`).
    Differentiable once. A zero times infinity or NaN is zero here.
    """
    frozen = not (weight.requires_grad or weight.is_inference())
    c = _c_for(x) if weight.dtype == torch.float32 and weight.is_contiguous() and not torch.is_autocast_enabled("cpu") else None
    if c is None or not frozen and x.numel() < 64 * weight.shape[1]:  # few tokens do not pay for the search
        return F.linear(x, weight, bias)
    known = {} if known is None else known
    key = (weight.data_ptr(), weight._version) if frozen else None
    if key is None or key not in known:
        known.clear()
        known[key] = weight.detach(), _nonzeros(c, weight)  # the weight itself, too: so long nothing else can have its address
    nonzeros = known[key][1]
    return F.linear(x, weight, bias) if nonzeros is None else _SparseLinear.apply(x, weight, bias, nonzeros)


def _nonzeros(c, weight: Tensor) -> Nonzeros | None:
    """None where there are more of them than SPARSE of the matrix."""
    start = torch.empty(len(weight) + 1, dtype=torch.int64)
    c.count_nonzeros(weight.data_ptr(), start.data_ptr(), *weight.shape)
    n = int(start[-1])
    if n > SPARSE * weight.numel():
        return None
    found = Nonzeros(start, torch.empty(n, dtype=torch.int32), torch.empty(n))
    c.take_nonzeros(weight.data_ptr(), *(t.data_ptr() for t in found), *weight.shape)
    return found


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, nonzeros):
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.nonzeros, ctx.shape, (rows, n) = nonzeros, weight.shape, weight.shape
        x, y = x.contiguous(), torch.empty(*x.shape[:-1], rows)
        bias = torch.zeros(rows) if bias is None else bias.contiguous()
        _by_tiles(_c().sparse_linear, x.numel() // n, weight.shape, x, *nonzeros, bias, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,), (rows, n), (needs_x, needs_weight, needs_bias, _) = ctx.saved_tensors, ctx.shape, ctx.needs_input_grad
        grad, flat, dx = grad.contiguous(), grad.reshape(-1, rows), None
        if needs_x:
            dx = torch.empty(*grad.shape[:-1], n)
            _by_tiles(_c().sparse_linear_input_grad, len(flat), ctx.shape, grad, *ctx.nonzeros, dx)
        return dx, flat.t() @ x.reshape(-1, n) if needs_weight else None, flat.sum(0) if needs_bias else None, None


def _by_tiles(f, tokens: int, shape: tuple[int, int], *tensors: Tensor) -> None:
    parts = torch.get_num_threads()
    scratch = torch.empty(parts * shape[1] * 32)
    f(*(t.data_ptr() for t in tensors), scratch.data_ptr(), parts, tokens, *shape)


# --- attention with a sink ---------------------------------------------------------------------

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


# --- kernels.c and kernels_triton.py ---------------------------------------------------------------

@functools.cache
def _triton():
    """kernels_triton.py; None where it is switched off or there is no Triton, as on Windows."""
    if PLAIN:
        return None
    try:
        import kernels_triton
        return kernels_triton
    except ImportError:
        return None


def _c_for(x: Tensor):
    """kernels.c for float32 on a CPU and outside torch.compile, else None."""
    return _c() if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling() else None


def _rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n) without gaps inside a row: a view where that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def _c():
    """kernels.c, compiled on first use and kept in __pycache__; None where it is switched off or cannot be had."""
    if PLAIN:
        return None
    source = Path(__file__).with_suffix(".c")
    try:
        lib = ctypes.CDLL(str(_compile(source)))
    except OSError as e:
        print(f"note: {source.name} is not used ({e}); AbsTopK and sparse products will be several times slower", file=sys.stderr)
        return None
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64}
    for name, arguments in dict(abstopk="pnppnnn", keep="pnppnn", gate_grads="ppppppnnn", project="ppppnnnnnnn",
                                count_nonzeros="ppnn", take_nonzeros="ppppnn",
                                sparse_linear="pppppppnnnn", sparse_linear_input_grad="ppppppnnnn").items():
        f = getattr(lib, name)
        f.argtypes, f.restype = [kinds[a] for a in arguments], None
    return lib


def _compile(source: Path) -> Path:
    """The shared library of `source` for this very machine. OSError where there is no compiler, or it fails."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise OSError("no C compiler; install gcc or clang, or name one in CC")
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if sys.platform == "linux" else ""
    cpu = "".join(line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features")))
    key = hashlib.sha256(repr((source.read_text(), compiler, FLAGS, platform.platform(), cpu)).encode()).hexdigest()[:16]
    folder = source.parent / "__pycache__"
    if not os.access(folder if folder.exists() else source.parent, os.W_OK):
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nano-sparse-circuits"
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{library.name}.{os.getpid()}"  # renamed when done: another process may be at it, too
        for more in (["-march=native", "-fopenmp"], ["-march=native"], []):
            done = subprocess.run([*compiler, *FLAGS, *more, str(source), "-lm", "-o", str(fresh)], capture_output=True, text=True)
            if done.returncode == 0:
                if "-fopenmp" not in more:  # as with Apple's clang
                    print(f"note: {compiler[0]} has no OpenMP, so {source.name} will use one thread", file=sys.stderr)
                for old in folder.glob(f"{source.stem}-*.so"):
                    old.unlink(missing_ok=True)
                os.replace(fresh, library)
                return library
        said = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
        raise OSError(f"{' '.join(compiler)} fails: {said[0]}")
    return library
