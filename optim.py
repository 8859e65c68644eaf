"""Sparse training: Adam whose step ends with a projection to the largest weights (paper 2.1, A.2).

- `L0AdamW.step()`: Adam, the projection, decay. It leaves every sparse tensor with exactly the
  nonzeros that its density asks for; gradients and Adam moments stay dense.
- `param_groups(model, ...)`: which tensors are sparse, and which axis is the neuron's.
- `density_at`, `lr_factor_at`: the two schedules, pure functions of the step.
- `scale_rms_`: the gradient's root-mean-square over all parameters, normalised or clipped.

All of it as in the authors' training script, step for step (tests/test_authors.py).
"""
import math

import torch
from torch import Tensor

from ops import keep_largest_


def density_at(
    step: int, max_steps: int, target: float, start: float = 0.01, end: float = 0.5
) -> float:
    """Fraction of weights that step `step` (0-based) leaves: linear from 1 to `target` (paper A.2).

    `start` and `end` are fractions of training between which it falls.
    """
    progress = step / max_steps
    if progress >= end:
        return target
    if progress <= start:
        return 1.0
    return 1.0 - (1.0 - target) * (progress - start) / (end - start)


def lr_factor_at(step: int, max_steps: int, thinning: float = 1.0, warmup: float = 0.01) -> float:
    """The "sharkfin" (paper A.2): warmup, then linear decay to 0, times sqrt(`thinning`).

    thinning: density at the end / density now, so that the base learning rate, which this is to be
    multiplied by, is the one at the end. Without that factor annealing brings no benefit.
    """
    warm = int(warmup * max_steps)
    if step < warm:
        ramp = step / warm
    else:
        ramp = 1.0 - (step - warm) / (max_steps - warm)
    return ramp * math.sqrt(thinning)


def scale_rms_(params: list[Tensor], mode: str = "normalize") -> Tensor:
    """Scale the gradients in place, so that their RMS over all entries is 1 (paper A.2).

    mode `normalize`: always, as the authors' script; `clip`: only ever down, as the paper's text.
    Returns the RMS before. Parameters without a gradient count as zeros. A gradient that is not
    finite is returned as it is, unscaled. ValueError for another mode.
    """
    if mode not in ("normalize", "clip"):
        raise ValueError(f"the gradient mode must be normalize or clip, not {mode!r}")
    grads = [p.grad for p in params if p.grad is not None]
    n = sum(p.numel() for p in params)
    # all tensors in one call, and no wait for the device
    norms = torch._foreach_norm(grads)
    rms = torch.stack(norms).norm() / math.sqrt(n)
    scale = 1.0 / (rms + 1e-5)  # the script's: a gradient of zeros stays zeros
    if mode == "clip":
        scale = scale.clamp_max(1.0)
    torch._foreach_mul_(grads, torch.where(rms.isfinite(), scale, 1.0))
    return rms


def param_groups(model, density: float, embed_density: float = 0.0, bias_density: float = 0.0,
                 decay: float = 0.1) -> list[dict]:
    """The model's trainable tensors as groups for `L0AdamW`.

    Sparse: all matrices and learnt positions, at `density`; both embeddings, at `embed_density`;
    biases, at `bias_density`; a density of 0 is the matrices'. Dense: norm gains, sinks and the
    bigram table. Matrices and embeddings alone decay. The neuron axis is the hidden channel: rows
    of c_attn and c_fc, columns of c_proj; biases and embeddings have none.
    """
    densities = {
        "matrix": density,
        "embedding": embed_density or density,
        "bias": bias_density or density,
        "dense": None,
    }
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = kind_of(name)
        axis = _neuron_axis(name)
        if (kind, axis) not in groups:
            groups[kind, axis] = dict(
                params=[],
                target_density=densities[kind],
                density=1.0,
                neuron_axis=axis,
                decay=decay if kind in ("matrix", "embedding") else 0.0,
            )
        groups[kind, axis]["params"].append(p)
    return list(groups.values())


