"""A circuit's file and all that it is measured with: its model, its task's pairs, the data.

`case_of` loads that, and refuses what is not as it was when the circuit was found. The card
(measures.py, validate.py), tools.refute and tools.program begin with it.
"""
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import one_of, out_of_bounds

import torch
from torch import Tensor

from circuit import Circuit, Nodes, ablate, without_edges
from circuit_file import circuit_of
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from model import GPT
from model_files import weights_hash
from prune import PruneConfig
from tasks import Pairs, Task, calibrate, calibrated, load_model, load_pairs, loss_of, task_of
from tokens import check_tokenizer, fingerprint, read_side, window_of


@dataclass
class CaseConfig:
    """Where a circuit is, and what belongs to it."""
    circuit: str = "out/demo/single_double_quote/circuit.json"
    model: str = ""                 # "" = the directory that the circuit names
    task: str = ""                  # a file of pairs that was moved; "" = where the circuit says
    data: str = "data/tinypython"   # train.bin, and what it was prepared with
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")


@dataclass
class Case:
    """A circuit and all that its card is measured with."""
    model: GPT
    task: Task
    tokenizer: object
    circuit: Circuit
    constants: Nodes        # what the nodes outside the circuit are held at
    settings: PruneConfig   # the circuit was found with; target_loss is this circuit's alone
    train: Pairs
    heldout: Pairs          # what every line but that of idle parts is measured on
    data: str               # train.bin
    seed: int
    # of its certificate: nats that its loss was to stay below, and that the model was to miss it by
    limit: float | None = None
    missed: float = 0.0
    n_fit: int | None = None  # pairs that it was fitted to; None = as its settings say

    def __post_init__(self):
        # the circuit is `reduced`, the model less the edges that were removed, run with `nodes`
        self.reduced = without_edges(self.model, self.circuit, self.constants)
        self.nodes = ablate(self.circuit.mask, self.constants)
        self.fit = self.train.first(self.n_fit or self.settings.fit_pairs)
        # for a scale and a shift fitted anew, two numbers, fewer do than for the circuit
        self.few = self.train.first(self.settings.fit_pairs)

    def loss(self, margin: Tensor) -> float:
        """Nats, with the scale and shift of the circuit file."""
        return loss_of(calibrated(margin, self.circuit.scale, self.circuit.shift))

    def refit(self, run: Callable[[Pairs], Tensor]) -> float:
        """Nats on held-out pairs, with a scale and shift fitted anew, to the margins that `run`
        gives of training pairs: what is left if only the strength of the logits was wrong."""
        margin = run(self.heldout)
        scale, shift = calibrate(run(self.few))
        return loss_of(calibrated(margin, scale, shift))

    @cached_property
    def data_hash(self) -> str:
        """The `fingerprint` of the data."""
        return fingerprint(read_side(self.data, self.model.config.vocab_size))

    def generator(self) -> torch.Generator:
        """A new one each time, so that no measure hangs on which others came before it."""
        return torch.Generator().manual_seed(self.seed)


# --- loading ---------------------------------------------------------------------------------

def settings_from_file(content: dict) -> PruneConfig:
    """How the circuit was pruned, its own target alone. ValueError where these are no settings."""
    defaults = asdict(PruneConfig())
    settings = content["settings"] | {"target_loss": (float(content["target_loss"]),)}
    for key, value in settings.items():
        kind = type(defaults.get(key))
        kinds = (float, int) if kind is float else (kind,)  # JSON has 1 for 1.0
        if key not in defaults or type(value) not in kinds:
            raise ValueError(f"it was edited: its settings have {key} = {value!r}; "
                             "prune the task again")
    settings = PruneConfig(**settings)
    complaint = out_of_bounds(settings)
    if complaint:
        raise ValueError(f"it was edited: of its settings {complaint}; prune the task again")
    return settings


def task_in(cfg: CaseConfig, content: dict) -> Task:
    """The task of a circuit file. ValueError where the file of its pairs is not what it was."""
    file = content.get("task_file")
    if file is None:
        return task_of(content["task"])
    path = cfg.task or file["path"]
    if not os.path.exists(path):
        raise ValueError(f"the file of its pairs, {path}, is not there; say where it is with "
                         "--task=FILE")
    task = task_of(path)
    if task.file is None or task.file.sha256 != file["sha256"]:
        raise ValueError(f"the pairs in {path} are not those that it was found with; give "
                         "--task=FILE, or prune the task again")
    # which pairs are drawn hangs on the name that the file had
    return replace(task, name=content["task"])


def case_of(cfg: CaseConfig, content: dict, window: int = 0, seed: int = 0) -> Case:
    """Load what a circuit file speaks of. ValueError, in one line, where it is not what it was.

    window: tokens of data at a time, 0 = as when it was pruned; seed: of the card's draws.
    """
    task = task_in(cfg, content)
    folder = cfg.model or content["model"]["dir"]
    if not os.path.isdir(folder):
        raise ValueError(f"its model {folder} is not there; say where it is with --model=DIR")
    if weights_hash(folder) != content["model"]["sha256"]:
        raise ValueError(f"the weights in {folder} are not those that it was found in; "
                         "give --model=DIR, or prune the task again")
    model, tokenizer = load_model(folder, cfg.tokenizer, cfg.device)
    check_tokenizer(cfg.data, tokenizer_hash(tokenizer_for(folder, cfg.tokenizer)))
    circuit, constants = circuit_of(content, model)
    settings = settings_from_file(content)
    # of a circuit from before there were windows, as it is now; the folder may have moved
    window = window_of(folder, model.config.block_size, window or settings.window)
    settings = replace(settings, model=folder, window=window, tokenizer=cfg.tokenizer)
    minimal = content["validation"].get("minimal", {})

    def draw(n: int, split: str) -> Pairs:
        T = model.config.block_size
        return load_pairs(task, tokenizer, n, split, T, settings.seed).to(cfg.device)

    return Case(
        model=model, task=task, tokenizer=tokenizer, circuit=circuit, constants=constants,
        settings=settings, train=draw(settings.train_pairs, "train"),
        heldout=draw(settings.heldout_pairs, "heldout"),
        data=os.path.join(cfg.data, "train.bin"), seed=seed,
        limit=minimal.get("target"), missed=minimal.get("necessity", 0.0),
        n_fit=minimal.get("pairs"),
    )


def check_data(case: Case, content: dict) -> None:
    """ValueError where the data are not those that the circuit's means are of: the card would mix
    the activations of one text with the means of another."""
    stated = content.get("data")  # None where nobody knows, or nodes are held at zero
    if stated not in (None, case.data_hash):
        raise ValueError(f"the circuit's means are of other data than {os.path.dirname(case.data)} "
                         "has; give --data=DIR, or prune the task again")
