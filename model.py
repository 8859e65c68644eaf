"""The weight-sparse GPT, as a chain of sublayers whose every node can be read or replaced.

- One class for every option of the published format: sinks, bigram table, concatenated positions.
- `model.embed(idx)`, then `model.sublayers` (attention 0, MLP 0, attention 1, ...), then
  `model.unembed(h, idx)`: the forward pass is a walk along that chain, and so is everything else.
- `model(idx, nodes=fn)`: each sublayer passes each node site through `fn(site, x)` after AbsTopK.
  Recording, masking, ablating and steering are all such a function. None: no trace of it.
- `GPT.load(dir)`: a published directory (`beeg_config.json` + `final_model.pt`), a snapshot of the
  hub (`config.json` + `model.safetensors`), or a run of ours. `model.save(dir)` writes either.

Paper sections 2.1 and A.1; every site is in the table below.
"""
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Optional, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model_files import (SIZES, config_path, known_fields, plain_name, read_weights,
                         weights_files, write_model)
from ops import abstopk, linear, rms_norm, sink_attention

NodeFn = Callable[[str, Tensor], Tensor]  # (site, activations (B, T, width)) -> activations

# Every site that reaches `nodes`, in forward order; layer N's is called "N.attn.q", and so on.
#
#   site              what                                            width             a node
#   resid_in          the stream before attention                     d_model           no
#   attn.act_in       what attention reads: the stream, normed        d_model + d_pos   yes
#   attn.q, .k, .v    queries, keys, values; all heads side by side   n_head * d_head   yes
#   attn.y            what the heads gathered, before c_proj          n_head * d_head   no
#   attn.resid_delta  what attention adds to the stream               d_model           yes
#   resid_mid         the stream between attention and MLP            d_model           no
#   mlp.act_in        what the MLP reads: the stream, normed          d_model + d_pos   yes
#   mlp.post_act      MLP neurons, after the activation               d_mlp             yes
#   mlp.resid_delta   what the MLP adds to the stream                 d_model           yes
#   final_resid       the stream after the last layer; no "N."        d_model           no
#
# The eight that hold nodes can have an AbsTopK just before `nodes` sees them (paper, Fig. 12):
# site -> the name by which the published config's afrac_loctypes switches it on.
SITES = {
    "attn.act_in": "attn_in",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.resid_delta": "attn_out",
    "mlp.act_in": "mlp_in",
    "mlp.post_act": "mlp_neuron",
    "mlp.resid_delta": "mlp_out",
}
# The residual stream itself stays whole in the paper; the format has names for it all the same.
STREAM_LOCTYPES = ("resid_post_attn", "resid_post_mlp")

def record(into: dict[str, Tensor]) -> NodeFn:
    """A node function that keeps each site's activations, (B, T, width), detached, in `into`.

        seen = {}
        model(idx, nodes=record(seen))
        seen["0.mlp.post_act"]

    It changes nothing. Where `into` is used again, the later pass replaces what was there.
    """
    def node(site: str, x: Tensor) -> Tensor:
        into[site] = x.detach()
        return x
    return node


