"""Sparse training: AdamW whose step ends with a projection to the largest weights (paper 2.1, A.2).

- `L0AdamW.step()` leaves every sparse tensor with exactly the nonzeros that its density asks for;
  gradients and Adam moments stay dense.
- `param_groups(model, density)`: which tensors are sparse, and which axis is the neuron's.
- `density_at`, `lr_factor_at`: the two schedules, pure functions of the step.
- `clip_rms_`: the gradient's root-mean-square over all parameters, clipped or normalised.
"""
import math

import torch
from torch import Tensor

from ops import keep_largest_


def density_at(
    step: int, max_steps: int, target: float, start: float = 0.0, end: float = 0.5
) -> float:
    """Fraction of weights kept after step `step` (0-based): linear from 1 to `target` (paper A.2).

    `start` and `end` are fractions of training between which it falls.
    """
    progress = (step + 1) / max_steps  # after the step: the last one ends at 1
    if progress >= end:
        return target
    if progress <= start:
        return 1.0
    return 1.0 - (1.0 - target) * (progress - start) / (end - start)


def lr_factor_at(step: int, max_steps: int, density: float = 1.0, warmup: float = 0.01) -> float:
    """The "sharkfin" (paper A.2): warmup, linear decay to 0, times 1/sqrt(fraction now kept).

    Multiply by the base learning rate. Without the last factor annealing brings no benefit.
    """
    # from 1/warmup-steps, not from 0: a first step of length 0 would be wasted
    ramp = min(1.0, (step + 1) / max(1.0, warmup * max_steps))
    return ramp * (1.0 - step / max_steps) / math.sqrt(density)


def clip_rms_(params: list[Tensor], mode: str = "clip", limit: float = 1.0) -> Tensor:
    """Scale the gradients in place to an RMS over all entries of at most `limit` (paper A.2).

    mode `clip`: only ever down; `normalize`: always to `limit`. Returns the RMS before. Parameters
    without a gradient count as zeros. A gradient that is not finite is returned as it is, unscaled.
    """
    if mode not in ("clip", "normalize"):
        raise ValueError(f"the gradient mode must be clip or normalize, not {mode!r}")
    grads = [p.grad for p in params if p.grad is not None]
    n = sum(p.numel() for p in params)
    # all tensors in one call, and no wait for the device
    norms = torch._foreach_norm(grads)
    rms = torch.stack(norms).norm() / math.sqrt(n)
    scale = limit / rms.clamp_min(1e-12)  # a gradient of zeros stays zeros
    if mode == "clip":  # the paper's; the authors' script always normalises
        scale = scale.clamp_max(1.0)
    torch._foreach_mul_(grads, torch.where(rms.isfinite(), scale, 1.0))
    return rms


def param_groups(model, density: float, weight_decay: float = 0.1) -> list[dict]:
    """The model's trainable tensors as groups for `L0AdamW`.

    Sparse: all matrices, biases and both embeddings. Dense, and not decayed: norm gains, sinks and
    the bigram table. The neuron axis is the hidden channel: rows of c_attn and c_fc, columns of
    c_proj; biases and embeddings have none.
    """
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # gains, sinks and bigrams are few or exempt: the paper does not count them in L0
        dense = "ln_" in name or "sink_logit" in name or "bigram_table" in name
        axis = _neuron_axis(name)
        if (dense, axis) not in groups:
            groups[dense, axis] = dict(
                params=[],
                target_density=None if dense else density,
                density=1.0,
                neuron_axis=axis,
                weight_decay=0.0 if dense else weight_decay,
            )
        groups[dense, axis]["params"].append(p)
    return list(groups.values())


def _neuron_axis(name: str) -> int | None:
    if name.endswith(("c_attn.weight", "c_fc.weight")):
        return 0  # a row for each q, k or v channel, or MLP neuron
    if name.endswith("c_proj.weight"):
        return 1
    return None


@torch.no_grad()
def project_(
    p: Tensor, density: float, neuron_axis: int | None = None, min_per_neuron: int = 4
) -> None:
    """Zero all but the max(1, round(density * n)) largest magnitudes of `p`, in place (paper A.2).

    With a neuron axis, each neuron's largest `min_per_neuron` (j) entries stay in any case; j is
    lowered where j * neurons would exceed the budget. The count is exact, ties to the lower index;
    it is smaller only where `p` had fewer nonzeros before.
    """
    k = max(1, round(density * p.numel()))
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


class L0AdamW(torch.optim.AdamW):
    """AdamW, then the projection. Groups come from `param_groups`, or name the same keys.

    A group's `density` is the fraction that `step()` leaves in each of its tensors (set it from
    `density_at`); `target_density` None marks a dense group, which is never projected.
    """

    def __init__(self, groups, lr: float, betas=(0.9, 0.95), eps: float = 0.1,
                 weight_decay: float = 0.1, min_per_neuron: int = 4):
        # eps 0.1 is no typo: gradients are scaled to an RMS of 1, and it damps what is far below
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("target_density", None)
            group.setdefault("density", 1.0)
            group.setdefault("neuron_axis", None)
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
        return loss

    def project(self) -> None:
        """The end of `step()`: every sparse tensor to its group's density."""
        for group in self.param_groups:
            if group["target_density"] is not None and group["density"] < 1.0:
                axis = group["neuron_axis"]
                for p in group["params"]:
                    project_(p, group["density"], axis, group["min_per_neuron"])
