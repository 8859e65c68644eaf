"""A circuit run on its live channels alone: the losses that circuit.py gives, many times sooner.

Live is what is in the circuit. All else is constant, and what is constant need not be computed for
each token of each prompt: of 2,048 channels a few dozen are left. search.py so fits hundreds of
circuits of one model. Nothing here is needed for a correct result, nor does it change one but for
rounding; a model that `serves` does not take is run as circuit.py does it.

- `Live(model, constants, pairs)`: `prepare` a circuit, then `run` it on pairs of these.
- `LiveRead`, `LiveMap`, `LiveAttention`, `LiveMLP`: the pieces of a sublayer.
- `Contest`: an AbsTopK that looks at no more constants than can be in question.

Between two sites a tensor is (live channels, B, T), for B prompts of T tokens.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from circuit import MAPS, Edges, Nodes, Wires, graph_of, sparse_matrix
from model import GPT, SITES
from ops import sink_attention, topk_mask
from tasks import Pairs


def serves(model: GPT) -> bool:
    """Whether the stream is a plain sum, read through norms that only scale it."""
    c = model.config
    plain = c.residual_activation_type == "identity" and "resid" not in c.afrac_loctypes
    return c.rms_norm and plain


class Contest:
    """An AbsTopK of n channels, of which v vary; the others are known for each kind of token.

    Of these others the k - v largest are kept whatever those v are, and what comes after the k-th
    is not. So v of them at most are in question: the rivals.
    """

    def __init__(self, still: Tensor, channels: Tensor, k: int):
        """still (kinds, n): what the others are; channels (v,): those that vary, ascending."""
        kinds, n = still.shape
        v = len(channels)
        device = still.device
        varies = torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, channels, True)
        others = (~varies).nonzero().flatten()  # (n - v,)
        of_others = still[:, others]
        certain = max(0, k - v)
        is_rival = torch.ones_like(of_others, dtype=torch.bool)
        if k < n - v:
            is_rival = topk_mask(of_others, k)
        if certain:
            is_rival = is_rival & ~topk_mask(of_others, certain)
        # as many of each kind, r
        values = of_others[is_rival].view(kinds, -1)
        rivals = others[is_rival.nonzero()[:, 1]].view(kinds, -1)  # their channels, ascending

        # Both together stand in the order of their channels, for by that ties are decided: each
        # behind those of its own that are before it, and as many of the other.
        r = rivals.shape[1]
        varying = channels.expand(kinds, -1).contiguous()
        self.place = torch.arange(v, device=device) + torch.searchsorted(rivals, varying)
        of_rivals = torch.arange(r, device=device) + torch.searchsorted(varying, rivals)
        self.table = still.new_zeros(kinds, v + r).scatter_(1, of_rivals, values)
        self.k = k - certain

    def __call__(self, x: Tensor, kind: Tensor | None = None,
                 scale: Tensor | None = None) -> Tensor:
        """Which of the channels that vary, (v, B, T), are kept. kind (B, T), or None where there is
        only one. scale (B, T): of the others."""
        B, T = x.shape[1:]
        if kind is None:
            table = self.table.expand(B, T, -1)
            place = self.place.expand(B, T, -1)
        else:
            table = self.table[kind] * scale.unsqueeze(-1)
            place = self.place[kind]
        seen = table.scatter(-1, place, x.permute(1, 2, 0))
        if self.k >= seen.shape[-1]:
            return torch.ones_like(x, dtype=torch.bool)
        return topk_mask(seen, self.k).gather(-1, place).permute(2, 0, 1)


class LiveRead:
    """What a sublayer reads of the stream, normed: its live channels.

    The stream is known for each kind of token, but where live channels were written.
    """

    def __init__(self, stream: Tensor, written: list[Tensor], live: Tensor, norm: nn.RMSNorm,
                 beside: Tensor | None, k: int | None):
        """stream (kinds, d_model): the sum of all that is constant. written (d_model,): the bool
        mask of what each sublayer before wrote. live (d_read,): bool, which channels are read.
        beside (T, d_pos): positions, normed, behind those of the stream. k: of the AbsTopK."""
        d = stream.shape[1]
        varies = torch.stack([live[:d], *written]).any(0)
        channels = varies.nonzero().flatten()
        place = varies.cumsum(0) - 1
        self.places = [place[mask] for mask in written]
        self.stream = stream[:, channels].T.contiguous()  # (v, kinds)
        self.rest = stream.masked_fill(varies, 0).square().sum(1)  # (kinds,)
        self.d = d
        self.gain = norm.weight[channels]
        self.eps = torch.finfo(stream.dtype).eps if norm.eps is None else norm.eps  # PyTorch's own
        self.beside = beside

        n = len(live)
        channels = torch.cat([channels, torch.arange(d, n, device=live.device)])
        self.live = live[channels].nonzero().flatten()
        self.contest = None
        if k is not None and k < n:
            self.contest = Contest(F.pad(stream * norm.weight, (0, n - d)), channels, k)

    def __call__(self, kind: Tensor, position: Tensor, writes: list[Tensor | None]) -> Tensor:
        """kind, position (B, T): of each token; writes: what each sublayer before wrote."""
        x = self.stream[:, kind]
        for place, y in zip(self.places, writes):
            if y is not None:
                x.index_add_(0, place, y)
        # every channel has a part in the norm
        scale = ((self.rest[kind] + x.square().sum(0)) / self.d + self.eps).rsqrt()
        x *= self.gain[:, None, None] * scale
        if self.beside is not None:
            x = torch.cat([x, self.beside.T[:, position]])
        lives = x[self.live]
        if self.contest is not None:
            kept = self.contest(x, kind, scale)
            lives = torch.where(kept[self.live], lives, 0)
        return lives


class LiveMap:
    """A linear map between two sites, and what acts on its outputs: from the inputs that are given
    to the live outputs."""

    def __init__(self, wires: Wires, chosen: Tensor, given: Tensor, live: Tensor, still: Tensor,
                 act: Callable | None, k: int | None):
        """chosen (n,), given (in,), live (out,): bool; chosen: the weights from what is given.
        still (out,): the outputs where that is all zero. act: the activation; k: of the AbsTopK, or
        None."""
        varies = live
        if k is not None:  # outputs that vary compete with the live ones
            varies = live.clone()
            varies[wires.to[chosen]] = True
        chosen = chosen & varies[wires.to]
        column = given.cumsum(0)[wires.source[chosen]] - 1
        row = varies.cumsum(0)[wires.to[chosen]] - 1
        shape = int(varies.sum()), int(given.sum())
        self.matrix = sparse_matrix(Wires(column, row, wires.weight[chosen]), shape)
        channels = varies.nonzero().flatten()
        self.still = still[channels, None, None]  # (v, 1, 1)
        self.live = live[channels].nonzero().flatten()
        self.act = act
        self.contest = None
        if k is not None and k < len(live):
            still = still.unsqueeze(0)  # one kind of token
            self.contest = Contest(still if act is None else act(still), channels, k)

    def __call__(self, x: Tensor) -> Tensor:
        y = (self.matrix @ x.flatten(1)).unflatten(1, x.shape[1:])
        y += self.still
        if self.act is not None:
            y = self.act(y)
        lives = y[self.live]
        if self.contest is not None:
            lives = torch.where(self.contest(y)[self.live], lives, 0)
        return lives


class LiveAttention:
    """Attention without the heads in which nothing is live."""

    def __init__(self, into: list[LiveMap | None], constants: list[Tensor], live: list[Tensor],
                 out: LiveMap, sink: Tensor | None, d_head: int):
        """into, constants, live: of queries, keys and values, of the heads that are left. into:
        None where all are constant; live: which are not. sink: (heads,)."""
        self.parts = list(zip(into, constants, live))
        self.values = live[-1]  # the others are held where they were gathered: `out` knows them
        self.out = out
        self.sink = sink
        self.d_head = d_head

    def __call__(self, x: Tensor) -> Tensor:
        qkv = []
        for into, constants, live in self.parts:
            part = constants[:, None, None].repeat(1, *x.shape[1:])
            if into is not None:
                part[live] = into(x)
            part = part.unflatten(0, (-1, self.d_head))
            qkv.append(part.permute(2, 0, 3, 1).contiguous())  # (B, heads, T, d_head)
        if self.sink is None:
            y = F.scaled_dot_product_attention(*qkv, is_causal=True)
        else:
            y = sink_attention(*qkv, self.sink)
        return self.out(y.permute(1, 3, 0, 2).flatten(0, 1)[self.values])


class LiveMLP:
    def __init__(self, into: LiveMap, out: LiveMap):
        self.into = into
        self.out = out

    def __call__(self, x: Tensor) -> Tensor:
        return self.out(self.into(x))


@dataclass
class Ready:
    """A circuit, prepared to be run; a sublayer that writes constants alone is None."""
    mask: Nodes
    edges: Edges
    reads: list[LiveRead | None]
    bodies: list[LiveAttention | LiveMLP | None]
    start: int  # the first sublayer that computes something else than in the circuit before


class Live:
    """Runs circuits of one model. Sublayer 2n is layer n's attention, 2n + 1 its MLP."""

    def __init__(self, model: GPT, constants: Nodes, pairs: Pairs):
        """constants: of all that is not live; pairs: those that will be run, whole or in parts."""
        self.model = model
        self.constants = constants
        self.wires = graph_of(model).wires
        c = model.config
        self.sites = []  # of each sublayer
        for i in range(c.n_layer):
            for part in ("attn", "mlp"):
                self.sites.append([f"{i}.{site}" for site in SITES if site.startswith(part)])

        # tokens of one kind have the same embedding: the same id and, where it matters, position
        wpe = model.transformer.wpe.weight
        T = pairs.ids.shape[1]
        self.placed = c.d_pos_emb is None and bool(wpe[:T].any())
        self.kinds = self.kind_of(pairs.ids).unique()
        self.embedded = model.transformer.wte.weight[self.kinds % c.vocab_size]  # (kinds, d_model)
        if self.placed:
            self.embedded = self.embedded + wpe[self.kinds // c.vocab_size]

        self.matrices = {}
        self.biases = {}
        for i, block in enumerate(model.transformer.h):
            for name, (a, targets) in MAPS.items():
                bias = block.get_submodule(name).bias
                for z, b in enumerate(targets):
                    ends = f"{i}.{a}", f"{i}.{b}"
                    shape = c.site_width(ends[1]), c.site_width(ends[0])
                    self.matrices[ends] = sparse_matrix(self.wires[ends], shape)
                    self.biases[ends] = 0 if bias is None else bias.chunk(len(targets))[z]

    def kind_of(self, ids: Tensor) -> Tensor:
        """A number for each kind of token (B, T)."""
        if not self.placed:
            return ids
        return ids + self.model.config.vocab_size * torch.arange(ids.shape[1], device=ids.device)

    # --- preparing a circuit -----------------------------------------------------------------

    def prepare(self, mask: Nodes, edges: Edges, old: Ready | None = None) -> Ready:
        """A circuit, every node of which has a path. What it shares with `old` is not made anew."""
        ready = Ready(mask, edges, [], [], len(self.sites) - 1)  # the last one is always run
        same_writes = old is not None
        for i, sites in enumerate(self.sites):
            same = old is not None and all(torch.equal(mask[s], old.mask[s]) for s in sites)
            same = same and all(torch.equal(edges[ends], old.edges[ends])
                                for ends in edges if ends[1] in sites)
            ready.bodies.append(old.bodies[i] if same else self._body(i, mask, edges))
            if not same:
                ready.start = min(ready.start, i)
            read, write = sites[0], sites[-1]
            if same_writes and torch.equal(mask[read], old.mask[read]) and old.reads[i] is not None:
                ready.reads.append(old.reads[i])
            else:
                ready.reads.append(self._read(i, mask) if ready.bodies[i] is not None else None)
            same_writes = same_writes and torch.equal(mask[write], old.mask[write])
        return ready

    def _body(self, i: int, mask: Nodes, edges: Edges) -> LiveAttention | LiveMLP | None:
        """From what sublayer i reads to what it writes."""
        read, *inner, write = self.sites[i]
        if not mask[write].any():
            return None
        if i % 2:
            return LiveMLP(self._map(read, inner[0], mask, edges),
                           self._map(inner[0], write, mask, edges))

        # a head without a value in the circuit writes a constant, wherever it looks
        c = self.model.config
        heads = mask[inner[2]].view(c.n_head, c.d_head).any(1)
        channels = heads.repeat_interleave(c.d_head)
        sinks = self.model.transformer.h[i // 2].attn.attn_imp
        return LiveAttention(
            into=[self._map(read, site, mask, edges) if mask[site].any() else None
                  for site in inner],
            constants=[self.constants[site][channels] for site in inner],
            live=[mask[site][channels] for site in inner],
            out=self._map(inner[2], write, mask, edges),
            sink=None if sinks is None else sinks.sink_logit[heads],
            d_head=c.d_head)

    def _map(self, a: str, b: str, mask: Nodes, edges: Edges) -> LiveMap:
        """The map from site a to site b, of whose inputs those of the circuit vary."""
        given = mask[a]
        wires = self.wires[a, b]
        cut = given[wires.source] & mask[b][wires.to] & ~edges[a, b]
        constants = self.constants[a]
        still = self.matrices[a, b] @ constants.masked_fill(given, 0) + self.biases[a, b]
        brought = wires.weight[cut] * constants[wires.source[cut]]
        still = still.index_add(0, wires.to[cut], brought)
        layer, place = b.split(".", 1)
        act = self.model.transformer.h[int(layer)].mlp.act if place == "mlp.post_act" else None
        return LiveMap(wires, given[wires.source] & ~cut, given, mask[b], still, act, self._k(b))

    def _k(self, site: str) -> int | None:
        """Of the site's AbsTopK, where it has one."""
        layer, place = site.split(".", 1)
        if SITES[place] not in self.model.transformer.h[int(layer)].topk_at:
            return None
        return int(self.model.config.afrac * self.model.config.site_width(site))

    def _read(self, i: int, mask: Nodes) -> LiveRead:
        block = self.model.transformer.h[i // 2]
        norm = block.ln_2 if i % 2 else block.ln_1
        site = self.sites[i][0]
        written = [sites[-1] for sites in self.sites[:i]]
        beside = None
        if self.model.config.d_pos_emb is not None:
            beside = (block.ln_p2 if i % 2 else block.ln_p1)(self.model.transformer.wpe.weight)
        return LiveRead(self.embedded + self._constants(written, mask), [mask[s] for s in written],
                        mask[site], norm, beside, self._k(site))

    def _constants(self, written: list[str], mask: Nodes) -> Tensor:
        """The sum of what is constant of these writes, (d_model,)."""
        still = torch.zeros_like(self.embedded[0])
        for site in written:
            still = still + self.constants[site].masked_fill(mask[site], 0)
        return still

    # --- running it ----------------------------------------------------------------------------

    def run(self, ready: Ready, pairs: Pairs, known: list) -> tuple[list[Tensor | None], Tensor]:
        """What each sublayer writes, of which those before `ready.start` are known, and the logits
        at the last tokens, (2n, vocab)."""
        kind = torch.searchsorted(self.kinds, self.kind_of(pairs.ids))
        position = torch.arange(kind.shape[1], device=kind.device).expand_as(kind)
        rows = torch.arange(len(kind), device=kind.device)

        def written_by(i: int, kind: Tensor, position: Tensor, before: list) -> Tensor | None:
            if ready.bodies[i] is None:
                return None
            return ready.bodies[i](ready.reads[i](kind, position, before))

        last = len(self.sites) - 1
        writes = list(known[: ready.start])  # never that of the last sublayer
        for i in range(ready.start, last):
            writes.append(written_by(i, kind, position, writes))
        # The last is an MLP, which looks at no other token: the last token of each prompt will do.
        kind = kind[rows, pairs.last].unsqueeze(1)
        at_last = [None if y is None else y[:, rows, pairs.last, None] for y in writes]
        at_last.append(written_by(last, kind, pairs.last.unsqueeze(1), at_last))
        writes.append(at_last[-1])

        written = [sites[-1] for sites in self.sites]
        h = self.embedded[kind[:, 0]] + self._constants(written, ready.mask)  # (2n, d_model)
        for site, y in zip(written, at_last):
            if y is not None:
                h[:, ready.mask[site]] += y[:, :, 0].T
        ids = pairs.ids[rows, pairs.last].unsqueeze(1)
        return writes, self.model.unembed(h.unsqueeze(1), ids).squeeze(1)
