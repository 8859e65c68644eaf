"""The operations of ops.py, several times as fast: cpu.c on a CPU (float32, a C compiler), cuda.py
on CUDA (Triton), and flash attention with a sink on a CPU.

Each function here has the name of one in ops.py, where it is explained, and decides by device,
dtype and layout whether it can help; if not, it answers None (`keep_largest_`: False) and has done
nothing. Nothing here is needed for a correct result: the folder can go.
PLAIN_KERNELS=1 in the environment switches off all that is compiled here, cpu.c and cuda.py.
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
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

PLAIN = os.environ.get("PLAIN_KERNELS", "0") != "0"

# Up to this density products by nonzeros took 0.6 of the time of dense ones or less, forward and
# for the input's gradient together (docs/notes.md).
SPARSE = 0.2
# A weight that learns is searched for its nonzeros anew each time, which fewer tokens do not pay.
TOKENS_FOR_A_SEARCH = 64
TILE = 32  # tokens: TOKENS in cpu.c
NEURONS = 16  # that `project` in cpu.c gathers at a time, 16 entries apart from one another
ALONE = 2**15  # entries that one thread projects sooner than it could wake others
LANES = 8  # queries at a time of cpu.c's attention, and channels
WIDEST_HEAD = 64  # of a wider head, PyTorch's matrix products are as fast

# The arguments of cpu.c's functions: p a pointer, n an int64, f a double.
SIGNATURES = {
    "abstopk": "pnppnnn",
    "keep": "pnppnn",
    "gate_grads": "ppppppnnn",
    "project": "ppppnnnnnnn",
    "count_nonzeros": "ppnn",
    "take_nonzeros": "ppppnn",
    "sparse_linear": "pppppppnnnn",
    "sparse_linear_input_grad": "ppppppnnnn",
    "rms_norm": "ppppfnn",
    "rms_norm_grads": "ppppppnnn",
    "attention": "ppppppnnnnnn",
    "attention_grads": "ppppppppppnnnnnn",
}
KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_double}
FLAGS = ["-O3", "-shared", "-fPIC"]
# Tried in turn until a compiler takes them: Apple's clang has no OpenMP, others no `native`.
EXTRA_FLAGS = [["-march=native", "-fopenmp"], ["-march=native"], []]


# --- AbsTopK -------------------------------------------------------------------------------------

def abstopk(x: Tensor, k: int, masked: bool = True) -> tuple[Tensor, Tensor | None] | None:
    """What is kept of x (..., n), and the mask of it; without `masked`, perhaps None in its place.
    float32, bfloat16 and float16."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if x.is_cuda:
        cuda = _cuda()
        if cuda is None or x.shape[-1] > cuda.WIDEST:
            return None
        y, mask = cuda.abstopk(_rows(x), k)
        return y.view(x.shape), mask.view(x.shape)
    if x.device.type != "cpu" or _cpu() is None:
        return None

    rows = _rows(x.float())
    y = rows.new_empty(x.shape)
    mask = None
    if masked or x.dtype != torch.float32:
        mask = torch.empty_like(y, dtype=torch.bool)
    to = y.data_ptr(), None if mask is None else mask.data_ptr()
    _cpu().abstopk(rows.data_ptr(), rows.stride(0), *to, *rows.shape, k)
    if x.dtype != torch.float32:
        y = torch.where(mask, x, 0)
    return y, mask


def keep(x: Tensor, mask: Tensor) -> Tensor | None:
    """torch.where(mask, x, 0). mask: of x's shape, without gaps in memory."""
    c = _cpu_for(x)
    if c is None:
        return None
    rows = _rows(x)
    y = x.new_empty(x.shape)
    c.keep(rows.data_ptr(), rows.stride(0), *_pointers(mask, y), *rows.shape)
    return y


# --- the optimizer's projection ------------------------------------------------------------------

def keep_largest_(p: Tensor, k: int, j: int, neuron_axis: int | None) -> bool:
    """True where it is done."""
    if not p.is_contiguous():
        return False
    if p.is_cuda:
        done = _keep_largest_cuda_(p, k, j, neuron_axis)
    else:
        done = _keep_largest_cpu_(p, k, j, neuron_axis)
    if done:
        # `p` was written behind autograd's back; this count is what it and `linear` go by
        torch.autograd.graph.increment_version(p)
    return done


