"""From what tools/formation.py measured of each step to its result: the content of formation.json,
its curves as formation.png, and in words.

- `content_of`: the steps and the edges of the final circuit, compared with each other.
- `plot`: needs pip install -r requirements-extra.txt
- `text_of`: since when the model, and the final circuit alone, do the task; `table_of`: the same of
  several runs.
"""
import math
import statistics
from dataclasses import asdict
from functools import partial

from config import write_atomic

from optim import density_at
from tools.formation_steps import Study, overlap, parts_in
from tools.planted import cell
from train import TrainConfig, learning_rate_at

FORMAT = "sparse-formation-1"  # to be changed with what its keys mean


# --- what is said of each step, and of each edge -----------------------------------------------

def schedule_at(cfg: TrainConfig, step: int) -> dict[str, float]:
    """The density and the learning rate of the step that made the model of `step`."""
    i = step - 1  # schedules count from 0
    density = density_at(i, cfg.max_steps, cfg.density, cfg.anneal_start, cfg.anneal_end)
    return {"density": density, "lr": learning_rate_at(cfg, i, density)}


def since(steps: list[int], holds: list[bool]) -> int | None:
    """The first step from which on something holds at all steps; None where not at the last."""
    first = None
    for step, it_does in zip(steps, holds):
        if not it_does:
            first = None
        elif first is None:
            first = step
    return first


def changes(before: set, now: set) -> dict:
    """Which parts are new and which are gone, and how many are kept."""
    return {"new": sorted(now - before), "kept": len(now & before), "gone": sorted(before - now)}


def step_rows(run: TrainConfig, log: list[dict], circuits: dict, traced: dict) -> list[dict]:
    """Of each step what formation.json says of it, in their order."""
    validated = {entry["step"]: entry["val_loss"] for entry in log if "val_loss" in entry}
    final = parts_in(circuits[max(circuits)]["circuit"])
    before = None
    rows = []
    for step in sorted(circuits):
        at = circuits[step]
        row = {"step": step, **schedule_at(run, step), "val_loss": validated.get(step), **at,
               "final_alone": traced[step]["alone"], "without_final": traced[step]["without"],
               "overlap": None, "changes": None}
        if at["circuit"] is not None:
            now = parts_in(at["circuit"])
            row["overlap"] = overlap(now, final)
            if before is not None:
                row["changes"] = {"nodes": changes(before[0], now[0]),
                                  "edges": changes(before[1], now[1])}
            before = now
        rows.append(row)
    return rows


def edge_rows(study: Study, run: TrainConfig, matters: float, circuits: dict,
              traced: dict) -> list[dict]:
    """Of each edge of the final circuit what formation.json says of it: lists go by step."""
    steps = sorted(circuits)
    found = [circuits[step]["circuit"] for step in steps]
    rows = []
    for n, edge in enumerate(study.edges):
        seen = [traced[step]["edges"][n] for step in steps]
        left = run.density * seen[0]["entries"]  # so many weights the matrix has in the end
        within = [c["costs"].get(str(n)) if c else None for c in found]
        mattered = [step for step, at in zip(steps, seen) if at["cost"] > matters]
        rows.append({
            "edge": edge, "entries": seen[0]["entries"],
            **{key: [at[key] for at in seen] for key in ("weight", "rank", "cost")},
            "cost_in_circuit": within,
            "nonzero_since": since(steps, [at["weight"] != 0 for at in seen]),
            "zero_at": [step for step, at in zip(steps, seen) if at["weight"] == 0],
            # so large that it would be left, had the density of the end come at once
            "leading_since": since(steps, [at["rank"] is not None and at["rank"] <= left
                                           for at in seen]),
            "mattered_first": mattered[0] if mattered else None,
            "in_circuit_since": since(steps, [cost is not None for cost in within]),
        })
    return rows


