"""How far to trust a circuit: its faithfulness card, printed as a table and kept as `validation` in circuit.json.

- Every line of the card is one function, measured on held-out pairs; each says what it can and cannot tell.
- The circuit runs under other ablations than it was found with: zero, resampled, in part, with frozen norms.
- Two controls prune, with the same settings, what has no circuit: permuted answers, and shuffled weights. A circuit
  that is no smaller than its controls is reported as not trustworthy.
- A file that is truncated, edited, or of another model is refused in one line, and not written.

    python validate.py --circuit=out/demo/single_double_quote/circuit.json
    python validate.py --circuit=out/demo --jobs=2          # out/demo/*/circuit.json, then a table over the tasks
    python validate.py --circuit=out/demo --controls=false  # each of the two controls can take as long as pruning did

Paper 2.2 and Appendix E; the critique is Drori, "Weight-sparse circuits may be interpretable yet unfaithful" (2026).
"""
import copy
import glob
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from circuit import (Circuit, Nodes, ablate, alone, batches_of, calibrate, calibrated, circuit_of, hash_of, inverse, last_logits, load,
                     loss_of, margin_of, margins, read_circuit, unembed_last, without_edges)
from config import die, nearest, parse, write_atomic
from data.tinypython import idioms
from model import GPT
from prune import PruneConfig, constants_of, find, in_processes, samples
from tasks import ADJECTIVES, GROWN, NOUNS, TASKS, VARIABLES, VERBS, Pairs, Task, finished, load_pairs

POSITIONS = 4096  # pretraining positions that resampled values come from
DRAWS = 4         # resamplings, averaged
SUBSETS = 16      # random halves of the complement; the worst of them is the adversary
NECESSARY = 0.3   # nats: a model that without the circuit loses less hardly needs it


@dataclass
class ValidateConfig:
    circuit: str = "out/demo/single_double_quote/circuit.json"  # or a directory: DIR/*/circuit.json
    model: str = ""                 # "" = the directory that the circuit names
    data: str = "data/tinypython"   # train.bin: the resampled values, and the means of the shuffled model
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = "cpu"
    jobs: int = 1                   # with a directory: processes at a time
    seed: int = 0                   # of draws, halves and shuffle; the pairs are those of the circuit's own seed
    controls: bool = True           # the nonsense and the random-weight control
    again: bool = False             # measure even where the file's card is complete


@dataclass
class Case:
    """A circuit and all that its card is measured with."""
    model: GPT
    task: Task
    tokenizer: object
    circuit: Circuit
    constants: Nodes        # what the nodes outside the circuit are held at
    settings: PruneConfig   # those that the circuit was found with; target_loss is this circuit's alone
    train: Pairs
    heldout: Pairs
    data: str               # train.bin
    seed: int

    def __post_init__(self):
        self.fit = self.train.take(torch.arange(self.settings.fit_pairs, device=self.train.ids.device))  # for calibration
        self.reduced = without_edges(self.model, self.circuit, self.constants)
        self.nodes = ablate(self.circuit.mask, self.constants)

    def loss(self, margin: Tensor) -> float:
        """Nats, with the scale and shift of the circuit file."""
        return loss_of(calibrated(margin, self.circuit.scale, self.circuit.shift))

    def refit(self, run: Callable[[Pairs], Tensor]) -> float:
        """Nats on held-out pairs, with a scale and shift fitted to the margins that `run` gives of training pairs."""
        return loss_of(calibrated(run(self.heldout), *calibrate(run(self.fit))))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


# --- the circuit under other ablations: loss as calibrated in its file, and `_refit` where calibrated anew ------------

def sufficiency(case: Case) -> float:
    """Loss with all but the circuit held at constants (paper 2.2): the circuit alone gives the right answers. Not that
    the model computes them so: masks can also find a mechanism that only exists under ablation."""
    return case.loss(margins(case.reduced, case.heldout, case.nodes))


def necessity(case: Case) -> float:
    """Loss with only the circuit's nodes held at constants (inverse pruning, paper 2.2): whether the model depends on
    them. A low loss is a second way of doing the task; a high one can also be damage to something shared."""
    return loss_of(margins(case.model, case.heldout, inverse(case.circuit.mask, case.constants)))


