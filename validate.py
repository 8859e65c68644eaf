"""How far to trust a circuit: its faithfulness card, printed, and kept as `validation` in its file.

- Each measure is one function, on held-out pairs, and says what it can and cannot tell.
- Harder ablations than those of pruning: zero, resampled, in part, with frozen norms.
- Two controls prune, with the same settings, what has no circuit: permuted answers, and shuffled
  weights. A circuit that is no smaller than its controls is reported as not trustworthy.
- A file that is truncated, edited, or of another model is refused in one line, and not written.

    python validate.py --circuit=out/demo/single_double_quote/circuit.json
    python validate.py --circuit=out/demo --jobs=2          # out/demo/*/circuit.json, then a table
    python validate.py --circuit=out/demo --controls=false  # a control can take as long as pruning

Paper 2.2 and Appendix E; the critique is Drori, "Weight-sparse circuits may be interpretable yet
unfaithful" (2026).
"""
import copy
import glob
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, out_of_bounds, parse

import torch
import torch.nn as nn
from torch import Tensor

from circuit import (FINAL, Circuit, Nodes, ablate, alone, circuit_of, held_at, inverse,
                     read_circuit, twin, without_edges, write_circuit)
from data.tinypython import idioms
from data.tinypython.filler import ADJECTIVES, GROWN, NOUNS, VARIABLES, VERBS, whole_function
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from model import GPT, device_of, weights_hash
from prune import PruneConfig, constants_of, find, in_processes, result_or_reason
from tasks import (Pairs, Task, calibrate, calibrated, fitting_batches, last_logits, load_model,
                   load_pairs, loss_of, margin_of, margins, rows_at_once, task_of, unembed_last)
from tokens import check_tokenizer, random_windows, window_of

POSITIONS = 4096  # pretraining positions that resampled values come from
PER_WINDOW = 16   # of them in one window: more windows would be slower, fewer less varied
DRAWS = 4         # resamplings, averaged
SUBSETS = 16      # random halves of the complement; the worst of them is the adversary
NECESSARY = 0.3   # nats: a model that without the circuit loses less hardly needs it

Say = Callable[[str], None]  # where progress goes, a line at a time


@dataclass
class ValidateConfig:
    circuit: str = "out/demo/single_double_quote/circuit.json"  # or a directory of tasks' folders
    model: str = ""                 # "" = the directory that the circuit names
    task: str = ""                  # a file of pairs that was moved; "" = where the circuit says
    data: str = "data/tinypython"   # train.bin: resampled values, means of the shuffled model
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    device: str = one_of("cpu", "cuda")
    window: int = bounded(0, at_least=0)  # tokens of data at a time; 0 = as when it was pruned
    jobs: int = bounded(1, at_least=1)  # with a directory: processes at a time
    seed: int = bounded(0, at_least=0)  # of draws, halves, shuffle; pairs have the circuit's own
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
    settings: PruneConfig   # the circuit was found with; target_loss is this circuit's alone
    train: Pairs
    heldout: Pairs          # what every line is measured on
    data: str               # train.bin
    seed: int

    def __post_init__(self):
        # the circuit is `reduced`, the model less the edges that were removed, run with `nodes`
        self.reduced = without_edges(self.model, self.circuit, self.constants)
        self.nodes = ablate(self.circuit.mask, self.constants)
        self.fit = self.train.first(self.settings.fit_pairs)  # what calibration looks at

    def loss(self, margin: Tensor) -> float:
        """Nats, with the scale and shift of the circuit file."""
        return loss_of(calibrated(margin, self.circuit.scale, self.circuit.shift))

    def refit(self, run: Callable[[Pairs], Tensor]) -> float:
        """Nats on held-out pairs, with a scale and shift fitted anew, to the margins that `run`
        gives of training pairs: what is left if only the strength of the logits was wrong."""
        margin = run(self.heldout)
        scale, shift = calibrate(run(self.fit))
        return loss_of(calibrated(margin, scale, shift))

    def generator(self) -> torch.Generator:
        """A new one each time, so that no measure hangs on which others came before it."""
        return torch.Generator().manual_seed(self.seed)


