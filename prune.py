"""Find the smallest circuit of a model that still does a task, and write it to circuit.json.

- Means of every node over pretraining data; nodes outside the circuit are held at their mean.
- Learned node masks: a gate per node, Heaviside forward, sigmoid slope backward (paper A.5).
- Discretise: rank the nodes, bisect for the fewest that meet the target loss, drop nodes without a
  path from the tokens to the logits, fit a scale and a shift of the answer logits; then leave out
  single nodes for as long as the target is met.
- Validate on held-out pairs: sufficient (all else ablated) and necessary (only the circuit ablated).

    python prune.py --model=out/demo --task=single_double_quote
"""
import difflib
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from circuit import Nodes, ablate, count, drop_unconnected, edges_of, last_logits, margins
from config import die, parse, write_atomic
from data.tinypython.tokenizer import load_tokenizer
from model import GPT
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
    seed: int = 0
    target_loss: float = 0.15       # nats
    ablation: str = "mean"          # mean | zero: what a node outside the circuit is held at
    trim: bool = True               # after the bisection, leave out single nodes while the target is met
    tie_qk: bool = False            # one gate for a query channel and the key channel that it meets
    mean_tokens: int = 65536
    train_pairs: int = 2048         # mask learning draws from these
    fit_pairs: int = 256            # of those, the pairs that discretising and calibrating look at
    heldout_pairs: int = 256
    # mask learning (the names are paper A.5's; k_coef, lr and steps are set for small models)
    steps: int = 300
    batch_pairs: int = 32
    lr: float = 0.01
    k_coef: float = 0.001           # nats per open gate
    init_noise_scale: float = 0.01
    init_noise_bias: float = 0.1
    weight_decay: float = 0.001
    beta2: float = 0.95
    warmup: float = 0.05
    heaviside_temp: float = 1.0
    grad_clip: float = 1.0


# --- losses, calibration, means --------------------------------------------------------------

def loss_of(margin: Tensor) -> float:
    """Task loss in nats from `margins`."""
    return F.softplus(-margin).mean().item()


def _sign(margin: Tensor) -> Tensor:
    """+1 where the first answer is right, -1 where the second is: prompts of a pair alternate."""
    return 1.0 - 2.0 * (torch.arange(len(margin), device=margin.device) % 2)


def calibrated(margin: Tensor, scale: float, shift: float) -> Tensor:
    """The margins after scaling and shifting (first answer's - second answer's logit)."""
    return scale * margin + shift * _sign(margin)


