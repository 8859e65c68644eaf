"""The figures of tools/figures.py that look at activations.

- `NAME(lab)` measures one figure, `draw_NAME(figure, data)` draws it from its numbers alone.
- fig8: at which length of a list bracket counting fails, said beforehand from the circuit.
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

from case import Case, CaseConfig, case_of
from circuit import Nodes, run_to_last
from circuit_file import read_circuit
from data.tinypython.filler import NOUNS, function, number, variable
from measures import correlation
from model import GPT, NodeFn, record
from tasks import (Pairs, Task, calibrate, calibrated, last_logits, load_pairs, loss_of, margin_of,
                   margins)
from tokens import random_windows
from tools.figures_lab import Found, Lab, said
from tools.figures_sizes import AIM, agree, families, ticks_at
from tools.refute import nodes_of

VAL_TOKENS = 32768  # of the validation data
BRACKETS = "bracket_counting"
LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 30, 35, 40, 45, 50)  # of lists; the task's go to 6
LISTS = 64          # prompts of each length
SHORT = 2           # elements of the lists behind a comment
BIN_STEPS = 200     # of Appendix C's annealing
BIN_PAIRS = 16      # a step of it
BIN_LR = 0.02       # in units of the distance between a node's two levels
SHARES = (0.25, 0.5, 0.75)  # between the least and the largest: where a first threshold can be


# --- Fig. 8: what the first heads average --------------------------------------------------------

def lists(n: int, remark: str = "") -> Task:
    """Flat and nested lists of n elements as the task has them, behind little else, so that long
    ones have room; remark: what a comment before the list is to hold."""
    def prompts(r) -> tuple[str, str]:
        before = function(r, high=1)
        if remark:
            before += f"    # see {remark} {number(r)} for the {r.choice(NOUNS)}\n"
        row = ", ".join(number(r) for _ in range(n))
        start = f"{before}    {variable(r)} = "
        return f"{start}[{row}", f"{start}[[{row}"

    return Task(f"lists of {n} {remark}", "close a list by its nesting depth", ("]\n", "]]\n"),
                prompts)


@torch.no_grad()
def first_attention(case: Case) -> Nodes:
    """What the circuit's first attention makes of each token of the vocabulary: queries, keys and
    values, each (vocab, channels). Without positions they hang on nothing else. ValueError where
    there are positions."""
    config = case.model.config
    if config.d_pos_emb is not None or case.model.transformer.wpe.weight.any():
        raise ValueError(f"{case.settings.model} has positions: its first attention is no function "
                         "of tokens alone")
    every = torch.arange(config.vocab_size).unsqueeze(1)  # prompts of one token
    seen = {}
    keep = record(seen)

    def node(site: str, x: Tensor) -> Tensor:
        return keep(site, case.nodes(site, x))  # as it is once the other nodes are held

    case.reduced.sublayers[0](case.reduced.embed(every), node)
    return {name: seen[f"0.attn.{name}"].squeeze(1) for name in "qkv"}


def averaged(case: Case, tables: Nodes, pairs: Pairs) -> Tensor:
    """What the value nodes of the circuit's first attention gather at the last token of each
    prompt, (2n, nodes): by arithmetic from the tables of `first_attention`, nothing is run."""
    c = case.model.config
    by_head = {name: table.unflatten(-1, (c.n_head, c.d_head)) for name, table in tables.items()}
    rows = torch.arange(len(pairs.ids))
    query = by_head["q"][pairs.ids[rows, pairs.last]]  # (2n, H, D)
    scores = torch.einsum("nhd,nthd->nht", query, by_head["k"][pairs.ids]) / math.sqrt(c.d_head)
    padding = torch.arange(pairs.ids.shape[1]) > pairs.last[:, None]
    scores = scores.masked_fill(padding[:, None], -math.inf)
    sinks = case.model.transformer.h[0].attn.attn_imp
    if sinks is not None:  # one more place to look at, whose value is zero
        sink = sinks.sink_logit.view(1, -1, 1).expand(len(scores), -1, 1)
        scores = torch.cat([scores, sink], -1)
    share = scores.softmax(-1)[..., : pairs.ids.shape[1]]
    gathered = torch.einsum("nht,nthd->nhd", share, by_head["v"][pairs.ids]).flatten(1)
    return gathered[:, case.circuit.mask["0.attn.v"]]


def toward_second(margin: Tensor) -> Tensor:
    """Right minus wrong logit of each prompt (2n,) -> second answer's minus first's."""
    sign = 2.0 * (torch.arange(len(margin)) % 2) - 1.0
    return margin * sign


@torch.no_grad()
def reading_of(case: Case, tables: Nodes) -> tuple[Tensor, float]:
    """Weights (nodes + 1,) with which the averages make the circuit's logit difference, by least
    squares on the pairs that it was found on; and R2 on held-out pairs of the task."""
    def both(pairs: Pairs) -> tuple[Tensor, Tensor]:
        margin = margins(case.reduced, pairs, case.nodes)
        wanted = toward_second(calibrated(margin, case.circuit.scale, case.circuit.shift))
        return F.pad(averaged(case, tables, pairs), (0, 1), value=1.0).double(), wanted.double()

    x, wanted = both(case.fit)
    weights = torch.linalg.lstsq(x, wanted.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    x, wanted = both(case.heldout)
    r2 = 1 - (x @ weights - wanted).square().mean() / wanted.var(correction=0).clamp(min=1e-12)
    return weights, r2.item()


@torch.no_grad()
def on_lists(case: Case, tables: Nodes, weights: Tensor, n: int, remark: str = "") -> dict:
    """Of lists of n elements: the mean logit difference of `]]` and `]`, by nesting, and the mean
    probability of `]]` of nested ones; as predicted, of the circuit and of the whole model.
    ValueError where the context is too short for them."""
    T = case.model.config.block_size
    pairs = load_pairs(lists(n, remark), case.tokenizer, LISTS, "heldout", T)
    circuit = calibrated(margins(case.reduced, pairs, case.nodes), case.circuit.scale,
                         case.circuit.shift)
    x = F.pad(averaged(case, tables, pairs), (0, 1), value=1.0).double()
    found = {"n": n}
    for name, value in (("predicted", x @ weights), ("circuit", toward_second(circuit)),
                        ("model", toward_second(margins(case.model, pairs)))):
        found[name] = {"flat": value[::2].mean().item(), "nested": value[1::2].mean().item(),
                       "p_nested": value[1::2].sigmoid().mean().item()}
    return found


def flips_at(rows: list[dict], name: str) -> int | None:
    """The first length at which nested lists are more often closed as flat ones are."""
    return next((row["n"] for row in rows if row[name]["p_nested"] < 0.5), None)


def fig8(lab: Lab) -> Found:
    """Predicted from the circuit, then measured: where long lists fail, and what a bracket in a
    comment does. Of the models whose circuit averages anything in its first attention."""
    names = ["long0", *(f"sparse{seed}" for seed in lab.seeds)]
    lab.train(names)
    wanted = [lab.pruning_of(name, BRACKETS, AIM, "minimal", starts=3) for name in names]
    found = {}
    for name, cfg, circuit in zip(names, wanted, lab.circuits(wanted)):
        if circuit is not None and "0.attn.v" in circuit["nodes"]:
            found[name] = brackets_of(lab, cfg.out_dir)
    if not found:
        raise ValueError(f"no circuit of {BRACKETS} averages anything in its first attention")
    text = []
    for name, of_model in found.items():
        flips = [str(of_model["flips"][key] or f"none up to {of_model['lengths'][-1]['n']}")
                 for key in ("predicted", "circuit", "model")]
        shifts = [f"{of_model['remark'][key]:+.2f}" for key in ("predicted", "circuit", "model")]
        text.append(f"{name} (R2 {of_model['r2']:.2f}): nested lists fail from {flips[0]} elements "
                    f"on by prediction, {flips[1]} in the circuit, {flips[2]} in the model; an "
                    f"open bracket in a comment moves flat ones by {shifts[0]}, {shifts[1]}, "
                    f"{shifts[2]} logits toward ]]")
    return Found("; ".join(text), ", ".join(found), found)


def brackets_of(lab: Lab, folder: str) -> dict:
    """Prediction and measurement of one circuit."""
    path = os.path.join(folder, BRACKETS, "circuit.json")
    case = case_in(lab, path)
    tables = first_attention(case)
    weights, r2 = reading_of(case, tables)  # all that the prediction is made of
    rows = []
    for n in LENGTHS:
        try:
            rows.append(on_lists(case, tables, weights, n))
        except ValueError:  # longer than the context
            break
    plain, opened = (on_lists(case, tables, weights, SHORT, remark) for remark in ("at", "["))
    keys = ("predicted", "circuit", "model")
    return {"r2": r2, "lengths": rows, "flips": {key: flips_at(rows, key) for key in keys},
            "remark": {key: opened[key]["flat"] - plain[key]["flat"] for key in keys}}


def draw_fig8(figure, data: dict) -> None:
    axes = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(axes, data.items()):
        n = [row["n"] for row in found["lengths"]]
        for key, style in (("predicted", "k--"), ("circuit", "C0o-"), ("model", "C1s-")):
            axis.plot(n, [row[key]["p_nested"] for row in found["lengths"]], style, label=key)
        axis.set_title(name)
        axis.set_xlabel("elements of a nested list")
    axes[0].set_ylabel("P(]]) between the two")
    axes[0].legend()


def case_in(lab: Lab, path: str) -> Case:
    """A circuit of the lab and all that it is measured with."""
    from_file = CaseConfig(circuit=path, data=lab.data, tokenizer=lab.tokenizer)
    return case_of(from_file, read_circuit(path))


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
    the grid spans little of sparsity."""
    lab.train([*lab.grid.values(), "dense"])
    points = [{"width": width, "l0": share, "run": run, "kurtosis": stream_kurtosis(lab, run)}
              for (width, share), run in lab.grid.items()]
    dense = stream_kurtosis(lab, "dense")
    text = (f"higher where sparser, at a fixed width, in "
            f"{agree(points, 'width', 'l0', 'kurtosis', False)}; higher where wider, at a fixed "
            f"L0, in {agree(points, 'l0', 'width', 'kurtosis', True)}; "
            f"{said([point['kurtosis'] for point in points], '.1f')}, a dense one "
            f"{dense:.1f}, a Gaussian 3")
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