# --- the circuit under other ablations: loss as calibrated in its file, `_refit` anew ---------

def sufficiency(case: Case) -> float:
    """Loss with all but the circuit held at constants (paper 2.2): whether it alone gives the right
    answers. Not that the model finds them so: a mechanism may only exist under ablation."""
    return case.loss(margins(case.reduced, case.heldout, case.nodes))


def necessity(case: Case) -> float:
    """Loss with only the circuit's nodes held at constants (inverse pruning, paper 2.2): whether
    the model needs them. Low: there is a second way. High: or something shared was damaged."""
    # not calibrated: the file's scale and shift are the circuit's, and this is the rest
    return loss_of(margins(case.model, case.heldout, inverse(case.circuit.mask, case.constants)))


def zero_ablation(case: Case) -> dict:
    """Loss with zeros for means: how much the means do for the circuit (Drori 2026 prunes with
    zeros). Many nodes are never near zero: a high loss alone is no proof against it."""
    zeros = {site: torch.zeros_like(c) for site, c in case.constants.items()}
    run = alone(case.model, case.circuit, zeros)
    return {"zero_ablation": case.loss(run(case.heldout)), "zero_ablation_refit": case.refit(run)}


@torch.no_grad()
def bank_of(model: GPT, path: str, n: int, seed: int, window: int = 0) -> Nodes:
    """Every node's activations (about n, width) at random positions of a file of tokens, `window`
    of them at a time (0: block_size), where nodes are held; a row is the same position at every
    site."""
    config = model.config
    T = window or config.block_size
    n_windows = max(1, n // PER_WINDOW)
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same draws on any device
    # all of it beforehand: small tensors left between large ones would keep the memory of those
    n_rows = n_windows * PER_WINDOW
    bank = {site: torch.empty(n_rows, config.site_width(site), device=device)
            for site in model.sites}
    bank[FINAL] = torch.empty(n_rows, config.d_model, device=device)  # published circuits name it

    held = {held_at(site): site for site in bank}

    def keep(site: str, x: Tensor) -> Tensor:
        if site in held:  # picked at once: whole windows would take many times the memory
            bank[held[site]][place] = x[row, position]
        return x

    first = 0
    for ids in random_windows(path, config.vocab_size, T, n_windows * T, seed, device):
        for part in ids.split(rows_at_once(model, T)):
            row = torch.arange(len(part)).repeat_interleave(PER_WINDOW)
            position = torch.randint(T, (len(row),), generator=generator)
            place = slice(first, first + len(row))
            model.run(model.embed(part), nodes=keep)
            first = place.stop
    return bank


@torch.no_grad()
def resampled(case: Case, bank: Nodes, generator: torch.Generator, pairs: Pairs) -> Tensor:
    """Margins (2n,) where at each token of each prompt all pruned nodes take their values at one
    random row of `bank`."""
    held = {held_at(site): site for site in case.circuit.mask}
    n_rows = len(next(iter(bank.values())))

    def node(site: str, x: Tensor) -> Tensor:
        if site not in held:
            return x
        return torch.where(case.circuit.mask[held[site]], x, bank[held[site]][rows])

    out = []
    for part in fitting_batches(case.model, pairs):
        rows = torch.randint(n_rows, part.ids.shape, generator=generator).to(part.ids.device)
        out.append(margin_of(last_logits(case.reduced, part, node), part))
    return torch.cat(out)


def resample(case: Case) -> dict:
    """Loss with pruned nodes at their values at random pretraining positions, not their means: that
    the circuit needs no lucky constant (causal scrubbing). The noise of all pruned nodes adds up in
    the stream that it reads: circuits fail by degrees, and a right one can fail. Removed edges
    between two kept nodes stay at their means."""
    n_nodes = sum(len(m) for m in case.circuit.mask.values())
    n = min(POSITIONS, 2**27 // n_nodes)  # 2**27 float32: the bank is at most half a GB
    bank = bank_of(case.model, case.data, n, case.seed, case.settings.window)

    # one generator for all: each of the draws is another, and the fit's is none of them
    run = partial(resampled, case, bank, case.generator())
    draws = [run(case.heldout) for _ in range(DRAWS)]
    scale, shift = calibrate(run(case.fit))
    losses = [case.loss(margin) for margin in draws]
    refits = [loss_of(calibrated(margin, scale, shift)) for margin in draws]
    return {"resample": sum(losses) / DRAWS, "resample_refit": sum(refits) / DRAWS}


def halves(case: Case) -> Iterator[Circuit]:
    """Circuits made of this one and a random half of all nodes and edges outside it."""
    generator = case.generator()

    def with_half(kept: Tensor) -> Tensor:
        woken = torch.rand(kept.shape, generator=generator) < 0.5
        return kept | woken.to(kept.device)

    for _ in range(SUBSETS):
        mask = {site: with_half(m) for site, m in case.circuit.mask.items()}
        edges = {ends: with_half(kept) for ends, kept in case.circuit.edges.items()}
        yield replace(case.circuit, mask=mask, edges=edges)


def complement(case: Case) -> dict:
    """Loss with random halves of the complement ablated, on average and at worst: a high one is a
    rest that works against the circuit once half awake (proposed in reply to Drori 2026). A low one
    proves little: random halves are a weak adversary, and the waking half can do the task itself.
    """
    # calibrated anew for each: the file's scale and shift make up for the loss of all the rest
    losses = [case.refit(alone(case.model, c, case.constants)) for c in halves(case)]
    return {"complement_random": sum(losses) / len(losses), "complement_worst": max(losses)}


class FrozenNorm(nn.Module):
    """An RMSNorm that is told 1/rms of each position, (B, T, 1)."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps
        self.scale = None

    def tell(self, h: Tensor) -> None:
        eps = torch.finfo(h.dtype).eps if self.eps is None else self.eps  # PyTorch's own default
        self.scale = (h.square().mean(-1, keepdim=True) + eps).rsqrt()

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale * self.weight


@torch.no_grad()
def frozen(case: Case, pairs: Pairs) -> Tensor:
    """Margins (2n,) of the circuit where each norm divides by what it divides by in the model."""
    stiff = twin(case.reduced)
    told = {}  # site of the stream before a norm -> that norm
    for i, block in enumerate(stiff.transformer.h):
        block.ln_1 = FrozenNorm(block.ln_1)
        block.ln_2 = FrozenNorm(block.ln_2)
        told[f"{i}.resid_in"] = block.ln_1
        told[f"{i}.resid_mid"] = block.ln_2
    last = FrozenNorm(stiff.transformer.ln_f)
    stiff.transformer.ln_f = last

    def tell(site: str, x: Tensor) -> Tensor:
        if site in told:
            told[site].tell(x)
        return x

    out = []
    for part in fitting_batches(case.model, pairs):
        h = case.model.run(case.model.embed(part.ids), nodes=tell)
        # the last norm sees the last token alone: nothing else is unembedded
        rows = torch.arange(len(h), device=h.device)
        last.tell(h[rows, part.last].unsqueeze(1))
        h = stiff.run(stiff.embed(part.ids), nodes=case.nodes)
        out.append(margin_of(unembed_last(stiff, h, part), part))
    return torch.cat(out)


def frozen_norms(case: Case) -> dict:
    """Loss with every RMSNorm's scale from the unpruned run: ablation changes norms, and a circuit
    can draw from that a strength that it lacks in the model (Drori 2026). Not which norm; and what
    calibrating anew brings down was strength alone. None for LayerNorm, which also subtracts."""
    if not case.model.config.rms_norm:
        return {"frozen_norms": None, "frozen_norms_refit": None}
    run = partial(frozen, case)
    return {"frozen_norms": case.loss(run(case.heldout)), "frozen_norms_refit": case.refit(run)}


# --- controls: the same pruning where there is nothing to find -------------------------------

def nonsense(pairs: Pairs) -> Pairs:
    """The pairs with answers permuted by a rule that no model can know: where a hash of its tokens
    says so, a pair's prompts change places."""
    prompts = pairs.prompts()  # unpadded: a pair's rule does not hang on the company it is in
    order = []
    for i in range(0, len(prompts), 2):
        digest = hashlib.sha256(f"nonsense {prompts[i : i + 2]}".encode()).digest()
        order += [i + 1, i] if digest[0] % 2 else [i, i + 1]  # every second pair, about
    # the answers stay, because calibration expects the first answer in rows 2i
    return Pairs(pairs.ids[order], pairs.last[order], pairs.answer, pairs.wrong)


def control(case: Case, model: GPT, train: Pairs, heldout: Pairs, constants: Nodes,
            say: Say) -> dict:
    """Prune with the circuit's settings: what it comes to; `met`, on training pairs, its target."""
    found = next(find(model, train, constants, case.settings, say))  # the one of its one target
    margin = alone(model, found, constants)(heldout)
    return {
        "loss": found.loss,
        "loss_heldout": loss_of(calibrated(margin, found.scale, found.shift)),  # found's own
        "nodes": found.size[0],
        "edges": found.size[1],
        "met": found.loss <= case.settings.target_loss[0],
    }


def nonsense_control(case: Case, say: Say) -> dict:
    """Prune for permuted answers. If that succeeds, masks of this size can memorise the pairs, and
    the circuit's low loss proves nothing (Drori 2026). If not, it may still not be what the model
    uses."""
    train = nonsense(case.train)
    return control(case, case.model, train, nonsense(case.heldout), case.constants, say)


def shuffled(model: GPT, generator: torch.Generator) -> GPT:
    """A copy with its weights, biases, embeddings and sinks each permuted: nothing learned."""
    # without what is known of the weights, which would hold on to the old ones
    forget = {id(m.known): {} for m in model.modules() if hasattr(m, "known")}
    model = copy.deepcopy(model, forget)
    for name, p in model.named_parameters():
        # norms stay, for activations to keep their size; so does the bigram table, which no mask
        # can touch: shuffled, it would drown the logits, and make the control easier to beat
        if "ln_" not in name and name != "bigram_table":
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.data = p.data.flatten()[order].view_as(p)
    return model


def random_weights(case: Case, say: Say) -> dict:
    """Prune a model with shuffled weights. If that succeeds, masks solve the task with any feature,
    or its last token gives it away: a circuit of that size says nothing about training (Drori
    2026). If not, that is of this shuffle."""
    model = shuffled(case.model, case.generator())
    # its own means, over the data that this command was given
    constants = constants_of(model, replace(case.settings, data=os.path.dirname(case.data)))
    return control(case, model, case.train, case.heldout, constants, say)


# --- against the model, and on prompts that pruning never saw --------------------------------

def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one does not vary but for rounding."""
    if a.std().item() < 1e-5 or b.std().item() < 1e-5:  # of logits, which are about 1
        return 0.0
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def agreement(case: Case) -> dict:
    """Correlation of the circuit's and the model's logit differences, first answer - second: that
    it follows the model. Two that are both right agree by the labels alone; hence also the mean
    within one answer's prompts, where labels tell nothing. Neither sees scale and shift."""
    # margins are right minus wrong: in row 0 the first answer is right, in row 1 the second
    circuit = margins(case.reduced, case.heldout, case.nodes).double().view(-1, 2).T
    model = margins(case.model, case.heldout).double().view(-1, 2).T
    of_circuit = torch.cat([circuit[0], -circuit[1]])
    of_model = torch.cat([model[0], -model[1]])
    within = correlation(circuit[0], model[0]) + correlation(circuit[1], model[1])
    return {"agreement": correlation(of_circuit, of_model), "agreement_within": within / 2}


def longer(task: Task, tokenizer, block_size: int) -> Task:
    """The task behind as many whole functions as the context has room for, and at least one."""
    def prompts(r: random.Random) -> tuple[str, str]:
        pair = task.prompts(r)
        before = whole_function(r)
        while True:
            more = whole_function(r) + before
            if max(len(tokenizer.encode_ordinary(more + prompt)) for prompt in pair) > block_size:
                return before + pair[0], before + pair[1]
            before = more  # there was room

    return replace(task, prompts=prompts)


def words_of(texts: Iterable[str]) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts)))


