"""circuit.py: gates, cut edges, calibration, the graph of paths; circuit_file.py: read back from its file."""
import copy
import json
import math
import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import tasks
from circuit import (Circuit, ablate, all_edges, alone, between, count, drop_unconnected, edges_of, graph_of,
                     without_edges, without_topk)
from circuit_file import circuit_of, read_circuit
from tasks import calibrate, calibrated, fitting_batches, last_logits, loss_of, margins, task_loss
from toy import (CIRCUIT, EVERY_SITE, all_nodes, as_mask, by_hand, dense, hand_made, kept_of, nats, one_thread,  # noqa: F401
                 parallel_model, plain_margins, random_edges, random_model, scaled, toy_circuit, toy_pairs, without_afrac)

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


# --- ablation, logits ---------------------------------------------------------------------------

def test_gate_one_keeps_a_node_and_gate_zero_gives_its_constant():
    x, c = torch.randn(2, 3, 5), {"s": torch.randn(5)}
    fn = ablate({"s": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.25])}, c)
    y = fn("s", x)
    torch.testing.assert_close(y[..., [0, 2]], x[..., [0, 2]], rtol=0, atol=1e-6)
    assert torch.equal(y[..., [1, 3]], c["s"][[1, 3]].expand(2, 3, 2))
    torch.testing.assert_close(y[..., 4], 0.25 * x[..., 4] + 0.75 * c["s"][4])
    assert fn("elsewhere", x) is x


