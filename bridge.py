"""Bridges couple a sparse model to a frozen dense one: what is edited in the one steers the other.

- The sparse model learns from scratch, together with its bridges, by the loss of the pair
  (coupled.py). Checkpoints, resume, processes and log are train.py's.
- --eval: what each bridge loses, and the loss of each hybrid pass.
- --fit: bridges between two models that both stay as they are, by ridge regression (`ridge_map`).

    python bridge.py --config=configs/demo_bridge.toml  # or torchrun --nproc_per_node=N bridge.py
    python bridge.py --config=configs/demo_bridge.toml --eval
    python bridge.py --fit --sparse=out/demo --dense=out/dense --out_dir=out/fitted

Train the dense model with train.py, use the pair with steer.py. Paper sections 2.3 and A.3.
"""
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse, to_toml, write_atomic

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coupled import (TERMS, Bridges, Coupled, couple, error_and_moment, load_bridged, run_from,
                     streams)
from data.tinypython.tokenizer import tokenizer_hash, tokenizer_in
from jobs import Job, Run, leave
from model import GPT, device_of
from model_files import LAYOUTS, layout_of, weights_files
from tokens import inputs_and_targets, tokenizer_of, window_of
from train import (TrainConfig, begin, evaluate, evaluation_text, loop, new_model, of_the_family,
                   optimizer_of, over_parts)

HYBRIDS = ("dense_to_sparse", "sparse_to_dense")
MEASURED = ("error_encoder", "moment_encoder", "error_decoder", "moment_decoder", *HYBRIDS,
            "dense_from_mean")  # of each batch of windows, at each site
HELD_OUT = 8  # --fit keeps every 8th window out of the regression, to choose the ridge on
# What a fitted run's train.toml says: the settings that a fit has.
FITTED = ("out_dir", "data_dir", "fit", "sparse", "dense", "fit_tokens", "ridge", "bridge_afrac",
          "block_size", "tokenizer_hash")
# What may lie beside a published model: the list of its files of weights, and its tokenizer.
BESIDE_A_MODEL = ("model.safetensors.index.json", "tokenizer.json", "encoder.json", "vocab.bpe")


@dataclass
class BridgeConfig(TrainConfig):
    out_dir: str = "out/demo_bridge"
    dense: str = "out/demo_dense"  # a model directory, of the same depth; it does not learn
    bridge_lr: float = bounded(0.005, above=0)  # on the schedule of lr, its growth included
    bridge_afrac: float = bounded(0.25, above=0, at_most=1)  # share that an encoder's AbsTopK keeps
    # weights of the terms, of each site; the next-token loss has weight 1
    w_nmse_encoder: float = bounded(0.2, at_least=0)
    w_nmse_decoder: float = bounded(0.2, at_least=0)
    w_kl_sparse: float = bounded(1.0, at_least=0)
    w_kl_dense: float = bounded(1.0, at_least=0)
    bridge_rows: int = bounded(0, at_least=0)  # sequences of a batch that the terms see; 0 = all
    recompute: bool = True  # hold one site's hybrid passes at a time, and run them forward twice
    eval: bool = False      # measure a bridged run instead of training one
    fit: bool = False       # bridge `sparse` and `dense` as they are, instead of training one
    sparse: str = ""        # a model directory, for --fit
    fit_tokens: int = bounded(500_000, at_least=1)  # of the training data, for --fit
    # shares of the inputs' mean variance; --fit takes the one that is best on held-out windows
    ridge: tuple = bounded((1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1), above=0)


# --- what the bridges lose -------------------------------------------------------------------