def renamed(task: Task, seed: int) -> Task:
    """The task with other names: throughout a pair each becomes a word that the pretraining data
    has and the task never. ValueError where there is nothing to rename."""
    rng = random.Random(f"{task.name} names {seed}")
    drawn = [words_of(task.prompts(rng)) for _ in range(500)]  # enough to see its every word
    named = {*VARIABLES, *NOUNS, *GROWN}
    # words that all prompts have are part of the task, and stay
    names = named & set.union(*drawn) - set.intersection(*drawn) - words_of(task.answers)
    if not names:
        raise ValueError(f"the prompts of {task.name} have no names")

    plurals = {f"{noun}s" for noun in NOUNS}
    taken = named.union(VERBS, ADJECTIVES, plurals, *drawn)
    others = set(idioms.NOUNS).union(idioms.VARIABLES, idioms.COLLECTIONS, idioms.SINGULAR,
                                     idioms.ACCUMULATORS)
    # a letter can be more than a name: open(path, 'w'); sorted, for a set has no order
    others = sorted(word for word in others - taken if len(word) > 2)

    def prompts(r: random.Random) -> tuple[str, str]:
        pair = task.prompts(r)
        here = sorted(names & words_of(pair))
        to = dict(zip(here, r.sample(others, len(here))))

        def other(word: re.Match) -> str:
            return to.get(word[0], word[0])

        return tuple(re.sub(r"\w+", other, prompt) for prompt in pair)

    return replace(task, prompts=prompts)


