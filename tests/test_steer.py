"""steer.py: the intervention against its formula, on pairs of models whose bridge is known; the
file, and bad input."""
import copy
import hashlib
import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch

import prune
import steer
from config import parse
from coupled import Bridges, Coupled, run_from, streams
from model_files import weights_hash
from steer import (choose, curve, mean_difference, perturbation, reads, rms_ratio, steered,
                   toward_other)
from tasks import TASKS, Pairs, Task, last_logits
from toy import TOY, Digits, hand_made, loaded, one_thread, random_model, toy_pairs, toy_setup  # noqa: F401

READ = "0.attn.act_in"


def couple(sparse, dense, encoder=None, decoder=None) -> Coupled:
    """Bridges that are the identity unless told otherwise."""
    widths = dense.config.d_model, sparse.config.d_model
    bridges = Bridges(2 * sparse.config.n_layer + 1, *widths, 1.0).requires_grad_(False)
    for f, g in zip(bridges.encoders, bridges.decoders):
        f.weight.copy_(torch.eye(*f.weight.shape) if encoder is None else encoder)
        g.weight.copy_(torch.eye(*g.weight.shape) if decoder is None else decoder)
    return Coupled(sparse, dense, bridges, (1.0,) * 4).eval()


def answers(logits, pairs):
    rows = torch.arange(len(logits))
    among_all = logits.softmax(-1)[rows, pairs.wrong]
    return logits[rows, pairs.answer], logits[rows, pairs.wrong], among_all


# --- the intervention ------------------------------------------------------------------------

def test_strength_0_changes_no_bit_and_strength_1_adds_the_change(seed):
    model = random_model(n_layer=2)
    pairs = toy_pairs(8)
    change = torch.randn(16, pairs.ids.shape[1], 6)
    for site in ("0.attn.act_in", "0.mlp.act_in", "1.attn.act_in", "1.mlp.act_in"):
        nothing, half, all_ = steered(model, pairs, site, change, [0.0, 0.5, 1.0])
        right, other, among_all = answers(last_logits(model, pairs), pairs)
        assert torch.equal(nothing[:, 0], torch.sigmoid(-(right - other)))
        assert torch.equal(nothing[:, 1], among_all)
        for strength, p in ((0.5, half), (1.0, all_)):
            def add(s, x):
                return x + strength * change if s == site else x

            right, other, among_all = answers(last_logits(model, pairs, add), pairs)
            assert torch.allclose(p[:, 0], torch.sigmoid(other - right), atol=1e-6)
            assert torch.allclose(p[:, 1], among_all, atol=1e-6)
        assert (all_ - nothing).abs().max() > 1e-3


