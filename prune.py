"""Prune a model to the smallest circuit that still does a task, and write it to circuit.json.

- Means of every node over pretraining data; nodes outside the circuit are held at their mean.
- The task's pairs: to find the circuit on, set apart, and held out.
- The search for the circuit is find.py's. What circuit_file.py measures goes into the file.
- With --task=all every task, several at a time; then a table.

    python prune.py --model=out/demo --task=single_double_quote
    python prune.py --model=out/demo --task=all --minimal --jobs=2
    python prune.py --model=out/demo --target_loss=0.5,0.15,0.05

"""
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse

import torch
from torch import Tensor

from circuit import Nodes, where_held
from circuit_file import Found, content_of, read_circuit, write_circuit
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from find import FindConfig, find
from model import GPT, config_of, device_of
from model_files import weights_hash
from processes import in_processes
from tasks import (TASKS, Pairs, Task, calibrate, calibrated, load_model, load_pairs, loss_of,
                   margins, rows_at_once, task_of)
from tokens import check_tokenizer, fingerprint, random_windows, read_side, window_of

FEWEST_APART = 4  # of a file with few pairs, one in so many is set apart


@dataclass
class PruneConfig(FindConfig):
    model: str = "out/demo"         # a directory in the published format
    task: str = "single_double_quote"  # or all, or a file of pairs: .jsonl, .csv
    out_dir: str = ""               # "" = the model's; the circuit: out_dir/task/circuit.json
    data: str = "data/tinypython"   # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")
    ablation: str = one_of("mean", "zero")  # what a node outside the circuit is held at
    mean_tokens: int = bounded(65536, at_least=1)
    window: int = bounded(0, at_least=0)  # tokens of it at a time; 0 = as many as in training
    train_pairs: int = bounded(2048, at_least=1)  # mask learning draws from these
    apart_pairs: int = bounded(2048, at_least=0)  # beside train_pairs: does a circuit hold there?
    heldout_pairs: int = bounded(1024, at_least=1)


# --- what ablated nodes are held at ----------------------------------------------------------

@torch.no_grad()
def node_means(model: GPT, path: str, tokens: int, seed: int,
               sites: list[str] | None = None, window: int = 0) -> Nodes:
    """Mean activation of every node, (width,) a site, over about `tokens` tokens of the pretraining
    file `path` (paper A.5), `window` of them at a time (0: block_size); or of `sites`. Of a value:
    of what its head gathered of it, for there it is held. ValueError where that is no data for this
    model."""
    sites = model.sites if sites is None else sites
    sums = dict.fromkeys(sites, 0)
    n = 0

    def add(site: str, x: Tensor) -> Tensor:
        # double: float32 would lose digits over so many tokens; few at a time, for it is a copy
        for rows in x.flatten(0, 1).split(256):
            sums[site] = sums[site] + rows.double().sum(0)
        return x

    watch = where_held(sites, add)
    c = model.config
    device = model.lm_head.weight.device
    for ids in random_windows(path, c.vocab_size, window or c.block_size, tokens, seed, device):
        for part in ids.split(rows_at_once(model, ids.shape[1])):
            model.run(model.embed(part), nodes=watch)
        n += ids.numel()
    return {site: (total / n).float() for site, total in sums.items()}


def constants_of(model: GPT, cfg: PruneConfig) -> Nodes:
    """What the config holds ablated nodes at: their means, or zero."""
    if cfg.ablation == "mean":
        check_tokenizer(cfg.data, tokenizer_hash(tokenizer_for(cfg.model, cfg.tokenizer)))
        path = os.path.join(cfg.data, "train.bin")
        window = window_of(cfg.model, model.config.block_size, cfg.window)
        return node_means(model, path, cfg.mean_tokens, cfg.seed, window=window)
    zeros = model.lm_head.weight.new_zeros
    return {site: zeros(model.config.site_width(site)) for site in model.sites}


class Loaded(NamedTuple):
    """What is pruned, and by what its files are known again."""
    model: GPT
    tokenizer: object
    constants: Nodes
    sha256: str       # of the model's weights
    data: str | None  # of the tokens that the means are of; None where these are zeros


def load(cfg: PruneConfig) -> Loaded:
    """The model, its tokenizer and what ablated nodes are held at. ValueError or OSError, in one
    line, where one of them cannot be had."""
    # first: while a search takes its time, a run may save other weights under the same name
    sha256 = weights_hash(cfg.model)
    data = data_hash(cfg)
    model, tokenizer = load_model(cfg.model, cfg.tokenizer, cfg.device)
    return Loaded(model, tokenizer, constants_of(model, cfg), sha256, data)