def generalisation(case: Case) -> dict:
    """Loss behind further functions and with other names, of circuit and model: where only the
    circuit fails, it is less than what the model does; where both fail, the model knows no more
    than the task's generator shows. Two shifts of that generator, not code at large. None for
    pairs from a file, which has no generator."""
    T = case.model.config.block_size
    seed = case.settings.seed
    vary = {
        "generalisation_longer": partial(longer, case.task, case.tokenizer, T),
        "generalisation_names": partial(renamed, case.task, seed),
    }
    out = {}
    for key, varied in vary.items():
        out |= {key: None, f"{key}_unpruned": None}
        if case.task.file is not None:
            continue
        try:
            pairs = load_pairs(varied(), case.tokenizer, len(case.heldout), "heldout", T, seed)
        except ValueError:  # there are no such prompts, or none that fit the context
            continue
        pairs = pairs.to(case.heldout.ids.device)
        out[key] = case.loss(margins(case.reduced, pairs, case.nodes))
        out[f"{key}_unpruned"] = loss_of(margins(case.model, pairs))
    return out


# --- the card --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Line:
    """A line of the card: two numbers, what they are called and their keys in the file."""
    name: str
    key: str
    beside: str
    beside_key: str
    strict: bool = False  # harder than what pruning asks: the verdict says if it misses the target


