"""prune.py: a hand-made circuit is found exactly, and the file alone reproduces every number that it states."""
import hashlib
import json
import math
import re
from collections import defaultdict
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import prune
from data import workers
from circuit import ablate, all_edges, drop_unconnected, edges_of, graph_of
from circuit_file import circuit_of
from data.tinypython.tokenizer import DEFAULT, load_tokenizer
from find import SLACKS
from model import GPT, GPTConfig, record
from model_files import weights_hash
from masks import Gates, attribution, learn_masks, mend_
from processes import result_or_reason
from prune import node_means
from tasks import TASKS, Task, margins, task_loss
from tokens import random_windows
from toy import (CIRCUIT, SHAPE, TOY, TOY_EDGES, Digits, all_nodes, as_mask, best_fit, hand_made, kept_of, loaded, nats, one_thread,  # noqa: F401
                 parallel_model, plain_margins, random_model, scaled, toy_circuit, toy_circuits, toy_pairs, toy_prompts,
                 toy_setup, without_afrac)

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


# --- means ----------------------------------------------------------------------------------------

def test_node_means_are_the_means_over_all_windows_of_the_file(tmp_path):
    model = random_model(n_layer=2, afrac=0.5, afrac_loctypes="attn_in,attn_q,mlp_in,mlp_neuron,mlp_out")
    np.arange(8).astype("<u2").tofile(tmp_path / "one.bin")  # a single window
    got, seen = node_means(model, str(tmp_path / "one.bin"), 800, 0), {}
    model(torch.arange(8)[None], nodes=record(seen))
    assert set(got) == set(model.sites)
    for site in model.sites:  # of values, of what their heads gathered
        torch.testing.assert_close(got[site], seen[site.replace("attn.v", "attn.y")][0].mean(0), rtol=1e-4, atol=1e-6)
    rows = np.random.default_rng(3).integers(0, 10, 10)  # three windows, each about a third of the draws
    rows.astype("<u2").tofile(tmp_path / "three.bin")
    got, sums = node_means(model, str(tmp_path / "three.bin"), 24_000, 1), defaultdict(float)
    for i in range(3):
        model(torch.from_numpy(rows[i : i + 8])[None], nodes=lambda s, x: sums.update({s: sums[s] + x[0].mean(0) / 3}) or x)
    for site in model.sites:
        torch.testing.assert_close(got[site], sums[site.replace("attn.v", "attn.y")], rtol=0.1, atol=0.05)


def test_node_means_refuse_a_file_shorter_than_a_block(tmp_path):
    np.arange(7).astype("<u2").tofile(tmp_path / "short.bin")
    with pytest.raises(ValueError, match="short.bin"):
        node_means(random_model(), str(tmp_path / "short.bin"), 800, 0)


def test_means_are_over_windows_as_long_as_in_training(tmp_path, monkeypatch):
    model = random_model(block_size=1024)
    model, cfg, _ = toy_setup(tmp_path, model)
    lengths = []

    def windows(path, vocab_size, block_size, *rest):
        lengths.append(block_size)
        return random_windows(path, vocab_size, block_size, *rest)

    monkeypatch.setattr(prune, "random_windows", windows)
    for window, length in ((0, 256), (16, 16), (1024, 1024)):
        got = prune.constants_of(model, replace(cfg, window=window))
        want = node_means(model, str(tmp_path / "train.bin"), 2048, 0, window=length)
        assert lengths == [length, length] and all(torch.equal(got[s], want[s]) for s in model.sites)
        assert prune.settings_in_file(replace(cfg, window=window))["window"] == length
        lengths.clear()
    (tmp_path / "train.toml").write_text("block_size = 512\n")
    prune.constants_of(model, cfg)
    assert lengths == [512]
    with pytest.raises(ValueError, match="window 2000"):
        prune.constants_of(model, replace(cfg, window=2000))


def test_means_over_data_of_another_tokenizer_are_refused(tmp_path):
    model, cfg, _ = toy_setup(tmp_path)
    (tmp_path / "meta.json").write_text('{"tokenizer_hash": "of another one"}')
    with pytest.raises(ValueError, match="another tokenizer"):
        prune.constants_of(model, cfg)


# --- gates and mask learning ----------------------------------------------------------------------

def test_gates_are_one_per_node_and_tying_shares_those_of_query_and_key():
    model = random_model(n_layer=2)
    nodes = sum(len(m) for m in all_nodes(model).values())
    free, tied = Gates(model, False), Gates(model, True)
    assert (free.n_parameters, tied.n_parameters) == (nodes, nodes - 2 * 6)
    for gates in (free, tied):
        value = gates.split(torch.randperm(gates.n_parameters)[gates.index])
        assert {s: len(v) for s, v in value.items()} == {s: len(m) for s, m in all_nodes(model).items()}
        for l in "01":
            assert torch.equal(value[f"{l}.attn.q"], value[f"{l}.attn.k"]) == (gates is tied)
        assert len(set(torch.cat(list(value.values())).tolist())) == gates.n_parameters