def data_hash(cfg: PruneConfig) -> str | None:
    """The `fingerprint` of the data of the means; None where nodes are held at zero."""
    if cfg.ablation != "mean":
        return None
    path = os.path.join(cfg.data, "train.bin")
    return fingerprint(read_side(path, config_of(cfg.model).vocab_size))


# --- one model and task ---------------------------------------------------------------------

def prune(loaded: Loaded, task: Task, cfg: PruneConfig, say=print) -> Iterator[dict]:
    """Find, then measure and describe: the content of circuit.json for each target loss that can be
    met; `say` tells why another one cannot.

    ValueError where none can: where the model fails the task, before anything is looked for.
    """
    model, tokenizer, constants, sha256, data = loaded
    device = model.lm_head.weight.device
    T = model.config.block_size
    n = cfg.train_pairs + cfg.apart_pairs
    pairs = load_pairs(task, tokenizer, n, "train", T, cfg.seed).to(device)
    heldout = load_pairs(task, tokenizer, cfg.heldout_pairs, "heldout", T, cfg.seed).to(device)
    cfg = sized(cfg, task, pairs, heldout, say)
    train, apart = set_apart(pairs, cfg)
    unmet = unsolved(model, task, train, heldout, cfg)
    targets = tuple(target for target in cfg.target_loss if target not in unmet)
    for target, circuit in zip(targets, find(model, train, apart, constants,
                                             replace(cfg, target_loss=targets), say)):
        if not circuit.loss <= target:
            unmet[target] = (f"no circuit of {task.name} meets {target} nats on {cfg.fit_pairs} "
                             "training pairs; raise --target_loss")
            continue
        yield content_of(Found(
            model=model, model_dir=cfg.model, sha256=sha256, data=data, task=task,
            tokenizer=tokenizer, circuit=circuit, constants=constants, target_loss=target,
            train=train, heldout=heldout, settings=settings_in_file(cfg)))
    if len(unmet) == len(cfg.target_loss):
        raise ValueError(next(iter(unmet.values())))
    for why in unmet.values():
        say(f"  {why}")


