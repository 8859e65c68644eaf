"""Find the smallest circuit of a model that still does a task, and write it to circuit.json.

- Means of every node over pretraining data; nodes outside the circuit are held at their mean.
- Learned node masks: a gate per node, Heaviside forward, sigmoid slope backward (paper A.5); or a
  ranking by attribution, to compare with (Fig. 31).
- search.py takes it from there: the fewest leading nodes that meet the target and, with --minimal,
  no single node or edge more than the target needs.
- Sufficiency and necessity on held-out pairs; validate.py adds the stricter controls.

    python prune.py --model=out/demo --task=single_double_quote
    python prune.py --model=out/demo --task=all --minimal --jobs=2
    python prune.py --model=out/demo --target_loss=0.5,0.15,0.05

"""
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from circuit import (Circuit, Nodes, ablate, all_edges, calibrate, calibrated, count, drop_unconnected, edges_of, finish, hash_of, inverse, last_logits,
                     load, loss_of, margins, without_edges)
from config import die, nearest, parse, write_atomic
from model import GPT
from search import Search, discretise, minimise
from tasks import TASKS, Pairs, Task, load_pairs, task_loss

SLACK = 0.9  # the search aims this far below the target on its own pairs, so that held-out pairs meet it too


@dataclass
class PruneConfig:
    model: str = "out/demo"         # a directory in the published format
    task: str = "single_double_quote"  # or all
    out_dir: str = ""               # "" = the model's; the circuit goes to out_dir/task/circuit.json
    data: str = "data/tinypython"   # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = "cpu"
    jobs: int = 1                   # with --task=all: processes at a time
    seed: int = 0
    target_loss: tuple = (0.15,)    # nats; several, such as 0.5,0.15,0.05, give one circuit each
    method: str = "learned"         # learned | attribution: how nodes are ranked
    ablation: str = "mean"          # mean | zero: what a node outside the circuit is held at
    minimal: bool = False           # then leave out single nodes and edges until none can go
    necessity: float = 0.0          # nats; with minimal: but no node that would take the model's loss without the circuit below this
    tune: int = 0                   # search for better settings first, by so many trials (tune.py)
    tie_qk: bool = False            # one gate for a query channel and the key channel that it meets
    mean_tokens: int = 65536
    train_pairs: int = 2048         # mask learning draws from these
    fit_pairs: int = 256            # of those, the pairs that discretising and calibrating look at
    heldout_pairs: int = 256
    # mask learning (the names are paper A.5's; their values are set for small models)
    steps: int = 300
    batch_pairs: int = 16
    lr: float = 0.02
    k_coef: float = 0.0003          # nats per open gate, at first
    k_rate: float = 0.02            # per step it grows by this share while the loss is low, and shrinks where it is high; 0 = fixed, as in the paper
    init_noise_scale: float = 0.01
    init_noise_bias: float = 0.1
    weight_decay: float = 0.001
    beta2: float = 0.95
    warmup: float = 0.05
    heaviside_temp: float = 1.0
    grad_clip: float = 1.0


# --- means ----------------------------------------------------------------------------------