def _keep_largest_cpu_(p: Tensor, k: int, j: int, neuron_axis: int | None) -> bool:
    c = _cpu_for(p)
    if c is None:
        return False
    # neurons, weights of each; how far apart the neurons lie in memory, and each one's weights
    if j == 0:
        layout = p.numel(), 1, 1, 1  # none has anything to protect
    elif neuron_axis == 0:
        layout = p.shape[0], p.shape[1], p.shape[1], 1
    else:
        layout = p.shape[1], p.shape[0], 1, p.shape[1]

    parts = torch.get_num_threads() if p.numel() > ALONE else 1
    magnitude = p.new_empty(p.numel())
    mask = torch.empty_like(magnitude, dtype=torch.bool)
    columns = p.new_empty(parts * NEURONS * (layout[1] + 16))
    c.project(*_pointers(p, magnitude, mask, columns), parts, *layout, j, k)
    return True


def _keep_largest_cuda_(p: Tensor, k: int, j: int, neuron_axis: int | None) -> bool:
    cuda = _cuda() if p.dtype == torch.float32 else None
    if cuda is None:
        return False
    protected = None
    if j > 0:
        magnitude = p.abs()
        by_neuron = magnitude if neuron_axis == 0 else magnitude.t().contiguous()
        if by_neuron.shape[1] > cuda.WIDEST:
            return False
        protected = cuda.abstopk(by_neuron, j)[1] & (by_neuron > 0)
        if neuron_axis == 1:
            protected = protected.t().contiguous()
    cuda.keep_largest_(p, k, protected)
    return True


# --- gates, for pruning --------------------------------------------------------------------------

def gated(x: Tensor, gate: Tensor, constant: Tensor) -> Tensor | None:
    """Only for a gate that learns and a constant that does not: as pruning has them."""
    if not gate.requires_grad or constant.requires_grad:
        return None
    if not gate.shape == constant.shape == x.shape[-1:] or _cpu_for(x) is None:
        return None
    return _Gated.apply(x, gate, constant)


