"""train.py is the authors' training script: the losses, counts and supports of its runs, step for step.

Each NAME.json with its NAME.npz in tests/fixtures/authors_training, or in the folder that AUTHORS_FIXTURES names, is a
run of that script in float64; the README beside them says what they hold, how it starts and how close one comes.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from jobs import Job, Run
from model import GPT

FOLDER = Path(os.environ.get("AUTHORS_FIXTURES", Path(__file__).parent / "fixtures" / "authors_training"))
RUNS = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_there_are_runs_to_compare_with():
    assert RUNS


def settings(theirs: dict) -> train.TrainConfig:
    """Our configuration of one of their runs."""
    plain = theirs["plain"]
    return train.TrainConfig(
        n_layer=theirs["n_layer"], d_model=plain["d_model"], d_mlp=plain["d_mlp"], n_head=plain["n_head"],
        d_head=theirs["d_head"], block_size=theirs["n_ctx"], sink=theirs["attn_sink"], positions="added",
        afrac=theirs["afrac"] if theirs["afrac"] < 1 else 0.0,
        bigram="learned" if theirs["enable_bigram_table"] else "none",
        batch_size=theirs["global_bs"], max_steps=plain["max_steps"], lr=theirs["lr"],
        warmup=theirs["lr_warmup_frac"], density=plain["density"], embed_density=plain["embed_density"], bias_density=1.0,
        anneal_start=theirs["pfrac_anneal_start_frac"], anneal_end=theirs["pfrac_anneal_stop_frac"],
        min_per_neuron=theirs["minimum_alive_per_neuron"], weight_decay=theirs["weight_decay"],
        beta1=theirs["adam_beta1"], beta2=theirs["adam_beta2"], eps=theirs["eps"])


def start(model: GPT, seed: int) -> None:
    """The weights that a run begins with: drawn in the order of the names."""
    rng = np.random.RandomState(seed)
    for name, p in sorted(model.named_parameters()):
        if name == "transformer.wpe.weight" or name.endswith(("bias", "sink_logit")):
            p.data.zero_()
        elif name == "bigram_table":
            p.data.copy_(torch.from_numpy(0.02 * rng.random_sample(p.shape)))
        elif p.dim() == 2:
            p.data.copy_(torch.from_numpy(0.02 * rng.standard_normal(p.shape)))
        else:
            p.data.fill_(1.0)


@pytest.fixture
def in_float64():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNS)
def test_losses_counts_and_supports_are_theirs(name, monkeypatch, in_float64):
    theirs = json.loads((FOLDER / f"{name}.json").read_text())
    batches = torch.from_numpy(np.load(FOLDER / f"{name}.npz")["batches"].astype(np.int64))
    cfg = settings(theirs["config"])

    stream = np.zeros(cfg.block_size + 2, dtype="<u2")  # where windows start is drawn, and then not asked for
    run = Run(cfg, 0, 1, "cpu", stream, stream, {"vocab_size": theirs["config"]["vocab_size"]}, None)
    model = train.new_model(run)
    start(model, theirs["config"]["plain"]["init_seed"])
    job = Job(model, {"model": model}, train.optimizer_of(cfg, model), evaluate=dict, text=str)

    losses = []
    for step in range(cfg.max_steps):
        batch = batches[step]
        monkeypatch.setattr(train, "inputs_and_targets", lambda *_: (batch[:, :-1], batch[:, 1:]))
        measured, _ = train.train_step(run, job, model, step)
        losses.append(measured["train_loss"])
        for key, p in model.named_parameters():
            # A key's bias adds the same to all scores of a query: without a sink its gradient is nothing but
            # rounding, and on some processors that of an entry is zero.
            loose = len(p) // 3 if key.endswith("c_attn.bias") and not cfg.sink else 0
            assert abs(theirs["nonzeros"][key][step] - int(p.count_nonzero())) <= loose, (key, step)
    with torch.no_grad():
        losses.append(model(batches[-1][:, :-1], batches[-1][:, 1:])[1].item())

    # With AbsTopK, which of a sparse row's zeros are kept, and so get a gradient, is arbitrary (see the README).
    far = np.abs(np.array(losses) - np.array([*theirs["losses"], theirs["loss_after"]]))
    if cfg.afrac == 0:
        assert far.max() <= 2e-8
        for key, digest in theirs["final_support_sha256"].items():
            support = model.get_parameter(key).detach().numpy() != 0
            assert hashlib.sha256(np.packbits(support).tobytes()).hexdigest() == digest, key
    else:
        assert far[:20].max() <= 1e-12 and far.max() <= 5e-3


def test_their_config_is_ours_by_name():
    """configs/authors_1.9M.toml says of the recipe what the fixtures' runs were made with, and no more."""
    theirs = json.loads((FOLDER / f"{RUNS[0]}.json").read_text())["config"]
    path = Path(__file__).resolve().parent.parent / "configs" / "authors_1.9M.toml"
    ours = train.parse(train.TrainConfig, [f"--config={path}"])
    assert (ours.warmup, ours.anneal_start, ours.anneal_end) == (0.01, 0.01, 0.5)
    assert (ours.beta1, ours.beta2, ours.eps, ours.weight_decay) == (0.9, 0.95, theirs["eps"], theirs["weight_decay"])
    assert (ours.n_layer, ours.d_model, ours.d_head, ours.lr, ours.grad_rms) == (8, 1024, 16, 0.0128, "normalize")
    assert (ours.density, ours.embed_density, ours.bias_density) == (1 / 64, 1 / 16, 1.0)
