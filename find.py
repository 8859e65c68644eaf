"""Find the smallest circuit of a task, on pairs in memory: paper A.5, and what we add to it.

- `rank`: the gates of all nodes in order, by learned masks (masks.py) or by attribution, to compare
  with (Fig. 31).
- `discretise`: bisection for the fewest leading nodes that meet the target, as in the paper.
- `smallest`: or, with --minimal, from twice the nodes whose gates are open, single nodes and edges
  are left out (minimise.py).
- `find`: several starts, because one mask seed may end in twice the edges of another; what they
  found is joined and made minimal on more pairs. Of all these circuits the smallest counts that
  also holds on pairs set apart.

prune.py is the command: it loads the model, the means and the pairs, and writes the file.
"""
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import bounded, one_of

import numpy as np
import torch
from torch import Tensor

from ablations import Varied
from circuit import Circuit, Nodes, all_edges, alone, host
from masks import Gates, MaskConfig, attribution, learn_masks
from minimise import minimise
from model import GPT
from processes import in_processes
from search import Search
from tasks import Pairs, calibrated, losses_of_pairs

# The search aims this far below the target on the pairs that it looks at, so that others meet it
# too; and further where pairs set apart say that this was not enough. Starts that are to be joined
# begin with the last.
SLACKS = (0.9, 0.75, 0.6)
# Nats by which a circuit may be above its target, by its loss on pairs set apart and a standard
# error of that together, and by that on held-out ones.
HELD_OUT = 0.01
VARIED_APART = 512  # pairs set apart that are run under varied ablation, which takes far longer
WIDE = (2, 1)  # times the gates that learning left open: what minimising starts from
NEXT_START = 1_000_003  # between the seeds of one run: a prime, far from any other seed


@dataclass
class FindConfig(MaskConfig):
    method: str = one_of("learned", "attribution")  # how nodes are ranked
    starts: int = bounded(3, at_least=1)  # masks learnt from so many seeds; the smallest counts
    minimal: bool = False           # then leave out single nodes and edges until none can go
    necessity: float = bounded(0.0, at_least=0)  # minimal: nats that the model must lose without it
    standalone: bool = False        # a circuit that runs without AbsTopK, as its program does
    fit_pairs: int = bounded(256, at_least=1)  # the first of all: for bisection and calibration
    join_pairs: int = bounded(1024, at_least=1)  # minimal: as many for what several starts found
    jobs: int = bounded(1, at_least=1)  # processes at a time: of one task's starts, or of all tasks


def varied_for(cfg: FindConfig, model: GPT, whole: GPT, constants: Nodes,
               pairs: Pairs) -> Varied | None:
    """The other ablations that the config asks for; None where it is content with the constants."""
    return Varied(model, whole, constants, pairs) if cfg.varied else None


# --- from a ranking to a circuit -------------------------------------------------------------

@dataclass
class Ranking:
    """The gates of one start, the most wanted first."""
    order: Tensor  # (n_parameters,)
    n_open: int    # so many were open when learning ended


def rank(model: GPT, pairs: Pairs, constants: Nodes, gates: Gates, cfg: FindConfig,
         say=print, varied: Varied | None = None) -> Ranking:
    """Learn masks on `pairs`, or take the attribution alone, and put the gates in order."""
    effect = attribution(model, pairs.first(cfg.fit_pairs), constants, gates)
    # where the method is attribution, all taus are equal and the effect decides
    tau = torch.ones_like(effect)
    if cfg.method == "learned":
        tau = learn_masks(model, pairs, constants, gates, cfg, say, varied)
    # the largest tau first; the clamp leaves many at 1, and of those the largest effect first
    order = np.lexsort((-effect.cpu().numpy(), -tau.cpu().numpy()))
    return Ranking(torch.from_numpy(order).to(effect.device), int((tau > 0).sum()))


