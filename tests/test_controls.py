"""controls.py: each control is what it says it is, is pruned as a circuit is, and counts as it should."""
import copy
import math
from dataclasses import replace

import pytest
import torch

import controls
from circuit import all_edges
from controls import (CONTROLS, Subject, before_training, exchanged_answers, factor_of, foreign_answers, irrelevant_feature, permuted_answers,
                      permuted_rows, random_signs, run_control)
from data.tinypython.tokenizer import DEFAULT, load_tokenizer
import minimise
from minimise import first_order, leave_out_by_gradient, leave_out_past_needed, reduce_to
from search import Search, parts_of, without
from prune import node_means
from tasks import TASKS, load_pairs
from toy import (TOY, Digits, all_nodes, as_mask, hand_made, one_thread, parallel_model, random_model, toy_pairs, toy_setup)  # noqa: F401

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


def quiet(text):
    pass


def subject_of(tmp_path, model=None, **options) -> Subject:
    model, cfg, means = toy_setup(tmp_path, model, **options)
    return Subject(model, TOY, Digits(), means, cfg, toy_pairs(256), toy_pairs(100, "heldout"), str(tmp_path))


def rows(pairs):
    return list(zip(map(tuple, pairs.prompts()), pairs.answer.tolist()))


# --- other answers --------------------------------------------------------------------------------

def test_permuted_answers_swap_the_prompts_of_half_the_pairs_and_another_half_with_another_seed(tmp_path):
    subject, swaps = subject_of(tmp_path), []
    for seed in (0, 1):
        got = permuted_answers(subject, seed).train
        assert torch.equal(got.answer, subject.train.answer) and torch.equal(got.wrong, subject.train.wrong)
        old, new = subject.train.prompts(), got.prompts()
        assert all(sorted(old[i : i + 2]) == sorted(new[i : i + 2]) for i in range(0, len(old), 2))
        swaps.append([old[i] != new[i] for i in range(0, len(old), 2)])
        assert 90 < sum(swaps[-1]) < 166
    assert swaps[0] != swaps[1]


def test_a_pair_is_permuted_by_the_same_rule_in_any_company(tmp_path):
    subject = subject_of(tmp_path)
    few = (subject.train.last[::2] == subject.train.last.min()).nonzero().flatten()  # less padded by themselves
    apart, together = permuted_answers(replace(subject, train=subject.train.take(few)), 0).train, permuted_answers(subject, 0).train.take(few)
    assert apart.prompts() == together.prompts()


def test_exchanged_answers_turn_every_pair_round(tmp_path):
    subject = subject_of(tmp_path)
    got = exchanged_answers(subject, 0)
    for old, new in ((subject.train, got.train), (subject.heldout, got.heldout)):
        right = dict(rows(old))
        assert all(answer != right[prompt] for prompt, answer in rows(new)) and len(new) == len(old)
    assert got.model is subject.model