@torch.no_grad()
def measure(net: Coupled, run: Run) -> dict:
    """Per part of the validation data: the losses of both models (nats), and per site the NMSE of
    encoder and decoder, the loss of both hybrid passes, that of the dense model with its mean
    stream there, and how much of the loss beyond the dense model's own that this costs each hybrid
    pass recovers (1: all)."""
    net.sparse.eval()  # the dense model always is
    T = run.cfg.block_size
    starts = np.linspace(0, len(run.train) - T - 1, 64).astype(np.int64)  # plenty for a mean
    reference, _ = inputs_and_targets(run.train, starts, T, run.device)
    mean = [h.mean((0, 1)) for h in streams(net.dense, reference)]

    def losses(x: Tensor, y: Tensor) -> Tensor:
        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

        dense_h = streams(net.dense, x)
        sparse_h = streams(net.sparse, x)
        values = [loss(net.sparse.unembed(sparse_h[-1], x)),
                  loss(net.dense.unembed(dense_h[-1], x))]
        for i, (d, s) in enumerate(zip(dense_h, sparse_h)):
            encoded = net.bridges.encode(i, d)
            decoded = net.bridges.decode(i, s)
            values += [*error_and_moment(encoded, s),  # in the order of MEASURED
                       *error_and_moment(decoded, d),
                       loss(run_from(net.sparse, i, encoded, x)),
                       loss(run_from(net.dense, i, decoded, x)),
                       loss(run_from(net.dense, i, mean[i].expand_as(d), x))]
        return torch.stack(values)

    measured = {}
    for part, values in over_parts(losses, 2 + len(MEASURED) * len(mean), run).items():
        of_sites = {name: values[2 + j :: len(MEASURED)] for j, name in enumerate(MEASURED)}
        m = {"sparse": values[0], "dense": values[1]}
        for way in ("encoder", "decoder"):
            # of all windows at once: the mean of the ratios of batches would depend on the batches
            errors = of_sites.pop(f"error_{way}")
            moments = of_sites.pop(f"moment_{way}")
            m[f"nmse_{way}"] = [error / moment for error, moment in zip(errors, moments)]
        m |= of_sites
        for name in HYBRIDS:
            # of what is lost without the stream
            m[f"recovered_{name}"] = [(without - x) / (without - m["dense"])
                                      for without, x in zip(m["dense_from_mean"], m[name])]
        measured[part] = m
    net.sparse.train()
    return measured


def bridge_text(measured: dict) -> str:
    """`measure`'s result as a table."""
    lines = []
    for part, m in measured.items():
        lines += [f"{part}: dense model {m['dense']:.3f} nats, sparse model {m['sparse']:.3f}",
                  "  site   NMSE encoder  decoder   dense -> sparse: nats  recovered"
                  "   sparse -> dense: nats  recovered"]
        for i in range(len(m["nmse_encoder"])):
            line = f"  {i:4}   {m['nmse_encoder'][i]:12.3f}  {m['nmse_decoder'][i]:7.3f}"
            for name in HYBRIDS:
                line += f"   {m[name][i]:21.3f}  {m[f'recovered_{name}'][i]:9.1%}"
            lines.append(line)
    return "\n".join(lines)


# --- bridges between two models that stay as they are ----------------------------------------

def add_moments(sums: Tensor, net: Coupled, idx: Tensor) -> None:
    """Add tokens idx (B, T) to the sums (n_sites, w, w), double, of z' z at each site: z is a one,
    the dense stream and the sparse one side by side, w = 1 + d_dense + d_sparse. Only what is on
    the diagonal and above it counts."""
    for total, d, s in zip(sums, streams(net.dense, idx), streams(net.sparse, idx)):
        z = torch.cat([torch.ones_like(d[..., :1]), d, s], -1).flatten(0, 1).double()
        for i in range(0, z.shape[-1], 512):  # most of what is below is not computed
            block = slice(i, i + 512)
            total[block, i:].addmm_(z[:, block].T, z[:, i:])


