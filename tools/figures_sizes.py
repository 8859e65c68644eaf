"""The figures of tools/figures.py that are about the size of circuits.

- `NAME(lab)` measures one figure, `draw_NAME(figure, data)` draws it from its numbers alone.
- fig2: dense against sparse at the same validation loss. fig3: loss against size of circuits.
- fig31: learned masks against attribution. fig32: sufficient and necessary, as a circuit grows.
- ablations: the recipe of training less one part at a time. appendix_d: HardConcrete gates.

A model's size is the geometric mean of its circuits' edges over tasks (paper 2.2); where models are
compared, over the tasks that have a circuit in each of them. Losses are in nats.
"""
import statistics
from dataclasses import replace

from circuit import alone, inverse
from find import leading_gates, rank
from masks import Gates
from minimise import quiet
from model import GPT
from optim import kind_of
from prune import PruneConfig, constants_of, geometric_mean
from search import Search
from tasks import calibrate, calibrated, load_model, load_pairs, loss_of, margins, task_of
from tools.figures_lab import Edges, Found, Lab, common_tasks, said

AIM = 0.15                        # nats: the paper's target where there is one
TARGETS = (0.5, 0.15, 0.05, 0.02)  # of the curves; the paper's go on to 0.002
COIN = 0.693                      # nats of a coin flip
HELD_OUT = 256                    # pairs for each size of a growing circuit

Sizes = dict[str, int | None]     # task -> edges, None where there is no circuit


# --- comparing sizes ---------------------------------------------------------------------------

def compared(first: Sizes, second: Sizes) -> dict:
    """Both geometric means of edges and the second over the first, over the tasks that both have;
    None where they share no task."""
    tasks = [task for task in first if first[task] is not None and second[task] is not None]
    if not tasks:
        return {"tasks": [], "first": None, "second": None, "ratio": None}
    a = geometric_mean(first[task] for task in tasks)
    b = geometric_mean(second[task] for task in tasks)
    return {"tasks": tasks, "first": a, "second": b, "ratio": b / a}


def sizes_of(lab: Lab, edges: Edges, run: str, target: float) -> Sizes:
    return {task: edges[run, task, target] for task in lab.tasks}


def families(points: list[dict], fixed: str, along: str) -> dict[float, list[dict]]:
    """{value of one setting: the points that have it, along the other setting}, both ascending."""
    found = {}
    for value in sorted({point[fixed] for point in points}):
        found[value] = sorted((p for p in points if p[fixed] == value), key=lambda p: p[along])
    return found


def agree(points: list[dict], fixed: str, along: str, key: str, rises: bool) -> str:
    """In how many steps along one setting, the other fixed, a number goes the way of a claim:
    "5 of 8 steps"."""
    n = right = 0
    for row in families(points, fixed, along).values():
        for before, after in zip(row, row[1:]):
            n += 1
            right += (after[key] > before[key]) == rises
    return f"{right} of {n} steps"


def table_by_target(rows: list[dict], first: str, second: str, times: str) -> list[list[str]]:
    """The table of curves: of each target the number of tasks, both sizes and their ratio."""
    table = [["target, nats", "tasks", first, second, times]]
    for target in TARGETS:
        some = [row for row in rows if row["target"] == target]
        table.append([f"{target:g}", n_tasks(some),
                      *(said([row[key] for row in some], form)
                        for key, form in (("first", ".0f"), ("second", ".0f"), ("ratio", ".1f")))])
    return table


def n_tasks(rows: list[dict]) -> str:
    """Over how many tasks means were taken, as a range where it differs."""
    counts = sorted({len(row["tasks"]) for row in rows})
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def ticks_at(axis, values: list[float]) -> None:
    """A logarithmic axis from left to right, with these values on it and no others."""
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.set_xticks([], minor=True)


def draw_sizes(axis, rows: list[dict], key: str, label: str, style: str) -> None:
    """Edges against target loss: the median of the rows of each target, and their range."""
    targets = sorted({row["target"] for row in rows if row[key] is not None})
    by_target = [[row[key] for row in rows if row["target"] == t and row[key] is not None]
                 for t in targets]
    line, = axis.plot(targets, list(map(statistics.median, by_target)), style, label=label)
    axis.fill_between(targets, list(map(min, by_target)), list(map(max, by_target)), alpha=0.15,
                      color=line.get_color())
    ticks_at(axis, targets)
    axis.set_yscale("log")
    axis.set_xlabel("target loss, nats")
    axis.set_ylabel("edges, geometric mean over tasks")


# --- Fig. 2 ------------------------------------------------------------------------------------

