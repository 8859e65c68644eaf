"""Other ways to hold what is outside a circuit than at its mean, so that no lucky constant helps.

A circuit that meets its target at the means can fail where the rest of the model is not quite so
still. Each of VARIED lets it move in one way; measures.py measures a finished circuit by them, and
with --varied masks are learnt, and circuits made minimal, under all of them.

- `donated`: the values that nodes take in another prompt of the task (causal scrubbing).
- `awake`: a random half of the rest runs as in the model.
- `Stiff`: each norm divides by what it divides by in the unpruned model.
- `Varied`: the three of them in turn, for gates that learn; and the worst loss of a circuit.
"""
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from circuit import Circuit, Nodes, ablate, alone, held_at, twin, where_held, without_edges
from model import GPT, NodeFn, record
from tasks import (Pairs, calibrate, calibrated, fitting_batches, last_logits, losses_of_pairs,
                   margin_of, unembed_last)

VARIED = ("resample_task", "complement", "frozen_norms")
HALVES = 2  # of the rest awake, where a circuit is judged while it is made: a few must do


# --- values of another prompt -----------------------------------------------------------------

def donor_of(prompt: Tensor, donors: Pairs, generator: torch.Generator) -> int:
    """The row of a random prompt of `donors` that is another one than `prompt` (n,) and has n
    tokens; else as few more as there are, or the most."""
    n = len(prompt)
    lengths = donors.last + 1
    itself = (lengths == n) & (donors.ids[:, :n] == prompt[: donors.ids.shape[1]]).all(1)
    others = lengths.masked_fill(itself, 0)
    enough = others[others >= n]
    nearest = enough.min() if len(enough) else others.max()
    rows = (others == nearest).nonzero().flatten()
    return int(rows[torch.randint(len(rows), (1,), generator=generator)])


@torch.no_grad()
def donated(model: GPT, pairs: Pairs, donors: Pairs, sites: Iterable[str],
            generator: torch.Generator) -> Nodes:
    """What every node of `sites` is in one other prompt of the task, for each prompt of `pairs`,
    (2n, T, width), where nodes are held. The last token of a prompt stands against the last one of
    its donor, a random prompt of `donors` that is as long."""
    lengths = donors.last + 1
    rows = []
    for ids, last in zip(pairs.ids, pairs.last.tolist()):
        rows.append(donor_of(ids[: last + 1], donors, generator))
    rows = torch.tensor(rows, device=pairs.ids.device)
    seen = {}
    model.run(model.embed(donors.ids[rows]), nodes=record(seen))

    ahead = (lengths[rows] - 1 - pairs.last).unsqueeze(1)
    position = torch.arange(pairs.ids.shape[1], device=pairs.ids.device) + ahead
    position = position.clamp(0, donors.ids.shape[1] - 1).unsqueeze(-1)
    values = {}
    for site in sites:
        x = seen[held_at(site)]
        values[site] = x.gather(1, position.expand(-1, -1, x.shape[-1]))
    return values


def exchange(gates: Nodes, values: Nodes) -> NodeFn:
    """`ablate` with a value for each token, (2n, T, width), instead of constants."""
    def hold(site: str, x: Tensor) -> Tensor:
        return torch.lerp(values[site], x, gates[site].to(x.dtype))
    return where_held(gates, hold)


# --- half of the rest awake -------------------------------------------------------------------

def awake(kept: Tensor, generator: torch.Generator) -> Tensor:
    """Of what is not `kept` (bool) a random half besides, and all that is."""
    woken = torch.rand(kept.shape, generator=generator) < 0.5
    return kept | woken.to(kept.device)


def half_awake(circuit: Circuit, generator: torch.Generator) -> Circuit:
    """A circuit and a random half of all nodes and edges outside it."""
    mask = {site: awake(m, generator) for site, m in circuit.mask.items()}
    edges = {ends: awake(kept, generator) for ends, kept in circuit.edges.items()}
    return replace(circuit, mask=mask, edges=edges)


# --- norms that do not hear of the ablation ---------------------------------------------------

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


