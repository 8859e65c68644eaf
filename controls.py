"""The same pruning where there is nothing to find: what a circuit's size and loss are worth.

Three levels (the critique is Drori, "Weight-sparse circuits may be interpretable yet unfaithful",
2026):

- *memorise*: answers permuted by a hash of the pair. A floor: only learning by heart could meet it.
- *learnable nonsense*: a rule that can be learnt, and that the model was never trained for.
  Answers exchanged, answers of another task, answers by the parity of a word's length.
- *untrained wiring*: the task itself, in a model that knows nothing. Random signs on the same
  nonzero weights, weights permuted within each row, a model of the same shape before training.

Each is pruned with the circuit's settings, from one start a seed, until the target is met, the loss
is flat or nine times the steps are done, and made minimal where the circuit was. The number that
counts: how many times as many edges nonsense needs, and how much more loss it has at the circuit's
own number of edges. validate.py puts that first on the card.
"""
import copy
import hashlib
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from circuit import Nodes, alone, host
from find import SLACKS, discretise, rank, smallest, varied_for
from masks import Gates
from minimise import quiet, reduce_to
from model import GPT
from ops import keep_largest_
from prune import PruneConfig, constants_of
from search import Search
from tasks import TASKS, Pairs, Task, answer_ids, calibrated, loss_of

MORE_STEPS = (1, 3, 9)  # times the circuit's own: until the target is met or the loss is flat
FLAT = 0.95             # a loss that three times the steps bring down by less than a twentieth

Say = Callable[[str], None]  # where progress goes, a line at a time


class NoSuchControl(ValueError):
    """A task that has no such control."""


@dataclass
class Setting:
    """What is pruned in a control, in place of the circuit's own model and pairs."""
    model: GPT
    constants: Nodes
    train: Pairs
    heldout: Pairs


@dataclass
class Subject:
    """What a control is a control of: a circuit's model, task and pairs, and how it was pruned."""
    model: GPT
    task: Task
    tokenizer: object
    constants: Nodes
    settings: PruneConfig
    train: Pairs
    heldout: Pairs
    data: str  # the directory of the means' data


# --- level 1, memorise; level 2, learnable nonsense: other answers to the same prompts --------

def with_pairs(subject: Subject, change: Callable[[Pairs], Pairs]) -> Setting:
    """The circuit's own model, on changed pairs."""
    return Setting(subject.model, subject.constants, change(subject.train), change(subject.heldout))


def swapped(pairs: Pairs, chosen: list[bool]) -> Pairs:
    """The pairs, of which those `chosen` have their prompts in each other's place. The answers
    stay, because calibration expects the first answer in rows 2i."""
    order = []
    for i, swap in enumerate(chosen):
        order += [2 * i + 1, 2 * i] if swap else [2 * i, 2 * i + 1]
    return Pairs(pairs.ids[order], pairs.last[order], pairs.answer, pairs.wrong)


def permuted_answers(subject: Subject, seed: int) -> Setting:
    """Where a hash of its tokens says so, a pair's prompts change places: every second pair, about.
    No model can know the rule: what meets it has learnt the pairs by heart."""
    def change(pairs: Pairs) -> Pairs:
        prompts = pairs.prompts()  # unpadded: a pair's rule does not hang on the company it is in
        chosen = []
        for i in range(0, len(prompts), 2):
            text = f"nonsense {prompts[i : i + 2]} {seed}"
            chosen.append(hashlib.sha256(text.encode()).digest()[0] % 2 == 1)
        return swapped(pairs, chosen)
    return with_pairs(subject, change)


def exchanged_answers(subject: Subject, seed: int) -> Setting:
    """Throughout, the right answer is the wrong one: what the model knows, turned round."""
    def change(pairs: Pairs) -> Pairs:
        return swapped(pairs, [True] * len(pairs))
    return with_pairs(subject, change)


def foreign_answers(subject: Subject, seed: int) -> Setting:
    """The answers are those of another task, one for each of this one's. Pairs from a file borrow
    them just so."""
    own = set(subject.train.answer.tolist())
    found = []
    for task in TASKS.values():
        ids = [subject.tokenizer.encode_ordinary(text) for text in task.answers]
        known = all(len(x) == 1 for x in ids)
        if known and not own & {x[0] for x in ids} and ids not in found:
            found.append(ids)
    if not found:
        raise NoSuchControl("there is no other task whose answers this tokenizer has")
    (first,), (second,) = found[seed % len(found)]

    def change(pairs: Pairs) -> Pairs:
        answer = torch.tensor([first, second], device=pairs.ids.device).repeat(len(pairs))
        wrong = torch.tensor([second, first], device=pairs.ids.device).repeat(len(pairs))
        return Pairs(pairs.ids, pairs.last, answer, wrong)
    return with_pairs(subject, change)


