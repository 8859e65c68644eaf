"""Find the smallest circuit of a model that still does a task, and write it to circuit.json.

- Means of every node over pretraining data; nodes outside the circuit are held at their mean.
- A ranking of the nodes by learned masks: a gate per node, Heaviside forward, sigmoid slope
  backward (paper A.5); or by attribution, to compare with (Fig. 31).
- Bisection for the fewest leading nodes that meet the target; with --minimal, minimise.py leaves
  no node or edge more than that needs. Then what circuit.py measures, and validate.py sharpens.

    python prune.py --model=out/demo --task=single_double_quote
    python prune.py --model=out/demo --task=all --minimal --jobs=2
    python prune.py --model=out/demo --target_loss=0.5,0.15,0.05

"""
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse

import numpy as np
import torch
from torch import Tensor

from circuit import (Circuit, Found, Nodes, ablate, all_edges, content_of, drop_unconnected, held_at,
                     read_circuit, run_to_last, write_circuit)
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from data.workers import begin_worker, worker_pool
from minimise import Search, minimise
from model import GPT, config_of, device_of, weights_hash
from tasks import (TASKS, Pairs, Task, answer_ids, batches_of, calibrate, calibrated,
                   load_model, load_pairs, loss_of, margins, rows_at_once, task_loss, task_of)
from tokens import check_tokenizer, random_windows, window_of

# Node activations at a time in a forward and backward pass; each takes about 16 bytes.
ACTIVATIONS = {"cpu": 2**26, "cuda": 2**30}
BROKEN = math.log(2)  # nats: worse than a coin; such a circuit has hardly a gradient to mend by
SLACK = 0.9  # the search aims so far below the target on its pairs that held-out ones meet it too


@dataclass
class PruneConfig:
    model: str = "out/demo"         # a directory in the published format
    task: str = "single_double_quote"  # or all, or a file of pairs: .jsonl, .csv
    out_dir: str = ""               # "" = the model's; the circuit: out_dir/task/circuit.json
    data: str = "data/tinypython"   # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")
    jobs: int = bounded(1, at_least=1)  # with --task=all: processes at a time
    seed: int = bounded(0, at_least=0)
    target_loss: tuple = bounded((0.15,), above=0)  # nats; of several, one circuit each
    method: str = one_of("learned", "attribution")  # how nodes are ranked
    ablation: str = one_of("mean", "zero")  # what a node outside the circuit is held at
    minimal: bool = False           # then leave out single nodes and edges until none can go
    necessity: float = bounded(0.0, at_least=0)  # minimal: nats that the model must lose without it
    tie_qk: bool = False            # one gate for a query channel and the key channel that it meets
    mean_tokens: int = bounded(65536, at_least=1)
    window: int = bounded(0, at_least=0)  # tokens of it at a time; 0 = as many as in training
    train_pairs: int = bounded(2048, at_least=1)  # mask learning draws from these
    fit_pairs: int = bounded(256, at_least=1)  # the first of those: for bisection and calibration
    heldout_pairs: int = bounded(256, at_least=1)
    # mask learning (the names are paper A.5's; their values are set for small models)
    steps: int = bounded(300, at_least=1)
    batch_pairs: int = bounded(16, at_least=1)
    lr: float = bounded(0.02, above=0)
    k_coef: float = 0.0003          # nats per open gate, at first
    k_rate: float = 0.02            # how fast k follows the loss; 0 = fixed, as in the paper
    init_noise_scale: float = 0.01
    init_noise_bias: float = 0.1
    weight_decay: float = 0.001
    beta2: float = 0.95
    warmup: float = 0.05            # share of the steps
    heaviside_temp: float = bounded(1.0, above=0)
    grad_clip: float = bounded(1.0, above=0)


# --- what ablated nodes are held at ----------------------------------------------------------

@torch.no_grad()
def node_means(model: GPT, path: str, tokens: int, seed: int,
               sites: list[str] | None = None, window: int = 0) -> Nodes:
    """Mean activation of every node, (width,) a site, over about `tokens` tokens of the pretraining
    file `path` (paper A.5), `window` of them at a time (0: block_size); or of `sites`. Of a value:
    of what its head gathered of it, for there it is held. ValueError where that is no data for this
    model."""
    sites = model.sites if sites is None else sites
    sums = {held_at(site): 0 for site in sites}
    n = 0

    def add(site: str, x: Tensor) -> Tensor:
        if site in sums:
            # double: float32 would lose digits over so many tokens; few at a time, for it is a copy
            for rows in x.flatten(0, 1).split(256):
                sums[site] = sums[site] + rows.double().sum(0)
        return x

    c = model.config
    device = model.lm_head.weight.device
    for ids in random_windows(path, c.vocab_size, window or c.block_size, tokens, seed, device):
        for part in ids.split(rows_at_once(model, ids.shape[1])):
            model.run(model.embed(part), nodes=add)
        n += ids.numel()
    return {site: (sums[held_at(site)] / n).float() for site in sites}


