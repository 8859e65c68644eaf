"""edge_masks.py: gates on edges against circuits that lack those edges, and what they leave of a model."""
from dataclasses import replace

import pytest
import torch

import minimise as minimise_module
from circuit import ablate, all_edges, between, count, drop_unconnected, run_to_last, without_edges
from edge_masks import EdgeGates, leave_out_by_masks
from masks import gate_gradient
from minimise import minimise
from search import Search
from tasks import answer_ids
from toy import all_nodes, hand_made, one_thread, parallel_model, random_model, toy_pairs, toy_setup  # noqa: F401


def setup(tmp_path, model, n=64):
    """A model, its constants, a search on n pairs, and the circuit of all its nodes and edges."""
    model, _, constants = toy_setup(tmp_path, model)
    search = Search(model, constants, toy_pairs(n))
    return model, constants, search, search.fit(all_nodes(model), all_edges(model))


def some(n, share, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("make", [hand_made, parallel_model, lambda: random_model(n_layer=2, keep=0.5)])
def test_shut_gates_are_a_circuit_without_those_edges(make, tmp_path):
    model, constants, search, circuit = setup(tmp_path, make())
    # of a circuit that lacks nodes and edges already
    mask = {site: m & some(len(m), 0.9) for site, m in circuit.mask.items()}
    edges = {ends: kept & some(len(kept), 0.8) for ends, kept in all_edges(model).items()}
    circuit = replace(circuit, mask=mask, edges=between(model, mask, edges))
    gates = EdgeGates(model, circuit, constants)
    assert gates.n_parameters == count(circuit.edges)
    for share in (0.0, 0.6, 1.0):
        opened = some(gates.n_parameters, share, seed=1)
        pairs = toy_pairs(8)
        smaller = without_edges(model, replace(circuit, edges=gates.opened(opened)), constants)
        want = run_to_last(smaller, pairs, ablate(circuit.mask, constants))
        torch.testing.assert_close(gates.run(pairs, gates.split(opened.float())), want, rtol=1e-5, atol=1e-5)
        # those with a path
        left = gates.opened(opened)
        nodes = drop_unconnected(model, circuit.mask, answer_ids(pairs), left)
        kept = gates.opened(gates.on_path(opened, answer_ids(pairs)))
        for ends, with_path in between(model, nodes, left).items():
            assert torch.equal(kept[ends], with_path)


def test_the_gradient_by_a_gate_is_what_the_loss_does_when_it_shuts_a_little(tmp_path):
    model, constants, search, circuit = setup(tmp_path, random_model(n_layer=2, keep=0.3))
    constants = {site: c.double() for site, c in constants.items()}
    gates = EdgeGates(model.double(), circuit, constants)
    gate = torch.ones(gates.n_parameters, dtype=torch.double)
    loss, grad = gate_gradient(gates.run, toy_pairs(8), gates, gate)
    for i in grad.abs().argsort(descending=True)[:6].tolist():
        nudged = gate.clone()
        nudged[i] -= 1e-5
        slope = (loss - gate_gradient(gates.run, toy_pairs(8), gates, nudged)[0]) / 1e-5
        assert slope == pytest.approx(grad[i].item(), rel=1e-2, abs=1e-7)


def test_masks_over_edges_leave_what_a_hand_made_model_needs(tmp_path):
    model, constants, search, circuit = setup(tmp_path, hand_made())
    found = leave_out_by_masks(search, circuit, 0.4, 0.0, lambda text: None)
    assert found.size == (3, 2) and found.loss <= 0.4 and circuit.size == (6, 4)
    # where nothing less does what is asked, the circuit itself
    assert leave_out_by_masks(search, found, found.loss, 0.0, lambda text: None).size == (3, 2)
    assert leave_out_by_masks(search, circuit, 0.4, 50.0, lambda text: None) is circuit


def test_only_circuits_of_many_edges_are_made_minimal_by_masks_first(tmp_path, monkeypatch):
    model, constants, search, circuit = setup(tmp_path, hand_made())
    said = []
    assert minimise(search, circuit, 0.4, said.append).size == (3, 2)
    assert not any("masks over edges" in line for line in said)
    monkeypatch.setattr(minimise_module, "MANY_EDGES", 2)
    found = minimise(search, circuit, 0.4, said.append)
    assert found.size == (3, 2) and found.certificate is not None
    assert f"{circuit.size[1]} edges: by masks over edges to 3 nodes, 2 edges" in "".join(said)
