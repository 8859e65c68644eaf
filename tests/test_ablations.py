"""Other ablations than the mean: gates learnt under them, circuits judged by the worst of them."""
from dataclasses import replace

import pytest
import torch

import prune
import ablations
from ablations import VARIED, Stiff, Varied, awake, donated, exchange, half_awake
from circuit import ablate, alone
from circuit_file import circuit_of
from find import find
from masks import Gates, MaskConfig, gate_gradient, learn_masks, runs_of
from case import Case
from measures import frozen_norms, resample_task
from minimise import minimise
from search import Search
from tasks import batches_of, last_logits
from toy import (TOY, Digits, all_edges, all_nodes, hand_made, loaded, parallel_model, random_model, toy_pairs, toy_setup)


def setup(tmp_path, model):
    model, cfg, constants = toy_setup(tmp_path, model)
    return model, cfg, constants, Varied(model, model, constants, toy_pairs(64))


@pytest.mark.parametrize("kind", VARIED)
def test_with_every_gate_open_each_kind_is_the_model_itself(tmp_path, seed, kind):
    model, _, _, varied = setup(tmp_path, random_model())
    pairs = toy_pairs(10, "heldout")
    gates = {site: m.float() for site, m in all_nodes(model).items()}
    got = varied.logits(kind, torch.Generator().manual_seed(1), pairs, gates)
    torch.testing.assert_close(got, last_logits(model, pairs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", VARIED)
def test_with_gates_shut_the_kinds_differ_from_the_mean_and_gates_hear_a_gradient(tmp_path, seed, kind):
    model, _, constants, varied = setup(tmp_path, random_model())
    pairs = toy_pairs(10, "heldout")
    shut = {site: (torch.rand(m.shape) < 0.6).float() for site, m in all_nodes(model).items()}
    at_means = last_logits(model, pairs, ablate(shut, constants))
    got = varied.logits(kind, torch.Generator().manual_seed(1), pairs, shut)
    assert not torch.allclose(got, at_means, atol=1e-2)
    gates = Gates(model, False)
    run = runs_of(model, constants, varied, torch.Generator().manual_seed(1))[kind]
    _, grad = gate_gradient(run, pairs, gates, torch.cat(list(shut.values())))
    assert (grad != 0).float().mean() > 0.3 and torch.isfinite(grad).all()


def test_a_gradient_under_frozen_norms_is_a_difference_of_losses(tmp_path, seed):
    """What the norms divide by is no function of the gates."""
    model, _, constants, varied = setup(tmp_path, random_model())
    model.double()
    pairs, gates = toy_pairs(4), Gates(model, False)
    constants = {site: c.double() for site, c in constants.items()}
    varied = Varied(model, model, constants, pairs)
    run = runs_of(model, constants, varied, torch.Generator())["frozen_norms"]
    gate = torch.rand(len(gates.index), dtype=torch.double)
    loss, grad = gate_gradient(run, pairs, gates, gate)
    for i in torch.randperm(len(gate))[:8].tolist():
        nudged = gate.clone()
        nudged[i] += 1e-5
        assert (gate_gradient(run, pairs, gates, nudged)[0] - loss) / 1e-5 == pytest.approx(grad[i].item(), abs=1e-4)


def test_a_random_half_of_what_is_shut_wakes_and_all_that_is_open_stays(seed):
    kept = torch.rand(4000) < 0.3
    woken = awake(kept, torch.Generator().manual_seed(3))
    assert woken[kept].all() and 0.45 < woken[~kept].float().mean() < 0.55


def test_values_of_the_prompt_itself_change_nothing(tmp_path, seed):
    """A prompt whose only donor is itself runs as in the model, whatever is ablated."""
    model = random_model()
    one = toy_pairs(1)
    one = one.take(torch.tensor([0]))
    one.ids[1], one.last[1] = one.ids[0], one.last[0]
    shut = {site: torch.zeros_like(m) for site, m in all_nodes(model).items()}
    values = donated(model, one, one, shut, torch.Generator())
    torch.testing.assert_close(last_logits(model, one, exchange(shut, values)), last_logits(model, one), rtol=1e-4, atol=1e-4)


def test_the_worst_is_the_cards_own_numbers(tmp_path, seed, monkeypatch):
    model, cfg, constants = toy_setup(tmp_path, random_model())
    train, heldout = toy_pairs(64), toy_pairs(40, "heldout")
    search = Search(model, constants, train)
    circuit = search.fit({s: torch.rand(m.shape) < 0.8 for s, m in all_nodes(model).items()}, all_edges(model))
    case = Case(model, TOY, Digits(), circuit, constants, cfg, train, heldout, "", 0)
    varied = Varied(model, model, constants, train)
    norms = frozen_norms(case)["frozen_norms"]
    # draws are others on the card: four of them, averaged
    lines = [norms, resample_task(case)["resample_task"]]
    assert varied.worst(circuit, heldout) >= norms - 1e-4
    assert varied.worst(circuit, heldout) == varied.worst(circuit, heldout)
    assert varied.worst(circuit, heldout) == pytest.approx(max(lines), rel=0.5)
    # whatever their number at a time
    together = varied.worst_losses(circuit, heldout)
    monkeypatch.setattr(ablations, "fitting_batches", lambda model, pairs: batches_of(pairs, 7))
    assert varied.worst_losses(circuit, heldout) == pytest.approx(together.numpy(), abs=1e-5)
    only = Varied(model, model, constants, train)
    only.kinds = ("resample_task", "complement")
    assert only.worst(circuit, heldout) <= varied.worst(circuit, heldout)


def test_a_model_with_layernorm_is_judged_by_the_other_two(tmp_path):
    model, _, constants = toy_setup(tmp_path, random_model(rms_norm=False))
    varied = Varied(model, model, constants, toy_pairs(32))
    assert varied.kinds == ("resample_task", "complement")
    circuit = Search(model, constants, toy_pairs(32), varied=varied).fit(all_nodes(model), all_edges(model))
    assert circuit.loss < 9


def test_a_circuit_that_only_works_at_the_means_is_not_accepted_under_varied_ablation(tmp_path):
    """Four channels carry the token that decides: of them two do at the means; where the others speak for another prompt
    they do not."""
    model, cfg, constants, varied = setup(tmp_path, parallel_model())
    plain = Search(model, constants, toy_pairs(64))
    strict = Search(model, constants, toy_pairs(64), varied=varied)
    full = plain.fit(all_nodes(model), all_edges(model))
    few = plain.fit_without(full, [("0.attn.act_in", i) for i in (1, 3)])
    again = strict.fit(few.mask, few.edges)
    assert few.loss < 0.4 < again.loss and again.loss == varied.worst(few, strict.quarter)
    target = full.loss + 0.1
    small, robust = minimise(plain, full, target, lambda text: None), minimise(strict, full, target, lambda text: None)
    assert small.size[1] < robust.size[1] and robust.loss <= target
    assert robust.certificate.varied and "varied" in robust.certificate.statement and "varied" not in small.certificate.statement


def test_prune_learns_and_judges_under_varied_ablation(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model(), steps=80, fit_pairs=200, join_pairs=200, target_loss=(0.45,))
    found = {}
    for kind in (False, True):
        (c,) = prune.prune(loaded(model, cfg, constants), TOY, replace(cfg, varied=kind), lambda *_: None)
        circuit, means = circuit_of(c, model)
        case = Case(model, TOY, Digits(), circuit, means, cfg, toy_pairs(256), toy_pairs(100, "heldout"), "", 0)
        found[kind] = c["n_edges"], resample_task(case)["resample_task"]
    (edges, loss), (more_edges, less_loss) = found[False], found[True]
    assert edges < more_edges and less_loss < 0.48 < loss


def test_without_the_option_nothing_else_is_run(tmp_path, monkeypatch):
    model, cfg, constants = toy_setup(tmp_path, hand_made())
    monkeypatch.setattr("find.Varied", None)
    gates = Gates(model, False)
    assert list(runs_of(model, constants, None, torch.Generator())) == ["mean"]
    tau = learn_masks(model, toy_pairs(), constants, gates, replace(cfg, steps=5), lambda *_: None)
    assert isinstance(cfg, MaskConfig) and tau.shape == (gates.n_parameters,)
    assert list(find(model, toy_pairs(), None, constants, replace(cfg, steps=5), lambda *_: None))


def test_a_stiff_model_shares_the_weights_and_leaves_the_model_as_it_is(tmp_path):
    model, _, constants, _ = setup(tmp_path, hand_made())
    pairs = toy_pairs(8)
    before = last_logits(model, pairs)
    circuit = Search(model, constants, pairs).fit(all_nodes(model), all_edges(model))
    stiff = Stiff(model, model)
    got = stiff.logits(pairs, ablate(circuit.mask, constants))
    torch.testing.assert_close(last_logits(model, pairs), before)
    assert stiff.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr() and got.shape == before.shape
    assert half_awake(circuit, torch.Generator()).size >= circuit.size and alone(model, circuit, constants)(pairs).shape == (16,)