def fig2(lab: Lab) -> Found:
    """Edges against target loss of sparse and dense models of the same validation loss; and at one
    target minimal circuits: of the sparse ones those of all tasks, of the dense ones that of the
    first. Such a one, of thousands of edges, takes a quarter of an hour."""
    pairs = lab.matched()
    runs = [*pairs, *pairs.values()]
    edges = lab.edges("paper", runs, TARGETS)
    minimal = lab.edges("minimal", list(pairs), (AIM,))
    rows = []
    for sparse, dense in pairs.items():
        for target in TARGETS:
            both = compared(*(sizes_of(lab, edges, run, target) for run in (sparse, dense)))
            rows.append({"target": target, "sparse": sparse, "dense": dense, **both})
    at_aim = [row for row in rows if row["target"] == AIM]
    small = []
    for row in at_aim:
        of_tasks = [minimal[row["sparse"], task, AIM] for task in row["tasks"]]
        there = [n for n in of_tasks if n is not None]
        small.append({"target": AIM, "sparse": row["sparse"], "tasks": len(there),
                      "edges": geometric_mean(there) if there else None})
    one = replace(lab, tasks=lab.tasks[:1])
    minimal |= one.edges("minimal", list(pairs.values()), (AIM,))
    of_one = [compared(*(sizes_of(one, minimal, run, AIM) for run in both))
              for both in pairs.items()]
    ratios = [row["ratio"] for row in at_aim]
    losses = {run: lab.loss_of(run) for run in runs}
    models = ", ".join(f"{sparse} {losses[sparse]:.2f} and {dense} {losses[dense]:.2f} nats"
                       for sparse, dense in pairs.items())
    text = (f"at {AIM} nats {said(ratios, '.0f')} times fewer, over {n_tasks(at_aim)} tasks: "
            f"{said([row['first'] for row in at_aim], '.0f')} edges, and "
            f"{said([row['second'] for row in at_aim], '.0f')}; made minimal, the sparse ones "
            f"have {said([row['edges'] for row in small], '.1f')}. Minimal ones of {one.tasks[0]} "
            f"have {said([row['ratio'] for row in of_one], '.0f')} times fewer: "
            f"{said([row['first'] for row in of_one], '.0f')}, and "
            f"{said([row['second'] for row in of_one], '.0f')}")
    data = {"rows": rows, "minimal": small, "minimal_of_one": of_one, "losses": losses}
    return Found(text, models, data, table_by_target(rows, "sparse", "dense", "times fewer"))


def draw_fig2(figure, data: dict) -> None:
    axis = figure.subplots()
    for key, name in (("first", "sparse"), ("second", "dense")):
        draw_sizes(axis, data["rows"], key, name, "o-")
    points = [row for row in data["minimal"] if row["edges"] is not None]
    axis.plot([row["target"] for row in points], [row["edges"] for row in points], "s",
              label="sparse, minimal")
    axis.legend()


# --- Fig. 3 ------------------------------------------------------------------------------------

def fig3(lab: Lab) -> Found:
    """Validation loss against the size of circuits, for models of several sizes and L0."""
    runs = list(lab.grid.values())
    lab.train(runs)
    edges = lab.edges("minimal", runs, (AIM,))
    tasks = common_tasks(edges, runs, lab.tasks, AIM)
    if not tasks:
        raise ValueError("no task has a circuit in all models of the grid")
    points = []
    for (width, share), run in lab.grid.items():
        size = geometric_mean(edges[run, task, AIM] for task in tasks)
        points.append({"width": width, "l0": share, "run": run, "loss": lab.loss_of(run),
                       "edges": size})
    sparser = (agree(points, "width", "l0", "loss", False),
               agree(points, "width", "l0", "edges", True))
    larger = (agree(points, "l0", "width", "loss", False),
              agree(points, "l0", "width", "edges", False))
    text = (f"sparser at a fixed width: worse in {sparser[0]}, smaller circuits in {sparser[1]}; "
            f"wider at a fixed L0: better in {larger[0]}, smaller circuits in {larger[1]} (minimal "
            "circuits; one seed a model, and three seeds of one model differ by some 1.5 times)")
    table = [["width", "L0, times the demo's", "nats", "edges, minimal"]]
    for p in points:
        table.append([f"{p['width']}", f"{p['l0']:g}", f"{p['loss']:.3f}", f"{p['edges']:.1f}"])
    models = f"{len(points)} models, one seed each; tasks: {', '.join(tasks)}"
    return Found(text, models, {"points": points, "tasks": tasks}, table)