def test_masks_keep_the_needed_nodes_close_the_useless_ones_and_repeat(tmp_path):
    model, cfg, constants = toy_setup(tmp_path)
    gates, pairs = Gates(model, False), toy_pairs()
    tau = learn_masks(model, pairs, constants, gates, cfg, lambda *_: None)
    assert tau.shape == (len(gates.index),) and float(tau.abs().max()) <= 1
    assert kept_of({s: t > 0 for s, t in gates.split(tau).items()}) == CIRCUIT
    cfg.steps = 5  # before the clamp makes all runs alike
    a, b = (learn_masks(model, pairs, constants, gates, cfg, lambda *_: None) for _ in range(2))
    cfg.seed = 1
    assert torch.equal(a, b) and not torch.equal(a, learn_masks(model, pairs, constants, gates, cfg, lambda *_: None))


def test_taus_stay_clamped_under_a_huge_learning_rate(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, lr=5.0, steps=5, target_loss=(99.0,))
    tau = learn_masks(model, toy_pairs(), constants, Gates(model, False), cfg, lambda *_: None)
    assert float(tau.abs().max()) == 1.0


def test_learning_that_ends_with_a_broken_circuit_goes_back_to_the_fewest_gates_that_met_the_target(tmp_path):
    for target, works in ((0.4, True), (99.0, False)):
        model, cfg, constants = toy_setup(tmp_path, lr=1.0, k_coef=5.0, steps=20, target_loss=(target,))
        gates = Gates(model, False)
        tau = learn_masks(model, toy_pairs(), constants, gates, cfg, lambda *_: None)
        open_gates = drop_unconnected(model, {s: t > 0 for s, t in gates.split(tau).items()}, (2, 3))
        assert (nats(margins(model, toy_pairs(), ablate(open_gates, constants))) <= target * 1.2) if works else not kept_of(open_gates)


def test_of_the_gates_that_broke_a_circuit_those_wanted_open_are_opened_wide():
    whole = torch.tensor([0.2, 0.1, 0.3, -0.5, 0.4])
    after = torch.tensor([-0.1, -0.2, -0.1, 0.1, 0.3])  # three closed, one opened
    for wanted, opened in (([1.0, 0.01, -0.5, 9.0, 9.0], [0]), ([1.0, 0.2, -0.5, 0.0, 0.0], [0, 1]),
                           ([0.01, 0.0, 0.0, 9.0, 9.0], [0, 1, 2]), ([0.0, -1.0, 0.0, 5.0, 0.0], [0, 1, 2])):
        tau = after.clone()
        mend_(tau, whole, torch.tensor(wanted), 0.8)
        want = whole.clone()
        want[opened] = 1.0
        assert torch.equal(tau, want), wanted


def test_attribution_is_the_first_order_effect_of_closing_each_gate(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, random_model())
    model, pairs, gates = model.double(), toy_pairs(8), Gates(model, False)
    constants = {s: c.double() for s, c in constants.items()}
    got, step = attribution(model, pairs, constants, gates).double(), 1e-3

    def loss(node, change):
        flat = torch.ones(len(gates.index), dtype=torch.double)
        flat[node] += change
        return task_loss(model(pairs.ids, nodes=ablate(gates.split(flat), constants))[0][range(16), pairs.last], pairs).item()

    want = torch.tensor([abs(loss(i, step) - loss(i, -step)) / (2 * step) for i in range(len(got))], dtype=torch.double)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


# --- the whole: prune() and its file -----------------------------------------------------------------

def test_the_hand_made_circuit_is_found_exactly(tmp_path):
    _, _, circuit = toy_circuit(tmp_path)
    assert circuit["nodes"] == CIRCUIT and circuit["edges"] == TOY_EDGES
    assert (circuit["n_nodes"], circuit["n_edges"]) == (3, 2)


def test_the_same_seed_gives_the_same_circuit_file(tmp_path):
    (_, _, a), (_, _, b), (_, _, c) = toy_circuit(tmp_path), toy_circuit(tmp_path), toy_circuit(tmp_path, seed=1)
    assert a == b and a != c


