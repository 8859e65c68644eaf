"""prune.py: a hand-made circuit is found exactly, and the file alone reproduces every number that it states."""
import hashlib
import itertools
import json
import math
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prune
from circuit import ablate, count, drop_unconnected, edges_of, last_logits, margins
from data.tinypython.tokenizer import DEFAULT
from model import GPT, GPTConfig
from prune import (Gates, PruneConfig, attribution, calibrate, calibrated, discretise, fit, learn_masks, loss_of, node_means,
                   trim)
from tasks import Task, load_pairs, task_loss

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
SHAPE = dict(block_size=8, vocab_size=10, n_layer=1, n_head=2, d_head=3, d_model=6, d_mlp=7, rms_norm=True, bias=False,
             tied_unembed=False, grad_checkpointing=False)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(std=0.5, keep=1.0, **options) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, "sink": True, **options})).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(std=std).mul_(torch.rand_like(p) < (1 if "ln_" in name else keep))
    return model


# --- the toy task: digits are tokens; the first is 0 or 1, the answer is 2 or 3, the rest is noise, the last is 9 --

class Digits:
    n_vocab = 10

    def encode_ordinary(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def toy_prompts(r):
    rest = "".join(r.choice("45678") for _ in range(r.randint(3, 6))) + "9"
    return "0" + rest, "1" + rest


TOY = Task("toy", "say which of 0 and 1 came first", ("2", "3"), toy_prompts)
CIRCUIT = {"0.attn.act_in": [0], "0.attn.v": [1], "0.attn.resid_delta": [3]}
TOY_EDGES = [["0.attn.act_in", 0, "0.attn.v", 1, 2.0], ["0.attn.v", 1, "0.attn.resid_delta", 3, 2.0]]


def hand_made() -> GPT:
    """Uniform attention copies channel 0 (+: token 0, -: token 1) to channel 3 (+: answer 2, -: answer 3).

    Tokens 4 and 5 disturb channel 0. Beside it: a live path that means nothing for the task (channel 1 to 1, with
    a bias toward one answer), an MLP that nothing reads, and a lit channel 2 that keeps the norm from dividing by 0.
    """
    model = random_model(std=0.0, sink=False)
    wte, head, block = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h[0]
    for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
        norm.weight.fill_(1.0)
    wte[:, 2] = 1.0
    wte[0, 0], wte[1, 0], wte[4, 0], wte[5, 0] = 2.0, -2.0, 0.5, -0.5
    wte[4:9, 1] = torch.tensor([0.5, 0.5, 1.0, 1.5, 0.2])
    attn_in, attn_out = block.attn.c_attn.weight, block.attn.c_proj.weight
    attn_in[12 + 1, 0], attn_out[3, 1] = 2.0, 2.0
    attn_in[12 + 0, 1], attn_out[1, 0] = 0.5, 0.5
    block.mlp.c_fc.weight[0, 0], block.mlp.c_proj.weight[5, 0] = 1.0, 1.0
    head[2, 3], head[3, 3], head[2, 1], head[2, 2] = 0.8, -0.8, 0.5, 0.4
    return model


def toy_setup(tmp_path, model=None, **options):
    """A saved model, its means over random tokens, and a config that prunes it within a second."""
    model = model or hand_made()
    model.save(str(tmp_path))
    np.random.default_rng(0).integers(0, 10, 4000).astype("<u2").tofile(tmp_path / "train.bin")
    constants = node_means(model, str(tmp_path / "train.bin"), 2048, 0)
    cfg = PruneConfig(**{**dict(model=str(tmp_path), task="toy", target_loss=0.4, train_pairs=256, fit_pairs=24, heldout_pairs=100,
                                steps=150, batch_pairs=16, lr=0.03, k_coef=0.01), **options})
    return model, cfg, constants


def toy_circuit(tmp_path, **options):
    model, cfg, constants = toy_setup(tmp_path, **options)
    return model, cfg, json.loads(json.dumps(prune.prune(model, TOY, Digits(), cfg, constants, lambda *_: None)))


def toy_pairs(n=64, split="train"):
    return load_pairs(TOY, Digits(), n, split, 8)


def all_nodes(model, value=True):
    return {s: torch.full((model.config.site_width(s),), value) for s in model.sites}


def as_mask(model, nodes):
    mask = all_nodes(model, False)
    for site, channels in nodes.items():
        mask[site][channels] = True
    return mask


def kept_of(mask):
    return {s: m.nonzero().flatten().tolist() for s, m in mask.items() if m.any()}


# --- ablation, means, logits --------------------------------------------------------------------

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


def test_node_means_are_the_means_over_all_windows_of_the_file(tmp_path):
    model = random_model(n_layer=2, afrac=0.5, afrac_loctypes="attn_in,attn_q,mlp_in,mlp_neuron,mlp_out")
    np.arange(8).astype("<u2").tofile(tmp_path / "one.bin")  # a single window
    got, record = node_means(model, str(tmp_path / "one.bin"), 800, 0), {}
    model(torch.arange(8)[None], nodes=lambda s, x: record.setdefault(s, x))
    assert set(got) == set(model.sites)
    for site in model.sites:
        torch.testing.assert_close(got[site], record[site][0].mean(0), rtol=1e-4, atol=1e-6)
    rows = np.random.default_rng(3).integers(0, 10, 10)  # three windows, each about a third of the draws
    rows.astype("<u2").tofile(tmp_path / "three.bin")
    got, sums = node_means(model, str(tmp_path / "three.bin"), 24_000, 1), defaultdict(float)
    for i in range(3):
        model(torch.from_numpy(rows[i : i + 8])[None], nodes=lambda s, x: sums.update({s: sums[s] + x[0].mean(0) / 3}) or x)
    for site in model.sites:
        torch.testing.assert_close(got[site], sums[site], rtol=0.1, atol=0.05)


def test_node_means_refuse_a_file_shorter_than_a_block(tmp_path):
    np.arange(7).astype("<u2").tofile(tmp_path / "short.bin")
    with pytest.raises(ValueError, match="short.bin"):
        node_means(random_model(), str(tmp_path / "short.bin"), 800, 0)


def test_last_logits_are_the_models_at_the_last_token_whatever_the_padding():
    model, pairs = random_model(n_layer=2, enable_bigram_table=True), toy_pairs(20)
    assert len(set(pairs.last.tolist())) > 1
    got = last_logits(model, pairs)
    for row, last, logits in zip(pairs.ids, pairs.last.tolist(), got):
        torch.testing.assert_close(logits, model(row[None, : last + 1])[0][0, -1], rtol=1e-4, atol=1e-5)
    right_minus_wrong = (got.gather(1, pairs.answer[:, None]) - got.gather(1, pairs.wrong[:, None])).flatten()
    torch.testing.assert_close(margins(model, pairs, batch=7), right_minus_wrong, rtol=1e-4, atol=1e-5)
    assert loss_of(right_minus_wrong) == pytest.approx(task_loss(got, pairs).item(), rel=1e-5)


# --- calibration ----------------------------------------------------------------------------------

def test_calibration_recovers_a_known_scale_and_shift():
    true = torch.randn(40000) * 2  # log odds of the first answer
    first_is_right = torch.rand(40000) < true.sigmoid()
    sign = torch.where(first_is_right, 1.0, -1.0)
    order = torch.stack([first_is_right.nonzero().flatten()[:15000], (~first_is_right).nonzero().flatten()[:15000]], 1).flatten()
    scale, shift = calibrate(((true - 0.8) / 2.5 * sign)[order])  # rows alternate: first right, second right
    assert scale == pytest.approx(2.5, rel=0.05) and shift == pytest.approx(0.8, abs=0.05)


def test_calibration_never_worsens_the_loss_and_stays_finite():
    cases = [torch.randn(40) * s + m for s in (0.01, 1.0, 30.0) for m in (-1.0, 0.0, 2.0)]
    for margin in [*cases, torch.ones(40), torch.full((40,), 1e-6), torch.zeros(40), torch.full((40,), 500.0)]:
        scale, shift = calibrate(margin)
        assert math.isfinite(scale) and math.isfinite(shift)
        assert loss_of(calibrated(margin, scale, shift)) <= loss_of(margin) + 1e-6


def test_a_shift_moves_the_two_prompts_of_a_pair_apart():
    assert calibrated(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.0, 0.5).tolist() == [2.5, 3.5, 6.5, 7.5]


# --- the graph ------------------------------------------------------------------------------------

def search(model, mask, answers):
    """Nodes on a path from the tokens to the answers, by plain graph search over named vertices."""
    c, forward = model.config, defaultdict(set)
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
                if on(f"{l}.{start}", j) and on(f"{l}.{to}", i):
                    link((f"{l}.{start}", j), (f"{l}.{to}", i))
        for z in "qk":
            for i in range(width):
                for j in range(width):
                    if i // c.d_head == j // c.d_head and on(f"{l}.attn.{z}", i) and on(f"{l}.attn.v", j):
                        link((f"{l}.attn.{z}", i), (f"{l}.attn.v", j))

    def closure(start, edges):
        seen, todo = {start}, [start]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    backward = defaultdict(set)
    for a, bs in list(forward.items()):
        for b in bs:
            backward[b].add(a)
    both = closure(("tokens",), forward) & closure(("logits",), backward)
    return {n for n in both if len(n) == 2}


@pytest.mark.parametrize("case", range(25))
def test_kept_nodes_are_those_on_a_path_from_tokens_to_answers(case):
    model = random_model(keep=random.Random(case).choice([0.05, 0.1, 0.2, 0.4]), n_layer=2)
    model.transformer.wpe.weight.zero_()
    mask = {s: torch.rand(len(m)) < 0.7 for s, m in all_nodes(model).items()}
    model.transformer.wte.weight[:, 0] = 1.0
    for l, block in enumerate(model.transformer.h):  # every value has a way in of its own; the next test is about the others
        block.attn.c_attn.weight[12:, 0], mask[f"{l}.attn.act_in"][0] = 1.0, True
    got = drop_unconnected(model, mask, (2, 3))
    assert {(s, i) for s, channels in kept_of(got).items() for i in channels} == search(model, mask, (2, 3))
    assert list(got) == model.sites and all(m.dtype == torch.bool for m in got.values())


def test_a_constant_value_that_a_key_steers_is_on_a_path():
    """With a sink, the attention alone can carry what the tokens say (bracket counting ends in such a head)."""
    model = hand_made()
    model.transformer.h[0].attn.c_attn.weight.zero_()[6 + 1, 0] = 1.0  # key 1 is all that reads the stream
    nodes = {"0.attn.act_in": [0], "0.attn.k": [1], "0.attn.v": [1], "0.attn.resid_delta": [3]}
    mask = as_mask(model, nodes)
    assert {(s, i) for s, channels in nodes.items() for i in channels} == search(model, mask, (2, 3))
    assert kept_of(drop_unconnected(model, mask, (2, 3))) == nodes


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


def test_the_smallest_mlp_circuit_is_three_nodes_and_two_edges():
    model = hand_made()
    model.lm_head.weight[2, 5] = 1.0
    mask = drop_unconnected(model, as_mask(model, {"0.mlp.act_in": [0], "0.mlp.post_act": [0], "0.mlp.resid_delta": [5]}), (2, 3))
    assert count(mask) == 3
    assert edges_of(model, mask) == [["0.mlp.act_in", 0, "0.mlp.post_act", 0, 1.0], ["0.mlp.post_act", 0, "0.mlp.resid_delta", 5, 1.0]]


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
    model, cfg, constants = toy_setup(tmp_path, lr=5.0, steps=5)
    tau = learn_masks(model, toy_pairs(), constants, Gates(model, False), cfg, lambda *_: None)
    assert float(tau.abs().max()) == 1.0


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


# --- discretise -----------------------------------------------------------------------------------

def parallel_model():
    """Four channels carry the deciding token, each disturbed by another token: the more are averaged, the lower the loss."""
    model = random_model(std=0.0, sink=False)
    wte, head, block = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h[0]
    for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
        norm.weight.fill_(1.0)
    wte[:, 4], wte[0, :4], wte[1, :4] = 1.0, 1.0, -1.0
    for i in range(4):
        wte[4 + i, i] = (-1) ** i * 1.2
        block.attn.c_attn.weight[12 + i, i], block.attn.c_proj.weight[5, i] = 1.0, 1.0
    head[2, 5], head[3, 5] = 1.0, -1.0
    return model


def test_discretising_keeps_exactly_the_fewest_leading_nodes_that_meet_the_target(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model())
    gates, pairs = Gates(model, False), toy_pairs()
    leading = [("0.attn.resid_delta", 5), *((site, i) for i in range(4) for site in ("0.attn.act_in", "0.attn.v"))]
    sites = [(s, i) for s, m in all_nodes(model).items() for i in range(len(m))]
    order = torch.tensor([sites.index(n) for n in leading] + [i for i, n in enumerate(sites) if n not in leading])
    losses = []
    for n in (1, 2, 3, 4):  # channels
        margin = margins(model, pairs, ablate(as_mask(model, {s: [i for t, i in leading[: 1 + 2 * n] if t == s] for s, _ in leading}), constants))
        losses.append(loss_of(calibrated(margin, *calibrate(margin))))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[3] + 0.05
    for n_open, (n, loss) in itertools.product((9, len(order)), enumerate(losses, 1)):
        got = discretise(model, order, n_open, gates, constants, pairs, loss + 1e-4)
        assert got.loss == pytest.approx(loss, abs=1e-5)
        assert kept_of(got.mask) == {"0.attn.act_in": list(range(n)), "0.attn.v": list(range(n)), "0.attn.resid_delta": [5]}
    with pytest.raises(ValueError, match="even all nodes"):
        discretise(model, order, 9, gates, constants, pairs, losses[3] / 2)


def test_ties_of_tau_are_broken_so_that_the_circuit_is_as_small_as_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "learn_masks", lambda model, pairs, constants, gates, *_: torch.ones(len(gates.index)))
    _, _, circuit = toy_circuit(tmp_path, trim=False)
    assert circuit["nodes"] == CIRCUIT


