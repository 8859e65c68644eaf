"""The lines of the faithfulness card, one function each.

A circuit under other ablations than those of pruning, against the model, and on prompts that
pruning never saw.

All but the idle parts are measured on held-out pairs, and each says what it can and cannot tell.
validate.py puts them together; what it means to hold a node is docs/ablation.md's.

Paper 2.2 and Appendix E; the critique is Drori, "Weight-sparse circuits may be interpretable yet
unfaithful" (2026).
"""
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ablations import Stiff, donated, exchange, half_awake
from case import Case
from circuit import FINAL, Circuit, Nodes, ablate, alone, host, inverse, where_held
from data.tinypython import idioms
from data.tinypython.filler import ADJECTIVES, GROWN, NOUNS, VARIABLES, VERBS, whole_function
from find import varied_for
from model import GPT
from search import Search, parts_of
from tasks import (Pairs, Task, calibrate, calibrated, fitting_batches, last_logits, load_pairs,
                   loss_of, margin_of, margins, rows_at_once)
from tokens import random_windows

POSITIONS = 4096  # pretraining positions that resampled values come from
PER_WINDOW = 16   # of them in one window: more windows would be slower, fewer less varied
DRAWS = 4         # resamplings, averaged
SUBSETS = 16      # random halves of the complement; the worst of them is the adversary
TRIED = 256       # single parts left out, of a circuit that has more


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


def necessity_refit(case: Case) -> dict:
    """Necessity with a scale and shift fitted anew, about 0.693 at most: what the rest of the model
    still knows of the answers. A rest that does the task by a second way, its logits only tilted,
    has a high necessity and a low one of these."""
    run = partial(margins, case.model, nodes=inverse(case.circuit.mask, case.constants))
    return {"necessity_refit": case.refit(run)}


def zero_ablation(case: Case) -> dict:
    """Loss with zeros for means: how much the means do for the circuit (Drori 2026 prunes with
    zeros). Many nodes are never near zero: a high loss alone is no proof against it."""
    zeros = {site: torch.zeros_like(c) for site, c in case.constants.items()}
    run = alone(case.model, case.circuit, zeros)
    return {"zero_ablation": case.loss(run(case.heldout)), "zero_ablation_refit": case.refit(run)}


def standalone(case: Case) -> dict:
    """Loss where no AbsTopK acts on the circuit's nodes, and where it does as in the model; one of
    the two is the sufficiency. AbsTopK is a hidden input: whether a node is kept hangs on how large
    channels outside the circuit are, by what the prompt says. What recalibrating brings down was
    only a tilt of the logits."""
    free = alone(case.model, replace(case.circuit, standalone=True), case.constants)
    kept = alone(case.model, replace(case.circuit, standalone=False), case.constants)
    return {"standalone": case.loss(free(case.heldout)), "standalone_refit": case.refit(free),
            "with_topk": case.loss(kept(case.heldout))}


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

    def keep(site: str, x: Tensor) -> Tensor:
        # picked at once: whole windows would take many times the memory
        bank[site][place] = x[row, position]
        return x

    watch = where_held(bank, keep)
    first = 0
    for ids in random_windows(path, config.vocab_size, T, n_windows * T, seed, device):
        for part in ids.split(rows_at_once(model, T)):
            row = torch.arange(len(part)).repeat_interleave(PER_WINDOW)
            position = torch.randint(T, (len(row),), generator=generator)
            place = slice(first, first + len(row))
            model.run(model.embed(part), nodes=watch)
            first = place.stop
    return bank


@torch.no_grad()
def resampled(case: Case, bank: Nodes, generator: torch.Generator, pairs: Pairs) -> Tensor:
    """Margins (2n,) where at each token of each prompt all pruned nodes take their values at one
    random row of `bank`."""
    mask = case.circuit.mask
    n_rows = len(next(iter(bank.values())))

    def other(site: str, x: Tensor) -> Tensor:
        return torch.where(mask[site], x, bank[site][rows])

    nodes = where_held(mask, other)
    out = []
    for part in fitting_batches(case.model, pairs):
        rows = torch.randint(n_rows, part.ids.shape, generator=generator).to(part.ids.device)
        out.append(margin_of(last_logits(case.reduced, part, nodes), part))
    return torch.cat(out)