def binary(case: Case, levels: dict[str, tuple[Tensor, Tensor]], temperature: float,
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
def levels_at_first(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
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
def graded(case: Case, levels: dict[str, tuple[Tensor, Tensor]]) -> dict:
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


def binarise(case: Case, steps: int = BIN_STEPS) -> dict:
    """Task loss of a circuit on held-out pairs: as it is, with its nodes at two levels each as they
    are found, and after learning the levels while nodes are annealed from the identity, with
    temperature (1 - progress)^5 (Appendix C). And which nodes are `graded`."""
    levels = levels_at_first(case)
    found = {"nodes": case.circuit.size[0], "edges": case.circuit.size[1],
             "before": case.loss(margins(case.reduced, case.heldout, case.nodes)),
             "at_once": case.refit(partial(margins, case.reduced, nodes=binary(case, levels, 0.0))),
             **graded(case, levels)}
    # learnt in units of their distance, for nodes are of all sizes
    moved = {site: torch.zeros(2, len(left), requires_grad=True)
             for site, (left, _) in levels.items()}

    def now() -> dict[str, tuple[Tensor, Tensor]]:
        return {site: tuple(torch.stack(levels[site]) + by * (levels[site][1] - levels[site][0]))
                for site, by in moved.items()}

    optimizer = torch.optim.Adam(moved.values(), lr=BIN_LR)
    generator = case.generator()
    for step in range(steps):
        temperature = (1 - (step + 1) / steps) ** 5
        part = case.train.take(torch.randint(len(case.train), (BIN_PAIRS,), generator=generator))
        logits = run_to_last(case.reduced, part, binary(case, now(), temperature))
        margin = calibrated(margin_of(logits, part), case.circuit.scale, case.circuit.shift)
        F.softplus(-margin).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found["after"] = case.refit(partial(margins, case.reduced, nodes=binary(case, now(), 0.0)))
    return found


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
    n_graded = sum(len(row["graded"]) for row in rows)
    places = Counter()  # without their layer
    for row in rows:
        places.update(site.partition(".")[2] for site, _ in row["graded"])
    most = ", ".join(f"{place} {n}" for place, n in places.most_common(3))
    measured = (f"nats on held-out pairs: {text}; {held} of {len(rows)} still meet {AIM}. With all "
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
