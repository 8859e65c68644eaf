"""What the figures of tools/figures.py are made of: models that are trained, circuits that are
pruned, each of them once.

- `Lab.train`: runs of the table, each a command line of its own in a child process. A run whose
  command and data are the same goes on where it stopped, and one that is finished is not begun
  again.
- `Lab.matched`: for each sparse model a dense one of the same validation loss, found by its steps.
- `Lab.circuits`: prunings, several at a time; what an earlier call has left is read, also that a
  task has no circuit.
- `Progress`: what is done of the expected time, and what is left at that pace.
"""
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from config import write_atomic

from case import Case, CaseConfig, case_of
from circuit_file import read_circuit, write_circuit
from data.workers import cores
from minimise import quiet
from model_files import weights_hash
from processes import in_processes
from prune import PruneConfig, already_pruned, load, path_of, prune, settings_in_file
from tasks import task_of
from tokens import fingerprint, read_data
from tools.formation import read_log
from tools.planted import cell

CLOSE = 0.02         # nats: two models of the same validation loss
TRIES = 7            # dense runs for one sparse model
FIRST_STEPS = 2400   # of the first of them
# Nats by which twice the steps lower the loss of a dense run, until two runs tell.
PER_DOUBLING = 0.15
POLL = 0.2           # seconds between looks at the children
SAY_EVERY = 60       # seconds between lines of progress while models are trained
MARK = "figures.json"  # in a run's folder: its command and data, and whether that is finished
LOG = "figures.log"          # beside it: what the command printed
NO_CIRCUIT = "no_circuit.json"
DIVERGED = "so the run stops here"  # what train.py says of a loss that is no number
# The ways of pruning that figures compare. The paper's pruner bisects a ranking of the nodes.
KINDS = {
    "paper": {},
    "minimal": {"minimal": True},
    "attribution": {"method": "attribution"},
    "zero": {"minimal": True, "ablation": "zero"},
}


@dataclass(frozen=True)
class Found:
    """What a figure's function measured."""
    measured: str  # in words, for its row
    models: str    # on which models
    data: dict     # all numbers; the picture is drawn from these alone
    table: list[list[str]] = field(default_factory=list)  # for the page, the first row its head


@dataclass(frozen=True)
class Run:
    """A model of the table: the command that trains it."""
    config: str                    # a path
    options: tuple[str, ...] = ()  # {out} stands for the directory of all runs
    minutes: float = 6.0           # expected, on one core
    script: str = "train.py"       # as it follows `python`
    after: tuple[str, ...] = ()    # runs that must be finished before


class Progress:
    """Minutes done and left, of an expected total; the pace is that of what was done."""

    def __init__(self, minutes: float):
        self.total = minutes
        self.done = 0.0
        self.start = time.monotonic()

    def did(self, minutes: float, text: str) -> None:
        """A line that so many of the expected minutes are done."""
        self.done += minutes
        took = (time.monotonic() - self.start) / 60
        left = max(0.0, self.total - self.done) * took / max(self.done, 1e-9)
        print(f"{text} ({took:.0f} min so far, about {left:.0f} min left)", flush=True)


