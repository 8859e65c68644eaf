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

from kernels import keep_largest_


def density_at(step: int, max_steps: int, target: float, start: float = 0.0, end: float = 0.5) -> float:
    """Fraction of weights kept after step `step` (0-based): linear from 1 to `target` (paper A.2).

    `start` and `end` are fractions of training between which it falls.
    """
    progress = (step + 1) / max_steps
    if progress >= end:
        return target
    if progress <= start:
        return 1.0
    return 1.0 - (1.0 - target) * (progress - start) / (end - start)


def lr_factor_at(step: int, max_steps: int, density: float = 1.0, warmup: float = 0.01) -> float:
    """The "sharkfin" (paper A.2): warmup, linear decay to 0, times 1/sqrt(fraction now kept).

    Multiply by the base learning rate. Without the last factor annealing brings no benefit.
    """
    ramp = min(1.0, (step + 1) / max(1.0, warmup * max_steps))
    return ramp * (1.0 - step / max_steps) / math.sqrt(density)


def clip_rms_(params: list[Tensor], mode: str = "clip", limit: float = 1.0) -> Tensor:
    """Scale the gradients in place so that their RMS over all entries is at most `limit` (paper A.2).

    mode `clip`: only ever down; `normalize`: always to `limit`. Returns the RMS before. Parameters
    without a gradient count as zeros. A gradient that is not finite is returned as it is, unscaled.
    """
    if mode not in ("clip", "normalize"):
        raise ValueError(f"the gradient mode must be clip or normalize, not {mode!r}")
    grads = [p.grad for p in params if p.grad is not None]
    n = sum(p.numel() for p in params)
    norms = torch._foreach_norm(grads)
    rms = torch.stack(norms).norm() / math.sqrt(n)
    scale = limit / rms.clamp_min(1e-12)
    if mode == "clip":
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
        dense = "ln_" in name or "sink_logit" in name or "bigram_table" in name
        axis = 0 if name.endswith(("c_attn.weight", "c_fc.weight")) else 1 if name.endswith("c_proj.weight") else None
        groups.setdefault((dense, axis), []).append(p)
    return [dict(params=ps, target_density=None if dense else density, density=1.0, neuron_axis=axis,
                 weight_decay=0.0 if dense else weight_decay)
            for (dense, axis), ps in groups.items()]


@torch.no_grad()
def project_(p: Tensor, density: float, neuron_axis: int | None = None, min_per_neuron: int = 4) -> None:
    """Keep the max(1, round(density * n)) largest magnitudes of `p`, zero the rest, in place (paper A.2).

    With a neuron axis, each neuron's largest `min_per_neuron` (j) entries stay in any case; j is
    lowered where j * neurons would exceed the budget. The count is exact, ties to the lower index;
    it is smaller only where `p` had fewer nonzeros before.
    """
    k, j = max(1, round(density * p.numel())), 0
    if k >= p.numel():
        return
    if neuron_axis is not None and p.dim() == 2:
        j = min(min_per_neuron, k // p.shape[neuron_axis], p.shape[1 - neuron_axis])
    keep_largest_(p, k, j, neuron_axis)


class L0AdamW(torch.optim.AdamW):
    """AdamW, then the projection. Groups come from `param_groups`, or name the same keys.

    A group's `density` is the fraction that `step()` leaves in each of its tensors (set it from
    `density_at`); `target_density` None marks a dense group, which is never projected.
    """

    def __init__(self, groups, lr: float, betas=(0.9, 0.95), eps: float = 0.1,
                 weight_decay: float = 0.1, min_per_neuron: int = 4):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("target_density", None)
            group.setdefault("density", 1.0)
            group.setdefault("neuron_axis", None)
            group.setdefault("lr_scale", 1.0)
            group.setdefault("min_per_neuron", min_per_neuron)

    def set_schedule(self, lr: float, progress_density) -> None:
        """Set every group's learning rate (times its `lr_scale`), and its density from its target by `progress_density`."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["target_density"] is not None:
                group["density"] = progress_density(group["target_density"])

    def step(self, closure=None):
        loss = super().step(closure)
        self.project()
        return loss

    def project(self) -> None:
        """The end of `step()`: every sparse tensor to its group's density."""
        for group in self.param_groups:
            if group["target_density"] is not None and group["density"] < 1.0:
                for p in group["params"]:
                    project_(p, group["density"], group["neuron_axis"], group["min_per_neuron"])