def constants_of(model: GPT, cfg: PruneConfig) -> Nodes:
    """What the config holds ablated nodes at: their means, or zero."""
    if cfg.ablation == "mean":
        check_tokenizer(cfg.data, tokenizer_hash(tokenizer_for(cfg.model, cfg.tokenizer)))
        path = os.path.join(cfg.data, "train.bin")
        window = window_of(cfg.model, model.config.block_size, cfg.window)
        return node_means(model, path, cfg.mean_tokens, cfg.seed, window=window)
    zeros = model.lm_head.weight.new_zeros
    return {site: zeros(model.config.site_width(site)) for site in model.sites}


# --- mask learning ---------------------------------------------------------------------------

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
    """One tau per node, all in one vector; `tie_qk`: a query channel shares its key channel's."""

    def __init__(self, model: GPT, tie_qk: bool):
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


def learn_masks(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates, cfg: PruneConfig,
                say=print) -> Tensor:
    """Minimise task loss + k * open gates over tau (paper A.5). Returns tau, in [-1, 1], per node.

    k follows the loss (our choice; the paper searches for a fixed one per model and task): it grows
    while the running mean of the loss is below 2/3 of the lowest target, and shrinks while above.
    Where a step closes a gate that the circuit cannot do without, it is taken back (`mend_`).
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(gates.n_parameters, generator=generator)
    tau = (noise * cfg.init_noise_scale + cfg.init_noise_bias).clamp(-1, 1)
    tau = tau.to(gates.index.device).requires_grad_()
    optimizer = torch.optim.AdamW([tau], betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)

    answers = answer_ids(pairs)
    target = min(cfg.target_loss)
    k = cfg.k_coef
    mean = 0.0
    best = None  # the fewest gates that met the target: where learning ends with a broken circuit
    fewest = math.inf
    whole = None  # the last that was not broken
    clock = time.monotonic()
    for step in range(cfg.steps):
        # up over the warm-up, then down to 0 in a line
        ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps))
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp * (1 - step / cfg.steps)
        drawn = torch.randint(len(pairs), (cfg.batch_pairs,), generator=generator)
        batch = pairs.take(drawn.to(pairs.ids.device))

        gate = _Heaviside.apply(tau, cfg.heaviside_temp)[gates.index]  # (n_nodes,)
        gate = close_astray(model, gate, gates, answers)
        loss, grad = gate_gradient(model, batch, constants, gates, gate)
        gate.backward(grad + k)

        mean = 0.9 * mean + 0.1 * loss if step else loss
        # down faster than up: a broken circuit has little gradient by which it could mend
        k *= math.exp(cfg.k_rate * max(-4.0, min(1.0, 1 - mean / (2 / 3 * target))))
        if max(mean, loss) <= target and gate.sum() < fewest:
            best = tau.detach().clone()
            fewest = gate.sum()

        broken = loss > max(BROKEN, 3 * target)
        if broken and whole is not None:
            mend_(tau, whole, wanted_open(tau, model, batch, constants, gates), loss - target)
            mean = target
        else:
            if not broken:
                whole = tau.detach().clone()
            torch.nn.utils.clip_grad_norm_([tau], cfg.grad_clip)
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            tau.clamp_(-1, 1)
        if (step + 1) % 25 == 0:  # a line every few seconds
            left = (time.monotonic() - clock) / (step + 1) * (cfg.steps - step - 1)
            say(f"  masks {step + 1}/{cfg.steps}  task loss {loss:.3f}  "
                f"open gates {int(gate.sum())}  {left:.0f} s left")
    if best is None or not mean > target:
        best = tau.detach()
    return best[gates.index]


def wanted_open(tau: Tensor, model: GPT, batch: Pairs, constants: Nodes, gates: Gates) -> Tensor:
    """Nats by which opening each gate further would lower the loss, to first order; tau's shape.

    As the gates are, without `close_astray`: a path of which one gate has closed would be closed
    as a whole, and then none of its gates is wanted.
    """
    gate = (tau > 0).float()[gates.index]
    grad = gate_gradient(model, batch, constants, gates, gate)[1]
    return torch.zeros_like(tau).index_add_(0, gates.index, -grad)


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


def close_astray(model: GPT, gate: Tensor, gates: Gates, answers: list[int]) -> Tensor:
    """The gates (n_nodes,), those closed that have no path from tokens to answers (our choice).

    Such nodes are dropped in the end, and as constants that differ from their mean they would then
    be missed.
    """
    with torch.no_grad():
        path = drop_unconnected(model, gates.split(gate > 0), answers)
        astray = gate * ~torch.cat(list(path.values()))
    # a difference, not a product: they still hear their gradient, and may find a path again
    return gate - astray


def gate_gradient(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates,
                  gate: Tensor) -> tuple[float, Tensor]:
    """The task loss in nats and its gradient by each gate, both (n_nodes,)."""
    gate = gate.detach().requires_grad_()
    tokens = 2 * pairs.ids.shape[1]  # of a pair
    at_once = max(1, ACTIVATIONS[gate.device.type] // (tokens * len(gate)))
    total = 0.0
    for part in batches_of(pairs, at_once):
        nodes = ablate(gates.split(gate), constants)
        loss = task_loss(run_to_last(model, part, nodes), part) * (len(part) / len(pairs))
        loss.backward()
        total = total + loss.detach()
    return total.item(), gate.grad


def attribution(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates) -> Tensor:
    """|gradient x (activation - constant)| of the task loss, summed over prompts and positions,
    (n_nodes,): the first-order effect of ablating each node. It breaks ties between equal taus."""
    # where a gate is 1, the loss's derivative by it is gradient x (activation - constant)
    gate = torch.ones(len(gates.index), device=gates.index.device)
    return gate_gradient(model, pairs, constants, gates, gate)[1].abs()


# --- from a ranking to a circuit -------------------------------------------------------------

def discretise(search: Search, order: Tensor, n_open: int, target: float) -> Circuit:
    """The fewest leading nodes of `order` (n_nodes,) that meet `target`, by bisection (paper A.5).

    Calibration is part of the test (the paper fits it afterwards), because the calibrated loss is
    the one that is reported. Where not even all nodes do, the open gates, whose loss says so.
    """
    edges = all_edges(search.model)
    widths = {site: search.model.config.site_width(site) for site in search.model.sites}

    def leading(k: int, target: float) -> Circuit:
        flat = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        flat[order[:k]] = True
        mask = dict(zip(widths, flat.split(list(widths.values()))))
        return search.fit(mask, edges, target)

    # From the open gates down, and only where they do not do from all nodes: the loss is not
    # monotone in the number of nodes, and between the two it can be worse.
    low = 0
    high = n_open
    best = leading(high, target)
    if not best.loss <= target:
        low = n_open
        high = len(order)
        best = leading(high, target)
    if not best.loss <= target:
        return leading(n_open, math.inf)
    while high - low > 1:  # `high` meets the target, always
        middle = (low + high) // 2
        trial = leading(middle, target)
        if trial.loss <= target:
            high = middle
            best = trial
        else:
            low = middle
    return best


def find(model: GPT, pairs: Pairs, constants: Nodes, cfg: PruneConfig,
         say=print) -> Iterator[Circuit]:
    """The circuits of one model and task, one per target loss, found on `pairs` alone (paper A.5).

    The nodes are ranked once. Where a target cannot be met, the circuit's loss says so.
    """
    # one tau per node; where the method is attribution, all are equal and the effect decides
    gates = Gates(model, cfg.tie_qk)
    fit_pairs = pairs.first(cfg.fit_pairs)
    effect = attribution(model, fit_pairs, constants, gates)
    tau = torch.ones_like(effect)
    if cfg.method == "learned":
        tau = learn_masks(model, pairs, constants, gates, cfg, say)
    n_open = int((tau > 0).sum())
    # the largest tau first; the clamp leaves many at 1, and of those the largest effect first
    order = np.lexsort((-effect.cpu().numpy(), -tau.cpu().numpy()))
    order = torch.from_numpy(order).to(effect.device)

    for target in cfg.target_loss:
        search = Search(model, constants, fit_pairs)
        aim = SLACK * target
        circuit = discretise(search, order, n_open, aim)
        if not circuit.loss <= aim:  # not even all nodes come that far below
            circuit = discretise(search, order, n_open, target)
        size = f"{circuit.size[0]} nodes, {circuit.size[1]} edges"
        say(f"  {size}: loss {circuit.loss:.3f}, target {target}")
        if cfg.minimal and circuit.loss <= aim:
            smaller = minimise(search, circuit, aim, say, cfg.necessity)
            circuit = replace(smaller, before=circuit.size)
        yield circuit


def prune(model: GPT, task: Task, tokenizer, cfg: PruneConfig, constants: Nodes,
          say=print) -> Iterator[dict]:
    """Find, then measure and describe: the content of circuit.json for each target loss.

    ValueError if the model fails the task, or no circuit meets a target.
    """
    device = model.lm_head.weight.device
    T = model.config.block_size
    train = load_pairs(task, tokenizer, cfg.train_pairs, "train", T, cfg.seed).to(device)
    heldout = load_pairs(task, tokenizer, cfg.heldout_pairs, "heldout", T, cfg.seed).to(device)
    cfg = sized(cfg, task, train, heldout, say)
    check_solved(model, task, train, heldout, cfg)
    for target, circuit in zip(cfg.target_loss, find(model, train, constants, cfg, say)):
        if not circuit.loss <= target:
            raise ValueError(f"no circuit of {task.name} meets {target} nats on {cfg.fit_pairs} "
                             "training pairs; raise --target_loss")
        yield content_of(Found(
            model=model, model_dir=cfg.model, task=task, tokenizer=tokenizer, circuit=circuit,
            constants=constants, target_loss=target, aim=SLACK * target, train=train,
            heldout=heldout, settings=settings_in_file(cfg)))


def sized(cfg: PruneConfig, task: Task, train: Pairs, heldout: Pairs, say=print) -> PruneConfig:
    """The settings with as many pairs as there are: a file can have fewer than they ask for."""
    fits = replace(cfg, train_pairs=len(train), heldout_pairs=len(heldout),
                   fit_pairs=min(cfg.fit_pairs, len(train)))
    if fits != cfg:
        say(f"  {task.file.path} has fewer pairs than asked for: train_pairs={fits.train_pairs}, "
            f"fit_pairs={fits.fit_pairs}, heldout_pairs={fits.heldout_pairs}")
    return fits


def check_solved(model: GPT, task: Task, train: Pairs, heldout: Pairs, cfg: PruneConfig) -> None:
    """ValueError where the whole model's loss on held-out pairs is above a target."""
    unpruned = margins(model, heldout)
    scale, shift = calibrate(margins(model, train.first(cfg.fit_pairs)))
    # calibrated on training pairs, as its circuits are
    at_best = min(loss_of(unpruned), loss_of(calibrated(unpruned, scale, shift)))
    for target in cfg.target_loss:
        if not at_best <= target:  # nor is NaN a solution
            raise ValueError(
                f"the unpruned model does not solve {task.name}: loss {loss_of(unpruned):.3f} nats "
                f"held out ({at_best:.3f} calibrated), target {target}; train longer, or raise "
                "--target_loss")


