"""A circuit that the authors published (viz_data.pt) -> circuit.json, for view.py and validate.py.

    python -m tools.published --viz=viz_data.pt --model=csp_yolo1 --task=single_double_quote \\
        --means=mean_baseline_pretrain.pt
    python view.py circuit.json

- Its nodes and edges are looked up in the model, which has to be at hand, by site and channel; what
  the model lacks is refused. A circuit can name `final_resid`, channels of the last stream: the
  others there are then held at their means, too.
- Means are the authors' (--means), or taken over a data file as prune.py does.
- `loss` and `unpruned_loss` are the published ones, halved: the authors' are sums over both prompts
  of a pair. What is measured here stands in `loss_heldout` and `validation`: on held-out pairs of
  --task, where tasks.py knows it or it is a file of pairs; else on the published prompts, whose two
  answers are then what the model tells apart most. The scale and shift of the logits are fitted
  anew, as none are published.
- The published prompts are the page's examples; the published samples of each node go into
  circuit.nodes.json. Both files go beside the viz_data.pt, or as --out says.
"""
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse

import torch
from torch import Tensor

from circuit import (FINAL, Circuit, Edges, Nodes, ablate, all_edges, between, count, graph_of,
                     without_edges)
from circuit_file import Found, content_of, examples, write_circuit
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from model import GPT, device_of
from model_files import weights_hash
from prune import PruneConfig, node_means, settings_in_file
from tasks import (TASKS, Pairs, Task, calibrate, calibrated, last_logits, load_model, load_pairs,
                   loss_of, margins, task_of)
from tokens import check_tokenizer, window_of
from tools.inspect import AFTER, BEFORE, example, write_nodes

PER_QUANTILE = 2  # published samples of a node that are kept, of each quantile from either end


@dataclass
class PublishedConfig:
    viz: str = "viz_data.pt"        # the published circuit
    model: str = ""                 # a directory in the published format
    task: str = ""                  # "" = the folder's name, as the authors' store has it
    means: str = ""                 # mean_baseline_pretrain.pt; "" = over data/train.bin
    out: str = ""                   # "" = circuit.json beside the viz_data.pt
    data: str = "data/tinypython"
    mean_tokens: int = bounded(65536, at_least=1)
    window: int = bounded(0, at_least=0)  # tokens of it at a time; 0 = as many as in training
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")
    seed: int = bounded(0, at_least=0)


# --- reading ---------------------------------------------------------------------------------