def test_the_circuit_has_every_field_of_the_format(tmp_path):
    model, cfg, c = toy_circuit(tmp_path)
    assert {"format", "model", "task", "target_loss", "loss", "loss_heldout", "unpruned_loss", "ablation", "logit_scale", "logit_shift",
            "nodes", "edges", "means", "n_nodes", "n_edges", "validation", "seed", "settings"} <= set(c)
    assert c["model"]["sha256"] == hashlib.sha256((tmp_path / "final_model.pt").read_bytes()).hexdigest()
    assert (c["model"]["dir"], c["task"], c["target_loss"], c["ablation"], c["seed"]) == (str(tmp_path), "toy", 0.4, "mean", 0)
    assert c["settings"]["steps"] == 150 and c["loss"] <= 0.4
    assert all(len(c["means"][s]) == len(m) for s, m in all_nodes(model).items())


def read(model, c, pairs, keep=True):
    """Margins by the file alone: the circuit runs free, or with keep=False all but its nodes; the rest sits at the file's means."""
    means, edges = {s: torch.tensor(m) for s, m in c["means"].items()}, {k: torch.zeros_like(e) for k, e in all_edges(model).items()}
    for a, j, b, i, _ in c["edges"]:
        edges[a, b][graph_of(model).wires[a, b].place(j, i)] = True
    mask = as_mask(model, c["nodes"])
    if not keep:
        mask, edges = {s: ~m for s, m in mask.items()}, all_edges(model)
    return plain_margins(model, mask, edges, means, pairs)


def test_a_reader_of_the_file_alone_gets_the_same_losses(tmp_path):
    for ablation in ("mean", "zero"):
        model, cfg, means = toy_setup(tmp_path, ablation=ablation)
        constants = {s: (0 if ablation == "zero" else 1) * m for s, m in means.items()}
        (c,) = json.loads(json.dumps(list(prune.prune(loaded(model, cfg, constants), TOY, cfg, lambda *_: None))))
        heldout, v = toy_pairs(100, "heldout"), c["validation"]
        kept = scaled(read(model, c, heldout), c["logit_scale"], c["logit_shift"])
        assert c["loss_heldout"] == v["sufficiency"] == pytest.approx(nats(kept), abs=2e-4)
        assert v["sufficiency_accuracy"] == pytest.approx((kept > 0).double().mean().item(), abs=0.011)
        other = {**c, "means": {s: (0 * m if ablation == "mean" else m).tolist() for s, m in means.items()}}
        assert abs(nats(read(model, c, heldout)) - nats(read(model, other, heldout))) > 2e-3  # which constant matters here
        without = read(model, c, heldout, keep=False)
        assert v["necessity"] == pytest.approx(nats(without), abs=2e-4) and v["necessity"] > 0.6
        assert c["unpruned_loss"] == pytest.approx(nats(margins(model, heldout).double()), abs=2e-4)
        on_fit_pairs = scaled(read(model, c, toy_pairs(256).take(torch.arange(24))), c["logit_scale"], c["logit_shift"])
        assert c["loss"] == pytest.approx(nats(on_fit_pairs), abs=2e-4)


def test_scale_and_shift_are_fitted_on_training_pairs_not_on_heldout_ones(tmp_path):
    model, _, c = toy_circuit(tmp_path)
    train = best_fit(read(model, c, toy_pairs(256).take(torch.arange(24))))
    heldout = best_fit(read(model, c, toy_pairs(100, "heldout")))
    assert math.dist(train, heldout) > 0.1  # else the test could not tell
    assert (c["logit_scale"], c["logit_shift"]) == pytest.approx(train, abs=0.02)


def test_examples_show_the_pruned_models_activations_and_probabilities(tmp_path):
    model, _, c = toy_circuit(tmp_path)
    heldout = toy_pairs(100, "heldout")
    p = torch.sigmoid(scaled(read(model, c, heldout), c["logit_scale"], c["logit_shift"]))
    for i, ex in enumerate(c["examples"]):
        ids = heldout.ids[i, : int(heldout.last[i]) + 1]
        assert ex["tokens"] == [str(t) for t in ids.tolist()] and {ex["answer"], ex["wrong"]} == {"2", "3"}
        assert ex["p_answer"] == pytest.approx(p[i].item(), abs=1e-3)
        h = model.transformer.h[0].ln_1(model.embed(ids[None]))[0, :, 0]
        assert ex["activations"]["0.attn.act_in"] == [pytest.approx(h.tolist(), abs=1e-4)]


@pytest.mark.parametrize("standalone", [False, True])
def test_what_a_file_says_of_standing_alone_is_what_its_losses_were_measured_with(tmp_path, standalone):
    model = hand_made()
    model.config.afrac, model.config.afrac_loctypes = 0.5, "attn_in,attn_v"
    model, cfg, content = toy_circuit(tmp_path, model, standalone=standalone)
    circuit, constants = circuit_of(content, GPT.load(str(tmp_path)).requires_grad_(False))
    assert circuit.standalone == content["settings"]["standalone"] == standalone
    ran_in = without_afrac(GPT.load(str(tmp_path))) if standalone else GPT.load(str(tmp_path))
    margin = plain_margins(ran_in, circuit.mask, circuit.edges, constants, toy_pairs(100, "heldout"))
    assert content["loss_heldout"] == pytest.approx(nats(scaled(margin, circuit.scale, circuit.shift)), abs=1e-4)