def test_all_gates_open_is_the_model_itself():
    model = random_model()
    idx, constants = torch.randint(0, 10, (3, 8)), {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    torch.testing.assert_close(model(idx, nodes=ablate(all_nodes(model), constants))[0], model(idx)[0])


def test_all_gates_closed_leaves_logits_that_know_only_the_last_token():
    model = random_model(enable_bigram_table=True, n_layer=2)
    constants = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    idx = torch.randint(0, 10, (4, 8))
    idx[:, -1] = 5
    logits = model(idx, nodes=ablate(all_nodes(model, False), constants))[0][:, -1]
    torch.testing.assert_close(logits, logits[:1].expand(4, -1))
    assert not torch.allclose(model(idx)[0][0, -1], model(idx)[0][1, -1])


def test_last_logits_are_the_models_at_the_last_token_whatever_the_padding(monkeypatch):
    model, pairs = random_model(n_layer=2, enable_bigram_table=True), toy_pairs(20)
    assert len(set(pairs.last.tolist())) > 1
    got = last_logits(model, pairs)
    for row, last, logits in zip(pairs.ids, pairs.last.tolist(), got):
        torch.testing.assert_close(logits, model(row[None, : last + 1])[0][0, -1], rtol=1e-4, atol=1e-5)
    right_minus_wrong = (got.gather(1, pairs.answer[:, None]) - got.gather(1, pairs.wrong[:, None])).flatten()
    for widest in (1, 2 ** 22):  # a pair at a time, and all at once
        monkeypatch.setitem(tasks.WIDEST, "cpu", widest)
        torch.testing.assert_close(margins(model, pairs), right_minus_wrong, rtol=1e-4, atol=1e-5)
    assert [len(part) for part in fitting_batches(model, pairs)] == [20]
    monkeypatch.setitem(tasks.WIDEST, "cpu", 3 * 2 * pairs.ids.shape[1] * 7)  # three pairs, at the width of the neurons
    assert [len(part) for part in fitting_batches(model, pairs)] == 6 * [3] + [2]
    assert loss_of(right_minus_wrong) == pytest.approx(task_loss(got, pairs).item(), rel=1e-5)


# --- calibration ----------------------------------------------------------------------------------

def test_calibration_recovers_a_known_scale_and_shift():
    true = torch.randn(40000) * 2  # log odds of the first answer
    first_is_right = torch.rand(40000) < true.sigmoid()
    sign = torch.where(first_is_right, 1.0, -1.0)
    order = torch.stack([first_is_right.nonzero().flatten()[:15000], (~first_is_right).nonzero().flatten()[:15000]], 1).flatten()
    scale, shift = calibrate(((true - 0.8) / 2.5 * sign)[order])  # rows alternate: first right, second right
    assert scale == pytest.approx(2.5, rel=0.05) and shift == pytest.approx(0.8, abs=0.05)


def test_calibration_does_not_turn_wrong_answers_into_right_ones(seed):
    wrong = -3 - torch.rand(40)
    assert calibrate(wrong) == (0.0, 0.0) and loss_of(calibrated(wrong, 0.0, 0.0)) == pytest.approx(math.log(2))
    assert calibrate(-wrong)[0] > 0


def test_calibration_never_worsens_the_loss_and_stays_finite():
    cases = [torch.randn(40) * s + m for s in (0.01, 1.0, 30.0) for m in (-1.0, 0.0, 2.0)]
    for margin in [*cases, torch.ones(40), torch.full((40,), 1e-6), torch.zeros(40), torch.full((40,), 500.0)]:
        scale, shift = calibrate(margin)
        assert math.isfinite(scale) and math.isfinite(shift)
        assert loss_of(calibrated(margin, scale, shift)) <= loss_of(margin) + 1e-6


def test_a_shift_moves_the_two_prompts_of_a_pair_apart():
    assert calibrated(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.0, 0.5).tolist() == [2.5, 3.5, 6.5, 7.5]


# --- the graph ------------------------------------------------------------------------------------

def connected(model, mask, answers, edges=None):
    """Nodes on a path from the tokens to the answers, by plain graph search over named vertices."""
    edges = dense(model, edges or all_edges(model))
    c, forward, steers = model.config, defaultdict(set), defaultdict(set)
    link = lambda a, b: forward[a].add(b)
    stream = [f"{i}.{p}" for i in range(c.n_layer) for p in ("attn", "mlp")]
    on = lambda site, i: bool(mask[site][i])
    wte, head = model.transformer.wte.weight, model.lm_head.weight
    for ch in range(c.d_model):
        writers = [("tokens",)] if bool((wte[:, ch] != 0).any()) else []
        for sub in stream:
            if on(f"{sub}.act_in", ch):
                [link(w, (f"{sub}.act_in", ch)) for w in writers]
            if on(f"{sub}.resid_delta", ch):
                writers.append((f"{sub}.resid_delta", ch))
        if any(head[a, ch] != 0 for a in answers):
            [link(w, ("logits",)) for w in writers]
    for l, block in enumerate(model.transformer.h):
        width = c.n_head * c.d_head
        maps = [(f"attn.{z}", "attn.act_in", block.attn.c_attn.weight[i * width : (i + 1) * width]) for i, z in enumerate("qkv")]
        maps += [("attn.resid_delta", "attn.v", block.attn.c_proj.weight), ("mlp.post_act", "mlp.act_in", block.mlp.c_fc.weight),
                 ("mlp.resid_delta", "mlp.post_act", block.mlp.c_proj.weight)]
        for to, start, w in maps:
            for i, j in (w != 0).nonzero().tolist():
                if edges[f"{l}.{start}", f"{l}.{to}"][i, j] and on(f"{l}.{start}", j) and on(f"{l}.{to}", i):
                    link((f"{l}.{start}", j), (f"{l}.{to}", i))
        for j in range(width):
            if c.sink and on(f"{l}.attn.v", j):
                link(("tokens",), (f"{l}.attn.v", j))  # the sink leaves it the more, the more tokens there are
            for z in "qk":
                for i in range(width):
                    if i // c.d_head == j // c.d_head and on(f"{l}.attn.{z}", i) and on(f"{l}.attn.v", j):
                        steers[(f"{l}.attn.v", j)].add((f"{l}.attn.{z}", i))

    def closure(start, edges, among=None):
        seen, todo = {start}, [start]
        while todo:
            new = edges[todo.pop()] - seen
            new = new if among is None else new & among
            seen |= new
            todo += new
        return seen

    live = closure(("tokens",), forward)
    backward = defaultdict(set)
    for b, qks in steers.items():
        backward[b] |= qks
    for a, bs in list(forward.items()):
        for b in bs:
            backward[b].add(a)
    return {n for n in closure(("logits",), backward, live) if len(n) == 2}


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("case", range(25))
def test_kept_nodes_are_those_on_a_path_from_tokens_to_answers(case, sink):
    model = random_model(keep=random.Random(case).choice([0.05, 0.1, 0.2, 0.4]), n_layer=2, sink=sink)
    model.transformer.wpe.weight.zero_()
    mask = {s: torch.rand(len(m)) < 0.7 for s, m in all_nodes(model).items()}
    got, edges = drop_unconnected(model, mask, (2, 3)), random_edges(model, 0.6)
    assert {(s, i) for s, channels in kept_of(got).items() for i in channels} == connected(model, mask, (2, 3))
    fewer = drop_unconnected(model, mask, (2, 3), edges)
    assert {(s, i) for s, channels in kept_of(fewer).items() for i in channels} == connected(model, mask, (2, 3), edges)
    assert list(got) == model.sites and all(m.dtype == torch.bool for m in got.values())


def test_a_constant_value_is_on_a_path_behind_a_sink_and_nowhere_else():
    """With a sink, the attention alone can carry what the tokens say (bracket counting ends in such a head);
    without one the shares of the attention sum to one, and what is gathered of a constant is that constant."""
    nodes = {"0.attn.act_in": [0], "0.attn.k": [1], "0.attn.v": [1], "0.attn.resid_delta": [3]}
    for sink in (True, False):
        model = hand_made(sink=sink)
        model.transformer.h[0].attn.c_attn.weight.zero_()[6 + 1, 0] = 1.0  # key 1 is all that reads the stream
        mask, seen = as_mask(model, nodes), {}
        constants = {s: 0.1 * torch.arange(float(len(m))) for s, m in all_nodes(model).items()}
        model.transformer.h[0].attn.c_proj.weight[3, 1] = 2.0
        model(torch.tensor([[0, 4, 5, 1, 9]]), nodes=lambda s, x: seen.setdefault(s, ablate(mask, constants)(s, x + 0.5 * (s == "0.attn.v"))))
        varies = seen["0.attn.resid_delta"][0, :, 3].std().item() > 1e-3
        assert varies == sink
        assert kept_of(drop_unconnected(model, mask, (2, 3))) == (nodes if sink else {})


def test_a_head_none_of_whose_values_is_in_the_circuit_writes_the_same_at_every_token():
    """Behind a sink, too: held at its mean, a value would still be gathered the more, the more tokens there are."""
    model, seen = random_model(n_layer=1), {}
    constants, mask = some_constants(model), all_nodes(model)
    mask["0.attn.v"][:3] = False  # of the first head
    model.transformer.h[0].attn.c_proj.weight[:, 3:] = 0.0
    model(torch.randint(0, 10, (3, 8)), nodes=lambda s, x: seen.setdefault(s, ablate(mask, constants)(s, x)))
    wrote = seen["0.attn.resid_delta"]
    assert torch.allclose(wrote, wrote[0, 0].expand_as(wrote), atol=1e-6) and wrote.abs().max() > 0.1
    mask["0.attn.v"][0] = True
    seen.clear()
    model(torch.randint(0, 10, (3, 8)), nodes=lambda s, x: seen.setdefault(s, ablate(mask, constants)(s, x)))
    assert seen["0.attn.resid_delta"].std((0, 1)).max() > 1e-3


def test_a_node_without_a_way_in_or_a_way_out_is_dropped():
    model = hand_made()
    assert kept_of(drop_unconnected(model, as_mask(model, CIRCUIT), (2, 3))) == CIRCUIT
    extra = {**CIRCUIT, "0.mlp.post_act": [0], "0.mlp.act_in": [0], "0.mlp.resid_delta": [1], "0.attn.q": [1], "0.attn.k": [4]}
    assert kept_of(drop_unconnected(model, as_mask(model, extra), (2, 3))) == CIRCUIT  # resid_delta 1 has no way in, the rest none out
    for site in CIRCUIT:
        assert kept_of(drop_unconnected(model, as_mask(model, {s: c for s, c in CIRCUIT.items() if s != site}), (2, 3))) == {}
    assert kept_of(drop_unconnected(model, as_mask(model, CIRCUIT), (6, 7))) == {}  # these answers read no channel


def test_a_query_with_inputs_belongs_to_the_circuit_of_its_heads_values_only():
    model = hand_made()
    w = model.transformer.h[0].attn.c_attn.weight
    w[2, 0] = w[5, 0] = w[6 + 2, 0] = 1.0  # query 2 and key 2 of the first head, query 5 of the second
    mask = as_mask(model, {**CIRCUIT, "0.attn.q": [2, 5], "0.attn.k": [1, 2]})
    assert kept_of(drop_unconnected(model, mask, (2, 3))) == {**CIRCUIT, "0.attn.q": [2], "0.attn.k": [2]}


def test_edges_are_the_nonzero_weights_between_kept_nodes():
    model = random_model(keep=0.3, n_layer=2)
    mask, want = {s: torch.rand(len(m)) < 0.6 for s, m in all_nodes(model).items()}, {}
    for l, block in enumerate(model.transformer.h):
        for a, b, w in [("attn.act_in", "attn.q", block.attn.c_attn.weight[:6]), ("attn.act_in", "attn.k", block.attn.c_attn.weight[6:12]),
                        ("attn.act_in", "attn.v", block.attn.c_attn.weight[12:]), ("attn.v", "attn.resid_delta", block.attn.c_proj.weight),
                        ("mlp.act_in", "mlp.post_act", block.mlp.c_fc.weight), ("mlp.post_act", "mlp.resid_delta", block.mlp.c_proj.weight)]:
            for i in range(w.shape[0]):
                for j in range(w.shape[1]):
                    if w[i, j] != 0 and mask[f"{l}.{a}"][j] and mask[f"{l}.{b}"][i]:
                        want[(f"{l}.{a}", j, f"{l}.{b}", i)] = w[i, j].item()
    got = {tuple(e[:4]): e[4] for e in edges_of(model, mask)}
    assert len(got) == len(edges_of(model, mask)) and got == pytest.approx(want, abs=1e-5)
    edges = random_edges(model)
    kept = dense(model, edges)
    assert edges_of(model, mask, edges) == [e for e in edges_of(model, mask) if kept[e[0], e[2]][e[3], e[1]]]


def test_the_smallest_mlp_circuit_is_three_nodes_and_two_edges():
    model = hand_made()
    model.lm_head.weight[2, 5] = 1.0
    mask = drop_unconnected(model, as_mask(model, {"0.mlp.act_in": [0], "0.mlp.post_act": [0], "0.mlp.resid_delta": [5]}), (2, 3))
    assert count(mask) == 3
    assert edges_of(model, mask) == [["0.mlp.act_in", 0, "0.mlp.post_act", 0, 1.0], ["0.mlp.post_act", 0, "0.mlp.resid_delta", 5, 1.0]]


# --- cut edges ------------------------------------------------------------------------------------

def answer_logits(model, circuit, constants, pairs):
    """Logits at the last tokens, as circuit.py runs a circuit."""
    return last_logits(without_edges(model, circuit, constants), pairs, ablate(circuit.mask, constants))


def some_constants(model):
    return {s: torch.randn(len(m)).to(model.lm_head.weight.dtype) for s, m in all_nodes(model).items()}


@pytest.mark.parametrize("options", [
    dict(), dict(bias=True), dict(sink=False), dict(afrac=0.5, afrac_loctypes=EVERY_SITE, bias=True), dict(d_pos_emb=3, activation_type="relu"),
    dict(enable_bigram_table=True, residual_activation_type="relu", keep=0.5)], ids=str)
def test_a_cut_edge_contributes_its_weight_times_its_sources_mean(options):
    model = random_model(n_layer=2, **options).double()
    constants, pairs = some_constants(model), toy_pairs(6)
    circuit = Circuit({s: torch.rand(len(m)) < 0.7 for s, m in all_nodes(model).items()}, random_edges(model), 1.0, 0.0, 0.0)
    got = answer_logits(model, circuit, constants, pairs)
    want = model(pairs.ids, nodes=by_hand(model, circuit.mask, circuit.edges, constants))[0][range(12), pairs.last]
    torch.testing.assert_close(got, want)
    whole = answer_logits(model, Circuit(circuit.mask, all_edges(model), 1.0, 0.0, 0.0), constants, pairs)
    assert not torch.allclose(got, whole)  # the cuts are felt


def test_a_standalone_circuit_runs_as_if_the_model_had_no_abstopk():
    model = random_model(n_layer=2, keep=0.6, afrac=0.5, afrac_loctypes=EVERY_SITE)
    constants, pairs = some_constants(model), toy_pairs(6)
    circuit = Circuit({s: torch.rand(len(m)) < 0.7 for s, m in all_nodes(model).items()}, random_edges(model), 1.0, 0.0, 0.0)
    kept = alone(model, circuit, constants)(pairs)
    free = alone(model, replace(circuit, standalone=True), constants)(pairs)
    torch.testing.assert_close(free, plain_margins(without_afrac(model), circuit.mask, circuit.edges, constants, pairs))
    torch.testing.assert_close(kept, plain_margins(model, circuit.mask, circuit.edges, constants, pairs))
    assert not torch.allclose(free, kept)  # the model itself still has it


def test_without_topk_leaves_one_on_the_stream_itself():
    model = random_model(n_layer=1, afrac=0.5, afrac_loctypes="attn_in,resid_post_attn")
    assert without_topk(model).transformer.h[0].topk_at == {"resid_post_attn"}
    assert model.transformer.h[0].topk_at == {"attn_in", "resid_post_attn"}


def test_one_cut_edge_of_the_hand_made_circuit_gives_the_logits_that_pencil_and_paper_give():
    model, pairs = hand_made(), toy_pairs(10)
    constants, mask, edges = {s: 0.1 * torch.arange(float(len(m))) for s, m in all_nodes(model).items()}, as_mask(model, CIRCUIT), all_edges(model)
    ends = "0.attn.v", "0.attn.resid_delta"
    edges[ends][graph_of(model).wires[ends].place(1, 3)] = False  # channel 3 now receives 2.0 * the mean 0.1 of value 1, whatever the prompt
    got = answer_logits(model, Circuit(mask, edges, 1.0, 0.0, 0.0), constants, pairs)
    # all else: at token 9 the stream has 1 in channel 2, the attention's other writes and all of the MLP's are at their means
    stream = torch.tensor([0.0, 0.1, 1.2, 0.2, 0.4, 0.5]) + torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    read = stream / (stream.square().mean() + torch.finfo().eps).sqrt()
    torch.testing.assert_close(got[:, 2], (0.8 * read[3] + 0.5 * read[1] + 0.4 * read[2]).expand(20))
    torch.testing.assert_close(got[:, 3], (-0.8 * read[3]).expand(20))


@pytest.mark.parametrize("sink", [True, False])
def test_cutting_every_edge_of_a_node_is_ablating_it(sink):
    model, pairs = random_model(n_layer=2, sink=sink, keep=0.8).double(), toy_pairs(6)
    constants, mask = some_constants(model), {s: torch.rand(len(m)) < 0.8 for s, m in all_nodes(model).items()}
    for site in (s for s in model.sites if s.split(".", 1)[1] in ("attn.act_in", "attn.v", "mlp.act_in", "mlp.post_act")):
        channel = int(mask[site].nonzero()[0])
        edges, without = all_edges(model), {**mask, site: mask[site].clone()}
        without[site][channel] = False
        for (a, b), kept in edges.items():
            if a == site:
                kept[graph_of(model).wires[a, b].source == channel] = False
        cut, ablated = (answer_logits(model, Circuit(m, e, 1.0, 0.0, 0.0), constants, pairs) for m, e in ((mask, edges), (without, all_edges(model))))
        torch.testing.assert_close(cut, ablated, msg=lambda text: f"{site}: {text}")


def test_cutting_edges_leaves_the_model_itself_as_it_was():
    for options in (dict(bias=True), dict(bias=False)):
        model = random_model(**options)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        circuit = Circuit(all_nodes(model), random_edges(model, 0.3), 1.0, 0.0, 0.0)
        reduced = without_edges(model, circuit, some_constants(model))
        assert reduced is not model and before.keys() == model.state_dict().keys()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_with_all_edges_kept_the_model_in_which_a_circuit_runs_is_the_model():
    model, pairs = random_model(n_layer=2, keep=0.6), toy_pairs(6)
    mask = {s: torch.rand(len(m)) < 0.6 for s, m in all_nodes(model).items()}
    circuit, constants = Circuit(mask, all_edges(model), 1.0, 0.0, 0.0), some_constants(model)
    torch.testing.assert_close(answer_logits(model, circuit, constants, pairs), last_logits(model, pairs, ablate(mask, constants)))


def test_the_size_counts_nodes_and_the_kept_weights_between_them():
    model = random_model(n_layer=2, keep=0.5)
    mask = {s: torch.rand(len(m)) < 0.6 for s, m in all_nodes(model).items()}
    circuit = Circuit(mask, between(model, mask, random_edges(model)), 1.0, 0.0, 0.0)
    assert circuit.size == (sum(int(m.sum()) for m in circuit.mask.values()), len(edges_of(model, circuit.mask, circuit.edges)))


# --- read back from the file -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    model, _, c = toy_circuit(tmp_path_factory.mktemp("pruned"), parallel_model(cross=-0.5), minimal=True, target_loss=(0.358,))
    return model, c


@pytest.fixture
def saved(pruned, tmp_path):
    """A model, and the path and content of its circuit, from which single edges were removed."""
    (tmp_path / "circuit.json").write_text(json.dumps(pruned[1]))
    return copy.deepcopy(pruned[0]), tmp_path / "circuit.json", copy.deepcopy(pruned[1])


def test_a_circuit_read_back_from_its_file_has_the_files_losses(saved):
    model, path, c = saved
    circuit, constants = circuit_of(read_circuit(str(path)), model)
    assert circuit.size == (c["n_nodes"], c["n_edges"]) and c["n_edges"] < len(edges_of(model, circuit.mask))  # some were removed
    assert edges_of(model, circuit.mask, circuit.edges) == c["edges"] and kept_of(circuit.mask) == c["nodes"]
    reduced = without_edges(model, circuit, constants)
    for pairs, loss in ((toy_pairs(256).take(torch.arange(24)), c["loss"]), (toy_pairs(100, "heldout"), c["loss_heldout"])):
        margin = margins(reduced, pairs, ablate(circuit.mask, constants))
        assert loss_of(calibrated(margin, circuit.scale, circuit.shift)) == pytest.approx(loss, abs=2e-6)  # means have 6 decimals
        by_plain_sums = plain_margins(model, circuit.mask, circuit.edges, constants, pairs)
        assert nats(scaled(by_plain_sums, c["logit_scale"], c["logit_shift"])) == pytest.approx(loss, abs=2e-5)


def one_line(error):
    assert str(error.value).strip() and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_one_line_that_names_it(saved, share):
    _, path, _ = saved
    path.write_text(path.read_text()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError) as error:
        read_circuit(str(path))
    assert str(path) in one_line(error) and "truncated" in str(error.value)


def edit(c, *keys, to):
    for key in keys[:-1]:
        c = c[key]
    c[keys[-1]] = to


EDITS = {
    "no object": lambda c: [1, 2],
    "another format": lambda c: edit(c, "format", to="sparse-circuit-0"),
    "a missing key": lambda c: c.pop("edges") and None,
    "no means": lambda c: c.pop("means") and None,
    "an edge left out": lambda c: c["edges"].pop() and None,
    "a node left out": lambda c: (c["nodes"].pop("0.attn.resid_delta"), edit(c, "n_nodes", to=c["n_nodes"] - 1)) and None,
    "a wrong count": lambda c: edit(c, "n_nodes", to=99),
    "an edge of three": lambda c: edit(c, "edges", 0, to=c["edges"][0][:3]),
    "an edge without a weight": lambda c: edit(c, "edges", 0, to=c["edges"][0][:4]),
    "a weight in words": lambda c: edit(c, "edges", 0, 4, to="one"),
    "no weight": lambda c: edit(c, "edges", 0, 4, to=None),
    "another weight": lambda c: edit(c, "edges", 0, 4, to=0.5),
    "nodes in words": lambda c: edit(c, "nodes", to="none"),
    "an infinite scale": lambda c: edit(c, "logit_scale", to=math.inf),
    "a mean that is no number": lambda c: edit(c, "means", "0.attn.v", 0, to=math.nan),
    "a model without a shape": lambda c: c["model"].pop("d_head") and None,
    "a list of one answer": lambda c: c["answers"].pop() and None,
    "a scale in words": lambda c: edit(c, "logit_scale", to="1"),
    "an edge listed twice": lambda c: (c["edges"].append(c["edges"][0]), edit(c, "n_edges", to=c["n_edges"] + 1)) and None,
    "a node past the width": lambda c: (c["nodes"]["0.attn.v"].append(99), edit(c, "n_nodes", to=c["n_nodes"] + 1)) and None,
    "a negative node": lambda c: (c["nodes"]["0.attn.v"].append(-1), edit(c, "n_nodes", to=c["n_nodes"] + 1)) and None,
    "an edge that the model lacks": lambda c: (c["edges"].append(["0.attn.v", 0, "0.attn.act_in", 0, 1.0]), edit(c, "n_edges", to=c["n_edges"] + 1)) and None,
    "a weight of zero": lambda c: (c["edges"].append(["0.attn.act_in", 2, "0.attn.v", 0, 0.0]), edit(c, "n_edges", to=c["n_edges"] + 1)) and None,
    "means cut short": lambda c: edit(c, "means", "0.attn.v", to=[0.0]),
    "a missing mean": lambda c: c["means"].pop("0.attn.v") and None,
    "a mean in words": lambda c: edit(c, "means", "0.attn.v", 0, to="zero"),
    "means as one number": lambda c: edit(c, "means", "0.attn.v", to=0.5),
    "a certificate that is a list": lambda c: edit(c, "validation", "minimal", to=[]),
    "a certificate in words": lambda c: edit(c, "validation", "minimal", "target", to="x"),
    "controls that are no lists": lambda c: edit(c, "validation", "controls", to={"random_signs": {}}),
    "no means of a site": lambda c: edit(c, "means", "0.attn.v", to=None),
}


@pytest.mark.parametrize("change", EDITS)
def test_an_edited_file_is_one_line(saved, change):
    model, path, c = saved
    path.write_text(json.dumps(EDITS[change](c) or c))
    with pytest.raises(ValueError) as error:
        circuit_of(read_circuit(str(path)), model)
    one_line(error)


def test_an_unknown_site_is_named_with_the_nearest_one(saved):
    model, path, c = saved
    c["nodes"]["0.atn.v"] = [0]
    c["n_nodes"] += 1
    path.write_text(json.dumps(c))
    with pytest.raises(ValueError, match="'0.atn.v'.*'0.attn.v'") as error:
        circuit_of(read_circuit(str(path)), model)
    one_line(error)


def test_a_circuit_of_other_weights_or_of_another_shape_is_refused(saved):
    model, path, _ = saved
    c = read_circuit(str(path))
    model.transformer.h[0].attn.c_attn.weight.mul_(1.01)
    for other in (model, random_model(n_layer=2), random_model(d_model=8), random_model(n_head=1)):
        with pytest.raises(ValueError, match="another model") as error:
            circuit_of(c, other)
        one_line(error)


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        read_circuit(str(tmp_path / "nowhere.json"))
