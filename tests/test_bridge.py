"""bridge.py: the loss's formulas on models with known answers, the memory of a step, and training
as train.py does it.

Tiny models on synthetic tokens. main() runs in this process, save where processes are the point.
"""
import copy
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
import torch.nn.functional as F

import bridge
import train
from bridge import Bridges, Coupled, distribution, kl, nmse, streams
from jobs import Job, Run
from test_train import (  # noqa: F401
    BLOCK, ROOT, argv, as_alone, assert_same_run, at_step, change_meta, data, log, same, state, weights)
from toy import random_model

WEIGHTS = (0.3, 0.5, 0.7, 1.1)


def tokens(rows=3, vocab=10, length=7):
    return torch.randint(vocab, (rows, length))


def plain(n_layer=2, **options):
    """A random model whose norms have gain 1, so that a rotation of its stream can be undone."""
    model = random_model(n_layer=n_layer, **options)
    for block in model.transformer.h:
        block.ln_1.weight.fill_(1.0)
        block.ln_2.weight.fill_(1.0)
    model.transformer.ln_f.weight.fill_(1.0)
    return model


def rotated(model, r):
    """The same function of tokens, with a stream h r in place of h."""
    out = plain(model.config.n_layer)
    out.load_state_dict(model.state_dict())
    for name, p in out.named_parameters():
        if name.endswith("c_proj.weight"):
            p.copy_(r.T @ p)
        elif p.shape[-1] == len(r) and "ln_" not in name:
            p.copy_(p @ r)
    return out


def linear_bridges(n_sites, encoder, decoder):
    """Bridges that multiply rows by the given matrices, and keep all channels."""
    bridges = Bridges(n_sites, *encoder.shape, 1.0).requires_grad_(False)
    for f, g in zip(bridges.encoders, bridges.decoders):
        f.weight.copy_(encoder.T)
        g.weight.copy_(decoder.T)
    return bridges


# --- formulas --------------------------------------------------------------------------------

def test_nmse_is_the_squared_error_over_the_second_moment_of_the_target(seed):
    x = torch.randn(2, 3, 5)
    h = torch.randn(2, 3, 5) + 2
    expected = ((x - h) ** 2).sum() / (h**2).sum()
    assert nmse(x, h).item() == pytest.approx(expected.item(), rel=1e-5)
    assert nmse(torch.zeros_like(h), h).item() == pytest.approx(1.0) and nmse(h, h).item() == 0


def test_kl_is_in_nats_per_token_from_the_dense_model_to_the_other(seed):
    a = torch.randn(2, 3, 5)
    b = torch.randn(2, 3, 5)
    p = a.double().softmax(-1)
    q = b.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert kl(distribution(a), b).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl(distribution(b), a).item() != pytest.approx(kl(distribution(a), b).item(), rel=1e-3)


def test_an_identity_between_two_copies_costs_nothing_at_any_site(seed):
    model = plain(afrac=0.5)
    eye = torch.eye(6)
    x = tokens()
    y = x.roll(-1, 1)
    net = Coupled(model, copy.deepcopy(model), linear_bridges(5, eye, eye), WEIGHTS)
    (loss, terms), whole = net(x, y)
    own = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    assert terms.shape == (5, 4) and terms.abs().max() < 1e-6
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert whole.item() == pytest.approx(own.item(), rel=1e-4)


def test_a_rotated_copy_is_reached_by_the_rotation_and_by_nothing_else(seed):
    model = plain()
    r = torch.linalg.qr(torch.randn(6, 6))[0]
    x = tokens()
    dense = rotated(model, r)
    assert torch.allclose(dense(x)[0], model(x)[0], atol=1e-4)
    # the dense stream is the sparse one times r
    terms = Coupled(model, dense, linear_bridges(5, r.T, r), WEIGHTS)(x, x)[0][1]
    assert terms.abs().max() < 1e-4
    wrong = Coupled(model, dense, linear_bridges(5, r, r.T), WEIGHTS)(x, x)[0][1]
    assert (wrong[:, :2] > 0.05).all() and (wrong[:, 2:] > 1e-3).all()