def calibrate(margin: Tensor, steps: int = 16) -> tuple[float, float]:
    """The scale and shift that minimise the task loss, by L-BFGS (paper A.5)."""
    fit = torch.tensor([1.0, 0.0], device=margin.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([fit], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        # where the prompts are separable the best scale is infinite; the small pull keeps it finite
        loss = F.softplus(-calibrated(margin, fit[0], fit[1])).mean() + 1e-4 * (fit[0] - 1) ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    scale, shift = fit.detach().tolist()
    return (scale, shift) if math.isfinite(scale + shift) else (1.0, 0.0)


@torch.no_grad()
def node_means(model: GPT, path: str, tokens: int, seed: int) -> Nodes:
    """Mean activation of every node over `tokens` tokens of the uint16 file `path` (paper A.5).

    ValueError if the file is no such data for this model; OSError if it is missing.
    """
    T, size = model.config.block_size, os.path.getsize(path)
    if size % 2 or size < 2 * T:
        raise ValueError(f"{path} has {size} bytes: not whole uint16 tokens, or fewer than one block of {T}; prepare the data again")
    data = np.memmap(path, dtype="<u2", mode="r")
    if data.max() >= model.config.vocab_size:
        raise ValueError(f"{path} holds token id {data.max()}, past the model's vocabulary of {model.config.vocab_size}")
    starts = np.random.default_rng(seed).integers(0, len(data) - T + 1, max(1, tokens // T))
    sums = {}

    def add(site, x):
        sums[site] = sums.get(site, 0) + x.double().sum((0, 1))
        return x

    device = model.lm_head.weight.device
    for i in range(0, len(starts), 32):
        rows = np.stack([data[s : s + T] for s in starts[i : i + 32]]).astype(np.int64)
        model.run(model.embed(torch.from_numpy(rows).to(device)), nodes=add)
    return {site: (sums[site] / (len(starts) * T)).float() for site in model.sites}


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
    """Minimise task loss + k_coef * open gates over tau (paper A.5). Returns tau per node, in [-1, 1].

    Nodes without a path from tokens to answers are ablated while learning too (our choice): they are
    dropped in the end, and as constants that differ from their mean they would be missed.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(gates.n_parameters, generator=generator) * cfg.init_noise_scale + cfg.init_noise_bias
    tau = noise.clamp(-1, 1).to(gates.index.device).requires_grad_()
    optimizer = torch.optim.AdamW([tau], lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    answers = (int(pairs.answer[0]), int(pairs.wrong[0]))
    clock = time.time()
    for step in range(cfg.steps):
        ramp = min(1.0, (step + 1) / max(1.0, cfg.warmup * cfg.steps))
        optimizer.param_groups[0]["lr"] = cfg.lr * ramp * (1 - step / cfg.steps)
        batch = pairs.take(torch.randint(len(pairs), (cfg.batch_pairs,), generator=generator).to(pairs.ids.device))
        gate = _Heaviside.apply(tau, cfg.heaviside_temp)[gates.index]
        with torch.no_grad():  # an open gate without a path counts as closed, but still hears its gradient
            path = drop_unconnected(model, gates.split(gate > 0), answers)
            astray = gate * ~torch.cat(list(path.values()))
        gate = gate - astray
        loss = task_loss(last_logits(model, batch, ablate(gates.split(gate), constants)), batch)
        (loss + cfg.k_coef * gate.sum()).backward()
        torch.nn.utils.clip_grad_norm_([tau], cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            tau.clamp_(-1, 1)
        if (step + 1) % 25 == 0:
            left = (time.time() - clock) / (step + 1) * (cfg.steps - step - 1)
            say(f"  masks {step + 1}/{cfg.steps}  task loss {loss.item():.3f}  open gates {int(gate.sum())}  {left:.0f} s left")
    return tau.detach()[gates.index]


def attribution(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates) -> Tensor:
    """|gradient x (activation - constant)| of the task loss, summed over prompts and positions, per node.

    It is the first-order effect of ablating the node, and breaks ties between equal taus.
    """
    gate = torch.ones(len(gates.index), device=gates.index.device, requires_grad=True)
    loss = task_loss(last_logits(model, pairs, ablate(gates.split(gate), constants)), pairs)
    return torch.autograd.grad(loss, gate)[0].abs()


@dataclass
class Circuit:
    """A set of nodes, the calibration of its answer logits, and its loss (nats) on the pairs it was fitted to."""
    mask: Nodes
    scale: float
    shift: float
    loss: float


def fit(model: GPT, mask: Nodes, constants: Nodes, pairs: Pairs) -> Circuit:
    """Drop the nodes without a path, then calibrate on `pairs`."""
    mask = drop_unconnected(model, mask, (int(pairs.answer[0]), int(pairs.wrong[0])))
    margin = margins(model, pairs, ablate(mask, constants))
    scale, shift = calibrate(margin)
    return Circuit(mask, scale, shift, loss_of(calibrated(margin, scale, shift)))


def discretise(model: GPT, order: Tensor, n_open: int, gates: Gates, constants: Nodes, pairs: Pairs, target: float) -> Circuit:
    """The fewest leading nodes of `order` that meet `target` once calibrated, by bisection from above.

    It starts from the `n_open` nodes whose gate is open, and from all nodes only where those do not
    do: the loss is not monotone in the number of nodes, and between the two it can be worse.
    Calibration is part of the test (the paper fits it afterwards), because the calibrated loss is
    the one that is reported. ValueError if not even all nodes meet the target.
    """
    def leading(k):
        flat = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        flat[order[:k]] = True
        return fit(model, gates.split(flat), constants, pairs)

    low, high = 0, n_open
    best = leading(high)
    if not best.loss <= target:
        low, high = n_open, len(order)
        best = leading(high)
    if not best.loss <= target:
        raise ValueError(f"even all nodes reach only {best.loss:.3f} nats, above the target {target:.3f}")
    while high - low > 1:  # `high` meets the target, always
        middle = (low + high) // 2
        trial = leading(middle)
        if trial.loss <= target:
            high, best = middle, trial
        else:
            low = middle
    return best


def trim(model: GPT, circuit: Circuit, order: Tensor, gates: Gates, constants: Nodes, pairs: Pairs, target: float) -> Circuit:
    """Leave out one node after the other, the last of `order` first, where the target is still met.

    Passes repeat until one removes nothing. The authors removed such leftovers by hand (paper A.5).
    """
    before = math.inf
    while count(circuit.mask) < before:
        before = count(circuit.mask)
        for i in order.flip(0).tolist():
            flat = torch.cat(list(circuit.mask.values()))
            if flat[i]:
                flat[i] = False
                trial = fit(model, gates.split(flat), constants, pairs)
                if trial.loss <= target:
                    circuit = trial
    return circuit


# --- the circuit file ------------------------------------------------------------------------

def prune(model: GPT, task: Task, tokenizer, cfg: PruneConfig, constants: Nodes, say=print) -> dict:
    """All of the above for one task: the content of circuit.json. ValueError if the model fails the task."""
    T, device = model.config.block_size, model.lm_head.weight.device
    train = load_pairs(task, tokenizer, cfg.train_pairs, "train", T, cfg.seed).to(device)
    heldout = load_pairs(task, tokenizer, cfg.heldout_pairs, "heldout", T, cfg.seed).to(device)
    fit_pairs = train.take(torch.arange(cfg.fit_pairs, device=device))
    unpruned = margins(model, heldout)
    at_best = loss_of(calibrated(unpruned, *calibrate(margins(model, fit_pairs))))  # as its circuits are
    if not min(at_best, loss_of(unpruned)) <= cfg.target_loss:  # nor is NaN a solution
        raise ValueError(f"the unpruned model does not solve {task.name}: loss {loss_of(unpruned):.3f} nats held out "
                         f"({at_best:.3f} calibrated), target {cfg.target_loss}; train longer, or raise --target_loss")
    gates = Gates(model, cfg.tie_qk)
    tau = learn_masks(model, train, constants, gates, cfg, say)
    ties = attribution(model, fit_pairs, constants, gates)
    order = torch.from_numpy(np.lexsort((-ties.cpu().numpy(), -tau.cpu().numpy()))).to(device)
    target = SLACK * cfg.target_loss
    circuit = discretise(model, order, int((tau > 0).sum()), gates, constants, fit_pairs, target)
    say(f"  {count(circuit.mask)} nodes meet the target" + ("; leaving out one after the other" if cfg.trim else ""))
    if cfg.trim:
        circuit = trim(model, circuit, order, gates, constants, fit_pairs, target)
    mask = circuit.mask
    kept = calibrated(margins(model, heldout, ablate(mask, constants)), circuit.scale, circuit.shift)
    inverse = margins(model, heldout, ablate({s: ~m for s, m in mask.items()}, constants))
    edges = edges_of(model, mask)
    return {
        "format": "sparse-circuit-1",
        "model": {"dir": cfg.model, "sha256": hash_of(cfg.model), **{k: getattr(model.config, k) for k in
                  ("n_layer", "d_model", "n_head", "d_head", "d_mlp")}},
        "task": task.name, "task_description": task.description, "answers": list(task.answers),
        "target_loss": cfg.target_loss, "loss": circuit.loss, "loss_heldout": loss_of(kept),
        "unpruned_loss": loss_of(unpruned), "ablation": cfg.ablation,
        "logit_scale": circuit.scale, "logit_shift": circuit.shift,
        "nodes": {s: m.nonzero().flatten().tolist() for s, m in mask.items() if m.any()},
        "edges": edges, **stream_ends(model, mask, heldout, tokenizer),
        "means": {s: [round(x, 6) for x in c.tolist()] for s, c in constants.items()},
        "n_nodes": count(mask), "n_edges": len(edges),
        "validation": {
            "sufficiency": loss_of(kept), "sufficiency_accuracy": (kept > 0).float().mean().item(),
            "necessity": loss_of(inverse), "necessity_accuracy": (inverse > 0).float().mean().item(),
            "heldout_pairs": len(heldout)},
        "examples": examples(model, mask, constants, heldout, kept, unpruned, tokenizer),
        "seed": cfg.seed, "settings": asdict(cfg),
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


def hash_of(directory: str) -> str:
    with open(os.path.join(directory, "final_model.pt"), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- the command -----------------------------------------------------------------------------

def check(cfg: PruneConfig) -> None:
    if cfg.task != "all" and cfg.task not in TASKS:
        near = difflib.get_close_matches(cfg.task, TASKS, n=1, cutoff=0)[0]
        die(f"unknown task '{cfg.task}'; the nearest is '{near}', and --task=all runs all of: {', '.join(TASKS)}")
    if cfg.device not in ("cpu", "cuda") or cfg.device == "cuda" and not torch.cuda.is_available():
        die(f"device must be cpu, or cuda where PyTorch sees one, not '{cfg.device}'")
    if cfg.ablation not in ("mean", "zero"):
        die(f"ablation must be mean or zero, not '{cfg.ablation}'")
    for name in ("mean_tokens", "train_pairs", "fit_pairs", "heldout_pairs", "steps", "batch_pairs"):
        if getattr(cfg, name) < 1:
            die(f"{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.fit_pairs > cfg.train_pairs:
        die(f"fit_pairs {cfg.fit_pairs} exceeds train_pairs {cfg.train_pairs}")
    for name in ("target_loss", "lr", "heaviside_temp", "grad_clip"):
        if not 0 < getattr(cfg, name) < math.inf:
            die(f"{name} must be a positive number, not {getattr(cfg, name)}")


def main(argv: list[str]) -> int:
    cfg = parse(PruneConfig, argv)
    check(cfg)
    try:
        model = GPT.load(cfg.model, cfg.device).requires_grad_(False)
        tokenizer = load_tokenizer(cfg.tokenizer)
        if tokenizer.n_vocab != model.config.vocab_size:
            raise ValueError(f"{cfg.tokenizer} has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}")
        print(f"means over {cfg.mean_tokens} pretraining tokens", flush=True)
        constants = node_means(model, os.path.join(cfg.data, "train.bin"), cfg.mean_tokens, cfg.seed)
    except (ValueError, OSError) as e:
        die(str(e))
    if cfg.ablation == "zero":
        constants = {site: torch.zeros_like(c) for site, c in constants.items()}
    failed = []
    for task in [TASKS[cfg.task]] if cfg.task != "all" else TASKS.values():
        folder = os.path.join(cfg.out_dir or cfg.model, task.name)
        print(f"pruning {cfg.model} to the circuit of {task.name}", flush=True)
        try:
            circuit = prune(model, task, tokenizer, cfg, constants, partial(print, flush=True))
            os.makedirs(folder, exist_ok=True)
            write_atomic(os.path.join(folder, "circuit.json"), lambda f: f.write(json.dumps(circuit).encode()))
        except (ValueError, OSError) as e:
            if cfg.task != "all":
                die(str(e))
            print(f"{e}")
            failed.append(task.name)
            continue
        print(f"{task.name}: {circuit['n_nodes']} nodes, {circuit['n_edges']} edges\n"
              f"  loss held out {circuit['loss_heldout']:.3f} nats (target {cfg.target_loss}, unpruned model {circuit['unpruned_loss']:.3f})\n"
              f"  necessity: with only the circuit ablated, loss {circuit['validation']['necessity']:.2f}\n"
              f"  {folder}/circuit.json", flush=True)
    if failed:
        die(f"no circuit for {', '.join(failed)} (reasons above)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
