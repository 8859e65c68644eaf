"""The figures of tools/figures.py that look at activations.

- `NAME(lab)` measures one figure, `draw_NAME(figure, data)` draws it from its numbers alone.
- fig10: kurtosis of the final residual stream. binarised: nodes of two values (Appendix C).
- tokens: how the token losses of two models correlate.

Losses are in nats.
"""
import math
import os
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from case import Case
from circuit import Nodes, run_to_last
from measures import correlation
from model import GPT, NodeFn, record
from tasks import Pairs, calibrate, calibrated, last_logits, loss_of, margin_of, margins
from tokens import random_windows
from tools.figures_lab import Found, Lab, case_in, said
from tools.figures_sizes import AIM, agree, families, ticks_at
from tools.refute import nodes_of

VAL_TOKENS = 32768  # of the validation data
BIN_STEPS = 400     # of Appendix C's annealing
BIN_PAIRS = 16      # a step of it
# In units of the distance between a node's two levels, falling in a line. All are tried: with steps
# for nodes, a little more or less can end at a coin's loss.
BIN_LRS = (0.01, 0.005, 0.002)
SHARES = (0.25, 0.5, 0.75)  # between the least and the largest: where a first threshold can be

Levels = dict[str, tuple[Tensor, Tensor]]  # site -> two values of each of its nodes


# --- Fig. 10 -----------------------------------------------------------------------------------

def kurtosis(x: Tensor) -> Tensor:
    """(..., channels) -> (...): the fourth central moment over the variance squared, over channels;
    3 of a Gaussian, and the more the fewer channels stand out."""
    away = x.double() - x.double().mean(-1, keepdim=True)
    return away.pow(4).mean(-1) / away.square().mean(-1).square()


@torch.no_grad()
def stream_kurtosis(lab: Lab, run: str) -> float:
    """Of the final residual stream, the mean over tokens of validation data."""
    model = GPT.load(lab.folder(run)).requires_grad_(False)
    found = [kurtosis(model.run(model.embed(ids))).flatten() for ids in val_windows(lab, model)]
    return torch.cat(found).mean().item()


def val_windows(lab: Lab, model: GPT):
    """Batches of windows of the validation data, the same for all models of a context."""
    config = model.config
    path = os.path.join(lab.data, "val.bin")
    return random_windows(path, config.vocab_size, config.block_size, VAL_TOKENS, 0)


def fig10(lab: Lab) -> Found:
    """Kurtosis of the final residual stream against sparsity and size; and of a dense model, for
    the grid spans little of sparsity, beside the sparse ones of its width."""
    lab.train([*lab.grid.values(), "dense"])
    points = [{"width": width, "l0": share, "run": run, "kurtosis": stream_kurtosis(lab, run)}
              for (width, share), run in lab.grid.items()]
    dense = stream_kurtosis(lab, "dense")
    width = GPT.load(lab.folder("dense")).config.d_model
    as_wide = [point["kurtosis"] for point in points if point["width"] == width]
    text = (f"higher where sparser, at a fixed width, in "
            f"{agree(points, 'width', 'l0', 'kurtosis', False)}; higher where wider, at a fixed "
            f"L0, in {agree(points, 'l0', 'width', 'kurtosis', True)}; "
            f"{said([point['kurtosis'] for point in points], '.1f')}; at width {width} "
            f"{said(as_wide, '.1f')}, a dense one without AbsTopK {dense:.1f}, a Gaussian 3")
    models = f"{len(points)} models and a dense one, one seed each"
    return Found(text, models, {"points": points, "dense": dense})


def draw_fig10(figure, data: dict) -> None:
    axis = figure.subplots()
    for width, row in families(data["points"], "width", "l0").items():
        axis.plot([p["l0"] for p in row], [p["kurtosis"] for p in row], "o-", label=f"{width}")
    axis.axhline(data["dense"], color="0.5", linestyle=":", label="64, dense")
    ticks_at(axis, sorted({p["l0"] for p in data["points"]}))
    axis.set_xlabel("L0, times the demo's")
    axis.set_ylabel("kurtosis over the channels of the final stream")
    axis.legend(title="width")


# --- token losses --------------------------------------------------------------------------------

@torch.no_grad()
def token_losses(lab: Lab, run: str) -> Tensor:
    """Nats of each token of the windows of validation data."""
    model = GPT.load(lab.folder(run)).requires_grad_(False)
    found = []
    for ids in val_windows(lab, model):
        logits = model(ids)[0][:, :-1]
        found.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    return torch.cat(found)