def test_foreign_answers_are_another_tasks_and_go_with_the_same_prompts(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(DEFAULT)
    task = TASKS["single_double_quote"]
    pairs = load_pairs(task, tokenizer, 8, "train", 128)
    subject = replace(subject_of(tmp_path), task=task, tokenizer=tokenizer, train=pairs, heldout=pairs)
    own, seen = set(pairs.answer.tolist()), set()
    for seed in (0, 1, 2):
        got = foreign_answers(subject, seed).train
        assert torch.equal(got.ids, pairs.ids) and not own & set(got.answer.tolist())
        assert got.answer.tolist() == got.wrong.view(-1, 2).flip(1).flatten().tolist() and len(set(got.answer[::2].tolist())) == 1
        seen.add(tuple(tokenizer.decode([i]) for i in got.answer[:2].tolist()))
    assert len(seen) == 3 and seen <= {t.answers for t in TASKS.values()}
    monkeypatch.setattr(controls, "TASKS", {task.name: task})
    with pytest.raises(ValueError, match="no other task"):
        foreign_answers(subject, 0)


def test_the_irrelevant_feature_decides_the_answer_and_the_true_answer_does_not(tmp_path):
    tokenizer = load_tokenizer(DEFAULT)
    task = TASKS["single_double_quote"]
    pairs = load_pairs(task, tokenizer, 200, "train", 128)
    subject = replace(subject_of(tmp_path), task=task, tokenizer=tokenizer, train=pairs, heldout=pairs)
    got, truth, by_parity = irrelevant_feature(subject, 0).train, dict(rows(pairs)), {}
    assert 50 < len(got) <= 200
    for prompt, answer in rows(got):
        words = "".join(c if c.isalnum() or c == "_" else " " for c in tokenizer.decode(list(prompt))).split()
        by_parity.setdefault((max(map(len, words)) % 2, answer), []).append(truth[prompt])
    assert len(by_parity) == 2 and len({answer for _, answer in by_parity}) == 2  # one answer a parity
    for true in by_parity.values():
        share = true.count(pairs.answer[0].item()) / len(true)
        assert 0.35 < share < 0.65


# --- other models ---------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [random_signs, permuted_rows, before_training])
def test_untrained_wiring_has_as_many_weights_and_knows_nothing_of_the_old_ones(make, tmp_path):
    model = random_model(n_layer=2, keep=0.4, enable_bigram_table=True)
    subject = subject_of(tmp_path, model)
    before = copy.deepcopy(model.state_dict())
    got, again, other = make(subject, 0), make(subject, 0), make(subject, 1)
    now = got.model.state_dict()
    for name, old in before.items():
        assert torch.equal(model.state_dict()[name], old)  # the circuit's model is left alone
        assert torch.equal(again.model.state_dict()[name], now[name])
        if "ln_" in name or name == "bigram_table":
            assert torch.equal(now[name], old)
        elif make is random_signs:
            assert torch.equal(now[name].abs(), old.abs())
        elif make is permuted_rows:
            assert torch.equal(now[name].sort(-1).values, old.sort(-1).values)
        elif old.dim() > 1:
            assert now[name].count_nonzero() == old.count_nonzero()
    assert not torch.equal(now["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(now["lm_head.weight"], other.model.state_dict()["lm_head.weight"])
    own = node_means(got.model, str(tmp_path / "train.bin"), subject.settings.mean_tokens, 0)
    for site, constant in got.constants.items():  # its own means
        torch.testing.assert_close(constant, own[site])
    wires = all_edges(got.model)
    assert sum(map(len, wires.values())) == sum(int(p.count_nonzero()) for n, p in got.model.named_parameters() if "c_" in n)


# --- pruning one ----------------------------------------------------------------------------------

def test_what_can_be_learnt_is_met_and_what_cannot_is_not(tmp_path):
    subject = subject_of(tmp_path, target_loss=(0.45,), minimal=True, steps=60)
    lines = []
    said = run_control(subject, "permuted_answers", 0, 2, lines.append)
    assert not said["met"] and said["loss"] > 0.6 and len(said["curve"]) == 2 and said["curve"][1][0] == 180  # flat: no third try
    # that other model does the task with its answers exchanged
    turned = hand_made()
    turned.lm_head.weight[2:4, 3] *= -1
    said = run_control(subject_of(tmp_path, turned, target_loss=(0.45,), minimal=True, steps=60), "exchanged_answers", 0, 1, lines.append)
    assert said["met"] and (said["nodes"], said["edges"]) == (3, 2) and len(said["curve"]) == 1
    assert said["loss"] <= 0.9 * 0.45 and said["loss_at_size"] == pytest.approx(math.log(2), abs=0.02)  # of one edge nothing is left
    assert run_control(subject, "foreign_answers", 0, 2, lines.append) is None and "not to be had" in lines[-1]


def test_the_factor_is_the_luckiest_run_of_a_level_and_runs_that_missed_count_as_infinite():
    def runs(*edges):
        return [{"met": e is not None, "edges": e or 3, "flat": False} for e in edges]

    found = {"exchanged_answers": runs(40, None, 60), "foreign_answers": runs(30, None), "random_signs": runs(None)}
    assert factor_of(found, 10, "nonsense") == (3.0, 6.0, 3, 2, 5)  # two missed, and had not settled
    found["random_signs"][0]["flat"] = True
    assert factor_of(found, 10, "wiring") == (math.inf, math.inf, 0, 0, 1)
    assert factor_of(found, 10, "memorise") is None
    empty = [{"met": True, "edges": 0, "flat": False}]  # a task that its last token decides
    assert factor_of({"random_signs": empty}, 0, "wiring")[0] == 0.0


# --- many parts at once ---------------------------------------------------------------------------

def test_first_order_prices_are_the_derivatives_of_the_loss_by_each_part(tmp_path):
    """Against differences: a part scaled by 1 - h, node or edge, the rest as it is."""
    model = random_model(std=0.8, keep=0.6, n_layer=1, sink=True).double()
    constants = {s: torch.randn(len(m)).double() for s, m in all_nodes(model).items()}
    search = Search(model, constants, toy_pairs(12))
    search.quarter = search.batches[0]  # all of them, in one order
    circuit = search.fit(all_nodes(model), all_edges(model))
    price, h = first_order(search, circuit), 1e-4
    from toy import plain_margins, scaled, nats
    from circuit import graph_of
    for part in parts_of(circuit)[::5]:
        if len(part) != 3:
            continue
        a, b, i = part
        wires, losses = graph_of(model).wires[a, b], []
        layer, place = b.split(".", 1)
        block = model.transformer.h[int(layer)]
        matrix = {"attn.q": block.attn.c_attn.weight[:6], "attn.k": block.attn.c_attn.weight[6:12], "attn.v": block.attn.c_attn.weight[12:],
                  "attn.resid_delta": block.attn.c_proj.weight, "mlp.post_act": block.mlp.c_fc.weight, "mlp.resid_delta": block.mlp.c_proj.weight}[place]
        linear = {"attn.q": block.attn.c_attn, "attn.k": block.attn.c_attn, "attn.v": block.attn.c_attn, "attn.resid_delta": block.attn.c_proj,
                  "mlp.post_act": block.mlp.c_fc, "mlp.resid_delta": block.mlp.c_proj}[place]
        row = int(wires.to[i]) + {"attn.k": 6, "attn.v": 12}.get(place, 0)
        if linear.bias is None:
            linear.bias = torch.nn.Parameter(torch.zeros(linear.weight.shape[0]).double(), requires_grad=False)
        old, bias = matrix[wires.to[i], wires.source[i]].item(), linear.bias[row].item()
        for step in (h, -h):
            matrix[wires.to[i], wires.source[i]] = old * (1 - step)
            linear.bias[row] = bias + step * old * constants[a][wires.source[i]]
            margin = plain_margins(model, circuit.mask, circuit.edges, constants, search.quarter)  # some have no path
            losses.append(nats(scaled(margin, circuit.scale, circuit.shift)) * len(margin))
        matrix[wires.to[i], wires.source[i]] = old
        linear.bias[row] = bias
        assert price[part] == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=0.02, abs=1e-3), part


def test_what_goes_by_gradient_leaves_a_circuit_that_meets_the_target(tmp_path, monkeypatch):
    model, _, constants = toy_setup(tmp_path)  # a path of three nodes, beside one that means nothing
    search = Search(model, constants, toy_pairs(64))
    whole = search.fit(all_nodes(model), all_edges(model))
    assert whole.size == (6, 4)
    got = leave_out_by_gradient(search, whole, 1.05 * whole.loss, 0.0)
    assert got.loss <= 1.05 * whole.loss and got.size == (3, 2)
    assert leave_out_by_gradient(search, got, got.loss / 2, 0.0) is got  # there is nothing to go
    monkeypatch.setattr(minimise, "MANY_PARTS", 1)
    said = []
    assert minimise.minimise(search, whole, 1.05 * whole.loss, said.append).size == (3, 2)
    assert sum("by gradient" in line for line in said) == 2  # what is left is asked in both ways
    assert sum("past what is needed" in line for line in said) == 1


def test_a_part_that_the_gradient_is_wrong_about_does_not_keep_those_behind_it(tmp_path, monkeypatch):
    model, _, constants = toy_setup(tmp_path)
    search = Search(model, constants, toy_pairs(64))
    whole = search.fit(all_nodes(model), all_edges(model))
    needed = set(parts_of(leave_out_by_gradient(search, whole, 1.05 * whole.loss, 0.0)))
    wrong = {part: 0.0 if part in needed else 1.0 for part in parts_of(whole)}
    monkeypatch.setattr(minimise, "first_order", lambda *_: wrong)
    assert leave_out_by_gradient(search, whole, 1.05 * whole.loss, 0.0) is whole
    got = leave_out_past_needed(search, whole, 1.1 * whole.loss, 0.0)
    assert set(parts_of(got)) == needed and got.loss <= 1.05 * whole.loss  # half of what it may rise
    # so many that cannot go, and the rest is not asked
    monkeypatch.setattr(minimise, "STUBBORN", len(needed) - 1)
    assert leave_out_past_needed(search, whole, 1.1 * whole.loss, 0.0).size == whole.size


def test_a_circuit_is_reduced_to_a_number_of_edges_whatever_that_costs(tmp_path):
    model, _, constants = toy_setup(tmp_path, parallel_model())
    search = Search(model, constants, toy_pairs(24))
    whole = search.fit(all_nodes(model), all_edges(model))
    for n in (6, 2, 0):
        got = reduce_to(search, whole, n)
        assert got.size[1] == n  # not further than asked
    assert reduce_to(search, whole, 99) is whole


# --- queries and keys that are tied ---------------------------------------------------------------

def test_tied_a_query_and_the_key_that_it_meets_are_one_part_and_go_together(tmp_path):
    model = random_model(std=0.8)
    constants = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    circuit = Search(model, constants, toy_pairs(8)).fit(all_nodes(model), all_edges(model))
    free, tied = parts_of(circuit), parts_of(circuit, tie_qk=True)
    assert len(free) - len(tied) == 6 and not any(part[0].endswith(".k") and len(part) == 2 for part in tied)
    mask, _ = without(circuit, ("0.attn.q", 2), tie_qk=True)
    assert not mask["0.attn.q"][2] and not mask["0.attn.k"][2] and circuit.mask["0.attn.k"][2]
    alone = replace(circuit, mask={**circuit.mask, "0.attn.q": torch.zeros(6, dtype=torch.bool)})
    assert ("0.attn.k", 3) in parts_of(alone, tie_qk=True)  # one that has lost its query


def test_tied_gates_are_ranked_and_kept_as_one(tmp_path):
    from masks import Gates
    from find import Ranking, leading_gates
    model = random_model(std=0.8)
    constants = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    search, gates = Search(model, constants, toy_pairs(8), tie_qk=True), Gates(model, tie_qk=True)
    order = torch.randperm(gates.n_parameters)
    for k in (5, 15, 30, gates.n_parameters):
        chosen = torch.zeros(gates.n_parameters, dtype=torch.bool)
        chosen[order[:k]] = True
        mask = gates.split(chosen[gates.index])
        assert torch.equal(mask["0.attn.q"], mask["0.attn.k"])
        got = leading_gates(search, gates, Ranking(order, k), k)
        assert not any((got.mask[s] & ~mask[s]).any() for s in mask)