def draw_fig3(figure, data: dict) -> None:
    axis = figure.subplots()
    for l0, row in families(data["points"], "l0", "width").items():
        axis.plot([p["edges"] for p in row], [p["loss"] for p in row], "o-", label=f"L0 x {l0:g}")
        for p in row:
            axis.annotate(f" {p['width']}", (p["edges"], p["loss"]), fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel(f"edges at {AIM} nats, geometric mean over tasks")
    axis.set_ylabel("validation loss, nats a token")
    axis.legend(title="numbers: width")


# --- Fig. 31 -----------------------------------------------------------------------------------

def fig31(lab: Lab) -> Found:
    """Learned masks against attribution as the ranking of nodes, at every target loss."""
    runs = [f"sparse{seed}" for seed in lab.seeds]
    lab.train(runs)
    learned = lab.edges("paper", runs, TARGETS)
    attributed = lab.edges("attribution", runs, TARGETS)
    rows = []
    for run in runs:
        for target in TARGETS:
            both = compared(sizes_of(lab, learned, run, target),
                            sizes_of(lab, attributed, run, target))
            rows.append({"target": target, "run": run, **both})
    text = []
    for target in TARGETS:
        ratios = [row["ratio"] for row in rows if row["target"] == target]
        text.append(f"{said(ratios, '.1f')} at {target}")
    measured = f"attribution needs so many times the edges: {'; '.join(text)} nats"
    table = table_by_target(rows, "learned masks", "attribution", "times the edges")
    return Found(measured, f"{', '.join(runs)}, over {n_tasks(rows)} tasks", {"rows": rows}, table)


def draw_fig31(figure, data: dict) -> None:
    axis = figure.subplots()
    draw_sizes(axis, data["rows"], "first", "learned masks", "o-")
    draw_sizes(axis, data["rows"], "second", "attribution", "s-")
    axis.legend()


# --- Fig. 32 -----------------------------------------------------------------------------------

def fig32(lab: Lab) -> Found:
    """The circuit alone, and the model without it, as the circuit grows along its ranking."""
    runs = [f"sparse{seed}" for seed in lab.seeds]
    lab.train(runs)
    wanted = [lab.pruning_of(run, lab.tasks[0], AIM, "paper", heldout_pairs=HELD_OUT)
              for run in runs]
    curves = dict(zip(runs, lab.each(growth, wanted)))
    first = []
    for curve in curves.values():
        first += [row for row in curve if row["sufficiency"] <= AIM][:1]
    nodes = said([row["nodes"] for row in first], ".0f")
    without = said([row["necessity"] for row in first], ".2f")
    refit = said([row["necessity_refit"] for row in first], ".2f")
    measured = (f"sufficient ({AIM} nats) from {nodes} nodes on; the model without those has "
                f"{without} nats, recalibrated {refit} (a coin flip: {COIN})")
    return Found(measured, f"{', '.join(runs)}, {lab.tasks[0]}", {"curves": curves})


def growth(cfg: PruneConfig) -> tuple[str, list[dict]]:
    """Held-out losses (nats) of the circuits of the 1, 2, 3, 4, 6, 8, ... leading gates, and of the
    model without them."""
    model, tokenizer = load_model(cfg.model, cfg.tokenizer)
    task = task_of(cfg.task)
    T = model.config.block_size
    train = load_pairs(task, tokenizer, cfg.train_pairs, "train", T, cfg.seed)
    heldout = load_pairs(task, tokenizer, cfg.heldout_pairs, "heldout", T, cfg.seed)
    constants = constants_of(model, cfg)
    gates = Gates(model, cfg.tie_qk)
    ranking = rank(model, train, constants, gates, cfg, quiet)
    search = Search(model, constants, train.first(cfg.fit_pairs), cfg.tie_qk)
    rows = []
    for k in growing(len(ranking.order)):
        circuit = leading_gates(search, gates, ranking, k)
        margin = alone(model, circuit, constants)(heldout)
        without = inverse(circuit.mask, constants)
        rest = margins(model, heldout, without)
        anew = calibrate(margins(model, train.first(cfg.fit_pairs), without))
        rows.append({
            "gates": k, "nodes": circuit.size[0], "edges": circuit.size[1],
            "sufficiency": loss_of(calibrated(margin, circuit.scale, circuit.shift)),
            "necessity": loss_of(rest),
            "necessity_refit": loss_of(calibrated(rest, *anew))})
    return f"  {cfg.model}: {len(rows)} sizes of a circuit", rows


def growing(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    sizes = {most}
    power = 1
    while power < most:
        sizes |= {power, min(most, 3 * power // 2)}
        power *= 2
    return sorted(sizes)


def draw_fig32(figure, data: dict) -> None:
    axis = figure.subplots()
    for n, (run, rows) in enumerate(data["curves"].items()):
        nodes = [max(1, row["nodes"]) for row in rows]
        axis.plot(nodes, [row["sufficiency"] for row in rows], f"C{n}o-", label=f"{run}: alone")
        axis.plot(nodes, [row["necessity"] for row in rows], f"C{n}s:", label="without it")
    axis.axhline(COIN, color="0.6", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("nodes of the circuit")
    axis.set_ylabel("task loss, nats (line: a coin flip)")
    axis.legend()


# --- other ways of training ----------------------------------------------------------------------

def ablations(lab: Lab) -> Found:
    """Training less one part of the recipe."""
    return beside_recipe(lab, lab.ablations)


def appendix_d(lab: Lab) -> Found:
    """Gates on weights that are learnt with them (tools/hard_concrete.py), at the same L0 and
    tokens."""
    return beside_recipe(lab, {"hard_concrete": "HardConcrete gates"})


def beside_recipe(lab: Lab, others: dict[str, str]) -> Found:
    """Other runs beside the recipe's: validation loss, dead neurons, and edges on the tasks that
    both have. A loss that became no number is a result as well.

    others: run -> what it is called.
    """
    whole = [f"sparse{seed}" for seed in lab.seeds]
    labels = dict.fromkeys(whole, "the recipe") | others
    lab.train(labels, may_diverge=True)
    trained = [run for run in labels if not lab.diverged(run)]
    edges = lab.edges("minimal", trained, (AIM,))
    usual = {}
    for task in lab.tasks:
        counts = [edges[run, task, AIM] for run in whole]
        usual[task] = None if None in counts else statistics.median(counts)
    rows = []
    for run, label in labels.items():
        if run not in trained:
            rows.append({"label": label, "run": run, "diverged": lab.diverged(run)})
            continue
        rows.append({"label": label, "run": run, "loss": lab.loss_of(run),
                     "dead": lab.at_the_end(run, "dead_neurons"), "l0": l0_of(lab, run),
                     **compared(usual, sizes_of(lab, edges, run, AIM))})
    recipe = rows[: len(whole)]
    text = "; ".join(beside(row, recipe[0], len(lab.tasks)) for row in rows[len(whole):])
    own = said([row["ratio"] for row in recipe], ".1f")
    models = (f"one seed each, beside {whole[0]}; edges are those of minimal circuits, times the "
              f"median of {len(whole)} seeds of the recipe, which have x {own}, "
              f"{said([row['loss'] for row in recipe], '.3f')} nats and "
              f"{said([row['dead'] for row in recipe], '.0%')} dead neurons")
    return Found(text, models, {"rows": rows}, table_beside(rows))


def l0_of(lab: Lab, run: str) -> int:
    """The nonzero weights of a saved model, of those that training may make zero."""
    weights = GPT.load(lab.folder(run)).named_parameters()
    return sum(int(p.count_nonzero()) for name, p in weights if kind_of(name) != "dense")


def beside(row: dict, recipe: dict, most: int) -> str:
    """A run of `beside_recipe` in words. recipe: the row of the same seed; most: of the tasks."""
    if "diverged" in row:
        return f"{row['label']}: did not train ({row['diverged']})"
    size = "no task in common" if row["ratio"] is None else f"x {row['ratio']:.1f} edges"
    if 0 < len(row["tasks"]) < most:
        size += f" over {len(row['tasks'])} of {most} tasks"
    return (f"{row['label']} {row['loss'] - recipe['loss']:+.3f} nats, {size}, {row['dead']:.0%} "
            f"dead, L0 x {row['l0'] / recipe['l0']:.2f}")


def table_beside(rows: list[dict]) -> list[list[str]]:
    table = [["", "validation loss", "edges, times the recipe's", "tasks", "dead", "L0"]]
    for row in rows:
        name = f"{row['label']} ({row['run']})"
        if "diverged" in row:
            table.append([name, "diverged", "–", "0", "–", "–"])
            continue
        times = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.append([name, f"{row['loss']:.3f}", times, str(len(row["tasks"])),
                      f"{row['dead']:.0%}", f"{row['l0']:,}"])
    return table


def draw_beside_recipe(figure, data: dict) -> None:
    axis = figure.subplots()
    for row in data["rows"]:
        if row.get("ratio") is not None:
            colour = "k" if row["label"] == "the recipe" else "C0"
            axis.plot(row["loss"], row["ratio"], "o", color=colour)
            axis.annotate(f" {row['label']}", (row["loss"], row["ratio"]), fontsize=7)
    axis.set_yscale("log")
    axis.set_xlabel("validation loss, nats a token")
    axis.set_ylabel(f"edges at {AIM} nats, times the recipe's")
