"""Speed figures, as ratios measured in one run.

    python bench.py [--config=configs/demo.toml]     # half a minute on 2 CPU cores

- The projection's share of a training step, and the cost of sparsity: a step against the dense one.
- Where a sparse step goes: its kernels timed alone, forward and backward; the rest is the remainder.
- A step of mask learning against a plain forward and backward pass over prompts of as many and as long.
- AbsTopK forward against torch.topk and scatter.
Random tokens; the time of a step does not depend on what they say. Medians of interleaved repetitions.
"""
import copy
import statistics
import sys
import time
from dataclasses import replace

import torch

from config import parse
from data.tinypython.tokenizer import load_tokenizer
from kernels import abstopk
from optim import L0AdamW, clip_rms_, param_groups
from model import GPT
from prune import Gates, PruneConfig, learn_masks
from tasks import TASKS, load_pairs
from train import TrainConfig, model_config

VOCAB, REPEATS, STEPS = 2048, 9, 3


def stepper(cfg: TrainConfig) -> tuple[GPT, dict]:
    """A model, and the parts of its training step as functions to be called in this order."""
    torch.manual_seed(0)
    model = GPT(model_config(cfg, VOCAB))
    groups = param_groups(model, cfg.density)
    optimizer = L0AdamW(groups, lr=cfg.lr, min_per_neuron=cfg.min_per_neuron)
    idx = torch.randint(VOCAB, (cfg.batch_size, cfg.block_size))

    def gradient():
        model(idx, idx)[1].backward()

    def update():
        optimizer.set_schedule(cfg.lr, lambda target: 1.0)  # so that step() does not project
        clip_rms_([p for g in groups for p in g["params"]], cfg.grad_rms)
        optimizer.step()
        optimizer.zero_grad()

    def projection():
        optimizer.set_schedule(cfg.lr, lambda target: target)
        optimizer.project()

    return model, dict(gradient=gradient, update=update, projection=projection)


def kernels_alone(cfg: TrainConfig, model: GPT) -> dict:
    """The gradient's kernels on random input of the step's shapes, forward and backward."""
    c = model.config

    def leaf(*shape):
        return torch.randn(cfg.batch_size, *shape, requires_grad=True)

    def both(f, *inputs):
        y = f(*inputs)
        grad = torch.randn_like(y)
        return lambda: torch.autograd.grad(f(*inputs), inputs, grad)

    widths = [c.site_width(s) for s in model.sites]
    jobs = dict(
        matmul=[both(lambda x, w: x @ w.T, leaf(cfg.block_size, m.in_features), m.weight)
                for m in model.modules() if isinstance(m, torch.nn.Linear)],
        AbsTopK=[both(lambda x, k=int(c.afrac * w): abstopk(x, k), leaf(cfg.block_size, w)) for w in widths if c.afrac],
        attention=[both(b.attn.attend, *(leaf(c.n_head, cfg.block_size, c.d_head) for _ in "qkv")) for b in model.transformer.h])
    return {name: lambda fs=fs: [f() for f in fs] for name, fs in jobs.items()}


def mask_learning(model: GPT) -> dict:
    """Mask learning, and plain training passes over batches of the same prompts; STEPS of each."""
    pairs, cfg = load_pairs(TASKS["single_double_quote"], load_tokenizer(), 64, "train", model.config.block_size), PruneConfig(steps=STEPS)
    frozen = copy.deepcopy(model).requires_grad_(False)
    constants = {s: torch.zeros(model.config.site_width(s)) for s in model.sites}
    gates = Gates(frozen, False)

    def plain():
        for _ in range(STEPS):
            batch = pairs.take(torch.randint(len(pairs), (cfg.batch_pairs,)))
            model(batch.ids, batch.ids)[1].backward()

    return {"masks": lambda: learn_masks(frozen, pairs, constants, gates, cfg, lambda *_: None), "plain": plain}


def topk_scatter(x: torch.Tensor, k: int) -> torch.Tensor:
    index = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def main(argv: list[str]) -> int:
    cfg = parse(TrainConfig, argv)
    model, sparse = stepper(cfg)
    _, dense = stepper(replace(cfg, density=1.0, afrac=0.0))
    alone = kernels_alone(cfg, model)
    x = torch.randn(4096, 1024)
    forward = {"ours": lambda: abstopk(x, 256), "topk": lambda: topk_scatter(x, 256)}
    jobs = sparse | {f"dense {name}": f for name, f in dense.items()} | alone | mask_learning(model) | forward
    times = {name: [] for name in jobs}
    for i in range(REPEATS + 2):
        for name, f in jobs.items():
            start = time.perf_counter()
            f()
            if i >= 2:  # warm by then
                times[name].append(time.perf_counter() - start)
    t = {name: statistics.median(ts) for name, ts in times.items()}
    tokens, whole, whole_dense = cfg.batch_size * cfg.block_size, sum(t[n] for n in sparse), sum(t[f"dense {n}"] for n in dense)
    print(f"{cfg.n_layer} layers, width {cfg.d_model}, {cfg.batch_size} x {cfg.block_size} tokens a step, density {cfg.density}, "
          f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(f"sparse step {tokens / whole:,.0f} tokens/s, dense step {tokens / whole_dense:,.0f}; ratio {whole_dense / whole:.2f}")
    print(f"projection: {t['projection'] / whole:.1%} of a step")
    shares = {name: t[name] / whole for name in [*alone, "update", "projection"]}
    print("a step's shares: " + ", ".join(f"{n} {s:.1%}" for n, s in shares.items()) + f", rest {1 - sum(shares.values()):.1%}")
    print(f"a step of mask learning takes {t['masks'] / t['plain']:.2f} of a plain forward and backward pass")
    print(f"AbsTopK forward, 4096 x 1024, k = 256: {t['topk'] / t['ours']:.1f} times as fast as torch.topk and scatter")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