def test_the_perturbation_is_delta_times_the_decoders_row_times_the_ratio_between_the_norms(seed):
    sparse = random_model(n_layer=2)
    dense = random_model(n_layer=2, d_model=8)
    net = couple(sparse, dense, torch.randn(6, 8), torch.randn(8, 6))
    delta = torch.randn(4, 5, 6)
    sites = (("0.attn.act_in", "ln_1"), ("0.mlp.act_in", "ln_2"),
             ("1.attn.act_in", "ln_1"), ("1.mlp.act_in", "ln_2"))
    for i, (site, norms) in enumerate(sites):
        ours, theirs = (getattr(m.transformer.h[i // 2], norms).weight for m in (sparse, dense))
        expected = torch.zeros(4, 5, 8)
        for c in (1, 4):
            row = net.bridges.decoders[i].weight[:, c]
            expected += delta[:, :, c, None] / ours[c] * row * 0.7 * theirs
        change = perturbation(net, site, [1, 4], delta, 0.7)
        assert torch.allclose(change, expected, rtol=1e-4, atol=1e-5)
    sparse.transformer.h[0].ln_1.weight[1] = 0.0  # a channel that the norm mutes says nothing
    delta[..., 1] = 0.0
    assert torch.equal(perturbation(net, READ, [1], delta, 0.7), torch.zeros(4, 5, 8))


def test_between_two_copies_steering_is_exchanging_the_activation(seed):
    model = hand_made()
    pairs = toy_pairs(16)
    net = couple(model, copy.deepcopy(model))
    seen = reads(model, pairs, [READ])[READ]
    change = perturbation(net, READ, [0], toward_other(seen), 1.0)
    other = seen[torch.arange(32) ^ 1]

    def exchange(site, x):
        return torch.where(torch.arange(6) == 0, other, x) if site == READ else x

    right, wrong, _ = answers(last_logits(model, pairs, exchange), pairs)
    p = steered(net.dense, pairs, READ, change)[:, :, 0]
    assert torch.allclose(p[-1], torch.sigmoid(wrong - right), atol=1e-5)
    assert p[0].mean() < 0.2 and p[-1].mean() > 0.8  # channel 0 is what tells the answers apart
    assert (p.mean(1).diff() > 0).all() and len(p) == 11


def test_the_ratio_is_that_of_the_root_mean_squares_of_the_streams(seed, tmp_path):
    sparse = random_model(n_layer=2)
    # the same function with a stream 4 times as large: the norms undo it
    dense = copy.deepcopy(sparse)
    for name, p in dense.named_parameters():
        if name.endswith(("c_proj.weight", "wte.weight", "wpe.weight")):
            p.mul_(4.0)
    path = tmp_path / "train.bin"
    np.random.default_rng(0).integers(0, 10, 900).astype("<u2").tofile(path)
    ratio = rms_ratio(couple(sparse, dense), str(path), 800)
    assert ratio == pytest.approx([0.25] * 5, rel=1e-3)


def test_the_mean_difference_is_of_the_tokens_that_differ_and_of_those_after_them_each_way(seed):
    ids = torch.tensor([[5, 0, 6, 7, 0], [5, 1, 6, 7, 0], [5, 6, 0, 8, 8], [5, 6, 1, 8, 8]])
    last, answer, wrong = torch.tensor([[3, 3, 4, 4], [2, 3, 2, 3], [3, 2, 3, 2]])
    pairs = Pairs(ids, last, answer, wrong)
    x = torch.randn(4, 5, 6)
    out = mean_difference(x, pairs, pairs)
    to_second = x[1] - x[0], x[3] - x[2]
    at = (to_second[0][1] + to_second[1][2]) / 2
    after = (to_second[0][2] + to_second[0][3] + to_second[1][3] + to_second[1][4]) / 4
    expected = torch.zeros(4, 5, 6)
    for row, position, length in ((0, 1, 4), (2, 2, 5)):
        for r, sign in ((row, 1), (row + 1, -1)):
            expected[r, position], expected[r, position + 1 : length] = sign * at, sign * after
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_curve_is_the_mean_and_the_quartiles():
    p = torch.tensor([[0.0, 0.1, 0.2, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    c = curve(p)
    assert c["mean"] == pytest.approx([0.44, 1.0])
    assert c["q25"] == pytest.approx([0.1, 1.0]) and c["q75"] == pytest.approx([0.9, 1.0])


def test_chosen_are_the_reads_that_move_the_answer_most():
    model = hand_made()
    pairs = toy_pairs(16)
    wte = model.transformer.wte.weight
    attn_in = model.transformer.h[0].attn.c_attn.weight
    wte[0, 3] = 0.4  # a second, weaker way
    wte[1, 3] = -0.4
    attn_in[12 + 1, 3] = 1.0
    everything = [(site, c) for site in ("0.mlp.act_in", READ) for c in range(6)]
    net = couple(model, copy.deepcopy(model))
    ratio = [1.0] * 3
    assert choose(net, everything, pairs, 8, ratio)[:2] == [(READ, 0), (READ, 3)]
    assert choose(net, everything, pairs, 1, ratio) == [(READ, 0)]
    attn_in[12 + 1, 3] = 0.02  # now the second way is not worth its size
    assert choose(net, everything, pairs, 8, ratio) == [(READ, 0)]
    assert choose(net, everything, pairs, 2, ratio, gain=0.0) == [(READ, 0), (READ, 3)]
    attn_in[12 + 1, 3] = 1.0
    without_the_strongest = everything[:-6] + everything[-5:]
    assert choose(net, without_the_strongest, pairs, 1, ratio) == [(READ, 3)]

    # where the dense model does not listen, it is not told
    block = net.dense.transformer.h[0]
    block.attn.c_attn.weight.zero_()
    block.mlp.c_fc.weight.copy_(torch.eye(7, 6))
    block.mlp.c_proj.weight[3].fill_(1.0)
    chosen = choose(net, [(READ, 1), ("0.mlp.act_in", 3)], pairs, 1, ratio)
    assert chosen == [("0.mlp.act_in", 3)]


def test_of_a_stream_all_is_read_that_stands_there_and_from_there_on(seed):
    model = random_model(n_layer=2)
    pairs = toy_pairs(8)
    rows = torch.arange(16)
    change = torch.randn(16, pairs.ids.shape[1], 6)
    sites = ("0.resid_in", "0.resid_mid", "1.resid_in", "1.resid_mid")
    seen = reads(model, pairs, sites)
    assert tuple(seen) == sites
    for i, site in enumerate(sites):
        stream = streams(model, pairs.ids)[i]
        assert torch.equal(seen[site], stream)
        expected = run_from(model, i, stream + change, pairs.ids)[rows, pairs.last]
        assert torch.allclose(steer.changed(model, pairs, site, change), expected, atol=1e-5)
        # exchanged whole, it gives the other prompt's answers
        other = last_logits(model, pairs)[rows ^ 1]
        exchanged = steer.changed(model, pairs, site, toward_other(stream))
        assert torch.allclose(exchanged, other, atol=1e-4)


def test_a_change_of_the_stream_is_delta_times_the_decoders_row(seed):
    net = couple(random_model(), random_model(d_model=8), torch.randn(6, 8), torch.randn(8, 6))
    pairs = toy_pairs(4)
    seen = reads(net.sparse, pairs, ["0.resid_mid"])
    change = steer.from_other(net, [("0.resid_mid", 1), ("0.resid_mid", 4)], seen, [0.5] * 3)
    stream = seen["0.resid_mid"]
    delta = stream[torch.arange(8) ^ 1] - stream
    rows = net.bridges.decoders[1].weight
    expected = delta[..., 1, None] * rows[:, 1] + delta[..., 4, None] * rows[:, 4]
    assert torch.allclose(change, expected, atol=1e-5)


def copies_in(layer: int):
    """`hand_made` with a second layer that does nothing: before its own, or after."""
    model = random_model(std=0.0, sink=False, n_layer=2)
    state = hand_made().state_dict()
    by_layer = {name.replace("h.0.", f"h.{layer}."): value for name, value in state.items()}
    model.load_state_dict(by_layer, strict=False)
    idle = model.transformer.h[1 - layer]
    idle.ln_1.weight.fill_(1.0)
    idle.ln_2.weight.fill_(1.0)
    return model


def test_in_the_stream_a_channel_steers_a_model_that_reads_it_in_another_layer():
    net = couple(copies_in(1), copies_in(0))
    pairs = toy_pairs(16)
    ratio = [1.0] * 5

    def p(sites):
        candidates = [(site, c) for site in sites for c in range(6)]
        (node,) = choose(net, candidates, pairs, 1, ratio)
        assert node[1] == 0
        seen = reads(net.sparse, pairs, sites)
        return steered(net.dense, pairs, node[0], steer.from_other(net, [node], seen, ratio))[:, :, 0].mean(1)

    its_own = p(["1.attn.act_in"])
    assert torch.equal(its_own, its_own[:1].expand(11)) and its_own[0] < 0.2
    in_stream = p(["0.resid_in", "1.resid_in"])
    assert in_stream[0] == its_own[0] and in_stream[-1] > 0.8


# --- the command -----------------------------------------------------------------------------

UNEVEN = Task("uneven", "", ("2", "3"), lambda r: (TOY.prompts(r)[0], TOY.prompts(r)[1] + "9"))


@pytest.fixture
def command(tmp_path, monkeypatch, one_thread):  # noqa: F811
    """A bridged pair of copies with a circuit of the toy task; runs steer.py on it."""
    run = tmp_path / "sparse"
    dense = tmp_path / "dense"
    run.mkdir()
    model, cfg, constants = toy_setup(run, method="attribution")
    model.save(str(dense))
    net = couple(model, copy.deepcopy(model))
    net.bridges.dense_hash = weights_hash(str(dense))
    torch.save(net.bridges.state_dict(), run / "bridges.pt")
    (run / "toy").mkdir()
    (circuit,) = prune.prune(loaded(model, cfg, constants), TOY, cfg, lambda text: None)
    circuit["nodes"][READ] = [0, 1, 2]  # the others are to do nothing
    circuit["n_nodes"] = sum(map(len, circuit["nodes"].values()))
    circuit["examples"] = []  # they show the nodes as they were
    (run / "toy" / "circuit.json").write_text(json.dumps(circuit))
    for name, task in (("toy", TOY), ("uneven", UNEVEN)):
        monkeypatch.setitem(TASKS, name, task)
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())

    def go(*args, task="toy", dense=dense):
        return steer.main([f"--task={task}", f"--run={run}", f"--dense={dense}", f"--data={run}",
                           "--pairs=40", *args])

    def result():
        return json.loads((run / "steer" / "toy" / "steer.json").read_text())

    go.run = run
    go.dense = dense
    go.circuit = circuit
    go.result = result
    return go


def test_steer_json_has_each_curve_and_the_table_shows_it(command, capsys):
    assert command("--channels=1") == 0
    out = capsys.readouterr().out
    r = command.result()
    assert r["task"] == "toy" and r["n_pairs"] == 40 and r["seed"] == 0
    assert r["strength"] == [i / 10 for i in range(11)]
    assert r["nodes"] == r["best_single"]["nodes"] == [f"{READ}.0"]
    assert r["commands"][0].startswith("python steer.py --task=toy")
    for part in (r, r["best_single"], r["absolute"]):
        for name in ("steered", "random", "random_node", "dense_mean_difference"):
            c = part[name]
            for k in ("mean", "q25", "q75"):
                assert len(c[k]) == 11 and all(0 <= v <= 1 for v in c[k])
            assert all(a <= b for a, b in zip(c["q25"], c["q75"]))
            # at strength 0 all are the same
            assert c["mean"][0] == pytest.approx(part["steered"]["mean"][0], rel=1e-5)
    for name in ("steered", "dense_mean_difference"):
        first = r["from_first"]["absolute"][name]["mean"]
        second = r["from_second"]["absolute"][name]["mean"]
        both = [(a + b) / 2 for a, b in zip(first, second)]
        assert both == pytest.approx(r["absolute"][name]["mean"], rel=1e-5)
    ours = r["steered"]["mean"]
    assert ours[-1] > 0.5 > ours[0]
    assert r["dense_mean_difference"]["mean"][-1] > 0.5 and r["random"]["mean"][-1] < ours[-1]
    row = next(line for line in out.splitlines() if line.strip().startswith("1.0")).split()
    shown = [float(x) for x in row[1:3]]
    assert shown == pytest.approx([ours[-1], r["random"]["mean"][-1]], abs=6e-4)


def test_without_dense_it_is_the_one_that_the_run_names(command):
    (command.run / "train.toml").write_text(f"dense = {json.dumps(str(command.dense))}\n")
    assert command("--channels=1", dense="") == 0
    assert command.result()["dense"] == str(command.dense)


def test_the_best_single_read_is_the_one_that_moves_the_dense_model_most(seed):
    model = hand_made()
    pairs = toy_pairs(16)
    # a sparse model that does not listen to channel 0; the dense one does
    deaf = copy.deepcopy(model)
    deaf.transformer.h[0].attn.c_attn.weight.zero_()
    net = couple(deaf, model)
    everything = [(site, c) for site in ("0.mlp.act_in", READ) for c in range(6)]
    assert steer.best_single(net, everything, pairs, [1.0] * 3) == (READ, 0)


def test_random_directions_are_as_long_as_the_perturbation(monkeypatch, seed):
    model = random_model(n_layer=1)
    pairs = toy_pairs(8)
    net = couple(model, copy.deepcopy(model))
    seen = []

    def watched(model, pairs, site, change):
        seen.append((len(pairs), change))
        return steered(model, pairs, site, change)

    monkeypatch.setattr(steer, "steered", watched)
    cfg = parse(steer.SteerConfig, ["--draws=4"])
    steer.compare(net, [(READ, 0), (READ, 2)], [], pairs, pairs, [0.5] * 3, cfg)
    *randoms, (_, ours), _ = seen
    assert len(randoms) == 4 and all(n == 2 for n, _ in randoms)
    size = ours.norm(dim=-1)
    for draw, (_, change) in enumerate(randoms):
        rows = torch.tensor([2 * draw, 2 * draw + 1, 2 * draw + 8, 2 * draw + 9])
        T = change.shape[1]
        assert torch.allclose(change.norm(dim=-1), size[rows, :T], rtol=1e-4, atol=1e-6)
        assert (change - ours[rows, :T]).abs().max() > 1e-3


def test_nodes_by_hand_are_those_and_no_others(command):
    assert command(f"--node={READ}.2,{READ}.0") == 0
    r = command.result()
    assert set(r["nodes"]) == {f"{READ}.2", f"{READ}.0"}
    assert r["best_single"]["nodes"] == [f"{READ}.0"]


def test_edited_in_the_stream_a_channel_may_be_changed_before_it_is_read(command, capsys):
    assert command("--edit=stream", "--channels=1") == 0
    r = command.result()
    assert r["nodes"] == r["best_single"]["nodes"] == ["0.resid_in.0"]
    assert r["steered"]["mean"][-1] > 0.5 > r["steered"]["mean"][0]
    assert command("--edit=stream", "--node=0.resid_mid.2,0.resid_mid.0") == 0
    assert set(command.result()["nodes"]) == {"0.resid_mid.2", "0.resid_mid.0"}
    shutil.rmtree(command.run / "steer")
    refused(command, capsys, "--edit=stream", f"--node={READ}.0", says=["0.resid_in.0", "nearest"])
    refused(command, capsys, "--edit=strem", says=["edit"])


def test_a_random_node_is_none_of_ours_and_in_the_stream_none_of_our_channels():
    reads_ = [(READ, 0), (READ, 1), ("1.attn.act_in", 0)]
    assert steer.not_among(reads_, [(READ, 0)]) == [(READ, 1), ("1.attn.act_in", 0)]
    streams_ = [("0.resid_in", 0), ("0.resid_in", 1), ("1.resid_in", 0), ("1.resid_in", 1)]
    assert steer.not_among(streams_, [("0.resid_in", 0)]) == [("0.resid_in", 1), ("1.resid_in", 1)]


def test_the_stream_is_edited_without_data(command):
    (command.run / "train.bin").unlink()
    assert command("--edit=stream", "--channels=1") == 0


def test_without_matplotlib_there_is_the_table_and_a_line(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command() == 0
    out = capsys.readouterr().out
    assert "pip install -r requirements-extra.txt" in out and "strength" in out
    assert not (command.run / "steer" / "toy" / "steer.png").exists()


def test_with_matplotlib_there_is_a_plot(command):
    pytest.importorskip("matplotlib")
    assert command() == 0
    assert (command.run / "steer" / "toy" / "steer.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pairs_from_a_file_steer_by_the_circuit_of_that_very_file(command, capsys):
    r = random.Random(0)
    pairs = list(dict.fromkeys(TOY.prompts(r) for _ in range(90)))
    file = command.run / "my pairs.jsonl"
    lines = [json.dumps({"prompts": pair, "answers": ["2", "3"]}) for pair in pairs]
    file.write_text("\n".join(lines))
    circuit = command.run / "my_pairs" / "circuit.json"
    circuit.parent.mkdir()
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    content = {**command.circuit, "task": "my_pairs"}
    circuit.write_text(json.dumps(content))
    refused(command, capsys, task=str(file), says=["other pairs"])
    circuit.write_text(json.dumps({**content, "task_file": {"path": "", "sha256": sha256}}))
    assert command("--channels=1", task=str(file)) == 0
    result = json.loads((command.run / "steer" / "my_pairs" / "steer.json").read_text())
    assert result["task"] == "my_pairs" and 10 < result["n_pairs"] < 40  # all that are held out
    assert result["steered"]["mean"][-1] > 0.5 > result["steered"]["mean"][0]

    shutil.rmtree(command.run / "steer")
    file.write_text("\n".join(lines[1:]))
    refused(command, capsys, task=str(file), says=["other pairs"])
    refused(command, capsys, task=str(file.with_name("no.csv")), says=["no.csv"])


def refused(command, capsys, *args, says, task="toy"):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        command(*args, task=task)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and all(s in err for s in says), err
    assert not (command.run / "steer").exists()


def test_bad_input_is_one_line_and_leaves_nothing(command, capsys):
    refused(command, capsys, f"--node={READ}.5", says=[f"{READ}.5", "nearest"])
    refused(command, capsys, "--node=0.attn.v.1", says=["0.attn.v.1", "no channel"])
    refused(command, capsys, task="bracket_counting", says=["prune.py", "bracket_counting"])
    refused(command, capsys, task="quotes", says=["task", "nearest"])
    other = command.run / "other.json"
    another_model = {**command.circuit["model"], "sha256": "0" * 64}
    for change, says in ((dict(task="uneven"), "uneven"),
                         (dict(model=another_model), "another model")):
        other.write_text(json.dumps({**command.circuit, **change}))
        refused(command, capsys, f"--circuit={other}", says=[says])
    other.write_text(json.dumps({**command.circuit, "task": "uneven"}))
    refused(command, capsys, f"--circuit={other}", task="uneven", says=["differ in length"])
    other.write_text(json.dumps(command.circuit)[:500])
    refused(command, capsys, f"--circuit={other}", says=["truncated"])
    for name, value in (("channels", 0), ("pairs", 0), ("draws", 0)):
        refused(command, capsys, f"--{name}={value}", says=[name])
