"""Which nodes a task needs: a gate per node, learnt by a surrogate gradient (paper A.5).

- `learn_masks`: Heaviside forward, a sigmoid's slope backward; the loss plus a price per open gate.
- What we add: the price follows the loss, a step that breaks the circuit is mended, and gates start
  wide apart.
- `attribution`: the ranking to compare with (paper Fig. 31); it also breaks ties.

find.py makes circuits of these rankings.
"""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import bounded

import torch
from torch import Tensor

from ablations import Varied
from circuit import Nodes, ablate, drop_unconnected, run_to_last
from model import GPT
from tasks import Pairs, answer_ids, batches_of, task_loss

# Node activations at a time in a forward and backward pass; each takes about 16 bytes.
ACTIVATIONS = {"cpu": 2**26, "cuda": 2**30}
NEARLY = 3  # times the target: so near, a circuit is worth going back to
LARGEST_K = 1.0  # nats per gate: as much as a task has to lose; without it k outgrows its numbers
BROKEN = math.log(2)  # nats: worse than a coin; such a circuit has hardly a gradient to mend by


@dataclass
class MaskConfig:
    """What masks are learnt with. The names are paper A.5's; the values are for small models."""
    seed: int = bounded(0, at_least=0)
    target_loss: tuple = bounded((0.15,), above=0)  # nats; of several, one circuit each
    tie_qk: bool = False            # one gate for a query channel and the key channel that it meets
    varied: bool = False            # the target holds under other ablations too (ablations.py)
    steps: int = bounded(300, at_least=1)
    batch_pairs: int = bounded(16, at_least=1)
    lr: float = bounded(0.01, above=0)
    k_coef: float = bounded(0.0003, at_least=0)  # nats per open gate, at first
    k_rate: float = bounded(0.05, at_least=0, at_most=1)  # how fast k follows the loss; 0 = fixed
    # Gates that all begin alike close together, those that matter with those that do not: on a task
    # that the model does perfectly no gradient tells them apart. The paper's are 0.01 and 0.1.
    init_noise_scale: float = bounded(0.1, at_least=0)
    init_noise_bias: float = bounded(0.3, above=0)
    weight_decay: float = bounded(0.001, at_least=0)
    beta2: float = bounded(0.95, at_least=0, below=1)
    warmup: float = bounded(0.05, at_least=0, at_most=1)  # share of the steps
    heaviside_temp: float = bounded(1.0, above=0)
    grad_clip: float = bounded(1.0, above=0)


class _Heaviside(torch.autograd.Function):
    """1 where tau > 0, else 0. The gradient of that is 0 almost everywhere; the backward pass takes
    a sigmoid's, of temperature `temp`, in its place (the surrogate gradient, paper A.5)."""

    @staticmethod
    def forward(ctx, tau, temp):
        ctx.save_for_backward(tau)
        ctx.temp = temp
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, grad):
        (tau,) = ctx.saved_tensors
        s = torch.sigmoid(tau / ctx.temp)
        return grad * s * (1 - s) / ctx.temp, None


class Gates:
    """One tau per node, all in one vector; `tie_qk`: a query channel and the key channel that it
    meets have one between them, which is learnt, ranked and left out as one."""

    def __init__(self, model: GPT, tie_qk: bool):
        self.model = model
        self.widths = {site: model.config.site_width(site) for site in model.sites}
        index = {}  # site -> which parameters are its gates
        n = 0
        for site, width in self.widths.items():
            if tie_qk and site.endswith("attn.k"):
                index[site] = index[site[:-1] + "q"]
            else:
                index[site] = torch.arange(n, n + width)
                n += width
        self.n_parameters = n
        self.index = torch.cat(list(index.values())).to(model.lm_head.weight.device)  # (n_nodes,)

    def split(self, flat: Tensor) -> Nodes:
        """A value per node (n_nodes,) -> per site."""
        return dict(zip(self.widths, flat.split(list(self.widths.values()))))

    def together(self, flat: Tensor) -> Tensor:
        """A value per node (n_nodes,) -> the sums over the nodes of each gate, (n_parameters,)."""
        return flat.new_zeros(self.n_parameters).index_add_(0, self.index, flat)

    def on_path(self, opened: Tensor, answers: list[int]) -> Tensor:
        """Which of the open nodes (n_nodes,) have a path from tokens to answers, bool."""
        path = drop_unconnected(self.model, self.split(opened), answers)
        return torch.cat(list(path.values()))