def discretise(search: Search, gates: Gates, ranking: Ranking, target: float,
               necessity: float = 0.0) -> Circuit:
    """The fewest leading gates of a ranking whose nodes meet `target`, by bisection (paper A.5);
    and of which the model, where it loses them alone, misses at least `necessity` nats.

    Calibration is part of the test (the paper fits it afterwards), because the calibrated loss is
    the one that is reported. Where not even all nodes do, the open gates: `Search.meets` says so.
    """
    def leading(k: int, target: float) -> Circuit:
        return leading_gates(search, gates, ranking, k, target)

    # From the open gates down, and only where they do not do from all nodes: the loss is not
    # monotone in the number of nodes, and between the two it can be worse.
    low = 0
    high = ranking.n_open
    best = leading(high, target)
    if not search.meets(best, target, necessity):
        low = ranking.n_open
        high = len(ranking.order)
        best = leading(high, target)
    if not search.meets(best, target, necessity):
        return leading(ranking.n_open, math.inf)
    return search.fewest(partial(leading, target=target), low, high, best, target, necessity)


def leading_gates(search: Search, gates: Gates, ranking: Ranking, k: int,
                  target: float = math.inf) -> Circuit:
    """The circuit of the k leading gates, all edges between them in it, fitted as `Search.fit`."""
    chosen = torch.zeros_like(ranking.order, dtype=torch.bool)
    chosen[ranking.order[:k]] = True
    return search.fit(gates.split(chosen[gates.index]), all_edges(search.model), target)


def smallest(search: Search, gates: Gates, ranking: Ranking, aim: float, target: float,
             cfg: FindConfig, say=print, exchange: bool = True) -> Circuit:
    """The circuit of one start: at most `aim` nats, or `target` where it cannot be less; minimal
    where that is asked for and there is something to be minimal by. exchange: as in `minimise`."""
    necessity = cfg.necessity if cfg.minimal else 0.0
    if cfg.minimal:
        # The fewest gates are all needed for each other, and little can go; among more, what can
        # stand in for a part is still there.
        for times in WIDE:
            circuit = leading_gates(search, gates, ranking, times * ranking.n_open)
            if search.meets(circuit, aim, necessity):
                return minimise(search, circuit, aim, say, cfg.necessity, exchange)

    circuit = discretise(search, gates, ranking, aim, necessity)
    fit_for = search.meets(circuit, aim, necessity)
    if not fit_for:  # not even all nodes come that far below, or are missed that much
        circuit = discretise(search, gates, ranking, target)
    say(f"  {circuit.size[0]} nodes, {circuit.size[1]} edges: loss {circuit.loss:.3f}, "
        f"target {target}")
    if not cfg.minimal or not circuit.loss <= target:
        return circuit
    if not fit_for:
        asked = f"{aim:.3f} nats on its pairs"
        if necessity:
            asked += f" and is missed by {necessity} nats"
        say(f"  not minimised: no number of nodes comes to {asked}")
        return circuit
    return minimise(search, circuit, aim, say, cfg.necessity, exchange)


# --- several starts ---------------------------------------------------------------------------

def find(model: GPT, pairs: Pairs, apart: Pairs | None, constants: Nodes, cfg: FindConfig,
         say=print) -> Iterator[Circuit]:
    """The circuits of one model and task, one per target loss, found on `pairs` (paper A.5).

    Masks are learnt from several seeds, because one of them may end in twice the edges of another;
    and for each target anew, because those for a low one leave too many gates open for a high one.
    Where a target cannot be met, the circuit's loss says so.
    """
    whole = model  # must miss the circuit, whatever that runs in
    model = host(whole, cfg.standalone)
    gates = Gates(model, cfg.tie_qk)
    varied = varied_for(cfg, model, whole, constants, pairs)

    def search_on(n: int) -> Search:
        return Search(model, constants, pairs.first(n), cfg.tie_qk, whole=whole, varied=varied,
                      drawn_from=pairs)

    few = search_on(cfg.fit_pairs)
    many = search_on(cfg.join_pairs) if cfg.minimal else few  # only minimal ones are joined
    for target in cfg.target_loss:
        this = replace(cfg, target_loss=(target,))
        circuit = best_start(few, many, gates, apart, this, say)
        yield replace(circuit, standalone=cfg.standalone)