def summary_of(run: TrainConfig, rows: list[dict], target: float, ceiling: list[float]) -> dict:
    """Since which kept step, for good, what is said of the circuit as a whole; of `final_alone`
    also at which one it was so first."""
    steps = [row["step"] for row in rows]
    alone = [row["step"] for row in rows if row["final_alone"] <= target]
    overlaps = [row["overlap"]["edges"] if row["overlap"] else -1 for row in rows]
    return {
        "anneal_end": round(run.anneal_end * run.max_steps),
        "model_solves": since(steps, [row["whole"]["loss_calibrated"] <= target for row in rows]),
        "final_alone_first": min(alone, default=None),
        "final_alone": since(steps, [row["final_alone"] <= target for row in rows]),
        "overlaps_as_controls": since(steps, [x >= min(ceiling, default=1.0) for x in overlaps]),
    }


def cold_row(cold: tuple[int, dict], study: Study) -> dict:
    """What formation.json says of a step's circuit that was searched for without a neighbour's."""
    step, at = cold
    row = {"step": step, "why": at["why"], "n_nodes": None, "n_edges": None, "overlap": None}
    if at["circuit"] is not None:
        row |= {key: at["circuit"][key] for key in ("n_nodes", "n_edges", "loss_heldout")}
        row["overlap"] = overlap(parts_in(at["circuit"]), (study.nodes, set(study.edges)))
    return row


def content_of(study: Study, settings: dict, run: TrainConfig, log: list[dict], circuits: dict,
               rest: dict) -> dict:
    """The content of formation.json. circuits: of `circuit_at`, by step; rest: `traced`, of
    `edges_at`, by step, `controlled`, of `control`, and `cold`, the step and the circuit_at of
    a search without a neighbour; settings: the command's; run, log: the training's."""
    traced, controlled, cold = rest["traced"], rest["controlled"], rest["cold"]
    rows = step_rows(run, log, circuits, traced)
    ceiling = [found["overlap"]["edges"] for found in controlled]
    final = {key: study.final[key] for key in (
        "task", "task_description", "answers", "model", "target_loss", "loss_heldout")}
    return {
        "format": FORMAT, **final, "run": settings["run"], "matters": settings["matters"],
        "max_steps": run.max_steps, "final_density": run.density,
        "validation": [{"step": entry["step"], "val_loss": entry["val_loss"]}
                       for entry in log if "val_loss" in entry],
        "steps": rows,
        "edges": edge_rows(study, run, settings["matters"], circuits, traced),
        "controls": controlled, "cold": cold_row(cold, study) if cold else None,
        "summary": summary_of(run, rows, study.target, ceiling),
        "settings": settings, "asked": asdict(study.pruning),
    }


# --- for a paper -------------------------------------------------------------------------------

def name_of(edge: list) -> str:
    """An edge in few letters: 1.attn.v.122 > resid_delta.94."""
    a, j, b, i = edge
    return f"{a}.{j} > {b.rsplit('.', 1)[1]}.{i}"


def plot(content: dict, path: str) -> None:
    """The curves over the steps, and a raster of the final circuit's edges; without matplotlib a
    line that says how to get it."""
    try:
        import matplotlib
        matplotlib.use("Agg")  # no screen needed
        import matplotlib.pyplot as plt
    except ImportError:
        print("no formation.png: it needs matplotlib: pip install -r requirements-extra.txt")
        return
    raster = 0.5 + 0.24 * len(content["edges"])  # inches
    figure, axes = plt.subplots(
        5, 1, figsize=(7, 8 + raster), sharex=True, layout="constrained",
        height_ratios=[2.2, 1.3, 1.6, 1.6, raster])
    plot_losses(content, axes[0])
    plot_schedule(content, axes[1])
    plot_circuits(content, *axes[2:4])
    image = plot_raster(content, axes[4])
    figure.colorbar(image, ax=axes[4], location="bottom", aspect=60, pad=0.02,
                    label="rank among the weights of its matrix, as a share")
    for axis in axes:
        axis.axvline(content["summary"]["anneal_end"], color="0.5", linewidth=0.8, linestyle=":")
    for axis in (axes[0], axes[2], axes[3]):
        axis.legend(fontsize=7.5, ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 0.97),
                    frameon=False, borderaxespad=0.2, columnspacing=1.2, handlelength=1.4)
    axes[4].set_xlabel("training step (dotted: the last weights go)")
    figure.suptitle(f"{content['task']}, {content['run']}", fontsize=11)
    write_atomic(path, partial(figure.savefig, format="png", dpi=160))
    plt.close(figure)
    print(path)


