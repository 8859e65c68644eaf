"""The figures of tools/figures.py that ask how far to trust circuits.

- `NAME(lab)` measures one figure, `draw_NAME(figure, data)` draws it from its numbers alone.
- fig9: a dense model steered by a sparse one's circuit (steer.py).
- critique: the four objections of Drori, "Weight-sparse circuits may be interpretable yet
  unfaithful" (2026), as lines of the faithfulness card (validate.py), of a sparse and of a dense
  model.

Losses are in nats.
"""
import json
import os

from circuit_file import read_circuit
from controls import factor_of
from steer import COMPARED
from tools.figures_lab import Found, Lab, said
from tools.figures_sizes import AIM

BRIDGES = ("bridge0", "bridge1")
# At 0.15 the circuit of while_return_true can leave out what marks a return (docs/bridges.md).
STEERED = {"single_double_quote": 0.15, "while_return_true": 0.05}
NOT_MET = 1e9      # times the edges, where no control met the target: JSON has no infinity
CONTROL_SEEDS = 1  # of each of the seven controls, which take most of the time


# --- Fig. 9 ------------------------------------------------------------------------------------

def fig9(lab: Lab) -> Found:
    """Steering curves: P of the other prompt's answer in the dense model, against strength."""
    runs = [run for run in BRIDGES if run in lab.runs]
    lab.train(runs)
    keys = [(run, task) for run in runs for task in STEERED]
    wanted = [lab.pruning_of(run, task, STEERED[task], "paper", starts=3) for run, task in keys]
    curves = {}
    for (run, task), cfg, circuit in zip(keys, wanted, lab.circuits(wanted)):
        if circuit is None:
            continue
        path = os.path.join(cfg.out_dir, task, "circuit.json")
        command = ["steer.py", f"--run={lab.folder(run)}", f"--circuit={path}", f"--task={task}",
                   f"--dense={lab.folder(f'dense_{run}')}", f"--data={lab.data}",
                   f"--tokenizer={lab.tokenizer}"]
        lab.call({os.path.join(cfg.out_dir, "steer.log"): command})
        with open(os.path.join(lab.folder(run), "steer", task, "steer.json")) as f:
            steered = json.load(f)
        curves[f"{task}, {run}"] = {key: steered[key] for key in ("strength", "nodes", *COMPARED)}
    if not curves:
        raise ValueError("no bridged model has a circuit to steer by")
    text = []
    for task in STEERED:
        of_task = [c for name, c in curves.items() if name.startswith(f"{task},")]
        ends = {key: said([c[key]["mean"][-1] for c in of_task if c[key]], ".3f")
                for key in COMPARED}
        start = said([c["steered"]["mean"][0] for c in of_task], ".4f")
        text.append(f"{task}: {start} to {ends['steered']}, random directions {ends['random']}")
    return Found("; ".join(text), ", ".join(runs), {"curves": curves})


def draw_fig9(figure, data: dict) -> None:
    curves = data["curves"]
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axis, (name, curve) in zip(axes, curves.items()):
        for key in COMPARED:
            if curve[key] is not None:  # a circuit of few nodes has no others
                axis.plot(curve["strength"], curve[key]["mean"], label=key.replace("_", " "))
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
        axis.set_xlabel("strength")
    axes[0].set_ylabel("P of the other answer, between the two")
    axes[0].legend(fontsize=7)


# --- Drori's critique ----------------------------------------------------------------------------

def critique(lab: Lab) -> Found:
    """The four objections, of one task's minimal circuit in a sparse and in a dense model of the
    same validation loss."""
    ((sparse, dense),) = lab.matched(lab.seeds[:1]).items()
    task = lab.tasks[0]
    keys = [(run, kind) for run in (sparse, dense) for kind in ("minimal", "zero")]
    wanted = {key: lab.pruning_of(key[0], task, AIM, key[1]) for key in keys}
    circuits = dict(zip(keys, lab.circuits(list(wanted.values()))))
    paths = {}
    for run in (sparse, dense):
        if circuits[run, "minimal"] is None:
            raise ValueError(f"{run} has no circuit of {task}")
        paths[run] = os.path.join(wanted[run, "minimal"].out_dir, task, "circuit.json")
    # a card that is complete is not measured again
    lab.call({f"{path}.log": ["validate.py", f"--circuit={path}", f"--data={lab.data}",
                              f"--tokenizer={lab.tokenizer}", f"--control_seeds={CONTROL_SEEDS}"]
              for path in paths.values()})
    found = {run: objections(read_circuit(path), circuits[run, "zero"])
             for run, path in paths.items()}
    table = [["objection", "measured as", sparse, dense]]
    for key, (objection, name) in OBJECTIONS.items():
        table.append([objection, name, *(number(of_run[key]) for of_run in found.values())])
    text = "; ".join(f"{name} {' and '.join(row)}" for _, name, *row in table[1:])
    return Found(text, f"{task} in {sparse} and {dense}", {"found": found, "task": task}, table)


# key of `objections` -> what is objected, and what is measured
OBJECTIONS = {
    "edges": ("", "edges of the circuit"),
    "nonsense": ("masks reach a low loss on a nonsensical task",
                 "edges that nonsense needs, times the circuit's, at least"),
    "wiring": ("... and in a model with random weights",
               "edges that untrained wiring needs, times the circuit's, at least"),
    "frozen": ("norms shift under ablation", "loss with norms frozen, recalibrated"),
    "zero_edges": ("zero ablation gives smaller circuits", "edges of a circuit found among zeros"),
    "complement": ("(a reply) the complement is only ever off",
                   "loss with random halves of the complement, the worst"),
}


def objections(circuit: dict, zero: dict | None) -> dict:
    """The numbers of OBJECTIONS from a circuit's card, and from a circuit found with zeros. inf:
    none of the controls met the target; None: not to be had."""
    card = circuit["validation"]
    n = circuit["n_edges"]
    found = {"edges": n, "zero_edges": None if zero is None else zero["n_edges"],
             "frozen": card["frozen_norms_refit"], "complement": card["complement_worst"]}
    for level in ("nonsense", "wiring"):
        factor = factor_of(card["controls"], n, level)
        found[level] = None if factor is None else min(factor.least, NOT_MET)
    return found


def number(x: float | None) -> str:
    """For a reader."""
    if x is None:
        return "–"
    if x >= NOT_MET:
        return "not met"
    return str(x) if isinstance(x, int) else f"{x:.2f}"


def draw_critique(figure, data: dict) -> None:
    axis = figure.subplots()
    keys = [key for key in OBJECTIONS if key != "edges"]
    for n, (run, found) in enumerate(data["found"].items()):
        for place, key in enumerate(keys):
            value = found[key]
            if value is not None and value < NOT_MET:
                axis.barh(place + 0.4 * n, value, 0.4, color=f"C{n}",
                          label=run if place == 0 else None)
            axis.text(1, place + 0.4 * n, f" {run}: {number(value)}", fontsize=7, va="center")
    axis.set_yticks(range(len(keys)), [OBJECTIONS[key][1] for key in keys], fontsize=7)
    axis.set_xscale("log")