@dataclass
class Lab:
    """Where figures get their models and circuits from. `progress` is told what was done."""
    out: str                  # the directory of all runs and circuits
    runs: dict[str, Run]      # the table
    tasks: tuple[str, ...]    # of the sweeps; small models solve them
    grid: dict[tuple[int, float], str]  # (width, L0 as a multiple of the sparse runs') -> run
    ablations: dict[str, str]  # run -> what it lacks
    data: str = "data/tinypython"
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    jobs: int = 2             # processes at a time, of one thread each on two cores
    seeds: tuple[int, ...] = (0, 1, 2)
    progress: Progress = field(default_factory=partial(Progress, 0.0))
    # Settings of all prunings. One start: a sweep has more use for another model than for another
    # start, and all that it compares has as many.
    pruning: dict = field(default_factory=dict)

    @cached_property
    def data_hash(self) -> str:
        """The `fingerprint` of the data: runs and figures of other data are others."""
        train, _, _ = read_data(self.data, 1)
        return fingerprint(train)

    # --- runs ---------------------------------------------------------------------------------

    def folder(self, name: str) -> str:
        """The directory of a run."""
        return os.path.join(self.out, name)

    def command(self, name: str) -> list[str]:
        """What trains a run, after `python`."""
        run = self.runs[name]
        options = [option.format(out=self.out) for option in run.options]
        data = f"--data_dir={self.data}"
        return [*run.script.split(), f"--config={run.config}", data,
                f"--out_dir={self.folder(name)}", *options]

    def mark_of(self, name: str) -> dict:
        """What the mark of a run says; {} where there is none, or one of another command or other
        data."""
        try:
            with open(os.path.join(self.folder(name), MARK), encoding="utf-8") as f:
                mark = json.load(f)
            same = mark["command"] == self.command(name) and mark["data"] == self.data_hash
            return mark if same else {}
        except (OSError, ValueError, TypeError, LookupError):
            return {}

    def mark(self, name: str, finished: bool, diverged: str = "") -> None:
        text = json.dumps({"command": self.command(name), "data": self.data_hash,
                           "finished": finished, "diverged": diverged})
        write_atomic(os.path.join(self.folder(name), MARK), text.encode())

    def is_finished(self, name: str) -> bool:
        there = os.path.exists(os.path.join(self.folder(name), "final_model.pt"))
        return there and self.mark_of(name).get("finished") is True

    def missing(self, names: Iterable[str]) -> list[str]:
        """The runs that are still to be trained, those before others that these come after."""
        found = []
        for name in names:
            for wanted in (*self.missing(self.runs[name].after), name):
                if wanted not in found and not self.is_finished(wanted):
                    found.append(wanted)
        return found

    def start(self, name: str) -> subprocess.Popen:
        """Begin a run, or go on with it."""
        os.makedirs(self.folder(name), exist_ok=True)
        # another command than the one whose checkpoint lies there begins anew
        resume = bool(self.mark_of(name))
        self.mark(name, False)
        return self.child([*self.command(name), f"--resume={str(resume).lower()}"],
                          os.path.join(self.folder(name), LOG))

    def child(self, command: list[str], log: str) -> subprocess.Popen:
        """A child process that prints to a file, with its share of the cores."""
        threads = max(1, cores() // self.jobs)
        with open(log, "a", encoding="utf-8") as f:
            # a session of its own: Ctrl-C is answered here, and passed on once
            return subprocess.Popen(
                [sys.executable, *command], stdout=f, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)})

    def diverged(self, name: str) -> str:
        """What a run said that ended because its loss became no number; "" of any other."""
        return self.mark_of(name).get("diverged", "")

    def train(self, names: Iterable[str], may_diverge: bool = False) -> None:
        """Train what is missing of these runs, `jobs` at a time. ValueError where a run fails.
        may_diverge: that a loss becomes no number is a result too, and not tried again."""
        waiting = self.missing(names)
        if may_diverge:
            waiting = [name for name in waiting if not self.diverged(name)]
        running = {}
        said = time.monotonic()
        try:
            while waiting or running:
                ready = [name for name in waiting
                         if all(map(self.is_finished, self.runs[name].after))]
                for name in ready[: self.jobs - len(running)]:
                    waiting.remove(name)
                    running[name] = self.start(name)
                time.sleep(POLL)
                for name in [name for name, child in running.items() if child.poll() is not None]:
                    status = running.pop(name).returncode
                    last = last_line(self.log_of(name))
                    if may_diverge and status != 0 and DIVERGED in last:
                        self.mark(name, False, last)
                    else:
                        self.ended(name, status)
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    for name in running:
                        print(f"  {name}: {last_line(self.log_of(name))}", flush=True)
        finally:  # a failure or a signal: the others save, and go on another time
            end_all(running.values())

    def log_of(self, name: str) -> str:
        return os.path.join(self.folder(name), LOG)

    def ended(self, name: str, status: int) -> None:
        check_ended(self.command(name), status, self.log_of(name))
        self.mark(name, True)
        self.progress.did(self.runs[name].minutes / self.jobs, f"  {name} is trained")

    def call(self, commands: dict[str, list[str]]) -> None:
        """A few commands of the project at a time, to their ends, by the file that each prints to.
        ValueError where one fails."""
        children = {}
        try:
            for log, command in commands.items():
                os.makedirs(os.path.dirname(log), exist_ok=True)
                children[log] = self.child(command, log)
            for log, child in children.items():
                check_ended(commands[log], child.wait(), log)
        finally:
            end_all(children.values())

    # --- models of the same loss ----------------------------------------------------------------

    def loss_of(self, name: str) -> float:
        """Nats per token of validation data at the end of a run, each part weighed by its size."""
        losses = self.at_the_end(name, "val_loss")
        _, _, meta = read_data(self.data, 1)
        sizes = {part: end - start for part, (start, end) in meta["val_parts"].items()}
        total = sum(losses[part] * n for part, n in sizes.items())
        return total / sum(sizes.values())

    def at_the_end(self, name: str, key: str):
        """What a run's last evaluation logged. ValueError where there was none."""
        path = os.path.join(self.folder(name), "log.jsonl")
        found = [entry[key] for entry in read_log(path) if key in entry]
        if not found:
            raise ValueError(f"{path} has no {key}")
        return found[-1]

    def matched(self, seeds: Sequence[int] | None = None) -> dict[str, str]:
        """{sparse run: a dense run within CLOSE nats of its validation loss}, trained until found.
        ValueError where TRIES runs do not come so near."""
        seeds = self.seeds if seeds is None else seeds
        self.train([f"sparse{seed}" for seed in seeds])
        tried = {seed: {} for seed in seeds}  # seed -> {steps: loss}
        found = {}
        for _ in range(TRIES):
            open_ = [seed for seed in seeds if f"sparse{seed}" not in found]
            names = {}
            for seed in open_:
                steps = next_steps(tried[seed], self.loss_of(f"sparse{seed}"))
                names[seed, steps] = self.dense_run(seed, steps)
            self.train(names.values())
            for (seed, steps), name in names.items():
                tried[seed][steps] = self.loss_of(name)
                if abs(tried[seed][steps] - self.loss_of(f"sparse{seed}")) <= CLOSE:
                    found[f"sparse{seed}"] = name
        if len(found) < len(seeds):
            raise ValueError(f"no dense run within {CLOSE} nats of a sparse one in {TRIES} tries: "
                             f"{tried}")
        return found

    def dense_run(self, seed: int, steps: int) -> str:
        """The name of a dense run, which is in the table from now on."""
        dense = self.runs["dense"]
        name = f"dense{seed}_{steps}"
        self.runs[name] = replace(
            dense, options=(*dense.options, f"--seed={seed}", f"--max_steps={steps}"),
            minutes=dense.minutes * steps / FIRST_STEPS)
        return name

    # --- circuits -------------------------------------------------------------------------------

    def pruning_of(self, run: str, task: str, target: float, kind: str, **options) -> PruneConfig:
        """The settings of one pruning; its files have a folder of their own."""
        folder = os.path.join(self.out, "circuits", f"{kind}_{target:g}", run)
        settings = {"starts": 1} | KINDS[kind] | self.pruning | options
        return PruneConfig(model=self.folder(run), task=task, out_dir=folder, data=self.data,
                           tokenizer=self.tokenizer, target_loss=(target,), **settings)

    def circuits(self, wanted: Sequence[PruneConfig]) -> list[dict | None]:
        """The contents of the circuits' files, those that are missing found first; None where a
        task has no circuit. ValueError where something else fails."""
        missing = [cfg for cfg in wanted if known(cfg) is None]
        self.each(find_one, missing)
        found = [known(cfg) for cfg in wanted]
        return [circuit if isinstance(circuit, dict) else None for circuit in found]

    def each(self, f: Callable, items: Sequence) -> list:
        """f of each item, `jobs` processes at a time; f returns a line to print and its result.
        ValueError where one fails: what the others have written is kept."""
        one = partial(say_and_time, f, len(items), time.time())
        numbered = list(enumerate(items, 1))
        if self.jobs == 1 or len(items) < 2:
            return [one(item) for item in numbered]
        results = in_processes(one, numbered, self.jobs)
        for result in results:
            if isinstance(result, str):  # in place of a ValueError
                raise ValueError(result)
        return results

    def edges(self, kind: str, runs: Sequence[str], targets: Sequence[float]) -> "Edges":
        """The number of edges of every task's circuit in every run, for every target."""
        keys = [(run, task, target) for run in runs for task in self.tasks for target in targets]
        found = self.circuits([self.pruning_of(*key, kind) for key in keys])
        return {key: None if c is None else c["n_edges"] for key, c in zip(keys, found)}


