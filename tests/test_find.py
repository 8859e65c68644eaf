"""find.py: rankings, bisection, several starts, and circuits joined; each against plain sums over hand-made models."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import find
from ablations import Varied
from circuit import all_edges, host
from model import GPT
from search import Search
from toy import (CIRCUIT, all_nodes, as_mask, hand_made, kept_of, nats, one_thread, parallel_model, plain_margins, scaled,  # noqa: F401
                 toy_circuit, toy_pairs, toy_setup)

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


# --- from a ranking to a circuit ------------------------------------------------------------------

def test_ties_of_tau_are_broken_so_that_the_circuit_is_as_small_as_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "learn_masks", lambda model, pairs, constants, gates, *_: torch.ones(len(gates.index)))
    _, _, circuit = toy_circuit(tmp_path)
    assert circuit["nodes"] == CIRCUIT


def hidden_by_topk():
    """The hand-made model, where channel 2 is larger at every read than channel 0, on which the answer hangs, and AbsTopK keeps one."""
    model = hand_made()
    model.transformer.wte.weight[:2, 2] = 3.0
    model.config.afrac, model.config.afrac_loctypes = 0.2, "attn_in"
    again = GPT(model.config).eval().requires_grad_(False)
    again.load_weights(model.state_dict())
    return again


def test_a_standalone_circuit_is_found_where_abstopk_hides_it_and_its_file_says_so(tmp_path):
    model = hidden_by_topk()
    with pytest.raises(ValueError, match="does not solve"):  # nor does the whole model see channel 0
        toy_circuit(tmp_path, model)
    model, cfg, constants = toy_setup(tmp_path, model, standalone=True, minimal=True)
    (circuit,) = find.find(model, toy_pairs(256), None, constants, cfg, lambda text: None)
    assert circuit.loss <= 0.4 and circuit.standalone and kept_of(circuit.mask) == CIRCUIT
    assert circuit.certificate is not None


def test_necessity_of_a_standalone_circuit_is_the_whole_models(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, hidden_by_topk())
    search = Search(host(model, True), constants, toy_pairs(24), whole=model)
    mask = as_mask(model, CIRCUIT)
    without = plain_margins(model, {s: ~m for s, m in mask.items()}, all_edges(model), constants, toy_pairs(24))
    assert search.loss_without(mask) == pytest.approx(nats(without), rel=1e-4)


# --- several starts -------------------------------------------------------------------------------

def test_of_several_starts_the_smallest_circuit_that_holds_on_pairs_set_apart_counts(monkeypatch):
    def circuit(edges, loss, apart, error=0.01, certificate=1):
        return SimpleNamespace(size=(edges + 1, edges), loss=loss, loss_apart=apart, error_apart=error, starts=None, certificate=certificate)

    cfg, said = find.FindConfig(), []
    monkeypatch.setattr(find, "replace", lambda c, **change: SimpleNamespace(**{**vars(c), **change}))
    monkeypatch.setattr(find, "with_loss_apart", lambda search, c, apart: c)

    def best(*by_slack, joined=(None, None, None)):
        asked = []

        def smallest(search, gates, ranking, aim, target, cfg, say):
            asked.append(round(aim / target, 3))
            return by_slack[find.SLACKS.index(asked[-1])][ranking]

        def join(search, circuits, aim, cfg, say):
            return joined[find.SLACKS.index(round(aim / 0.15, 3))] if circuits else None

        monkeypatch.setattr(find, "smallest", smallest)
        monkeypatch.setattr(find, "join", join)
        return find.best_start(None, None, None, range(len(by_slack[0])), None, 0.15, cfg, said.append), asked

    found, asked = best([circuit(9, 0.13, 0.14), circuit(5, 0.13, 0.149), circuit(3, 0.13, 0.2)])
    assert found.size[1] == 5 and asked == 3 * [0.9] and found.starts == [(10, 9, 0.14), (6, 5, 0.149), (4, 3, 0.2)]
    found, asked = best([circuit(5, 0.13, 0.149, error=0.02)], [circuit(6, 0.11, 0.13)])  # that may be luck: further below the target
    assert found.size[1] == 6 and asked == [0.9, 0.75] and "none holds" in said[-1]
    found, asked = best([circuit(5, 0.13, 0.17)], [circuit(6, 0.11, 0.2)], [circuit(7, 0.09, 0.3)])  # not even then: the best of all
    assert found.size[1] == 5 and asked == [0.9, 0.75, 0.6] and len(found.starts) == 3
    found, asked = best([circuit(5, 0.2, 0.1), circuit(4, 0.3, 0.1)])  # none meets it: the loss says so
    assert found.size[1] == 5 and asked == 2 * [0.9]
    # what is joined counts as well; where it must go further below, the starts need not be made again
    found, asked = best([circuit(5, 0.13, 0.17), circuit(6, 0.13, 0.14)], joined=(circuit(4, 0.13, 0.14), None, None))
    assert found.size[1] == 4 and asked == 2 * [0.9] and len(found.starts) == 3
    found, asked = best([circuit(5, 0.13, 0.17)], joined=(circuit(4, 0.13, 0.17), circuit(7, 0.11, 0.14), None))
    assert found.size[1] == 7 and asked == [0.9] and len(found.starts) == 3
    # one that is not minimal cannot be joined
    found, asked = best([circuit(5, 0.13, 0.14, certificate=None)], joined=(circuit(4, 0.13, 0.14), None, None))
    assert found.size[1] == 5


def test_circuits_joined_give_what_none_of_them_alone_could_on_more_pairs(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model())  # four channels, of which a few would do
    many = Search(model, constants, toy_pairs(64))
    full = many.fit(all_nodes(model), all_edges(model))
    few = Search(model, constants, toy_pairs(16))
    reads = [("0.attn.act_in", i) for i in range(4)]
    circuits = [few.fit_without(full, [part for part in reads if part[1] not in kept]) for kept in ((0, 1), (2, 3))]
    losses = [many.fit(c.mask, c.edges).loss for c in circuits]
    aim = (full.loss + min(losses)) / 2  # neither circuit does, both together do
    got = find.join(many, circuits, aim, cfg, lambda text: None)
    kept = set(got.mask["0.attn.act_in"].nonzero().flatten().tolist())
    assert got.certificate.pairs == 64 and got.loss <= aim and kept & {0, 1} and kept & {2, 3}
    assert find.join(many, circuits[:1], aim, cfg, print) is None and find.join(many, [], aim, cfg, print) is None
    assert find.join(many, circuits, aim, replace(cfg, necessity=9.0), print) is None


def test_a_loss_on_pairs_set_apart_is_plain_sums_and_its_error_shrinks_with_them(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model())
    search = Search(model, constants, toy_pairs(24))
    circuit = search.fit(all_nodes(model), all_edges(model))
    for n in (25, 100):
        apart = toy_pairs(n, "heldout")
        got = find.with_loss_apart(search, circuit, apart)
        margin = scaled(plain_margins(model, circuit.mask, circuit.edges, constants, apart), circuit.scale, circuit.shift)
        losses = torch.nn.functional.softplus(-margin)
        assert got.loss_apart == pytest.approx(losses.mean().item(), abs=1e-5)
        of_pairs = losses.view(n, 2).mean(1)  # whose two prompts are not independent
        assert got.error_apart == pytest.approx(of_pairs.std().item() / n ** 0.5, rel=1e-4)
    assert find.with_loss_apart(search, circuit, None) is circuit and find.holds(circuit, 0.0)


def test_a_varied_circuit_is_judged_on_pairs_set_apart_by_its_worst_ablation(tmp_path):
    model, cfg, constants = toy_setup(tmp_path, parallel_model())
    plain = Search(model, constants, toy_pairs(24))
    varied = Search(model, constants, toy_pairs(24), varied=Varied(model, model, constants, toy_pairs(64)))
    circuit = plain.fit({**all_nodes(model), "0.attn.v": torch.arange(6) < 2}, all_edges(model))
    apart = toy_pairs(40, "heldout")
    at_means = find.with_loss_apart(plain, circuit, apart).loss_apart
    worst = varied.varied.worst(circuit, apart.first(len(varied.quarter)))
    assert worst > at_means + 0.01
    assert find.with_loss_apart(varied, circuit, apart).loss_apart == pytest.approx(worst)