def first_taus(gates: Gates, cfg: MaskConfig, generator: torch.Generator) -> Tensor:
    """Where learning begins, (n_parameters,): open, some wider than others, one in 700 shut."""
    noise = torch.randn(gates.n_parameters, generator=generator)
    tau = (noise * cfg.init_noise_scale + cfg.init_noise_bias).clamp(-1, 1)
    return tau.to(gates.index.device)


def lr_at(step: int, cfg: MaskConfig) -> float:
    """Up over the warm-up, then down to 0 in a line."""
    ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps))
    return cfg.lr * ramp * (1 - step / cfg.steps)


# Pairs and a gate per node and site -> the last tokens' logits, (2n, vocab).
Forward = Callable[[Pairs, Nodes], Tensor]


def learn_masks(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates, cfg: MaskConfig,
                say=print, varied: Varied | None = None) -> Tensor:
    """Minimise task loss + k * open gates over tau (paper A.5). Returns tau, (n_parameters,), in
    [-1, 1].

    varied: the steps take its ablations and the mean in turn, and k follows the worst of them.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    return learn_gates(runs_of(model, constants, varied, generator), pairs, gates, cfg, generator,
                       say)


def learn_gates(runs: dict[str, Forward], pairs: Pairs, gates: Gates, cfg: MaskConfig,
                generator: torch.Generator, say=print) -> Tensor:
    """`learn_masks`, of whatever the gates are of: nodes, or edges (edge_masks.py). runs: what the
    steps take in turn.

    k follows the loss (our choice; the paper searches for a fixed one per model and task): it grows
    while the running mean of the loss is below 2/3 of the target, and shrinks while above.
    Where a step closes a gate that the circuit cannot do without, it is taken back (`mend_`).
    """
    tau = first_taus(gates, cfg, generator).requires_grad_()
    optimizer = torch.optim.AdamW([tau], betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)

    answers = answer_ids(pairs)
    (target,) = cfg.target_loss
    k = cfg.k_coef
    means = {}  # ablation -> the running mean of its loss
    best = None  # the fewest gates that met the target: where learning ends with a broken circuit
    fewest = math.inf
    whole = None  # the last that nearly did the task
    clock = time.monotonic()
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = lr_at(step, cfg)
        drawn = torch.randint(len(pairs), (cfg.batch_pairs,), generator=generator)
        batch = pairs.take(drawn.to(pairs.ids.device))
        gate = _Heaviside.apply(tau, cfg.heaviside_temp)[gates.index]  # (n_nodes,)
        gate = close_astray(gate, gates, answers)
        kind = list(runs)[step % len(runs)]
        loss, grad = gate_gradient(runs[kind], batch, gates, gate)
        gate.backward(grad + k)

        means[kind] = 0.9 * means.get(kind, loss) + 0.1 * loss
        mean = max(means.values())
        # down faster than up: a broken circuit has little gradient by which it could mend
        k *= math.exp(cfg.k_rate * max(-4.0, min(1.0, 1 - mean / (2 / 3 * target))))
        k = min(k, LARGEST_K)
        if max(mean, loss) <= target and gate.sum() < fewest:
            best = tau.detach().clone()
            fewest = gate.sum()

        # only what did the task can break: what is still to be learnt is at a coin's loss for long
        broken = kind == "mean" and loss > max(BROKEN, NEARLY * target)
        if broken and whole is not None:
            mend_(tau, whole, wanted_open(tau, runs[kind], batch, gates), loss - target)
            means[kind] = target
        else:
            if kind == "mean" and loss <= NEARLY * target:
                whole = tau.detach().clone()
            torch.nn.utils.clip_grad_norm_([tau], cfg.grad_clip)
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            tau.clamp_(-1, 1)
        if (step + 1) % 25 == 0:  # a line every few seconds
            say(progress(step, cfg, loss, int(gate.sum()), clock))
    ended_whole = max(means.values()) <= target
    return tau.detach() if ended_whole or best is None else best


def progress(step: int, cfg: MaskConfig, loss: float, n_open: int, clock: float) -> str:
    left = (time.monotonic() - clock) / (step + 1) * (cfg.steps - step - 1)
    return (f"  masks {step + 1}/{cfg.steps}  task loss {loss:.3f}  open gates {n_open}  "
            f"{left:.0f} s left")


def runs_of(model: GPT, constants: Nodes, varied: Varied | None,
            generator: torch.Generator) -> dict[str, Forward]:
    """What gates are learnt under, by turns."""
    runs = {"mean": partial(run_at, model, constants)}
    if varied is not None:
        for kind in varied.kinds:
            runs[kind] = partial(varied.logits, kind, generator)
    return runs


def run_at(model: GPT, constants: Nodes, pairs: Pairs, gates: Nodes) -> Tensor:
    """The last tokens' logits, (2n, vocab), nodes held at constants as far as gates are shut."""
    return run_to_last(model, pairs, ablate(gates, constants))