def plot_losses(content: dict, axis) -> None:
    """Task loss: of the whole model, of the final circuit alone, of each step's own."""
    rows = content["steps"]
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["whole"]["loss_calibrated"] for row in rows], color="k",
              label="whole model")
    axis.plot(steps, [row["final_alone"] for row in rows], label="final circuit alone")
    own = [(row["step"], row["circuit"]["loss_heldout"]) for row in rows if row["circuit"]]
    axis.plot(*zip(*own), "o", markersize=3.5, label="circuit of the step")
    axis.plot(steps, [row["whole"]["bigram_loss"] for row in rows], color="0.6", linewidth=1,
              label="bigram table alone")
    axis.axhline(content["target_loss"], color="0.3", linewidth=0.8, linestyle="--")
    axis.set_ylim(0, 1)
    axis.set_ylabel("task loss, nats")


def plot_schedule(content: dict, axis) -> None:
    """Density and learning rate."""
    steps = [row["step"] for row in content["steps"]]
    axis.plot(steps, [row["density"] for row in content["steps"]], color="k")
    axis.set_yscale("log")
    axis.set_ylabel("density")
    rate = axis.twinx()
    rate.plot(steps, [row["lr"] for row in content["steps"]], color="C1")
    rate.set_ylabel("learning rate", color="C1")


def plot_circuits(content: dict, size, common) -> None:
    """Sizes of the circuits, and their overlap with the final one."""
    found = [row for row in content["steps"] if row["circuit"]]
    steps = [row["step"] for row in found]
    for part in ("edges", "nodes"):
        sizes = [row["circuit"][f"n_{part}"] for row in found]
        size.plot(steps, sizes, "o-", markersize=3.5, label=part)
        shares = [row["overlap"][part] for row in found]
        common.plot(steps, shares, "o-", markersize=3.5, label=f"{part}, Jaccard")
    held = [row["overlap"]["held"] for row in found]
    common.plot(steps, held, "o-", markersize=3.5, label="final edges that it has")
    size.set_yscale("log")
    size.set_ylabel("circuit size")
    ceiling = [control["overlap"]["edges"] for control in content["controls"]]
    if ceiling:
        common.axhspan(min(ceiling) - 0.005, max(ceiling) + 0.005, color="C0", alpha=0.25,
                       linewidth=0, label="edges, other mask seeds")
    common.set_ylim(-0.03, 1.05)
    common.set_ylabel("overlap with final")


def plot_raster(content: dict, axis):
    """The final circuit's edges against steps: how large the weight is for its matrix, where it
    matters to the whole model, where it is in the step's circuit. Returns what has the colours."""
    import matplotlib.colors
    steps = [row["step"] for row in content["steps"]]
    colours = matplotlib.colors.LogNorm(1e-4, 1)
    for n, row in enumerate(content["edges"]):
        share = [rank / row["entries"] if rank else math.nan for rank in row["rank"]]
        image = axis.scatter(steps, [n] * len(steps), c=share, marker="s", s=48, cmap="viridis",
                             norm=colours)
        zero = row["zero_at"]
        axis.plot(zero, [n] * len(zero), "x", color="0.6", markersize=4)
        matters = [s for s, cost in zip(steps, row["cost"]) if cost > content["matters"]]
        axis.plot(matters, [n] * len(matters), "o", color="white", markersize=3.2)
        within = [s for s, cost in zip(steps, row["cost_in_circuit"]) if cost is not None]
        axis.plot(within, [n] * len(within), "s", color="black", markersize=8.5, fillstyle="none",
                  markeredgewidth=1)
    names = [name_of(row["edge"]) for row in content["edges"]]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(f"edges of the final circuit; cross: zero, dot: without it the model loses "
                   f"{content['matters']:g} nats,\nframe: it is in the circuit of the step",
                   fontsize=8, loc="left")
    return image


