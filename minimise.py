"""From a circuit that meets a target loss to one from which no single node or edge can go.

- `Search`: fits many circuits of one model to the same pairs, and does not repeat what stays the
  same from one to the next.
- `minimise`: leaves out nodes and edges, the cheapest first; its last round tries every one of them
  in vain, and is the certificate. The authors removed leftovers by hand (paper A.5).
- `parts_of`, `without`: the single nodes and edges of a circuit.
"""
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit import (Circuit, Edges, Nodes, ablate, cut_, cuttable, drop_unconnected, finish,
                     inverse)
from model import GPT
from tasks import Pairs, batches_of, calibrate, calibrated, loss_of, margin_of, margins

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

class LiveLinear(nn.Module):
    """Stands in for a linear map that reads `site`, most of whose channels are constants: only the
    live ones are multiplied, the others go to the bias."""

    def __init__(self, whole: nn.Linear, site: str):
        super().__init__()
        self.site = site
        # the same tensors, not copies: `cut_` changes them in place
        self.weight = whole.weight  # (out, in)
        self.bias = whole.bias      # (out,)

    def know(self, mask: Nodes, constants: Nodes) -> None:
        """Which inputs live, and what the others are."""
        self.live = mask[self.site].nonzero().flatten()
        self.still = constants[self.site].index_fill(0, self.live, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.weight @ self.still + self.bias
        return F.linear(x[..., self.live], self.weight[:, self.live], bias)


class Search:
    """Fits many circuits of one model to the same pairs, each a change of the last one accepted.

    Savings, none of which changes a result: a fit starts at the first sublayer in which it differs
    from the accepted circuit; it stops once the pairs seen so far, though none of the others cost
    anything, put the loss above the target; it multiplies only what is not constant, and skips a
    sublayer that writes only constants.
    """

    def __init__(self, model: GPT, constants: Nodes, pairs: Pairs, batch: int = 32):
        self.model = model
        self.constants = constants
        self.answers = (int(pairs.answer[0]), int(pairs.wrong[0]))
        by_length = pairs.last[::2].argsort()  # less padding in a batch
        self.batches = batches_of(pairs.take(by_length), batch)
        n_quarter = (len(pairs) + 3) // 4
        self.quarter = pairs.take(torch.arange(n_quarter, device=pairs.ids.device))

        # the copy of the model in which circuits run
        self.scratch = cuttable(model)
        for i, block in enumerate(self.scratch.transformer.h):
            block.attn.c_attn = LiveLinear(block.attn.c_attn, f"{i}.attn.act_in")
            block.mlp.c_fc = LiveLinear(block.mlp.c_fc, f"{i}.mlp.act_in")
            block.mlp.c_proj = LiveLinear(block.mlp.c_proj, f"{i}.mlp.post_act")
        self.linears = [m for m in self.scratch.modules() if isinstance(m, LiveLinear)]
        # a batch's streams before each sublayer in the accepted circuit, as far as they are known
        self.accepted: Circuit | None = None
        with torch.no_grad():
            self.streams = [[model.embed(part.ids)] for part in self.batches]

    @torch.no_grad()
    def fit(self, mask: Nodes, edges: Edges, target: float = math.inf) -> Circuit:
        """Drop the nodes without a path and calibrate (paper A.5). The circuit's loss, in nats, is
        inf where it is above `target` or not a number."""
        mask = drop_unconnected(self.model, mask, self.answers, edges)
        cut_(self.scratch, self.model, mask, edges, self.constants)
        still = self._use_constants(mask)
        start = self._first_difference(mask, edges)
        nodes = ablate(mask, self.constants)
        n_prompts = sum(2 * len(part) for part in self.batches)
        streams = []
        margin = []
        for part, known in zip(self.batches, self.streams):
            chain = known[: start + 1]
            for i, sublayer in enumerate(self.scratch.sublayers[start:-1], start):
                h = chain[-1]
                chain.append(h + still[i] if i in still else sublayer(h, nodes))
            streams.append(chain)
            margin.append(margin_of(finish(self.scratch, chain[-1], part, nodes), part))

            # no prompt has a negative loss, so those seen bound the loss of all from below
            seen = torch.cat(margin)
            scale, shift = calibrate(seen)
            loss = loss_of(calibrated(seen, scale, shift))
            if loss * len(seen) / n_prompts > CLEARLY_ABOVE * target:
                break

        if len(seen) < n_prompts or not loss <= target:
            loss = math.inf
        circuit = Circuit(mask, edges, scale, shift, loss)
        self.trial = circuit, streams
        return circuit

    def accept(self) -> Circuit:
        """The circuit fitted last is what the next ones start from."""
        self.accepted, self.streams = self.trial
        return self.accepted

    def loss_without(self, mask: Nodes) -> float:
        """Nats of the whole model with only the nodes of `mask` ablated: necessity (paper 2.2)."""
        nodes = inverse(mask, self.constants)
        total = 0.0
        for part in self.batches:
            total += loss_of(margins(self.model, part, nodes)) * len(part)
        return total / sum(len(part) for part in self.batches)

    def _use_constants(self, mask: Nodes) -> dict[int, Tensor]:
        """Tell the linear maps which inputs live. Returns what a sublayer, by its number, adds to
        the stream, (d_model,), where that is constants alone."""
        for linear in self.linears:
            linear.know(mask, self.constants)
        c = self.model.config
        if c.residual_activation_type != "identity" or "resid" in c.afrac_loctypes:
            return {}  # the stream is no plain sum: something acts on it after each addition
        writes = [site for site in self.model.sites if site.endswith("resid_delta")]
        return {i: self.constants[site] for i, site in enumerate(writes) if not mask[site].any()}

    def _first_difference(self, mask: Nodes, edges: Edges) -> int:
        """The first sublayer that computes something else than in the accepted circuit."""
        if self.accepted is None:
            return 0
        old = self.accepted
        changed = [site for site in mask if not torch.equal(mask[site], old.mask[site])]
        for (a, b), kept in edges.items():
            # most are the very same tensor, and need not be looked at
            if kept is not old.edges[a, b] and not torch.equal(kept, old.edges[a, b]):
                changed.append(b)
        numbers = [2 * int(site.split(".")[0]) + (".mlp." in site) for site in changed]
        return min(numbers, default=len(self.model.sublayers))


# --- the parts of a circuit ------------------------------------------------------------------

def parts_of(circuit: Circuit) -> list[tuple]:
    """Every node (site, channel) and edge (from site, to site, to channel, from channel)."""
    parts = []
    for site, kept in circuit.mask.items():
        parts += [(site, channel) for channel in kept.nonzero().flatten().tolist()]
    for (a, b), kept in circuit.edges.items():
        inner = kept & circuit.mask[b][:, None] & circuit.mask[a]
        parts += [(a, b, i, j) for i, j in inner.nonzero().tolist()]
    return parts


def without(circuit: Circuit, *parts: tuple) -> tuple[Nodes, Edges]:
    """The nodes and edges of a circuit less some nodes and edges."""
    mask = dict(circuit.mask)
    edges = dict(circuit.edges)
    for part in parts:
        if len(part) == 2:
            site, channel = part
            mask[site] = mask[site].clone()
            mask[site][channel] = False
        else:
            a, b, i, j = part
            edges[a, b] = edges[a, b].clone()
            edges[a, b][i, j] = False
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
    clock = time.time()
    queue = []  # (price, its number, part), cheapest first; the number decides between equals
    for number, part in enumerate(parts_of(before)):
        trial = pricer.fit(*without(before, part), target)
        price = price_of(trial, pricer.accepted)
        if math.isfinite(price):
            queue.append((price, number, part))
    say(f"  {before.size[0]} nodes, {before.size[1]} edges: {len(queue)} of these can go "
        f"({time.time() - clock:.0f} s)")

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
