"""Speed figures, as ratios measured in one run.

    python bench.py [--config=configs/demo.toml]     # a minute and a half on 2 CPU cores
    python bench.py --device=cuda --dtype=bfloat16 --compile=true --n_layer=8 --d_model=2048 --block_size=256

- AbsTopK forward against torch.topk and scatter.
- A training step, while the density falls and after that, against the dense model's; and where its time goes: its
  kernels timed alone, forward and backward; the rest is the remainder.
- A step of mask learning against a plain forward and backward pass over prompts of as many and as long; and, in a wide
  model, with products by nonzeros against the same with dense products.
Random tokens; the time of a step does not depend on what they say. Medians of interleaved repetitions.
"""
import copy
import statistics
import sys
import time
from dataclasses import replace

import torch

import kernels
from config import parse
from data.tinypython.tokenizer import load_tokenizer
from kernels import abstopk
from optim import L0AdamW, clip_rms_, param_groups
from model import GPT
from prune import Gates, PruneConfig, learn_masks
from tasks import TASKS, load_pairs
from train import TrainConfig, autocast, device_of, model_config

VOCAB, STEPS = 2048, 3


def medians(jobs: dict, device: str, repeats: int = 9) -> dict[str, float]:
    """Seconds of each function, in turns, so that what slows the machine for a while slows them all."""
    times = {name: [] for name in jobs}
    for i in range(repeats + 2):
        for name, f in jobs.items():
            start = time.perf_counter()
            f()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:  # warm by then
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(ts) for name, ts in times.items()}


def stepper(cfg: TrainConfig, density: float) -> tuple[GPT, dict]:
    """A model of that density, and the parts of its training step as functions to be called in this order."""
    torch.manual_seed(0)
    device = device_of(cfg)
    model = GPT(model_config(cfg, VOCAB)).to(device)
    groups = param_groups(model, density)
    optimizer = L0AdamW(groups, lr=cfg.lr, min_per_neuron=cfg.min_per_neuron)
    idx = torch.randint(VOCAB, (cfg.batch_size, cfg.block_size), device=device)
    net = torch.compile(model) if cfg.compile else model

    def gradient():
        with autocast(cfg, device):
            loss = net(idx, idx)[1]
        loss.backward()

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
    c, device = model.config, device_of(cfg)

    def leaf(*shape):
        return torch.randn(cfg.batch_size, *shape, device=device, requires_grad=True)

    def both(f, *inputs):
        def run():
            with autocast(cfg, device):
                y = f(*inputs)
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        return run

    widths = [c.site_width(s) for s in model.sites]
    jobs = dict(
        products=[both(kernels.linear, leaf(cfg.block_size, m.in_features), m.weight)
                  for m in model.modules() if isinstance(m, torch.nn.Linear)],
        AbsTopK=[both(lambda x, k=int(c.afrac * w): abstopk(x, k), leaf(cfg.block_size, w)) for w in widths if c.afrac],
        attention=[both(b.attn.attend, *(leaf(c.n_head, cfg.block_size, c.d_head) for _ in "qkv")) for b in model.transformer.h])
    return {name: lambda fs=fs: [f() for f in fs] for name, fs in jobs.items()}


def steps(cfg: TrainConfig, repeats: int) -> None:
    """A step of the sparse model and of the dense one, and the sparse one's parts."""
    model, sparse = stepper(cfg, cfg.density)
    _, falling = stepper(cfg, 0.5)
    _, dense = stepper(replace(cfg, afrac=0.0), 1.0)
    alone = kernels_alone(cfg, model)
    jobs = {f"{kind} {part}": f for kind, parts in (("sparse", sparse), ("falling", falling), ("dense", dense)) for part, f in parts.items()}
    t = medians(jobs | alone, device_of(cfg), repeats)
    whole = {kind: sum(s for name, s in t.items() if name.startswith(kind)) for kind in ("sparse", "falling", "dense")}
    tokens, weights = cfg.batch_size * cfg.block_size, sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    print(f"{cfg.n_layer} layers, width {cfg.d_model}, {cfg.batch_size} x {cfg.block_size} tokens a step, density {cfg.density}:")
    print(f"  dense step {tokens / whole['dense']:,.0f} tokens/s ({6 * weights * tokens / whole['dense'] / 1e12:.2f} TFLOP/s in its products); of that speed, "
          f"a sparse step at density 0.5 has {whole['dense'] / whole['falling']:.2f}, at density {cfg.density} {whole['dense'] / whole['sparse']:.2f}")
    shares = {name: t[name] / whole["sparse"] for name in [*alone, "sparse update", "sparse projection"]}
    print("  of the sparse step: " + ", ".join(f"{n.removeprefix('sparse ')} {s:.1%}" for n, s in shares.items()) + f", rest {1 - sum(shares.values()):.1%}")


def mask_learning(model: GPT) -> dict:
    """Mask learning, the same with dense products, and plain training passes over batches of the same prompts; STEPS of each."""
    cfg, device = PruneConfig(steps=STEPS), model.lm_head.weight.device
    pairs = load_pairs(TASKS["single_double_quote"], load_tokenizer(), 64, "train", model.config.block_size).to(device)
    constants = {s: torch.zeros(model.config.site_width(s), device=device) for s in model.sites}

    def masks(limit=kernels.SPARSE):
        frozen = copy.deepcopy(model).requires_grad_(False)
        gates = Gates(frozen, False)

        def run():
            usual, kernels.SPARSE = kernels.SPARSE, limit
            learn_masks(frozen, pairs, constants, gates, cfg, lambda *_: None)
            kernels.SPARSE = usual
        return run

    def plain():
        for _ in range(STEPS):
            batch = pairs.take(torch.randint(len(pairs), (cfg.batch_pairs,)).to(device))
            model(batch.ids, batch.ids)[1].backward()

    return {"masks": masks(), "dense masks": masks(limit=-1), "plain": plain}


def topk_scatter(x: torch.Tensor, k: int) -> torch.Tensor:
    index = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def main(argv: list[str]) -> int:
    cfg = parse(TrainConfig, argv)
    device = device_of(cfg)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'}, torch {torch.__version__}, {cfg.dtype}")
    for rows, n in ((4096, 1024), (16384, 8192)):
        x = torch.randn(rows, n, device=device, dtype=getattr(torch, cfg.dtype))
        t = medians({"ours": lambda: abstopk(x, n // 4), "topk": lambda: topk_scatter(x, n // 4), "copy": lambda: x.clone()}, device, 5)
        print(f"AbsTopK forward, {rows} x {n}, k = {n // 4}: {t['topk'] / t['ours']:.1f} times as fast as torch.topk and scatter, "
              f"{t['copy'] / t['ours']:.0%} of a copy's speed")
    steps(cfg, 9)
    if device == "cpu":
        steps(replace(cfg, n_layer=4, d_model=512, batch_size=8), 3)
    model = stepper(cfg, cfg.density)[0]
    t = medians(mask_learning(model), device)
    print(f"mask learning: a step takes {t['masks'] / t['plain']:.2f} of a plain forward and backward pass of the same batch")
    model, parts = stepper(replace(cfg, d_model=1024, batch_size=1), 0.01)
    parts["projection"]()
    t = medians(mask_learning(model), device, 3)
    print(f"mask learning, width 1024, density 0.01: {t['dense masks'] / t['masks']:.1f} times as fast as with dense products")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