def load_dict(path: str) -> dict:
    """The dictionary in a .pt file of tensors and plain values. ValueError where it is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:  # torch.load raises many kinds on a truncated or foreign file
        raise ValueError(f"{path} is truncated, or no file of tensors ({type(e).__name__})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary")
    return content


def read_viz(path: str) -> dict:
    """A viz_data.pt. ValueError that names what it lacks."""
    viz = load_dict(path)
    for where, keys in ((viz, ("circuit_data", "importances")),
                        (viz.get("importances"), ("loss", "interv_loss", "task_samples"))):
        for key in keys:
            if not isinstance(where, dict) or key not in where:
                raise ValueError(f"{path} is no published circuit: it has no '{key}'")
    return viz


def mask_of(circuit_data: dict, model: GPT) -> Nodes:
    """{site: channel indices} -> a bool per channel of every site; of final_resid where it is
    named. ValueError where the model lacks a node."""
    c = model.config
    mask = {s: torch.zeros(c.site_width(s), dtype=torch.bool) for s in model.sites}
    for site, channels in circuit_data.items():
        if site == "prune_config":  # how it was found; not a site
            continue
        channels = torch.as_tensor(channels).flatten().tolist()
        if site == FINAL and channels:
            mask[FINAL] = torch.zeros(c.d_model, dtype=torch.bool)
        for channel in channels:
            if not (site in mask and 0 <= channel < len(mask[site])):
                raise ValueError(f"the model has no node {site}.{channel}: the circuit is of "
                                 "another model")
            mask[site][channel] = True
    device = model.lm_head.weight.device
    return {site: m.to(device) for site, m in mask.items()}


def listed_edges(importances: dict) -> list[tuple[str, int, str, int]]:
    """(from site, channel, to site, channel) of every nonzero entry of the published matrices,
    which are [matrix (sources, targets), source ids, target ids, (from site, to site)]."""
    # these are the weights; `pair_data` has what cutting each does to the loss
    entries = importances.get("pair_data_connections") or importances.get("pair_data") or []
    if entries and isinstance(entries[0][0], list):  # one list for each of the authors' processes
        entries = [entry for part in entries for entry in part]
    found = []
    for matrix, sources, targets, (a, b) in entries:
        sources = [x for x in sources if x != "bias"]
        if matrix.numel() == 0:
            continue
        # a bias is no edge, and its row comes last
        if matrix.shape[1] != len(targets) or matrix.shape[0] < len(sources):
            raise ValueError(f"the matrix from {a} to {b} has shape {tuple(matrix.shape)}, for "
                             f"{len(sources)} sources and {len(targets)} targets")
        for i, j in matrix[: len(sources)].nonzero().tolist():
            found.append((a, int(sources[i]), b, int(targets[j])))
    return found


def edges_from(listed: list[tuple], model: GPT, mask: Nodes) -> Edges:
    """The listed edges that lie between nodes of the circuit, as circuit.py has them; all, where
    none is listed. ValueError where one is no weight of the model."""
    every = all_edges(model)
    if not listed:
        return between(model, mask)
    wires = graph_of(model).wires
    edges = {ends: torch.zeros_like(kept) for ends, kept in every.items()}
    for a, source, b, to in listed:
        if FINAL in (a, b):  # the stream is no weight
            continue
        place = wires[a, b].place(source, to) if (a, b) in wires else None
        if place is None:
            raise ValueError(f"the model has no weight from {a}.{source} to {b}.{to}: the circuit "
                             "is of another model")
        edges[a, b][place] = True
    return between(model, mask, edges)


# --- what the other nodes are held at --------------------------------------------------------

def means_from(path: str, mask: Nodes) -> Nodes:
    """The authors' {site: means}. ValueError where a site is missing or of another width."""
    given = load_dict(path)
    means = {}
    for site, m in mask.items():
        mean = torch.as_tensor(given.get(site, []), dtype=torch.float32).flatten()
        if len(mean) != len(m):
            raise ValueError(f"{path} has {len(mean)} means of {site}, the model {len(m)} channels")
        means[site] = mean.to(m.device)
    return means


# --- prompts ---------------------------------------------------------------------------------

def published_prompts(task_samples: tuple) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the prompts of either class, in pairs; (documents, T), padded with zeros."""
    rows = []
    for row in torch.as_tensor(task_samples[0]).tolist():
        while len(row) > 1 and row[-1] == 0:
            row = row[:-1]
        rows.append([int(i) for i in row])
    half = len(rows) // 2
    if half == 0 or len(rows) % 2:
        raise ValueError(f"its task_samples hold {len(rows)} prompts, which are no pairs")
    return rows[:half], rows[half:]


def as_pairs(first: list[list[int]], second: list[list[int]], answers: list[int],
             device) -> Pairs:
    """Prompts of either class, and the right token of each class, as tasks.py has them."""
    prompts = [ids for pair in zip(first, second) for ids in pair]
    width = max(map(len, prompts))
    answer = torch.tensor(answers * len(first))
    return Pairs(
        ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts]),
        last=torch.tensor([len(ids) - 1 for ids in prompts]),
        answer=answer,
        wrong=answer.view(-1, 2).flip(1).flatten(),
    ).to(device)


@torch.no_grad()
def told_apart(model: GPT, first: list[list[int]], second: list[list[int]], device) -> Tensor:
    """(vocab,): how much likelier each token is after the first class than after the second."""
    logits = last_logits(model, as_pairs(first, second, [0, 0], device))
    return (logits[0::2].softmax(-1) - logits[1::2].softmax(-1)).mean(0)


def task_and_pairs(cfg: PublishedConfig, model: GPT, tokenizer,
                   task_samples: tuple) -> tuple[Task, Pairs, bool]:
    """The task, the published prompts as pairs, and whether tasks.py can draw more of it."""
    first, second = published_prompts(task_samples)
    c = model.config
    for ids in first + second:
        if len(ids) > c.block_size or max(ids) >= c.vocab_size:
            raise ValueError("its task_samples do not fit the model: too long, or other tokens")
    device = model.lm_head.weight.device
    apart = told_apart(model, first, second, device)

    name = cfg.task or name_in(cfg.viz)
    if name in TASKS or name.endswith((".jsonl", ".csv")):
        task = task_of(name)
        # the first pair's, where a file has others in other pairs
        pair = load_pairs(task, tokenizer, 1, "train", c.block_size, cfg.seed)
        answers = pair.answer[:2].tolist()
        if apart[answers[0]] < apart[answers[1]]:  # the authors have the classes the other way
            first, second = second, first
        return task, as_pairs(first, second, answers, device), True
    answers = [int(apart.argmax()), int(apart.argmin())]
    texts = tuple(tokenizer.decode([i]) for i in answers)
    task = Task(name, "published prompts; the answers are what the model tells apart most", texts)
    return task, as_pairs(first, second, answers, device), False


def name_in(path: str) -> str:
    """The task of viz/MODEL/TASK/SWEEP/K/viz_data.pt, or else the name of the file's folder."""
    folders = [re.sub(r"_beeg\d*$", "", part) for part in Path(path).absolute().parts[:-1]]
    known = [part for part in folders if part in TASKS]
    return known[-1] if known else folders[-1]