def irrelevant_feature(subject: Subject, seed: int) -> Setting:
    """Which answer is right is the parity of the length of a prompt's longest word. Prompts are
    paired anew, one of each parity; each parity has as many of either true answer as of the other,
    as far as there are."""
    if len(answer_ids(subject.train)) > 2:
        raise NoSuchControl("the pairs ask for more than two answers")

    def parity(ids: list[int]) -> int:
        words = re.findall(r"\w+", subject.tokenizer.decode(ids))
        return max(map(len, words), default=0) % 2

    def change(pairs: Pairs) -> Pairs:
        rows = {}  # (parity, which answer is true) -> rows
        for row, ids in enumerate(pairs.prompts()):
            rows.setdefault((parity(ids), row % 2), []).append(row)
        order = []
        for true in (0, 1):  # of either true answer as many even as odd
            for even, odd in zip(rows.get((0, true), []), rows.get((1, true), [])):
                order.append((even, odd))
        if len(order) < 8:
            raise NoSuchControl("too few prompts of one parity")
        flat = [row for pair in sorted(order) for row in pair]
        n = len(order)
        return Pairs(pairs.ids[flat], pairs.last[flat], pairs.answer[: 2 * n], pairs.wrong[: 2 * n])
    return with_pairs(subject, change)


# --- level 3, untrained wiring: another model for the same pairs ------------------------------

def with_model(subject: Subject, model: GPT) -> Setting:
    """The circuit's own pairs, on another model with means of its own."""
    settings = replace(subject.settings, data=subject.data)
    return Setting(model, constants_of(model, settings), subject.train, subject.heldout)


def changed_weights(model: GPT, change: Callable[[str, Tensor], Tensor]) -> GPT:
    """A copy in which every weight, bias, embedding and sink is another: change(its name, itself).

    Norms stay, for activations to keep their size; so does the bigram table, which no mask can
    touch: changed, it would drown the logits, and make the control easier to beat.
    """
    # without what is known of the weights, which would hold on to the old ones
    forget = {id(m.known): {} for m in model.modules() if hasattr(m, "known")}
    model = copy.deepcopy(model, forget)
    for name, p in model.named_parameters():
        if "ln_" not in name and name != "bigram_table":
            p.data = change(name, p.data)
    return model


def random_signs(subject: Subject, seed: int) -> Setting:
    """Each nonzero weight where it is and as large as it is, with a sign by chance: the wiring
    without what training tuned."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, p: Tensor) -> Tensor:
        signs = torch.randint(2, p.shape, generator=generator) * 2 - 1
        return p * signs.to(p)
    return with_model(subject, changed_weights(subject.model, change))


def permuted_rows(subject: Subject, seed: int) -> Setting:
    """Each row of each matrix permuted: as many weights into each node, from others."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, p: Tensor) -> Tensor:
        order = torch.rand(p.shape, generator=generator).argsort(-1).to(p.device)
        return p.gather(-1, order)
    return with_model(subject, changed_weights(subject.model, change))


def before_training(subject: Subject, seed: int) -> Setting:
    """New weights of the same shape, of which as many are kept as in the trained model."""
    with torch.random.fork_rng(devices=[]):  # nobody else's draws change
        torch.manual_seed(seed)
        fresh = dict(GPT(subject.model.config).named_parameters())

    def change(name: str, p: Tensor) -> Tensor:
        new = fresh[name].detach().clone().to(p.device)
        kept = int(p.count_nonzero())
        if kept == 0:
            return torch.zeros_like(p)
        if not new.any():  # biases and sinks begin at zero
            return new
        keep_largest_(new, kept)
        return new
    return with_model(subject, changed_weights(subject.model, change).requires_grad_(False))


@dataclass(frozen=True)
class Control:
    """A control: its level, its name for readers, and what is pruned for one seed."""
    level: str
    name: str
    setting: Callable[[Subject, int], Setting]


