"""bridge.py: a step in parts, and training as train.py does it.

Tiny models on synthetic tokens. main() runs in this process, save where processes are the point.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import bridge
import train
from coupled import Coupled, nmse, streams
from jobs import Job, Run
from test_coupled import learner
from test_train import (  # noqa: F401
    BLOCK, ROOT, argv, as_alone, assert_same_run, at_step, change_meta, data, log, same, state, weights)


# --- the dense model, and a whole and its parts ----------------------------------------------

def test_the_dense_model_does_not_learn(data, pair, tmp_path, monkeypatch):
    nets = []

    def loop(run, job):
        nets.append(job.net)
        return train.loop(run, job)

    monkeypatch.setattr(bridge, "loop", loop)
    before = torch.load(pair.dense / "final_model.pt", weights_only=True)
    assert bridge.main(argv(data, tmp_path / "run", **pair.options)) == 0
    assert same(dict(nets[0].dense.state_dict()), before) and same(weights(pair.dense), before)
    assert not nets[0].dense.training and all(p.grad is None for p in nets[0].dense.parameters())
    # this is the pair that was trained
    assert same(dict(nets[0].sparse.state_dict()), weights(tmp_path / "run"))


def uneven(**options):
    """A pair, and a run whose tokens have small streams in the first half and large ones in the
    second."""
    net = learner(recompute=False)
    with torch.no_grad():
        for model in (net.sparse, net.dense):
            model.transformer.wte.weight[5:] *= 5
        for p in net.bridges.parameters():
            p.normal_(std=0.3)  # with the biases, to err about as much in both halves
    ids = np.random.default_rng(0).integers(0, 5, 600)
    ids[300:] += 5
    cfg = bridge.BridgeConfig(block_size=7, batch_size=4, **options)
    return net, Run(cfg, 0, 1, "cpu", ids, ids, {"val_parts": {"all": [0, 600]}}, None)


def step_in(parts, dtype="float32"):
    """Loss, terms and gradients of one step in so many micro-steps."""
    net, run = uneven(grad_accum=parts, dtype=dtype)
    job = Job(net, {}, None, evaluate=dict, text=str, describe=bridge.describe)
    loss, (next_token, terms) = train.forward_backward(run, job, net, step=4)
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss, "next_token": next_token, "terms": terms} | grads


@pytest.mark.parametrize("parts, dtype, rtol", [
    (2, "float32", 1e-5), (4, "float32", 1e-5), (2, "bfloat16", 0.02)])
def test_a_step_in_parts_has_the_terms_and_the_gradient_of_the_whole(
        parts, dtype, rtol, monkeypatch):
    ours = step_in(parts, dtype)
    monkeypatch.delattr(Coupled, "look_ahead")  # the whole at once needs none
    whole = step_in(1, dtype)
    assert ours.keys() == whole.keys() and len(whole) > 30
    for name, value in whole.items():
        assert (ours[name] - value).abs().max() <= rtol * value.abs().max(), name
    ratios = step_in(parts, dtype)  # parts without it give the mean of their own ratios
    assert (ratios["terms"] / whole["terms"] - 1)[:, :2].abs().max() > 0.3
    for name in ("sparse.transformer.wte.weight", "bridges.encoders.1.weight"):
        assert (ratios[name] - whole[name]).abs().max() > 0.3 * whole[name].abs().max(), name


def test_the_measured_nmse_is_that_of_all_windows_at_once(seed):
    net, run = uneven(eval_tokens=280)  # 40 windows, in three batches
    measured = bridge.measure(net, run)["all"]
    starts = np.linspace(0, 592, 40).astype(int)
    x = torch.stack([torch.from_numpy(run.val[s : s + 7]) for s in starts])
    for i, (d, s) in enumerate(zip(streams(net.dense, x), streams(net.sparse, x))):
        encoder = nmse(net.bridges.encode(i, d), s).item()
        decoder = nmse(net.bridges.decode(i, s), d).item()
        assert measured["nmse_encoder"][i] == pytest.approx(encoder, rel=1e-5)
        assert measured["nmse_decoder"][i] == pytest.approx(decoder, rel=1e-5)


# --- training --------------------------------------------------------------------------------

DENSE = dict(density=1, afrac=0, d_model=24, max_steps=30, seed=5)


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    """A dense model and a sparse one trained beside it: directories, and the latter's config."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pair")
    assert train.main(argv(data, folder / "dense", **DENSE)) == 0
    over = dict(dense=folder / "dense")
    assert bridge.main(argv(data, folder / "sparse", **over)) == 0

    class Pair:
        dense = folder / "dense"
        sparse = folder / "sparse"
        options = over
        cfg = bridge.parse(bridge.BridgeConfig, argv(data, folder / "sparse", **over))
    return Pair