@torch.no_grad()
def gather(net: Coupled, run: Run) -> Tensor:
    """(2, n_sites, w, w): the `add_moments` of the windows to fit, and of those held out; both
    evenly spaced over the training data. ValueError where these or fit_tokens are too few."""
    T = run.cfg.block_size
    n_windows = min(run.cfg.fit_tokens, len(run.train) - 1) // T
    if n_windows < HELD_OUT:
        raise ValueError(f"a fit needs {HELD_OUT} windows of {T} tokens; {run.cfg.data_dir} has "
                         f"{len(run.train)} tokens, fit_tokens is {run.cfg.fit_tokens}")
    starts = np.linspace(0, len(run.train) - T - 1, n_windows).astype(np.int64)
    held_out = np.arange(n_windows) % HELD_OUT == HELD_OUT - 1
    width = 1 + net.dense.config.d_model + net.sparse.config.d_model
    shape = (2, len(net.bridges.encoders), width, width)
    sums = torch.zeros(shape, dtype=torch.double, device=run.device)

    rows = max(1, 2048 // T)  # few tokens at a time: the streams at all sites are held
    batches = []
    for part, chosen in zip(sums, (starts[~held_out], starts[held_out])):
        batches += [(part, chosen[i : i + rows]) for i in range(0, len(chosen), rows)]
    began = time.monotonic()
    for done, (part, chosen) in enumerate(batches, 1):
        idx, _ = inputs_and_targets(run.train, chosen, T, run.device)
        add_moments(part, net, idx)
        if done % math.ceil(len(batches) / 10) == 0 or done == len(batches):
            share = done / len(batches)
            seconds = time.monotonic() - began
            run.say(f"{share:4.0%} of {n_windows * T:,} tokens  "
                    f"{seconds / share * (1 - share) / 60:.1f} min left")
    if not sums.isfinite().all():
        raise ValueError("a stream of one of the models is not finite")
    return sums


def about(sums: Tensor, mean: Tensor) -> Tensor:
    """One site's `add_moments` (w, w) -> the mean products (w - 1, w - 1) of what the channels of
    both streams are beyond `mean` (w - 1,)."""
    moments = (sums.triu() + sums.triu(1).T) / sums[0, 0]  # the number of tokens
    own = moments[0, 1:]
    return moments[1:, 1:] - torch.outer(own, mean) - torch.outer(mean, own - mean)


def ridge_map(fit: Tensor, held_out: Tensor, x: slice, y: slice, ridges) -> tuple:
    """Ridge regression of the channels y on the channels x, of two `about` (w - 1, w - 1): the map
    (n_y, n_x) whose squared error held out is least; its ridge; and that error, summed over y."""
    # Along the principal axes of x each ridge only divides, and its error is a quadratic form: all
    # of them together cost little more than one.
    variance, axes = torch.linalg.eigh(fit[x, x])
    along = fit[y, x] @ axes
    linear = (along * (held_out[y, x] @ axes)).sum(0)
    square = (along.T @ along) * (axes.T @ held_out[x, x] @ axes)
    least = None
    for ridge in ridges:
        # rounded, the smallest variance may lie below 0; a stream that is constant has none at all
        shrunk = 1 / (variance.clamp(min=0) + ridge * variance.mean().clamp(min=1e-30))
        error = held_out[y, y].trace() - 2 * shrunk @ linear + shrunk @ square @ shrunk
        if least is None or error < least[2]:
            least = (along * shrunk @ axes.T, ridge, error)
    return least


@torch.no_grad()
def fit_bridges(net: Coupled, sums: Tensor, ridges) -> Iterator[str]:
    """Set encoders and decoders by what `gather` returned; a line for each site that is done.

    An encoder is the regression, before its AbsTopK. A decoder reads the sparse model's stream,
    which ends in no AbsTopK: for it the regression is the best that a linear map can be.
    """
    yield "fitted, held out:   encoder's NMSE before AbsTopK, ridge   decoder's NMSE, ridge"
    dense = slice(0, net.dense.config.d_model)
    sparse = slice(net.dense.config.d_model, None)
    for i, (fit, held_out) in enumerate(zip(*sums)):
        mean = fit[0, 1:] / fit[0, 0]
        second = held_out.diagonal()[1:] / held_out[0, 0]  # the moments that an NMSE is measured by
        fit = about(fit, mean)
        held_out = about(held_out, mean)
        line = f"  site {i:2}"
        for layer, x, y, width in ((net.bridges.encoders[i], dense, sparse, 41),
                                   (net.bridges.decoders[i], sparse, dense, 17)):
            weight, ridge, error = ridge_map(fit, held_out, x, y, ridges)
            layer.weight.copy_(weight)
            layer.bias.copy_(mean[y] - weight @ mean[x])
            line += f"{error / second[y].sum():{width}.3f}, {ridge:5.0e}"
        yield line


def write_fitted(cfg: BridgeConfig, bridges: Bridges) -> None:
    """A fit's run directory: bridges, settings, and the sparse model's files as they are, so that
    its circuits are this run's too. OSError where it cannot be written."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    write_atomic(os.path.join(cfg.out_dir, "bridges.pt"), partial(torch.save, bridges.state_dict()))
    settings = [line for line in to_toml(cfg).splitlines() if line.split(" = ")[0] in FITTED]
    write_atomic(os.path.join(cfg.out_dir, "train.toml"), "\n".join([*settings, ""]).encode())
    weights = [os.path.basename(file) for file in weights_files(cfg.sparse)]
    # the config comes last: a directory is a model once all the rest is there
    for name in (*BESIDE_A_MODEL, *weights, LAYOUTS[layout_of(cfg.sparse)][0]):
        source = os.path.join(cfg.sparse, name)
        if os.path.exists(source):
            with open(source, "rb") as f:
                write_atomic(os.path.join(cfg.out_dir, name), partial(shutil.copyfileobj, f))


# --- the command -----------------------------------------------------------------------------

def describe(seen: tuple[Tensor, Tensor]) -> dict:
    """What `Coupled` saw, for log.jsonl: one value per site of each term."""
    next_token, terms = seen
    out = {"next_token": next_token.item()}
    for name, column in zip(TERMS, terms.T):
        out[name] = [round(x, 5) for x in column.tolist()]
    return out


def train(cfg: BridgeConfig) -> int:
    run = begin(cfg)
    # each process and micro-step looks at its share of bridge_rows
    pieces = run.world * cfg.grad_accum
    if cfg.bridge_rows % pieces or cfg.bridge_rows > cfg.batch_size:
        die(f"bridge_rows {cfg.bridge_rows} must be at most batch_size and a multiple of "
            f"{run.world} processes x {cfg.grad_accum} micro-steps")
    sparse = new_model(run)
    weights = [getattr(cfg, f"w_{term}") for term in TERMS]
    try:
        net = couple(sparse, cfg.out_dir, cfg.dense, run.device, run.cfg.tokenizer_hash,
                     cfg.bridge_afrac, weights=weights, rows=cfg.bridge_rows // pieces,
                     recompute=cfg.recompute)
    except (ValueError, OSError) as e:
        die(e)
    # plain Adam for the bridges: eps and decay of the config are made for sparse weights
    group = dict(params=list(net.bridges.parameters()), lr_scale=cfg.bridge_lr / cfg.lr, eps=1e-8)

    def evaluation() -> dict:
        return evaluate(sparse, run) | {"bridges": measure(net, run)}

    def text(measured: dict) -> str:
        return f"{evaluation_text(measured)}\n{bridge_text(measured['bridges'])}"

    job = Job(net, {"model": sparse, "bridges": net.bridges}, optimizer_of(cfg, sparse, [group]),
              evaluation, text, describe)
    return loop(run, job)


def begin_for(cfg: BridgeConfig, model_dir: str, model: GPT) -> Run:
    """`begin` with the windows of a model that is there. ValueError where the data are of another
    tokenizer, or hold other tokens."""
    c = model.config
    # the tokenizer is checked here, where that of the model is known
    run = begin(replace(cfg, block_size=window_of(model_dir, c.block_size), tokenizer_hash=""))
    own = tokenizer_in(model_dir)
    known = tokenizer_hash(own) if own else tokenizer_of(model_dir)
    of_data = run.cfg.tokenizer_hash
    if ("" not in (known, of_data) and known != of_data) or run.meta["vocab_size"] != c.vocab_size:
        raise ValueError(f"{cfg.data_dir} was prepared with another tokenizer than that of "
                         f"{model_dir}; give its --data_dir")
    run.cfg.tokenizer_hash = known or of_data
    return run


def fit(cfg: BridgeConfig, device: str) -> tuple[Coupled, Run]:
    """--fit: the pair whose bridges were fitted and written to out_dir. ValueError or OSError."""
    if any(os.path.exists(os.path.join(cfg.out_dir, config)) for config, _ in LAYOUTS.values()):
        raise ValueError(f"out_dir {cfg.out_dir} already holds a model; give another --out_dir")
    sparse = GPT.load(cfg.sparse, device).requires_grad_(False)
    run = begin_for(cfg, cfg.sparse, sparse)
    net = couple(sparse, cfg.out_dir, cfg.dense, device, run.cfg.tokenizer_hash, cfg.bridge_afrac)
    for line in fit_bridges(net, gather(net, run), cfg.ridge):
        run.say(line)
    write_fitted(run.cfg, net.bridges)
    return net.eval(), run


def main(argv: list[str]) -> int:
    cfg = of_the_family(parse(BridgeConfig, argv))
    if not cfg.eval and cfg.fit != bool(cfg.sparse):
        die("--fit and --sparse=DIR go together: DIR is the model that stays as it is")
    if not cfg.eval and not cfg.fit:
        return train(cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        die("--eval and --fit are for one process; call python bridge.py")
    try:
        device = device_of(cfg.device)
        if cfg.eval:  # also of a fitted run by its own train.toml, which says fit
            sparse = GPT.load(cfg.out_dir, device).requires_grad_(False)
            net = load_bridged(cfg.out_dir, cfg.dense, sparse, device)
            run = begin_for(cfg, cfg.out_dir, sparse)
        else:
            net, run = fit(cfg, device)
        measured = measure(net, run)
        write_atomic(os.path.join(cfg.out_dir, "bridges.json"), json.dumps(measured).encode())
    except (ValueError, OSError) as e:
        die(e)
    print(f"{bridge_text(measured)}\n{cfg.out_dir}/bridges.json")
    return 0


if __name__ == "__main__":
    as_script(main, leave)