def test_fewer_heldout_pairs_than_examples_still_give_a_circuit(tmp_path):
    _, _, c = toy_circuit(tmp_path, heldout_pairs=3)
    assert c["validation"]["heldout_pairs"] == 3 and 0 < len(c["examples"]) <= 6


def test_an_unsolved_task_is_an_error_that_says_so(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, random_model(std=0.01))
    with pytest.raises(ValueError, match="does not solve toy"):
        list(prune.prune(loaded(model, cfg, constants), TOY, cfg, lambda *_: None))


def test_whether_a_model_solves_a_task_is_seen_on_heldout_pairs_calibrated_on_training_ones(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model(), target_loss=(0.01,))
    model.lm_head.weight.mul_(0.3)
    heldout = margins(model, toy_pairs(100, "heldout"))
    train = best_fit(margins(model, toy_pairs(256).take(torch.arange(24))))
    at_best = nats(scaled(heldout, *train))
    assert at_best - nats(scaled(heldout, *best_fit(heldout))) > 0.005 and at_best < nats(heldout)  # else the test could not tell
    with pytest.raises(ValueError) as error:
        list(prune.prune(loaded(model, cfg, constants), TOY, cfg, lambda *_: None))
    said = re.search(r"loss ([\d.]+) nats held out \(([\d.]+) calibrated\)", str(error.value))
    assert [float(x) for x in said.groups()] == pytest.approx([nats(heldout), at_best], abs=2e-3)


def test_a_loss_that_is_not_a_number_solves_nothing(tmp_path):
    model, cfg, constants = toy_setup(tmp_path)
    model.lm_head.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match="does not solve toy"):
        list(prune.prune(loaded(model, cfg, constants), TOY, cfg, lambda *_: None))


# --- several targets, attribution, minimal ---------------------------------------------------------

def test_a_target_that_cannot_be_met_costs_no_other_its_circuit(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model(cross=-0.3), target_loss=(1e-6, 0.5))
    said = []
    (c,) = prune.prune(loaded(model, cfg, constants), TOY, cfg, said.append)
    assert c["target_loss"] == 0.5 and c["settings"]["target_loss"] == (1e-6, 0.5)
    assert sum("does not solve toy" in text and "target 1e-06" in text for text in said) == 1
    one = replace(cfg, target_loss=(0.5,))
    (alone,) = prune.prune(loaded(model, one, constants), TOY, one, said.append)
    assert (alone["nodes"], alone["edges"]) == (c["nodes"], c["edges"])
    hopeless = replace(cfg, target_loss=(1e-6, 1e-7))
    with pytest.raises(ValueError, match="target 1e-06"):
        list(prune.prune(loaded(model, hopeless, constants), TOY, hopeless, said.append))



def test_several_targets_give_circuits_that_meet_each_and_do_not_grow_with_the_target(tmp_path):
    _, _, circuits = toy_circuits(tmp_path, parallel_model(cross=-0.3), target_loss=(0.36, 0.5, 0.6))
    assert [c["target_loss"] for c in circuits] == [0.36, 0.5, 0.6] and all(c["loss"] <= c["target_loss"] for c in circuits)
    for size in ("n_nodes", "n_edges"):
        assert [c[size] for c in circuits] == sorted((c[size] for c in circuits), reverse=True)
    assert circuits[0]["n_edges"] > circuits[2]["n_edges"]


def test_of_several_targets_each_has_the_circuit_of_a_pruning_for_it_alone(tmp_path, monkeypatch):
    learnt_for = []

    def noted(*args):
        learnt_for.append(args[4].target_loss)
        return learn_masks(*args)

    monkeypatch.setattr("find.learn_masks", noted)
    alone = []
    for target in (0.36, 0.6):
        alone += toy_circuits(tmp_path, parallel_model(cross=-0.3), target_loss=(target,))[2]
    _, _, together = toy_circuits(tmp_path, parallel_model(cross=-0.3), target_loss=(0.36, 0.6))
    assert learnt_for == [(0.36,), (0.6,)] * 2  # masks for the lower leave more gates open
    for one, other in zip(alone, together, strict=True):
        assert one.pop("settings") != other.pop("settings")
        assert one == other


