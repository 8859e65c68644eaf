"""Does the pruner find a circuit that is known? Plants some (tools/planting.py) and looks.

- A case is a mechanism and its width: `quote`, `quote2`, `bracket`, `bracket2`, `types2`, `types3`.
- `single`: the planted circuit in random weights; `partial`: and a head that solves the task on
  some prompts alone; `copy`: and the whole circuit once more, elsewhere.
- `near` puts it into the first two layers, `far` into the first and the last.
- Found by `learned` masks, as a `minimal` circuit of those, and by `attribution`: precision and
  recall of nodes and edges, the median and the range over seeds. Of two copies the one that was
  found better is the truth.
- What is planted is made minimal itself before it is compared with: by hand one writes more than
  the prompts ask for. `least`: the lowest loss (nats) of the rest when one of its edges is cut.

    python -m tools.planted
    python -m tools.planted --cases=quote --variants=single,copy --ablations=mean,zero
    python -m tools.planted --shapes=csp_yolo2 --cases=quote --methods=minimal --save=out/planted
    python prune.py --model=out/planted --task=single_double_quote --minimal

`--save=DIR` writes the model of the first case and seed, a published directory, and planted.json,
its circuit. What counts as planted under which ablation, and what came out: docs/planted.md.
"""
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, nearest, parse, write_atomic

import torch

from circuit import Circuit, Edges, Nodes, all_edges, edges_of, graph_of
from data.tinypython.tokenizer import load_tokenizer
from find import SLACKS, find
from minimise import minimise, quiet
from model import GPT
from prune import PruneConfig, constants_of
from search import Search
from tasks import Pairs, Task, calibrate, calibrated, load_pairs, loss_of, margins
from tools.planting import FAMILIES, SHAPES, Planter, background, hint

# Every case: its mechanism and width.
CASES = {
    "quote": ("quote", 1), "quote2": ("quote", 2), "bracket": ("bracket", 1),
    "bracket2": ("bracket", 2), "types2": ("types", 2), "types3": ("types", 3),
}
LISTS = {  # option -> its words
    "shapes": SHAPES, "cases": CASES, "variants": ("single", "partial", "copy"),
    "places": ("near", "far"), "methods": ("learned", "minimal", "attribution"),
    "ablations": ("mean", "zero"),
}
SOLVED = 0.25  # a planted model's loss is at most this share of the target, or another is drawn
DRAWS = 20     # so many are drawn before we say that the shape has no room for the circuit
PROMPT = 128   # tokens at most: the windows of the smaller shapes


@dataclass
class PlantedConfig:
    shapes: str = "2x64,4x128"
    cases: str = ",".join(CASES)
    variants: str = "single"
    places: str = "far"
    methods: str = "learned,minimal,attribution"
    ablations: str = "mean"
    seeds: int = bounded(3, at_least=1)  # of model, pairs and masks alike: 0, 1, 2
    save: str = ""                  # a directory for the model of the first case; "" = none
    data: str = "data/tinypython"   # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    # nats: so low that the prompts in which a bracket or string was closed before count as well
    target_loss: float = bounded(0.02, above=0)
    mean_tokens: int = bounded(65536, at_least=1)
    train_pairs: int = bounded(1024, at_least=1)
    fit_pairs: int = bounded(256, at_least=1)
    steps: int = bounded(300, at_least=1)
    batch_pairs: int = bounded(32, at_least=1)  # that the rare prompts are in each of them
    k_coef: float = 0.0003
    # gates that all begin alike close together, those that matter with those that do not: here a
    # node in a thousand matters, so their starts are spread wide, and steps are small
    lr: float = bounded(0.01, above=0)
    init_noise_scale: float = bounded(0.1, at_least=0)
    init_noise_bias: float = bounded(0.3, above=0)


# --- a planted model -------------------------------------------------------------------------

@dataclass
class Planted:
    """A model, its task and the circuits in it, each of which solves the task."""
    model: GPT
    task: Task
    pairs: Pairs
    truths: list[Planter]
    loss: float  # nats, of the whole model


def plant(cfg: PlantedConfig, shape: str, case: str, variant: str, place: str, seed: int,
          tokenizer) -> Planted:
    """Draw a background and plant a case in it. ValueError where no draw solves the task."""
    family, width = CASES[case]
    family = FAMILIES[family]
    task = family.task(width)
    pairs = load_pairs(task, tokenizer, cfg.train_pairs, "train", PROMPT, seed)
    late = SHAPES[shape].n_layer - 1 if place == "far" else 1
    for draw in range(DRAWS):
        model = background(SHAPES[shape], 1000 * seed + draw)
        # twice at the same places: each embedding entry makes the reads of all the others smaller,
        # and only in the second round are all there when strengths are measured
        for _ in range(2):
            torch.manual_seed(seed)
            rng = random.Random(f"{seed} {draw}")
            taken = set()
            if variant == "partial":
                planter = Planter(model, tokenizer, pairs.first(64), rng, taken=taken)
                hint(planter, late, family.deciding)
            truths = []
            for _ in range(2 if variant == "copy" else 1):
                planter = Planter(model, tokenizer, pairs.first(64), rng, taken=taken)
                family.plant(planter, 0, late, width)
                truths.append(planter)
        margin = margins(model, pairs.first(cfg.fit_pairs))
        loss = loss_of(calibrated(margin, *calibrate(margin)))
        # in a small model random weights can drown a circuit
        if loss <= SOLVED * cfg.target_loss:
            return Planted(model, task, pairs, truths, loss)
    raise ValueError(f"no draw of {shape} lets {case} ({variant}, {place}) through: "
                     f"{loss:.3f} nats; take another shape")