# --- the command -----------------------------------------------------------------------------

def check_prune(cfg: PruneConfig) -> None:
    """ValueError, in one line, for what bounds beside the fields cannot say."""
    if cfg.task != "all":
        task_of(cfg.task)  # a file is read before a model is loaded that may take far longer
    device_of(cfg.device)
    if cfg.fit_pairs > cfg.train_pairs:
        raise ValueError(f"fit_pairs {cfg.fit_pairs} exceeds train_pairs {cfg.train_pairs}")


def settings_in_file(cfg: PruneConfig) -> dict:
    """What a circuit depends on: all but how many processes there were."""
    window = window_of(cfg.model, config_of(cfg.model).block_size, cfg.window)
    settings = asdict(cfg) | {"window": window}  # how long it was, not how that was found
    return {key: value for key, value in settings.items() if key != "jobs"}


def path_of(cfg: PruneConfig, task: str, target: float) -> str:
    """Where the circuit of a task goes; with several targets, each has a folder of its own."""
    folder = os.path.join(cfg.out_dir or cfg.model, task)
    if len(cfg.target_loss) > 1:
        folder = os.path.join(folder, f"target_{target:g}")
    return os.path.join(folder, "circuit.json")


def already_pruned(cfg: PruneConfig, task: str) -> list[dict] | None:
    """The circuits of a task that an earlier run with the same settings and weights has left."""
    # through JSON, as in a file: a tuple is a list there
    wanted = json.loads(json.dumps(settings_in_file(replace(cfg, task=task))))
    try:
        circuits = [read_circuit(path_of(cfg, task, target)) for target in cfg.target_loss]
        sha256 = weights_hash(cfg.model)
    except (OSError, ValueError):  # missing or damaged
        return None
    same = all(c["settings"] == wanted and c["model"]["sha256"] == sha256 for c in circuits)
    return circuits if same else None


