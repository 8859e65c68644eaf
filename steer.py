"""Steer a dense model by nodes of a circuit of the sparse model that it is bridged to.

- The nodes, residual reads of one site, take the values that they have on the other prompt of a
  pair. What that changes goes through the bridge's decoder into the dense model's read at the same
  place, at strengths from 0 to 1.
- --edit=stream: not what one sublayer reads is changed but the stream before it, for all that read
  it from there on. In a deep dense model no single read need decide anything (docs/bridges.md).
- Which nodes: named by hand (--node), or those whose change moves the sparse model's own answer
  most, on training pairs; and, for itself, the single one that moves the dense model most.
- To compare with: random directions of the same size, random nodes of the circuit, and the mean
  difference of the dense model's own activations.

    python steer.py --run=out/demo_bridge --task=single_double_quote

Writes RUN/steer/TASK/steer.json and, with matplotlib, steer.png. Paper sections 3.3 and A.4.
"""
import json
import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, nearest, one_of, parse, read_toml, write_atomic

import torch
import torch.nn.functional as F
from torch import Tensor

from circuit_file import circuit_of, read_circuit
from coupled import Coupled, load_bridged, streams
from model import GPT, device_of
from model_files import weights_hash
from tasks import Pairs, Task, last_logits, load_model, load_pairs, margin_of, task_of
from tokens import random_windows, window_of

STRENGTHS = [round(0.1 * i, 1) for i in range(11)]  # 1 = the whole of what the decoder says
TRIED = 2  # times the channels that are chosen at most: so many are tried with others
COMPARED = ("steered", "random", "random_node", "dense_mean_difference")  # keys of steer.json
STREAMS = ("resid_in", "resid_mid")  # before attention, before the MLP: as in model.py's table
# A site is a residual read, 1.attn.act_in, or a stream, 1.resid_in.
Node = tuple[str, int]     # site and channel
Reads = dict[str, Tensor]  # site -> what is read there (2n, T, d_model)


@dataclass
class SteerConfig:
    run: str = "out/demo_bridge"  # of bridge.py
    dense: str = ""               # the dense model's directory; "" = the one that the run names
    data: str = "data/tinypython"
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("auto", "cpu", "cuda")
    task: str = "single_double_quote"  # or a file of pairs: .jsonl, .csv
    circuit: str = ""             # of the sparse model; "" = run/task/circuit.json
    edit: str = one_of("read", "stream")  # of one sublayer (the paper's), or of all from there on
    node: str = ""                # of one site, 1.attn.act_in.83,1.attn.act_in.5; or chosen
    channels: int = bounded(8, at_least=1)  # so many are chosen at most
    # and one more only where it brings at least this share of the way to the other prompt's answer:
    # what little others add to the answer, they would add to the size of the intervention
    gain: float = bounded(0.05, at_least=0)
    pairs: int = bounded(200, at_least=1)   # held-out pairs; each is steered both ways
    draws: int = bounded(16, at_least=1)    # random directions, and random sets of circuit nodes
    seed: int = bounded(0, at_least=0)


# --- the intervention (paper A.4) ------------------------------------------------------------

def site_index(site: str) -> int:
    """0.attn.act_in -> 0, 0.mlp.act_in -> 1, 1.resid_in -> 2, ...: the bridge at that place."""
    layer, place = site.split(".", 1)
    return 2 * int(layer) + (place in ("mlp.act_in", "resid_mid"))