def kind_of(name: str) -> str:
    """What a parameter of that name is to the optimizer: matrix, embedding, bias or dense."""
    # gains, sinks and bigrams are few or exempt: the paper does not count them in L0
    if "ln_" in name or "sink_logit" in name or "bigram_table" in name:
        return "dense"
    if name.endswith(("wte.weight", "lm_head.weight")):
        return "embedding"
    return "bias" if name.endswith(".bias") else "matrix"


def _neuron_axis(name: str) -> int | None:
    if name.endswith(("c_attn.weight", "c_fc.weight")):
        return 0  # a row for each q, k or v channel, or MLP neuron
    if name.endswith("c_proj.weight"):
        return 1
    return None


def nonzeros_of(n: int, density: float) -> int:
    """How many of n entries a density keeps: truncated, as in the script; at least one."""
    return max(1, int(density * n))


@torch.no_grad()
def project_(
    p: Tensor, density: float, neuron_axis: int | None = None, min_per_neuron: int = 4
) -> None:
    """Zero all but the `nonzeros_of` largest magnitudes of `p`, in place (paper A.2).

    With a neuron axis, each neuron's largest `min_per_neuron` (j) entries stay in any case; j is
    lowered where j * neurons would exceed the budget. The count is exact, ties to the lower index;
    it is smaller only where `p` had fewer nonzeros before.
    """
    k = nonzeros_of(p.numel(), density)
    if k >= p.numel():
        return
    # The j floor: a neuron with no weight left gets no gradient and never returns. Where the
    # budget cannot pay for j weights a neuron, all neurons get fewer.
    j = 0
    if neuron_axis is not None and p.dim() == 2:
        neurons = p.shape[neuron_axis]
        weights_of_a_neuron = p.shape[1 - neuron_axis]
        j = min(min_per_neuron, k // neurons, weights_of_a_neuron)
    keep_largest_(p, k, j, neuron_axis)


class L0AdamW(torch.optim.Adam):
    """Adam, then the projection, then decay. Groups come from `param_groups`, or name the same
    keys.

    A group's `density` is the fraction that `step()` leaves in each of its tensors (set it from
    `density_at`); `target_density` None marks a dense group, which is never projected. `decay`,
    times the learning rate, is the share of a weight that a step takes away.
    """

    def __init__(self, groups, lr: float, betas=(0.9, 0.95), eps: float = 0.1,
                 min_per_neuron: int = 4):
        # eps 0.1 is no typo: gradients are scaled to an RMS of 1, and it damps what is far below
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            group.setdefault("target_density", None)
            group.setdefault("density", 1.0)
            group.setdefault("neuron_axis", None)
            group.setdefault("decay", 0.0)
            group.setdefault("lr_scale", 1.0)
            group.setdefault("min_per_neuron", min_per_neuron)

    def set_schedule(self, lr: float, progress_density) -> None:
        """Every group's learning rate, times its `lr_scale`, and the density that its step ends
        with: `progress_density` of its target."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["target_density"] is not None:  # each group may have a target of its own
                group["density"] = progress_density(group["target_density"])

    def step(self, closure=None):
        # decision: the projection is part of the step, so that no weights are ever seen without it
        loss = super().step(closure)
        self.project()
        self.shrink()
        return loss

    def project(self) -> None:
        """Every sparse tensor to its group's density."""
        for group in self.param_groups:
            if group["target_density"] is not None and group["density"] < 1.0:
                axis = group["neuron_axis"]
                for p in group["params"]:
                    project_(p, group["density"], axis, group["min_per_neuron"])

    @torch.no_grad()
    def shrink(self) -> None:
        """Decay: what the projection has left, a little smaller."""
        for group in self.param_groups:
            if group["decay"] > 0:
                torch._foreach_mul_(group["params"], 1.0 - group["lr"] * group["decay"])
