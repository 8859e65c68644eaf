"""From a circuit that meets a target loss to one from which no single node or edge can go.

- `Search`: fits many circuits of one model to the same pairs, and does not repeat what stays the
  same from one to the next.
- `minimise`: leaves out nodes and edges, the cheapest first; its last round tries every one of them
  in vain, and is the certificate. The authors removed leftovers by hand (paper A.5).
- `parts_of`, `without`: the single nodes and edges of a circuit.
"""
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from circuit import (Circuit, Edges, Nodes, ablate, between, drop_unconnected, inverse,
                     without_edges)
from live import Live, Ready, serves
from model import GPT
from tasks import (Pairs, answer_ids, batches_of, calibrate, calibrated, last_logits, loss_of,
                   margin_of, margins)

# A fit gives up only this far past its target: sixteen steps of L-BFGS end a little above the best
# calibration, so that the loss of the pairs seen so far is a lower bound only to about 1%.
CLEARLY_ABOVE = 1.01
LEAST_EDGES = 0.5  # what goes without any edge is priced as if half an edge had gone with it
NOISE = 1e-4       # nats per edge: so small a rise is within what calibration leaves undone
# What goes may cost this many times what was promised: prices rise as the circuit gets smaller, and
# asking for all of them again after each step would take longer than a poorer order is worth.
PATIENCE = 1.5
# At most one in so many parts goes at once, so that the dear ones among the rest are asked again in
# a circuit that is not far from the one in which they were priced.
AT_ONCE = 8


# --- fitting many circuits to the same pairs -------------------------------------------------

class Search:
    """Fits many circuits of one model to the same pairs, each a change of the last one accepted.

    Savings, none of which changes a result: a fit stops once the pairs seen so far, though none of
    the others cost anything, put the loss above the target; and live.py computes only what is not
    constant, from the first sublayer on that differs from the accepted circuit.
    """

    def __init__(self, model: GPT, constants: Nodes, pairs: Pairs, batch: int = 32):
        self.model = model
        self.constants = constants
        self.answers = answer_ids(pairs)
        by_length = pairs.last[::2].argsort()  # less padding in a batch
        self.batches = batches_of(pairs.take(by_length), batch)
        n_quarter = (len(pairs) + 3) // 4
        self.quarter = pairs.take(torch.arange(n_quarter, device=pairs.ids.device))

        with torch.no_grad():
            self.live = Live(model, constants, pairs) if serves(model) else None
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
            if seen < min(ask, n_prompts):
                continue
            ask = 2 * seen  # calibrating, too, takes time

            # no prompt has a negative loss, so those seen bound the loss of all from below
            so_far = torch.cat(margin)
            circuit.scale, circuit.shift = calibrate(so_far)
            loss = loss_of(calibrated(so_far, circuit.scale, circuit.shift))
            if loss * seen / n_prompts > CLEARLY_ABOVE * target:
                break

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
        """The circuit fitted last is what the next ones start from."""
        self.accepted, self.ready, self.writes = self.trial
        return self.accepted

    def loss_without(self, mask: Nodes) -> float:
        """Nats of the whole model with only the nodes of `mask` ablated: necessity (paper 2.2)."""
        nodes = inverse(mask, self.constants)
        total = 0.0
        for part in self.batches:
            total += loss_of(margins(self.model, part, nodes)) * len(part)
        return total / sum(len(part) for part in self.batches)


# --- the parts of a circuit ------------------------------------------------------------------

def parts_of(circuit: Circuit) -> list[tuple]:
    """Every node (site, channel) and edge (from site, to site, its number among the nonzeros)."""
    parts = []
    for chosen in (circuit.mask, circuit.edges):
        for key, kept in chosen.items():
            name = (key,) if isinstance(key, str) else key
            parts += [(*name, i) for i in kept.nonzero().flatten().tolist()]
    return parts