@dataclass
class GPTConfig:
    """The published config, with the defaults that its own loader gives to absent keys."""
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    d_head: Optional[int] = None          # default d_model // n_head; any other is allowed
    d_model: int = 768
    dropout: float = 0.0
    bias: bool = True                     # in the linear maps
    ln_bias: bool = True                  # in LayerNorm; RMSNorm has none
    rms_norm: bool = False
    residual_activation_type: str = "identity"  # or relu: on the stream, after each add
    activation_type: str = "gelu"         # or relu
    afrac: Optional[float] = None         # AbsTopK keeps int(afrac * width); None = off
    afrac_loctypes: str = "attn_in,attn_out,mlp_in,mlp_out"
    debug_nans: bool = False
    tied_unembed: bool = True
    tokenizer_name: str = "tinypython_2k"
    grad_checkpointing: bool = True
    d_mlp: Optional[int] = None           # default 4 * d_model
    enable_bigram_table: bool = False
    learnable_bigram_table: bool = False
    d_pos_emb: Optional[int] = None       # width of positions beside each read; None = added once
    dropout_cat_pos_emb: bool = False
    sinusoidal_cat_pos_emb: bool = False
    enable_sparse_kernels: bool = False   # the authors' own inference kernels; changes no result
    flash: bool = True                    # False = a T x T matrix, to compare with
    sink: bool = False

    def __post_init__(self):
        # what is left out follows from d_model, as the authors' loader has it
        if self.d_head is None:
            self.d_head = self.d_model // max(1, self.n_head)
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        for name in (*SIZES, "d_head", "d_mlp"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.d_pos_emb is not None and self.d_pos_emb < 1:
            raise ValueError(f"d_pos_emb must be at least 1, or null, not {self.d_pos_emb}")
        self._check_name("residual_activation_type", ("identity", "relu"))
        self._check_name("activation_type", ("gelu", "relu"))
        if self.sinusoidal_cat_pos_emb and self.d_pos_emb is None:
            raise ValueError("sinusoidal_cat_pos_emb needs d_pos_emb")

        known = {*SITES.values(), *STREAM_LOCTYPES}
        for place in self.topk_at:
            if place not in known:
                names = ", ".join(sorted(known))
                raise ValueError(f"afrac_loctypes names '{place}'; known are {names}")
        # k = int(afrac * width) must be at least 1 at every site
        if self.afrac is not None:
            narrowest = min(self.d_model, self.n_head * self.d_head, self.d_mlp)
            if not (0 < self.afrac <= 1 and int(self.afrac * narrowest) >= 1):
                raise ValueError(
                    f"afrac {self.afrac} keeps no channel of the narrowest site, or more than all")

    def _check_name(self, field: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise ValueError(f"{field} must be one of {', '.join(allowed)}, not {value!r}")

    @property
    def topk_at(self) -> set[str]:
        """The published names of the places where AbsTopK acts if afrac is given."""
        return set(self.afrac_loctypes.split(",")) if self.afrac_loctypes else set()

    def site_width(self, site: str) -> int:
        """Channels of a node site such as `3.attn.q`."""
        name = site.split(".", 1)[1]
        if name in ("attn.q", "attn.k", "attn.v"):
            return self.n_head * self.d_head
        if name == "mlp.post_act":
            return self.d_mlp
        if name.endswith("act_in"):
            return self.d_read
        return self.d_model

    @property
    def d_read(self) -> int:
        """Channels that a sublayer reads: the stream's, and positions where they are beside it."""
        return self.d_model + (self.d_pos_emb or 0)


def _norm(config: GPTConfig, width: int) -> nn.Module:
    # RMSNorm keeps zero where it is, so that a channel which is off stays off (paper 2.1)
    if config.rms_norm:
        return RMSNorm(width)
    return nn.LayerNorm(width, bias=config.ln_bias)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm by ops.py."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """nn.Linear that skips the zeros of a sparse matrix where that is faster (ops.py)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.known = {}  # the nonzeros of a frozen weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.known)


class Embedding(nn.Embedding):
    """nn.Embedding that draws nothing where there is no memory: to draw on the meta device would
    load half of PyTorch's compiler, a second, before any model is loaded."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class SinkLogit(nn.Module):
    """A module of its own for the sake of the published key `attn_imp.sink_logit`."""

    def __init__(self, n_head: int):
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(n_head))


class Attention(nn.Module):
    """Causal attention over what is read from the stream, (B, T, d_read) -> (B, T, d_model)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_head * config.d_head
        self.c_attn = Linear(config.d_read, 3 * width, bias=config.bias)  # q, k and v stacked
        self.c_proj = Linear(width, config.d_model, bias=config.bias)
        self.attn_imp = SinkLogit(config.n_head) if config.sink else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.config = config

    def forward(self, x: Tensor, node: NodeFn) -> Tensor:
        q, k, v = self.c_attn(node("attn.act_in", x)).chunk(3, dim=-1)  # each (B, T, H * d_head)
        q = self.by_head(node("attn.q", q))
        k = self.by_head(node("attn.k", k))
        v = self.by_head(node("attn.v", v))
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)  # (B, T, H * d_head)
        # y is no node: an edge goes from a value channel through c_proj to what is written
        y = self.resid_dropout(self.c_proj(node("attn.y", y)))
        return node("attn.resid_delta", y)

    def by_head(self, x: Tensor) -> Tensor:
        """(B, T, H * d_head) -> (B, H, T, d_head)."""
        c = self.config
        return x.view(*x.shape[:2], c.n_head, c.d_head).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d_head)) v over earlier positions, the sink in the denominator."""
        sink = self.attn_imp.sink_logit if self.attn_imp else None
        dropout_p = self.config.dropout if self.training else 0.0
        # flash: no T x T matrix is ever held, forward or backward
        if self.config.flash:
            return sink_attention(q, k, v, sink, dropout_p)
        B, H, T, D = q.shape
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        if sink is None:
            return F.dropout(scores.softmax(-1), dropout_p) @ v
        # the sink is one more place to look at, whose value is zero
        sink = sink.to(scores.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
        p = F.dropout(torch.cat([sink, scores], -1).softmax(-1), dropout_p)
        return p[..., 1:] @ v


class MLP(nn.Module):
    """What is read from the stream, (B, T, d_read) -> neurons (B, T, d_mlp) -> (B, T, d_model)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.d_read, config.d_mlp, bias=config.bias)
        self.c_proj = Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.act = F.gelu if config.activation_type == "gelu" else F.relu
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, node: NodeFn) -> Tensor:
        x = self.act(self.c_fc(node("mlp.act_in", x)))
        x = self.c_proj(node("mlp.post_act", x))
        # dropout comes before the site, so that `nodes` has the last word on what is written
        return node("mlp.resid_delta", self.dropout(x))


