"""The weight-sparse GPT, as a chain of sublayers whose every node can be read or replaced.

- One class for every option of the published format: sinks, bigram table, concatenated positions.
- `model.embed(idx)`, then `model.sublayers` (attention 0, MLP 0, attention 1, ...), then
  `model.unembed(h, idx)`: the forward pass is a walk along that chain, and so is everything else.
- `model(idx, nodes=fn)`: each sublayer passes each node site through `fn(site, x)` after AbsTopK.
  Recording, masking, ablating and steering are all such a function. None: no trace of it.
- `GPT.load(dir)` / `model.save(dir)`: `beeg_config.json` + `final_model.pt`, as published.

Paper sections 2.1 and A.1; the eight node sites of a layer are in `SITES`.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Callable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import write_atomic
from kernels import abstopk, linear, sink_attention

NodeFn = Callable[[str, Tensor], Tensor]  # (site, activations (B, T, width)) -> activations

# The node sites of a layer in forward order, with the name under which the published config
# lists the AbsTopK at that place.
SITES = {
    "attn.act_in": "attn_in", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
    "attn.resid_delta": "attn_out",
    "mlp.act_in": "mlp_in", "mlp.post_act": "mlp_neuron", "mlp.resid_delta": "mlp_out",
}


@dataclass
class GPTConfig:
    """The published config, with the defaults that its own loader gives to absent keys."""
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    d_head: Optional[int] = None          # default d_model // n_head; n_head * d_head may differ from d_model
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
    d_pos_emb: Optional[int] = None       # width of positions concatenated to each read; None = added once
    dropout_cat_pos_emb: bool = False
    sinusoidal_cat_pos_emb: bool = False
    enable_sparse_kernels: bool = False   # the authors' own inference kernels; changes no result
    flash: bool = True                    # False = plain softmax over a T x T matrix, to compare with
    sink: bool = False

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d_head is None:
            self.d_head = self.d_model // self.n_head
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        for name in ("d_head", "d_mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, allowed in (("residual_activation_type", ("identity", "relu")),
                              ("activation_type", ("gelu", "relu"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.sinusoidal_cat_pos_emb and self.d_pos_emb is None:
            raise ValueError("sinusoidal_cat_pos_emb needs d_pos_emb")
        known = {*SITES.values(), "resid_post_attn", "resid_post_mlp"}
        for place in self.afrac_loctypes.split(",") if self.afrac_loctypes else ():
            if place not in known:
                raise ValueError(f"afrac_loctypes names '{place}'; known are {', '.join(sorted(known))}")
        if self.afrac is not None and not (0 < self.afrac <= 1 and int(self.afrac * min(self.d_model, self.n_head * self.d_head, self.d_mlp)) >= 1):
            raise ValueError(f"afrac {self.afrac} keeps no channel of the narrowest site, or more than all")

    def site_width(self, site: str) -> int:
        """Channels of a node site such as `3.attn.q`."""
        name = site.split(".", 1)[1]
        if name in ("attn.q", "attn.k", "attn.v"):
            return self.n_head * self.d_head
        if name == "mlp.post_act":
            return self.d_mlp
        return self.d_model + (self.d_pos_emb or 0) if name.endswith("act_in") else self.d_model


def _norm(config: GPTConfig, width: int) -> nn.Module:
    return nn.RMSNorm(width) if config.rms_norm else nn.LayerNorm(width, bias=config.ln_bias)


class Linear(nn.Linear):
    """nn.Linear that skips the zeros of a sparse matrix where that is faster (kernels.py)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.known = {}  # the nonzeros of a frozen weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.known)


