r"""Speed figures, as ratios measured in one run.

    python -m tools.bench [--config=configs/demo.toml]     # a minute and a half on 2 CPU cores
    python -m tools.bench --device=cuda --dtype=bfloat16 --compile=true \
        --n_layer=8 --d_model=2048 --block_size=256

- AbsTopK forward against torch.topk and scatter.
- A training step, while the density falls and after that, against the dense model's; and where its
  time goes: its operations timed alone, forward and backward; the rest is the remainder.
- A step of mask learning against a plain forward and backward pass over prompts of as many and as
  long; and, in a wide model, with products by nonzeros against the same with dense products.

Random tokens: the time of a step does not depend on what they say. Medians of interleaved
repetitions. Options are those of train.py.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, die, parse

import torch
from torch import Tensor, nn

import fast
from data.tinypython.tokenizer import load_tokenizer
from minimise import quiet
from model import GPT, device_of
from ops import abstopk, linear
from optim import L0AdamW, scale_rms_, param_groups
from masks import Gates, learn_masks
from prune import PruneConfig
from tasks import TASKS, load_pairs
from train import TrainConfig, autocast, model_config

VOCAB = 2048  # as in data/tinypython
MASK_STEPS = 3  # of mask learning, timed at once, since each call of it sets up first
WARM_UP = 2  # rounds that are not counted: compiling, first allocations

Jobs = dict[str, Callable[[], object]]


@dataclass
class BenchConfig(TrainConfig):
    """Settings as in training: what is measured is its step."""


def medians(jobs: Jobs, device: str, repeats: int = 9) -> dict[str, float]:
    """Seconds of each function, in turns: what slows the machine for a while slows them all."""
    times = {name: [] for name in jobs}
    for i in range(WARM_UP + repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


# --- AbsTopK ---------------------------------------------------------------------------------

def topk_scatter(x: Tensor, k: int) -> Tensor:
    """What one would write: the same result from torch's own parts."""
    index = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def abstopk_alone(cfg: TrainConfig, device: str) -> None:
    for rows, n in ((4096, 1024), (16384, 8192)):
        k = n // 4  # the paper's share of kept activations
        x = torch.randn(rows, n, device=device, dtype=getattr(torch, cfg.dtype))
        t = medians({
            "ours": partial(abstopk, x, k),
            "topk": partial(topk_scatter, x, k),
            "copy": x.clone,  # what reading and writing alone take
        }, device, repeats=5)
        print(f"AbsTopK forward, {rows} x {n}, k = {k}: {t['topk'] / t['ours']:.1f} times as fast "
              f"as torch.topk and scatter, {t['copy'] / t['ours']:.0%} of a copy's speed")


# --- a training step -------------------------------------------------------------------------

def stepper(cfg: TrainConfig, density: float) -> tuple[GPT, Jobs]:
    """A model of that density, and the parts of its step as functions to be called in turn."""
    torch.manual_seed(0)
    device = device_of(cfg.device)
    model = GPT(model_config(cfg, VOCAB)).to(device)
    groups = param_groups(model, density)
    params = [p for group in groups for p in group["params"]]
    optimizer = L0AdamW(groups, lr=cfg.lr, min_per_neuron=cfg.min_per_neuron)
    idx = torch.randint(VOCAB, (cfg.batch_size, cfg.block_size), device=device)
    net = torch.compile(model) if cfg.compile else model

    def gradient():
        with autocast(cfg, device):
            _, loss = net(idx, idx)
        loss.backward()

    def update():
        optimizer.set_schedule(cfg.lr, dense)  # so that step() does not project
        scale_rms_(params, cfg.grad_rms)
        optimizer.step()
        optimizer.zero_grad()

    def projection():
        optimizer.set_schedule(cfg.lr, as_trained)
        optimizer.project()

    return model, {"gradient": gradient, "update": update, "projection": projection}


def dense(target: float) -> float:
    """The density at a step's end, of that target: of a step that keeps all."""
    return 1.0


def as_trained(target: float) -> float:
    """The same once the density has fallen."""
    return target