def best_start(few: Search, many: Search, gates: Gates, apart: Pairs | None, cfg: FindConfig,
               say=print) -> Circuit:
    """The circuit with the fewest edges that also holds on pairs set `apart` (None: any holds), of
    all that are tried; where none holds, the one with the lowest loss there. One that is minimal
    comes before one that is not.

    few, many: fit circuits to fit_pairs, and to join_pairs.
    """
    (target,) = cfg.target_loss
    if cfg.minimal:
        tried = minimal_and_joined(few, many, gates, apart, cfg, say)
    else:
        tried = further_below(few, gates, apart, cfg, say)
    met = [circuit for circuit in tried if circuit.loss <= target]
    held = [circuit for circuit in met if holds(circuit, target)]
    if held:
        chosen = min(held, key=lambda c: (c.certificate is None, c.size[1], c.size[0]))
    elif met:
        chosen = min(met, key=lambda circuit: circuit.loss_apart)
        say(f"  none holds on pairs set apart (the best has {chosen.loss_apart:.3f} nats)")
    else:
        chosen = min(tried, key=lambda circuit: circuit.loss)
    sizes = [(*circuit.size, circuit.loss_apart) for circuit in tried]
    return replace(chosen, starts=sizes)


def further_below(search: Search, gates: Gates, apart: Pairs | None, cfg: FindConfig,
                  say=print) -> list[Circuit]:
    """The circuits of all starts; where none holds on pairs set `apart`, they go further below the
    target."""
    (target,) = cfg.target_loss
    starts = [Start(seed) for seed in seeds_of(cfg)]
    tried = []
    for slack in SLACKS:
        starts = from_starts(search, gates, starts, slack * target, cfg, say)
        found = [with_loss_apart(search, start.circuit, apart) for start in starts]
        tried += found
        if any(circuit.loss <= target and holds(circuit, target) for circuit in found):
            break
        if all(circuit.loss > target for circuit in found):  # nor would they further below
            break
    return tried


def minimal_and_joined(few: Search, many: Search, gates: Gates, apart: Pairs | None,
                       cfg: FindConfig, say=print) -> list[Circuit]:
    """The minimal circuits of all starts, and what became of them joined and made minimal on more
    pairs; where that does not hold on pairs set `apart`, they are joined again further below the
    target.

    The starts are not made again for that. They go as far below the target as they can from the
    beginning, which also leaves more to choose from when they are joined.
    """
    (target,) = cfg.target_loss
    starts = [Start(seed) for seed in seeds_of(cfg)]
    for slack in reversed(SLACKS):
        done = [start for start in starts if start.is_minimal]
        rest = [start for start in starts if not start.is_minimal]
        rest = from_starts(few, gates, rest, slack * target, cfg, say)
        starts = done + rest
        if all(start.is_minimal or start.circuit.loss > target for start in starts):
            break
    tried = [with_loss_apart(few, start.circuit, apart) for start in starts]
    minimal = [start.circuit for start in starts if start.is_minimal]
    for slack in SLACKS:
        joined = join(many, minimal, slack * target, cfg, say)
        if joined is None:
            break
        tried.append(with_loss_apart(many, joined, apart))
        if holds(tried[-1], target):
            break
    return tried


class Start(NamedTuple):
    """A seed of mask learning, and what came of it."""
    seed: int
    ranking: Ranking | None = None  # not learnt yet
    circuit: Circuit | None = None

    @property
    def is_minimal(self) -> bool:
        return self.circuit is not None and self.circuit.certificate is not None


def seeds_of(cfg: FindConfig) -> list[int]:
    """The seeds of a run's starts; attribution has no use for more than one."""
    n = cfg.starts if cfg.method == "learned" else 1
    return [cfg.seed + NEXT_START * i for i in range(n)]


