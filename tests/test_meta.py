"""No tensor of a training step or of a step of mask learning is made on the CPU where the model is elsewhere: a copy
between the two waits for the device each time.

Elsewhere is the meta device, which any machine has. It computes nothing, so a step goes as far as its first question
for a value, which is the last thing that it does.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from circuit import ablate
from model import GPT, SITES, GPTConfig
from optim import density_at, lr_factor_at, param_groups, project_, scale_rms_
from masks import _Heaviside
from tasks import Pairs, task_loss
from circuit import run_to_last


class OnCPU(TorchDispatchMode):
    """Notes every operation that gives a tensor of one or more dimensions on the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" and t.dim() > 0 for t in tensors):
            self.seen.append(str(function))
        return result


def model(**options) -> GPT:
    shape = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, d_head=8, d_model=16, afrac=0.25, rms_norm=True,
                 tied_unembed=False, grad_checkpointing=False, afrac_loctypes=",".join(SITES.values()))
    with torch.device("meta"):
        return GPT(GPTConfig(**shape | options))


def test_the_watch_sees_what_is_made_on_the_cpu():
    with OnCPU() as watch:
        torch.ones(3, device="meta") + 1
        assert not watch.seen
        torch.ones(3)
    assert watch.seen


@pytest.mark.parametrize("options", [
    {}, dict(sink=True), dict(d_pos_emb=4, sink=True), dict(enable_bigram_table=True, learnable_bigram_table=True),
    dict(grad_checkpointing=True),
], ids=str)
def test_a_training_step_makes_nothing_on_the_cpu(options):
    gpt = model(**options).train()
    groups = param_groups(gpt, 0.1)
    x = torch.zeros(4, 16, dtype=torch.int64, device="meta")
    with OnCPU() as watch:
        gpt(x, x)[1].backward()
        scale_rms_(train.learned(gpt))
        for group in groups:
            if group["target_density"] is not None:
                for p in group["params"]:
                    project_(p, 0.1, group["neuron_axis"])
    assert not watch.seen
    assert all(p.grad is not None for p in train.learned(gpt) if p is not gpt.transformer.wpe.weight)
    assert type(density_at(3, 10, 0.1)) is type(lr_factor_at(3, 10)) is float  # the schedules are no tensors


def test_a_step_of_mask_learning_makes_nothing_on_the_cpu():
    gpt = model(sink=True).eval().requires_grad_(False)
    widths = [gpt.config.site_width(site) for site in gpt.sites]
    tau = torch.zeros(sum(widths), device="meta", requires_grad=True)
    constants = {site: torch.zeros(width, device="meta") for site, width in zip(gpt.sites, widths)}
    ids = torch.zeros(8, 12, dtype=torch.int64, device="meta")
    row = torch.zeros(8, dtype=torch.int64, device="meta")
    with OnCPU() as watch:
        gates = dict(zip(gpt.sites, _Heaviside.apply(tau, 1.0).split(widths)))
        pairs = Pairs(ids, row, row, row)
        task_loss(run_to_last(gpt, pairs, ablate(gates, constants)), pairs).backward()
    assert not watch.seen and tau.grad.shape == tau.shape