def truth_of(planter: Planter, ablation: str) -> tuple[set, set]:
    """The nodes and edges of a planted circuit. A node that a bias alone makes is its own mean: it
    counts only where nodes are held at zero, or where an edge of the circuit starts from it."""
    constant = planter.constant if ablation == "zero" else set()
    return planter.nodes | constant, planter.edges


def as_circuit(model: GPT, nodes: Iterable, edges: Iterable) -> tuple[Nodes, Edges]:
    """Lists of nodes (site, channel) and edges (site, channel, site, channel) as masks."""
    widths = {site: model.config.site_width(site) for site in model.sites}
    mask = {site: torch.zeros(width, dtype=torch.bool) for site, width in widths.items()}
    for site, channel in nodes:
        mask[site][channel] = True
    chosen = {ends: torch.zeros_like(kept) for ends, kept in all_edges(model).items()}
    wires = graph_of(model).wires
    for a, j, b, i in edges:
        chosen[a, b][wires[a, b].place(j, i)] = True
    return mask, chosen


def needed(planted: Planted, truth: tuple[set, set], search: Search, target: float):
    """The nodes and edges of a planted circuit that it cannot do without: itself made minimal. Some
    that was written by hand, the prompts never ask for: of two names mixed, the right one may stand
    out as well as alone. Where it misses the target there is nothing to leave out."""
    circuit = search.fit(*as_circuit(planted.model, *truth))
    if not circuit.loss <= target:
        return truth
    return parts_found(planted.model, minimise(search, circuit, target, quiet))


def least_loss(planted: Planted, truth: tuple[set, set], search: Search) -> tuple[float, float]:
    """The loss (nats) of a planted circuit alone, and the lowest when one of its edges is cut."""
    nodes, edges = truth
    whole = search.fit(*as_circuit(planted.model, nodes, edges)).loss
    cut = [search.fit(*as_circuit(planted.model, nodes, edges - {e})).loss for e in edges]
    return whole, min(cut)


# --- what the pruner finds -------------------------------------------------------------------

def precision_recall(found: set, truth: set) -> tuple[float, float]:
    """The share of what was found that is true, and of what is true that was found."""
    right = len(found & truth)
    return right / max(1, len(found)), right / max(1, len(truth))


def parts_found(model: GPT, circuit: Circuit) -> tuple[set, set]:
    """A circuit's nodes and edges, as `Planter` writes them."""
    nodes = {(site, i) for site, m in circuit.mask.items() for i in m.nonzero().flatten().tolist()}
    return nodes, {tuple(e[:4]) for e in edges_of(model, circuit.mask, circuit.edges)}


@dataclass
class Score:
    """How one circuit compares with the planted one. Of each pair: nodes, edges."""
    planted: tuple[int, int]
    found: tuple[int, int]
    precision: tuple[float, float]
    recall: tuple[float, float]
    loss: float     # nats, of what was found
    least: float    # nats, of what was planted, with its least needed edge cut
    seconds: float


def score(found: tuple[set, set], truths: list[tuple[set, set]], loss: float, least: float,
          seconds: float) -> Score:
    """Compare with the truth that was found best: by the edges in common, then the nodes."""
    nodes, edges = max(truths, key=lambda t: (len(found[1] & t[1]), len(found[0] & t[0])))
    precision, recall = zip(precision_recall(found[0], nodes), precision_recall(found[1], edges))
    return Score((len(nodes), len(edges)), (len(found[0]), len(found[1])), precision, recall,
                 loss, least, seconds)


def prunings(planted: Planted, constants: Nodes, cfg: PruneConfig,
             methods: Iterable[str]) -> Iterator[tuple[str, Circuit, float]]:
    """(method, the circuit, seconds) of each of `methods`; `minimal` starts from what `learned`
    finds."""
    for ranking in ("learned", "attribution"):
        if ranking not in methods and (ranking == "attribution" or "minimal" not in methods):
            continue
        clock = time.monotonic()
        (circuit,) = find(planted.model, planted.pairs, None, constants,
                          replace(cfg, method=ranking, starts=1), quiet)
        if ranking in methods:
            yield ranking, circuit, time.monotonic() - clock
        if ranking == "learned" and "minimal" in methods:
            search = Search(planted.model, constants, planted.pairs.first(cfg.fit_pairs))
            aim = SLACKS[0] * min(cfg.target_loss)
            circuit = minimise(search, circuit, aim, quiet)
            yield "minimal", circuit, time.monotonic() - clock