class Stiff:
    """A model whose norms divide by what they divide by in the whole model. RMSNorms only: a
    LayerNorm also subtracts."""

    def __init__(self, whole: GPT, reduced: GPT):
        """reduced: the model that a circuit runs in, which may lack edges."""
        self.whole = whole
        self.model = twin(reduced)
        self.told = {}  # site of the stream before a norm -> that norm
        for i, block in enumerate(self.model.transformer.h):
            block.ln_1 = FrozenNorm(block.ln_1)
            block.ln_2 = FrozenNorm(block.ln_2)
            self.told[f"{i}.resid_in"] = block.ln_1
            self.told[f"{i}.resid_mid"] = block.ln_2
        self.last = FrozenNorm(self.model.transformer.ln_f)
        self.model.transformer.ln_f = self.last

    def logits(self, pairs: Pairs, nodes: NodeFn) -> Tensor:
        """The last tokens' logits, (2n, vocab)."""
        def tell(site: str, x: Tensor) -> Tensor:
            if site in self.told:
                self.told[site].tell(x)
            return x

        with torch.no_grad():
            h = self.whole.run(self.whole.embed(pairs.ids), nodes=tell)
            # the last norm sees the last token alone: nothing else is unembedded
            rows = torch.arange(len(h), device=h.device)
            self.last.tell(h[rows, pairs.last].unsqueeze(1))
        h = self.model.run(self.model.embed(pairs.ids), nodes=nodes)
        return unembed_last(self.model, h, pairs)


# --- all of them ------------------------------------------------------------------------------

class Varied:
    """The ablations of VARIED that a model can have, of circuits of one task."""

    def __init__(self, model: GPT, whole: GPT, constants: Nodes, donors: Pairs):
        """model: what circuits run in; whole: the model that they are of, which is another where
        they stand alone. donors: prompts of the task, whose values are resampled."""
        self.model = model
        self.whole = whole
        self.constants = constants
        self.donors = donors
        self.kinds = VARIED
        if model.config.rms_norm:
            self.stiff = Stiff(whole, model)
        else:  # a LayerNorm cannot be told
            self.kinds = tuple(kind for kind in VARIED if kind != "frozen_norms")

    def logits(self, kind: str, generator: torch.Generator, pairs: Pairs, gates: Nodes) -> Tensor:
        """The last tokens' logits, (2n, vocab), where `gates` hold the rest as `kind` says; with a
        gradient by the gates."""
        if kind == "resample_task":
            values = donated(self.whole, pairs, self.donors, gates, generator)
            return last_logits(self.model, pairs, exchange(gates, values))
        if kind == "frozen_norms":
            return self.stiff.logits(pairs, ablate(gates, self.constants))
        gates = {site: torch.where(awake(g > 0, generator) & (g == 0), 1.0, g)
                 for site, g in gates.items()}
        return last_logits(self.model, pairs, ablate(gates, self.constants))

    def worst(self, circuit: Circuit, pairs: Pairs) -> float:
        """The highest loss of a circuit under any of the kinds, nats, as the card measures them."""
        return self.worst_losses(circuit, pairs).mean().item()

    @torch.no_grad()
    def worst_losses(self, circuit: Circuit, pairs: Pairs) -> Tensor:
        """The loss of each pair (n,), nats, under that of the kinds which is the worst for all of
        them together. The same draws each time, so that two circuits can be compared."""
        generator = torch.Generator().manual_seed(0)
        reduced = without_edges(self.model, circuit, self.constants)

        def resampled(part: Pairs) -> Tensor:
            values = donated(self.whole, part, self.donors, circuit.mask, generator)
            return last_logits(reduced, part, exchange(circuit.mask, values))

        runs = [resampled]
        if "frozen_norms" in self.kinds:
            nodes = ablate(circuit.mask, self.constants)
            runs.append(partial(Stiff(self.whole, reduced).logits, nodes=nodes))
        found = []
        for run in runs:
            # every node of every prompt is held in memory meanwhile
            parts = [margin_of(run(part), part) for part in fitting_batches(self.model, pairs)]
            margin = torch.cat(parts)
            found.append(losses_of_pairs(calibrated(margin, circuit.scale, circuit.shift)))

        halves = torch.zeros(len(pairs), device=pairs.ids.device)
        for _ in range(HALVES):
            margin = alone(self.model, half_awake(circuit, generator), self.constants)(pairs)
            scale, shift = calibrate(margin)  # anew: the rest that is awake does its part
            halves += losses_of_pairs(calibrated(margin, scale, shift)) / HALVES
        return max([*found, halves], key=torch.mean)
