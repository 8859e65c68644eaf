"""A circuit through training: when do its parts form, before weights go or while they do?

    python train.py --config=configs/demo.toml --keep_every=165
    python prune.py --config=configs/demo_prune.toml
    python -m tools.formation --run=out/demo --task=single_double_quote

In RUN/TASK/formation/, of each step that the run kept and of its end:
- formation.json, all numbers: the task loss of the whole model and of its bigram table alone;
  density, learning rate, validation loss; the circuit of the step; and of each edge of the final
  circuit its weight, its rank in its matrix, and what the model loses without it.
- formation.html: one page that needs no network, with a slider over the steps.
- formation.png: the curves, for a paper. It needs pip install -r requirements-extra.txt

The final circuit is RUN/TASK/circuit.json; where there is none, the model is pruned first. From it
the walk goes backward: a step has the circuit of the step after it, less what it does not need, as
long as that does the task; else masks are learnt, which begin with its gates wide open and the
others ajar. A step whose whole model misses the target has no circuit. A control, the final model
pruned with other mask seeds, says how much two circuits of one model overlap; another, one step
searched without a neighbour, what that start does. What is finished lies in parts/ and is not done
again. docs/formation.md says more.
"""
import html
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse, write_atomic

from circuit_file import circuit_of, read_circuit
from model_files import weights_hash
from processes import in_processes
from prune import PruneConfig, prune_task
from tasks import load_model, load_pairs, task_of
from tools.formation_result import FORMAT, content_of, plot, table_of, text_of
from tools.formation_steps import Study, circuit_at, control, edges_at, parts_in
from tools.planted import parts_found
from train import TrainConfig
from view import as_data, page

PAGE = Path(__file__).with_name("formation.html")


@dataclass
class FormationConfig:
    run: str = "out/demo"           # of train.py, with --keep_every; or several, A,B,C: a table
    task: str = "single_double_quote"  # or a file of pairs: .jsonl, .csv
    out_dir: str = ""               # "" = RUN/TASK/formation
    data: str = "data/tinypython"   # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    jobs: int = bounded(2, at_least=1)  # processes at a time; more than two have nothing to do
    # what is asked of the final circuit where RUN/TASK/circuit.json is still to be made
    target_loss: float = bounded(0.15, above=0)
    necessity: float = bounded(0.55, at_least=0)
    mask_steps: int = bounded(300, at_least=1)  # where a kept step needs another circuit
    search_pairs: int = bounded(128, at_least=1)  # that its circuit is first searched for on
    cut_pairs: int = bounded(256, at_least=1)   # held-out pairs on which single edges are cut
    matters: float = bounded(0.01, above=0)     # nats that cutting an edge must cost to count
    controls: int = bounded(2, at_least=0)      # other mask seeds on the final model


# --- what a run has left -----------------------------------------------------------------------

def read_log(path: str) -> list[dict]:
    """The entries of log.jsonl. ValueError, in one line, where one is damaged."""
    entries = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            try:
                entry = json.loads(line)
                int(entry["step"])
            except (ValueError, TypeError, LookupError):
                raise ValueError(f"{path}, line {n} is damaged") from None
            entries.append(entry)
    return entries


def read_run(folder: str) -> tuple[TrainConfig, list[dict], dict[int, str]]:
    """The settings of a finished run, its log, and its models by step, the last one the final.
    ValueError, in one line, where it is none, or kept no step."""
    for name in ("train.toml", "log.jsonl"):
        if not os.path.exists(os.path.join(folder, name)):
            raise ValueError(f"{folder} is no run of train.py: it has no {name}")
    cfg = parse(TrainConfig, [f"--config={os.path.join(folder, 'train.toml')}"])
    log = read_log(os.path.join(folder, "log.jsonl"))
    done = max([entry["step"] for entry in log], default=0)
    if done < cfg.max_steps:
        raise ValueError(f"{folder} is at step {done} of {cfg.max_steps}: train it to its end "
                         "first, with --resume")
    kept = {}
    for name in os.listdir(folder):
        number = re.fullmatch(r"step_(\d+)", name)
        if number and int(number[1]) < cfg.max_steps:
            kept[int(number[1])] = os.path.join(folder, name)
    if not kept:
        raise ValueError(f"{folder} kept no step; train it with --keep_every=N")
    return cfg, log, dict(sorted(kept.items())) | {cfg.max_steps: folder}