LINES = (
    Line("sufficiency", "sufficiency", "unpruned model", "unpruned_loss"),
    Line("zero ablation", "zero_ablation", "recalibrated", "zero_ablation_refit", strict=True),
    Line("necessity", "necessity", "accuracy", "necessity_accuracy"),
    Line("resample", "resample", "recalibrated", "resample_refit", strict=True),
    Line("half the complement", "complement_random", f"worst of {SUBSETS}", "complement_worst",
         strict=True),
    Line("frozen norms", "frozen_norms", "recalibrated", "frozen_norms_refit", strict=True),
    Line("agreement (no nats)", "agreement", "within one answer", "agreement_within"),
    Line("longer prompts", "generalisation_longer",
         "unpruned model", "generalisation_longer_unpruned", strict=True),
    Line("other names", "generalisation_names",
         "unpruned model", "generalisation_names_unpruned", strict=True),
)
# what fills the lines after sufficiency and necessity: each gives the keys of a line or two
MEASURES = (zero_ablation, resample, complement, frozen_norms, agreement, generalisation)
CONTROLS = {"nonsense": nonsense_control, "random_weights": random_weights}
CONTROL_NAMES = {"nonsense": "permuted answers", "random_weights": "shuffled weights"}


def card_of(case: Case, stated: dict, controls: bool, say: Say = print) -> dict:
    """The whole card. ValueError where the circuit lacks the losses that its file states."""
    card = {"sufficiency": sufficiency(case), "necessity": necessity(case)}
    for key, loss in card.items():
        claim = stated.get(key)
        # another machine adds up in another order; an edit changes more than that
        if not (isinstance(claim, (int, float)) and abs(claim - loss) <= 0.002 + 0.01 * loss):
            raise ValueError(
                f"it states a {key} of {claim} nats, but has {loss:.4f}: it was edited, or the "
                "tokenizer or tasks.py are others now; prune the task again"
            )
    for measure in MEASURES:
        say(f"  {measure.__name__.replace('_', ' ')}")
        card |= measure(case)

    def say_further_in(text: str) -> None:
        say(f"  {text}")

    if controls:
        for key, run in CONTROLS.items():
            say(f"  control: {CONTROL_NAMES[key]}")
            card[key] = run(case, say_further_in)
    return card | verdict(card, case.settings.target_loss[0], case.circuit.size[1])


