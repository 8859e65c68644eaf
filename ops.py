"""What sparsity adds to a transformer, in plain PyTorch, one public function each.

- `abstopk(x, k)`: keep the k entries of largest magnitude along the last axis (paper 2.1).
- `topk_mask(x, k)`: which entries those are.
- `keep_largest_(p, k, j, neuron_axis)`: the optimizer's projection of one tensor (A.2).
- `gated(x, gate, constant)`: a node that is open, or held at a constant (A.5).
- `linear(x, weight, bias)`: F.linear, by a sparse weight's nonzeros alone where that is faster.
- `rms_norm(x, weight)`: the norm that keeps zero where it is (2.1).
- `sink_attention(q, k, v, sink)`: causal attention, with a learnable logit in the denominator or
  without (A.1).

Each stands here whole and runs anywhere. Its one line that names `fast` asks the folder fast/
(C on a CPU, Triton on CUDA) for the same result sooner; None means that it cannot help. The same
entries are kept, ties included, and products agree up to rounding. Without the folder all is
as correct, and several times slower.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import fast
    from fast import SPARSE  # noqa: F401  an emptied folder still imports, but has nothing in it
except ImportError:
    fast = None

# Integers as wide as a float of so many bytes.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# --- AbsTopK -------------------------------------------------------------------------------------

def abstopk(x: Tensor, k: int) -> Tensor:
    """x with all but the k largest magnitudes of the last axis set to zero (paper 2.1).

    x: (..., n), any float dtype. Exactly k entries are kept, ties to the lower channel; the
    gradient flows through those alone. A NaN ranks first, so that it is not hidden.
    ValueError unless 1 <= k <= n.
    """
    _check(k, x.shape[-1])
    return _AbsTopK.apply(x, k)


def topk_mask(x: Tensor, k: int) -> Tensor:
    """The bool mask, of x's shape, of what `abstopk(x, k)` keeps."""
    _check(k, x.shape[-1])
    return _kept(x.detach(), k)[1]