# --- in words ----------------------------------------------------------------------------------

def at_step(content: dict, step: int | None) -> dict:
    """The row of the kept step that is nearest; {} of None."""
    if step is None:
        return {}
    return min(content["steps"], key=lambda row: abs(row["step"] - step))


def of_circuit(row: dict, key: str) -> float | None:
    """A number of the circuit of a step; None where it has none."""
    if not row or row["circuit"] is None:
        return None
    return 100 * row["overlap"]["held"] if key == "held" else row["circuit"][key]


def measures_of(content: dict) -> dict[str, float | None]:
    """The numbers of the table over several runs, by the words that stand there."""
    summary, edges, controls = content["summary"], content["edges"], content["controls"]
    solved = at_step(content, summary["model_solves"])
    thin = at_step(content, summary["anneal_end"])
    cold = content["cold"]["overlap"]
    found = {
        "edges of the final circuit": len(edges),
        "their overlap with those of other mask seeds, the least":
            min([c["overlap"]["edges"] for c in controls], default=None),
        "the whole model meets the target from step": summary["model_solves"],
        "density then": solved.get("density"),
        "edges of the circuit then": of_circuit(solved, "n_edges"),
        "final edges that it has, %": of_circuit(solved, "held"),
        "the last weights go at step": summary["anneal_end"],
        "edges of the circuit then ": of_circuit(thin, "n_edges"),
        "final edges that it has, % ": of_circuit(thin, "held"),
        "the same, searched without a neighbour, %": 100 * cold["held"] if cold else None,
        "a step's circuit overlaps as much as mask seeds' from step":
            summary["overlaps_as_controls"],
        "the final circuit alone first meets the target at step": summary["final_alone_first"],
        "final edges that were zero at no kept step, %":
            100 * sum(not row["zero_at"] for row in edges) / max(1, len(edges)),
    }
    for key, words in (("nonzero_since", "is not zero from step"),
                       ("leading_since", "is among the largest, as many as are left, from step"),
                       ("mattered_first", "first matters to the whole model at step")):
        steps = [row[key] for row in edges if row[key] is not None]
        found[f"the median final edge {words}"] = statistics.median(steps) if steps else None
    return found


def table_of(contents: list[dict]) -> str:
    """A row for each of `measures_of`: the runs, then their median and range."""
    names = [content["run"] for content in contents]
    lines = [f"| | {' | '.join(names)} | median (range) |", "|---" * (len(names) + 2) + "|"]
    for measure, *values in zip(measures_of(contents[0]), *(
            measures_of(content).values() for content in contents)):
        known = [value for value in values if value is not None]
        form = ".2f" if known and max(known) <= 1 else ".0f"
        shown = ["–" if value is None else f"{value:{form}}" for value in values]
        lines.append(f"| {measure.strip()} | {' | '.join(shown)} | "
                     f"{cell(known, form) if known else '–'} |")
    return "\n".join(lines)


def text_of(content: dict) -> str:
    """What was found, in few lines."""
    summary = content["summary"]
    never_zero = sum(not row["zero_at"] for row in content["edges"])
    return (
        f"since which kept step, for good (the last weights go at {summary['anneal_end']}):\n"
        f"  the whole model meets {content['target_loss']} nats: {summary['model_solves']}\n"
        f"  the final circuit alone does: {summary['final_alone']} "
        f"(first at {summary['final_alone_first']})\n"
        f"  the step's circuit overlaps with it as controls do: {summary['overlaps_as_controls']}\n"
        f"of the final circuit's {len(content['edges'])} edges {never_zero} were zero at no kept "
        "step")