# --- samples ---------------------------------------------------------------------------------

def described(samples: dict, mask: Nodes, constants: Nodes, tokenizer) -> dict:
    """The published samples of every node, as tools.inspect has its own: {site: [node, ...]}."""
    found = {}
    for site, m in mask.items():
        # a channel is an int or a tensor of one
        of_site = {int(channel): kinds for channel, kinds in samples.get(site, {}).items()}
        nodes = []
        for channel in m.nonzero().flatten().tolist():
            shown = []
            for quantile, (lowest, highest) in of_site.get(channel, {}).items():
                shown += [cut(float(quantile), *s, tokenizer) for s in lowest[:PER_QUANTILE]]
                shown += [cut(1 - float(quantile), *s, tokenizer) for s in highest[:PER_QUANTILE]]
            shown.sort(key=lambda e: -e["quantile"])
            mean = round(constants[site][channel].item(), 6)
            nodes.append({"channel": channel, "mean": mean, "on": None, "examples": shown})
        if nodes:
            found[site] = nodes
    return found


def cut(quantile: float, ids: Tensor, values: Tensor, position, tokenizer) -> dict:
    """What stands around one position of a published document, as an example."""
    at = int(position)
    first = at - BEFORE
    around = range(first, at + AFTER + 1)
    inside = [0 <= i < len(ids) for i in around]
    context = [int(ids[i]) if there else -1 for i, there in zip(around, inside)]
    acts = [float(values[i]) if there else 0.0 for i, there in zip(around, inside)]
    return example(round(quantile, 6), context, acts, tokenizer)


# --- from one file to the other --------------------------------------------------------------

def measured(cfg: PublishedConfig, found: Found, published: dict, prompts: Pairs,
             known: bool) -> dict:
    """The content of circuit.json. found: with the published `prompts` as its pairs; known: can
    tasks.py draw others, on which to measure?"""
    model, circuit, settings = found.model, found.circuit, found.settings
    if known:  # else the published prompts serve for both: too few to keep some for measuring
        def draw(n: int, split: str) -> Pairs:
            T = model.config.block_size
            return load_pairs(found.task, found.tokenizer, n, split, T, cfg.seed).to(cfg.device)

        found = replace(found, train=draw(settings["fit_pairs"], "train"),
                        heldout=draw(settings["heldout_pairs"], "heldout"))
    reduced = without_edges(model, circuit, found.constants)
    hold = ablate(circuit.mask, found.constants)
    circuit.scale, circuit.shift = calibrate(margins(reduced, found.train, hold))
    content = content_of(found)

    # where a page and a card look for them, the authors' figures; ours beside them
    content["validation"]["unpruned_loss_measured"] = content["unpruned_loss"]
    content["unpruned_loss"] = published["unpruned_loss"]
    kept = calibrated(margins(reduced, prompts, hold), circuit.scale, circuit.shift)
    unpruned = margins(model, prompts)
    content["validation"]["published"] = {
        **published, "prompts": 2 * len(prompts), "loss_measured": loss_of(kept),
        "unpruned_loss_measured": loss_of(unpruned)}
    content["examples"] = examples(replace(found, heldout=prompts), reduced, kept, unpruned)
    return content