def test_attribution_ranks_without_mask_learning_and_gives_another_circuit(tmp_path, monkeypatch):
    options = dict(target_loss=(0.6,))
    _, _, learned = toy_circuit(tmp_path, parallel_model(cross=-0.3), **options)
    monkeypatch.setattr("find.learn_masks", None)
    model, cfg, c = toy_circuit(tmp_path, parallel_model(cross=-0.3), method="attribution", **options)
    assert c["loss"] <= 0.6 and c["nodes"] != learned["nodes"] and c["n_edges"] > learned["n_edges"]
    constants = {s: torch.tensor(m) for s, m in c["means"].items()}
    effect = attribution(model, toy_pairs(256).take(torch.arange(24)), constants, gates := Gates(model, False))
    leading = torch.zeros(len(effect), dtype=torch.bool)
    leading[effect.argsort(descending=True)[: sum(map(len, c["nodes"].values()))]] = True
    assert c["nodes"] == kept_of(gates.split(leading))  # all of the leading nodes have a path


def test_a_minimal_circuits_file_lists_what_is_left_and_only_that(tmp_path):
    model, _, c = toy_circuit(tmp_path, parallel_model(cross=-0.5), minimal=True, target_loss=(0.358,))
    mask, edges, wires = as_mask(model, c["nodes"]), {k: torch.zeros_like(e) for k, e in all_edges(model).items()}, graph_of(model).wires
    for a, j, b, i, weight in c["edges"]:
        assert {a: mask[a][j], b: mask[b][i]} == {a: True, b: True}
        edges[a, b][wires[a, b].place(j, i)] = True
    assert kept_of(drop_unconnected(model, mask, (2, 3), edges)) == c["nodes"]  # each has a path over the listed edges alone
    whole = [e[:4] for e in edges_of(model, mask)]
    removed = [e for e in whole if e not in [e[:4] for e in c["edges"]]]
    assert removed == [["0.attn.act_in", 0, "0.attn.v", 1], ["0.attn.act_in", 1, "0.attn.v", 2]]
    assert c["validation"]["minimal"].items() >= {"certified": True, "pairs": 24, "target": SLACKS[0] * 0.358}.items() and c["loss"] <= SLACKS[0] * 0.358
    before = c["validation"]["minimal"]["before"]
    assert before[0] >= c["n_nodes"] and before[1] > c["n_edges"]
    tried = c["n_nodes"] + c["n_edges"]
    assert c["validation"]["minimal"]["parts"] == tried and c["validation"]["minimal"]["statement"].startswith(f"Each of the {tried} nodes and edges")
    heldout = toy_pairs(100, "heldout")  # the losses are those of the model without the edge
    assert c["loss_heldout"] == pytest.approx(nats(scaled(read(model, c, heldout), c["logit_scale"], c["logit_shift"])), abs=2e-5)
    with_it = {**c, "edges": [*c["edges"], [*removed[0], 0.0]]}
    assert abs(c["loss_heldout"] - nats(scaled(read(model, with_it, heldout), c["logit_scale"], c["logit_shift"]))) > 1e-3
    shown, means = c["examples"][0], torch.tensor(c["means"]["0.attn.act_in"])
    assert shown["p_answer"] == pytest.approx(scaled(read(model, c, heldout), c["logit_scale"], c["logit_shift"])[0].sigmoid().item(), abs=1e-4)
    first, second = (torch.tensor(shown["activations"]["0.attn.act_in"][c["nodes"]["0.attn.act_in"].index(i)]) for i in (0, 1))
    value = shown["activations"]["0.attn.v"][c["nodes"]["0.attn.v"].index(1)]
    assert value == pytest.approx((second - 0.5 * means[0]).tolist(), abs=2e-4)  # channel 0 no longer speaks here, its mean does
    assert value != pytest.approx((second - 0.5 * first).tolist(), abs=1e-2)


def test_a_circuit_is_certified_minimal_only_where_it_was_minimised(tmp_path):
    """Here even all nodes' loss lies between the search's aim and the target: the target is met, but nothing was left out."""
    for method in ("learned", "attribution"):
        _, _, c = toy_circuit(tmp_path, parallel_model(cross=-0.3), minimal=True, target_loss=(0.34,), method=method)
        assert SLACKS[0] * 0.34 < c["loss"] <= 0.34 and c["validation"]["minimal"]["certified"] is False
    for minimal in (True, False):
        assert toy_circuit(tmp_path, minimal=minimal, method="attribution")[2]["validation"]["minimal"]["certified"] is minimal


def test_there_is_no_certificate_where_every_removal_would_be_refused(tmp_path):
    """No set of nodes is missed by 3 nats: to leave nothing out for that reason says nothing."""
    said = []
    model, cfg, constants = toy_setup(tmp_path, minimal=True, necessity=3.0)
    (c,) = list(prune.prune(loaded(model, cfg, constants), TOY, cfg, said.append))
    assert c["validation"]["minimal"] == {"certified": False} and any("not minimised" in line and "3.0 nats" in line for line in said)
    (c,) = list(prune.prune(loaded(model, cfg, constants), TOY, replace(cfg, necessity=0.3), said.append))
    assert c["validation"]["minimal"]["certified"] and "less than 0.3 nats" in c["validation"]["minimal"]["statement"]


