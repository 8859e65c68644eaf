"""What a circuit is: some nodes of a model, what connects them, and the model run on those alone.

- `ablate(gates, constants)`: a node function that holds the other nodes at constants (paper A.5).
- `last_logits`, `margins`: the model on a task's pairs, with or without such a function.
- `drop_unconnected`, `edges_of`, `count`: paths, edges and sizes (paper 2.2, Fig. 12).

How circuits are found is in prune.py.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from tasks import Pairs

Nodes = dict[str, Tensor]  # site -> one value per channel: a bool mask, a gate or a mean


# --- running a model with nodes replaced -----------------------------------------------------

def ablate(gates: Nodes, constants: Nodes):
    """A node function: gate * x + (1 - gate) * constant at every site that `gates` names (paper A.5)."""
    def fn(site: str, x: Tensor) -> Tensor:
        if site not in gates:
            return x
        c = constants[site]
        return c + gates[site] * (x - c)
    return fn


def last_logits(model: GPT, pairs: Pairs, nodes=None) -> Tensor:
    """Logits (2n, vocab) at each prompt's last token; nothing else is unembedded."""
    h = model.run(model.embed(pairs.ids), nodes=nodes)
    rows = torch.arange(len(h), device=h.device)
    return model.unembed(h[rows, pairs.last].unsqueeze(1), pairs.ids[rows, pairs.last].unsqueeze(1)).squeeze(1)


@torch.no_grad()
def margins(model: GPT, pairs: Pairs, nodes=None, batch: int = 64) -> Tensor:
    """Right minus wrong logit of each prompt (2n,)."""
    out = []
    for i in range(0, len(pairs), batch):
        part = pairs.take(torch.arange(i, min(i + batch, len(pairs)), device=pairs.ids.device))
        logits = last_logits(model, part, nodes)
        rows = torch.arange(len(logits), device=logits.device)
        out.append(logits[rows, part.answer] - logits[rows, part.wrong])
    return torch.cat(out)


# --- the circuit's graph ---------------------------------------------------------------------

def weights_between(model: GPT) -> list[tuple[str, str, Tensor]]:
    """(from site, to site, weight (to channels, from channels)) of every matrix between two nodes."""
    out = []
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.detach().chunk(3)
        out += [(f"{i}.attn.act_in", f"{i}.attn.{z}", w) for z, w in (("q", q), ("k", k), ("v", v))]
        out += [(f"{i}.attn.v", f"{i}.attn.resid_delta", block.attn.c_proj.weight.detach()),
                (f"{i}.mlp.act_in", f"{i}.mlp.post_act", block.mlp.c_fc.weight.detach()),
                (f"{i}.mlp.post_act", f"{i}.mlp.resid_delta", block.mlp.c_proj.weight.detach())]
    return out


def drop_unconnected(model: GPT, mask: Nodes, answers: tuple[int, int]) -> Nodes:
    """The nodes of `mask` that lie on a path from the tokens to the logits of the two answers.

    Steps of a path: embedding -> read of a channel that it fills; the nonzero weights between
    nodes; write -> any later read of the same channel; write -> an answer's unembedding entry;
    and a query or key -> the values of its head.
    """
    c = model.config
    into = {}
    for a, b, w in weights_between(model):
        into.setdefault(b, []).append((a, w != 0))

    def reached(site, live):
        return mask[site] & sum((m[:, live[a]].any(1) for a, m in into[site]), torch.zeros_like(mask[site]))

    def needed(site, live):
        users = [(b, m) for b, pairs in into.items() for a, m in pairs if a == site and b in live]
        return sum((m[live[b]].any(0) for b, m in users), torch.zeros_like(mask[site]))

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


def edges_of(model: GPT, mask: Nodes) -> list[list]:
    """[site, channel, site, channel, weight] of every nonzero weight between two nodes of the circuit."""
    out = []
    for a, b, w in weights_between(model):
        inner = w * mask[b][:, None] * mask[a][None, :]
        out += [[a, j, b, i, round(w[i, j].item(), 6)] for i, j in inner.nonzero().tolist()]
    return out