def settings_of(cfg: PlantedConfig, ablation: str = "mean") -> PruneConfig:
    """What planted models are pruned with."""
    given = {f.name: getattr(cfg, f.name) for f in fields(PlantedConfig)}
    given = {key: value for key, value in given.items() if hasattr(PruneConfig, key)}
    return PruneConfig(**given | {"target_loss": (cfg.target_loss,), "ablation": ablation})


def measure(cfg: PlantedConfig, planted: Planted, ablation: str,
            methods: Iterable[str]) -> dict[str, Score]:
    """Prune a planted model in every way and compare: a score by method."""
    settings = settings_of(cfg, ablation)
    constants = constants_of(planted.model, settings)
    aim = SLACKS[0] * cfg.target_loss
    search = Search(planted.model, constants, planted.pairs.first(cfg.fit_pairs))
    truths = [needed(planted, truth_of(planter, ablation), search, aim)
              for planter in planted.truths]
    whole, least = least_loss(planted, truths[0], search)
    if not whole <= cfg.target_loss:
        print(f"    the planted circuit alone has {whole:.3f} nats, above the target", flush=True)
    scores = {}
    for method, circuit, seconds in prunings(planted, constants, settings, methods):
        found = parts_found(planted.model, circuit)
        scores[method] = score(found, truths, circuit.loss, least, seconds)
    return scores


# --- the command -----------------------------------------------------------------------------

def words_of(cfg: PlantedConfig) -> dict[str, list[str]]:
    """The options that are lists of words. ValueError that names an unknown word."""
    words = {}
    for option, known in LISTS.items():
        words[option] = getattr(cfg, option).split(",")
        for word in words[option]:
            if word not in known:
                raise ValueError(f"{option} has no '{word}'; the nearest is "
                                 f"'{nearest(word, known)}', all are: {', '.join(known)}")
    if cfg.fit_pairs > cfg.train_pairs:
        raise ValueError(f"fit_pairs {cfg.fit_pairs} exceeds train_pairs {cfg.train_pairs}")
    return words


def save(folder: str, planted: Planted) -> None:
    """The model as a published directory, and the planted circuits as planted.json."""
    planted.model.save(folder)
    circuits = []
    for planter in planted.truths:
        nodes = defaultdict(list)
        for site, channel in sorted(planter.nodes):
            nodes[site].append(channel)
        circuits.append({"nodes": nodes, "edges": sorted(planter.edges),
                         "constant": sorted(planter.constant)})
    content = {"task": planted.task.name, "answers": planted.task.answers, "circuits": circuits}
    path = os.path.join(folder, "planted.json")
    write_atomic(path, json.dumps(content, indent=1).encode())
    print(f"wrote {folder}: a model with the circuit of {planted.task.name} in it; {path} names it")


def cell(values: list[float], form: str) -> str:
    """The median, and the range where there is one."""
    low, middle, high = (f"{x:{form}}" for x in (min(values), statistics.median(values),
                                                 max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def row(name: tuple, scores: list[Score]) -> str:
    """One line of the table: what is the same in all seeds, then medians and ranges."""
    cells = [*name]
    for part in (0, 1):  # nodes, edges
        cells.append(cell([s.planted[part] for s in scores], ".0f"))
        cells.append(cell([s.found[part] for s in scores], ".0f"))
        cells.append(cell([s.precision[part] for s in scores], ".2f"))
        cells.append(cell([s.recall[part] for s in scores], ".2f"))
    cells.append(cell([s.loss for s in scores], ".3f"))
    cells.append(cell([s.least for s in scores], ".3f"))
    cells.append(cell([s.seconds for s in scores], ".0f"))
    return f"| {' | '.join(cells)} |"


HEADER = ("| shape | case | variant | place | held at | method | nodes | found | precision "
          "| recall | edges | found | precision | recall | loss | least | s |\n"
          + 17 * "|---" + "|")


def run(cfg: PlantedConfig) -> None:
    """Measure every case asked for and print the table, a row when its last seed is done."""
    words = words_of(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    print(HEADER, flush=True)
    saved = not cfg.save
    for shape in words["shapes"]:
        places = words["places"] if SHAPES[shape].n_layer > 2 else ["far"]  # both are the same
        for case, variant, place in product(words["cases"], words["variants"], places):
            scores = defaultdict(list)
            for seed in range(cfg.seeds):
                planted = plant(cfg, shape, case, variant, place, seed, tokenizer)
                if not saved:
                    save(cfg.save, planted)
                    saved = True
                for ablation in words["ablations"]:
                    for method, s in measure(cfg, planted, ablation, words["methods"]).items():
                        scores[shape, case, variant, place, ablation, method].append(s)
            for name, of_seeds in scores.items():
                print(row(name, of_seeds), flush=True)


def main(argv: list[str]) -> int:
    cfg = parse(PlantedConfig, argv)
    try:
        run(cfg)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