# --- the command ----------------------------------------------------------------------------------------

def test_a_circuit_is_known_by_the_weights_and_data_that_it_was_found_with(tmp_path, monkeypatch):
    model, cfg, _ = toy_setup(tmp_path)
    monkeypatch.setitem(TASKS, "toy", TOY)
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    find = prune.find

    def slow(*args):  # meanwhile a training run saves
        random_model(vocab_size=10, block_size=8).save(str(tmp_path))
        yield from find(*args)

    before = weights_hash(str(tmp_path))
    monkeypatch.setattr(prune, "find", slow)
    (circuit,) = prune.prune_task(cfg, "toy", lambda text: None)
    assert circuit["model"]["sha256"] == before != weights_hash(str(tmp_path))
    assert prune.already_pruned(cfg, "toy") is None
    model.save(str(tmp_path))
    assert prune.already_pruned(cfg, "toy") == json.loads(json.dumps([circuit]))
    np.random.default_rng(1).integers(0, 10, 4000).astype("<u2").tofile(tmp_path / "train.bin")
    assert prune.already_pruned(cfg, "toy") is None  # its means are of other data
    path = tmp_path / "toy" / "circuit.json"
    old = json.loads(path.read_text())
    del old["data"]  # as files were before they said so
    path.write_text(json.dumps(old))
    assert prune.already_pruned(cfg, "toy") == [old]


def test_what_cannot_be_written_is_said_before_the_search(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prune, "load", lambda cfg: pytest.fail("it was loaded"))
    (tmp_path / "file").write_text("")
    pairs = tmp_path / "with_as.jsonl"
    pairs.write_text("".join(json.dumps({"prompts": [f"x{i} = 1", f"x{i} = 2"], "answers": ["1", "2"]}) + "\n" for i in range(80)))
    for options, says in ((f"--out_dir={tmp_path}/file/x", "Not a directory"), (f"--task={pairs}", "with_as"),
                          ("--target_loss=0.15,0.1500001", "share a folder")):
        with pytest.raises(SystemExit) as stop:
            prune.main([f"--model={model_dir}", options])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and says in err



def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model_dir(tmp_path):
    random_model(vocab_size=2048, block_size=64).save(str(tmp_path / "model"))
    np.zeros(1000, "<u2").tofile(tmp_path / "train.bin")
    return tmp_path / "model"


@pytest.mark.parametrize("args, says", [
    (["--task=single_quote"], "single_double_quote"), (["--targte_loss=1"], "target_loss"), (["--target_loss=-1"], "target_loss"),
    (["--target_loss=nan"], "target_loss"), (["--ablation=median"], "ablation"), (["--steps=0"], "steps"), (["--steps=x"], "steps"),
    (["--model={tmp}/nowhere"], "nowhere"), (["--data={tmp}/nowhere"], "nowhere"), (["--tokenizer={tmp}/nowhere"], "nowhere"),
    (["--fit_pairs=9", "--train_pairs=8"], "fit_pairs"), ([], "does not solve"), (["--task=all", "--target_loss=0.001"], "no task has a circuit"),
    (["--device=nonsense"], "device")], ids=str)
def test_bad_input_is_one_line_exit_2_and_nothing_written(args, says, model_dir, capsys):
    given = [f"--model={model_dir}", f"--data={model_dir.parent}", f"--tokenizer={DEFAULT}", "--mean_tokens=256", "--train_pairs=64", "--fit_pairs=16",
             "--heldout_pairs=8", *(a.format(tmp=model_dir.parent) for a in args)]
    before = files(model_dir.parent)
    with pytest.raises(SystemExit) as stop:
        prune.main(given)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err
    assert files(model_dir.parent) == before and not (model_dir / "single_double_quote").exists()


@pytest.mark.parametrize("spoil, says", [
    (lambda d: (d / "final_model.pt").write_bytes((d / "final_model.pt").read_bytes()[:5000]), "final_model.pt"),
    (lambda d: (d / "final_model.pt").unlink(), "final_model.pt"),
    (lambda d: (d.parent / "train.bin").write_bytes(b"\0" * 20), "train.bin"),
    (lambda d: (d.parent / "train.bin").write_bytes(b"\0" * 1001), "train.bin"),
    (lambda d: np.full(1000, 5000, "<u2").tofile(d.parent / "train.bin"), "train.bin"),
    (lambda d: random_model(vocab_size=100, block_size=64).save(str(d)), "2048"),
], ids=["truncated", "missing", "short data", "odd data", "foreign data", "other vocabulary"])
def test_spoilt_files_are_one_line_exit_2_and_nothing_written(spoil, says, model_dir, capsys):
    spoil(model_dir)
    test_bad_input_is_one_line_exit_2_and_nothing_written([], says, model_dir, capsys)