def test_each_term_is_its_formula_weighed_and_summed_over_sites(seed):
    sparse = random_model(n_layer=2, afrac=0.5)
    dense = random_model(n_layer=2, d_model=8)
    bridges = Bridges(5, 8, 6, 0.5).requires_grad_(False)
    for p in bridges.parameters():
        p.normal_()
    x = tokens()
    y = tokens()
    (own, terms), whole = Coupled(sparse, dense, bridges, WEIGHTS)(x, y)

    def sites(model):
        h = [model.embed(x)]
        for f in model.sublayers:
            h.append(f(h[-1]))
        return h

    target = dense(x)[0].double().log_softmax(-1)
    expected = own.double()
    for i, (s, d) in enumerate(zip(sites(sparse), sites(dense))):
        encoded = d @ bridges.encoders[i].weight.T + bridges.encoders[i].bias
        kept = encoded.abs().topk(3, dim=-1).indices
        encoded = torch.zeros_like(encoded).scatter(-1, kept, encoded.gather(-1, kept))
        decoded = s @ bridges.decoders[i].weight.T + bridges.decoders[i].bias
        by_hand = [((encoded - s) ** 2).sum() / (s**2).sum(),
                   ((decoded - d) ** 2).sum() / (d**2).sum()]
        for model, h in ((sparse, encoded), (dense, decoded)):
            for f in model.sublayers[i:]:
                h = f(h)
            log_p = model.unembed(h, x).double().log_softmax(-1)
            by_hand.append((target.exp() * (target - log_p)).sum(-1).mean())
        assert terms[i].tolist() == pytest.approx([v.item() for v in by_hand], rel=1e-3)
        expected = expected + sum(w * v for w, v in zip(WEIGHTS, by_hand))
    assert whole.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_terms_look_at_the_first_rows_alone(seed):
    sparse = random_model(n_layer=1)
    dense = random_model(n_layer=1, d_model=8)
    bridges = Bridges(3, 8, 6, 0.5)
    x = tokens()
    y = tokens()
    few = Coupled(sparse, dense, bridges, WEIGHTS, rows=2)(x, y)[0]
    alone = Coupled(sparse, dense, bridges, WEIGHTS)(x[:2], y[:2])[0]
    own = sparse(x, y)[1].item()  # the next-token loss is of all rows
    assert few[0].item() == pytest.approx(own, rel=1e-6)
    assert torch.allclose(few[1], alone[1], rtol=1e-5)


# --- the step --------------------------------------------------------------------------------

def learner(n_layer=2, recompute=True, **options):
    torch.manual_seed(0)
    sparse = random_model(n_layer=n_layer, afrac=0.5, **options).requires_grad_(True)
    dense = random_model(n_layer=n_layer, d_model=8)
    bridges = Bridges(2 * n_layer + 1, 8, 6, 0.5)
    return Coupled(sparse, dense, bridges, WEIGHTS, recompute=recompute).train()


def gradients(net, x, y):
    net(x, y)[1].backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_recomputing_gives_the_gradients_of_the_one_big_graph(seed):
    x = tokens()
    y = tokens()
    big = gradients(learner(recompute=False), x, y)
    ours = gradients(learner(recompute=True), x, y)
    assert big.keys() == ours.keys() and not any(name.startswith("dense") for name in ours)
    trained = [n for n, _ in learner().named_parameters() if not n.startswith("dense")]
    assert set(trained) - set(ours) == set()
    for name in big:
        assert torch.allclose(big[name], ours[name], rtol=1e-4, atol=1e-7), name


def held(net, x, y) -> int:
    """Bytes that the step holds for its backward pass when the forward pass ends."""
    seen = {}

    def pack(t):
        seen[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x, y)[1]
    return sum(seen.values())


def test_recomputed_a_step_holds_no_graph_of_a_hybrid_pass(seed):
    x = tokens(8, length=8)
    y = tokens(8, length=8)
    two, four = ([held(learner(n, again), x, y) for again in (True, False)] for n in (2, 4))
    assert four[1] > 2.5 * two[1]  # the big graph grows with sites times layers,
    alone = [held_alone(n, x, y) for n in (2, 4)]
    # recomputed, little more than the sparse model's own pass does
    assert four[0] - two[0] < 1.6 * (alone[1] - alone[0])


def held_alone(n_layer, x, y):
    return held(learner(n_layer).sparse, x, y)


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


# --- a whole and its parts -------------------------------------------------------------------

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
