"""Bridges: couple a sparse model to a frozen dense one, so that an edit read in the sparse model steers the dense one.

- One site before every sublayer and one after the last; at each an encoder (dense -> sparse, AbsTopK) and a decoder back.
- The sparse model learns from scratch, as in train.py, together with its bridges; the loss has five terms, each a
  function below. Checkpoints, resume, processes, log: train.py's own.
- --eval: what each bridge loses, and the loss of each hybrid pass.
- --steer: turn a circuit's nodes to what they are on the other prompt, and see the dense model change its answer: steer.py.

    python train.py  --config=configs/demo_dense.toml
    python bridge.py --config=configs/demo_bridge.toml            # or torchrun --nproc_per_node=N bridge.py ...
    python bridge.py --config=configs/demo_bridge.toml --eval
    python prune.py  --model=out/demo_bridge --task=single_double_quote
    python bridge.py --steer --task=single_double_quote --circuit=out/demo_bridge/single_double_quote/circuit.json

Paper sections 2.3, 3.3, A.3 and A.4.
"""
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuit import hash_of
from config import die, nearest, parse, write_atomic
from kernels import abstopk
from model import GPT
from tasks import TASKS
from train import Job, Run, TrainConfig, begin, check, device_of, evaluate, loop, new_model, optimizer_of, over_parts, windows

TERMS = ("nmse_encoder", "nmse_decoder", "kl_sparse", "kl_dense")  # of each site, besides the sparse model's next-token loss
HYBRIDS = ("dense_to_sparse", "sparse_to_dense")
MEASURED = ("nmse_encoder", "nmse_decoder", *HYBRIDS, "dense_from_mean")  # of each site, by `measure`


@dataclass
class BridgeConfig(TrainConfig):
    out_dir: str = "out/demo_bridge"
    dense: str = "out/demo_dense"   # a directory in the published format, of the same depth; it does not learn
    bridge_lr: float = 0.0005       # of the bridges; it follows the schedule of lr, the factor 1/sqrt(density) included
    bridge_afrac: float = 0.25      # an encoder's AbsTopK keeps this fraction
    w_nmse_encoder: float = 0.2     # weights of the loss's terms, of each site; the next-token loss has 1
    w_nmse_decoder: float = 0.2
    w_kl_sparse: float = 1.0
    w_kl_dense: float = 1.0
    bridge_rows: int = 0            # sequences of a step's batch that the terms of the sites look at; 0 = all
    recompute: bool = True          # the memory of one site's hybrid passes at a time, for one more forward pass of them
    eval: bool = False              # measure a bridged run instead of training one
    # steering
    steer: bool = False             # steer the dense model of a bridged run
    task: str = "single_double_quote"
    circuit: str = ""               # of the sparse model; "" = out_dir/task/circuit.json
    node: str = ""                  # the residual reads to turn, all of one site: 1.attn.act_in.83,1.attn.act_in.5
    channels: int = 8               # without node: at most so many, those that move the sparse model most
    pairs: int = 200                # held-out pairs; each is steered both ways
    draws: int = 16                 # random directions, and random sets of circuit nodes, to compare with
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"


class Bridges(nn.Module):
    """At site i, encoder f_i: (.., d_dense) -> (.., d_sparse) and decoder g_i: (.., d_sparse) -> (.., d_dense), with biases (A.3)."""

    def __init__(self, n_sites: int, d_dense: int, d_sparse: int, afrac: float, dense_hash: str = ""):
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(d_dense, d_sparse) for _ in range(n_sites))
        self.decoders = nn.ModuleList(nn.Linear(d_sparse, d_dense) for _ in range(n_sites))
        for layer in (*self.encoders, *self.decoders):  # small, as GPT-2's: an NMSE has its target's scale, which is small at first
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.k, self.dense_hash = max(1, int(afrac * d_sparse)), dense_hash

    def encode(self, i: int, h: Tensor) -> Tensor:
        return abstopk(self.encoders[i](h).to(h.dtype), self.k)

    def decode(self, i: int, h: Tensor) -> Tensor:
        return self.decoders[i](h).to(h.dtype)

    def get_extra_state(self) -> dict:
        return {"k": self.k, "dense": self.dense_hash}

    def set_extra_state(self, state: dict) -> None:
        if state["dense"] != self.dense_hash:
            raise ValueError("these bridges lead to another dense model (its weights differ)")
        self.k = state["k"]