def norm_before(model: GPT, site: str) -> Tensor:
    """The gain (d_model,) of the norm whose output the site reads."""
    block = model.transformer.h[site_index(site) // 2]
    return (block.ln_1 if ".attn." in site else block.ln_2).weight


@torch.no_grad()
def reads(model: GPT, pairs: Pairs, sites: Iterable[str]) -> Reads:
    """What the model reads at these sites: of a stream, the stream itself."""
    wanted = set(sites)
    seen = {}  # not by `record`: all sites together are many times as large

    def keep(at: str, x: Tensor) -> Tensor:
        if at in wanted:
            # positions beside it are not of the stream
            seen[at] = x[..., : model.config.d_model]
        return x

    model.run(model.embed(pairs.ids), nodes=keep)
    return seen


def toward_other(x: Tensor) -> Tensor:
    """Counterfactual minus presented activation (2n, T, ..): the rows of a pair alternate."""
    other = torch.arange(len(x), device=x.device) ^ 1  # 1, 0, 3, 2, ...
    return x[other] - x


@torch.no_grad()
def rms_ratio(net: Coupled, path: str, n_tokens: int = 16384, window: int = 0) -> list[float]:
    """RMS of the sparse model's stream over the dense one's, per site, on random windows of a file
    of tokens. window: their tokens, 0 = as many as the sparse model takes."""
    c = net.sparse.config
    window = window or c.block_size
    squares = torch.zeros(2, len(net.bridges.encoders), dtype=torch.double)  # sums; sparse, dense
    for ids in random_windows(path, c.vocab_size, window, n_tokens, 0, net.weights.device):
        for side, model in enumerate((net.sparse, net.dense)):
            # weighed by its rows: the last batch may be smaller
            means = [h.square().mean().item() * len(ids) for h in streams(model, ids)]
            squares[side] += torch.tensor(means)
    return (squares[0] / squares[1]).sqrt().tolist()


def perturbation(net: Coupled, site: str, channels: list, delta: Tensor, ratio: float) -> Tensor:
    """What the change `delta` (2n, T, d_sparse) of these channels of a post-norm read of the sparse
    model is in the dense model's post-norm read there, (2n, T, d_dense)."""
    # The bridge joins streams, and a read is the stream over its RMS, times a gain. So the sparse
    # norm's gain is undone, the decoder applied, the RMS of the one stream put in place of the
    # other's, and the dense norm's gain done.
    gain = norm_before(net.sparse, site)[channels]
    normalised = delta[..., channels] / torch.where(gain == 0, 1.0, gain)  # where 0, delta is 0
    rows = net.bridges.decoders[site_index(site)].weight.T[channels]  # (channels, d_dense)
    return normalised @ rows * ratio * norm_before(net.dense, site)


def from_other(net: Coupled, nodes: list[Node], seen: Reads, ratio: list[float]) -> Tensor:
    """What is to be added at the nodes' site to the dense model (2n, T, d_dense) where the nodes,
    all of that site, take their values on the other prompt. seen: the sparse model's `reads`."""
    site = nodes[0][0]
    channels = [c for _, c in nodes]
    delta = toward_other(seen[site])
    if site.endswith("act_in"):
        return perturbation(net, site, channels, delta, ratio[site_index(site)])
    rows = net.bridges.decoders[site_index(site)].weight.T[channels]  # (channels, d_dense)
    return delta[..., channels] @ rows  # from stream to stream, as the decoder was trained


@torch.no_grad()
def changed(model: GPT, pairs: Pairs, site: str, change: Tensor) -> Tensor:
    """Last logits (2n, vocab) of a model to which is added, at `site`, `change` (2n, T, d)."""
    def add(at: str, x: Tensor) -> Tensor:
        if at != site:
            return x
        return x + F.pad(change, (0, x.shape[-1] - change.shape[-1]))  # nothing to positions

    return last_logits(model, pairs, add)


def log_odds(model: GPT, pairs: Pairs, site: str, change: Tensor) -> float:
    """Mean logit of the other answer less that of the prompt's own, of the model so changed."""
    return -margin_of(changed(model, pairs, site, change), pairs).mean().item()


def steered(model: GPT, pairs: Pairs, site: str, change: Tensor, strengths=STRENGTHS) -> Tensor:
    """(strengths, 2n, 2): P of the other answer, between the two answers and among all tokens."""
    rows = torch.arange(len(pairs.ids), device=pairs.ids.device)
    out = []
    for strength in strengths:
        logits = changed(model, pairs, site, strength * change)
        between = torch.sigmoid(-margin_of(logits, pairs))
        absolute = logits.softmax(-1)[rows, pairs.wrong]
        out.append(torch.stack([between, absolute], -1))
    return torch.stack(out)


# --- which nodes -----------------------------------------------------------------------------

def choose(net: Coupled, candidates: list[Node], pairs: Pairs, most: int, ratio: list[float],
           gain: float = SteerConfig.gain) -> list[Node]:
    """At most `most` of the candidates, all of one site: of the nodes that `choose_at` takes at
    each site those that move the dense model most: where it, too, still needs to be told."""
    seen = reads(net.sparse, pairs, {site for site, _ in candidates})
    best = (-math.inf, [])  # how far the dense model goes, and by which nodes
    for site in dict.fromkeys(s for s, _ in candidates):
        channels = [c for s, c in candidates if s == site]
        delta = toward_other(seen[site])
        chosen = choose_at(net.sparse, site, channels, pairs, most, delta, gain)
        nodes = [(site, c) for c in chosen]
        told = log_odds(net.dense, pairs, site, from_other(net, nodes, seen, ratio))
        best = max(best, (told, nodes))
    return best[1]


def choose_at(model: GPT, site: str, channels: list[int], pairs: Pairs, most: int, delta: Tensor,
              gain: float) -> list[int]:
    """One channel after the other, each time the one that moves the model's own answer most when it
    takes its value on the other prompt (by `delta`), until none brings the share `gain` of the way
    to the other prompt's answer."""
    def moved(channels: list[int]) -> float:
        change = torch.zeros_like(delta)
        change[..., channels] = delta[..., channels]
        return log_odds(model, pairs, site, change)

    # twice: the other prompt's answer is as far beyond 0
    least = 2 * gain * abs(moved([]))
    # of a hundred channels most do nothing: the best few alone are tried together
    alone = {c: moved([c]) for c in channels}
    left = sorted(channels, key=alone.get, reverse=True)[: TRIED * most]
    reached, first = max((alone[c], c) for c in left)
    chosen = [first]
    left.remove(first)
    while left and len(chosen) < most:
        score, c = max((moved(chosen + [c]), c) for c in left)
        if score < reached + least:
            break
        reached = score
        chosen.append(c)
        left.remove(c)
    return chosen


def best_single(net: Coupled, candidates: list[Node], pairs: Pairs, ratio: list[float]) -> Node:
    """The one node of any site that moves the dense model most, on training pairs."""
    seen = reads(net.sparse, pairs, {site for site, _ in candidates})

    def told(node: Node) -> float:
        return log_odds(net.dense, pairs, node[0], from_other(net, [node], seen, ratio))

    return max(candidates, key=told)


def chosen_by_hand(names: str, candidates: list[Node]) -> list[Node]:
    """--node as (site, channel); ValueError where it names none of the candidates, or some of
    several sites."""
    by_name = {f"{s}.{c}": (s, c) for s, c in candidates}
    nodes = []
    for name in dict.fromkeys(names.split(",")):
        if name not in by_name:
            raise ValueError(f"'{name}' is no channel that the circuit reads; the nearest is "
                             f"'{nearest(name, by_name)}'")
        nodes.append(by_name[name])
    if len({site for site, _ in nodes}) > 1:
        raise ValueError(f"the nodes must be of one site, not {names}")
    return nodes


def not_among(candidates: list[Node], nodes: list[Node]) -> list[Node]:
    """What random nodes are drawn from: candidates that are none of `nodes`, nor one of their
    channels elsewhere in the stream, where it holds much the same."""
    channels = {c for site, c in nodes if not site.endswith("act_in")}
    return [node for node in candidates if node not in nodes and node[1] not in channels]


# --- steering, and what to compare it with ---------------------------------------------------

def places(pairs: Pairs) -> list[Tensor]:
    """Masks (2n, T): of the tokens that differ between the two prompts and of those after them;
    each in the pairs' first prompts, then in their second ones."""
    rows = torch.arange(len(pairs.ids), device=pairs.ids.device)
    at = torch.arange(pairs.ids.shape[1], device=pairs.ids.device)
    differs = pairs.ids != pairs.ids[rows ^ 1]
    # before the first difference the activations of a causal model are the same
    after = (differs.cumsum(1) > 0) & ~differs & (at <= pairs.last[:, None])
    first = (rows % 2 == 0)[:, None]
    return [differs & first, differs & ~first, after & first, after & ~first]


def mean_difference(x: Tensor, train: Pairs, pairs: Pairs) -> Tensor:
    """The mean change toward the other prompt of a read `x` on the pairs `train`, one vector for
    each of the `places`, laid out for `pairs`: (2n, T, d)."""
    delta = toward_other(x)
    out = x.new_zeros(*pairs.ids.shape, x.shape[-1])
    for known, at in zip(places(train), places(pairs)):
        if known.any():  # else there is no mean; nothing is added there
            out[at] = delta[known].mean(0)
    return out


def curve(p: Tensor) -> dict:
    """(strengths, prompts) -> mean and quartiles per strength."""
    quarters = torch.tensor([0.25, 0.75], dtype=p.dtype, device=p.device)
    q25, q75 = p.quantile(quarters, dim=1)  # each (strengths,)
    return {"mean": p.mean(1).tolist(), "q25": q25.tolist(), "q75": q75.tolist()}


def curves(p: dict[str, Tensor | None], rows: slice) -> dict:
    """The `curve` of each result of `steered`, over some prompts; "absolute": among all tokens."""
    between = {k: curve(v[:, rows, 0]) if v is not None else None for k, v in p.items()}
    absolute = {k: curve(v[:, rows, 1]) if v is not None else None for k, v in p.items()}
    return between | {"absolute": absolute}


def compare(net: Coupled, nodes: list[Node], others: list[Node], train: Pairs, pairs: Pairs,
            ratio: list[float], cfg: SteerConfig) -> dict:
    """Steer `pairs` by `nodes`, all of one site, and by what to compare them with: random
    directions of the same size, as many random nodes out of `others`, and the mean difference of
    the dense model's own reads of `train` at that site."""
    generator = torch.Generator().manual_seed(cfg.seed)  # on the CPU: the same draws on a GPU
    site = nodes[0][0]
    sites = {site, *(s for s, _ in others)}
    random = []
    random_node = []
    for draw in range(cfg.draws):
        part = pairs
        if len(pairs) >= 4:  # each draw is of a quarter of the pairs, in turn
            part = pairs.take(torch.arange(draw % 4, len(pairs), 4, device=pairs.ids.device))
        # one direction a draw; at every position as long as our change is there
        direction = F.normalize(torch.randn(net.dense.config.d_model, generator=generator), dim=0)
        seen = reads(net.sparse, part, sites)
        size = from_other(net, nodes, seen, ratio).norm(dim=-1, keepdim=True)
        random.append(steered(net.dense, part, site, size * direction.to(size.device)))
        if others:  # the site of a random node, and as many nodes there as we have
            theirs = others[int(torch.randint(len(others), (1,), generator=generator))][0]
            pool = [node for node in others if node[0] == theirs]
            order = torch.randperm(len(pool), generator=generator)[: len(nodes)].tolist()
            change = from_other(net, [pool[i] for i in order], seen, ratio)
            random_node.append(steered(net.dense, part, theirs, change))

    ours = from_other(net, nodes, reads(net.sparse, pairs, {site}), ratio)
    difference = mean_difference(reads(net.dense, train, {site})[site], train, pairs)
    p = {
        "steered": steered(net.dense, pairs, site, ours),
        "random": torch.cat(random, 1),
        "random_node": torch.cat(random_node, 1) if others else None,
        "dense_mean_difference": steered(net.dense, pairs, site, difference),
    }
    return {
        "nodes": [f"{s}.{c}" for s, c in nodes],
        **curves(p, slice(None)),
        # the prompts whose own answer is the task's first, and its second
        "from_first": curves(p, slice(0, None, 2)),
        "from_second": curves(p, slice(1, None, 2)),
    }


# --- the command -----------------------------------------------------------------------------

def circuit_for(cfg: SteerConfig, task: Task, sparse: GPT) -> tuple[str, list[Node]]:
    """The path of the circuit, and the residual reads that it names. ValueError where it is not one
    of this run and task, or has none."""
    path = cfg.circuit or os.path.join(cfg.run, task.name, "circuit.json")
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}; find it with python prune.py --model={cfg.run} "
                         f"--task={cfg.task}")
    content = read_circuit(path)
    if content["task"] != task.name:
        raise ValueError(f"{path} is a circuit of {content['task']}, not of {task.name}")
    pairs = content.get("task_file") or {}
    if pairs.get("sha256") != (task.file.sha256 if task.file else None):
        raise ValueError(f"{path} is a circuit of other pairs than those of {cfg.task}; prune them")
    if content["model"].get("sha256") != weights_hash(cfg.run):
        raise ValueError(f"{path} is a circuit of another model than {cfg.run} (the weights "
                         "differ); prune this one")
    try:
        circuit_of(content, sparse)  # for its checks of names and weights
    except (ValueError, TypeError, IndexError) as e:
        raise ValueError(f"{path}: {e}") from e

    candidates = []
    for site, channels in content["nodes"].items():
        if site.endswith("act_in"):  # less the positions beside the stream, which no bridge carries
            candidates += [(site, c) for c in channels if c < sparse.config.d_model]
    if not candidates:
        raise ValueError(f"{path} has no residual reads to steer by")
    if cfg.edit == "stream":
        # The dense model may want to be told before the sparse circuit reads, or after.
        channels = sorted({c for _, c in candidates})
        layers = range(sparse.config.n_layer)
        sites = [f"{i}.{stream}" for i in layers for stream in STREAMS]
        candidates = [(site, c) for site in sites for c in channels]
    return path, candidates