def means_of(cfg: PublishedConfig, model: GPT, mask: Nodes) -> Nodes:
    """The authors' means, or those over a data file. Theirs of values behind sinks are of another
    place than where we hold them (docs/ablation.md), and come from the data as well."""
    theirs = means_from(cfg.means, mask) if cfg.means else {}
    missing = []
    for site in mask:
        if site not in theirs or (model.config.sink and site.endswith("attn.v")):
            missing.append(site)
    if not missing:
        return theirs
    check_tokenizer(cfg.data, tokenizer_hash(tokenizer_for(cfg.model, cfg.tokenizer)))
    path = os.path.join(cfg.data, "train.bin")
    window = window_of(cfg.model, model.config.block_size, cfg.window)
    return theirs | node_means(model, path, cfg.mean_tokens, cfg.seed, missing, window)


def convert(cfg: PublishedConfig) -> str:
    """Write circuit.json and circuit.nodes.json; returns what to print.

    ValueError or OSError, in one line and with nothing written, where that cannot be done.
    """
    viz = read_viz(cfg.viz)
    sha256 = weights_hash(cfg.model)
    model, tokenizer = load_model(cfg.model, cfg.tokenizer, device_of(cfg.device))
    try:
        importances = viz["importances"]
        mask = mask_of(viz["circuit_data"], model)
        listed = listed_edges(importances)
        edges = edges_from(listed, model, mask)
        task, prompts, known = task_and_pairs(cfg, model, tokenizer, importances["task_samples"])
        published = {"loss": float(importances["interv_loss"]) / 2,  # see the head of this file
                     "unpruned_loss": float(importances["loss"]) / 2}
        constants = means_of(cfg, model, mask)
        nodes = described(viz.get("samples", {}), mask, constants, tokenizer)
    except (TypeError, AttributeError, LookupError) as e:
        raise ValueError(f"{cfg.viz} is not built as published circuits are "
                         f"({type(e).__name__}: {e})") from e
    settings = PruneConfig(model=cfg.model, task=task.name, data=cfg.data, seed=cfg.seed,
                           tokenizer=cfg.tokenizer, mean_tokens=cfg.mean_tokens, window=cfg.window)
    content = measured(cfg, Found(
        model=model, model_dir=cfg.model, sha256=sha256, data=None, task=task, tokenizer=tokenizer,
        circuit=Circuit(mask, edges, 1.0, 0.0, published["loss"]), constants=constants,
        target_loss=settings.target_loss[0], train=prompts, heldout=prompts,
        settings=settings_in_file(settings)), published, prompts, known)

    out = cfg.out or os.path.join(os.path.dirname(cfg.viz), "circuit.json")
    write_circuit(out, content)
    source = {"data": cfg.viz, "tokens": None, "window": None, "seed": None}
    beside = write_nodes(out, content["model"]["sha256"], source, nodes)
    return report(content, len(listed), count(between(model, mask))) + f"\n{out}\n{beside}"


def report(content: dict, n_listed: int, n_weights: int) -> str:
    """A few lines: sizes, and the published losses beside those measured."""
    was = content["validation"]["published"]
    lines = [f"{content['task']}: {content['n_nodes']} nodes, {content['n_edges']} edges; answers "
             f"{' or '.join(map(repr, content['answers']))}"]
    if n_listed and content["n_edges"] < n_weights:
        lines.append(f"  the file lists no more, but the model has {n_weights} weights between "
                     "these nodes: the others are held at their means")
    lines.append(f"  published loss {was['loss']:.4f} nats, here on the same {was['prompts']} "
                 f"prompts {was['loss_measured']:.4f}, on others {content['loss_heldout']:.4f}")
    lines.append(f"  unpruned model {was['unpruned_loss']:.4f}, here "
                 f"{was['unpruned_loss_measured']:.4f}; "
                 f"without the circuit {content['validation']['necessity']:.4f}")
    return "\n".join(lines)


# --- the command -----------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg = parse(PublishedConfig, argv)
    try:
        if not cfg.model:
            raise ValueError("say which model the circuit is of with --model=DIR")
        print(convert(cfg))
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