# --- the loss (paper A.3) --------------------------------------------------------------------

def nmse(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's second moment: 1 for x = 0."""
    return (x - target).square().mean() / target.square().mean()


def distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, T, vocab) -> probabilities p of that shape, and their mean entropy in nats per token."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    return p, -(p * log_p).sum(-1).mean()


def kl(dense: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
    """KL(y^d || y) in nats per token: cross-entropy less the entropy of y^d, which is the same at every site. dense: the
    `distribution` of y^d; logits: (B, T, vocab). On a CPU two to three times as fast as F.kl_div."""
    p, entropy = dense
    return F.cross_entropy(logits.float().flatten(0, 1), p.flatten(0, 1)) - entropy


def streams(model: GPT, idx: Tensor) -> list[Tensor]:
    """The residual stream (B, T, d_model) at every site: before each sublayer and after the last."""
    h = [model.embed(idx)]
    for f in model.sublayers:
        again = model.config.grad_checkpointing and model.training
        h.append(checkpoint(f, h[-1], use_reentrant=False) if again else f(h[-1]))
    return h


def run_from(model: GPT, i: int, h: Tensor, idx: Tensor) -> Tensor:
    """A hybrid pass: logits (B, T, vocab) of `model` whose stream at site i is `h`."""
    return model.unembed(model.run(h, start=i), idx)


class Coupled(nn.Module):
    """The sparse model, the frozen dense model and the bridges between them."""

    def __init__(self, sparse: GPT, dense: GPT, bridges: Bridges, weights: tuple[float, ...], rows: int = 0, recompute: bool = True):
        super().__init__()
        self.sparse, self.dense, self.bridges = sparse, dense.requires_grad_(False).eval(), bridges
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self.rows, self.recompute = rows or None, recompute

    def train(self, mode: bool = True):
        super().train(mode)
        self.dense.eval()  # it stays as it is
        return self

    def site(self, i: int, dense_h: Tensor, sparse_h: Tensor, idx: Tensor, y_dense: tuple[Tensor, Tensor]) -> Tensor:
        """The four terms of site i, in the order of TERMS."""
        encoded, decoded = self.bridges.encode(i, dense_h), self.bridges.decode(i, sparse_h)
        return torch.stack([nmse(encoded, sparse_h), nmse(decoded, dense_h),
                            kl(y_dense, run_from(self.sparse, i, encoded, idx)),
                            kl(y_dense, run_from(self.dense, i, decoded, idx))])

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """-> (next-token loss in nats, terms (n_sites, 4)), and the whole loss."""
        sparse_h = streams(self.sparse, idx)
        loss = F.cross_entropy(self.sparse.unembed(sparse_h[-1], idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
        idx, sparse_h = idx[: self.rows], [h[: self.rows] for h in sparse_h]
        with torch.no_grad():
            dense_h = streams(self.dense, idx)
            y_dense = distribution(self.dense.unembed(dense_h[-1], idx))
        # Recomputed, a step holds the graph of one site's two hybrid passes at a time, whatever the number of sites (and every
        # site's stream, as the models' own passes do). It pays for that with a second forward pass of the hybrids.
        site = partial(checkpoint, self.site, use_reentrant=False) if self.recompute and self.training else self.site
        terms = torch.stack([site(i, d, s, idx, y_dense) for i, (d, s) in enumerate(zip(dense_h, sparse_h))])
        return (loss.detach(), terms.detach()), loss + (terms * self.weights).sum()


# --- training --------------------------------------------------------------------------------

def load_dense(path: str, sparse: GPT, device: str) -> GPT:
    """The dense model. ValueError where it cannot be coupled to this sparse one."""
    dense = GPT.load(path, device)
    d, s = dense.config, sparse.config
    for name in ("n_layer", "vocab_size"):
        if getattr(d, name) != getattr(s, name):
            raise ValueError(f"bridges need the same {name} on both sides: the dense model {path} has {getattr(d, name)}, the sparse one {getattr(s, name)}")
    if d.block_size < s.block_size:
        raise ValueError(f"the dense model {path} takes {d.block_size} tokens, fewer than block_size {s.block_size}")
    return dense


def couple(cfg: BridgeConfig, sparse: GPT, device: str, rows: int = 0) -> Coupled:
    """A sparse model with the dense one that the config names, and bridges from random weights. rows: see Coupled."""
    if os.path.realpath(cfg.dense) == os.path.realpath(cfg.out_dir):
        raise ValueError(f"out_dir and dense are both {cfg.dense}; the dense model must stay as it is")
    dense = load_dense(cfg.dense, sparse, device)
    bridges = Bridges(2 * sparse.config.n_layer + 1, dense.config.d_model, sparse.config.d_model, cfg.bridge_afrac, hash_of(cfg.dense))
    return Coupled(sparse, dense, bridges, tuple(getattr(cfg, f"w_{t}") for t in TERMS), rows, cfg.recompute).to(device)


def describe(seen: tuple[Tensor, Tensor]) -> dict:
    """The terms of the loss for log.jsonl, one value per site."""
    return {"next_token": seen[0].item(), **{name: [round(x, 5) for x in column.tolist()] for name, column in zip(TERMS, seen[1].T)}}


@torch.no_grad()
def measure(net: Coupled, run: Run) -> dict:
    """Per part of the validation data: the losses of both models (nats), and per site the NMSE of encoder and decoder, the
    loss of both hybrid passes, that of the dense model with its mean stream there, and how much of the loss beyond the
    dense model's own that this costs each hybrid pass recovers (1: all)."""
    net.eval()
    sites, T = range(len(net.bridges.encoders)), run.cfg.block_size
    reference, _ = windows(run.train, np.linspace(0, len(run.train) - T - 1, 64).astype(np.int64), T, run.device)
    mean = [h.mean((0, 1)) for h in streams(net.dense, reference)]

    def losses(x, y):
        loss = lambda logits: F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        d, s = streams(net.dense, x), streams(net.sparse, x)
        rows = [loss(net.sparse.unembed(s[-1], x)), loss(net.dense.unembed(d[-1], x))]
        for i in sites:
            encoded, decoded = net.bridges.encode(i, d[i]), net.bridges.decode(i, s[i])
            rows += [nmse(encoded, s[i]), nmse(decoded, d[i]), loss(run_from(net.sparse, i, encoded, x)),
                     loss(run_from(net.dense, i, decoded, x)), loss(run_from(net.dense, i, mean[i].expand_as(d[i]), x))]
        return torch.stack(rows)

    out = {}
    for part, values in over_parts(losses, 2 + len(MEASURED) * len(sites), run).items():
        m = {"sparse": values[0], "dense": values[1], **{n: values[2 + j :: len(MEASURED)] for j, n in enumerate(MEASURED)}}
        recovered = {f"recovered_{k}": [(base - x) / (base - m["dense"]) for base, x in zip(m["dense_from_mean"], m[k])] for k in HYBRIDS}
        out[part] = m | recovered
    net.train()
    return out


def table(measured: dict) -> str:
    """`measure`'s result as text."""
    rows = []
    for part, m in measured.items():
        rows += [f"{part}: dense model {m['dense']:.3f} nats, sparse model {m['sparse']:.3f}",
                 "  site   NMSE encoder  decoder   dense -> sparse: nats  recovered   sparse -> dense: nats  recovered"]
        for i, (ne, nd, ds, rds, sd, rsd) in enumerate(zip(*(m[k] for k in ("nmse_encoder", "nmse_decoder", *(n for h in HYBRIDS for n in (h, f"recovered_{h}")))))):
            rows.append(f"  {i:4}   {ne:12.3f}  {nd:7.3f}   {ds:21.3f}  {rds:9.1%}   {sd:21.3f}  {rsd:9.1%}")
    return "\n".join(rows)


def train(cfg: BridgeConfig) -> int:
    run = begin(cfg)
    if cfg.bridge_rows % (run.world * cfg.grad_accum) or cfg.bridge_rows > cfg.batch_size:
        die(f"bridge_rows {cfg.bridge_rows} must be at most batch_size and a multiple of {run.world} processes x {cfg.grad_accum} micro-steps")
    sparse = new_model(run)
    try:
        net = couple(cfg, sparse, run.device, cfg.bridge_rows // (run.world * cfg.grad_accum))
    except (ValueError, OSError) as e:
        die(str(e))
    group = dict(params=list(net.bridges.parameters()), lr_scale=cfg.bridge_lr / cfg.lr, eps=1e-8, weight_decay=0.0)

    def evaluation():
        (own, text), bridged = evaluate(sparse, run), measure(net, run)
        return {**own, "bridges": bridged}, f"{text}\n{table(bridged)}"

    return loop(run, Job(net, {"model": sparse, "bridges": net.bridges}, optimizer_of(cfg, sparse, [group]), evaluation, describe))


def load_bridged(cfg: BridgeConfig, sparse: GPT, device: str) -> Coupled:
    """A trained pair, of the sparse model of out_dir. ValueError or OSError, in one line, where it is not whole or the dense
    model is another one."""
    path = os.path.join(cfg.out_dir, "bridges.pt")
    if not os.path.exists(path):
        raise ValueError(f"{cfg.out_dir} has no bridges.pt; train it with python bridge.py --config=... first")
    net = couple(cfg, sparse, device).eval()
    try:
        net.bridges.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:  # torch.load raises many kinds on a truncated or foreign file
        raise ValueError(f"{path} does not fit {cfg.out_dir} and {cfg.dense}, or is truncated: {str(e).splitlines()[0]}") from e
    return net


def evaluate_run(cfg: BridgeConfig) -> None:
    """Print the table of a trained pair, and write it to out_dir/bridges.json."""
    device = device_of(cfg)
    net = load_bridged(cfg, GPT.load(cfg.out_dir, device).requires_grad_(False), device)
    measured = measure(net, begin(replace(cfg, block_size=net.sparse.config.block_size)))
    write_atomic(os.path.join(cfg.out_dir, "bridges.json"), lambda f: f.write(json.dumps(measured).encode()))
    print(f"{table(measured)}\n{cfg.out_dir}/bridges.json")


# --- the command -----------------------------------------------------------------------------

def check_bridge(cfg: BridgeConfig) -> None:
    if cfg.task not in TASKS:
        die(f"unknown task '{cfg.task}'; the nearest is '{nearest(cfg.task, TASKS)}'")
    for name, least in (("channels", 1), ("pairs", 1), ("draws", 1), ("bridge_rows", 0), *((f"w_{t}", 0) for t in TERMS)):
        if not least <= getattr(cfg, name) < math.inf:
            die(f"{name} must be at least {least}, not {getattr(cfg, name)}")
    if not 0 < cfg.bridge_afrac <= 1 or not 0 < cfg.bridge_lr < math.inf:
        die(f"bridge_afrac must lie in (0, 1] and bridge_lr be positive, not {cfg.bridge_afrac} and {cfg.bridge_lr}")


def main(argv: list[str]) -> int:
    cfg = parse(BridgeConfig, argv)
    check_bridge(cfg)
    if not (cfg.eval or cfg.steer):
        return train(cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        die("--eval and --steer are for one process; call python bridge.py")
    check(cfg, 1)
    try:
        if cfg.steer:
            from steer import steer  # it stands above this file
            steer(cfg, argv)
        else:
            evaluate_run(cfg)
    except (ValueError, OSError) as e:
        die(str(e))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
