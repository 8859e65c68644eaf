"""bridge.py --fit: ridge regression between frozen models, against relations that are known and
against the same thing computed another way; what it writes, and bad input."""
import copy
import json

import numpy as np
import pytest
import torch

import bridge
import steer
from bridge import about, add_moments, fit_bridges, gather, ridge_map
from coupled import Bridges, Coupled, nmse, streams
from jobs import Run
from model import GPT
from model_files import weights_hash
from steer import rms_ratio
from tasks import TASKS
from test_bridge import refused
from test_coupled import plain, rotated
from test_train import as_alone  # noqa: F401
from toy import TOY, Digits, hand_made, random_model, toy_circuit

T = 7  # tokens of a window
RIDGES = [10.0**-i for i in range(8, 0, -1)]


def net_of(sparse, dense, afrac=1.0) -> Coupled:
    n_sites = 2 * sparse.config.n_layer + 1
    bridges = Bridges(n_sites, dense.config.d_model, sparse.config.d_model, afrac)
    return Coupled(sparse, dense, bridges).eval()


def run_on(ids: np.ndarray, **options) -> Run:
    cfg = bridge.BridgeConfig(block_size=T, **options)
    return Run(cfg, 0, 1, "cpu", ids, ids, {"val_parts": {"all": [0, len(ids)]}}, None)


def some_ids(n=8001):
    return np.random.default_rng(0).integers(0, 10, n)


def fitted(sparse, dense, afrac=1.0, **options) -> tuple[Coupled, list[str]]:
    net = net_of(sparse, dense, afrac)
    return net, list(fit_bridges(net, gather(net, run_on(some_ids(), **options)), RIDGES))


# --- the regression --------------------------------------------------------------------------

def test_a_rotation_between_the_streams_is_recovered_at_every_site(seed):
    sparse = plain()
    r = torch.linalg.qr(torch.randn(6, 6))[0]
    dense = rotated(sparse, r)  # its stream is the sparse one times r
    net, lines = fitted(sparse, dense)
    assert len(lines) == 1 + 5
    for encoder, decoder in zip(net.bridges.encoders, net.bridges.decoders):
        assert (encoder.weight - r).abs().max() < 1e-3 and encoder.bias.abs().max() < 1e-3
        assert (decoder.weight - r.T).abs().max() < 1e-3 and decoder.bias.abs().max() < 1e-3
    x = torch.from_numpy(some_ids(70).reshape(10, T))
    for i, (d, s) in enumerate(zip(streams(dense, x), streams(sparse, x))):
        assert nmse(net.bridges.encode(i, d), s) < 1e-6 and nmse(net.bridges.decode(i, s), d) < 1e-6