class SinkLogit(nn.Module):
    def __init__(self, n_head: int):
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(n_head))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_head * config.d_head
        self.c_attn = Linear(config.d_model + (config.d_pos_emb or 0), 3 * width, bias=config.bias)
        self.c_proj = Linear(width, config.d_model, bias=config.bias)
        self.attn_imp = SinkLogit(config.n_head) if config.sink else None  # a module for the published key's sake
        self.resid_dropout = nn.Dropout(config.dropout)
        self.config = config

    def forward(self, x: Tensor, node: NodeFn) -> Tensor:
        c = self.config
        B, T, _ = x.shape
        q, k, v = self.c_attn(node("attn.act_in", x)).chunk(3, dim=-1)  # each (B, T, H * d_head)
        q, k, v = node("attn.q", q), node("attn.k", k), node("attn.v", v)
        q, k, v = (z.view(B, T, c.n_head, c.d_head).transpose(1, 2) for z in (q, k, v))  # (B, H, T, d_head)
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, c.n_head * c.d_head)
        y = self.resid_dropout(self.c_proj(node("attn.y", y)))
        return node("attn.resid_delta", y)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d_head)) v over earlier positions, the sink in the denominator."""
        sink = self.attn_imp.sink_logit if self.attn_imp else None
        dropout_p = self.config.dropout if self.training else 0.0
        if self.config.flash:
            if sink is not None:
                return sink_attention(q, k, v, sink, dropout_p)
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        B, H, T, D = q.shape
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        if sink is not None:
            scores = torch.cat([sink.to(scores.dtype).view(1, H, 1, 1).expand(B, H, T, 1), scores], -1)
        p = F.dropout(scores.softmax(-1), dropout_p)
        return (p if sink is None else p[..., 1:]) @ v


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.d_model + (config.d_pos_emb or 0), config.d_mlp, bias=config.bias)
        self.c_proj = Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.act = F.gelu if config.activation_type == "gelu" else F.relu
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, node: NodeFn) -> Tensor:
        x = node("mlp.post_act", self.act(self.c_fc(node("mlp.act_in", x))))
        return node("mlp.resid_delta", self.dropout(self.c_proj(x)))


class Block(nn.Module):
    """Two sublayers, each h -> h + f(norm(h)); the model's chain is made of these."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1, self.attn = _norm(config, config.d_model), Attention(config)
        self.ln_2, self.mlp = _norm(config, config.d_model), MLP(config)
        if config.d_pos_emb is not None:
            self.ln_p1, self.ln_p2 = _norm(config, config.d_pos_emb), _norm(config, config.d_pos_emb)
        self.pos_dropout = nn.Dropout(config.dropout if config.dropout_cat_pos_emb else 0.0)
        self.config, self.layer = config, layer
        self.topk_at = set(config.afrac_loctypes.split(",")) if config.afrac is not None else set()

    def attention(self, h: Tensor, nodes: Optional[NodeFn] = None, wpe: Optional[Tensor] = None) -> Tensor:
        return self._sublayer(h, nodes, wpe, "resid_in", self.ln_1, "ln_p1", self.attn, "resid_post_attn")

    def feedforward(self, h: Tensor, nodes: Optional[NodeFn] = None, wpe: Optional[Tensor] = None) -> Tensor:
        return self._sublayer(h, nodes, wpe, "resid_mid", self.ln_2, "ln_p2", self.mlp, "resid_post_mlp")

    def _sublayer(self, h, nodes, wpe, site, norm, norm_p, f, loctype):
        def node(site: str, x: Tensor) -> Tensor:
            """Decision 2: the one place that every node site passes through."""
            x = self._topk(SITES.get(site), x)
            if self.config.debug_nans and not x.isfinite().all():
                raise FloatingPointError(f"not finite at {self.layer}.{site}")
            return x if nodes is None else nodes(f"{self.layer}.{site}", x)

        h = node(site, h)
        x = norm(h)
        if wpe is not None:  # positions are read-only channels beside the stream
            pos = self.pos_dropout(getattr(self, norm_p)(wpe[: h.shape[1]]))
            x = torch.cat([x, pos.to(x.dtype).expand(h.shape[0], -1, -1)], dim=-1)
        h = h + f(x, node)
        if self.config.residual_activation_type == "relu":
            h = h.relu()
        return self._topk(loctype, h)

    def _topk(self, loctype: Optional[str], x: Tensor) -> Tensor:
        return abstopk(x, int(self.config.afrac * x.shape[-1])) if loctype in self.topk_at else x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        c = self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.d_model),
            wpe=nn.Embedding(c.block_size, c.d_model if c.d_pos_emb is None else c.d_pos_emb),
            h=nn.ModuleList(Block(c, i) for i in range(c.n_layer)),
            ln_f=_norm(c, c.d_model),
        ))
        self.drop = nn.Dropout(c.dropout)
        self.lm_head = Linear(c.d_model, c.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(c.vocab_size))
        self.bigram_table = None
        if c.enable_bigram_table:  # row = current token, added to the logits; dense and not counted in L0
            table = torch.zeros(c.vocab_size, c.vocab_size)
            if c.learnable_bigram_table:
                self.bigram_table = nn.Parameter(table)
            else:
                del self.bigram_table
                self.register_buffer("bigram_table", table)
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))
            elif p.dim() == 2 and name != "bigram_table":
                nn.init.normal_(p, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
        if c.tied_unembed:
            self.transformer.wte.weight = self.lm_head.weight
        if c.sinusoidal_cat_pos_emb:
            self.transformer.wpe.weight.requires_grad_(False).copy_(_sinusoids(c.block_size, c.d_pos_emb))

    # --- the chain ---------------------------------------------------------------------------

    def embed(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> residual stream (B, T, d_model). ValueError if T exceeds block_size."""
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens do not fit the model's block_size {self.config.block_size}")
        h = self.transformer.wte(idx)
        if self.config.d_pos_emb is None:
            h = h + self.transformer.wpe.weight[: idx.shape[1]]
        return self.drop(h)

    @property
    def sublayers(self) -> list[Callable[..., Tensor]]:
        """Attention 0, MLP 0, attention 1, ...: each `f(h, nodes=None)`, (B, T, d_model) -> the same."""
        wpe = self.transformer.wpe.weight if self.config.d_pos_emb is not None else None
        return [partial(f, wpe=wpe) for b in self.transformer.h for f in (b.attention, b.feedforward)]

    def run(self, h: Tensor, start: int = 0, nodes: Optional[NodeFn] = None) -> Tensor:
        """The stream (B, T, d_model) before sublayer `start` -> the stream after the last sublayer."""
        for f in self.sublayers[start:]:
            if self.config.grad_checkpointing and self.training:
                h = checkpoint(f, h, nodes, use_reentrant=False)
            else:
                h = f(h, nodes)
        return h if nodes is None else nodes("final_resid", h)

    def unembed(self, h: Tensor, idx: Tensor) -> Tensor:
        """Final stream (B, T, d_model) and the tokens there (B, T) -> logits (B, T, vocab)."""
        logits = linear(self.transformer.ln_f(h), self.lm_head.weight, self.final_logits_bias, self.lm_head.known).to(self.final_logits_bias.dtype)
        if self.bigram_table is not None:
            logits = F.embedding(idx, self.bigram_table).add_(logits)  # in place: this is the largest tensor there is
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
        """Extend prompts (B, T) by sampling; temperature 0 takes the likeliest token."""
        for _ in range(max_new_tokens):
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

    # --- the published format ----------------------------------------------------------------

    def save(self, path: str) -> None:
        """Write `beeg_config.json` and `final_model.pt` into the directory `path`, atomically."""
        os.makedirs(path, exist_ok=True)
        text = json.dumps(asdict(self.config), indent=1)
        write_atomic(os.path.join(path, "beeg_config.json"), lambda f: f.write(text.encode()))
        write_atomic(os.path.join(path, "final_model.pt"), partial(torch.save, self.state_dict()))

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> "GPT":
        """A published model directory, or a run of ours, in eval mode.

        ValueError with one line that names the keys where config or weights do not fit.
        """
        config_path, weights_path = (os.path.join(path, n) for n in ("beeg_config.json", "final_model.pt"))
        try:
            with open(config_path) as f:
                config = read_config(json.load(f))
            state = torch.load(weights_path, map_location=device, weights_only=True)
        except FileNotFoundError as e:
            raise ValueError(f"{path} is not a model directory: {os.path.basename(e.filename)} is missing") from None
        except json.JSONDecodeError as e:
            raise ValueError(f"{config_path} is not JSON: {e}") from None
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{config_path}: {e}") from None
        except Exception as e:  # torch.load raises many kinds on a truncated or foreign file
            raise ValueError(f"{weights_path} is truncated or not a weights file ({type(e).__name__})") from None
        model = cls(config).to(device)
        try:
            model.load_weights(state)
        except (ValueError, AttributeError) as e:
            raise ValueError(f"{weights_path}: {e}") from None
        return model.eval()

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """A published state dict; absent and unknown keys are a ValueError that names them."""
        own = self.state_dict()
        state = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.endswith(".attn.bias")}  # an old causal-mask buffer
        if unknown := sorted(state.keys() - own.keys()):
            raise ValueError(f"unknown weights: {', '.join(unknown)}")
        state.setdefault("final_logits_bias", own["final_logits_bias"])  # absent from some published files
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(f"missing weights: {', '.join(missing)}")
        if wrong := [k for k in own if own[k].shape != state[k].shape]:
            raise ValueError(f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)}, the config asks for {tuple(own[wrong[0]].shape)}")
        self.load_state_dict(state)


def read_config(raw: dict) -> GPTConfig:
    """The dict of a `beeg_config.json` -> GPTConfig; old names understood, unknown keys a ValueError."""
    raw = {{"n_mlp": "d_mlp", "n_embd": "d_model"}.get(k, k): v for k, v in raw.items()}
    if raw.pop("use_tied_aux_matrix", False):
        raise ValueError("use_tied_aux_matrix must be false: no published code computes it")
    for key in ("bigram_table_rank", "pfrac", "expansion_factor", "expansion_factor_mlp",
                "debug_exact_topk", "sparse_matmul_impl"):
        raw.pop(key, None)  # keys of the authors' training code, without effect on the forward pass
    if unknown := sorted(raw.keys() - {f.name for f in fields(GPTConfig)}):
        raise ValueError(f"unknown config keys: {', '.join(unknown)}")
    return GPTConfig(**raw)


def _sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sines then cosines, periods log-spaced from 4 to `length` tokens."""
    half = max(1, width // 2)
    periods = torch.logspace(math.log10(4), math.log10(max(4, length)), half)
    angle = torch.arange(length).float()[:, None] * (2 * math.pi / periods)
    table = torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
    return F.pad(table, (0, width - table.shape[1]))
