"""From a ranking of the nodes to the smallest circuit that still meets a target loss.

- `Search`: fits many circuits of one model to the same pairs, and does not repeat what stays the same.
- `discretise`: bisect for the fewest leading nodes of the ranking that meet the target (paper A.5).
- `minimise`: then leave out single nodes and edges until none can go, and certify it.
"""
import itertools
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from circuit import (Circuit, Edges, Nodes, ablate, all_edges, batches_of, calibrate, calibrated, cut_, cuttable, drop_unconnected,
                     finish, inverse, loss_of, margin_of, margins)
from model import GPT
from tasks import Pairs


class LiveLinear(nn.Linear):
    """A linear map most of whose inputs are constants: only the `live` ones are multiplied, the others go to the bias."""
    live: Tensor | None = None  # indices of inputs; None = all
    constant: Tensor            # (in_features,)

    def forward(self, x: Tensor) -> Tensor:
        if self.live is None:
            return super().forward(x)
        still = self.constant.index_fill(0, self.live, 0.0)
        return F.linear(x[..., self.live], self.weight[:, self.live], self.weight @ still + self.bias)


class Search:
    """Fits many circuits of one model to the same pairs, each a change of the last one accepted.

    Savings, none of which changes a result: a fit starts at the first sublayer in which it differs from
    the accepted circuit; it stops once the pairs seen so far, though none of the others cost anything, put
    the loss above the target; it multiplies only what is not constant, and skips a sublayer that writes
    only constants.
    """

    def __init__(self, model: GPT, constants: Nodes, pairs: Pairs, batch: int = 32):
        self.model, self.scratch, self.constants = model, cuttable(model), constants
        self.answers = (int(pairs.answer[0]), int(pairs.wrong[0]))
        self.batches = batches_of(pairs.take(pairs.last[::2].argsort()), batch)  # by length: less padding
        self.quarter = pairs.take(torch.arange((len(pairs) + 3) // 4, device=pairs.ids.device))
        for block in self.scratch.transformer.h:
            for module in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj):
                module.__class__ = LiveLinear
        self.accepted = None
        with torch.no_grad():
            self.streams = [[model.embed(part.ids)] for part in self.batches]  # the streams before each sublayer

    @torch.no_grad()
    def fit(self, mask: Nodes, edges: Edges, target: float = math.inf) -> Circuit:
        """Drop the nodes without a path, calibrate; the loss is inf where it is above `target`."""
        mask = drop_unconnected(self.model, mask, self.answers, edges)
        start = self._first_difference(mask, edges)
        cut_(self.scratch, self.model, mask, edges, self.constants)
        still = self._use_constants(mask)
        fn, margin, streams = ablate(mask, self.constants), [], []
        n = sum(2 * len(part) for part in self.batches)
        for part, known in zip(self.batches, self.streams):
            chain = known[: start + 1]
            for i, f in enumerate(self.scratch.sublayers[start:-1], start):
                chain.append(f(chain[-1], fn) if i not in still else chain[-1] + still[i])
            streams.append(chain)
            margin.append(margin_of(finish(self.scratch, chain[-1], part, fn), part))
            seen = torch.cat(margin)
            scale, shift = calibrate(seen)
            loss = loss_of(calibrated(seen, scale, shift))
            if loss * len(seen) / n > 1.01 * target:
                break
        circuit = Circuit(mask, edges, scale, shift, loss if len(seen) == n and loss <= target else math.inf)
        self.trial = circuit, streams
        return circuit

    def accept(self) -> Circuit:
        """The circuit fitted last is what the next ones start from."""
        self.accepted, self.streams = self.trial
        return self.accepted

    def loss_without(self, mask: Nodes) -> float:
        """Nats of the whole model with only the nodes of `mask` ablated."""
        without_them = inverse(mask, self.constants)
        return sum(loss_of(margins(self.model, part, without_them)) * len(part) for part in self.batches) / sum(map(len, self.batches))

    def _use_constants(self, mask: Nodes) -> dict[int, Tensor]:
        """Tell the linear maps which inputs live; return what the sublayers write that write constants."""
        still, c = {}, self.model.config
        for i, block in enumerate(self.scratch.transformer.h):
            for site, module in ((f"{i}.attn.act_in", block.attn.c_attn), (f"{i}.mlp.act_in", block.mlp.c_fc),
                                 (f"{i}.mlp.post_act", block.mlp.c_proj)):
                module.live, module.constant = mask[site].nonzero().flatten(), self.constants[site]
            for j, site in ((2 * i, f"{i}.attn.resid_delta"), (2 * i + 1, f"{i}.mlp.resid_delta")):
                if not mask[site].any() and c.residual_activation_type == "identity" and "resid" not in c.afrac_loctypes:
                    still[j] = self.constants[site]
        return still

    def _first_difference(self, mask, edges) -> int:
        if self.accepted is None:
            return 0
        old = self.accepted
        same = {s: bool((mask[s] == old.mask[s]).all()) for s in mask}
        for (a, b), kept in edges.items():
            same[b] &= kept is old.edges[a, b] or bool((kept == old.edges[a, b]).all())
        return min((2 * int(s.split(".")[0]) + (".mlp." in s) for s in mask if not same[s]), default=len(self.model.sublayers))


def discretise(search: Search, order: Tensor, n_open: int, target: float) -> Circuit:
    """The fewest leading nodes of `order` that meet `target` once calibrated, by bisection from above.

    It starts from the `n_open` nodes whose gate is open, and from all nodes only where those do not
    do: the loss is not monotone in the number of nodes, and between the two it can be worse.
    Calibration is part of the test (the paper fits it afterwards), because the calibrated loss is
    the one that is reported. Where not even all nodes meet it, the open gates, whose loss then passes it.
    """
    edges, widths = all_edges(search.model), {s: search.model.config.site_width(s) for s in search.model.sites}

    def leading(k, target=target):
        flat = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        flat[order[:k]] = True
        return search.fit(dict(zip(widths, flat.split(list(widths.values())))), edges, target)

    low, high = 0, n_open
    best = leading(high)
    if not best.loss <= target:
        low, high = n_open, len(order)
        best = leading(high)
    if not best.loss <= target:
        return leading(n_open, math.inf)
    while high - low > 1:  # `high` meets the target, always
        middle = (low + high) // 2
        trial = leading(middle)
        if trial.loss <= target:
            high, best = middle, trial
        else:
            low = middle
    return best


def parts_of(circuit: Circuit) -> list[tuple]:
    """Every node (site, channel) and edge (from site, to site, to channel, from channel) of a circuit."""
    nodes = [(s, c) for s, m in circuit.mask.items() for c in m.nonzero().flatten().tolist()]
    return nodes + [(a, b, i, j) for (a, b), kept in circuit.edges.items()
                    for i, j in (kept & circuit.mask[b][:, None] & circuit.mask[a]).nonzero().tolist()]


def has(circuit: Circuit, part: tuple) -> bool:
    if len(part) == 2:
        return bool(circuit.mask[part[0]][part[1]])
    a, b, i, j = part
    return bool(circuit.edges[a, b][i, j] & circuit.mask[b][i] & circuit.mask[a][j])


def without(circuit: Circuit, *parts: tuple) -> tuple[Nodes, Edges]:
    """The nodes and edges of a circuit less some nodes and edges."""
    mask, edges = dict(circuit.mask), dict(circuit.edges)
    for part in parts:
        kind, key, at = (mask, part[0], part[1]) if len(part) == 2 else (edges, part[:2], part[2:])
        kind[key] = kind[key].clone()
        kind[key][at] = False
    return mask, edges


def minimise(search: Search, circuit: Circuit, target: float, say=print, necessity: float = 0.0) -> Circuit:
    """Leave out nodes and edges until no single one can go without the loss passing `target`.

    With `necessity` (nats), no node goes either without which the model could do with less than that when it
    loses the circuit: where a model has two mechanisms for a task, one of them alone may meet the target.

    Lazily greedy: of all parts, those that cost the least loss per edge that goes with them, several at a
    time while that costs what it promised. Prices are first asked of a quarter of the pairs; the last round
    tries every part on all pairs in vain, and is the certificate. The authors did this by hand (paper A.5).
    """
    def price(trial, before) -> float:
        """Nats per edge; what lowers the loss comes first; inf where the target is passed."""
        rise, edges = trial.loss - before.loss, max(0.5, before.size[1] - trial.size[1])
        return rise / edges if rise > 0 else rise * edges

    def needed(trial) -> bool:
        return necessity == 0 or trial.size[0] == circuit.size[0] or search.loss_without(trial.mask) >= necessity

    for asked in itertools.chain([Search(search.model, search.constants, search.quarter)], itertools.repeat(search)):
        for s in (search, asked):
            s.fit(circuit.mask, circuit.edges)
            s.accept()
        clock, queue = time.time(), []
        for n, part in enumerate(parts_of(circuit)):
            if math.isfinite(p := price(asked.fit(*without(circuit, part), target), asked.accepted)):
                queue.append((p, n, part))
        say(f"  {circuit.size[0]} nodes, {circuit.size[1]} edges: {len(queue)} of these can go ({time.time() - clock:.0f} s)")
        circuit, most = search.accepted, len(queue)
        before = circuit
        while queue:
            queue = sorted(entry for entry in queue if has(circuit, entry[2]))
            if not queue:
                break
            n = max(1, min(most, len(queue) // 8))
            few, queue = queue[:n], queue[n:]
            trial = search.fit(*without(circuit, *(part for _, _, part in few)), target)
            p = price(trial, circuit)
            if p <= 1e-4 + 1.5 * max(0.0, few[-1][0], queue[0][0] if queue and len(few) == 1 else 0.0):
                if needed(trial):
                    circuit, most = search.accept(), 2 * most
                    continue
                p = math.inf
            if len(few) > 1:
                queue, most = few + queue, len(few) // 2
            elif math.isfinite(p):
                queue.append((p, *few[0][1:]))  # dearer by now than the next one was
        if asked is search and circuit is before:
            return circuit