# --- --task=all ------------------------------------------------------------------------------------

class Here(Executor):
    """A pool of no processes, so that what a test replaces is replaced in the workers too."""

    def __init__(self, jobs, context, set_threads, threads):
        assert jobs >= 1 and context.get_start_method() == "spawn"

    def submit(self, f, *args):
        done = Future()
        done.set_result(f(*args))
        return done


def two_tasks_model():
    """hand_made, whose channel 3 also reaches answers 6 and 7, through an MLP."""
    model = hand_made()
    model.transformer.h[0].mlp.c_fc.weight[1, 3], model.transformer.h[0].mlp.c_proj.weight[4, 1] = 1.0, 1.0
    model.lm_head.weight[6:8, 4] = torch.tensor([1.0, -1.0])
    return model


ALL = {"toy": TOY, "through": Task("through", "", ("6", "7"), toy_prompts), "blind": Task("blind", "", ("2", "3"), lambda r: ("0" + toy_prompts(r)[0],) * 2),
       "foreign": Task("foreign", "", ("23", "3"), toy_prompts)}


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """Runs --task=all on four toy tasks: two can be solved, one cannot, one has an answer of two tokens."""
    for module in ("tasks", "prune"):
        monkeypatch.setattr(f"{module}.TASKS", ALL)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    toy_setup(tmp_path, two_tasks_model())

    def run(*args):
        return prune.main([f"--model={tmp_path}", f"--data={tmp_path}", "--task=all", "--target_loss=0.4", "--method=attribution", "--mean_tokens=2048",
                           "--train_pairs=256", "--fit_pairs=24", "--heldout_pairs=50", *args])
    run.folder = tmp_path
    return run


def stamps(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino, p.read_bytes()) for p in sorted(folder.rglob("circuit.json"))}


def test_all_tasks_give_a_table_the_geometric_mean_of_the_edges_and_the_reasons_of_the_rest(everything, capsys):
    assert everything() == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1]: cells[2:-1] for line in lines if len(cells := [c.strip() for c in line.split("|")]) > 3 and cells[1] in ALL}
    files = {task: json.loads((everything.folder / task / "circuit.json").read_text()) for task in ("toy", "through")}
    assert list(rows) == list(files) and {f["n_edges"] for f in files.values()} == {2, 4}
    for task, f in files.items():
        assert rows[task] == [f"{f['unpruned_loss']:.3f}", f"{f['loss_heldout']:.3f}", str(f["n_nodes"]), str(f["n_edges"]), f"{f['validation']['necessity']:.2f}"]
        assert (f["task"], f["settings"]["task"]) == (task, task)
    (mean,) = [line for line in lines if line.startswith("geometric mean")]
    product = math.prod(f["n_edges"] for f in files.values())
    assert float(re.search(r": ([\d.]+)", mean)[1]) == pytest.approx(product ** (1 / len(files)), abs=0.05) and "2 of 4 tasks" in mean
    for task, reason in (("blind", "does not solve blind"), ("foreign", "'23' as a single token")):
        assert any(line.startswith(f"{task}: no circuit: ") and reason in line for line in lines)
        assert not (everything.folder / task).exists()


def test_each_target_has_its_own_folder_and_table(everything, capsys):
    parallel_model(cross=-0.3).save(str(everything.folder))
    assert everything("--target_loss=0.6,0.36") == 0
    tables, found = capsys.readouterr().out.split("| task ")[1:], []
    for target, table in zip(("0.6", "0.36"), tables, strict=True):
        c = json.loads((everything.folder / "toy" / f"target_{target}" / "circuit.json").read_text())
        assert c["target_loss"] == float(target) and c["settings"]["target_loss"] == [0.6, 0.36]
        assert f"target {target} nats" in table and f"edges: {c['n_edges']:.1f} over 1 of 4 tasks" in table
        found.append(c["n_edges"])
    assert found[0] < found[1] and not (everything.folder / "toy" / "circuit.json").exists()


def test_a_task_without_a_circuit_ends_nothing_and_no_circuit_at_all_is_exit_2(everything, monkeypatch, capsys):
    monkeypatch.setattr(prune, "TASKS", {k: ALL[k] for k in ("foreign", "toy")})
    assert everything() == 0
    monkeypatch.setattr(prune, "TASKS", {k: ALL[k] for k in ("foreign", "blind")})
    with pytest.raises(SystemExit) as stop:
        everything()
    text = capsys.readouterr()
    assert stop.value.code == 2 and text.err.count("\n") == 1 and "no task has a circuit" in text.err
    assert "blind: no circuit" in text.out and "foreign: no circuit" in text.out


