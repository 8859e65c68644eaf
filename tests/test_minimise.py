"""search.py and minimise.py: what Search saves changes no result, and what minimise leaves can lose nothing more."""
import itertools
import math

import pytest
import torch

from circuit import Circuit, ablate, all_edges, between, count, drop_unconnected, graph_of, without_edges
from find import Ranking, discretise
from masks import Gates
import minimise as minimise_module
from minimise import exchange_parts, minimise, with_part
from search import Search, parts_of, without
from tasks import calibrate, calibrated, loss_of, margins
from toy import (EVERY_SITE, all_nodes, as_mask, kept_of, nats, one_thread, parallel_model, plain_margins,  # noqa: F401
                 random_model, scaled, toy_pairs, toy_setup)

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


def same_parts(got, mask, edges):
    assert all(torch.equal(got.mask[s], mask[s]) for s in mask) and all(torch.equal(got.edges[k], edges[k]) for k in edges)


def is_what_plain_sums_give(got, model, mask, edges, constants, pairs):
    """`got` is what Search.fit says of a circuit; here without its savings: all pairs at once, in the order given, from the tokens on."""
    mask = drop_unconnected(model, mask, (2, 3), edges)
    same_parts(got, mask, between(model, mask, edges))
    margin = plain_margins(model, mask, edges, constants, pairs)
    assert nats(scaled(margin, got.scale, got.shift)) == pytest.approx(got.loss, abs=1e-5)
    # calibration ends elsewhere in another order of the pairs, where the margins hardly tell the answers apart
    assert loss_of(calibrated(margin, *calibrate(margin))) == pytest.approx(got.loss, abs=0.02)


def changed(mask, edges, layer, nodes=True):
    """Other edges and, with `nodes`, other nodes from the layer on, the same before it."""
    late = lambda name: int(name.split(".")[0]) >= layer
    other_mask = {s: m & (torch.rand(len(m)) < 0.8) if nodes and late(s) else m for s, m in mask.items()}
    return other_mask, {k: e & (torch.rand(e.shape) < 0.8) if late(k[0]) else e.clone() for k, e in edges.items()}


# --- Search ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(bias=True, sink=False), dict(afrac=0.5, afrac_loctypes=EVERY_SITE, d_pos_emb=3),
                                     dict(afrac=0.7, afrac_loctypes="mlp_in,resid_post_attn,resid_post_mlp"),
                                     dict(residual_activation_type="relu", enable_bigram_table=True)], ids=str)
def test_a_fit_that_starts_midway_gives_what_a_fresh_plain_computation_gives(options):
    model, pairs = random_model(n_layer=2, std=0.8, **options), toy_pairs(10)
    constants = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    search, mask, edges = Search(model, constants, pairs, batch=3), all_nodes(model), all_edges(model)
    for layer, nodes in ((1, True), (1, False), (0, False), (2, True), (0, True)):  # where it begins to differ from the last one accepted; 2: nowhere
        search.fit(*changed(mask, edges, 0))  # not accepted: leaves no trace
        trial = changed(mask, edges, layer, nodes)
        got = search.fit(*trial)
        is_what_plain_sums_give(got, model, *trial, constants, pairs)
        fresh = Search(model, constants, pairs, batch=3).fit(*trial)
        assert (got.scale, got.shift, got.loss) == pytest.approx((fresh.scale, fresh.shift, fresh.loss), abs=1e-5)
        assert search.accept() is got
        mask, edges = got.mask, got.edges
    for site in ("0.mlp.resid_delta", "1.attn.resid_delta"):  # a sublayer that writes nothing but its means
        trial = ({**mask, site: torch.zeros_like(mask[site])}, edges)
        is_what_plain_sums_give(search.fit(*trial), model, *trial, constants, pairs)