def final_circuit(cfg: FormationConfig) -> dict:
    """The content of RUN/TASK/circuit.json, which is made where there is none. ValueError where it
    is of other weights."""
    path = os.path.join(cfg.run, task_of(cfg.task).name, "circuit.json")
    if not os.path.exists(path):
        prune_task(PruneConfig(
            model=cfg.run, task=cfg.task, data=cfg.data, tokenizer=cfg.tokenizer, minimal=True,
            target_loss=(cfg.target_loss,), necessity=cfg.necessity), cfg.task)
    content = read_circuit(path)
    if content["model"]["sha256"] != weights_hash(cfg.run):
        raise ValueError(f"{path} is of other weights than those in {cfg.run}; prune the task "
                         "again, or remove it")
    return content


def asked_of(content: dict, cfg: FormationConfig) -> PruneConfig:
    """The settings that the final circuit was pruned with."""
    known = {f.name for f in fields(PruneConfig)}
    given = {key: value for key, value in content["settings"].items() if key in known}
    own = dict(model=cfg.run, task=cfg.task, data=cfg.data, tokenizer=cfg.tokenizer, out_dir="",
               device="cpu", target_loss=(content["target_loss"],))
    return PruneConfig(**given | own)


def study_of(cfg: FormationConfig, folders: dict[int, str], final: dict) -> Study:
    """What all steps share. ValueError or OSError, in one line, where that cannot be had."""
    task = task_of(cfg.task)
    asked = asked_of(final, cfg)
    model, tokenizer = load_model(cfg.run, cfg.tokenizer)
    circuit, _ = circuit_of(final, model)
    nodes, edges = parts_found(model, circuit)
    T = model.config.block_size
    n = asked.train_pairs + asked.apart_pairs  # the same pairs as prune.py draws
    train = load_pairs(task, tokenizer, n, "train", T, asked.seed).first(asked.train_pairs)
    heldout = load_pairs(task, tokenizer, asked.heldout_pairs, "heldout", T, asked.seed)
    return Study(
        folders=folders, task=task, tokenizer=tokenizer, tokenizer_path=cfg.tokenizer,
        pruning=asked, mask_steps=cfg.mask_steps, train=train, fit=train.first(asked.fit_pairs),
        few=train.first(min(cfg.search_pairs, asked.fit_pairs)), heldout=heldout,
        cut=heldout.first(cfg.cut_pairs), final=final, nodes=nodes, edges=sorted(edges))


def folder_of(cfg: FormationConfig) -> str:
    """Where everything goes."""
    return cfg.out_dir or os.path.join(cfg.run, task_of(cfg.task).name, "formation")


# --- the work, in parts that are kept ----------------------------------------------------------

class Kept:
    """Finds what an earlier call has finished, of the same settings and weights."""

    def __init__(self, cfg: FormationConfig, study: Study):
        self.folder = os.path.join(folder_of(cfg), "parts")
        os.makedirs(self.folder, exist_ok=True)
        self.made_of = {
            "format": FORMAT, "asked": asdict(study.pruning),
            "final": [sorted(study.nodes), study.edges]}

    def get(self, name: str, source: dict, make: Callable[[], dict]) -> dict:
        """The part of that name, made by `make` unless it is there, of the same `source`."""
        path = os.path.join(self.folder, f"{name}.json")
        made_of = json.loads(json.dumps(self.made_of | source))  # as a file has it
        try:
            with open(path, encoding="utf-8") as f:
                part = json.load(f)
            if part["made_of"] == made_of:
                return part["found"]
        except (OSError, ValueError, TypeError, LookupError):  # missing or damaged
            pass
        text = json.dumps({"made_of": made_of, "found": make()})
        write_atomic(path, text.encode())
        return json.loads(text)["found"]


def searched_by(cfg: FormationConfig) -> dict:
    """The settings that decide about the circuits of kept steps, and nothing else."""
    return {"mask_steps": cfg.mask_steps, "search_pairs": cfg.search_pairs}


def circuits_of(study: Study, kept: Kept, cfg: FormationConfig) -> dict[int, dict]:
    """`circuit_at` of every step, from the last one backward."""
    neighbour = study.nodes, set(study.edges)
    found = {}
    clock = time.monotonic()
    for step, folder in reversed(study.folders.items()):
        source = {"sha256": weights_hash(folder), **searched_by(cfg),
                  "neighbour": list(map(sorted, neighbour))}
        make = partial(circuit_at, study, step, neighbour)
        at = kept.get(f"circuit_{step:06d}", source, make)
        text = at["why"]
        if at["circuit"] is not None:
            neighbour = parts_in(at["circuit"])
            text = (f"{at['circuit']['n_nodes']} nodes, {at['circuit']['n_edges']} edges, "
                    f"{at['circuit']['loss_heldout']:.3f} nats held out")
        found[step] = at
        say_left(f"step {step}: {text}", len(found), len(study.folders), clock)
    return found


