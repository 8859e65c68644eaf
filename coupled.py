"""A sparse model, a frozen dense one and the bridges between them: the pair, and its loss.

- A site stands before every sublayer and one after the last; at each, an encoder (dense -> sparse,
  ending in AbsTopK) and a decoder back (`Bridges`).
- `Coupled`: next-token loss of the sparse model, and four terms of each site: two errors of what
  the bridges say, two KL divergences of hybrid passes, which change models at that site.
- `couple`, `load_bridged`: a new pair, and one that bridge.py has trained.

Paper sections 2.3 and A.3.
"""
import os
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import GPT
from model_files import weights_hash
from ops import abstopk
from tokens import tokenizer_of

TERMS = ("nmse_encoder", "nmse_decoder", "kl_sparse", "kl_dense")  # of the loss, at each site


class Bridges(nn.Module):
    """At site i an encoder (.., d_dense) -> (.., d_sparse) and a decoder back, both linear with
    biases (paper A.3). The extra state says what the weights do not: k, and whose they are."""

    def __init__(self, n_sites: int, d_dense: int, d_sparse: int, afrac: float, dense_hash=""):
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(d_dense, d_sparse) for _ in range(n_sites))
        self.decoders = nn.ModuleList(nn.Linear(d_sparse, d_dense) for _ in range(n_sites))
        # small, as GPT-2's: an NMSE is measured by its target, and the stream is small at first
        for layer in (*self.encoders, *self.decoders):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.k = max(1, int(afrac * d_sparse))
        self.dense_hash = dense_hash

    def encode(self, i: int, h: Tensor) -> Tensor:
        # a map under autocast gives bfloat16, the stream stays what it is
        return abstopk(self.encoders[i](h).to(h.dtype), self.k)

    def decode(self, i: int, h: Tensor) -> Tensor:
        return self.decoders[i](h).to(h.dtype)

    def get_extra_state(self) -> dict:
        return {"k": self.k, "dense": self.dense_hash}

    def set_extra_state(self, state: dict) -> None:
        if state["dense"] != self.dense_hash:
            raise ValueError("these bridges lead to another dense model (its weights differ)")
        self.k = state["k"]


# --- the pair and its loss (paper A.3) -------------------------------------------------------

def error_and_moment(x: Tensor, target: Tensor) -> Tensor:
    """(2,): mean squared error of x, and the target's second moment."""
    return torch.stack([(x - target).square().mean(), target.square().mean()])


def nmse(x: Tensor, target: Tensor, whole: Tensor | None = None) -> Tensor:
    """Mean squared error over the target's second moment: 1 for x = 0.

    whole: where x and target are one of several equal parts, the mean `error_and_moment` (2,) of
    all parts, a constant. Value and gradient then are, in the mean over the parts, those of the
    whole; of the parts' own ratios they would not be.
    """
    error, moment = error_and_moment(x, target)
    if whole is None:
        return error / moment
    # error / moment to first order around that of the whole: linear, so that parts add up
    ratio = whole[0] / whole[1]
    return ratio + (error - ratio * moment) / whole[1]


def distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, vocab) -> probabilities of that shape; their mean entropy, nats per token."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    return p, -(p * log_p).sum(-1).mean()


