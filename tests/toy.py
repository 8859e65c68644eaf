"""What the tests of circuits share: a task of digits, models made by hand for it, and a circuit
run without circuit.py."""
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prune
from circuit import all_edges, graph_of
from model import GPT, GPTConfig, SITES
from model_files import weights_hash
from ops import abstopk
from prune import PruneConfig, node_means
from tasks import TASKS, Task, load_pairs

SHAPE = dict(block_size=8, vocab_size=10, n_layer=1, n_head=2, d_head=3, d_model=6, d_mlp=7,
             rms_norm=True, bias=False, tied_unembed=False, grad_checkpointing=False)
EVERY_SITE = ",".join(SITES.values())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(std=0.5, keep=1.0, **options) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, "sink": True, **options})).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(std=std).mul_(torch.rand_like(p) < (1 if "ln_" in name else keep))
    return model


# --- the toy task -----------------------------------------------------------------------------
# digits are tokens; the first is 0 or 1, the answer is 2 or 3, the rest is noise, the last is 9

class Digits:
    n_vocab = 10

    def encode_ordinary(self, text):
        return [int(c) for c in text if c.isdigit()]

    def decode(self, ids):
        return "".join(map(str, ids))


def toy_prompts(r):
    rest = "".join(r.choice("45678") for _ in range(r.randint(3, 6))) + "9"
    return "0" + rest, "1" + rest


TOY = Task("toy", "say which of 0 and 1 came first", ("2", "3"), toy_prompts)
CIRCUIT = {"0.attn.act_in": [0], "0.attn.v": [1], "0.attn.resid_delta": [3]}
TOY_EDGES = [["0.attn.act_in", 0, "0.attn.v", 1, 2.0],
             ["0.attn.v", 1, "0.attn.resid_delta", 3, 2.0]]


def hand_made(sink=False) -> GPT:
    """Uniform attention copies channel 0 (+: token 0, -: token 1) to channel 3 (+: answer 2, -: 3).

    Tokens 4 and 5 disturb channel 0. Beside it: a live path that means nothing for the task
    (channel 1 to 1, with a bias toward one answer), an MLP that nothing reads, and a lit channel 2
    that keeps the norm from dividing by 0.
    """
    model = random_model(std=0.0, sink=sink)
    wte, head, block = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h[0]
    for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
        norm.weight.fill_(1.0)
    wte[:, 2] = 1.0
    wte[0, 0], wte[1, 0], wte[4, 0], wte[5, 0] = 2.0, -2.0, 0.5, -0.5
    wte[4:9, 1] = torch.tensor([0.5, 0.5, 1.0, 1.5, 0.2])
    attn_in, attn_out = block.attn.c_attn.weight, block.attn.c_proj.weight
    attn_in[12 + 1, 0], attn_out[3, 1] = 2.0, 2.0
    attn_in[12 + 0, 1], attn_out[1, 0] = 0.5, 0.5
    block.mlp.c_fc.weight[0, 0], block.mlp.c_proj.weight[5, 0] = 1.0, 1.0
    head[2, 3], head[3, 3], head[2, 1], head[2, 2] = 0.8, -0.8, 0.5, 0.4
    return model


def parallel_model(cross=0.0) -> GPT:
    """Four channels carry the deciding token, each disturbed by another token: the more are
    averaged, the lower the loss.

    `cross`: a further weight from each channel's read to the next one's value, which no one needs.
    """
    model = random_model(std=0.0, sink=False)
    wte, head, block = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h[0]
    for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
        norm.weight.fill_(1.0)
    wte[:, 4], wte[0, :4], wte[1, :4] = 1.0, 1.0, -1.0
    for i in range(4):
        wte[4 + i, i] = (-1) ** i * 1.2
        block.attn.c_attn.weight[12 + i, i], block.attn.c_proj.weight[5, i] = 1.0, 1.0
        block.attn.c_attn.weight[12 + (i + 1) % 4, i] = cross
    head[2, 5], head[3, 5] = 1.0, -1.0
    return model


def toy_setup(tmp_path, model=None, **options):
    """A saved model, its means over random tokens, and a config that prunes it within a second."""
    model = model or hand_made()
    model.save(str(tmp_path))
    np.random.default_rng(0).integers(0, 10, 4000).astype("<u2").tofile(tmp_path / "train.bin")
    constants = node_means(model, str(tmp_path / "train.bin"), 2048, 0)
    settings = dict(model=str(tmp_path), data=str(tmp_path), task="toy", target_loss=(0.4,),
                    mean_tokens=2048, train_pairs=256, fit_pairs=24, join_pairs=24, apart_pairs=0, heldout_pairs=100,
                    starts=1, steps=150, batch_pairs=16, lr=0.03, k_coef=0.01, k_rate=0.02,
                    init_noise_scale=0.01, init_noise_bias=0.1)
    return model, PruneConfig(**{**settings, **options}), constants


def prompts_as_data(folder, tokenizer):
    """Text of the kind that the tasks' prompts are, for the means: train.bin in `folder`."""
    r = random.Random(0)
    text = "\n".join(task.prompts(r)[r.random() < 0.5] for task in list(TASKS.values()) * 12)
    np.array(tokenizer.encode_ordinary(text), dtype="<u2").tofile(folder / "train.bin")
    return str(folder)