def edges_of_final(study: Study, kept: Kept) -> dict[int, dict]:
    """`edges_at` of every step."""
    found = {}
    clock = time.monotonic()
    for step, folder in study.folders.items():
        source = {"sha256": weights_hash(folder), "cut_pairs": len(study.cut)}
        found[step] = kept.get(f"edges_{step:06d}", source, partial(edges_at, study, step))
        text = f"edges at step {step}: the final circuit alone {found[step]['alone']:.3f} nats"
        say_left(text, len(found), len(study.folders), clock)
    return found


def controls_of(study: Study, kept: Kept, n: int) -> list[dict]:
    """`control` with n other seeds."""
    found = []
    clock = time.monotonic()
    for seed in range(study.pruning.seed + 1, study.pruning.seed + 1 + n):
        source = {"sha256": weights_hash(study.pruning.model), "seed": seed}
        found.append(kept.get(f"control_{seed}", source, partial(control, study, seed)))
        text = (f"mask seed {seed}: {found[-1]['n_nodes']} nodes, {found[-1]['n_edges']} edges, "
                f"overlap with the final circuit's edges {found[-1]['overlap']['edges']:.2f}")
        say_left(text, len(found), n, clock)
    return found


def cold_start(study: Study, kept: Kept, cfg: FormationConfig) -> tuple[int, dict]:
    """The kept step where the last weights have gone, and what is found there without a neighbour:
    what a search does not owe to where it began."""
    run, _, _ = read_run(cfg.run)
    kept_steps = sorted(study.folders)[:-1]
    step = min(kept_steps, key=lambda step: abs(step - run.anneal_end * run.max_steps))
    source = {"sha256": weights_hash(study.folders[step]), **searched_by(cfg)}
    at = kept.get(f"cold_{step:06d}", source, partial(circuit_at, study, step, (set(), set())))
    found = at["why"] or f"{at['circuit']['n_nodes']} nodes, {at['circuit']['n_edges']} edges"
    print(f"  step {step} without a neighbour: {found}", flush=True)
    return step, at


def say_left(text: str, done: int, of: int, clock: float) -> None:
    """A line of progress. The time left is as if all that is left took as long as what is done."""
    left = (time.monotonic() - clock) / done * (of - done)
    print(f"  {text}  ({done}/{of}, {left:.0f} s left)", flush=True)


def work(cfg: FormationConfig, folders: dict[int, str], final: dict, what: str) -> object:
    """One of the two halves: the circuits, or the edges of the final one and the controls."""
    study = study_of(cfg, folders, final)
    kept = Kept(cfg, study)
    if what == "circuits":
        return circuits_of(study, kept, cfg)
    return {"traced": edges_of_final(study, kept),
            "controlled": controls_of(study, kept, cfg.controls),
            "cold": cold_start(study, kept, cfg)}


# --- the command -------------------------------------------------------------------------------

def write_all(cfg: FormationConfig, content: dict) -> None:
    """The three files."""
    folder = folder_of(cfg)
    path = os.path.join(folder, "formation")
    write_atomic(f"{path}.json", json.dumps(content, allow_nan=False).encode())
    title = html.escape(f"{content['task']} through training")
    text = page(PAGE, title=title, data=as_data(content))
    write_atomic(f"{path}.html", text.encode("utf-8", errors="replace"))
    print(f"{path}.json\n{path}.html")
    plot(content, f"{path}.png")


def run_one(cfg: FormationConfig) -> dict:
    """Measure what is missing of one run, and write; returns the content of formation.json.
    ValueError or OSError, in one line, where that cannot be done."""
    run, log, folders = read_run(cfg.run)
    final = final_circuit(cfg)
    print(f"{len(folders)} steps of {cfg.run}, from {min(folders)} to {max(folders)}", flush=True)
    half = partial(work, cfg, folders, final)
    halves = ("circuits", "the rest")
    if cfg.jobs == 1:
        found = [half(what) for what in halves]
    else:
        found = in_processes(half, halves, 2)
    for result in found:
        if isinstance(result, str):
            raise ValueError(result)
    study = study_of(cfg, folders, final)
    content = content_of(study, asdict(cfg), run, log, *found)
    write_all(cfg, content)
    print(text_of(content), flush=True)
    return content


def main(argv: list[str]) -> int:
    cfg = parse(FormationConfig, argv)
    try:
        runs = cfg.run.split(",")
        if len(runs) > 1 and cfg.out_dir:
            raise ValueError("out_dir is for one run: several would write over each other")
        for run in runs:  # before hours go by on the first
            read_run(run)
        contents = [run_one(replace(cfg, run=run)) for run in runs]
        if len(runs) > 1:
            print(f"\n{table_of(contents)}")
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