def from_starts(search: Search, gates: Gates, starts: list[Start], aim: float, cfg: FindConfig,
                say=print) -> list[Start]:
    """Each start's circuit at `aim` nats, `cfg.jobs` starts at a time; in processes of their own,
    `say` must be a function that can be pickled."""
    if cfg.jobs == 1 or len(starts) < 2:
        return [from_start(search, gates, start, aim, cfg, say) for start in starts]
    # as bytes: tensors as such would go through shared memory, of which a container has little
    given = pickle.dumps((search, gates, aim, cfg, say))
    found = in_processes(partial(_in_its_process, given), list(map(pickle.dumps, starts)), cfg.jobs)
    for result in found:
        if isinstance(result, str):
            raise ValueError(result)
    return [pickle.loads(result) for result in found]


def _in_its_process(given: bytes, start: bytes) -> bytes:
    search, gates, aim, cfg, say = pickle.loads(given)
    start = pickle.loads(start)
    number = seeds_of(cfg).index(start.seed)  # of all starts, also where only a few try again

    def say_which(text: str) -> None:
        say(f"[start {number}] {text.strip()}")

    return pickle.dumps(from_start(search, gates, start, aim, cfg, say_which))


def from_start(search: Search, gates: Gates, start: Start, aim: float, cfg: FindConfig,
               say=print) -> Start:
    """A start's circuit at `aim` nats; its ranking is learnt if it has none."""
    (target,) = cfg.target_loss
    ranking = start.ranking
    if ranking is None:
        ranking = rank(search.model, search.drawn_from, search.constants, gates,
                       replace(cfg, seed=start.seed), say, search.varied)
    # several starts have parts for each other, and these are exchanged once they are joined
    single = len(seeds_of(cfg)) == 1
    circuit = smallest(search, gates, ranking, aim, target, cfg, say, exchange=single)
    return Start(start.seed, ranking, circuit)


def join(search: Search, circuits: list[Circuit], aim: float, cfg: FindConfig,
         say=print) -> Circuit | None:
    """The parts of all these circuits together, made minimal; None where even together they do not
    do what is asked.

    Leaving out single parts gets stuck where one must go for another to come back; another start
    has that other. And what few pairs let go by luck, more pairs keep: together the circuits are
    small enough to be tried on many.
    """
    if not circuits:
        return None
    mask = {}
    edges = {}
    for site in circuits[0].mask:
        mask[site] = torch.stack([circuit.mask[site] for circuit in circuits]).any(0)
    for ends in circuits[0].edges:
        edges[ends] = torch.stack([circuit.edges[ends] for circuit in circuits]).any(0)
    together = search.fit(mask, edges)
    if not search.meets(together, aim, cfg.necessity):
        return None
    say(f"  {len(circuits)} circuits together, on {search.n_pairs} pairs")
    return minimise(search, together, aim, say, cfg.necessity)


def with_loss_apart(search: Search, circuit: Circuit, apart: Pairs | None) -> Circuit:
    """A circuit with its loss on pairs that it was not found on, and that loss's standard error.
    With varied ablation it is the highest under any of them, as on the pairs that it was found on.
    """
    if apart is None:
        return circuit
    margin = alone(search.model, circuit, search.constants)(apart)
    losses = losses_of_pairs(calibrated(margin, circuit.scale, circuit.shift))
    if search.varied is not None:
        varied = search.varied.worst_losses(circuit, apart.first(VARIED_APART))
        losses = max(losses, varied, key=torch.mean)
    error = losses.std().item() / math.sqrt(len(losses))
    return replace(circuit, loss_apart=losses.mean().item(), error_apart=error)


def holds(circuit: Circuit, target: float) -> bool:
    """Whether a circuit meets its target on pairs set apart, and would be within HELD_OUT of it if
    its loss were a standard error higher: of a heavy tail, a few thousand pairs say little."""
    if circuit.loss_apart is None:
        return True
    by_luck = circuit.loss_apart + circuit.error_apart > target + HELD_OUT
    return circuit.loss_apart <= target and not by_luck
