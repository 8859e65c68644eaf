"""What a circuit is: some nodes and edges of a model, and the model run on those alone.

- `ablate(gates, constants)`: a node function that holds the other nodes at constants (paper A.5); `inverse`: these nodes.
- `without_edges`: a model less some weights, whose mean contribution moves into the biases.
- `last_logits`, `margins`, `loss_of`, `calibrate`: the model on a task's pairs, and the loss there.
- `drop_unconnected`, `edges_of`, `count`: paths, edges and sizes (paper 2.2, Fig. 12).
- `Circuit`, `read_circuit`: one circuit, and one from its file.

How circuits are found is in prune.py, how far to trust them in validate.py.
"""
import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import nearest
from data.tinypython.tokenizer import load_tokenizer
from kernels import gated
from model import GPT
from tasks import Pairs

Nodes = dict[str, Tensor]  # site -> one value per channel: a bool mask, a gate or a mean
Edges = dict[tuple[str, str], Tensor]  # (from site, to site) -> bool (to channels, from channels): which weights are kept


@dataclass
class Circuit:
    """Nodes and edges, the calibration of the answer logits, and the loss (nats) on the pairs it was fitted to."""
    mask: Nodes
    edges: Edges
    scale: float
    shift: float
    loss: float
    before: tuple[int, int] | None = None  # its size before single parts were left out, if they were

    @property
    def size(self) -> tuple[int, int]:
        """Nodes and edges."""
        return count(self.mask), sum(int(kept[self.mask[b]][:, self.mask[a]].sum()) for (a, b), kept in self.edges.items())


# --- running a model with nodes replaced -----------------------------------------------------

def load(model: str, tokenizer: str, device: str = "cpu"):
    """A frozen model and a tokenizer, from their paths. ValueError or OSError where one is unusable or they do not match."""
    gpt, tokens = GPT.load(model, device).requires_grad_(False), load_tokenizer(tokenizer)
    if tokens.n_vocab != gpt.config.vocab_size:
        raise ValueError(f"{tokenizer} has {tokens.n_vocab} tokens, the model {model} has {gpt.config.vocab_size}; give --tokenizer=FILE")
    return gpt, tokens


def ablate(gates: Nodes, constants: Nodes):
    """A node function: gate * x + (1 - gate) * constant at every site that `gates` names (paper A.5)."""
    def fn(site: str, x: Tensor) -> Tensor:
        return gated(x, gates[site], constants[site]) if site in gates else x
    return fn


def inverse(mask: Nodes, constants: Nodes):
    """A node function that ablates the nodes of `mask` and no others (paper 2.2)."""
    return ablate({site: ~m for site, m in mask.items()}, constants)


def last_logits(model: GPT, pairs: Pairs, nodes=None) -> Tensor:
    """Logits (2n, vocab) at each prompt's last token; nothing else is unembedded."""
    return unembed_last(model, model.run(model.embed(pairs.ids), nodes=nodes), pairs)


def unembed_last(model: GPT, h: Tensor, pairs: Pairs) -> Tensor:
    """The final stream (2n, T, d_model) -> logits (2n, vocab) at each prompt's last token."""
    rows = torch.arange(len(h), device=h.device)
    return model.unembed(h[rows, pairs.last].unsqueeze(1), pairs.ids[rows, pairs.last].unsqueeze(1)).squeeze(1)


def finish(model: GPT, h: Tensor, pairs: Pairs, nodes=None) -> Tensor:
    """The stream before the last sublayer (2n, T, d_model) -> logits (2n, vocab) at each prompt's last token.

    The last sublayer is an MLP, which looks at no other token: it runs there alone. So `nodes` must not
    depend on the position.
    """
    last = model.sublayers[-1]
    if model.config.d_pos_emb is not None:  # positions are read by their place in the sequence
        return unembed_last(model, last(h, nodes), pairs)
    rows = torch.arange(len(h), device=h.device)
    h = last(h[rows, pairs.last].unsqueeze(1), nodes)
    return model.unembed(h, pairs.ids[rows, pairs.last].unsqueeze(1)).squeeze(1)


