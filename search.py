"""Many circuits of one model fitted to the same pairs, and the single parts that they are made of.

- `Search`: a circuit's calibration and loss, again and again, without repeating what stays the same
  from one circuit to the next.
- `parts_of`, `without`: the single nodes and edges of a circuit, and the circuit less some.

What find.py bisects by, minimise.py leaves parts out by, and controls.py compares by.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ablations import Varied
from circuit import Circuit, Edges, Nodes, ablate, between, drop_unconnected, inverse, without_edges
from live import Live, Ready, serves
from model import GPT
from tasks import (Pairs, answer_ids, batches_of, calibrate, calibrated, last_logits, loss_of,
                   margin_of, margins)

# A fit gives up only this far past its target: calibration pulls the scale a little toward 1, so
# the loss of the pairs seen so far is a lower bound only to about 1%.
CLEARLY_ABOVE = 1.01


# --- fitting many circuits to the same pairs -------------------------------------------------

class Search:
    """Fits many circuits of one model to the same pairs, each a change of the last one accepted.

    Savings, none of which changes a result: a fit stops once the pairs seen so far, though none of
    the others cost anything, put the loss above the target; and live.py computes only what is not
    constant, from the first sublayer on that differs from the accepted circuit.
    """

    def __init__(self, model: GPT, constants: Nodes, pairs: Pairs, tie_qk: bool = False,
                 batch: int = 32, whole: GPT | None = None, varied: Varied | None = None,
                 drawn_from: Pairs | None = None):
        """tie_qk: a query channel and the key channel that it meets are one part. whole: the model
        that is to miss the circuit, where `model` is that one `without_topk`. varied: a circuit's
        loss is the highest under any of these ablations and at the constants. drawn_from: more
        pairs, for gates to be learnt on; None = the same."""
        self.model = model
        self.whole = model if whole is None else whole
        self.constants = constants
        self.tie_qk = tie_qk
        self.varied = varied
        self.answers = answer_ids(pairs)
        by_length = pairs.last[::2].argsort()  # less padding in a batch
        self.batches = batches_of(pairs.take(by_length), batch)
        self.n_pairs = len(pairs)
        self.drawn_from = pairs if drawn_from is None else drawn_from
        n_quarter = (len(pairs) + 3) // 4
        self.quarter = pairs.take(torch.arange(n_quarter, device=pairs.ids.device))

        with torch.no_grad():
            self.live = Live(model, constants, pairs) if serves(model) else None
        self.trial = None   # (circuit, prepared, what sublayers wrote): the one fitted last
        self.pairs_run = 0  # pairs on which circuits were run, for those who have only so many
        # the accepted circuit, prepared, and what each sublayer writes for each batch
        self.accepted: Circuit | None = None
        self.ready = None
        self.writes = [[] for _ in self.batches]

    @torch.no_grad()
    def fit(self, mask: Nodes, edges: Edges, target: float = math.inf) -> Circuit:
        """Drop the nodes without a path and calibrate (paper A.5). The circuit's loss, in nats, is
        inf where it is above `target` or not a number."""
        mask = drop_unconnected(self.model, mask, self.answers, edges)
        circuit = Circuit(mask, between(self.model, mask, edges), 1.0, 0.0, math.inf)
        run, ready = self._runner(circuit)
        n_prompts = sum(2 * len(part) for part in self.batches)
        ask = 0  # after how many prompts to look at the loss
        writes = []
        margin = []
        seen = 0
        for part, known in zip(self.batches, self.writes):
            written, logits = run(part, known)
            writes.append(written)
            margin.append(margin_of(logits, part))
            seen += 2 * len(part)
            self.pairs_run += len(part)
            if seen < min(ask, n_prompts):
                continue
            ask = 2 * seen  # calibrating, too, takes time

            # no prompt has a negative loss, so those seen bound the loss of all from below
            so_far = torch.cat(margin)
            circuit.scale, circuit.shift = calibrate(so_far)
            loss = loss_of(calibrated(so_far, circuit.scale, circuit.shift))
            if loss * seen / n_prompts > CLEARLY_ABOVE * target:
                break

        if self.varied is not None and seen == n_prompts and loss <= target:
            # of a quarter of the pairs: live.py does not serve here
            loss = max(loss, self.varied.worst(circuit, self.quarter))
        if seen == n_prompts and loss <= target:
            circuit.loss = loss
        self.trial = circuit, ready, writes
        return circuit

    def _runner(self, circuit: Circuit) -> tuple[Callable, Ready | None]:
        """A function from pairs, and what sublayers are known to write for them, to what they write
        and the last tokens' logits."""
        if self.live is not None:
            ready = self.live.prepare(circuit.mask, circuit.edges, self.ready)
            return partial(self.live.run, ready), ready
        reduced = without_edges(self.model, circuit, self.constants)
        nodes = ablate(circuit.mask, self.constants)

        def run(pairs: Pairs, known: list) -> tuple[list, Tensor]:
            return known, last_logits(reduced, pairs, nodes)
        return run, None

    def accept(self) -> Circuit:
        """The circuit fitted last, on all pairs, is what the next ones start from."""
        self.accepted, self.ready, self.writes = self.trial
        return self.accepted

    def start_from(self, mask: Nodes, edges: Edges) -> Circuit:
        """Fit a circuit and accept it, whatever its loss: the next ones start from it."""
        self.fit(mask, edges)
        return self.accept()

    def fit_without(self, circuit: Circuit, parts: Iterable[tuple],
                    target: float = math.inf) -> Circuit:
        """`fit` of a circuit less some of its `parts_of`."""
        return self.fit(*without(circuit, *parts, tie_qk=self.tie_qk), target)

    def meets(self, circuit: Circuit, target: float, necessity: float) -> bool:
        """Whether a circuit is as good as asked on its own, and missed as much as asked."""
        if not circuit.loss <= target:
            return False
        return necessity == 0 or self.is_needed(circuit.mask, necessity)

    def fewest(self, fitted: Callable[[int], Circuit], low: int, high: int, best: Circuit,
               target: float, necessity: float) -> Circuit:
        """Of the circuits `fitted(n)`, low < n <= high, the one with the fewest parts n that
        `meets` what is asked, by bisection. best: that of `high`, which does."""
        while high - low > 1:
            middle = (low + high) // 2
            trial = fitted(middle)
            if self.meets(trial, target, necessity):
                high = middle
                best = trial
            else:
                low = middle
        return best

    def is_needed(self, mask: Nodes, necessity: float) -> bool:
        """Whether `loss_without` is at least `necessity` nats. No prompt has a negative loss, so it
        is known as soon as those seen have that much between them."""
        total = 0.0
        for nats in self._nats_without(mask):
            total += nats
            if total >= necessity * self.n_pairs:
                return True
        return False

    def loss_without(self, mask: Nodes) -> float:
        """Nats of the whole model with only the nodes of `mask` ablated: necessity (paper 2.2)."""
        return sum(self._nats_without(mask)) / self.n_pairs

    def _nats_without(self, mask: Nodes) -> Iterator[float]:
        """Of each batch in turn: that loss, times the batch's pairs."""
        nodes = inverse(mask, self.constants)
        for part in self.batches:
            yield loss_of(margins(self.whole, part, nodes)) * len(part)