def kl(dense: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
    """KL(y_dense || y), nats per token. dense: the `distribution` of y_dense; logits: of y."""
    # Cross-entropy less entropy. One entropy serves all sites, and on a CPU this is two to three
    # times as fast as F.kl_div.
    p, entropy = dense
    return F.cross_entropy(logits.float().flatten(0, 1), p.flatten(0, 1)) - entropy


def streams(model: GPT, idx: Tensor) -> list[Tensor]:
    """The residual stream (B, T, d_model) at every site, of tokens idx (B, T)."""
    recomputed = model.config.grad_checkpointing and model.training
    h = [model.embed(idx)]
    for f in model.sublayers:
        h.append(checkpoint(f, h[-1], use_reentrant=False) if recomputed else f(h[-1]))
    return h


def run_from(model: GPT, i: int, h: Tensor, idx: Tensor) -> Tensor:
    """A hybrid pass: logits (B, T, vocab) of `model` whose stream at site i is `h`."""
    return model.unembed(model.run(h, start=i), idx)


class Coupled(nn.Module):
    """The sparse model, the frozen dense model and the bridges between them. weights: of TERMS;
    rows: sequences that these look at, 0 = all."""

    def __init__(self, sparse: GPT, dense: GPT, bridges: Bridges, weights=(1.0, 1.0, 1.0, 1.0),
                 rows: int = 0, recompute: bool = True):
        super().__init__()
        self.sparse = sparse
        self.dense = dense.requires_grad_(False).eval()
        self.bridges = bridges
        # a buffer, to move with the module; not one to save: the config has them
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self.rows = rows or None  # as the end of a slice
        self.recompute = recompute

    def site(self, i: int, dense_h: Tensor, sparse_h: Tensor, idx: Tensor, y_dense, whole):
        """The four terms (4,) of site i, in the order of TERMS; y_dense as in `kl`; whole: of
        encoder and decoder, each as in `nmse`."""
        of_encoder, of_decoder = whole
        encoded = self.bridges.encode(i, dense_h)
        decoded = self.bridges.decode(i, sparse_h)
        # No target is detached: the sparse model, too, moves toward what the bridges can say.
        return torch.stack([
            nmse(encoded, sparse_h, of_encoder),
            nmse(decoded, dense_h, of_decoder),
            kl(y_dense, run_from(self.sparse, i, encoded, idx)),
            kl(y_dense, run_from(self.dense, i, decoded, idx)),
        ])

    @torch.no_grad()
    def look_ahead(self, idx: Tensor) -> Tensor:
        """Of tokens idx (B, T), what the `nmse` of a step in several parts takes the mean of:
        (n_sites, 2, 2), `error_and_moment` of each site's encoder and decoder."""
        idx = idx[: self.rows]
        found = []
        for i, (d, s) in enumerate(zip(streams(self.dense, idx), streams(self.sparse, idx))):
            found.append(torch.stack([error_and_moment(self.bridges.encode(i, d), s),
                                      error_and_moment(self.bridges.decode(i, s), d)]))
        return torch.stack(found)

    def forward(self, idx: Tensor, targets: Tensor,
                whole: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """-> (next-token loss in nats, terms (n_sites, 4)), and the whole loss. whole: where
        idx (B, T) is a part of a step's batch, the mean `look_ahead` of all parts."""
        sparse_h = streams(self.sparse, idx)
        # the logits get no name, so as not to be kept until the sites are done
        loss = F.cross_entropy(self.sparse.unembed(sparse_h[-1], idx).flatten(0, 1),
                               targets.flatten(), ignore_index=-1)
        # the dense model and the hybrid passes see some of the rows only: they cost the most
        idx = idx[: self.rows]
        with torch.no_grad():
            dense_h = streams(self.dense, idx)
            y_dense = distribution(self.dense.unembed(dense_h[-1], idx))

        # Recomputed, a step holds the graph of one site's two hybrid passes at a time, however
        # many the sites, and every site's stream. A second forward pass of them is the price.
        site = self.site
        if self.recompute and self.training:
            site = partial(checkpoint, self.site, use_reentrant=False)
        if whole is None:  # these rows are all there are
            whole = [(None, None)] * len(dense_h)
        terms = torch.stack([site(i, d, s[: self.rows], idx, y_dense, w)
                             for i, (d, s, w) in enumerate(zip(dense_h, sparse_h, whole))])
        return (loss.detach(), terms.detach()), loss + (terms * self.weights).sum()


def couple(sparse: GPT, run_dir: str, dense_dir: str, device: str, tokenizer: str, afrac=1.0,
           **loss) -> Coupled:
    """The sparse model of run_dir, the dense one of dense_dir and new bridges. tokenizer: the hash
    of the sparse model's, "" if unknown; `loss`: Coupled's options. ValueError or OSError, in one
    line, where the two cannot be coupled."""
    if os.path.realpath(dense_dir) == os.path.realpath(run_dir):
        raise ValueError(f"out_dir and dense are both {dense_dir}; dense must stay as it is")
    of_dense = tokenizer_of(dense_dir)
    if "" not in (of_dense, tokenizer) and of_dense != tokenizer:
        raise ValueError(f"the dense model {dense_dir} was trained on data of another tokenizer "
                         "than the sparse one; train both on the same data_dir")
    dense = GPT.load(dense_dir, device)
    d, s = dense.config, sparse.config
    for name in ("n_layer", "vocab_size"):  # else sites or logits have no partner
        if getattr(d, name) != getattr(s, name):
            raise ValueError(f"bridges need the same {name} on both sides; {dense_dir} has "
                             f"{getattr(d, name)}, the sparse model {getattr(s, name)}")
    if d.block_size < s.block_size:
        raise ValueError(f"the dense model {dense_dir} takes {d.block_size} tokens, fewer than "
                         f"block_size {s.block_size}")
    bridges = Bridges(2 * s.n_layer + 1, d.d_model, s.d_model, afrac, weights_hash(dense_dir))
    return Coupled(sparse, dense, bridges, **loss).to(device)


def load_bridged(run_dir: str, dense_dir: str, sparse: GPT, device: str) -> Coupled:
    """The trained pair of run_dir, whose model is `sparse`, to be used and not to be trained.
    ValueError or OSError, in one line, where it is not whole or the dense model is another one."""
    path = os.path.join(run_dir, "bridges.pt")
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}; first train it: python bridge.py --config=...")
    # the bridges' k comes with their weights
    net = couple(sparse, run_dir, dense_dir, device, tokenizer_of(run_dir))
    try:
        net.bridges.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:  # torch.load raises many kinds on a truncated or foreign file
        raise ValueError(f"{path} does not fit {run_dir} and {dense_dir}, or is truncated: "
                         f"{str(e).splitlines()[0]}") from e
    return net.eval()