def margin_of(logits: Tensor, pairs: Pairs) -> Tensor:
    """Right minus wrong logit of each prompt (2n,)."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]


def batches_of(pairs: Pairs, size: int) -> list[Pairs]:
    return [pairs.take(torch.arange(i, min(i + size, len(pairs)), device=pairs.ids.device)) for i in range(0, len(pairs), size)]


@torch.no_grad()
def margins(model: GPT, pairs: Pairs, nodes=None, batch: int = 64) -> Tensor:
    """Right minus wrong logit of each prompt (2n,), `batch` pairs at a time."""
    return torch.cat([margin_of(last_logits(model, part, nodes), part) for part in batches_of(pairs, batch)])


# --- the loss and its calibration ------------------------------------------------------------

def loss_of(margin: Tensor) -> float:
    """Task loss in nats from `margins`."""
    return F.softplus(-margin).mean().item()


def calibrated(margin: Tensor, scale, shift) -> Tensor:
    """The margins after scaling and shifting (first answer's - second answer's logit).

    Prompts of a pair alternate: +shift where the first answer is right, -shift where the second is.
    """
    sign = 1.0 - 2.0 * (torch.arange(len(margin), device=margin.device) % 2)
    return scale * margin + shift * sign


def calibrate(margin: Tensor, steps: int = 16) -> tuple[float, float]:
    """The scale and shift that minimise the task loss, by L-BFGS (paper A.5).

    The scale is not negative: a model that is always wrong has not learned the task. Such margins get scale 0.
    """
    fit = torch.tensor([1.0, 0.0], device=margin.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([fit], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        # where the prompts are separable the best scale is infinite; the small pull keeps it finite
        loss = F.softplus(-calibrated(margin, fit[0], fit[1])).mean() + 1e-4 * (fit[0] - 1) ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    scale, shift = fit.detach().tolist()
    if scale < 0:  # the loss is convex in both, so that the best of the allowed scales is 0, and of its shifts 0
        return 0.0, 0.0
    return (scale, shift) if math.isfinite(scale + shift) else (1.0, 0.0)


# --- the circuit's graph ---------------------------------------------------------------------

def weights_between(model: GPT) -> list[tuple[str, str, Tensor, Tensor | None]]:
    """(from site, to site, weight (to, from), bias (to)) of every matrix between two nodes: views, not copies."""
    out = []
    for i, block in enumerate(model.transformer.h):
        attn_in, attn_out, mlp_in, mlp_out = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
        bias = [b.detach() if b is not None else None for b in (attn_in.bias, attn_out.bias, mlp_in.bias, mlp_out.bias)]
        bias_qkv = bias[0].chunk(3) if bias[0] is not None else (None,) * 3
        out += [(f"{i}.attn.act_in", f"{i}.attn.{z}", w, b) for z, w, b in zip("qkv", attn_in.weight.detach().chunk(3), bias_qkv)]
        out += [(f"{i}.attn.v", f"{i}.attn.resid_delta", attn_out.weight.detach(), bias[1]),
                (f"{i}.mlp.act_in", f"{i}.mlp.post_act", mlp_in.weight.detach(), bias[2]),
                (f"{i}.mlp.post_act", f"{i}.mlp.resid_delta", mlp_out.weight.detach(), bias[3])]
    return out


def all_edges(model: GPT) -> Edges:
    return {(a, b): w != 0 for a, b, w, _ in weights_between(model)}


def cuttable(model: GPT) -> GPT:
    """A copy of `model` that has biases, for `cut_`."""
    model = copy.deepcopy(model)
    for module in model.transformer.h.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)
    return model


def cut_(model: GPT, whole: GPT, mask: Nodes, edges: Edges, constants: Nodes) -> GPT:
    """Make `model` (a `cuttable` copy) the model `whole` less the weights between two nodes of `mask`
    that `edges` does not keep: each then contributes weight * constant, as if its source were ablated
    for this one target (of a value behind a sink, as if no attention went to the sink)."""
    for (a, b, w, bias), (_, _, w0, bias0) in zip(weights_between(model), weights_between(whole)):
        gone = w0 * (mask[b][:, None] & mask[a] & ~edges[a, b])
        torch.sub(w0, gone, out=w)
        bias.copy_(gone @ constants[a] + (0 if bias0 is None else bias0))
    return model


def without_edges(model: GPT, circuit: Circuit, constants: Nodes) -> GPT:
    """The model in which the circuit runs: a copy of `model` less the edges that were removed."""
    return cut_(cuttable(model), model, circuit.mask, circuit.edges, constants)


def alone(model: GPT, circuit: Circuit, constants: Nodes) -> Callable[[Pairs], Tensor]:
    """The `margins` of the circuit alone, not calibrated, as a function of pairs: its model is made once."""
    return partial(margins, without_edges(model, circuit, constants), nodes=ablate(circuit.mask, constants))


def drop_unconnected(model: GPT, mask: Nodes, answers: tuple[int, int], edges: Edges | None = None) -> Nodes:
    """The nodes of `mask` that lie on a path from the tokens to the logits of the two answers.

    Steps of a path: embedding -> read of a channel that it fills; the nonzero weights between
    nodes (of these, `edges`); write -> any later read of the same channel; write -> an answer's
    unembedding entry; and a query or key -> the values of its head.
    """
    c = model.config
    into = {}
    for (a, b), kept in (edges or all_edges(model)).items():
        into.setdefault(b, []).append((a, kept))

    def reached(site, live):  # products of 0s and 1s: paths counted
        return mask[site] & (sum(m.float() @ live[a].float() for a, m in into[site]) > 0)

    def needed(site, live):
        users = [(b, m) for b, pairs in into.items() for a, m in pairs if a == site and b in live]
        return sum((live[b].float() @ m.float() for b, m in users), torch.zeros(len(mask[site]), device=mask[site].device)) > 0

    def heads(x):  # channels (H * d_head,) -> the same, true throughout a head that has any
        return x.view(c.n_head, c.d_head).any(1).repeat_interleave(c.d_head)

    wte, wpe, head = model.transformer.wte.weight, model.transformer.wpe.weight, model.lm_head.weight
    live = {}
    filled = (wte != 0).any(0) if c.d_pos_emb is not None else ((wte != 0).any(0) | (wpe != 0).any(0))
    for site in model.sites:  # forward: what the tokens reach
        if site.endswith("act_in"):
            live[site] = mask[site] & F.pad(filled, (0, len(mask[site]) - len(filled)), value=True)
        else:
            live[site] = reached(site, live)
        if site.endswith("attn.v"):  # a constant value moves too where queries or keys steer its attention
            steered = heads(live[site[:-1] + "q"] | live[site[:-1] + "k"])
            live[site] = live[site] | (mask[site] & steered)
        if site.endswith("resid_delta"):
            filled = filled | live[site]
    read, keep = (head[list(answers)] != 0).any(0), {}
    for i in reversed(range(c.n_layer)):  # backward: what the answers need
        for sub, inner in (("mlp", ("post_act",)), ("attn", ("v", "q", "k"))):
            site = f"{i}.{sub}.resid_delta"
            keep[site] = live[site] & read
            for z in inner:
                site = f"{i}.{sub}.{z}"
                keep[site] = live[site] & (heads(keep[f"{i}.attn.v"]) if z in ("q", "k") else needed(site, keep))
            site = f"{i}.{sub}.act_in"
            keep[site] = live[site] & needed(site, keep)
            read = read | keep[site][: c.d_model]
    return {site: keep[site] for site in model.sites}


def count(mask: Nodes) -> int:
    return sum(int(m.sum()) for m in mask.values())


def edges_of(model: GPT, mask: Nodes, edges: Edges | None = None) -> list[list]:
    """[site, channel, site, channel, weight] of every nonzero weight between two nodes of the circuit (of these, `edges`)."""
    edges, out = edges or all_edges(model), []
    for a, b, w, _ in weights_between(model):
        inner = edges[a, b] & mask[b][:, None] & mask[a]
        out += [[a, j, b, i, round(w[i, j].item(), 6)] for i, j in inner.nonzero().tolist()]
    return out


# --- its file --------------------------------------------------------------------------------

def hash_of(directory: str) -> str:
    """sha256 of a model's weights."""
    with open(os.path.join(directory, "final_model.pt"), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_circuit(path: str) -> dict:
    """The content of a circuit.json. ValueError, in one line, if it is not a whole and consistent one."""
    try:
        with open(path, "rb") as f:
            c = json.load(f)
        nodes = {(s, i) for s, channels in c["nodes"].items() for i in channels}
        edges = {(a, j, b, i): weight for a, j, b, i, weight in c["edges"]}
        ends = {end for a, j, b, i in edges for end in ((a, j), (b, i))}
        numbers = [*edges.values(), *(x for mean in c["means"].values() for x in mean),
                   *(c[k] for k in ("logit_scale", "logit_shift", "loss", "target_loss"))]
        whole = (c["format"], c["n_nodes"], c["n_edges"]) == ("sparse-circuit-1", len(nodes), len(edges)) and ends <= nodes
        whole = whole and len(edges) == len(c["edges"]) and all(isinstance(x, (int, float)) for x in numbers)
        whole = whole and all(isinstance(c[k], dict) for k in ("model", "means", "validation", "settings"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is truncated or no circuit file ({type(e).__name__}: {e}); prune the task again") from e
    if not whole:
        raise ValueError(f"{path} was edited: its counts, nodes and edges do not agree; prune the task again")
    return c


def circuit_of(c: dict, model: GPT) -> tuple[Circuit, Nodes]:
    """The circuit that a file describes, and its constants. ValueError where its names or weights are not the model's."""
    device = model.lm_head.weight.device
    for site, channels in c["nodes"].items():
        if site not in model.sites:
            raise ValueError(f"the circuit names the site '{site}', which the model lacks; the nearest is '{nearest(site, model.sites)}'")
        if not all(isinstance(i, int) and 0 <= i < model.config.site_width(site) for i in channels):
            raise ValueError(f"the circuit names a channel of {site} past the model's {model.config.site_width(site)}")
    mask = {s: torch.zeros(model.config.site_width(s), dtype=torch.bool, device=device) for s in model.sites}
    for site, channels in c["nodes"].items():
        mask[site][channels] = True
    edges = {key: torch.zeros_like(kept) for key, kept in all_edges(model).items()}
    weights = {(a, b): w for a, b, w, _ in weights_between(model)}
    for a, j, b, i, weight in c["edges"]:
        if (a, b) not in edges or weights[a, b][i, j] == 0 or not abs(weights[a, b][i, j].item() - weight) <= 1e-5:
            raise ValueError(f"the model has no weight {weight} from {a}.{j} to {b}.{i}: the circuit is of another model, or was edited")
        edges[a, b][i, j] = True
    constants = {s: torch.tensor(c["means"].get(s, []), device=device) for s in model.sites}
    if any(len(constants[s]) != len(mask[s]) for s in model.sites):
        raise ValueError("the circuit's means do not fit the model's sites: it is of another model, or was edited")
    return Circuit(mask, edges, c["logit_scale"], c["logit_shift"], c["loss"]), constants