def resample(case: Case) -> dict:
    """Loss with pruned nodes at their values at random pretraining positions, not their means: that
    the circuit needs no lucky constant (causal scrubbing). The noise of all pruned nodes adds up in
    the stream that it reads: circuits fail by degrees, and a right one can fail. Removed edges
    between two kept nodes stay at their means."""
    n_nodes = sum(len(m) for m in case.circuit.mask.values())
    n = min(POSITIONS, 2**27 // n_nodes)  # 2**27 float32: the bank is at most half a GB
    bank = bank_of(case.model, case.data, n, case.seed, case.settings.window)

    loss, refit = over_draws(case, partial(resampled, case, bank, case.generator()))
    return {"resample": loss, "resample_refit": refit}


def over_draws(case: Case, run: Callable[[Pairs], Tensor]) -> tuple[float, float]:
    """The mean loss over DRAWS runs on held-out pairs, and that recalibrated (nats). run: its
    margins are others each time, of one generator: the fit's are none of the draws."""
    draws = [run(case.heldout) for _ in range(DRAWS)]
    scale, shift = calibrate(run(case.few))
    losses = [case.loss(margin) for margin in draws]
    refits = [loss_of(calibrated(margin, scale, shift)) for margin in draws]
    return sum(losses) / DRAWS, sum(refits) / DRAWS


@torch.no_grad()
def resampled_in_task(case: Case, generator: torch.Generator, pairs: Pairs) -> Tensor:
    """Margins (2n,) where in each prompt all pruned nodes take their values in one other prompt of
    the task, token by token."""
    mask = case.circuit.mask
    out = []
    for part in fitting_batches(case.model, pairs):
        values = donated(case.model, part, case.train, mask, generator)
        out.append(margin_of(last_logits(case.reduced, part, exchange(mask, values)), part))
    return torch.cat(out)


def resample_task(case: Case) -> dict:
    """Loss with pruned nodes at their values at the same place of another prompt of the task, with
    whichever answer (causal scrubbing's second condition, among documents of one kind): that what
    varies within the task outside the circuit does not matter."""
    loss, refit = over_draws(case, partial(resampled_in_task, case, case.generator()))
    return {"resample_task": loss, "resample_task_refit": refit}


def halves(case: Case) -> Iterator[Circuit]:
    """Circuits made of this one and a random half of all nodes and edges outside it."""
    generator = case.generator()
    for _ in range(SUBSETS):
        yield half_awake(case.circuit, generator)


def complement(case: Case) -> dict:
    """Loss with random halves of the complement ablated, on average and at worst: a high one is a
    rest that works against the circuit once half awake (proposed in reply to Drori 2026). A low one
    proves little: random halves are a weak adversary, and the waking half can do the task itself.
    """
    # calibrated anew for each: the file's scale and shift make up for the loss of all the rest
    losses = [case.refit(alone(case.model, c, case.constants)) for c in halves(case)]
    return {"complement_random": sum(losses) / len(losses), "complement_worst": max(losses)}


@torch.no_grad()
def frozen(case: Case, pairs: Pairs) -> Tensor:
    """Margins (2n,) of the circuit where each norm divides by what it divides by in the model."""
    stiff = Stiff(case.model, case.reduced)
    parts = fitting_batches(case.model, pairs)
    return torch.cat([margin_of(stiff.logits(part, case.nodes), part) for part in parts])


def frozen_norms(case: Case) -> dict:
    """Loss with every RMSNorm's scale from the unpruned run: ablation changes norms, and a circuit
    can draw from that a strength that it lacks in the model (Drori 2026). Not which norm; and what
    calibrating anew brings down was strength alone. None for LayerNorm, which also subtracts."""
    if not case.model.config.rms_norm:
        return {"frozen_norms": None, "frozen_norms_refit": None}
    run = partial(frozen, case)
    return {"frozen_norms": case.loss(run(case.heldout)), "frozen_norms_refit": case.refit(run)}


# --- against the model, and on prompts that pruning never saw --------------------------------

def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one does not vary but for rounding."""
    if a.std().item() < 1e-5 or b.std().item() < 1e-5:  # of logits, which are about 1
        return 0.0
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def partial_correlation(a: Tensor, b: Tensor, c: Tensor) -> float:
    """Of a and b where c is held still; 0 where that leaves nothing of one of them."""
    ab = correlation(a, b)
    ac = correlation(a, c)
    bc = correlation(b, c)
    left = (1 - ac * ac) * (1 - bc * bc)
    return (ab - ac * bc) / left ** 0.5 if left > 1e-6 else 0.0


def agreement(case: Case) -> dict:
    """Correlation of the circuit's and the model's logit differences, first answer - second: that
    it follows the model. Two that are both right agree by the labels alone; hence also the mean
    within one answer's prompts, where labels tell nothing; and that beyond a circuit of no node at
    all, for the last token's embedding and its bigrams are in every circuit and in the model. None
    of them sees scale and shift."""
    # margins are right minus wrong: in row 0 the first answer is right, in row 1 the second
    circuit = margins(case.reduced, case.heldout, case.nodes).double().view(-1, 2).T
    model = margins(case.model, case.heldout).double().view(-1, 2).T
    none = ablate({site: torch.zeros_like(m) for site, m in case.circuit.mask.items()},
                  case.constants)
    empty = margins(case.model, case.heldout, none).double().view(-1, 2).T
    of_circuit = torch.cat([circuit[0], -circuit[1]])
    of_model = torch.cat([model[0], -model[1]])
    within = 0.0
    beyond = 0.0
    for a, b, c in zip(circuit, model, empty):  # one answer's prompts, then the other's
        within += correlation(a, b) / 2
        beyond += partial_correlation(a, b, c) / 2
    return {"agreement": correlation(of_circuit, of_model), "agreement_within": within,
            "agreement_beyond": beyond}


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


# --- parts that do nothing -------------------------------------------------------------------

def idle(case: Case) -> dict:
    """How many single parts can go, with what then has no path, and the circuit is still all that
    was asked of it, on the pairs that it was fitted to: those are listed, but not shown to do
    anything. Two that stand in for each other both count; of a circuit with a certificate none.
    Where there are more than TRIED, of so many drawn at random; `idle_of` says how many. Not stated
    where nodes of the last stream were pruned as well: a search has no gates for them.
    """
    if FINAL in case.circuit.mask:  # a published one, whose channels of the last stream can go too
        return {"idle": None, "idle_of": None}
    settings = case.settings
    model = host(case.model, case.circuit.standalone)
    varied = varied_for(settings, model, case.model, case.constants, case.train)
    search = Search(model, case.constants, case.fit, settings.tie_qk, whole=case.model,
                    varied=varied)
    limit = settings.target_loss[0] if case.limit is None else case.limit
    parts = parts_of(case.circuit, settings.tie_qk)
    if len(parts) > TRIED:
        drawn = torch.randperm(len(parts), generator=case.generator())[:TRIED]
        parts = [parts[i] for i in drawn.tolist()]
    n = 0
    for part in parts:
        trial = search.fit_without(case.circuit, [part], limit)
        n += search.meets(trial, limit, case.missed)
    return {"idle": n, "idle_of": len(parts)}
