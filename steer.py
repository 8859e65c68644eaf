"""Steer a dense model by nodes of a circuit of the sparse model that it is bridged to (paper 3.3, A.4).

- The nodes, residual reads of one site, take the values that they have on the other prompt of a pair; what that changes
  goes through the bridge's decoder into the dense model's read at the same place, at strengths from 0 to 1.
- Which nodes: named by hand, or those whose change moves the sparse model's own answer most, on training pairs, at the site
  where they move the dense model most. Also the single one that moves the dense model most.
- Beside it: random directions of the same size, random nodes of the circuit, and the mean difference of the dense
  model's own activations.

    python bridge.py --steer --task=single_double_quote --circuit=out/demo_bridge/single_double_quote/circuit.json

"""
import json
import math
import os
import shlex

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge import BridgeConfig, Coupled, load_bridged, streams
from circuit import circuit_of, hash_of, last_logits, load, margin_of, read_circuit
from config import nearest, write_atomic
from model import GPT
from prune import samples
from tasks import TASKS, Pairs, load_pairs
from train import device_of

STRENGTHS = [round(0.1 * i, 1) for i in range(11)]
COMPARED = ("steered", "random", "random_node", "dense_mean_difference")
Node = tuple[str, int]     # site and channel
Reads = dict[str, Tensor]  # site of a residual read -> a model's post-norm activations (2n, T, d_model) there


def site_index(site: str) -> int:
    """0.attn.act_in -> 0, 0.mlp.act_in -> 1, 1.attn.act_in -> 2, ..."""
    layer, kind, _ = site.split(".")
    return 2 * int(layer) + (kind == "mlp")