def test_a_second_run_redoes_only_what_is_missing(everything, capsys):
    everything()
    first, table = stamps(everything.folder), capsys.readouterr().out.split("\n\n")[-1]
    everything()
    again = capsys.readouterr().out
    assert stamps(everything.folder) == first and "[toy]" not in again and again.split("\n\n")[-1] == table
    (everything.folder / "toy" / "circuit.json").unlink()
    everything("--jobs=2")  # how many at a time is no setting of a circuit
    out, second = capsys.readouterr().out, stamps(everything.folder)
    assert second["through/circuit.json"] == first["through/circuit.json"] and "[toy]" in out and "[through]" not in out
    assert second["toy/circuit.json"][2] == first["toy/circuit.json"][2]


def truncated(folder):
    path = folder / "toy" / "circuit.json"
    path.write_bytes(path.read_bytes()[:-9])


def other_weights(folder):
    model = GPT.load(str(folder))
    model.transformer.h[0].attn.c_attn.weight.data *= 1.1
    model.save(str(folder))


@pytest.mark.parametrize("args, change, redone", [
    (["--heldout_pairs=49"], None, ["through", "toy"]), (["--target_loss=0.41"], None, ["through", "toy"]), (["--seed=1"], None, ["through", "toy"]),
    ([], truncated, ["toy"]), ([], other_weights, ["through", "toy"])], ids=["held-out pairs", "target", "seed", "truncated", "weights"])
def test_a_task_is_redone_where_its_settings_its_file_or_the_model_changed(everything, args, change, redone):
    everything()
    if change:
        change(everything.folder)
    first = stamps(everything.folder)
    everything(*args)
    second = stamps(everything.folder)
    assert [k.split("/")[0] for k in sorted(second) if second[k] != first[k]] == redone


def test_of_several_tasks_none_starts_processes_of_its_own(monkeypatch):
    seen = []

    def one_of_all(cfg, task):
        seen.append(cfg.jobs)
        raise ValueError("enough")

    monkeypatch.setattr(prune, "one_of_all", one_of_all)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    with pytest.raises(SystemExit):
        prune.prune_all(prune.PruneConfig(task="all", jobs=3))
    assert seen == [1] * len(TASKS)


def test_two_jobs_write_the_circuits_that_one_writes(model_dir, tmp_path, capsys):
    model = GPT(GPTConfig(**{**SHAPE, "vocab_size": 2048, "block_size": 64, "n_layer": 1})).requires_grad_(False)
    tokenizer = load_tokenizer(DEFAULT)
    token = lambda text: tokenizer.encode_ordinary(text)[0]
    for p in model.parameters():
        p.zero_() if p.dim() > 1 else p.fill_(1.0)
    wte, head, attn = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h[0].attn
    wte[:, 5] = 1.0
    for i, (words, answers) in enumerate([((" for", " while"), (" in", ":\n")), ((" while", " return"), (":\n", "\n"))]):
        wte[[token(w) for w in words], i] = torch.tensor([9.0, -9.0])
        attn.c_attn.weight[12 + i, i] = attn.c_proj.weight[2 + i, i] = 3.0
        head[[token(a) for a in answers], 2 + i] = torch.tensor([3.0, -3.0])
    model.save(str(model_dir))
    small = dict(model=model_dir, data=tmp_path, task="all", tokenizer=DEFAULT, target_loss=0.4, mean_tokens=512, steps=3, batch_pairs=4, train_pairs=64, fit_pairs=32, heldout_pairs=32)
    assert prune.main([*(f"--{k}={v}" for k, v in small.items()), f"--out_dir={tmp_path}/two", "--jobs=2"]) == 0
    cfg = replace(prune.parse(prune.PruneConfig, [f"--{k}={v}" for k, v in small.items()]), out_dir=f"{tmp_path}/one")
    out = capsys.readouterr().out
    for task in TASKS:
        got, path = result_or_reason(partial(prune.one_of_all, cfg), task), tmp_path / "two" / task / "circuit.json"
        if isinstance(got, str):
            assert f"{task}: no circuit: {got}" in out and not path.exists()
        else:
            one, two = (json.loads((tmp_path / n / task / "circuit.json").read_text()) for n in ("one", "two"))
            assert two["settings"].pop("out_dir") == f"{tmp_path}/two" and one["settings"].pop("out_dir") and one == two
    assert {"for_while", "while_return_true"} <= {p.parent.name for p in (tmp_path / "two").rglob("circuit.json")}