class Block(nn.Module):
    """Two sublayers, each h -> h + f(norm(h)); the model's chain is made of these."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.topk_at = config.topk_at if config.afrac is not None else set()
        self.ln_1 = _norm(config, config.d_model)
        self.attn = Attention(config)
        self.ln_2 = _norm(config, config.d_model)
        self.mlp = MLP(config)
        if config.d_pos_emb is not None:
            self.ln_p1 = _norm(config, config.d_pos_emb)
            self.ln_p2 = _norm(config, config.d_pos_emb)
        dropout = config.dropout if config.dropout_cat_pos_emb else 0.0
        self.pos_dropout = nn.Dropout(dropout)

    def attention(self, h: Tensor, nodes: Optional[NodeFn] = None,
                  wpe: Optional[Tensor] = None) -> Tensor:
        """The stream (B, T, d_model) before attention -> after it. wpe: positions to read."""
        node = self.sites_of_this_layer(nodes)
        h = node("resid_in", h)
        # normed anew at each read; the stream itself is never normed
        read = self.ln_1(h)
        if wpe is not None:
            read = self.with_positions(read, self.ln_p1(wpe[: h.shape[1]]))
        return self.add(h, self.attn(read, node), "resid_post_attn")

    def feedforward(self, h: Tensor, nodes: Optional[NodeFn] = None,
                    wpe: Optional[Tensor] = None) -> Tensor:
        """The stream (B, T, d_model) before the MLP -> after it. wpe: positions to read."""
        node = self.sites_of_this_layer(nodes)
        h = node("resid_mid", h)
        read = self.ln_2(h)
        if wpe is not None:
            read = self.with_positions(read, self.ln_p2(wpe[: h.shape[1]]))
        return self.add(h, self.mlp(read, node), "resid_post_mlp")

    def sites_of_this_layer(self, nodes: Optional[NodeFn]) -> NodeFn:
        """The one place that every site passes through: AbsTopK, then `nodes` under its name."""
        def node(site: str, x: Tensor) -> Tensor:
            x = self.topk(SITES.get(site), x)
            if self.config.debug_nans and not x.isfinite().all():
                raise FloatingPointError(f"not finite at {self.layer}.{site}")
            if nodes is None:
                return x
            return nodes(f"{self.layer}.{site}", x)
        return node

    def topk(self, loctype: Optional[str], x: Tensor) -> Tensor:
        """AbsTopK of x (B, T, width) where the config asks for it (paper 2.1)."""
        if loctype not in self.topk_at:
            return x
        return abstopk(x, int(self.config.afrac * x.shape[-1]))

    def with_positions(self, read: Tensor, positions: Tensor) -> Tensor:
        """Positions (T, d_pos_emb) as read-only channels beside the stream's, (B, T, d_model)."""
        positions = self.pos_dropout(positions).to(read.dtype)
        return torch.cat([read, positions.expand(read.shape[0], -1, -1)], dim=-1)

    def add(self, h: Tensor, delta: Tensor, loctype: str) -> Tensor:
        h = h + delta
        if self.config.residual_activation_type == "relu":
            h = h.relu()
        return self.topk(loctype, h)