def prune_task(cfg: PruneConfig, task: str, say=partial(print, flush=True)) -> list[dict]:
    """Load, prune, write the files of one task; returns their contents.

    ValueError or OSError, in one line, where that cannot be done.
    """
    model, tokenizer = load_model(cfg.model, cfg.tokenizer, cfg.device)
    its_pairs = task_of(task)
    name = its_pairs.name  # the folder of its circuit, also where the pairs are in a file
    say(f"pruning {cfg.model} to the circuit of {name}; "
        f"means over {cfg.mean_tokens} pretraining tokens")
    constants = constants_of(model, cfg)
    circuits = []
    for circuit in prune(model, its_pairs, tokenizer, replace(cfg, task=task), constants, say):
        path = path_of(cfg, name, circuit["target_loss"])
        write_circuit(path, circuit)
        say(f"{name}: {circuit['n_nodes']} nodes, {circuit['n_edges']} edges\n"
            f"  loss held out {circuit['loss_heldout']:.3f} nats (target {circuit['target_loss']}, "
            f"unpruned model {circuit['unpruned_loss']:.3f})\n"
            f"  necessity: with only the circuit ablated, "
            f"loss {circuit['validation']['necessity']:.2f}\n"
            f"  {path}")
        circuits.append(circuit)
    return circuits