def steer(cfg: SteerConfig, argv: list[str]) -> dict:
    """Choose nodes and steer: the content of steer.json. ValueError or OSError, in one line, where
    run, circuit, task and data do not fit each other."""
    task = task_of(cfg.task)
    device = device_of(cfg.device)
    sparse, tokenizer = load_model(cfg.run, cfg.tokenizer, device)
    path, candidates = circuit_for(cfg, task, sparse)
    dense_dir = cfg.dense or read_toml(os.path.join(cfg.run, "train.toml")).get("dense", "")
    net = load_bridged(cfg.run, dense_dir, sparse, device)
    if cfg.edit == "read" and not (sparse.config.rms_norm and net.dense.config.rms_norm):
        raise ValueError("a LayerNorm's read is not the stream times a gain, and only a stream can "
                         "be steered; give --edit=stream")

    # Nodes are chosen on training pairs and judged on held-out ones; 32 are enough to rank reads.
    T = sparse.config.block_size
    train = load_pairs(task, tokenizer, 32, "train", T, cfg.seed).to(device)
    pairs = load_pairs(task, tokenizer, cfg.pairs, "heldout", T, cfg.seed).to(device)
    for part in (train, pairs):
        if (part.last[::2] != part.last[1::2]).any():
            raise ValueError(f"the two prompts of a pair of {task.name} differ in length: "
                             "activations cannot be exchanged token by token")

    by_hand = chosen_by_hand(cfg.node, candidates) if cfg.node else []
    ratio = []  # of use to reads alone
    if cfg.edit == "read":
        ratio = rms_ratio(net, os.path.join(cfg.data, "train.bin"), window=window_of(cfg.run, T))
    nodes = by_hand or choose(net, candidates, train, cfg.channels, ratio, cfg.gain)
    single = best_single(net, by_hand or candidates, train, ratio)
    print(f"steering {dense_dir} by {len(nodes)} nodes of {path}, {len(pairs)} held-out pairs, "
          "both ways")

    others = not_among(candidates, nodes)
    rest = not_among(candidates, [single])
    return {
        "task": task.name, "n_pairs": len(pairs), "strength": STRENGTHS,
        **compare(net, nodes, others, train, pairs, ratio, cfg),
        "best_single": compare(net, [single], rest, train, pairs, ratio, cfg),
        "circuit": path, "dense": dense_dir,
        "commands": [shlex.join(["python", "steer.py", *argv])], "seed": cfg.seed,
    }