def test_trimming_leaves_no_single_node_that_could_be_left_out(tmp_path):
    model, _, constants = toy_setup(tmp_path, parallel_model())
    gates, pairs, order = Gates(model, False), toy_pairs(), torch.arange(sum(len(m) for m in all_nodes(model).values()))
    everything = fit(model, all_nodes(model), constants, pairs)
    target = 1.5 * everything.loss
    got = trim(model, everything, order, gates, constants, pairs, target)
    assert 0 < count(got.mask) < count(everything.mask) and got.loss <= target
    margin = margins(model, pairs, ablate(got.mask, constants))
    assert nats(scaled(margin.double(), got.scale, got.shift)) == pytest.approx(got.loss, abs=1e-5)
    for site, channels in kept_of(got.mask).items():
        for c in channels:
            without = {s: m.clone() for s, m in got.mask.items()}
            without[site][c] = False
            assert fit(model, without, constants, pairs).loss > target


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


def read(model, circuit, pairs, keep=True):
    """Margins by the file alone: nodes (with keep=False all others) run free, the rest sit at the file's means."""
    def fn(site, x):
        if site not in circuit["means"]:
            return x
        inside = torch.isin(torch.arange(x.shape[-1]), torch.tensor(circuit["nodes"].get(site, []), dtype=torch.long))
        return torch.where(inside == keep, x, torch.tensor(circuit["means"][site]))

    rows = range(len(pairs.ids))
    logits = model(pairs.ids, nodes=fn)[0][rows, pairs.last].double()
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]