# (run, task, target in nats) -> edges, None where there is no circuit
Edges = dict[tuple[str, str, float], int | None]


def next_steps(tried: dict[int, float], wanted: float) -> int:
    """How many steps to try for a loss (nats) that falls in a line with the logarithm of the steps:
    by the two tries that are nearest. tried: {steps: loss}."""
    if not tried:
        return FIRST_STEPS
    first, *others = sorted(tried, key=lambda steps: abs(tried[steps] - wanted))
    slope = -PER_DOUBLING
    if others and tried[others[0]] != tried[first]:
        measured = (tried[others[0]] - tried[first]) / math.log2(others[0] / first)
        # two runs that differ by little more than noise tell no slope
        slope = min(measured, -PER_DOUBLING / 4)
    doublings = max(-1.5, min(1.5, (wanted - tried[first]) / slope))
    steps = max(1, round(first * 2**doublings))
    while steps in tried:
        steps += 1 if tried[first] > wanted else -1
    return steps


def common_tasks(edges: Edges, runs: Sequence[str], tasks: Sequence[str], target: float):
    """The tasks that have a circuit in all of these runs."""
    return [task for task in tasks
            if all(edges[run, task, target] is not None for run in runs)]


def said(values: Sequence[float | None], form: str) -> str:
    """Median and range of those that there are."""
    there = [value for value in values if value is not None]
    return cell(there, form) if there else "–"