def verdict(card: dict, target: float, n_edges: int) -> dict:
    """`trustworthy` (None without controls, which alone decide it), and a sentence that also says
    what else is wrong."""
    controls = [key for key in CONTROLS if key in card]
    beaten = []
    for key in controls:
        if card[key]["met"] and card[key]["edges"] <= n_edges:
            beaten.append(f"{CONTROL_NAMES[key]} ({card[key]['edges']} edges)")
    if beaten:
        text = (f"Not trustworthy: with no more than its {n_edges} edges the same pruning meets "
                f"the target on {' and on '.join(beaten)}")
    elif controls:
        text = "No control meets the target with as few edges"
    else:
        text = "The controls were not run, so trust cannot be stated"

    # asked this way round, because no comparison with NaN is true
    if not card["sufficiency"] <= target:
        text += f"; it misses its target of {target} nats on held-out pairs "
        text += f"({card['sufficiency']:.3f})"
    if not card["necessity"] >= NECESSARY:
        text += f"; the model hardly needs it ({card['necessity']:.3f} nats without it)"
    # a line that was not stated, None, is no failure
    past = [line.name for line in LINES if line.strict and (card.get(line.key) or 0) > target]
    if past:
        text += f"; its loss exceeds the target with {', '.join(past)}"
    return {"trustworthy": not beaten if controls else None, "verdict": f"{text}."}


def show(x) -> str:
    return f"{x:.3f}" if isinstance(x, (int, float)) else "n/a"


def card_text(content: dict) -> str:
    """The card of a circuit file's content, for the terminal."""
    v = {**content, **content["validation"]}  # unpruned_loss stands outside the card
    rows = [f"{v['task']}: {v['n_nodes']} nodes, {v['n_edges']} edges, "
            f"target {v['target_loss']} nats"]
    for line in LINES:
        beside = f"{line.beside} {show(v.get(line.beside_key))}"
        rows.append(f"  {line.name:20} {show(v[line.key]):>6}   {beside}")
    for key, name in CONTROL_NAMES.items():
        if key in v:
            run = v[key]
            met = "met" if run["met"] else "not met"
            rows.append(f"  {name:20} {show(run['loss']):>6}   {met} with {run['nodes']} nodes, "
                        f"{run['edges']} edges; held out {show(run['loss_heldout'])}")
    rows.append(f"  {v['verdict']}")
    return "\n".join(rows)


# --- what a circuit file speaks of -----------------------------------------------------------

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


def task_in(cfg: ValidateConfig, content: dict) -> Task:
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


def case_of(cfg: ValidateConfig, content: dict) -> Case:
    """Load what a circuit file speaks of. ValueError, in one line, where it is not what it was."""
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
    window = window_of(folder, model.config.block_size, cfg.window or settings.window)
    settings = replace(settings, model=folder, window=window)

    def draw(n: int, split: str) -> Pairs:
        T = model.config.block_size
        return load_pairs(task, tokenizer, n, split, T, settings.seed).to(cfg.device)

    return Case(
        model=model, task=task, tokenizer=tokenizer, circuit=circuit, constants=constants,
        settings=settings, train=draw(settings.train_pairs, "train"),
        heldout=draw(settings.heldout_pairs, "heldout"),
        data=os.path.join(cfg.data, "train.bin"), seed=cfg.seed,
    )