def _check(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, not {k}")


def _select(x: Tensor, k: int, masked: bool = True) -> tuple[Tensor, Tensor | None]:
    """(..., n) -> what is kept, zeros elsewhere, and the mask of it; without `masked`, perhaps None
    in its place."""
    done = fast and fast.abstopk(x, k, masked)
    if done is not None:
        return done

    # Without their sign, floats order as the integers of the same bits do. That makes every
    # comparison exact, and a NaN comes out above infinity.
    magnitude = x.abs().view(INTEGERS[x.element_size()])
    kth = magnitude.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above = magnitude > kth
    tied = magnitude == kth

    # What exceeds the k-th largest stays; those equal to it fill the rest from the left.
    room = k - above.sum(-1, keepdim=True)
    mask = above | (tied & (tied.cumsum(-1) <= room))
    return torch.where(mask, x, 0), mask


def _kept(x: Tensor, k: int, masked: bool = True) -> tuple[Tensor, Tensor | None]:
    """`_select`; to torch.compile an operator it need not look into."""
    return _select_op(x, k) if torch.compiler.is_compiling() else _select(x, k, masked)


@torch.library.custom_op("circuits::abstopk", mutates_args=())
def _select_op(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    y, mask = _select(x, k)
    return y.contiguous(), mask.contiguous()  # as the next function promises


@_select_op.register_fake
def _(x, k):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return y, mask


class _AbsTopK(torch.autograd.Function):
    """It saves one byte an entry for the backward pass, neither input nor output."""

    @staticmethod
    def forward(ctx, x, k):
        y, mask = _kept(x, k, masked=ctx.needs_input_grad[0])
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return _Keep.apply(grad, mask), None


class _Keep(torch.autograd.Function):
    """torch.where(mask, x, 0), which is its own backward pass: so gradients of gradients flow."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        done = fast and fast.keep(x, mask)
        return torch.where(mask, x, 0) if done is None else done

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return _Keep.apply(grad, mask), None


# --- the optimizer's projection ------------------------------------------------------------------

@torch.no_grad()
def keep_largest_(p: Tensor, k: int, j: int = 0, neuron_axis: int | None = None) -> None:
    """Zero all but the k largest magnitudes of `p`, in place; but each neuron keeps its j largest,
    where they are not zero, in any case (paper A.2).

    Exactly k stay, ties to the lower index, where `p` has as many nonzeros. With j > 0, `p` is a
    matrix and `neuron_axis`, 0 or 1, the axis that counts its neurons, of which there are at most
    k / j (`optim.project_` lowers j to that). Does not wait for a CUDA device. ValueError where k
    or j is negative, or more than there are.
    """
    _check(k, p.numel())
    if j != 0:
        _check(j, p.shape[1 - neuron_axis])
    if fast and fast.keep_largest_(p, k, j, neuron_axis):  # in place: True says that it is done
        return

    magnitude = p.abs()
    if j > 0:
        by_neuron = magnitude if neuron_axis == 0 else magnitude.t().contiguous()
        # a protected zero would take a nonzero's place among the k
        protected = topk_mask(by_neuron, j) & (by_neuron > 0)
        if neuron_axis == 1:
            protected = protected.t().contiguous()
        magnitude = magnitude.masked_fill(protected, torch.inf)  # the floor: they rank first
    p.masked_fill_(~topk_mask(magnitude.flatten(), k).view_as(p), 0)


# --- gates, for pruning --------------------------------------------------------------------------

def gated(x: Tensor, gate: Tensor, constant: Tensor) -> Tensor:
    """gate * x + (1 - gate) * constant (paper A.5): x where the gate is 1, the constant where 0.

    x: (..., n); gate, a float or a bool, and constant: (n,).
    """
    gate = gate.to(x.dtype)
    constant = constant.to(x.dtype)
    done = fast and fast.gated(x, gate, constant)
    return torch.lerp(constant, x, gate) if done is None else done


# --- products ------------------------------------------------------------------------------------

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None,
           known: dict | None = None) -> Tensor:
    """F.linear(x, weight, bias). x: (..., n), weight: (rows, n), bias: (rows,) -> (..., rows).

    fast/ walks over the nonzeros of a sparse `weight` alone. The weight's own gradient is dense
    in any case, for the optimizer may bring any entry back. `known`, a dict that the caller
    keeps, spares a frozen weight's nonzeros from being looked for again (it sees no change
    through `.data`). There, it is differentiable once, and zero times infinity or NaN is zero.
    """
    done = fast and fast.linear(x, weight, bias, known)
    return F.linear(x, weight, bias) if done is None else done


# --- norm ----------------------------------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight, over the last axis (paper 2.1).

    x: (..., n), weight: (n,). eps: None is x's machine epsilon, as in PyTorch. In fast/ it is
    differentiable once.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    done = fast and fast.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps) if done is None else done


# --- attention with a sink -----------------------------------------------------------------------

def sink_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
                   dropout_p: float = 0.0) -> Tensor:
    """Causal attention, scale 1/sqrt(d_head), with exp(sink) added to the denominator (paper A.1):
    a head that has nothing to say can attend to nothing.

    q, k, v: (B, H, T, d_head); sink: (H,), or None for ordinary attention -> (B, H, T, d_head).
    Never builds a T x T matrix: memory is linear in T, forward and backward. In fast/ it is
    differentiable once.
    """
    if dropout_p == 0:  # fast/ has no dropout
        done = fast and fast.sink_attention(q, k, v, sink)
        if done is not None:
            return done
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)

    # A dummy position 0 has the sink as its logit and a value of zero. For the logit, each query
    # gets one more channel, constant 1, and only the dummy key is nonzero there. So causal SDPA
    # needs no mask and takes its flash path, given equal widths that are a multiple of 8.
    B, H, _, D = q.shape
    spare = 7 - D % 8  # channels of padding after the extra one
    slot = (sink.to(k.dtype) * D**0.5).view(1, H, 1, 1).expand(B, H, 1, 1)  # undoes the scale
    dummy = F.pad(slot, (D, 0))
    q = F.pad(q, (0, 1, 1, 0), value=1.0)
    q = F.pad(q, (0, spare))  # (B, H, T + 1, D + 1 + spare), as k and v
    k = torch.cat([dummy, F.pad(k, (0, 1))], dim=2)
    k = F.pad(k, (0, spare))
    v = F.pad(v, (0, 1 + spare, 1, 0))
    out = F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True, scale=D**-0.5)
    return out[:, :, 1:, :D]