def tokens(lab: Lab) -> Found:
    """How the token losses of a dense and a sparse model correlate, and those of two seeds."""
    pairs = lab.matched()
    losses = {run: token_losses(lab, run) for run in (*pairs, *pairs.values())}
    sparse, dense = list(pairs), list(pairs.values())
    kinds = {
        "dense and sparse": list(pairs.items()),
        "two dense seeds": list(zip(dense, dense[1:])),
        "two sparse seeds": list(zip(sparse, sparse[1:])),
    }
    found = {}
    for kind, of_kind in kinds.items():
        found[kind] = [[a, b, correlation(losses[a], losses[b])] for a, b in of_kind]
    text = "; ".join(f"{kind} {said([row[2] for row in of_kind], '.3f')}"
                     for kind, of_kind in found.items())
    # a picture has room for few of many tokens
    some = {run: x[:: max(1, len(x) // 4000)].tolist() for run, x in losses.items()}
    shown = {run: some[run] for run in (sparse[0], dense[0])}
    return Found(text, ", ".join((*sparse, *dense)), {"correlations": found, "shown": shown})


def draw_tokens(figure, data: dict) -> None:
    axis = figure.subplots()
    (x, a), (y, b) = data["shown"].items()
    axis.plot(a, b, ".", markersize=2, alpha=0.4)
    axis.set_xlabel(f"{x}, nats of a token")
    axis.set_ylabel(f"{y}, nats of a token")


# --- Appendix C: nodes of two values -------------------------------------------------------------

def first_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (tokens, nodes) -> two levels of each node (nodes,), the means on either side of
    a threshold: the one at 1/4, 1/2 or 3/4 between min and max with the least squared error."""
    low, high = x.amin(0), x.amax(0)
    best = torch.full_like(low, math.inf)
    left, right = low.clone(), low.clone()
    for share in SHARES:
        above = x > low + share * (high - low)
        n = above.sum(0)
        over = (x * above).sum(0) / n.clamp(min=1)
        under = (x * ~above).sum(0) / (len(x) - n).clamp(min=1)
        over = torch.where(n > 0, over, under)  # of a node that never varies
        error = (x - torch.where(above, over, under)).square().mean(0)
        left, right = torch.where(error < best, under, left), torch.where(error < best, over, right)
        best = torch.minimum(best, error)
    return left, right


def two_level(x: Tensor, left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """x (..., nodes) on the way from itself, at temperature 1, to one of two levels, at 0; the
    threshold is their midpoint."""
    level = torch.where(x > (left + right) / 2, right, left)
    return temperature * x + (1 - temperature) * level


def binary(case: Case, levels: Levels, temperature: float,
           chosen: Nodes | None = None) -> NodeFn:
    """The circuit's nodes, or of these the chosen ones, as `two_level`; all others as ever."""
    def node(site: str, x: Tensor) -> Tensor:
        x = case.nodes(site, x)
        if site not in levels:
            return x
        mask = case.circuit.mask[site]
        stepped = two_level(x[..., mask], *levels[site], temperature)
        stepped = x.masked_scatter(mask.expand_as(x), stepped)
        return stepped if chosen is None else torch.where(chosen[site], stepped, x)
    return node


@torch.no_grad()
def levels_at_first(case: Case) -> Levels:
    """`first_levels` of every node of the circuit, over the tokens of the pairs that it was found
    on, padding left out."""
    seen = {}
    keep = record(seen)

    def node(site: str, x: Tensor) -> Tensor:
        return keep(site, case.nodes(site, x))

    last_logits(case.reduced, case.fit, node)
    real = torch.arange(case.fit.ids.shape[1]) <= case.fit.last[:, None]
    return {site: first_levels(seen[site][real][:, mask])
            for site, mask in case.circuit.mask.items() if mask.any()}


@torch.no_grad()
def graded(case: Case, levels: Levels) -> dict:
    """Which nodes are no steps beside the others. One after another is put on its two levels, and
    stays there as long as the loss on the pairs that the circuit was found on is at most AIM: those
    first that cost the least alone. The others, and the held-out loss with the steps."""
    nodes = list(nodes_of(case.circuit.mask))

    def run(steps: list[tuple[str, int]], pairs: Pairs) -> Tensor:
        chosen = {site: torch.zeros_like(kept) for site, kept in case.circuit.mask.items()}
        for site, channel in steps:
            chosen[site][channel] = True
        return margins(case.reduced, pairs, binary(case, levels, 0.0, chosen))

    def loss(steps: list[tuple[str, int]]) -> float:
        margin = run(steps, case.fit)
        return loss_of(calibrated(margin, *calibrate(margin)))

    steps = []
    for node in sorted(nodes, key=lambda node: loss([node])):
        if loss([*steps, node]) <= AIM:
            steps.append(node)
    return {"graded": [node for node in nodes if node not in steps],
            "but_graded": case.refit(partial(run, steps))}


def binarise(case: Case) -> dict:
    """Task loss of a circuit on held-out pairs: as it is, with its nodes at two levels each as they
    are found, and with those `annealed` levels that are best on the pairs that the circuit was
    found on, if they are better there. And which nodes are `graded`."""
    levels = levels_at_first(case)
    learnt = min((annealed(case, levels, lr) for lr in BIN_LRS), key=partial(stepped_loss, case))
    is_better = stepped_loss(case, learnt) < stepped_loss(case, levels)

    def held_out(levels: Levels) -> float:
        return case.refit(partial(margins, case.reduced, nodes=binary(case, levels, 0.0)))

    return {
        "nodes": case.circuit.size[0], "edges": case.circuit.size[1],
        "before": case.loss(margins(case.reduced, case.heldout, case.nodes)),
        "at_once": held_out(levels), **graded(case, levels),
        "learnt": is_better, "after": held_out(learnt if is_better else levels),
    }


def annealed(case: Case, levels: Levels, lr: float) -> Levels:
    """Levels learnt from `levels` on while nodes are annealed from the identity to steps, with
    temperature (1 - progress)^5 (Appendix C)."""
    # in units of their distance, for nodes are of all sizes
    moved = {site: torch.zeros(2, len(left), requires_grad=True)
             for site, (left, _) in levels.items()}

    def now() -> Levels:
        return {site: tuple(torch.stack(levels[site]) + by * (levels[site][1] - levels[site][0]))
                for site, by in moved.items()}

    optimizer = torch.optim.Adam(moved.values(), lr=lr)
    generator = case.generator()
    for step in range(BIN_STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / BIN_STEPS)
        temperature = (1 - (step + 1) / BIN_STEPS) ** 5
        part = case.train.take(torch.randint(len(case.train), (BIN_PAIRS,), generator=generator))
        logits = run_to_last(case.reduced, part, binary(case, now(), temperature))
        margin = calibrated(margin_of(logits, part), case.circuit.scale, case.circuit.shift)
        F.softplus(-margin).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return now()


@torch.no_grad()
def stepped_loss(case: Case, levels: Levels) -> float:
    """Nats on the pairs that the circuit was found on, calibrated anew, with all nodes at two
    levels."""
    margin = margins(case.reduced, case.fit, binary(case, levels, 0.0))
    return loss_of(calibrated(margin, *calibrate(margin)))


def binarise_file(lab: Lab, path: str) -> tuple[str, dict]:
    """`binarise` of a circuit's file, and a line."""
    found = binarise(case_in(lab, path)) | {"circuit": path}
    return f"  {path}: {found['before']:.3f} nats, binarised {found['after']:.3f}", found


def binarised(lab: Lab) -> Found:
    """Every node of a circuit replaced by a step of two levels."""
    runs = [f"sparse{seed}" for seed in lab.seeds]
    lab.train(runs)
    wanted = [lab.pruning_of(run, task, AIM, "minimal") for run in runs for task in lab.tasks]
    paths = [os.path.join(cfg.out_dir, cfg.task, "circuit.json")
             for cfg, circuit in zip(wanted, lab.circuits(wanted)) if circuit is not None]
    if not paths:
        raise ValueError("no task has a circuit to binarise")
    rows = lab.each(partial(binarise_file, lab), paths)
    held = sum(row["after"] <= AIM for row in rows)
    text = ", ".join(f"{name} {said([row[key] for row in rows], '.3f')}" for key, name in
                     (("before", "before"), ("at_once", "levels as found"), ("after", "after")))
    learnt = sum(row["learnt"] for row in rows)
    n_graded = sum(len(row["graded"]) for row in rows)
    places = Counter()  # without their layer
    for row in rows:
        places.update(site.partition(".")[2] for site, _ in row["graded"])
    most = ", ".join(f"{place} {n}" for place, n in places.most_common(3))
    measured = (f"nats on held-out pairs: {text} (learning found better levels for {learnt} of "
                f"{len(rows)} circuits); {held} still meet {AIM}. With all "
                f"but {n_graded} of {sum(row['nodes'] for row in rows)} nodes as steps: "
                f"{said([row['but_graded'] for row in rows], '.3f')}; the others are graded "
                f"(most at {most})")
    return Found(measured, f"{len(rows)} minimal circuits of {', '.join(runs)}", {"rows": rows})


def draw_binarised(figure, data: dict) -> None:
    axis = figure.subplots()
    before = [row["before"] for row in data["rows"]]
    axis.plot(before, [row["at_once"] for row in data["rows"]], "x", label="levels as found")
    axis.plot(before, [row["after"] for row in data["rows"]], "o", label="after annealing")
    axis.plot(before, [row["but_graded"] for row in data["rows"]], "^", label="all but graded ones")
    axis.axline((0, 0), slope=1, color="0.7", linewidth=0.8)
    axis.axhline(AIM, color="0.7", linewidth=0.8, linestyle=":")
    axis.set_xlabel("task loss of the circuit, nats held out")
    axis.set_ylabel("with nodes of two levels")
    axis.legend()