def in_processes(f: Callable, items: Iterable, jobs: int) -> list:
    """f of each item, `jobs` processes at a time; in place of a ValueError or OSError, its text.

    Exits with one line where the system kills a process. Whatever ends this process, none of the
    others outlives it.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        with worker_pool(jobs, partial(_begin_worker, threads)) as pool:
            return list(pool.map(partial(result_or_reason, f), items))
    except BrokenProcessPool:
        die("a process was killed, perhaps for want of memory; what was finished is kept: "
            "run it again with fewer --jobs")


def _begin_worker(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    begin_worker(parent)


def result_or_reason(f: Callable, item):
    """f(item), or the text of its ValueError or OSError: one item's failure ends no other."""
    try:
        return f(item)
    except (ValueError, OSError) as e:
        return str(e)


def one_of_all(cfg: PruneConfig, task: str) -> list[dict]:
    """A task's circuits, found unless they are there; each line stands under the task's name."""
    def say(text: str) -> None:
        print(f"[{task}] {text.strip()}", flush=True)
    return already_pruned(cfg, task) or prune_task(cfg, task, say)


def prune_all(cfg: PruneConfig) -> None:
    """Every task, `jobs` at a time; then a table for each target."""
    results = dict(zip(TASKS, in_processes(partial(one_of_all, cfg), TASKS, cfg.jobs)))
    solved = {}
    for task, result in results.items():
        if isinstance(result, str):
            print(f"{task}: no circuit: {result}")
        else:
            solved[task] = result
    for i, target in enumerate(cfg.target_loss):
        print_table(target, {task: circuits[i] for task, circuits in solved.items()})
    if not solved:
        die("no task has a circuit (reasons above)")


def print_table(target: float, rows: dict[str, dict]) -> None:
    """One target's circuits, and the geometric mean of their edges: a model's size (paper 2.2)."""
    print(f"\n| task (target {target} nats) | unpruned | circuit, held out | nodes | edges "
          "| necessity |\n|---|---|---|---|---|---|")
    for task, c in rows.items():
        print(f"| {task} | {c['unpruned_loss']:.3f} | {c['loss_heldout']:.3f} | {c['n_nodes']} "
              f"| {c['n_edges']} | {c['validation']['necessity']:.2f} |")
    if rows:
        # a circuit without edges must not make the mean zero
        logs = [math.log(max(1, c["n_edges"])) for c in rows.values()]
        mean = math.exp(sum(logs) / len(logs))
        print(f"geometric mean of edges: {mean:.1f} over {len(rows)} of {len(TASKS)} tasks")


def main(argv: list[str]) -> int:
    cfg = parse(PruneConfig, argv)
    try:
        check_prune(cfg)
        if cfg.task == "all":
            prune_all(cfg)
        else:
            prune_task(cfg, cfg.task)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