def zero_ablation(case: Case) -> dict:
    """Loss with zeros instead of means: how much the means do for the circuit (Drori 2026 prunes with zeros). Many
    nodes are never near zero, so that a high loss alone is no proof against it."""
    zeros = {s: torch.zeros_like(c) for s, c in case.constants.items()}
    run = alone(case.model, case.circuit, zeros)
    return {"zero_ablation": case.loss(run(case.heldout)), "zero_ablation_refit": case.refit(run)}


@torch.no_grad()
def bank_of(model: GPT, path: str, n: int, seed: int) -> Nodes:
    """Every node's activations (about n, width) at random positions of the pretraining data, 16 to a random window."""
    T, generator, rows = model.config.block_size, torch.Generator().manual_seed(seed), {}
    for ids in samples(model, path, max(1, n // 16) * T, seed):
        row, at = torch.arange(len(ids)).repeat_interleave(16), torch.randint(T, (16 * len(ids),), generator=generator)
        model.run(model.embed(ids), nodes=lambda site, x: rows.setdefault(site, []).append(x[row, at]) or x)
    return {site: torch.cat(rows[site]) for site in model.sites}


@torch.no_grad()
def resampled(case: Case, bank: Nodes, generator: torch.Generator, pairs: Pairs) -> Tensor:
    """Margins (2n,) where at each token of each prompt all pruned nodes take their values at one random row of `bank`."""
    mask, out = case.circuit.mask, []
    for part in batches_of(pairs, 32):
        draw = torch.randint(len(next(iter(bank.values()))), part.ids.shape, generator=generator).to(part.ids.device)  # (B, T)
        fn = lambda site, x: torch.where(mask[site], x, bank[site][draw]) if site in mask else x
        out.append(margin_of(last_logits(case.reduced, part, fn), part))
    return torch.cat(out)


def resample(case: Case) -> dict:
    """Loss with pruned nodes at their values at random pretraining positions instead of their means (causal scrubbing
    asks for this): that the circuit needs no lucky constant. Harsher than all that it was fitted to: the noise of all
    pruned nodes adds up in the stream that it reads, so that circuits fail by degrees, and a right one can fail.
    Removed edges between two kept nodes stay at their means."""
    n = min(POSITIONS, 2**27 // sum(len(m) for m in case.circuit.mask.values()))  # at most half a GB
    run = partial(resampled, case, bank_of(case.model, case.data, n, case.seed), case.generator())
    draws, refit = [run(case.heldout) for _ in range(DRAWS)], calibrate(run(case.fit))
    return {"resample": sum(map(case.loss, draws)) / DRAWS,
            "resample_refit": sum(loss_of(calibrated(m, *refit)) for m in draws) / DRAWS}


def halves(case: Case) -> Iterator[Circuit]:
    """Circuits made of this one and a random half of all nodes and edges outside it."""
    generator, c = case.generator(), case.circuit
    half = lambda kept: kept | (torch.rand(kept.shape, generator=generator) < 0.5).to(kept.device)
    for _ in range(SUBSETS):
        yield replace(c, mask={s: half(m) for s, m in c.mask.items()}, edges={k: half(e) for k, e in c.edges.items()})


def complement(case: Case) -> dict:
    """Loss with random halves of the complement ablated instead of all of it, on average and at worst: a high loss is
    a rest that works against the circuit once it is half awake (proposed in reply to Drori 2026). A low one proves
    little: a few random halves are a weak adversary, and the waking half can do the task by itself.
    Calibrated anew for each half, on training pairs: the circuit's scale and shift make up for the ablation of the
    whole complement, and the whole model needs none."""
    losses = [case.refit(alone(case.model, c, case.constants)) for c in halves(case)]
    return {"complement_random": sum(losses) / len(losses), "complement_worst": max(losses)}


class FrozenNorm(nn.Module):
    """An RMSNorm that is told 1/rms of each position, (B, T, 1)."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight, self.eps, self.scale = norm.weight, norm.eps, None

    def tell(self, h: Tensor) -> None:
        eps = torch.finfo(h.dtype).eps if self.eps is None else self.eps
        self.scale = (h.square().mean(-1, keepdim=True) + eps).rsqrt()

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale * self.weight


@torch.no_grad()
def frozen(case: Case, pairs: Pairs) -> Tensor:
    """Margins (2n,) of the circuit, each of whose norms divides by what it divides by in the model on the same prompt."""
    told, out = {}, []
    stiff = copy.deepcopy(case.reduced)
    for i, block in enumerate(stiff.transformer.h):
        told[f"{i}.resid_in"] = block.ln_1 = FrozenNorm(block.ln_1)
        told[f"{i}.resid_mid"] = block.ln_2 = FrozenNorm(block.ln_2)
    last = stiff.transformer.ln_f = FrozenNorm(stiff.transformer.ln_f)
    for part in batches_of(pairs, 64):
        h = case.model.run(case.model.embed(part.ids), nodes=lambda site, x: (site in told and told[site].tell(x)) or x)
        last.tell(h[torch.arange(len(h), device=h.device), part.last].unsqueeze(1))
        out.append(margin_of(unembed_last(stiff, stiff.run(stiff.embed(part.ids), nodes=case.nodes), part), part))
    return torch.cat(out)


def frozen_norms(case: Case) -> dict:
    """Loss with every RMSNorm's scale taken from the unpruned run: ablation changes the norms, and a circuit can draw
    from that a strength that it does not have in the model (Drori 2026). It does not say which norm, and a loss that
    calibrating anew brings down was strength alone. None for LayerNorm, which subtracts as well."""
    if not case.model.config.rms_norm:
        return {"frozen_norms": None, "frozen_norms_refit": None}
    run = partial(frozen, case)
    return {"frozen_norms": case.loss(run(case.heldout)), "frozen_norms_refit": case.refit(run)}


# --- controls: the same pruning where there is nothing to find --------------------------------------------------------

def nonsense(pairs: Pairs) -> Pairs:
    """The pairs with answers permuted by a rule that the model cannot know: where a hash of a pair's tokens says so, its
    prompts change places. The answers stay, because calibration expects the first answer in rows 2i."""
    prompts, order = [row[: last + 1] for row, last in zip(pairs.ids.tolist(), pairs.last.tolist())], []
    for i in range(0, len(prompts), 2):
        swap = hashlib.sha256(f"nonsense {prompts[i : i + 2]}".encode()).digest()[0] % 2
        order += [i + 1, i] if swap else [i, i + 1]
    return Pairs(pairs.ids[order], pairs.last[order], pairs.answer, pairs.wrong)


def control(case: Case, model: GPT, train: Pairs, heldout: Pairs, constants: Nodes, say) -> dict:
    """Prune with the circuit's own settings: what it comes to, and whether it meets the target on its training pairs."""
    found = next(iter(find(model, train, constants, case.settings, say)))
    margin = alone(model, found, constants)(heldout)
    return {"loss": found.loss, "loss_heldout": loss_of(calibrated(margin, found.scale, found.shift)),
            "nodes": found.size[0], "edges": found.size[1], "met": found.loss <= case.settings.target_loss[0]}


def nonsense_control(case: Case, say) -> dict:
    """Prune for permuted answers. Where that succeeds, masks of this size can memorise the pairs, and the circuit's low
    loss proves nothing (Drori 2026). That it fails does not show that the circuit is what the model uses."""
    return control(case, case.model, nonsense(case.train), nonsense(case.heldout), case.constants, say)


def shuffled(model: GPT, generator: torch.Generator) -> GPT:
    """A copy whose weights, biases, embeddings and sinks are permuted, each entry by entry: the same values, nothing learned.
    The norms stay, so that activations keep their size; so does the bigram table, which no mask can touch: it is the
    same for both, and shuffled it would only drown the control's logits in noise and make it easier to beat."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "ln_" not in name and name != "bigram_table":
            p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
    return model


def random_weights(case: Case, say) -> dict:
    """Prune a model with shuffled weights. Where that succeeds, masks solve the task with any features, or its last token
    gives it away, and a circuit of that size says nothing about training (Drori 2026). That it fails is of this shuffle."""
    model = shuffled(case.model, case.generator())
    constants = constants_of(model, replace(case.settings, data=os.path.dirname(case.data)))
    return control(case, model, case.train, case.heldout, constants, say)


# --- against the model, and on prompts that pruning never saw ---------------------------------------------------------

def agreement(case: Case) -> dict:
    """Correlation of the circuit's and the model's logit differences (first answer - second) over held-out prompts: that
    it follows the model. Two that are both right agree by the labels alone: hence also the mean correlation within
    one answer's prompts, where the labels tell nothing. Neither sees scale and shift."""
    ours, whole = (margins(m, case.heldout, fn).double().view(-1, 2).T for m, fn in ((case.reduced, case.nodes), (case.model, None)))
    constant = lambda x: x.std().item() < 1e-5  # then what varies is rounding
    correlation = lambda a, b: 0.0 if constant(a) or constant(b) else torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    return {"agreement": correlation(torch.cat([ours[0], -ours[1]]), torch.cat([whole[0], -whole[1]])),
            "agreement_within": (correlation(ours[0], whole[0]) + correlation(ours[1], whole[1])) / 2}


def longer(task: Task, tokenizer, block_size: int) -> Task:
    """The task behind as many whole functions as the model's context has room for, and at least one."""
    def prompts(r):
        (first, second), before, more = task.prompts(r), "", finished(r)
        while not before or max(len(tokenizer.encode_ordinary(more + before + p)) for p in (first, second)) <= block_size:
            before, more = more + before, finished(r)
        return before + first, before + second
    return replace(task, prompts=prompts)


def renamed(task: Task, seed: int) -> Task:
    """The task with other names: each is replaced throughout a pair by a word that the pretraining data has and the task
    never. Words that all prompts have are part of the task and stay. ValueError where there is nothing to rename."""
    words, r = lambda texts: set(re.findall(r"\w+", " ".join(texts))), random.Random(f"{task.name} names {seed}")
    drawn = [words(task.prompts(r)) for _ in range(500)]
    names = {*VARIABLES, *NOUNS, *GROWN} & set.union(*drawn) - set.intersection(*drawn) - words(task.answers)
    taken = {*VARIABLES, *NOUNS, *GROWN, *VERBS, *ADJECTIVES, *(f"{w}s" for w in NOUNS)}.union(*drawn)
    others = {*idioms.NOUNS, *idioms.VARIABLES, *idioms.COLLECTIONS, *idioms.SINGULAR, *idioms.ACCUMULATORS} - taken
    others = sorted(w for w in others if len(w) > 2)  # a letter can be more than a name: open(path, 'w')
    if not names:
        raise ValueError(f"the prompts of {task.name} have no names")

    def prompts(r):
        pair = task.prompts(r)
        here = sorted(names & words(pair))
        to = dict(zip(here, r.sample(others, len(here))))
        return tuple(re.sub(r"\w+", lambda word: to.get(word[0], word[0]), p) for p in pair)

    return replace(task, prompts=prompts)


def generalisation(case: Case) -> dict:
    """Loss behind further functions and with other names, for the circuit and for the whole model: where only the circuit
    fails, it is less than what the model does; where both fail, the model itself knows no more than the task's
    generator shows. Two shifts of the same generator, not code at large. None: no such prompts fit the context."""
    out, T, seed = {}, case.model.config.block_size, case.settings.seed
    for kind, vary in (("longer", lambda task: longer(task, case.tokenizer, T)), ("names", lambda task: renamed(task, seed))):
        try:
            pairs = load_pairs(vary(case.task), case.tokenizer, len(case.heldout), "heldout", T, seed).to(case.heldout.ids.device)
        except ValueError:
            pairs = None
        out[f"generalisation_{kind}"] = pairs and case.loss(margins(case.reduced, pairs, case.nodes))
        out[f"generalisation_{kind}_unpruned"] = pairs and loss_of(margins(case.model, pairs))
    return out


# --- the card -------------------------------------------------------------------------------------------------------

LINES = (  # what a line is called, its key, what stands beside it, and its key
    ("sufficiency", "sufficiency", "unpruned model", "unpruned_loss"), ("zero ablation", "zero_ablation", "recalibrated", "zero_ablation_refit"),
    ("necessity", "necessity", "accuracy", "necessity_accuracy"), ("resample", "resample", "recalibrated", "resample_refit"),
    ("half the complement", "complement_random", f"worst of {SUBSETS}", "complement_worst"),
    ("frozen norms", "frozen_norms", "recalibrated", "frozen_norms_refit"),
    ("agreement (no nats)", "agreement", "within one answer", "agreement_within"),
    ("longer prompts", "generalisation_longer", "unpruned model", "generalisation_longer_unpruned"),
    ("other names", "generalisation_names", "unpruned model", "generalisation_names_unpruned"))
CONTROLS = {"nonsense": ("permuted answers", nonsense_control), "random_weights": ("shuffled weights", random_weights)}


def card_of(case: Case, stated: dict, controls: bool, say=print) -> dict:
    """All lines of the card. ValueError where the circuit does not have the losses that its file states."""
    card = {"sufficiency": sufficiency(case), "necessity": necessity(case)}
    for key, loss in card.items():
        if not (isinstance(stated.get(key), (int, float)) and abs(stated[key] - loss) <= 0.002 + 0.01 * loss):
            raise ValueError(f"it states a {key} of {stated.get(key)} nats, but has {loss:.4f}: it was edited, or the tokenizer or tasks.py "
                             "are others now; prune the task again")
    for line in (zero_ablation, resample, complement, frozen_norms, agreement, generalisation):
        say(f"  {line.__name__.replace('_', ' ')}")
        card |= line(case)
    for key, (name, line) in CONTROLS.items() if controls else ():
        say(f"  control: {name}")
        card[key] = line(case, lambda text: say(f"  {text}"))
    return card | verdict(card, case.settings.target_loss[0], case.circuit.size[1])


def verdict(card: dict, target: float, n_edges: int) -> dict:
    """`trustworthy` (None without controls, which alone decide it), and a sentence that also says what else is wrong."""
    beaten = [f"{name} ({card[k]['edges']} edges)" for k, (name, _) in CONTROLS.items()
              if k in card and card[k]["met"] and card[k]["edges"] <= n_edges]
    text = (f"not trustworthy: with no more than its {n_edges} edges the same pruning meets the target on {' and on '.join(beaten)}" if beaten else
            "no control meets the target with as few edges" if "nonsense" in card else "the controls were not run, so trust cannot be stated")
    if not card["sufficiency"] <= target:
        text += f"; it misses its target of {target} nats on held-out pairs ({card['sufficiency']:.3f})"
    if not card["necessity"] >= NECESSARY:
        text += f"; the model hardly needs it ({card['necessity']:.3f} nats without it)"
    strict = ("zero_ablation", "resample", "complement_random", "frozen_norms", "generalisation_longer", "generalisation_names")
    if past := [name for name, key, *_ in LINES if key in strict and (card.get(key) or 0) > target]:
        text += f"; its loss exceeds the target with {', '.join(past)}"
    return {"trustworthy": not beaten if "nonsense" in card else None, "verdict": text[0].upper() + text[1:] + "."}


def show(x) -> str:
    return f"{x:.3f}" if isinstance(x, (int, float)) else "n/a"


def table(c: dict) -> str:
    """The card as text."""
    v = {**c, **c["validation"]}
    rows = [f"{c['task']}: {c['n_nodes']} nodes, {c['n_edges']} edges, target {c['target_loss']} nats"]
    rows += [f"  {name:20} {show(v[key]):>6}   {beside} {show(v.get(other))}" for name, key, beside, other in LINES]
    rows += [f"  {name:20} {show(v[key]['loss']):>6}   {'met' if v[key]['met'] else 'not met'} with {v[key]['nodes']} nodes, {v[key]['edges']} edges; "
             f"held out {show(v[key]['loss_heldout'])}" for key, (name, _) in CONTROLS.items() if key in v]
    return "\n".join([*rows, f"  {v['verdict']}"])


def settings_of(c: dict) -> PruneConfig:
    """How the circuit was pruned, its own target alone. ValueError where these are no settings."""
    settings, valid = {**c["settings"], "target_loss": (float(c["target_loss"]),)}, asdict(PruneConfig())
    for key, value in settings.items():
        kinds = {float: (float, int)}.get(type(valid.get(key)), (type(valid.get(key)),))
        if key not in valid or type(value) not in kinds or type(value) is int and value < min(1, valid[key]):
            raise ValueError(f"it was edited: its settings have {key} = {value!r}; prune the task again")
    return PruneConfig(**settings)


def case_of(cfg: ValidateConfig, c: dict) -> Case:
    """Load what a circuit file speaks of. ValueError, in one line, where that is not what it was made with."""
    folder = cfg.model or c["model"].get("dir", "")
    if c.get("task") not in TASKS:
        raise ValueError(f"its task '{c.get('task')}' is unknown; the nearest is '{nearest(str(c.get('task')), TASKS)}'")
    if not os.path.exists(os.path.join(folder, "final_model.pt")):
        raise ValueError(f"its model {folder} is not there; say where it is with --model=DIR")
    if hash_of(folder) != c["model"].get("sha256"):
        raise ValueError(f"the weights in {folder} are not those that it was found in; give --model=DIR, or prune the task again")
    model, tokenizer = load(folder, cfg.tokenizer, cfg.device)
    try:
        settings, (circuit, constants) = settings_of(c), circuit_of(c, model)
    except (TypeError, IndexError) as e:
        raise ValueError(f"it was edited ({e}); prune the task again") from e
    train, heldout = (load_pairs(TASKS[c["task"]], tokenizer, n, split, model.config.block_size, settings.seed).to(cfg.device)
                      for n, split in ((settings.train_pairs, "train"), (settings.heldout_pairs, "heldout")))
    return Case(model, TASKS[c["task"]], tokenizer, circuit, constants, settings, train, heldout, os.path.join(cfg.data, "train.bin"), cfg.seed)


# --- the command ------------------------------------------------------------------------------------------------------

def validate(cfg: ValidateConfig, say=partial(print, flush=True)) -> dict:
    """Measure, write and print the card of one file, unless it has it already; returns the file's content.

    ValueError or OSError, in one line and with nothing written, where that cannot be done.
    """
    c = read_circuit(cfg.circuit)
    content = json.dumps([c[k] for k in ("nodes", "edges", "means", "logit_scale", "logit_shift", "target_loss", "settings")])
    card = {"circuit": hashlib.sha256(content.encode()).hexdigest()[:16], "data": cfg.data, "tokenizer": cfg.tokenizer, "seed": cfg.seed,
            "positions": POSITIONS, "draws": DRAWS, "subsets": SUBSETS}
    wanted = {"verdict", *(key for _, key, *_ in LINES), *(CONTROLS if cfg.controls else ())}
    if cfg.again or c["validation"].get("card") != card or not wanted <= c["validation"].keys():
        say(f"validating {cfg.circuit}")
        try:
            measured = card_of(case_of(cfg, c), c["validation"], cfg.controls, say)
        except ValueError as e:
            raise ValueError(f"{cfg.circuit}: {e}") from e
        c["validation"] = {**{k: v for k, v in c["validation"].items() if k not in CONTROLS}, **measured, "card": card}
        write_atomic(cfg.circuit, lambda f: f.write(json.dumps(c).encode()))
    say(table(c))
    return c


def _one_of_many(cfg: ValidateConfig, path: str) -> dict | str:
    """One circuit of a directory: each line under its task's name, the reason instead of an exception."""
    if cfg.jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // cfg.jobs))
    name = os.path.basename(os.path.dirname(path))
    try:
        return validate(replace(cfg, circuit=path), lambda text: print(*(f"[{name}] {row}" for row in text.split("\n")), sep="\n", flush=True))
    except (ValueError, OSError) as e:
        return str(e)


def validate_all(cfg: ValidateConfig, paths: list[str]) -> int:
    """Every circuit, `jobs` at a time, then one table; exit status 2 where any was refused."""
    results = in_processes(partial(_one_of_many, cfg), paths, cfg.jobs) if cfg.jobs > 1 else [_one_of_many(cfg, path) for path in paths]
    print("\n| task | nodes, edges |", *(f"{name} |" for name, *_ in LINES), *(f"{name}: loss, edges |" for name, _ in CONTROLS.values()), "trustworthy |")
    print("|---" * (len(LINES) + len(CONTROLS) + 3) + "|")
    for c in (c for c in results if isinstance(c, dict)):
        v = c["validation"]
        print(f"| {c['task']} | {c['n_nodes']}, {c['n_edges']} |", *(f"{show(v[key])} |" for _, key, *_ in LINES),
              *(f"{show(v[k]['loss'])}, {v[k]['edges']} |" if k in v else "– |" for k in CONTROLS),
              {True: "yes |", False: "no |", None: "– |"}[v["trustworthy"]])
    refused = [r for r in results if isinstance(r, str)]
    print(*(f"validate.py: {r}" for r in refused), sep="\n", end="\n" * bool(refused), file=sys.stderr)
    return 2 if refused else 0


def main(argv: list[str]) -> int:
    cfg = parse(ValidateConfig, argv)
    if cfg.device not in ("cpu", "cuda") or cfg.device == "cuda" and not torch.cuda.is_available():
        die(f"device must be cpu, or cuda where PyTorch sees one, not '{cfg.device}'")
    if cfg.jobs < 1:
        die(f"jobs must be at least 1, not {cfg.jobs}")
    try:
        if not os.path.isdir(cfg.circuit):
            validate(cfg)
            return 0
        if paths := sorted(glob.glob(os.path.join(glob.escape(cfg.circuit), "*", "circuit.json"))):
            return validate_all(cfg, paths)
    except (ValueError, OSError) as e:
        die(str(e))
    die(f"no {cfg.circuit}/*/circuit.json; prune.py writes them")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