class _Gated(torch.autograd.Function):
    """torch.lerp, whose backward pass takes one walk through memory instead of four."""

    @staticmethod
    def forward(ctx, x, gate, constant):
        ctx.save_for_backward(x, gate, constant)
        return torch.lerp(constant, x, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gate, constant = [z.contiguous() for z in ctx.saved_tensors]
        grad = grad.contiguous()
        n = x.shape[-1]
        parts = torch.get_num_threads()
        dx = x.new_empty(x.shape)
        dgate = x.new_empty(parts, n)  # each thread sums its own rows
        pointers = _pointers(grad, x, gate, constant, dx, dgate)
        _cpu().gate_grads(*pointers, parts, x.numel() // n, n)
        return dx, dgate.sum(0), None


# --- products with a sparse matrix ---------------------------------------------------------------

class Nonzeros(NamedTuple):
    """The nonzeros of a matrix, row by row: row r's are entries start[r] to start[r + 1]."""
    start: Tensor   # (rows + 1,) int64
    column: Tensor  # (nonzeros,) int32
    value: Tensor   # (nonzeros,) float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, known: dict | None) -> Tensor | None:
    """By the nonzeros of `weight` alone, where they are at most SPARSE of it."""
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    if torch.is_autocast_enabled("cpu") or _cpu_for(x) is None:
        return None
    if x.shape[-1] != weight.shape[1]:
        return None  # F.linear says what is wrong

    known = {} if known is None else known
    if weight.requires_grad or weight.is_inference():
        # A fused optimizer changes it and leaves `_version` as it was: what is known is worthless.
        known.clear()
        if x.numel() < TOKENS_FOR_A_SEARCH * weight.shape[1]:
            return None
        nonzeros = _nonzeros(weight)
    else:
        key = weight.data_ptr(), weight._version
        if key not in known:
            known.clear()
            # the weight itself, too: as long as it is held nothing else can have its address
            known[key] = weight.detach(), _nonzeros(weight)
        nonzeros = known[key][1]
    return None if nonzeros is None else _SparseLinear.apply(x, weight, bias, nonzeros)


def _nonzeros(weight: Tensor) -> Nonzeros | None:
    """None where there are more of them than SPARSE of the matrix."""
    start = torch.empty(len(weight) + 1, dtype=torch.int64, device="cpu")
    _cpu().count_nonzeros(*_pointers(weight, start), *weight.shape)
    n = int(start[-1])
    if n > SPARSE * weight.numel():
        return None
    value = weight.new_empty(n)
    found = Nonzeros(start, torch.empty_like(value, dtype=torch.int32), value)
    _cpu().take_nonzeros(*_pointers(weight, *found), *weight.shape)
    return found


class _SparseLinear(torch.autograd.Function):
    """Forward and the input's gradient by nonzeros; the weight's own gradient is dense."""

    @staticmethod
    def forward(ctx, x, weight, bias, nonzeros):
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.nonzeros = nonzeros
        ctx.shape = weight.shape
        rows, n = weight.shape
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        bias = x.new_zeros(rows) if bias is None else bias.contiguous()
        _by_tiles(_cpu().sparse_linear, x.numel() // n, weight.shape, x, *nonzeros, bias, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        rows, n = ctx.shape
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        flat = grad.reshape(-1, rows)
        dx = None
        if needs_x:
            dx = grad.new_empty(*grad.shape[:-1], n)
            by_nonzeros = _cpu().sparse_linear_input_grad
            _by_tiles(by_nonzeros, len(flat), ctx.shape, grad, *ctx.nonzeros, dx)
        dweight = flat.t() @ x.reshape(-1, n) if needs_weight else None
        dbias = flat.sum(0) if needs_bias else None
        return dx, dweight, dbias, None


def _by_tiles(f, tokens: int, shape: tuple[int, int], *tensors: Tensor) -> None:
    """Calls cpu.c's `f`, whose threads take TILE tokens at a time, each in its own scratch."""
    parts = torch.get_num_threads()
    scratch = tensors[0].new_empty(parts * shape[1] * TILE)
    f(*_pointers(*tensors, scratch), parts, tokens, *shape)


# --- RMSNorm -------------------------------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """In one walk through memory instead of five."""
    if x.shape[-1:] != weight.shape or weight.dtype != x.dtype or _cpu_for(x) is None:
        return None
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number for each of its rows."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        weight = weight.contiguous()
        n = x.shape[-1]
        y = x.new_empty(x.shape)
        scale = x.new_empty(x.numel() // n)
        _cpu().rms_norm(*_pointers(x, weight, y, scale), eps, len(scale), n)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()  # under a name, so that it lives as long as its pointer
        n = x.shape[-1]
        parts = torch.get_num_threads()
        dx = x.new_empty(x.shape)
        dweight = x.new_empty(parts, n)  # each thread sums its own rows
        pointers = _pointers(grad, x, weight, scale, dx, dweight)
        _cpu().rms_norm_grads(*pointers, parts, len(scale), n)
        return dx, dweight.sum(0), None


# --- attention with a sink -----------------------------------------------------------------------

def sink_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor | None:
    """On a CPU: narrow heads by cpu.c; others, where there is a sink, by PyTorch's own kernel, for
    which no compiler is needed, without the detour of ops.py."""
    if q.device.type != "cpu":
        return None
    same = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    narrow = q.shape[-1] % LANES == 0 and q.shape[-1] <= WIDEST_HEAD
    if same and narrow and _cpu_for(q) is not None:
        if sink is None:
            sink = q.new_full(q.shape[1:2], -torch.inf)
        return _NarrowAttention.apply(q, k, v, sink.to(q.dtype))
    return None if sink is None else _SinkAttention.apply(q, k, v, sink.to(q.dtype))


class _NarrowAttention(torch.autograd.Function):
    """One head after the other, keys and values of which fit into a core's cache. Saves its inputs
    alone, and computes the attention again for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, sink):
        # (B, T, H, D), as the model's products leave them: then no copy
        q, k, v = [z.transpose(1, 2).contiguous() for z in (q, k, v)]
        sink = sink.contiguous()
        out = torch.empty_like(q)
        _by_heads(_cpu().attention, q, k, v, sink, out)
        ctx.save_for_backward(q, k, v, sink)
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, sink = ctx.saved_tensors
        grad = grad.transpose(1, 2).contiguous()
        dq, dk, dv = [torch.empty_like(z) for z in (q, k, v)]
        dsink = sink.new_empty(len(q), len(sink))
        _by_heads(_cpu().attention_grads, q, k, v, sink, grad, dq, dk, dv, dsink)
        return *(z.transpose(1, 2) for z in (dq, dk, dv)), dsink.sum(0)


def _by_heads(f, q: Tensor, *tensors: Tensor) -> None:
    """Calls cpu.c's `f`, whose threads take heads of prompts, each in its own scratch."""
    parts = torch.get_num_threads()
    _, T, _, D = q.shape
    padded = (T + LANES - 1) // LANES * LANES
    size = (4 * padded + 3 * LANES) * D + 2 * padded * LANES
    scratch = q.new_empty(parts * size)
    f(*_pointers(q, *tensors, scratch), parts, size, *q.shape)


class _SinkAttention(torch.autograd.Function):
    """Flash attention whose log-sum-exp is widened by the sink, forward and backward.

    With P = exp(s - logaddexp(lse, sink)) the usual flash backward holds as it is: it recomputes
    P from the log-sum-exp that it is handed, and rowsum(dO * O) with the output that it is handed.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        total = torch.logaddexp(lse, sink.float().view(1, -1, 1))  # (B, H, T)
        out = out * (lse - total).exp().unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(sink, q, k, v, out, total)
        return out

    @staticmethod
    def backward(ctx, grad):
        sink, *flash = ctx.saved_tensors
        out, total = flash[3:]
        flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash_backward(grad, *flash, 0.0, True)
        p_sink = (sink.float().view(1, -1, 1) - total).exp()  # what the sink takes of each row
        dsink = -(p_sink * (grad * out).sum(-1)).sum((0, 2))
        return dq, dk, dv, dsink.to(sink.dtype)


# --- helpers -------------------------------------------------------------------------------------

def _rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n) without gaps inside a row: a view where that can be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _pointers(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _cpu_for(x: Tensor) -> ctypes.CDLL | None:
    """cpu.c for float32 on a CPU and outside torch.compile, else None."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    return _cpu()


@functools.cache
def _cuda():
    """The module cuda.py; None where it is switched off or there is no Triton, as on Windows."""
    if PLAIN:
        return None
    try:
        from fast import cuda
    except ImportError:
        return None
    return cuda


@functools.cache
def _cpu() -> ctypes.CDLL | None:
    """cpu.c, compiled on first use; None where it is switched off or, as one line then says,
    cannot be had."""
    if PLAIN:
        return None
    try:
        c = _library()
    except (OSError, ValueError) as e:  # ValueError: quotes in CC that do not close
        print(f"note: cpu.c is not used ({e}); "
              "AbsTopK and sparse products will be several times slower", file=sys.stderr)
        return None
    for name, arguments in SIGNATURES.items():
        f = getattr(c, name)
        f.argtypes = [KINDS[kind] for kind in arguments]
        f.restype = None
    return c


# --- compiling cpu.c -----------------------------------------------------------------------------

def _library() -> ctypes.CDLL:
    """cpu.c as compiled for this very machine. OSError where there is no way to have it."""
    source = Path(__file__).with_name("cpu.c")
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise OSError("no C compiler; install gcc or clang, or name one in CC")

    name = f"cpu-{_key(source, compiler)}.so"
    for folder in _folders():
        try:
            return _loaded(folder / name, source, compiler)
        except OSError:  # read-only, full, not for programs, or emptied at this moment
            continue

    # Nowhere to keep it: this process compiles for itself. Once loaded it needs the file no more.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _loaded(Path(folder) / name, source, compiler)


def _folders() -> list[Path]:
    """Where the library may be kept, best first. Each may turn out not to be usable."""
    folders = [Path(__file__).parent / "__pycache__"]
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(cache) if cache else Path.home() / ".cache"
        folders.append(cache / "nano-sparse-circuits")
    except RuntimeError:  # a user without a home, as containers have them
        pass
    return folders


def _key(source: Path, compiler: list[str]) -> str:
    """Differs wherever the library would: a checkout may be shared by unlike machines."""
    cpu = []
    if sys.platform == "linux":
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        named = ("model name", "flags", "Features")  # the rest, as the clock, changes by itself
        cpu = [line for line in first.splitlines() if line.startswith(named)]
    everything = source.read_bytes(), compiler, FLAGS, platform.platform(), cpu
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


def _loaded(library: Path, source: Path, compiler: list[str]) -> ctypes.CDLL:
    """The library, made where it is not there yet. OSError where that cannot be."""
    threads = library.exists() or _compile(library, source, compiler)
    c = ctypes.CDLL(str(library))
    if not threads:
        print(f"note: {compiler[0]} has no OpenMP, so cpu.c will use one thread", file=sys.stderr)
    return c


def _compile(library: Path, source: Path, compiler: list[str]) -> bool:
    """Makes the library, and says whether it can use threads.

    Other processes may be at it, too. So each compiles in a folder of its own and then renames,
    which puts a whole file there at once; and none that is there is ever removed, since another
    process may be about to load it.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="compiling-") as folder:
        fresh = Path(folder) / library.name
        for extra in EXTRA_FLAGS:
            command = [*compiler, *FLAGS, *extra, str(source), "-lm", "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                os.replace(fresh, library)
                return "-fopenmp" in extra
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    said = errors[0] if errors else f"status {done.returncode}"
    raise OSError(f"{shlex.join(compiler)} fails: {said}")