def curve_text(r: dict) -> str:
    """The means of what `compare` returned, as a table."""
    lines = [f"{', '.join(r['nodes'])}: P(the other prompt's answer, between the two), mean",
             "  strength   steered   random direction   random node   dense mean difference"
             "   steered, among all tokens"]
    # a circuit of few nodes has no others to draw from
    columns = [r[name]["mean"] if r[name] else [math.nan] * len(STRENGTHS) for name in COMPARED]
    columns.append(r["absolute"]["steered"]["mean"])
    for s, a, b, n, d, x in zip(STRENGTHS, *columns):
        lines.append(f"  {s:8.1f}  {a:8.3g}  {b:17.3g}  {n:12.3g}  {d:22.3g}  {x:26.3g}")
    return "\n".join(lines)


def plot(result: dict, path: str) -> None:
    """The curves with their quartiles; without matplotlib a line that says how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")  # no screen needed
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: it needs matplotlib: pip install -r requirements-extra.txt")
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, r in zip(axes, (result, result["best_single"])):
        for name in COMPARED:
            if r[name] is None:  # no other nodes
                continue
            strength = result["strength"]
            line, = axis.plot(strength, r[name]["mean"], label=name.replace("_", " "))
            axis.fill_between(strength, r[name]["q25"], r[name]["q75"], alpha=0.15,
                              color=line.get_color())
        axis.set_title(f"{len(r['nodes'])} channel(s) of {r['nodes'][0].rsplit('.', 1)[0]}")
        axis.set_xlabel("steering strength")
    axes[0].set_ylabel("P of the other prompt's answer")
    axes[0].legend()
    figure.suptitle(f"{result['task']}: the dense model, steered from the sparse one "
                    f"({result['n_pairs']} held-out pairs, both ways)")
    figure.tight_layout()
    write_atomic(path, partial(figure.savefig, format="png", dpi=120))
    print(path)


def main(argv: list[str]) -> int:
    cfg = parse(SteerConfig, argv)
    try:
        result = steer(cfg, argv)
        folder = os.path.join(cfg.run, "steer", result["task"])
        os.makedirs(folder, exist_ok=True)
        write_atomic(os.path.join(folder, "steer.json"), json.dumps(result).encode())
        print(f"\n{curve_text(result)}\n\n{curve_text(result['best_single'])}")
        print(f"\n{folder}/steer.json")
        plot(result, os.path.join(folder, "steer.png"))
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