def test_a_run_learns_and_logs_every_term_per_site_and_is_a_published_model(data, pair, tmp_path):
    out = tmp_path / "run"
    options = dict(max_steps=120, eval_interval=120, lr=0.03, bridge_lr=0.0075, density=0.5)
    assert bridge.main(argv(data, out, **pair.options, **options)) == 0
    first = log(out)[0]
    last = log(out)[-1]
    for name in ("nmse_encoder", "nmse_decoder", "kl_sparse", "kl_dense"):
        assert len(last[name]) == 3
        assert sum(last[name]) < (0.8 if name.startswith("nmse") else 0.95) * sum(first[name]), name
    assert last["next_token"] < first["next_token"]
    squared = sum(last["nmse_encoder"] + last["nmse_decoder"])
    nats = sum(last["kl_sparse"] + last["kl_dense"])
    assert last["train_loss"] == pytest.approx(last["next_token"] + 0.2 * squared + nats, rel=1e-3)
    measured = last["bridges"]["idioms"]
    dense = [e for e in log(pair.dense) if "val_loss" in e][-1]["val_loss"]["idioms"]
    assert measured["dense"] == pytest.approx(dense, rel=1e-4)
    assert measured["sparse"] == pytest.approx(last["val_loss"]["idioms"], rel=1e-4)
    for w in weights(out).values():  # sparse to the schedule's density, in the published format
        assert w.isfinite().all()
    nonzero = weights(out)["transformer.h.0.mlp.c_fc.weight"] != 0
    assert nonzero.float().mean() == pytest.approx(0.5, abs=0.01)