def case_in(lab: Lab, path: str) -> Case:
    """A circuit of the lab and all that it is measured with."""
    from_file = CaseConfig(circuit=path, data=lab.data, tokenizer=lab.tokenizer)
    return case_of(from_file, read_circuit(path))


# --- prunings that are kept ----------------------------------------------------------------------

def known(cfg: PruneConfig) -> dict | str | None:
    """The circuit of an earlier call with the same settings and weights, or why there is none; None
    where nobody has looked."""
    found = already_pruned(cfg, cfg.task)
    if found is not None:
        return found[0]
    try:
        with open(failure_path(cfg), encoding="utf-8") as f:
            failure = json.load(f)
        return failure["why"] if failure["of"] == asked(cfg) else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def failure_path(cfg: PruneConfig) -> str:
    folder = os.path.dirname(path_of(cfg, cfg.task, cfg.target_loss[0]))
    return os.path.join(folder, NO_CIRCUIT)


def asked(cfg: PruneConfig) -> list:
    """What a pruning depends on, as a file has it."""
    return json.loads(json.dumps([settings_in_file(cfg), weights_hash(cfg.model)]))


def find_one(cfg: PruneConfig) -> tuple[str, None]:
    """Prune, and leave the circuit or the reason why there is none; a line that says which."""
    name = f"{os.path.relpath(cfg.out_dir)}/{cfg.task}"
    # data or a tokenizer that do not fit are no property of the model: not to be kept
    loaded = load(cfg)
    try:
        (circuit,) = prune(loaded, task_of(cfg.task), cfg, quiet)
    except ValueError as e:
        path = failure_path(cfg)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomic(path, json.dumps({"of": asked(cfg), "why": str(e)}).encode())
        return f"  {name}: no circuit: {e}", None
    write_circuit(path_of(cfg, cfg.task, cfg.target_loss[0]), circuit)
    return f"  {name}: {circuit['n_edges']} edges", None


def say_and_time(f: Callable, of: int, began: float, numbered: tuple[int, object]):
    """f of an item, its line printed with the time that is left for all of them; its result."""
    n, item = numbered
    text, result = f(item)
    left = (time.time() - began) / n * (of - n)
    print(f"{text}  ({n}/{of}, {left:.0f} s left)", flush=True)
    return result


# --- children ----------------------------------------------------------------------------------

def last_line(path: str) -> str:
    """Of what a command has printed so far."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return ([line.strip() for line in f if line.strip()] or [""])[-1]
    except OSError:
        return ""


def check_ended(command: list[str], status: int, log: str) -> None:
    """ValueError where a child has failed."""
    if status != 0:
        raise ValueError(f"python {shlex.join(command)} ended with status {status}: "
                         f"{last_line(log)} ({log})")


def end_all(children: Iterable[subprocess.Popen]) -> None:
    """Ask for the end of those that still run, and wait: they save what they have."""
    children = [child for child in children if child.poll() is None]
    for child in children:
        child.terminate()
    for child in children:
        child.wait()