# key in the file -> control, by levels
CONTROLS = {
    "permuted_answers": Control("memorise", "permuted answers", permuted_answers),
    "exchanged_answers": Control("nonsense", "exchanged answers", exchanged_answers),
    "foreign_answers": Control("nonsense", "another task's answers", foreign_answers),
    "irrelevant_feature": Control("nonsense", "parity of a word", irrelevant_feature),
    "random_signs": Control("wiring", "random signs", random_signs),
    "permuted_rows": Control("wiring", "permuted rows", permuted_rows),
    "before_training": Control("wiring", "before training", before_training),
}


# --- pruning one ------------------------------------------------------------------------------

def run_control(subject: Subject, key: str, seed: int, n_edges: int, say: Say) -> dict | None:
    """Prune one control for one seed, until the target is met, the loss is flat or MORE_STEPS are
    done; then make it minimal where the circuit was. n_edges: the circuit's own. None where the
    task has no such control.

    `nodes`, `edges`; `loss`, on the pairs it was found on, and `loss_heldout`, nats; `met`, whether
    that meets the target, `flat`, whether more steps hardly helped; `curve`, [steps, nodes, edges,
    loss] of each try; `loss_at_size`, with at most n_edges edges.
    """
    try:
        setting = CONTROLS[key].setting(subject, seed)
    except NoSuchControl as e:
        say(f"not to be had: {e}")
        return None
    settings = replace(subject.settings, seed=subject.settings.seed + seed)
    target = settings.target_loss[0]
    fit = setting.train.first(settings.fit_pairs)
    model = host(setting.model, settings.standalone)
    gates = Gates(model, settings.tie_qk)
    varied = varied_for(settings, model, setting.model, setting.constants, setting.train)
    search = Search(model, setting.constants, fit, settings.tie_qk, varied=varied,
                    drawn_from=setting.train)
    curve = []
    for times in MORE_STEPS:
        cfg = replace(settings, steps=settings.steps * times)
        ranking = rank(model, setting.train, setting.constants, gates, cfg, quiet, varied)
        circuit = discretise(search, gates, ranking, SLACKS[0] * target)
        if not circuit.loss <= SLACKS[0] * target:
            circuit = discretise(search, gates, ranking, target)
        curve.append([cfg.steps, *circuit.size, circuit.loss])
        say(f"{cfg.steps} steps: {circuit.size[0]} nodes, {circuit.size[1]} edges, "
            f"loss {circuit.loss:.3f}")
        flat = len(curve) > 1 and not circuit.loss < FLAT * curve[-2][-1]
        if circuit.loss <= target or flat:
            break
    met = circuit.loss <= target
    if met:  # as a circuit is made of its masks, but that nobody need miss it
        cfg = replace(cfg, necessity=0.0)
        # where it cannot come further below, it may have all of the target: that favours nonsense
        aim = SLACKS[0] * target if circuit.loss <= SLACKS[0] * target else target
        circuit = smallest(search, gates, ranking, aim, target, cfg, say)
    margin = alone(model, circuit, setting.constants)(setting.heldout)
    return {
        "loss": circuit.loss,
        "loss_heldout": loss_of(calibrated(margin, circuit.scale, circuit.shift)),
        "nodes": circuit.size[0],
        "edges": circuit.size[1],
        "met": met,
        "flat": flat,
        "curve": curve,
        "loss_at_size": reduce_to(search, circuit, n_edges).loss,
    }


class Factor(NamedTuple):
    """Times the circuit's edges that a level's controls need; inf where no run met the target."""
    least: float    # of all runs of the level's controls
    median: float
    met: int        # runs that met the target
    unsettled: int  # that did not, and were still getting better when their steps were done
    runs: int


def factor_of(runs: dict[str, list[dict]], n_edges: int, level: str) -> Factor | None:
    """Of a level, from the card's `controls`; None where none of it was run."""
    of_level = []
    for key, control in CONTROLS.items():
        if control.level == level:
            of_level += runs.get(key, [])
    if not of_level:
        return None
    factors = []
    for run in of_level:
        factors.append(run["edges"] / max(1, n_edges) if run["met"] else math.inf)
    met = sum(run["met"] for run in of_level)
    unsettled = sum(not run["met"] and not run["flat"] for run in of_level)
    return Factor(min(factors), statistics.median(factors), met, unsettled, len(of_level))