def test_between_models_of_other_widths_it_is_least_squares_with_an_intercept(seed):
    sparse = random_model(n_layer=1)
    dense = random_model(n_layer=1, d_model=9)
    net, _ = fitted(sparse, dense)
    x = torch.from_numpy(some_ids()[: 8000 // T * T].reshape(-1, T))
    for i, (d, s) in enumerate(zip(streams(dense, x), streams(sparse, x))):
        for layer, a, b in ((net.bridges.encoders[i], d, s), (net.bridges.decoders[i], s, d)):
            a = a.flatten(0, 1).double()
            b = b.flatten(0, 1).double()
            ones = torch.cat([a, torch.ones_like(a[:, :1])], 1)
            best = (ones @ torch.linalg.lstsq(ones, b).solution - b).square().mean()
            ours = (a @ layer.weight.double().T + layer.bias.double() - b).square().mean()
            # within what an eighth of the windows, held out, could have told
            assert best <= ours < 1.01 * best + 1e-9
            assert ours < 0.95 * (b - b.mean(0)).square().mean()


def test_moments_of_parts_add_up_to_those_of_all_and_are_double(seed):
    net = net_of(random_model(n_layer=1), random_model(n_layer=1, d_model=8))
    x = torch.randint(10, (6, T))
    in_float32 = torch.zeros(3, 15, 15, dtype=torch.double)
    add_moments(in_float32, net, x)
    d, s = (streams(model, x)[1].flatten(0, 1).double() for model in (net.dense, net.sparse))
    assert torch.allclose(in_float32[1, 1:9, 9:], d.T @ s, rtol=1e-12, atol=1e-12)

    net.double()  # so that the models round the same whatever the batch
    whole = torch.zeros(3, 15, 15, dtype=torch.double)
    parts = torch.zeros_like(whole)
    add_moments(whole, net, x)
    for start, end in ((0, 1), (1, 4), (4, 6)):
        add_moments(parts, net, x[start:end])
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-12)
    for i, (d, s) in enumerate(zip(streams(net.dense, x), streams(net.sparse, x))):
        z = torch.cat([d, s], -1).flatten(0, 1)
        assert whole[i, 0, 0] == 6 * T and torch.allclose(whole[i, 0, 1:], z.sum(0))
        centred = z - z.mean(0)
        assert torch.allclose(about(whole[i], z.mean(0)), centred.T @ centred / len(z), atol=1e-12)
        other = z - 3.0
        moments = about(whole[i], torch.full((14,), 3.0, dtype=torch.double))
        assert torch.allclose(moments, other.T @ other / len(z), atol=1e-10)


def test_moments_of_wide_streams_are_whole(seed):
    net = net_of(random_model(n_layer=1, d_model=700), random_model(n_layer=1))
    x = torch.randint(10, (2, T))
    sums = torch.zeros(3, 707, 707, dtype=torch.double)
    add_moments(sums, net, x)
    mean = torch.randn(706).double()
    for i, (d, s) in enumerate(zip(streams(net.dense, x), streams(net.sparse, x))):
        z = torch.cat([d, s], -1).flatten(0, 1).double() - mean
        assert torch.allclose(about(sums[i], mean), z.T @ z / len(z), atol=1e-8)


def test_the_ridge_is_the_one_that_errs_least_on_rows_that_it_has_not_seen(seed):
    true = torch.randn(4, 12).double()
    scale = torch.logspace(0, -2, 12).double()

    def rows(n):
        x = torch.randn(n, 12).double() * scale
        return x, x @ true.T + torch.randn(n, 4).double()

    x, y = rows(30)  # few and noisy: without a ridge they are fitted too closely
    new_x, new_y = rows(500)
    z = torch.cat([x, y], 1)
    new = torch.cat([new_x, new_y], 1)
    to, of = slice(12, 16), slice(0, 12)
    weight, ridge, error = ridge_map(z.T @ z / 30, new.T @ new / 500, of, to, RIDGES)
    by_hand = {}
    for r in RIDGES:
        c = x.T @ x / 30
        w = torch.linalg.solve(c + r * c.trace() / 12 * torch.eye(12).double(), x.T @ y / 30).T
        by_hand[r] = ((new_x @ w.T - new_y).square().sum(1).mean().item(), w)
    assert ridge == min(by_hand, key=lambda r: by_hand[r][0]) > RIDGES[0]
    assert error.item() == pytest.approx(by_hand[ridge][0], rel=1e-9)
    assert torch.allclose(weight, by_hand[ridge][1])


def test_a_channel_that_never_changes_and_a_stream_of_zeros_are_mapped_to_what_they_are(seed):
    sparse = random_model(n_layer=1)
    dense = random_model(n_layer=1)
    for p in (sparse.transformer.wte.weight, sparse.transformer.wpe.weight):
        p.zero_()  # site 0 of the sparse model
    dense.transformer.wte.weight[:, 2] = 3.0
    dense.transformer.wpe.weight[:, 2] = 0.0
    net, _ = fitted(sparse, dense)
    assert all(p.isfinite().all() for p in net.bridges.parameters())
    x = torch.randint(10, (3, T))
    assert net.bridges.encode(0, streams(dense, x)[0]).abs().max() < 1e-6
    decoded = net.bridges.decode(0, streams(sparse, x)[0])
    assert torch.allclose(decoded[..., 2], torch.full((3, T), 3.0), atol=1e-5)


def test_every_eighth_window_is_held_out_and_shapes_no_map(seed):
    net = net_of(random_model(n_layer=1), random_model(n_layer=1))
    ids = some_ids(16 * T + 1)
    sums = gather(net, run_on(ids))
    assert sums[:, 0, 0, 0].tolist() == [14 * T, 2 * T]
    for window in range(16):
        other = ids.copy()
        place = slice(window * T, (window + 1) * T)
        other[place] = (other[place] + 3) % 10
        changed = (gather(net, run_on(other)) != sums).flatten(1).any(1).tolist()
        assert changed == ([False, True] if window in (7, 15) else [True, False])
    few = gather(net, run_on(ids, fit_tokens=8 * T + 3))
    assert few[:, 0, 0, 0].tolist() == [7 * T, T]


# --- the command -----------------------------------------------------------------------------

@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A hand-made model with its data and a circuit, and a dense model that is its copy; runs
    bridge.py --fit on them."""
    sparse = tmp_path / "sparse"
    dense = tmp_path / "dense"
    sparse.mkdir()
    monkeypatch.setitem(TASKS, "toy", TOY)
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    model, _, circuit = toy_circuit(sparse, hand_made(), method="attribution")
    model.save(str(dense))
    (sparse / "circuit.json").write_text(json.dumps(circuit))
    ids = np.fromfile(sparse / "train.bin", "<u2")
    ids[:600].tofile(sparse / "val.bin")
    (sparse / "meta.json").write_text(json.dumps({"vocab_size": 10, "val_parts": {"all": [0, 600]}}))

    def options(**over):
        given = dict(fit=True, sparse=sparse, dense=dense, out_dir=tmp_path / "fitted",
                     data_dir=sparse, bridge_afrac=1, fit_tokens=3000)
        return [f"--{key}={value}" for key, value in (given | over).items()]

    options.folder = tmp_path
    options.model = model
    return options


def test_what_it_writes_is_a_run_for_eval_and_for_steering_by_the_sparse_models_circuit(
        pair, capsys):
    out = pair.folder / "fitted"
    assert bridge.main(pair()) == 0
    said = capsys.readouterr().out
    assert "100% of" in said and "held out" in said and said.endswith(f"{out}/bridges.json\n")
    measured = json.loads((out / "bridges.json").read_text())
    assert max(measured["all"]["nmse_encoder"] + measured["all"]["nmse_decoder"]) < 1e-6
    assert weights_hash(str(out)) == weights_hash(str(pair.folder / "sparse"))

    (out / "bridges.json").unlink()
    assert bridge.main([f"--config={out}/train.toml", "--eval"]) == 0
    assert json.loads((out / "bridges.json").read_text()) == measured
    # the table is that of --eval, to the letter
    assert capsys.readouterr().out == said[said.index("all: dense model"):]

    circuit = pair.folder / "sparse" / "circuit.json"
    assert steer.main(["--task=toy", f"--run={out}", f"--circuit={circuit}", "--pairs=40",
                       f"--data={pair.folder}/sparse", "--channels=1"]) == 0
    p = json.loads((out / "steer" / "toy" / "steer.json").read_text())["steered"]["mean"]
    assert p[0] < 0.5 < p[-1]


def test_the_share_that_encoders_keep_is_written_with_them(pair):
    out = pair.folder / "fitted"
    assert bridge.main(pair(bridge_afrac=0.5)) == 0
    net = bridge.load_bridged(str(out), str(pair.folder / "dense"), GPT.load(str(out)), "cpu")
    h = torch.randn(2, 3, 6)
    assert net.bridges.k == 3
    assert ((net.bridges.encode(0, h) != 0).sum(-1) <= 3).all()


def test_windows_are_those_of_the_sparse_models_training_here_and_in_steering(pair, monkeypatch):
    (pair.folder / "sparse" / "train.toml").write_text("block_size = 4\n")
    seen = []

    def watched(path, vocab_size, block_size, *rest):
        seen.append(block_size)
        yield torch.zeros(1, block_size, dtype=torch.long)

    gathered = []
    monkeypatch.setattr(bridge, "gather", lambda net, run: gathered.append(run.cfg.block_size)
                        or gather(net, run))
    monkeypatch.setattr(steer, "random_windows", watched)
    assert bridge.main(pair()) == 0
    out = pair.folder / "fitted"
    assert "block_size = 4\n" in (out / "train.toml").read_text() and gathered == [4]
    steer.main(["--task=toy", f"--run={out}", f"--circuit={pair.folder}/sparse/circuit.json",
                "--pairs=8", f"--data={pair.folder}/sparse", "--channels=1"])
    rms_ratio(net_of(pair.model, pair.model), "")
    assert seen == [4, 8]


def test_a_snapshot_of_the_hub_is_copied_as_it_is_with_its_tokenizer(pair):
    pytest.importorskip("safetensors")
    hub = pair.folder / "hub"
    pair.model.save(str(hub), format="hub")
    (hub / "tokenizer.json").write_text("{}")
    assert bridge.main(pair(sparse=hub)) == 0
    out = pair.folder / "fitted"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (hub / name).read_bytes()
    assert bridge.main([f"--config={out}/train.toml", "--eval"]) == 0


# --- bad input -------------------------------------------------------------------------------

def test_pairs_and_data_that_do_not_fit_are_one_line_and_nothing_is_written(pair, capsys):
    folder = pair.folder
    deeper = folder / "deeper"
    random_model(n_layer=2).save(str(deeper))
    refused(capsys, pair(dense=deeper), "n_layer", "2", str(deeper))
    wordy = folder / "wordy"
    random_model(vocab_size=12).save(str(wordy))
    refused(capsys, pair(dense=wordy), "vocab_size", "12")
    refused(capsys, pair(sparse=wordy), "another tokenizer", str(wordy))
    refused(capsys, pair(sparse=folder / "none"), "not a model directory")
    refused(capsys, pair(sparse=""), "--sparse=DIR")
    refused(capsys, pair(fit=False), "--fit")
    refused(capsys, pair(fit_tokens=63), "8 windows of 8", "63")
    refused(capsys, pair(ridge="0.1,0"), "ridge")
    broken = folder / "broken"
    model = copy.deepcopy(pair.model)
    model.transformer.wte.weight[3] = float("nan")
    model.save(str(broken))
    refused(capsys, pair(dense=broken), "not finite")
    assert not (folder / "fitted").exists()


def test_models_and_data_of_other_tokenizers_are_refused(pair, capsys):
    folder = pair.folder
    (folder / "sparse" / "train.toml").write_text('tokenizer_hash = "abc"\n')
    (folder / "dense" / "train.toml").write_text('tokenizer_hash = "xyz"\n')
    refused(capsys, pair(), "another tokenizer", str(folder / "dense"))
    meta = json.loads((folder / "sparse" / "meta.json").read_text())
    (folder / "sparse" / "meta.json").write_text(json.dumps(meta | {"tokenizer_hash": "xyz"}))
    refused(capsys, pair(), "another tokenizer", "--data_dir")
    assert not (folder / "fitted").exists()


def test_no_model_and_no_run_is_written_over(pair, capsys):
    folder = pair.folder
    assert bridge.main(pair()) == 0
    before = {path: path.read_bytes() for path in sorted(folder.glob("*/*")) if path.is_file()}
    for out in ("fitted", "sparse", "dense"):
        refused(capsys, pair(out_dir=folder / out), "already holds a model", "--out_dir")
    assert {path: path.read_bytes() for path in before} == before


def test_what_was_broken_off_while_it_was_written_is_no_model_and_can_be_done_again(
        pair, monkeypatch):
    copyfileobj = bridge.shutil.copyfileobj

    def full(source, target):
        if source.name.endswith("final_model.pt"):
            raise OSError(28, "No space left on device", target.name)
        copyfileobj(source, target)

    monkeypatch.setattr(bridge.shutil, "copyfileobj", full)
    with pytest.raises(SystemExit):
        bridge.main(pair())
    with pytest.raises(ValueError, match="not a model directory"):
        GPT.load(str(pair.folder / "fitted"))
    monkeypatch.setattr(bridge.shutil, "copyfileobj", copyfileobj)
    assert bridge.main(pair()) == 0


def test_it_is_for_one_process(pair, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, pair(), "one process")