class GPT(nn.Module):
    """The whole model; its attributes' names are those of the published weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.known = {}  # what circuit.py finds of frozen weights
        # wpe is there even where positions are off: the published files always have it
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(c.vocab_size, c.d_model),
            wpe=Embedding(c.block_size, c.d_model if c.d_pos_emb is None else c.d_pos_emb),
            h=nn.ModuleList(Block(c, i) for i in range(c.n_layer)),
            ln_f=_norm(c, c.d_model),
        ))
        self.drop = nn.Dropout(c.dropout)
        self.lm_head = Linear(c.d_model, c.vocab_size, bias=False)
        # some published models add a fixed vector to the logits; ours leaves it at zero
        self.register_buffer("final_logits_bias", torch.zeros(c.vocab_size))
        # row = current token, added to the logits; dense and not counted in L0
        if not c.enable_bigram_table:
            self.bigram_table = None
        elif c.learnable_bigram_table:
            self.bigram_table = nn.Parameter(torch.zeros(c.vocab_size, c.vocab_size))
        else:
            self.register_buffer("bigram_table", torch.zeros(c.vocab_size, c.vocab_size))
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: normal, narrower where the stream is written to; biases and bigrams at zero."""
        c = self.config
        for name, p in self.named_parameters():
            if p.is_meta:  # to be loaded
                continue
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))
            elif p.dim() == 2 and name != "bigram_table":
                nn.init.normal_(p, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
        if c.tied_unembed:
            self.transformer.wte.weight = self.lm_head.weight
        if c.sinusoidal_cat_pos_emb:
            wpe = self.transformer.wpe.weight.requires_grad_(False)
            wpe.copy_(_sinusoids(c.block_size, c.d_pos_emb))

    # --- the chain ---------------------------------------------------------------------------

    def embed(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> stream (B, T, d_model). ValueError if T exceeds block_size."""
        T = idx.shape[1]
        if T > self.config.block_size:
            most = self.config.block_size
            raise ValueError(f"{T} tokens do not fit the model's block_size {most}")
        h = self.transformer.wte(idx)
        if self.config.d_pos_emb is None:
            h = h + self.transformer.wpe.weight[:T]
        return self.drop(h)

    @property
    def sublayers(self) -> list[Callable[..., Tensor]]:
        """Attention 0, MLP 0, attention 1, ...: each `f(h, nodes=None)` on h (B, T, d_model)."""
        # positions beside the stream are no part of it, so each sublayer is given them
        wpe = self.transformer.wpe.weight if self.config.d_pos_emb is not None else None
        chain = []
        for block in self.transformer.h:
            chain.append(partial(block.attention, wpe=wpe))
            chain.append(partial(block.feedforward, wpe=wpe))
        return chain

    def run(self, h: Tensor, start: int = 0, nodes: Optional[NodeFn] = None) -> Tensor:
        """The stream (B, T, d_model) before sublayer `start` -> the stream after the last one."""
        for f in self.sublayers[start:]:
            # checkpointing: forget a sublayer's activations, compute them again for its gradient
            if self.config.grad_checkpointing and self.training:
                h = checkpoint(f, h, nodes, use_reentrant=False)
            else:
                h = f(h, nodes)
        return h if nodes is None else nodes("final_resid", h)

    def unembed(self, h: Tensor, idx: Tensor) -> Tensor:
        """Final stream (B, T, d_model) and the tokens there (B, T) -> logits (B, T, vocab)."""
        head = self.lm_head
        logits = linear(self.transformer.ln_f(h), head.weight, self.final_logits_bias, head.known)
        logits = logits.to(self.final_logits_bias.dtype)
        if self.bigram_table is not None:
            # in place: this is the largest tensor there is
            logits = F.embedding(idx, self.bigram_table).add_(logits)
        return logits

    def forward(self, idx: Tensor, targets: Optional[Tensor] = None,
                nodes: Optional[NodeFn] = None) -> tuple[Tensor, Optional[Tensor]]:
        """idx, targets: (B, T) token ids; a target of -1 is not scored.

        Returns logits (B, T, vocab) and the mean next-token loss in nats (None without targets).
        """
        logits = self.unembed(self.run(self.embed(idx), nodes=nodes), idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: Optional[int] = None, nodes: Optional[NodeFn] = None) -> Tensor:
        """Extend prompts (B, T) by sampling; temperature 0 takes the likeliest token.

        ValueError for an empty prompt: there is no token whose successor could be drawn.
        """
        if idx.shape[1] == 0:
            raise ValueError("an empty prompt cannot be extended; start with <|endoftext|>")
        for _ in range(max_new_tokens):
            # no cache of keys and values: simple, and `nodes` sees every position each time
            logits = self(idx[:, -self.config.block_size:], nodes=nodes)[0][:, -1]
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat([idx, new], dim=1)
        return idx

    @property
    def sites(self) -> list[str]:
        """All node sites, in forward order: `0.attn.act_in`, `0.attn.q`, ..."""
        return [f"{i}.{site}" for i in range(self.config.n_layer) for site in SITES]

    # --- the published formats ---------------------------------------------------------------

    def save(self, path: str, format: str = "store",
             state: Optional[dict[str, Tensor]] = None) -> None:
        """Write config and weights into the directory `path`, each file atomically, as the authors'
        store has them or, with format="hub", as the hub does. state: weights to write in place of
        the present ones, as `state_dict` gave them earlier.

        ValueError for another format, or where the hub's lacks the package safetensors.
        """
        state = self.state_dict() if state is None else state
        write_model(path, format, asdict(self.config), state)

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> "GPT":
        """A directory in the store's layout or the hub's, or a run of ours, in eval mode.

        On a CPU its weights are the file, mapped into memory: what is written into them stays in
        this process. ValueError with one line that names the keys where config or weights do not
        fit.
        """
        config = config_of(path)
        files = weights_files(path)
        # without memory and without values: all of them come from the file
        with torch.device("meta"):
            model = cls(config)
        state = {}
        for file in files:
            state |= read_weights(file)
        own = model.state_dict()
        try:
            given = model.fitted(state)
        except (ValueError, AttributeError) as e:
            raise ValueError(f"{files[0]}: {e}") from None
        for name, tensor in given.items():
            # files hold half floats, too; where they do not, this copies nothing
            given[name] = tensor.detach().to(own[name].dtype).contiguous()
        model.load_state_dict(given, assign=True)
        if config.tied_unembed:  # one tensor, not two of the same values
            model.transformer.wte.weight = model.lm_head.weight
        return model.to(device).eval()

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Copy a state dict, as published, into the weights. ValueError as of `fitted`."""
        self.load_state_dict(self.fitted(state))

    def fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under the names of this model's own, whole. ValueError that names
        the weights that are absent, unknown or of another shape."""
        own = self.state_dict()
        given = {}
        for name, tensor in state.items():
            name = plain_name(name)
            if not name.endswith(".attn.bias"):  # an old causal-mask buffer
                given[name] = tensor
        # what some published files leave out
        given.setdefault("final_logits_bias", torch.zeros(self.config.vocab_size))
        tied = ("lm_head.weight", "transformer.wte.weight")
        if self.config.tied_unembed:
            for name, other in (tied, tied[::-1]):
                if name not in given and other in given:
                    given[name] = given[other]

        unknown = sorted(given.keys() - own.keys())
        if unknown:
            raise ValueError(f"unknown weights: {', '.join(unknown)}")
        missing = sorted(own.keys() - given.keys())
        if missing:
            raise ValueError(f"missing weights: {', '.join(missing)}")
        for name, tensor in own.items():
            if tensor.shape != given[name].shape:
                raise ValueError(f"{name} has shape {tuple(given[name].shape)}, "
                                 f"the config asks for {tuple(tensor.shape)}")
        return given


# --- config, device, positions -------------------------------------------------------------------

def read_config(raw: dict) -> GPTConfig:
    """The dict of a published config -> GPTConfig. ValueError as of `known_fields` in
    model_files.py, or where values do not fit together."""
    kinds = {f.name: get_args(f.type) or (f.type,) for f in fields(GPTConfig)}
    return GPTConfig(**known_fields(raw, kinds))


def config_of(directory: str) -> GPTConfig:
    """The config of a model directory. ValueError, in one line, where it is none of ours."""
    path = config_path(directory)
    try:
        with open(path, encoding="utf-8") as f:
            return read_config(json.load(f))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    except (ValueError, TypeError, AttributeError, OSError) as e:
        raise ValueError(f"{path}: {e}") from None


def device_of(name: str) -> str:
    """`auto`: cuda where PyTorch sees one, else cpu. ValueError for `cuda` where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this PyTorch sees no CUDA device; use --device=cpu")
    return name


def _sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sines, then cosines, periods log-spaced from 4 to `length` tokens."""
    half = max(1, width // 2)
    periods = torch.logspace(math.log10(4), math.log10(max(4, length)), half)
    angle = torch.arange(length).float()[:, None] * (2 * math.pi / periods)
    table = torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
    return F.pad(table, (0, width - table.shape[1]))