@pytest.mark.parametrize("hard", [0, 4, 8])
def test_stopping_early_refuses_exactly_the_circuits_whose_loss_passes_the_target(hard):
    """`hard` pairs come first, being short, and lack the token that tells; all others are easy: what is seen early costs nearly all."""
    model, pairs = parallel_model(cross=-0.3), toy_pairs(64)
    model.lm_head.weight.mul_(9.0)
    model.transformer.wte.weight[4:9, :4] *= 0.1  # hardly a disturbance
    pairs = pairs.take(pairs.last[::2].argsort()[list(range(8)) + list(range(-8, 0))])
    pairs.ids[: 2 * hard, 0] = 8
    constants, mask, edges = {s: torch.zeros(len(m)) for s, m in all_nodes(model).items()}, all_nodes(model), all_edges(model)
    search = Search(model, constants, pairs, batch=4)
    search.fit(mask, edges)
    search.accept()
    for trial in ((mask, edges), changed(mask, edges, 0, nodes=False), (as_mask(model, {"0.attn.act_in": [3], "0.attn.v": [3], "0.attn.resid_delta": [5]}), edges)):
        whole = search.fit(*trial)
        for share in (0.3, 0.97, 0.999, 1.001, 2.0):
            got = search.fit(*trial, share * whole.loss)
            if share < 1:
                assert got.loss == math.inf
            else:
                assert (got.scale, got.shift, got.loss) == (whole.scale, whole.shift, whole.loss)
            same_parts(got, whole.mask, whole.edges)


def test_a_loss_that_is_not_a_number_meets_no_target():
    model, pairs = random_model(), toy_pairs(8)
    constants = {s: torch.zeros(len(m)) for s, m in all_nodes(model).items()}
    model.lm_head.weight[2] = math.nan
    for target in (0.5, math.inf):
        assert not Search(model, constants, pairs).fit(all_nodes(model), all_edges(model), target).loss < math.inf


# --- discretise -----------------------------------------------------------------------------------

def test_discretising_keeps_exactly_the_fewest_leading_nodes_that_meet_the_target(tmp_path):
    model, _, constants = toy_setup(tmp_path, parallel_model())
    pairs = toy_pairs()
    leading = [("0.attn.resid_delta", 5), *((site, i) for i in range(4) for site in ("0.attn.act_in", "0.attn.v"))]
    sites = [(s, i) for s, m in all_nodes(model).items() for i in range(len(m))]
    order = torch.tensor([sites.index(n) for n in leading] + [i for i, n in enumerate(sites) if n not in leading])
    losses, gates = [], Gates(model, False)
    for n in (1, 2, 3, 4):  # channels
        margin = margins(model, pairs, ablate(as_mask(model, {s: [i for t, i in leading[: 1 + 2 * n] if t == s] for s, _ in leading}), constants))
        losses.append(loss_of(calibrated(margin, *calibrate(margin))))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[3] + 0.05
    for n_open, (n, loss) in itertools.product((9, len(order)), enumerate(losses, 1)):
        got = discretise(Search(model, constants, pairs), gates, Ranking(order, n_open), loss + 1e-4)
        assert got.loss == pytest.approx(loss, abs=5e-5)
        assert kept_of(got.mask) == {"0.attn.act_in": list(range(n)), "0.attn.v": list(range(n)), "0.attn.resid_delta": [5]}
    for n_open, n in ((5, 2), (9, 4)):  # no number of nodes does: the open gates, whose loss says so
        got = discretise(Search(model, constants, pairs), gates, Ranking(order, n_open), losses[3] / 2)
        assert got.loss == pytest.approx(losses[n - 1], abs=5e-5) and kept_of(got.mask)["0.attn.v"] == list(range(n))



# --- minimise -------------------------------------------------------------------------------------

def minimal(model, constants, pairs, slack):
    """The minimal circuit at `slack` times the loss of the whole, and that target."""
    search = Search(model, constants, pairs)
    everything = search.fit(all_nodes(model), all_edges(model))
    target = slack * everything.loss
    return everything, minimise(search, everything, target, lambda text: None), target


def has(circuit, part):
    if len(part) == 2:
        return bool(circuit.mask[part[0]][part[1]])
    a, b, i = part
    return bool(circuit.edges[a, b][i])


def loss_without(model, circuit, part, constants, pairs):
    """The calibrated loss of a circuit less one part, by the functions that validate a circuit."""
    mask, edges = without(circuit, part) if part else (circuit.mask, circuit.edges)
    mask = drop_unconnected(model, mask, (2, 3), edges)
    margin = margins(without_edges(model, Circuit(mask, edges, 1.0, 0.0, 0.0), constants), pairs, ablate(mask, constants))
    return loss_of(calibrated(margin, *calibrate(margin)))


@pytest.mark.parametrize("make", [
    lambda: parallel_model(), lambda: parallel_model(cross=-0.5),
    lambda: random_model(std=1.5, keep=0.4, n_layer=2, d_model=4, n_head=1, d_head=2, d_mlp=4)], ids=["parallel", "crossed", "random"])