def sized(cfg: PruneConfig, task: Task, pairs: Pairs, heldout: Pairs, say=print) -> PruneConfig:
    """The settings with as many pairs as there are: a file can have fewer than they ask for."""
    n_apart = cfg.apart_pairs
    if len(pairs) < cfg.train_pairs + cfg.apart_pairs:
        n_apart = min(n_apart, len(pairs) // FEWEST_APART)
    n_train = min(cfg.train_pairs, len(pairs) - n_apart)
    fits = replace(cfg, train_pairs=n_train, apart_pairs=n_apart, heldout_pairs=len(heldout),
                   fit_pairs=min(cfg.fit_pairs, n_train))
    if fits != cfg:
        say(f"  {task.file.path} has fewer pairs than asked for: train_pairs={fits.train_pairs}, "
            f"fit_pairs={fits.fit_pairs}, apart_pairs={fits.apart_pairs}, "
            f"heldout_pairs={fits.heldout_pairs}")
    return fits


def set_apart(pairs: Pairs, cfg: PruneConfig) -> tuple[Pairs, Pairs | None]:
    """The pairs to find circuits on, and those set apart."""
    order = torch.arange(cfg.train_pairs + cfg.apart_pairs, device=pairs.ids.device)
    train, apart = order.split([cfg.train_pairs, cfg.apart_pairs])
    return pairs.take(train), pairs.take(apart) if len(apart) else None


def unsolved(model: GPT, task: Task, train: Pairs, heldout: Pairs,
             cfg: PruneConfig) -> dict[float, str]:
    """The targets that the whole model's loss on held-out pairs is above, and that in words."""
    unpruned = margins(model, heldout)
    scale, shift = calibrate(margins(model, train.first(cfg.fit_pairs)))
    # calibrated on training pairs, as its circuits are
    at_best = min(loss_of(unpruned), loss_of(calibrated(unpruned, scale, shift)))
    found = {}
    for target in cfg.target_loss:
        if not at_best <= target:  # nor is NaN a solution
            found[target] = (
                f"the unpruned model does not solve {task.name}: loss {loss_of(unpruned):.3f} nats "
                f"held out ({at_best:.3f} calibrated), target {target}; train longer, or raise "
                "--target_loss")
    return found


# --- the command -----------------------------------------------------------------------------

def check_prune(cfg: PruneConfig) -> None:
    """ValueError, in one line, for what bounds beside the fields cannot say."""
    name = cfg.task
    if cfg.task != "all":
        # a file is read before a model is loaded that may take far longer
        task = task_of(cfg.task)
        name = task.name
        if task.file is not None and name in TASKS:
            raise ValueError(f"the circuit of {cfg.task} would take the place of that of the task "
                             f"{name}; give the file another name")
    paths = [path_of(cfg, name, target) for target in cfg.target_loss]
    if len(set(paths)) < len(paths):
        raise ValueError("two of the targets would share a folder; leave one out")
    check_writable(paths[0])
    device_of(cfg.device)
    if cfg.fit_pairs > cfg.train_pairs:
        raise ValueError(f"fit_pairs {cfg.fit_pairs} exceeds train_pairs {cfg.train_pairs}")


def check_writable(path: str) -> None:
    """OSError where no file can be made at a path whose folder may not be there yet: not after an
    hour's search."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


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
    """The circuits of a task that an earlier run with the same settings, weights and data has left.
    """
    # through JSON, as in a file: a tuple is a list there
    wanted = json.loads(json.dumps(settings_in_file(replace(cfg, task=task))))
    try:
        circuits = [read_circuit(path_of(cfg, task, target)) for target in cfg.target_loss]
        sha256 = weights_hash(cfg.model)
        data = data_hash(cfg)
    except (OSError, ValueError):  # missing or damaged
        return None
    for circuit in circuits:
        other_data = circuit.get("data", data) != data  # older files do not say of which they are
        if circuit["settings"] != wanted or circuit["model"]["sha256"] != sha256 or other_data:
            return None
    return circuits


def prune_task(cfg: PruneConfig, task: str, say=partial(print, flush=True)) -> list[dict]:
    """Load, prune, write the files of one task; returns their contents.

    ValueError or OSError, in one line, where that cannot be done.
    """
    its_pairs = task_of(task)
    name = its_pairs.name  # the folder of its circuit, also where the pairs are in a file
    held = "zero" if cfg.ablation == "zero" else f"means over {cfg.mean_tokens} pretraining tokens"
    say(f"pruning {cfg.model} to the circuit of {name}; other nodes are held at {held}")
    circuits = []
    for circuit in prune(load(cfg), its_pairs, replace(cfg, task=task), say):
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


def one_of_all(cfg: PruneConfig, task: str) -> list[dict]:
    """A task's circuits, found unless they are there; each line stands under the task's name."""
    def say(text: str) -> None:
        print(f"[{task}] {text.strip()}", flush=True)
    return already_pruned(cfg, task) or prune_task(cfg, task, say)


def prune_all(cfg: PruneConfig) -> None:
    """Every task, `jobs` at a time; then a table for each target."""
    one = partial(one_of_all, replace(cfg, jobs=1))  # in a task's own process its starts take turns
    results = dict(zip(TASKS, in_processes(one, TASKS, cfg.jobs)))
    solved = {}
    for task, result in results.items():
        if isinstance(result, str):
            print(f"{task}: no circuit: {result}")
        else:
            solved[task] = result
    for target in cfg.target_loss:
        rows = {}
        for task, circuits in solved.items():
            rows |= {task: c for c in circuits if c["target_loss"] == target}
        print_table(target, rows)
    if not solved:
        die("no task has a circuit (reasons above)")


def geometric_mean(counts: Iterable[int]) -> float:
    """Of numbers of edges: a model's size (paper 2.2). A circuit without edges counts as one edge,
    or it would make the mean zero."""
    logs = [math.log(max(1, n)) for n in counts]
    return math.exp(sum(logs) / len(logs))


def print_table(target: float, rows: dict[str, dict]) -> None:
    """One target's circuits, and the geometric mean of their edges: a model's size (paper 2.2)."""
    print(f"\n| task (target {target} nats) | unpruned | circuit, held out | nodes | edges "
          "| necessity |\n|---|---|---|---|---|---|")
    for task, c in rows.items():
        print(f"| {task} | {c['unpruned_loss']:.3f} | {c['loss_heldout']:.3f} | {c['n_nodes']} "
              f"| {c['n_edges']} | {c['validation']['necessity']:.2f} |")
    if rows:
        mean = geometric_mean(c["n_edges"] for c in rows.values())
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
