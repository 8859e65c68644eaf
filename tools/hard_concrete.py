"""The paper's baseline for sparsity (its Appendix D): gates on weights, learnt with them.

    python -m tools.hard_concrete --config=configs/figures/sparse.toml --out_dir=out/hard_concrete

Each weight that train.py would keep sparse is multiplied by a gate z between 0 and 1, drawn anew in
every pass from the hard concrete distribution (Louizos et al. 2018, arXiv:1712.01312): a stretched
and clipped sigmoid of noise, which is exactly 0 or 1 much of the time and has a gradient between.
The expected number of gates that are not zero is made to follow the budget of nonzeros that
train.py has at that step, by a price on each of them that rises while there are too many.

Everything else is train.py's: options, data, schedule, log and resume. Until it is done, the run
has weights.pt and gates.pt; then the model is written, with its gates as they are without noise,
and of what is left no more than the budget over all tensors together, the largest first: a model as
any other, for prune.py to read.
"""
import copy
import math
import os
from dataclasses import dataclass

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from jobs import Job, leave
from model import GPT
from ops import keep_largest_
from optim import L0AdamW, kind_of, nonzeros_of
from train import (TrainConfig, begin, densities_at, evaluate, evaluation_text, loop, new_model,
                   of_the_family, optimizer_of)

TEMPERATURE = 2 / 3        # of the sigmoid; all three as Louizos et al. have them
LOW, HIGH = -0.1, 1.1      # what it is stretched to, before it is clipped to 0 and 1
OPEN = 2.0                 # log odds of a gate to begin with: 97 of 100 are not zero
FIRST_PRICE = 1.0          # nats for all gates together; found by itself from there


@dataclass
class HardConcreteConfig(TrainConfig):
    out_dir: str = "out/hard_concrete"
    gate_lr: float = bounded(0.5, above=0)      # on the schedule of lr
    price_rate: float = bounded(0.02, above=0)   # of the logarithm of the price, per pass


class WeightGates(nn.Module):
    """The gates of some weights, by their log odds; and the price of a gate that is not zero."""

    def __init__(self, weights: list[Tensor], seed: int):
        super().__init__()
        self.log_odds = nn.ParameterList([torch.full_like(w, OPEN) for w in weights])
        self.seed = seed
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("price", torch.tensor(FIRST_PRICE))

    def draw(self) -> list[Tensor]:
        """Gates for one pass in training. A resumed run draws what it would have drawn."""
        device = self.price.device
        # of a seed a CPU's generator uses 32 bits: both numbers must be in those
        state = np.random.SeedSequence([self.seed, int(self.passes)]).generate_state(1)
        generator = torch.Generator(device).manual_seed(int(state[0]))
        self.passes += 1
        drawn = []
        for log_odds in self.log_odds:
            noise = torch.rand(log_odds.shape, generator=generator, device=device)
            drawn.append(clipped((torch.logit(noise, eps=1e-6) + log_odds) / TEMPERATURE))
        return drawn

    def settled(self) -> list[Tensor]:
        """The gates without noise."""
        return [clipped(log_odds) for log_odds in self.log_odds]

    def n_open(self) -> Tensor:
        """The expected number of gates that are not zero."""
        threshold = TEMPERATURE * math.log(-LOW / HIGH)
        return sum((log_odds - threshold).sigmoid().sum() for log_odds in self.log_odds)

    @torch.no_grad()
    def adjust(self, n_open: Tensor, budget: int, rate: float) -> None:
        """Raise the price while more gates are open than the budget has, lower it while fewer."""
        off = (n_open / budget - 1).clamp(-1, 1)
        self.price *= (rate * off).exp()


def clipped(logits: Tensor) -> Tensor:
    """Sigmoid, stretched to LOW..HIGH and clipped to 0..1."""
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


class Unprojected(L0AdamW):
    """The optimizer of train.py, its schedule and its decay, without the projection."""

    def project(self) -> None:
        """Gates make weights zero here."""

    def budget(self) -> int:
        """How many weights the projection would leave at this step."""
        return sum(nonzeros_of(p.numel(), group["density"]) for group in self.param_groups
                   if group["target_density"] is not None for p in group["params"])


class Gated(nn.Module):
    """A GPT whose weights `names` are multiplied by gates."""

    def __init__(self, model: GPT, gates: WeightGates, names: list[str], optimizer: Unprojected,
                 price_rate: float):
        super().__init__()
        self.model = model
        self.gates = gates
        self.names = names
        self.optimizer = optimizer  # knows the budget of this step
        self.price_rate = price_rate

    def forward(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is open and its price, for the log; and the next-token loss, nats, whose gradient
        has that of the price in it."""
        gates = self.gates
        weights = dict(self.model.named_parameters())
        gated = {name: weights[name] * z for name, z in zip(self.names, gates.draw())}
        _, loss = functional_call(self.model, gated, (x, y))

        n_open = gates.n_open()
        n_gates = sum(log_odds.numel() for log_odds in gates.log_odds)
        gates.adjust(n_open, self.optimizer.budget(), self.price_rate)
        penalty = gates.price * n_open / n_gates
        seen = [n_open.detach(), gates.price.clone()]
        # its gradient and not its value: what is logged is nats per token
        return seen, loss + penalty - penalty.detach()

    @torch.no_grad()
    def settled(self) -> GPT:
        """A copy of the model with the gates' settled values in its weights, of which no more than
        this step's budget are left, the largest."""
        model = copy.deepcopy(self.model)
        weights = dict(model.named_parameters())
        for name, z in zip(self.names, self.gates.settled()):
            weights[name] *= z
        ours = [weights[name] for name in self.names]
        together = torch.cat([w.flatten() for w in ours])
        keep_largest_(together, min(self.optimizer.budget(), len(together)))
        for w, kept in zip(ours, together.split([w.numel() for w in ours])):
            w.copy_(kept.view_as(w))
        return model


def main(argv: list[str]) -> int:
    cfg = of_the_family(parse(HardConcreteConfig, argv))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        die("this baseline is for one process: python -m tools.hard_concrete")
    # a backward pass that runs the model again would do so without the gates
    for option in ("plan", "keep_every", "grad_checkpointing", "compile"):
        if getattr(cfg, option):
            die(f"this baseline has no --{option}")
    run = begin(cfg)
    cfg = run.cfg
    model = new_model(run)
    sparse = {name: p for name, p in model.named_parameters()
              if p.requires_grad and kind_of(name) != "dense"}
    gates = WeightGates(list(sparse.values()), cfg.seed).to(run.device)
    of_gates = dict(params=list(gates.parameters()), lr_scale=cfg.gate_lr / cfg.lr)
    optimizer = optimizer_of(cfg, model, [of_gates], Unprojected)
    net = Gated(model, gates, list(sparse), optimizer, cfg.price_rate)

    def evaluation() -> dict:
        return evaluate(net.settled(), run)

    def describe(seen: list[Tensor]) -> dict:
        return {"nonzeros": seen[0].item(), "price": seen[1].item()}

    # not "model": weights without their gates are none that others should read
    modules = {"weights": model, "gates": gates}
    status = loop(run, Job(net, modules, optimizer, evaluation, evaluation_text, describe))
    if status == 0:
        # the budget of the last step, also where that was done before
        optimizer.set_schedule(0.0, densities_at(cfg, cfg.max_steps - 1))
        net.settled().save(cfg.out_dir)
    return status


if __name__ == "__main__":
    as_script(main, leave)