# --- the parts of a circuit ------------------------------------------------------------------

def parts_of(circuit: Circuit, tie_qk: bool = False) -> list[tuple]:
    """Every node (site, channel) and edge (from site, to site, its number among the nonzeros). With
    tie_qk a query channel and the key channel that it meets are one part, named by the query."""
    parts = []
    for site, kept in circuit.mask.items():
        if tie_qk and site.endswith("attn.k"):  # a key that has lost its query is a part by itself
            kept = kept & ~circuit.mask[partner(site)]
        parts += [(site, i) for i in kept.nonzero().flatten().tolist()]
    for ends, kept in circuit.edges.items():
        parts += [(*ends, i) for i in kept.nonzero().flatten().tolist()]
    return parts


def partner(site: str) -> str:
    """The keys' site of a queries' site, and the other way round."""
    return site[:-1] + ("k" if site.endswith("q") else "q")


def without(circuit: Circuit, *parts: tuple, tie_qk: bool = False) -> tuple[Nodes, Edges]:
    """The nodes and edges of a circuit less some of `parts_of`."""
    mask = dict(circuit.mask)
    edges = dict(circuit.edges)
    for *name, i in parts:
        if len(name) == 2:
            gone = [(edges, tuple(name))]
        else:
            gone = [(mask, name[0])]
            if tie_qk and name[0].endswith("attn.q"):
                gone.append((mask, partner(name[0])))
        for chosen, key in gone:
            chosen[key] = chosen[key].clone()
            chosen[key][i] = False
    return mask, edges