def loaded(model, cfg, constants):
    """What `prune.load` gives where the tokenizer is `Digits`."""
    return prune.Loaded(model, Digits(), constants, weights_hash(cfg.model), prune.data_hash(cfg))


def toy_circuits(tmp_path, model=None, **options):
    """The model, its config and the contents of its circuit files."""
    model, cfg, constants = toy_setup(tmp_path, model, **options)
    found = list(prune.prune(loaded(model, cfg, constants), TOY, cfg, lambda text: None))
    return model, cfg, json.loads(json.dumps(found))


def toy_circuit(tmp_path, model=None, **options):
    model, cfg, (circuit,) = toy_circuits(tmp_path, model, **options)
    return model, cfg, circuit


def toy_pairs(n=64, split="train"):
    return load_pairs(TOY, Digits(), n, split, 8)


def all_nodes(model, value=True):
    return {s: torch.full((model.config.site_width(s),), value) for s in model.sites}


def as_mask(model, nodes):
    mask = all_nodes(model, False)
    for site, channels in nodes.items():
        mask[site][channels] = True
    return mask


def kept_of(mask):
    return {s: m.nonzero().flatten().tolist() for s, m in mask.items() if m.any()}


def random_edges(model, share=0.7):
    return {key: kept & (torch.rand(kept.shape) < share) for key, kept in all_edges(model).items()}


def dense(model, edges):
    """(from site, to site) -> bool (to channels, from channels): where a nonzero weight is kept."""
    found = {}
    for (a, b), kept in edges.items():
        wires = graph_of(model).wires[a, b]
        found[a, b] = torch.zeros(model.config.site_width(b), model.config.site_width(a), dtype=torch.bool)
        found[a, b][wires.to[kept], wires.source[kept]] = True
    return found


def without_afrac(model) -> GPT:
    """A model of the same weights whose config names no AbsTopK."""
    free = GPT(replace(model.config, afrac=None)).eval().requires_grad_(False)
    free.load_weights(model.state_dict())
    return free.to(model.lm_head.weight.dtype)


# --- a circuit run without circuit.py -------------------------------------------------------------

def by_hand(model, mask, edges, means):
    """The node function of a circuit: each site is computed anew from the one that it reads, every
    weight between two nodes that `edges` lacks seeing its source's mean; then nodes outside `mask`
    are put at their means, values where they were gathered."""
    c, seen, edges = model.config, {}, dense(model, edges)
    width = c.n_head * c.d_head

    def fn(site, x):
        seen[site] = x
        if site.endswith("attn.y"):  # a value is held once its head has gathered it
            value = site[:-1] + "v"
            seen[site] = torch.where(mask[value], x, means[value])
            return seen[site]
        if site not in mask:
            return x
        layer, part = site.split(".", 1)
        block = model.transformer.h[int(layer)]
        start, linear = {
            "attn.q": ("attn.act_in", block.attn.c_attn),
            "attn.k": ("attn.act_in", block.attn.c_attn),
            "attn.v": ("attn.act_in", block.attn.c_attn),
            "attn.resid_delta": ("attn.v", block.attn.c_proj),
            "mlp.post_act": ("mlp.act_in", block.mlp.c_fc),
            "mlp.resid_delta": ("mlp.post_act", block.mlp.c_proj),
        }.get(part, (None, None))
        if start:
            a = f"{layer}.{start}"
            source = seen[a]
            if start == "attn.v":  # what of the values the attention passes on
                source = seen[f"{layer}.attn.y"]
            rows = slice(None)
            if part[-1] in "qkv":
                first = "qkv".index(part[-1]) * width
                rows = slice(first, first + width)
            x = torch.zeros_like(x) + (linear.bias[rows] if linear.bias is not None else 0)
            for i, row in enumerate(linear.weight[rows]):
                for j in row.nonzero().flatten().tolist():
                    cut = mask[a][j] and mask[site][i] and not edges[a, site][i, j]
                    x[..., i] += row[j] * (means[a][j] if cut else source[..., j])
            if part == "mlp.post_act":
                x = (F.gelu if c.activation_type == "gelu" else F.relu)(x)
            if c.afrac and SITES[part] in c.afrac_loctypes.split(","):
                x = abstopk(x, int(c.afrac * x.shape[-1]))
        seen[site] = x if part == "attn.v" else torch.where(mask[site], x, means[site])
        return seen[site]

    return fn


def plain_margins(model, mask, edges, means, pairs):
    rows = range(len(pairs.ids))
    logits = model(pairs.ids, nodes=by_hand(model, mask, edges, means))[0][rows, pairs.last]
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]


def nats(margin):
    return F.softplus(-margin.double()).mean().item()


def scaled(margin, scale, shift):
    sign = torch.tensor([1.0, -1.0]).double().repeat(len(margin) // 2)
    return scale * margin.double() + shift * sign


def best_fit(margin):
    """Scale and shift by Newton's method."""
    x = torch.stack([margin.double(), scaled(0 * margin, 0, 1.0)], 1)
    p = torch.tensor([1.0, 0.0]).double()
    for _ in range(100):
        s = torch.sigmoid(-(x @ p))
        p = p + torch.linalg.solve((x.T * (s * (1 - s))) @ x + 1e-9 * torch.eye(2), x.T @ s)
    return p.tolist()
