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
from tools.figures_lab import Found, Lab, known, said
from tools.figures_sizes import AIM

BRIDGES = ("bridge0", "bridge1", "bridge2")
# At 0.15 the circuit of while_return_true can leave out what marks a return (docs/bridges.md).
STEERED = {"single_double_quote": 0.15, "while_return_true": 0.05}
# Of the controls, which take most of the time: those that an objection is about, one run of each.
LEVELS = ("nonsense", "wiring")
CONTROL_SEEDS = 1


# --- Fig. 9 ------------------------------------------------------------------------------------

def fig9(lab: Lab) -> Found:
    """Steering curves: P of the other prompt's answer in the dense model, against strength."""
    runs = [run for run in BRIDGES if run in lab.runs]
    lab.train(runs)
    keys = [(task, run) for task in STEERED for run in runs]
    wanted = [lab.pruning_of(run, task, STEERED[task], "paper", starts=3) for task, run in keys]
    curves = {}
    missing = {}
    for (task, run), cfg, circuit in zip(keys, wanted, lab.circuits(wanted)):
        name = f"{task}, {run}"
        if circuit is None:
            missing[name] = known(cfg)
            continue
        try:
            curves[name] = steered_by(lab, run, task, cfg.out_dir)
        except ValueError as e:  # what was steered is kept
            missing[name] = str(e)
    text = []
    for task in STEERED:
        of_task = [c for name, c in curves.items() if name.startswith(f"{task},")]
        if of_task:
            text.append(f"{task}: {in_words(of_task)}")
    text += [f"{name}: not steered: {why}" for name, why in missing.items()]
    if not curves:
        raise ValueError(f"nothing could be steered: {'; '.join(text)}")
    return Found("; ".join(text), ", ".join(runs), {"curves": curves})


def steered_by(lab: Lab, run: str, task: str, circuits: str) -> dict:
    """The curves that steer.py finds with a task's circuit of a pair. ValueError where it fails."""
    path = os.path.join(circuits, task, "circuit.json")
    command = ["steer.py", f"--run={lab.folder(run)}", f"--circuit={path}", f"--task={task}",
               f"--dense={lab.folder(f'dense_{run}')}", f"--data={lab.data}",
               f"--tokenizer={lab.tokenizer}"]
    lab.call({os.path.join(circuits, "steer.log"): command})
    with open(os.path.join(lab.folder(run), "steer", task, "steer.json")) as f:
        found = json.load(f)
    return {
        **{key: found[key] for key in ("strength", "nodes", "n_pairs", *COMPARED)},
        "among_all": found["absolute"]["steered"],
        "single": found["best_single"]["steered"],
    }


def in_words(curves: list[dict]) -> str:
    """Of one task's curves, their medians and ranges without steering and at full strength."""
    def at(end: int, key: str) -> str:
        return said([curve[key]["mean"][end] for curve in curves if curve[key]], ".3f")

    channels = said([len(curve["nodes"]) for curve in curves], ".0f")
    return (f"P of the other answer, between the two, {at(0, 'steered')} to {at(-1, 'steered')} by "
            f"{channels} channels (among all tokens {at(0, 'among_all')} to "
            f"{at(-1, 'among_all')}); by the best single one {at(-1, 'single')}, random directions "
            f"{at(-1, 'random')}, the dense model's own mean difference "
            f"{at(-1, 'dense_mean_difference')}")


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
    for level in LEVELS:  # what a card has is not measured again
        lab.call({f"{path}.log": ["validate.py", f"--circuit={path}", f"--data={lab.data}",
                                  f"--tokenizer={lab.tokenizer}", f"--level={level}",
                                  f"--control_seeds={CONTROL_SEEDS}"] for path in paths.values()})
    found = {run: objections(read_circuit(path), circuits[run, "zero"])
             for run, path in paths.items()}
    table = [["objection", "measured as", sparse, dense]]
    for key, (objection, name) in OBJECTIONS.items():
        table.append([objection, name, *(number(of_run[key]) for of_run in found.values())])
    text = "; ".join(f"{name} {' and '.join(row)}" for _, name, *row in table[1:])
    models = f"{task} in {sparse} and {dense}: a model, a start and a run of each control"
    return Found(text, models, {"found": found, "task": task}, table)


# key of `objections` -> what is objected, and what is measured
OBJECTIONS = {
    "edges": ("", "edges of the circuit"),
    "nonsense": ("masks reach a low loss on a nonsensical task",
                 "edges that nonsense needs, times the circuit's"),
    "wiring": ("... and in a model with random weights",
               "edges that untrained wiring needs, times the circuit's"),
    "frozen": ("norms shift under ablation", "loss with norms frozen, recalibrated"),
    "zero_edges": ("zero ablation gives smaller circuits", "edges of a circuit found among zeros"),
    "complement": ("(a reply) the complement is only ever off",
                   "loss with random halves of the complement, the worst"),
}


def objections(circuit: dict, zero: dict | None) -> dict:
    """The numbers of OBJECTIONS from a circuit's card, and from a circuit found with zeros; of
    controls how many runs met the target, and the least that one of them took. None: not to be had.
    """
    card = circuit["validation"]
    n = circuit["n_edges"]
    found = {"edges": n, "zero_edges": None if zero is None else zero["n_edges"],
             "frozen": card["frozen_norms_refit"], "complement": card["complement_worst"]}
    for level in LEVELS:
        factor = factor_of(card["controls"], n, level)
        if factor is None:
            found[level] = None
            continue
        found[level] = {"met": factor.met, "runs": factor.runs, "unsettled": factor.unsettled,
                        "least": factor.least if factor.met else None}  # JSON has no infinity
    return found


def number(x: float | dict | None) -> str:
    """For a reader; a dict is of a level's controls."""
    if x is None:
        return "–"
    if not isinstance(x, dict):
        return str(x) if isinstance(x, int) else f"{x:.2f}"
    text = f"{x['met']} of {x['runs']} runs met the target"
    if x["met"]:
        text += f", with {x['least']:.1f} times or more"
    if x["unsettled"]:
        text += f", {x['unsettled']} were still getting better"
    return text


def draw_critique(figure, data: dict) -> None:
    axis = figure.subplots()
    keys = [key for key in OBJECTIONS if key != "edges"]
    for n, (run, found) in enumerate(data["found"].items()):
        for place, key in enumerate(keys):
            value = found[key]["least"] if isinstance(found[key], dict) else found[key]
            if value is not None:
                axis.barh(place + 0.4 * n, value, 0.4, color=f"C{n}",
                          label=run if place == 0 else None)
            axis.text(1, place + 0.4 * n, f" {run}: {number(found[key])}", fontsize=7, va="center")
    axis.set_yticks(range(len(keys)), [OBJECTIONS[key][1] for key in keys], fontsize=7)
    axis.set_xscale("log")