def norm_before(model: GPT, site: str) -> Tensor:
    """The gain (d_model,) of the norm whose output the site reads."""
    block = model.transformer.h[site_index(site) // 2]
    return (block.ln_1 if ".attn." in site else block.ln_2).weight


@torch.no_grad()
def reads(model: GPT, pairs: Pairs) -> Reads:
    out = {}

    def record(site, x):
        if site.endswith("act_in"):
            out[site] = x[..., : model.config.d_model]  # concatenated positions are no part of the stream
        return x

    model.run(model.embed(pairs.ids), nodes=record)
    return out


def toward_other(x: Tensor) -> Tensor:
    """Counterfactual minus presented activation (2n, T, ..): the rows of a pair alternate."""
    return x[torch.arange(len(x), device=x.device) ^ 1] - x


@torch.no_grad()
def rms_ratio(net: Coupled, path: str, tokens: int = 16384) -> list[float]:
    """RMS of the sparse model's residual stream over the dense one's, per site, over random windows of `path`."""
    squares = torch.zeros(2, len(net.bridges.encoders), dtype=torch.double)
    for ids in samples(net.sparse, path, tokens, 0):
        squares += torch.tensor([[h.square().mean().item() * len(ids) for h in streams(m, ids)] for m in (net.sparse, net.dense)])
    return (squares[0] / squares[1]).sqrt().tolist()


def perturbation(net: Coupled, site: str, channels: list[int], delta: Tensor, ratio: float) -> Tensor:
    """(2n, T, d_dense): what the change `delta` (2n, T, d_sparse) of some channels of a post-norm read of the sparse model is
    in the dense model's post-norm read there (A.4): the sparse norm's gain undone, delta times the decoder's rows, times
    RMS_sparse / RMS_dense, times the dense norm's gain."""
    gain = norm_before(net.sparse, site)[channels]
    rows = net.bridges.decoders[site_index(site)].weight.T[channels]  # (channels, d_dense)
    return (delta[..., channels] / torch.where(gain == 0, 1.0, gain)) @ rows * ratio * norm_before(net.dense, site)


def from_other(net: Coupled, nodes: list[Node], seen: Reads, ratio: list[float]) -> Tensor:
    """The `perturbation` of nodes of one site that take their values on the other prompt. seen: the sparse model's `reads`."""
    site = nodes[0][0]
    return perturbation(net, site, [c for _, c in nodes], toward_other(seen[site]), ratio[site_index(site)])


@torch.no_grad()
def changed(model: GPT, pairs: Pairs, site: str, change: Tensor) -> Tensor:
    """Last logits (2n, vocab) of a model to whose read at `site` `change` (2n, T, d_model) is added."""
    return last_logits(model, pairs, lambda s, x: x + F.pad(change, (0, x.shape[-1] - change.shape[-1])) if s == site else x)


def log_odds(model: GPT, pairs: Pairs, site: str, change: Tensor) -> float:
    """Mean logit of the other answer less that of the prompt's own, of the model so changed."""
    return -margin_of(changed(model, pairs, site, change), pairs).mean().item()


def steered(model: GPT, pairs: Pairs, site: str, change: Tensor, strengths=STRENGTHS) -> Tensor:
    """(strengths, 2n, 2): P of the counterfactual answer, between the two answers and among all tokens."""
    rows, out = torch.arange(len(pairs.ids), device=pairs.ids.device), []
    for strength in strengths:
        logits = changed(model, pairs, site, strength * change)
        out.append(torch.stack([torch.sigmoid(-margin_of(logits, pairs)), logits.softmax(-1)[rows, pairs.wrong]], -1))
    return torch.stack(out)


def curve(p: Tensor) -> dict:
    """(strengths, prompts) -> mean and quartiles per strength."""
    q25, q75 = p.quantile(torch.tensor([0.25, 0.75], dtype=p.dtype, device=p.device), dim=1)
    return {"mean": p.mean(1).tolist(), "q25": q25.tolist(), "q75": q75.tolist()}


def choose(net: Coupled, candidates: list[Node], pairs: Pairs, most: int, ratio: list[float]) -> list[Node]:
    """At most `most` of the candidate reads (site, channel), of one site, by training pairs. At each site one read after the
    other joins, each time the one whose change to the other prompt's activation moves the sparse model's own answer most,
    until none brings a twentieth of the way to the other prompt's answer: what little they add to the answer, they would add
    to the size of the intervention. The site is the one where these move the dense model most: where it, too, still needs to
    be told."""
    seen, best = reads(net.sparse, pairs), (-math.inf, [])
    for site in dict.fromkeys(s for s, _ in candidates):
        delta, left, chosen = toward_other(seen[site]), [c for s, c in candidates if s == site], []

        def moved(channels: list[int]) -> float:
            change = torch.zeros_like(delta)
            change[..., channels] = delta[..., channels]
            return log_odds(net.sparse, pairs, site, change)

        reached = moved([])
        least = abs(reached) / 10  # the other prompt's answer is as far beyond 0
        while left and len(chosen) < most:
            score, c = max((moved(chosen + [c]), c) for c in left)
            if chosen and score < reached + least:
                break
            reached, chosen = score, chosen + [c]
            left.remove(c)
        nodes = [(site, c) for c in chosen]
        best = max(best, (log_odds(net.dense, pairs, site, from_other(net, nodes, seen, ratio)), nodes))
    return best[1]


def best_single(net: Coupled, candidates: list[Node], pairs: Pairs, ratio: list[float]) -> Node:
    """The one read of any site that moves the dense model most, on training pairs."""
    seen = reads(net.sparse, pairs)
    return max(candidates, key=lambda node: log_odds(net.dense, pairs, node[0], from_other(net, [node], seen, ratio)))


def mean_difference(x: Tensor, train: Pairs, pairs: Pairs) -> Tensor:
    """(2n, T, d) for `pairs`: the mean change toward the other prompt of a read `x` on the pairs `train`; one vector for the
    tokens that differ and one for those after them, in each direction."""
    def places(of: Pairs):
        rows, at = torch.arange(len(of.ids), device=of.ids.device), torch.arange(of.ids.shape[1], device=of.ids.device)
        differs = of.ids != of.ids[rows ^ 1]
        after = (differs.cumsum(1) > 0) & ~differs & (at <= of.last[:, None])
        return [where & (rows % 2 == side)[:, None] for where in (differs, after) for side in (0, 1)]

    delta, out = toward_other(x), x.new_zeros(*pairs.ids.shape, x.shape[-1])
    for known, at in zip(places(train), places(pairs)):
        if known.any():
            out[at] = delta[known].mean(0)
    return out


def compare(net: Coupled, nodes: list[Node], others: list[Node], train: Pairs, pairs: Pairs, ratio: list[float], cfg: BridgeConfig) -> dict:
    """Steer `pairs` by `nodes`, all of one site, and by three things to compare with: random directions of the same size, as
    many random nodes out of `others`, and the mean difference of the dense model's own reads of `train` at that site. Each
    draw of the first two is of a quarter of the pairs, in turn."""
    generator, site, random, random_node = torch.Generator().manual_seed(cfg.seed), nodes[0][0], [], []
    for draw in range(cfg.draws):
        part = pairs.take(torch.arange(draw % 4, len(pairs), 4, device=pairs.ids.device)) if len(pairs) >= 4 else pairs
        direction = F.normalize(torch.randn(net.dense.config.d_model, generator=generator), dim=0).to(pairs.ids.device)
        seen = reads(net.sparse, part)
        random.append(steered(net.dense, part, site, from_other(net, nodes, seen, ratio).norm(dim=-1, keepdim=True) * direction))
        if others:
            theirs = others[int(torch.randint(len(others), (1,), generator=generator))][0]
            pool = [node for node in others if node[0] == theirs]
            drawn = [pool[i] for i in torch.randperm(len(pool), generator=generator)[: len(nodes)].tolist()]
            random_node.append(steered(net.dense, part, theirs, from_other(net, drawn, seen, ratio)))
    p = {"steered": steered(net.dense, pairs, site, from_other(net, nodes, reads(net.sparse, pairs), ratio)), "random": torch.cat(random, 1),
         "random_node": torch.cat(random_node, 1) if others else None,
         "dense_mean_difference": steered(net.dense, pairs, site, mean_difference(reads(net.dense, train)[site], train, pairs))}

    def curves(rows: slice) -> dict:
        between, absolute = ({k: curve(v[:, rows, j]) if v is not None else None for k, v in p.items()} for j in (0, 1))
        return between | {"absolute": absolute}

    return {"nodes": [f"{s}.{c}" for s, c in nodes], **curves(slice(None)), "from_first": curves(slice(0, None, 2)),
            "from_second": curves(slice(1, None, 2))}  # the prompts whose own answer is the task's first, and its second


def chosen_by_hand(cfg: BridgeConfig, candidates: list[Node]) -> list[Node]:
    """--node as (site, channel); ValueError where it names no residual reads of the circuit, or of several sites."""
    names = {f"{s}.{c}": (s, c) for s, c in candidates}
    for name in (asked := cfg.node.split(",")):
        if name not in names:
            raise ValueError(f"'{name}' is no residual read of the circuit; the nearest is '{nearest(name, names)}'")
    if len({names[name][0] for name in asked}) > 1:
        raise ValueError(f"the nodes must be of one site, not {cfg.node}")
    return [names[name] for name in dict.fromkeys(asked)]


def steer(cfg: BridgeConfig, argv: list[str]) -> None:
    """Choose nodes, steer, write out_dir/steer/task/steer.json and, with matplotlib, steer.png; print the table."""
    path = cfg.circuit or os.path.join(cfg.out_dir, cfg.task, "circuit.json")
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}; find it with python prune.py --model={cfg.out_dir} --task={cfg.task}")
    c = read_circuit(path)
    if c.get("task") != cfg.task:
        raise ValueError(f"{path} is a circuit of {c.get('task')}, not of {cfg.task}")
    if c["model"].get("sha256") != hash_of(cfg.out_dir):
        raise ValueError(f"{path} is a circuit of another model than {cfg.out_dir} (the weights differ); prune this one")
    device = device_of(cfg)
    sparse, tokenizer = load(cfg.out_dir, cfg.tokenizer, device)
    net = load_bridged(cfg, sparse, device)
    T = net.sparse.config.block_size
    train, pairs = (load_pairs(TASKS[cfg.task], tokenizer, n, split, T, cfg.seed).to(device) for n, split in ((32, "train"), (cfg.pairs, "heldout")))
    if not (net.sparse.config.rms_norm and net.dense.config.rms_norm):
        raise ValueError("steering needs models with RMSNorm: a LayerNorm's read is not the stream times a gain")
    try:
        circuit_of(c, net.sparse)
    except (ValueError, TypeError, IndexError) as e:
        raise ValueError(f"{path}: {e}") from e
    if any((p.last[::2] != p.last[1::2]).any() for p in (train, pairs)):
        raise ValueError(f"the two prompts of a pair of {cfg.task} differ in length: activations cannot be exchanged token by token")
    candidates = [(s, i) for s, channels in c["nodes"].items() if s.endswith("act_in") for i in channels if i < net.sparse.config.d_model]
    if not candidates:
        raise ValueError(f"{path} has no residual reads to steer by")
    by_hand = chosen_by_hand(cfg, candidates) if cfg.node else []
    ratio = rms_ratio(net, os.path.join(cfg.data_dir, "train.bin"))
    nodes = by_hand or choose(net, candidates, train, cfg.channels, ratio)
    single = best_single(net, by_hand or candidates, train, ratio)
    print(f"steering {cfg.dense} by {len(nodes)} nodes of {path}, {len(pairs)} held-out pairs, both ways")
    result = {"task": cfg.task, "n_pairs": len(pairs), "strength": STRENGTHS,
              **compare(net, nodes, [n for n in candidates if n not in nodes], train, pairs, ratio, cfg),
              "best_single": compare(net, [single], [n for n in candidates if n != single], train, pairs, ratio, cfg),
              "circuit": path, "dense": cfg.dense, "commands": [shlex.join(["python", "bridge.py", *argv])], "seed": cfg.seed}
    folder = os.path.join(cfg.out_dir, "steer", cfg.task)
    os.makedirs(folder, exist_ok=True)
    write_atomic(os.path.join(folder, "steer.json"), lambda f: f.write(json.dumps(result).encode()))
    for r in (result, result["best_single"]):
        print(f"\n{', '.join(r['nodes'])}: P(the other prompt's answer, between the two), mean\n"
              "  strength   steered   random direction   random node   dense mean difference   steered, among all tokens")
        rows = zip(STRENGTHS, *((r[k] or {"mean": [math.nan] * 11})["mean"] for k in COMPARED), r["absolute"]["steered"]["mean"])
        print("\n".join(f"  {s:8.1f}  {a:8.3g}  {b:17.3g}  {n:12.3g}  {d:22.3g}  {x:26.3g}" for s, a, b, n, d, x in rows))
    print(f"\n{folder}/steer.json")
    plot(result, os.path.join(folder, "steer.png"))


def plot(result: dict, path: str) -> None:
    """The curves with their quartiles; without matplotlib a line that says how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: it needs matplotlib: pip install -r requirements-extra.txt")
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, r in zip(axes, (result, result["best_single"])):
        for name in COMPARED:
            if r[name]:
                line, = axis.plot(result["strength"], r[name]["mean"], label=name.replace("_", " "))
                axis.fill_between(result["strength"], r[name]["q25"], r[name]["q75"], alpha=0.15, color=line.get_color())
        axis.set_title(f"{len(r['nodes'])} channel(s) of {r['nodes'][0].rsplit('.', 1)[0]}")
        axis.set_xlabel("steering strength")
    axes[0].set_ylabel("P of the other prompt's answer")
    axes[0].legend()
    figure.suptitle(f"{result['task']}: the dense model, steered from the sparse one ({result['n_pairs']} held-out pairs, both ways)")
    figure.tight_layout()
    write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=120))
    print(path)