def nats(margin):
    return F.softplus(-margin).mean().item()


def scaled(margin, scale, shift):
    return scale * margin + shift * torch.tensor([1.0, -1.0]).double().repeat(len(margin) // 2)


def test_a_reader_of_the_file_alone_gets_the_same_losses(tmp_path):
    for ablation in ("mean", "zero"):
        model, cfg, means = toy_setup(tmp_path, ablation=ablation)
        constants = {s: (0 if ablation == "zero" else 1) * m for s, m in means.items()}
        c = json.loads(json.dumps(prune.prune(model, TOY, Digits(), cfg, constants, lambda *_: None)))
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


def best_fit(margin):
    """Scale and shift by Newton's method, without looking at anything of prune.py."""
    x, p = torch.stack([margin, scaled(0 * margin, 0, 1.0)], 1), torch.tensor([1.0, 0.0]).double()
    for _ in range(100):
        s = torch.sigmoid(-(x @ p))
        p = p + torch.linalg.solve((x.T * (s * (1 - s))) @ x + 1e-9 * torch.eye(2), x.T @ s)
    return p.tolist()


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


def test_fewer_heldout_pairs_than_examples_still_give_a_circuit(tmp_path):
    _, _, c = toy_circuit(tmp_path, heldout_pairs=3)
    assert c["validation"]["heldout_pairs"] == 3 and 0 < len(c["examples"]) <= 6


def test_an_unsolved_task_is_an_error_that_says_so(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, random_model(std=0.01))
    with pytest.raises(ValueError, match="does not solve toy"):
        prune.prune(model, TOY, Digits(), cfg, constants, lambda *_: None)


def test_a_loss_that_is_not_a_number_solves_nothing(tmp_path):
    model, cfg, constants = toy_setup(tmp_path)
    model.lm_head.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match="does not solve toy"):
        prune.prune(model, TOY, Digits(), cfg, constants, lambda *_: None)


# --- the command ----------------------------------------------------------------------------------------

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
    (["--fit_pairs=9", "--train_pairs=8"], "fit_pairs"), ([], "does not solve"), (["--task=all"], "no circuit for"),
    (["--device=nonsense"], "device")], ids=" ".join)
def test_bad_input_is_one_line_exit_2_and_nothing_written(args, says, model_dir, capsys):
    given = [f"--model={model_dir}", f"--data={model_dir.parent}", f"--tokenizer={DEFAULT}", "--mean_tokens=256", "--heldout_pairs=8",
             *(a.format(tmp=model_dir.parent) for a in args)]
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