# --- the command -----------------------------------------------------------------------------

def measured_with(cfg: ValidateConfig, content: dict) -> dict:
    """What a card hangs on; where this is as it was, a card need not be measured again."""
    keys = ("nodes", "edges", "means", "logit_scale", "logit_shift", "target_loss", "settings")
    circuit = json.dumps([content[key] for key in keys])
    return {
        "circuit": hashlib.sha256(circuit.encode()).hexdigest()[:16],
        "data": cfg.data, "tokenizer": cfg.tokenizer, "seed": cfg.seed, "window": cfg.window,
        "positions": POSITIONS, "draws": DRAWS, "subsets": SUBSETS,
    }


def validate(cfg: ValidateConfig, say: Say = partial(print, flush=True)) -> dict:
    """Measure, write and print the card of one file, unless it is there; returns the content.

    ValueError or OSError, in one line and with nothing written, where that cannot be done.
    """
    content = read_circuit(cfg.circuit)
    old = content["validation"]
    with_what = measured_with(cfg, content)
    wanted = {"verdict", *(line.key for line in LINES)}
    if cfg.controls:
        wanted |= CONTROLS.keys()
    if cfg.again or old.get("card") != with_what or not wanted <= old.keys():
        say(f"validating {cfg.circuit}")
        try:
            card = card_of(case_of(cfg, content), old, cfg.controls, say)
        except ValueError as e:
            raise ValueError(f"{cfg.circuit}: {e}") from e
        # what pruning stated stays; controls of an earlier card do not, they may be of another seed
        kept = {key: value for key, value in old.items() if key not in CONTROLS}
        content["validation"] = {**kept, **card, "card": with_what}
        write_circuit(cfg.circuit, content)
    say(card_text(content))
    return content


def validate_named(cfg: ValidateConfig, path: str) -> dict:
    """One circuit of several: each line that it prints stands under its task's name."""
    name = os.path.basename(os.path.dirname(path))

    def say(text: str) -> None:
        for row in text.split("\n"):
            print(f"[{name}] {row}", flush=True)

    return validate(replace(cfg, circuit=path), say)


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def print_table(contents: list[dict]) -> None:
    """A row for each circuit file's content."""
    print()
    names = [line.name for line in LINES]
    names += [f"{name}: loss, edges" for name in CONTROL_NAMES.values()]
    print_row("task", "nodes, edges", *names, "trustworthy")
    print("|---" * (len(names) + 3) + "|")
    for content in contents:
        v = content["validation"]
        cells = [show(v[line.key]) for line in LINES]
        for key in CONTROLS:
            cells.append(f"{show(v[key]['loss'])}, {v[key]['edges']}" if key in v else "–")
        trust = {True: "yes", False: "no", None: "–"}[v["trustworthy"]]  # None: no controls
        size = f"{content['n_nodes']}, {content['n_edges']}"
        print_row(content["task"], size, *cells, trust)


def validate_all(cfg: ValidateConfig, paths: list[str]) -> int:
    """Every circuit, `jobs` at a time, then one table; exit status 2 where any was refused."""
    one = partial(validate_named, cfg)
    if cfg.jobs > 1:
        results = in_processes(one, paths, cfg.jobs)
    else:  # in this process, which has loaded PyTorch already
        results = [result_or_reason(one, path) for path in paths]
    print_table([result for result in results if isinstance(result, dict)])
    refused = [result for result in results if isinstance(result, str)]
    for reason in refused:
        print(f"validate.py: {reason}", file=sys.stderr)
    return 2 if refused else 0


def main(argv: list[str]) -> int:
    cfg = parse(ValidateConfig, argv)
    try:
        cfg = replace(cfg, device=device_of(cfg.device))
        if not os.path.isdir(cfg.circuit):
            validate(cfg)
            return 0
        paths = sorted(glob.glob(os.path.join(glob.escape(cfg.circuit), "*", "circuit.json")))
        if paths:
            return validate_all(cfg, paths)
    except (ValueError, OSError) as e:
        die(e)
    die(f"no {cfg.circuit}/*/circuit.json; prune.py writes them")


if __name__ == "__main__":
    as_script(main)