def wanted_open(tau: Tensor, run: Forward, batch: Pairs, gates: Gates) -> Tensor:
    """Nats by which opening each gate further would lower the loss, to first order; tau's shape.

    As the gates are, without `close_astray`: a path of which one gate has closed would be closed
    as a whole, and then none of its gates is wanted.
    """
    gate = (tau > 0).float()[gates.index]
    return gates.together(-gate_gradient(run, batch, gates, gate)[1])


@torch.no_grad()
def mend_(tau: Tensor, whole: Tensor, wanted: Tensor, excess: float) -> None:
    """Undo what broke the circuit: back to `whole`, the gates before it. Of those that closed since
    then, the ones that are wanted most are opened as wide as can be.

    wanted: of `wanted_open`. Where nothing would lower the loss by a tenth of its `excess`, as when
    two of a path closed at once, all that closed are opened.
    """
    closed = (whole > 0) & (tau <= 0)
    gain = torch.where(closed, wanted, 0)
    least = gain.max() / 10 if gain.max() >= excess / 10 else -math.inf
    tau.copy_(whole)
    tau[closed & (gain >= least)] = 1.0


def close_astray(gate: Tensor, gates: Gates, answers: list[int]) -> Tensor:
    """The gates (n_nodes,), those closed that have no path from tokens to answers (our choice).

    Such nodes are dropped in the end, and as constants that differ from their mean they would then
    be missed.
    """
    with torch.no_grad():
        astray = gate * ~gates.on_path(gate > 0, answers)
    # a difference, not a product: they still hear their gradient, and may find a path again
    return gate - astray


def gate_gradient(run: Forward, pairs: Pairs, gates: Gates, gate: Tensor) -> tuple[float, Tensor]:
    """The task loss in nats and its gradient by each gate, (n_nodes,)."""
    gate = gate.detach().requires_grad_()
    tokens = 2 * pairs.ids.shape[1]  # of a pair
    n_nodes = sum(gates.widths.values())
    at_once = max(1, ACTIVATIONS[gate.device.type] // (tokens * n_nodes))
    total = 0.0
    for part in batches_of(pairs, at_once):
        loss = task_loss(run(part, gates.split(gate)), part) * (len(part) / len(pairs))
        loss.backward()
        total = total + loss.detach()
    return total.item(), gate.grad


def attribution(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates) -> Tensor:
    """|sum of gradient x (activation - constant)| over prompts and positions, of the task loss and
    of each gate's nodes, (n_parameters,): the first-order effect of ablating them. Prompts that
    pull in opposite directions cancel, as they do in the loss. It breaks ties between equal taus.
    """
    # where a gate is 1, the loss's derivative by it is gradient x (activation - constant)
    gate = torch.ones(len(gates.index), device=gates.index.device)
    run = partial(run_at, model, constants)
    return gates.together(gate_gradient(run, pairs, gates, gate)[1]).abs()
