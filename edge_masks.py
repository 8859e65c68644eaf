"""Which edges of a large circuit a task needs: a gate per edge, learnt as those of nodes are.

Node masks leave a sparse model's circuit with few edges, to be tried one by one (minimise.py). In a
dense model, or where a model is to do what it never learnt, some hundred nodes have tens of
thousands of edges between them. `leave_out_by_masks` learns which of them are needed, all at once,
with the defaults of `MaskConfig` and at the means alone, whatever the nodes were learnt with.

The paper counts edges, and has masks over nodes alone; this is an extension of ours.
"""
import torch
import torch.nn as nn
from torch import Tensor

from circuit import (MAPS, Circuit, Edges, Nodes, Wires, ablate, between, drop_unconnected, of_map,
                     run_to_last, without_edges)
from masks import MaskConfig, learn_gates
from model import GPT
from search import Search
from tasks import Pairs


class Gated(nn.Module):
    """A linear map, some of whose weights have gates: shut, a weight contributes weight * constant,
    as `circuit.Cut` has it."""

    def __init__(self, whole: nn.Module, wires: Wires, constants: Tensor):
        """wires: the weights that have gates; constants: those of the site that is read, (in,)."""
        super().__init__()
        self.whole = whole
        # of the rows and columns that have any
        self.source, self.column = wires.source.unique(return_inverse=True)
        self.to, self.row = wires.to.unique(return_inverse=True)
        self.weight = wires.weight
        self.constants = constants[self.source]
        self.gate = torch.ones_like(wires.weight)

    def forward(self, x: Tensor) -> Tensor:
        shut = self.weight * (1 - self.gate)
        matrix = shut.new_zeros(len(self.to), len(self.source))
        matrix = matrix.index_put((self.row, self.column), shut)
        away = x[..., self.source] - self.constants
        return self.whole(x).index_add(-1, self.to, away @ -matrix.T)


class EdgeGates:
    """One tau per edge of a circuit, as `masks.Gates` has one per node."""

    def __init__(self, model: GPT, circuit: Circuit, constants: Nodes):
        self.model = model
        self.mask = circuit.mask
        self.constants = constants
        self.widths = {site: model.config.site_width(site) for site in model.sites}
        self.edges = circuit.edges
        self.sizes = [int(kept.sum()) for kept in circuit.edges.values()]
        self.n_parameters = sum(self.sizes)
        self.index = torch.arange(self.n_parameters, device=model.lm_head.weight.device)
        self.reduced = without_edges(model, circuit, constants)
        self.maps = []  # (the ends of its edges, the map)
        for i, block in enumerate(self.reduced.transformer.h):
            for name in MAPS:
                ends, wires = of_map(model, i, name, circuit.edges)
                gated = Gated(block.get_submodule(name), wires, constants[ends[0][0]])
                block.set_submodule(name, gated)
                self.maps.append((ends, gated))

    def split(self, flat: Tensor) -> Edges:
        """A value per edge of the circuit (n_edges,) -> per pair of sites."""
        return dict(zip(self.edges, flat.split(self.sizes)))

    def together(self, flat: Tensor) -> Tensor:
        """A value per edge -> per gate: each has one."""
        return flat

    def opened(self, flat: Tensor) -> Edges:
        """Which edges are open (n_edges,), bool -> the `Edges` of a circuit that has these."""
        found = {}
        for ends, values in self.split(flat).items():
            found[ends] = self.edges[ends].clone()
            found[ends][self.edges[ends]] = values
        return found

    def on_path(self, opened: Tensor, answers: list[int]) -> Tensor:
        """Which of the open edges (n_edges,) lie on a path from tokens to answers, bool."""
        edges = self.opened(opened)
        mask = drop_unconnected(self.model, self.mask, answers, edges)
        edges = between(self.model, mask, edges)
        return torch.cat([edges[ends][kept] for ends, kept in self.edges.items()])

    def run(self, pairs: Pairs, gates: Edges) -> Tensor:
        """The last tokens' logits, (2n, vocab), of the circuit as far as its edges' gates are open.
        Nodes outside it are held; those that have lost all their edges are what is left of them."""
        for ends, gated in self.maps:
            gated.gate = torch.cat([gates[pair] for pair in ends])
        nodes = ablate(self.mask, self.constants)
        return run_to_last(self.reduced, pairs, nodes)


def leave_out_by_masks(search: Search, circuit: Circuit, target: float, necessity: float,
                       say=print) -> Circuit:
    """A circuit with the fewest of its edges that still meets `target` (nats) and is missed as much
    as asked: learnt gates put them in order, and bisection says how many it takes. The circuit
    itself, where that finds nothing smaller."""
    cfg = MaskConfig(target_loss=(target,))
    gates = EdgeGates(search.model, circuit, search.constants)
    generator = torch.Generator().manual_seed(cfg.seed)
    tau = learn_gates({"mean": gates.run}, search.drawn_from, gates, cfg, generator, say)
    order = tau.argsort(descending=True, stable=True)

    def leading(n: int) -> Circuit:
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[:n]] = True
        return search.fit(circuit.mask, gates.opened(chosen), target)

    n_open = int((tau > 0).sum())
    opened = leading(n_open)
    if search.meets(opened, target, necessity):
        return search.fewest(leading, 0, n_open, opened, target, necessity)
    return search.fewest(leading, n_open, len(order), circuit, target, necessity)