def test_a_stopped_run_goes_on_to_the_same_bits(data, pair, tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    broken = tmp_path / "broken"
    assert bridge.main(argv(data, straight, **pair.options)) == 0
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert bridge.main(argv(data, broken, **pair.options)) == 143
    assert state(broken)["step"] in (5, 6)
    assert bridge.main(argv(data, broken, **pair.options, resume=True)) == 0
    assert_same_run(straight, broken)
    assert same(state(straight)["bridges"], state(broken)["bridges"])
    saved = torch.load(straight / "bridges.pt", weights_only=True)
    assert same(state(straight)["bridges"], saved)


def test_two_processes_hold_the_same_weights_and_about_the_losses_of_one(data, pair, tmp_path):
    options = {**pair.options, "w_nmse_encoder": 1, "w_nmse_decoder": 1}
    two = tmp_path / "two"
    one = tmp_path / "one"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                "--master-addr=127.0.0.1", f"--master-port={port}"]
    in_parts = argv(data, two, **options, grad_accum=2)
    done = subprocess.run([*torchrun, str(ROOT / "bridge.py"), *in_parts],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert bridge.main(argv(data, one, **options)) == 0
    for a, b in zip(log(one), log(two), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        for name in ("next_token", *bridge.TERMS):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    # AdamW turns the last bit of a gradient into more, but not into much more
    for key, w in weights(one).items():
        assert torch.allclose(weights(two)[key], w, atol=2e-3), key


def test_compiled_it_learns_the_same(data, pair, tmp_path):
    for name in ("false", "true"):
        options = dict(compile=name, max_steps=4, eval_interval=4)
        assert bridge.main(argv(data, tmp_path / name, **pair.options, **options)) == 0
    for a, b in zip(log(tmp_path / "false"), log(tmp_path / "true"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)


def test_eval_reports_each_site_and_writes_what_it_reports(pair, data, capsys):
    capsys.readouterr()
    assert bridge.main(argv(data, pair.sparse, **pair.options, eval=True)) == 0
    out = capsys.readouterr().out
    measured = json.loads((pair.sparse / "bridges.json").read_text())
    last = log(pair.sparse)[-1]["bridges"]
    assert measured.keys() == {"idioms", "code"}
    for part, m in measured.items():
        for key, value in m.items():
            assert value == pytest.approx(last[part][key], rel=1e-4), (part, key)
        row = [line for line in out.split(f"{part}: ")[1].splitlines()[2:5]][1].split()  # site 1
        mean = m["dense_from_mean"][1]
        saved = (mean - m["dense_to_sparse"][1]) / (mean - m["dense"])
        assert m["recovered_dense_to_sparse"][1] == pytest.approx(saved, rel=1e-5)
        assert row[0] == "1" and float(row[3]) == pytest.approx(m["dense_to_sparse"][1], abs=6e-4)
        assert float(row[4].rstrip("%")) == pytest.approx(100 * saved, abs=0.06)


# --- bad input -------------------------------------------------------------------------------

def refused(capsys, args, *parts):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        bridge.main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    for part in parts:
        assert part in err, err


def test_a_dense_model_that_cannot_be_coupled_is_refused_before_anything_is_written(
        data, pair, tmp_path, capsys):
    out = tmp_path / "out"
    deeper = argv(data, out, **pair.options, n_layer=2)
    refused(capsys, deeper, "n_layer", "1", "2", str(pair.dense))
    longer = argv(data, out, **pair.options, block_size=BLOCK + 1)
    refused(capsys, longer, "block_size", str(BLOCK + 1))
    refused(capsys, argv(data, out, dense=tmp_path / "none"), "not a model directory")
    refused(capsys, argv(data, pair.dense, dense=pair.dense, resume=True), "out_dir and dense")
    refused(capsys, argv(data, out, **pair.options, grad_accum=2, bridge_rows=3), "bridge_rows 3")
    refused(capsys, argv(data, out, **pair.options, eval=True, device="gpu"), "device")
    for key, value in dict(w_kl_dense=-1, bridge_afrac=0, bridge_lr=0, bridge_rows=-1).items():
        refused(capsys, argv(data, out, **pair.options, **{key: value}), key)
    assert not out.exists()


def test_bridges_to_another_dense_model_are_refused(data, pair, tmp_path, capsys):
    other = tmp_path / "dense"
    run = tmp_path / "run"
    assert train.main(argv(data, other, **{**DENSE, "seed": 6, "max_steps": 2})) == 0
    shutil.copytree(pair.sparse, run)
    before = (run / "state.pt").read_bytes()
    for action in (dict(resume=True, max_steps=20), dict(eval=True)):
        refused(capsys, argv(data, run, dense=other, **action), "another dense model")
    assert (run / "state.pt").read_bytes() == before


def test_a_dense_model_of_another_tokenizer_is_refused(data, pair, tmp_path, capsys):
    dense, run = tmp_path / "dense", tmp_path / "run"
    shutil.copytree(pair.dense, dense)
    shutil.copytree(pair.sparse, run)
    for folder, tokenizer in ((dense, "abc"), (run, "xyz")):
        settings = (folder / "train.toml").read_text().replace('tokenizer_hash = ""', f'tokenizer_hash = "{tokenizer}"')
        (folder / "train.toml").write_text(settings)
    refused(capsys, argv(data, run, dense=dense, eval=True), "another tokenizer", str(dense))
    other_data = tmp_path / "data"
    shutil.copytree(data, other_data)
    change_meta(tokenizer_hash="xyz")(other_data)
    out = tmp_path / "out"
    refused(capsys, argv(other_data, out, **{**pair.options, "dense": dense}), "another tokenizer")
    assert not out.exists()


def test_a_run_without_bridges_or_with_half_of_them_is_refused(data, pair, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pair.sparse, run)
    (run / "bridges.pt").write_bytes((run / "bridges.pt").read_bytes()[:500])
    refused(capsys, argv(data, run, **pair.options, eval=True), "bridges.pt", "truncated")
    (run / "bridges.pt").unlink()
    refused(capsys, argv(data, run, **pair.options, eval=True), "bridges.pt", "bridge.py --config")