@pytest.mark.parametrize("slack", [1.005, 1.5])
def test_no_single_node_and_no_single_edge_of_a_minimal_circuit_can_be_left_out(make, slack, tmp_path):
    torch.manual_seed(7)  # a random model that happens to know the task
    model = make()
    (_, _, constants), pairs = toy_setup(tmp_path, model), toy_pairs(12)
    everything, got, target = minimal(model, constants, pairs, slack)
    assert got.loss <= target and got.size[0] <= everything.size[0] and got.size[1] <= everything.size[1]
    assert loss_without(model, got, None, constants, pairs) == pytest.approx(got.loss, abs=2e-4)
    parts = parts_of(got)
    assert len(parts) == sum(got.size)
    for part in parts:
        assert has(got, part) and loss_without(model, got, part, constants, pairs) > target - 2e-4, part


def test_a_minimal_circuit_has_only_nodes_with_a_path_over_the_edges_it_kept(tmp_path):
    model = parallel_model(cross=-0.5)
    (_, _, constants), pairs = toy_setup(tmp_path, model), toy_pairs(24)
    everything, got, _ = minimal(model, constants, pairs, 1.005)
    connected = drop_unconnected(model, got.mask, (2, 3), got.edges)
    assert 0 < got.size[1] < everything.size[1] and kept_of(connected) == kept_of(got.mask)
    cut = [p for p in parts_of(Circuit(got.mask, between(model, got.mask), 1.0, 0.0, 0.0)) if not has(got, p)]
    assert cut and all(len(p) == 3 for p in cut)  # edges between nodes that both stay


def test_minimising_twice_changes_nothing(tmp_path):
    (model, _, constants), pairs = toy_setup(tmp_path, parallel_model(cross=-0.5)), toy_pairs(24)
    _, once, target = minimal(model, constants, pairs, 1.005)
    twice = minimise(Search(model, constants, pairs), once, target, lambda text: None)
    same_parts(twice, once.mask, once.edges)
    assert twice.loss == pytest.approx(once.loss, abs=2e-4)


def test_the_loss_of_a_minimal_circuit_is_what_plain_sums_give(tmp_path):
    (model, _, constants), pairs = toy_setup(tmp_path, parallel_model(cross=-0.5)), toy_pairs(24)
    _, got, _ = minimal(model, constants, pairs, 1.005)
    margin = plain_margins(model, got.mask, got.edges, constants, pairs)
    assert nats(scaled(margin, got.scale, got.shift)) == pytest.approx(got.loss, abs=1e-5)


def test_with_a_bound_on_necessity_no_node_goes_whose_ablation_the_model_needs_to_feel(tmp_path):
    model = parallel_model()  # in two mechanisms: the second half of it writes elsewhere
    block, head = model.transformer.h[0], model.lm_head.weight
    block.attn.c_proj.weight[5, 2:4], block.attn.c_proj.weight[3, 2:4], head[2, 3], head[3, 3] = 0.0, 1.0, 1.0, -1.0
    (_, _, constants), pairs = toy_setup(tmp_path, model), toy_pairs(24)
    search = Search(model, constants, pairs)
    everything = search.fit(all_nodes(model), all_edges(model))
    target, alone = 1.5 * everything.loss, minimise(search, everything, 1.5 * everything.loss, lambda text: None)

    def without_circuit(mask):
        return nats(margins(model, pairs, ablate({s: ~m for s, m in mask.items()}, constants)))

    low, high = without_circuit(alone.mask), without_circuit(everything.mask)
    assert low < 0.5 and high > 0.69  # left with one mechanism, the model still knows the answer
    bound = (low + high) / 2
    got = minimise(Search(model, constants, pairs), everything, target, lambda text: None, bound)
    assert got.loss <= target and without_circuit(got.mask) >= bound - 1e-4 and got.size[0] > alone.size[0]
    for part in parts_of(got):  # each part is needed for the one or for the other
        less = drop_unconnected(model, without(got, part)[0], (2, 3), without(got, part)[1])
        assert loss_without(model, got, part, constants, pairs) > target - 2e-4 or without_circuit(less) < bound + 1e-4, part


# --- one part back in, others out -------------------------------------------------------------------