def samples(model: GPT, path: str, tokens: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the uint16 file `path`, `tokens` tokens in all, as batches (up to 32, block_size) of ids.

    ValueError if the file is no such data for this model; OSError if it is missing.
    """
    T, size = model.config.block_size, os.path.getsize(path)
    if size % 2 or size < 2 * T:
        raise ValueError(f"{path} has {size} bytes: not whole uint16 tokens, or fewer than one block of {T}; prepare the data again")
    data = np.memmap(path, dtype="<u2", mode="r")
    if data.max() >= model.config.vocab_size:
        raise ValueError(f"{path} holds token id {data.max()}, past the model's vocabulary of {model.config.vocab_size}")
    starts = np.random.default_rng(seed).integers(0, len(data) - T + 1, max(1, tokens // T))
    for i in range(0, len(starts), 32):
        rows = np.stack([data[s : s + T] for s in starts[i : i + 32]]).astype(np.int64)
        yield torch.from_numpy(rows).to(model.lm_head.weight.device)


@torch.no_grad()
def node_means(model: GPT, path: str, tokens: int, seed: int) -> Nodes:
    """Mean activation of every node over `tokens` tokens of pretraining data, as `samples` draws them (paper A.5)."""
    sums, n = {}, 0

    def add(site, x):
        sums[site] = sums.get(site, 0) + x.double().sum((0, 1))
        return x

    for ids in samples(model, path, tokens, seed):
        model.run(model.embed(ids), nodes=add)
        n += ids.numel()
    return {site: (sums[site] / n).float() for site in model.sites}


def constants_of(model: GPT, cfg: PruneConfig) -> Nodes:
    """What the config holds ablated nodes at."""
    if cfg.ablation == "zero":
        return {site: model.lm_head.weight.new_zeros(model.config.site_width(site)) for site in model.sites}
    return node_means(model, os.path.join(cfg.data, "train.bin"), cfg.mean_tokens, cfg.seed)


# --- mask learning ---------------------------------------------------------------------------

class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tau, temp):
        ctx.save_for_backward(tau)
        ctx.temp = temp
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, grad):
        s = torch.sigmoid(ctx.saved_tensors[0] / ctx.temp)
        return grad * s * (1 - s) / ctx.temp, None


class Gates:
    """One tau per node, all in one vector; `tie_qk` lets a query channel share its key channel's."""

    def __init__(self, model: GPT, tie_qk: bool):
        self.widths = {site: model.config.site_width(site) for site in model.sites}
        index, slots, start = [], {}, 0
        for site, width in self.widths.items():
            slot = site[:-1] + "q" if tie_qk and site.endswith("attn.k") else site
            if slot not in slots:
                slots[slot], start = torch.arange(start, start + width), start + width
            index.append(slots[slot])
        self.index, self.n_parameters = torch.cat(index).to(model.lm_head.weight.device), start

    def split(self, flat: Tensor) -> Nodes:
        """A value per node (n_nodes,) -> per site."""
        return dict(zip(self.widths, flat.split(list(self.widths.values()))))


def learn_masks(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates, cfg: PruneConfig, say=print) -> Tensor:
    """Minimise task loss + k * open gates over tau (paper A.5). Returns tau per node, in [-1, 1].

    k starts at k_coef and follows the loss (our choice; the paper searches for it per model and task): it
    rises while the running mean of the loss is below 2/3 of the lowest target, and falls while it is above.

    Nodes without a path from tokens to answers are ablated while learning too (our choice): they are
    dropped in the end, and as constants that differ from their mean they would be missed.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(gates.n_parameters, generator=generator) * cfg.init_noise_scale + cfg.init_noise_bias
    tau = noise.clamp(-1, 1).to(gates.index.device).requires_grad_()
    optimizer = torch.optim.AdamW([tau], lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    answers, edges = (int(pairs.answer[0]), int(pairs.wrong[0])), {key: m.float() for key, m in all_edges(model).items()}
    clock, k, target, mean = time.time(), cfg.k_coef, min(cfg.target_loss), 0.0
    best, fewest = None, math.inf  # the gates to go back to where learning ends with a broken circuit
    for step in range(cfg.steps):
        ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps))
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp * (1 - step / cfg.steps)
        batch = pairs.take(torch.randint(len(pairs), (cfg.batch_pairs,), generator=generator).to(pairs.ids.device))
        gate = _Heaviside.apply(tau, cfg.heaviside_temp)[gates.index]
        with torch.no_grad():  # an open gate without a path counts as closed, but still hears its gradient
            path = drop_unconnected(model, gates.split(gate > 0), answers, edges)
            astray = gate * ~torch.cat(list(path.values()))
        gate = gate - astray
        h, nodes = model.embed(batch.ids), ablate(gates.split(gate), constants)
        for f in model.sublayers[:-1]:
            h = f(h, nodes)
        loss = task_loss(finish(model, h, batch, nodes), batch)
        (loss + k * gate.sum()).backward()
        mean = 0.9 * mean + 0.1 * loss.item() if step else loss.item()
        k *= math.exp(cfg.k_rate * max(-4.0, min(1.0, 1 - mean / (2 / 3 * target))))
        if max(mean, loss.item()) <= target and gate.sum() < fewest:
            best, fewest = tau.detach().clone(), gate.sum()
        torch.nn.utils.clip_grad_norm_([tau], cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            tau.clamp_(-1, 1)
        if (step + 1) % 25 == 0:
            left = (time.time() - clock) / (step + 1) * (cfg.steps - step - 1)
            say(f"  masks {step + 1}/{cfg.steps}  task loss {loss.item():.3f}  open gates {int(gate.sum())}  {left:.0f} s left")
    return (best if mean > target and best is not None else tau.detach())[gates.index]


def attribution(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates) -> Tensor:
    """|gradient x (activation - constant)| of the task loss, summed over prompts and positions, per node.

    It is the first-order effect of ablating the node, and breaks ties between equal taus.
    """
    gate = torch.ones(len(gates.index), device=gates.index.device, requires_grad=True)
    loss = task_loss(last_logits(model, pairs, ablate(gates.split(gate), constants)), pairs)
    return torch.autograd.grad(loss, gate)[0].abs()


# --- the circuit file ------------------------------------------------------------------------

def find(model: GPT, pairs: Pairs, constants: Nodes, cfg: PruneConfig, say=print) -> Iterator[Circuit]:
    """The circuits of one model and task, one per target loss, found on `pairs` alone (paper A.5).

    The nodes are ranked once. Where a target cannot be met, the circuit's loss says so.
    """
    gates = Gates(model, cfg.tie_qk)
    fit_pairs = pairs.take(torch.arange(cfg.fit_pairs, device=pairs.ids.device))
    effect = attribution(model, fit_pairs, constants, gates)
    tau = learn_masks(model, pairs, constants, gates, cfg, say) if cfg.method == "learned" else torch.ones_like(effect)
    order = torch.from_numpy(np.lexsort((-effect.cpu().numpy(), -tau.cpu().numpy()))).to(effect.device)  # ties of tau: by effect
    for target in cfg.target_loss:
        search = Search(model, constants, fit_pairs)
        circuit = discretise(search, order, int((tau > 0).sum()), SLACK * target)
        if not circuit.loss <= SLACK * target:  # not even all nodes come that far below
            circuit = discretise(search, order, int((tau > 0).sum()), target)
        say(f"  {circuit.size[0]} nodes, {circuit.size[1]} edges: loss {circuit.loss:.3f}, target {target}")
        if cfg.minimal and circuit.loss <= SLACK * target:
            circuit = replace(minimise(search, circuit, SLACK * target, say, cfg.necessity), before=circuit.size)
        yield circuit


def prune(model: GPT, task: Task, tokenizer, cfg: PruneConfig, constants: Nodes, say=print) -> Iterator[dict]:
    """Find, measure and describe: the content of circuit.json for each target loss.

    ValueError if the model fails the task.
    """
    T, device = model.config.block_size, model.lm_head.weight.device
    train = load_pairs(task, tokenizer, cfg.train_pairs, "train", T, cfg.seed).to(device)
    heldout = load_pairs(task, tokenizer, cfg.heldout_pairs, "heldout", T, cfg.seed).to(device)
    unpruned = margins(model, heldout)
    scale, shift = calibrate(margins(model, train.take(torch.arange(cfg.fit_pairs, device=device))))
    at_best = min(loss_of(unpruned), loss_of(calibrated(unpruned, scale, shift)))  # as its circuits are
    for target in cfg.target_loss:
        if not at_best <= target:  # nor is NaN a solution
            raise ValueError(f"the unpruned model does not solve {task.name}: loss {loss_of(unpruned):.3f} nats held out "
                             f"({at_best:.3f} calibrated), target {target}; train longer, or raise --target_loss")
    for target, circuit in zip(cfg.target_loss, find(model, train, constants, cfg, say)):
        if not circuit.loss <= target:
            raise ValueError(f"no circuit of {task.name} meets {target} nats on {cfg.fit_pairs} training pairs; raise --target_loss")
        mask, reduced, edges = circuit.mask, without_edges(model, circuit, constants), edges_of(model, circuit.mask, circuit.edges)
        kept = calibrated(margins(reduced, heldout, ablate(mask, constants)), circuit.scale, circuit.shift)
        rest = margins(model, heldout, inverse(mask, constants))
        yield {
            "format": "sparse-circuit-1",
            "model": {"dir": cfg.model, "sha256": hash_of(cfg.model), **{k: getattr(model.config, k) for k in
                      ("n_layer", "d_model", "n_head", "d_head", "d_mlp")}},
            "task": task.name, "task_description": task.description, "answers": list(task.answers),
            "target_loss": target, "loss": circuit.loss, "loss_heldout": loss_of(kept),
            "unpruned_loss": loss_of(unpruned), "ablation": cfg.ablation,
            "logit_scale": circuit.scale, "logit_shift": circuit.shift,
            "nodes": {s: m.nonzero().flatten().tolist() for s, m in mask.items() if m.any()},
            "edges": edges, **stream_ends(model, mask, heldout, tokenizer),
            "means": {s: [round(x, 6) for x in c.tolist()] for s, c in constants.items()},
            "n_nodes": count(mask), "n_edges": len(edges),
            "validation": {
                "sufficiency": loss_of(kept), "sufficiency_accuracy": (kept > 0).float().mean().item(),
                "necessity": loss_of(rest), "necessity_accuracy": (rest > 0).float().mean().item(),
                "heldout_pairs": len(heldout),
                "minimal": {"certified": True, "training_pairs": cfg.fit_pairs, "target": SLACK * target, "necessity": cfg.necessity,
                            "nodes_before": circuit.before[0], "edges_before": circuit.before[1]} if circuit.before else {"certified": False}},
            "examples": examples(reduced, mask, constants, heldout, kept, unpruned, tokenizer),
            "seed": cfg.seed, "settings": settings_of(cfg),
        }


def stream_ends(model: GPT, mask: Nodes, pairs: Pairs, tokenizer) -> dict:
    """Where the circuit's channels start and end: [token id, text, channel, weight] of the embedding
    (channels that the circuit reads, tokens of the task, largest first) and of both answers' unembedding."""
    def channels_of(kind):
        masks = [m[: model.config.d_model] for s, m in mask.items() if s.endswith(kind)]
        return torch.stack(masks).any(0).nonzero().flatten().tolist()

    seen = pairs.ids.unique()
    wte, head = model.transformer.wte.weight.detach(), model.lm_head.weight.detach()

    def entries(matrix, ids, channels, most):
        found = []
        for c in channels:
            column = matrix[ids, c]
            for i in column.abs().argsort(descending=True)[:most].tolist():
                if column[i] != 0:
                    token = int(ids[i])
                    found.append([token, tokenizer.decode([token]), c, round(column[i].item(), 6)])
        return found

    return {"embedding": entries(wte, seen, channels_of("act_in"), 12),
            "unembedding": entries(head, pairs.answer[:2], channels_of("resid_delta"), 2)}


@torch.no_grad()
def examples(model: GPT, mask: Nodes, constants: Nodes, pairs: Pairs, kept: Tensor, unpruned: Tensor, tokenizer, n: int = 6) -> list[dict]:
    """The first n held-out pairs, with every circuit node's activation at every token of the pruned model."""
    shown, out = pairs.take(torch.arange(min(n, len(pairs)), device=pairs.ids.device)), []
    replace = ablate(mask, constants)
    for i in range(2 * len(shown)):
        record = {}

        def watch(site, x):
            x = replace(site, x)
            if site in mask and mask[site].any():
                record[site] = [[round(a, 4) for a in row] for row in x[0][:, mask[site]].T.tolist()]
            return x

        ids = shown.ids[i : i + 1, : int(shown.last[i]) + 1]
        model.run(model.embed(ids), nodes=watch)
        out.append({"tokens": [tokenizer.decode([t]) for t in ids[0].tolist()],
                    "answer": tokenizer.decode([int(shown.answer[i])]), "wrong": tokenizer.decode([int(shown.wrong[i])]),
                    "p_answer": torch.sigmoid(kept[i]).item(), "p_answer_unpruned": torch.sigmoid(unpruned[i]).item(),
                    "activations": record})
    return out


# --- the command -----------------------------------------------------------------------------

def check(cfg: PruneConfig) -> None:
    if cfg.task != "all" and cfg.task not in TASKS:
        die(f"unknown task '{cfg.task}'; the nearest is '{nearest(cfg.task, TASKS)}', and --task=all runs all of: {', '.join(TASKS)}")
    if cfg.device not in ("cpu", "cuda") or cfg.device == "cuda" and not torch.cuda.is_available():
        die(f"device must be cpu, or cuda where PyTorch sees one, not '{cfg.device}'")
    for name, allowed in (("ablation", ("mean", "zero")), ("method", ("learned", "attribution"))):
        if getattr(cfg, name) not in allowed:
            die(f"{name} must be {' or '.join(allowed)}, not '{getattr(cfg, name)}'")
    for name in ("mean_tokens", "train_pairs", "fit_pairs", "heldout_pairs", "steps", "batch_pairs", "jobs"):
        if getattr(cfg, name) < 1:
            die(f"{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.fit_pairs > cfg.train_pairs:
        die(f"fit_pairs {cfg.fit_pairs} exceeds train_pairs {cfg.train_pairs}")
    if not 0 <= cfg.necessity < math.inf:
        die(f"necessity must be 0 or more nats, not {cfg.necessity}")
    for name, value in (*(("target_loss", t) for t in cfg.target_loss), *((n, getattr(cfg, n)) for n in ("lr", "heaviside_temp", "grad_clip"))):
        if not (type(value) in (int, float) and 0 < value < math.inf):
            die(f"{name} must be a positive number, not {value}")


def settings_of(cfg: PruneConfig) -> dict:
    """What a circuit depends on: all but how many processes and trials there were."""
    return {k: v for k, v in asdict(cfg).items() if k not in ("jobs", "tune")}


def path_of(cfg: PruneConfig, task: str, target: float) -> str:
    folder = os.path.join(cfg.out_dir or cfg.model, task)
    return os.path.join(folder, *([f"target_{target:g}"] if len(cfg.target_loss) > 1 else []), "circuit.json")


def finished(cfg: PruneConfig, task: str) -> list[dict] | None:
    """The circuits of a task that an earlier run with the same settings and weights has left."""
    try:
        found = [json.load(open(path_of(cfg, task, target))) for target in cfg.target_loss]
        settings = json.loads(json.dumps({**settings_of(cfg), "task": task}))
        same = all(c["settings"] == settings and c["model"]["sha256"] == hash_of(cfg.model) for c in found)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same else None


def prune_task(cfg: PruneConfig, task: str, say=partial(print, flush=True)) -> list[dict]:
    """Load, prune, write the files of one task. ValueError or OSError, in one line, where that cannot be done."""
    model, tokenizer = load(cfg.model, cfg.tokenizer, cfg.device)
    say(f"pruning {cfg.model} to the circuit of {task}; means over {cfg.mean_tokens} pretraining tokens")
    constants, circuits = constants_of(model, cfg), []
    for circuit in prune(model, TASKS[task], tokenizer, replace(cfg, task=task), constants, say):
        path = path_of(cfg, task, circuit["target_loss"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomic(path, lambda f: f.write(json.dumps(circuit).encode()))
        say(f"{task}: {circuit['n_nodes']} nodes, {circuit['n_edges']} edges\n"
            f"  loss held out {circuit['loss_heldout']:.3f} nats (target {circuit['target_loss']}, unpruned model {circuit['unpruned_loss']:.3f})\n"
            f"  necessity: with only the circuit ablated, loss {circuit['validation']['necessity']:.2f}\n"
            f"  {path}")
        circuits.append(circuit)
    return circuits


def in_processes(f: Callable, items: Iterable, jobs: int) -> list:
    """f of each item, `jobs` processes at a time. Exits with one line where the system kills one."""
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            return list(pool.map(f, items))
    except BrokenProcessPool:
        die("a process was killed, perhaps for want of memory; what was finished is kept: run it again with fewer --jobs")


def _one_of_many(cfg: PruneConfig, task: str) -> list[dict] | str:
    """What a worker process does: one thread, each line under its task's name, the reason instead of an exception."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // cfg.jobs))
    try:
        return finished(cfg, task) or prune_task(cfg, task, lambda text: print(f"[{task}] {text.strip()}", flush=True))
    except (ValueError, OSError) as e:
        return str(e)


def prune_all(cfg: PruneConfig) -> None:
    """Every task, `jobs` at a time; then one table and the geometric mean of the edges (paper 2.2)."""
    results = dict(zip(TASKS, in_processes(partial(_one_of_many, cfg), TASKS, cfg.jobs)))
    for task, reason in results.items():
        if isinstance(reason, str):
            print(f"{task}: no circuit: {reason}")
    for i, target in enumerate(cfg.target_loss):
        rows = {task: circuits[i] for task, circuits in results.items() if not isinstance(circuits, str)}
        print(f"\n| task (target {target} nats) | unpruned | circuit, held out | nodes | edges | necessity |\n|---|---|---|---|---|---|")
        for task, c in rows.items():
            print(f"| {task} | {c['unpruned_loss']:.3f} | {c['loss_heldout']:.3f} | {c['n_nodes']} | {c['n_edges']} | {c['validation']['necessity']:.2f} |")
        if rows:
            mean = math.exp(sum(math.log(max(1, c["n_edges"])) for c in rows.values()) / len(rows))
            print(f"geometric mean of edges: {mean:.1f} over {len(rows)} of {len(TASKS)} tasks")
    if all(isinstance(r, str) for r in results.values()):
        die("no task has a circuit (reasons above)")


def main(argv: list[str]) -> int:
    cfg = parse(PruneConfig, argv)
    check(cfg)
    try:
        if cfg.tune:
            from tune import tune  # it stands above this file
            tune(cfg, cfg.tune)
        elif cfg.task == "all":
            prune_all(cfg)
        else:
            prune_task(cfg, cfg.task)
    except (ValueError, OSError) as e:
        die(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