def without(circuit: Circuit, *parts: tuple) -> tuple[Nodes, Edges]:
    """The nodes and edges of a circuit less some nodes and edges."""
    mask = dict(circuit.mask)
    edges = dict(circuit.edges)
    for *name, i in parts:
        chosen, key = (mask, name[0]) if len(name) == 1 else (edges, tuple(name))
        chosen[key] = chosen[key].clone()
        chosen[key][i] = False
    return mask, edges


# --- leaving out what is not needed ----------------------------------------------------------

def minimise(search: Search, circuit: Circuit, target: float, say=print,
             necessity: float = 0.0) -> Circuit:
    """Leave out nodes and edges until none can go alone without the loss (nats) passing `target`.

    With `necessity` (nats), no node goes either without which the model could do with less than
    that when it loses the circuit: where a model has two mechanisms for a task, one of them alone
    may meet the target.
    """
    # First pass. A quarter of the pairs gives rough prices in a quarter of the time; what goes is
    # decided on all pairs nonetheless.
    rough = Search(search.model, search.constants, search.quarter)
    for s in (search, rough):
        s.fit(circuit.mask, circuit.edges)
        s.accept()
    leave_out(search, rough, target, say, necessity)

    # Second pass. Prices from all pairs, until a round leaves nothing out: then every part was
    # tried, and each alone is needed. That round is the certificate.
    while leave_out(search, search, target, say, necessity):
        pass
    return search.accepted


def leave_out(search: Search, pricer: Search, target: float, say, necessity: float) -> bool:
    """Ask `pricer` for the price of each part of the accepted circuit, then leave out what can go.

    Lazily greedy: the cheapest first, several at a time while they cost what they promised. The
    accepted circuit of `search` is then the smaller one. Returns whether anything went.
    """
    before = search.accepted
    clock = time.monotonic()
    queue = []  # (price, its number, part), cheapest first; the number decides between equals
    for number, part in enumerate(parts_of(before)):
        trial = pricer.fit(*without(before, part), target)
        price = price_of(trial, pricer.accepted)
        if math.isfinite(price):
            queue.append((price, number, part))
    say(f"  {before.size[0]} nodes, {before.size[1]} edges: {len(queue)} of these can go "
        f"({time.monotonic() - clock:.0f} s)")

    circuit = before
    most = len(queue)  # so many at once: doubled where that went well, halved where not
    while True:
        # a node takes its edges with it, and an edge the nodes that then have no path
        left = set(parts_of(circuit))
        queue = sorted(entry for entry in queue if entry[2] in left)
        if not queue:
            return circuit is not before
        n = max(1, min(most, len(queue) // AT_ONCE))
        few = queue[:n]
        queue = queue[n:]
        trial = search.fit(*without(circuit, *(part for _, _, part in few)), target)
        price = price_of(trial, circuit)

        # a single part may be dearer than it promised, so long as the next one is no cheaper
        promised = few[-1][0]
        if n == 1 and queue:
            promised = max(promised, queue[0][0])
        goes = price <= NOISE + PATIENCE * max(0.0, promised)
        # only a node can make a circuit less necessary: the model loses all its edges in any case
        if goes and necessity > 0 and trial.size[0] < circuit.size[0]:
            goes = search.loss_without(trial.mask) >= necessity
            price = price if goes else math.inf

        if goes:
            circuit = search.accept()
            most *= 2
        elif n > 1:  # one of them is to blame; fewer at once will tell which
            queue = few + queue
            most = n // 2
        elif math.isfinite(price):  # dearer by now than the next one was: its turn comes later
            queue.append((price, *few[0][1:]))


def price_of(trial: Circuit, before: Circuit) -> float:
    """Nats that a smaller circuit costs for each edge that goes; inf where it passed its target."""
    rise = trial.loss - before.loss
    edges = max(LEAST_EDGES, before.size[1] - trial.size[1])
    # what lowers the loss comes first, and the sooner the more edges go with it
    return rise / edges if rise > 0 else rise * edges