def mixed_model():
    """Value 2 reads what values 0 and 1 read, both alike; of those, the second writes half as much."""
    model = parallel_model()
    block = model.transformer.h[0]
    block.attn.c_attn.weight[12 + 2] = 0.0
    block.attn.c_attn.weight[12 + 2, :2] = 1.0
    block.attn.c_proj.weight[5, 1] = 0.5
    return model


def test_a_part_comes_back_where_others_can_then_go(tmp_path, monkeypatch):
    (model, _, constants), pairs = toy_setup(tmp_path, mixed_model()), toy_pairs(24)
    search = Search(model, constants, pairs)
    reads = {"0.attn.act_in": [0, 1], "0.attn.resid_delta": [5]}
    pool = search.fit(as_mask(model, {**reads, "0.attn.v": [0, 1, 2]}), all_edges(model))
    stuck = search.fit(as_mask(model, {**reads, "0.attn.v": [0, 1]}), all_edges(model))
    search.accept()
    target = stuck.loss + 1e-4
    assert all(search.fit_without(stuck, [part]).loss > target for part in parts_of(stuck)) and stuck.size == (5, 4)
    pricer = Search(model, constants, pairs.first(6))

    def exchanged(necessity, pairs=24_000):
        last = search.pairs_run + pricer.pairs_run + pairs
        return exchange_parts(search, pricer, pool, target, lambda text: None, necessity, last)

    for few in (0, 8):  # both end before anything is let in
        assert not exchanged(0.0, few) and search.accepted is stuck
    assert exchanged(0.0)
    got = search.accepted
    assert kept_of(got.mask) == {"0.attn.act_in": [0, 1], "0.attn.v": [2], "0.attn.resid_delta": [5]}
    assert got.size == (4, 3) and loss_without(model, got, None, constants, pairs) < target
    assert not exchanged(0.0)  # nothing better: it stays as it is
    same_parts(search.accepted, got.mask, got.edges)
    # what the model must miss binds here as well
    search.fit(stuck.mask, stuck.edges)
    search.accept()
    monkeypatch.setattr(search, "is_needed", lambda mask, necessity: necessity < (0.1 if mask["0.attn.v"][2] else 0.9))
    assert not exchanged(0.5)
    same_parts(search.accepted, stuck.mask, stuck.edges)

    def only_edges_go(*_):  # of which leave_out need not ask what the model misses
        search.fit(got.mask, got.edges)
        search.accept()

    monkeypatch.setattr(minimise_module, "leave_out", only_edges_go)
    assert not exchanged(0.5)
    same_parts(search.accepted, stuck.mask, stuck.edges)


@pytest.mark.parametrize("tie_qk", [False, True])
def test_a_circuit_with_one_part_more_is_it_and_that_part_alone(tmp_path, tie_qk):
    model = random_model(std=1.0, keep=0.6, n_layer=2)
    (_, _, constants), pairs = toy_setup(tmp_path, model), toy_pairs(8)
    search = Search(model, constants, pairs, tie_qk)
    pool = search.fit(all_nodes(model), {k: e & (torch.rand(e.shape) < 0.9) for k, e in all_edges(model).items()})
    circuit = search.fit(*changed(pool.mask, pool.edges, 0))
    larger = 0
    for part in parts_of(pool, tie_qk):
        got = with_part(search, circuit, part, pool)
        own = {site: m.clone() for site, m in circuit.mask.items()}
        edges = {ends: e.clone() for ends, e in circuit.edges.items()}
        if len(part) == 3:
            edges[part[:2]][part[2]] = True
        else:
            site, i = part
            own[site][i] = True
            if tie_qk and site.endswith("attn.q") and pool.mask[site[:-1] + "k"][i]:
                own[site[:-1] + "k"][i] = True
            for ends, wires in graph_of(model).wires.items():  # the pool's, at the new nodes
                for n, (a, b) in enumerate(zip(wires.source.tolist(), wires.to.tolist())):
                    new = own[ends[0]][a] and own[ends[1]][b] and not (circuit.mask[ends[0]][a] and circuit.mask[ends[1]][b])
                    edges[ends][n] |= new and bool(pool.edges[ends][n])
        own = drop_unconnected(model, own, (2, 3), edges)
        edges = between(model, own, edges)
        if got is None:
            # no path, or a node without an edge, such as a value that is read and not written
            assert (count(edges), count(own)) <= (circuit.size[1], circuit.size[0])
        else:
            same_parts(Circuit(*got, 1.0, 0.0, 0.0), own, edges)
            larger += 1
    assert larger > 3