def operations_alone(cfg: TrainConfig, model: GPT) -> Jobs:
    """The gradient's operations on random input of its shapes, forward and backward."""
    c = model.config
    device = device_of(cfg.device)
    heads = (c.n_head, cfg.block_size, c.d_head)

    def leaf(*shape):
        return torch.randn(cfg.batch_size, *shape, device=device, requires_grad=True)

    def forward_backward(f, *inputs):
        with autocast(cfg, device):
            y = f(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    products = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            x = leaf(cfg.block_size, module.in_features)
            products.append(partial(forward_backward, linear, x, module.weight))

    topk = []
    for site in model.sites if c.afrac else []:
        width = c.site_width(site)
        keep = partial(abstopk, k=int(c.afrac * width))
        topk.append(partial(forward_backward, keep, leaf(cfg.block_size, width)))

    attention = []
    for block in model.transformer.h:
        qkv = [leaf(*heads) for _ in range(3)]
        attention.append(partial(forward_backward, block.attn.attend, *qkv))

    return {
        "products": partial(call_all, products),
        "AbsTopK": partial(call_all, topk),
        "attention": partial(call_all, attention),
    }


def call_all(functions: list[Callable[[], None]]) -> None:
    for f in functions:
        f()


def training_steps(cfg: TrainConfig, repeats: int) -> None:
    """A step of the sparse model and of the dense one, and the sparse one's parts."""
    model, sparse = stepper(cfg, cfg.density)
    steps = {
        "sparse": sparse,
        "falling": stepper(cfg, 0.5)[1],
        "dense": stepper(replace(cfg, afrac=0.0), 1.0)[1],
    }
    jobs = {}
    for kind, parts in steps.items():
        for part, f in parts.items():
            jobs[f"{kind} {part}"] = f
    alone = operations_alone(cfg, model)
    t = medians(jobs | alone, device_of(cfg.device), repeats)

    whole = {kind: sum(t[f"{kind} {part}"] for part in steps[kind]) for kind in steps}
    tokens = cfg.batch_size * cfg.block_size
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    flops = 6 * weights * tokens  # forward and backward: three products of 2 each
    print(f"{cfg.n_layer} layers, width {cfg.d_model}, {cfg.batch_size} x {cfg.block_size} tokens "
          f"a step, density {cfg.density}:")
    print(f"  dense step {tokens / whole['dense']:,.0f} tokens/s "
          f"({flops / whole['dense'] / 1e12:.2f} TFLOP/s in its products); of that speed, "
          f"a sparse step at density 0.5 has {whole['dense'] / whole['falling']:.2f}, "
          f"at density {cfg.density} {whole['dense'] / whole['sparse']:.2f}")

    shares = {}
    for name in [*alone, "sparse update", "sparse projection"]:
        shares[name.removeprefix("sparse ")] = t[name] / whole["sparse"]
    said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"  of the sparse step: {said}, rest {1 - sum(shares.values()):.1%}")


# --- mask learning ---------------------------------------------------------------------------

def mask_learning(model: GPT) -> Jobs:
    """MASK_STEPS steps each of mask learning, of the same with dense products, and of plain
    training passes over batches of the same prompts."""
    cfg = PruneConfig(steps=MASK_STEPS)
    device = model.lm_head.weight.device
    task = TASKS["single_double_quote"]
    pairs = load_pairs(task, load_tokenizer(), 64, "train", model.config.block_size).to(device)
    constants = {}
    for site in model.sites:
        constants[site] = torch.zeros(model.config.site_width(site), device=device)

    def masks(limit: float):
        frozen = copy.deepcopy(model).requires_grad_(False)
        gates = Gates(frozen, tie_qk=False)

        def run():
            usual = fast.SPARSE
            fast.SPARSE = limit
            learn_masks(frozen, pairs, constants, gates, cfg, quiet)
            fast.SPARSE = usual
        return run

    def plain():
        for _ in range(MASK_STEPS):
            batch = pairs.take(torch.randint(len(pairs), (cfg.batch_pairs,)).to(device))
            _, loss = model(batch.ids, batch.ids)
            loss.backward()

    no_matrix = -1.0  # no density is so low that its zeros are skipped
    return {"masks": masks(fast.SPARSE), "dense masks": masks(no_matrix), "plain": plain}


def main(argv: list[str]) -> int:
    cfg = parse(BenchConfig, argv)
    try:
        device = device_of(cfg.device)
        model_config(cfg, VOCAB)
    except ValueError as e:
        die(e)

    name = f"{torch.get_num_threads()} CPU threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {cfg.dtype}")

    abstopk_alone(cfg, device)
    training_steps(cfg, repeats=9)
    if device == "cpu":  # a size at which products weigh more
        training_steps(replace(cfg, n_layer=4, d_model=512, batch_size=8), repeats=3)

    model, _ = stepper(cfg, cfg.density)
    t = medians(mask_learning(model), device)
    print(f"mask learning: a step takes {t['masks'] / t['plain']:.2f} "
          "of a plain forward and backward pass of the same batch")

    model, parts = stepper(replace(cfg, d_model=1024, batch_size=1), 0.01)
    parts["projection"]()  # to that density, without training
    t = medians(mask_learning(model), device, repeats=3)
    print(f"mask learning, width 1024, density 0.01: {t['dense masks'] / t['masks']:.1f} times "
          "as fast as with dense products")
    return 0


if __name__ == "__main__":
    as_script(main)
