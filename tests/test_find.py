"""find.py: rankings, bisection, several starts, and circuits joined; each against plain sums over hand-made models."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import find
from ablations import Varied
from circuit import all_edges, host
from masks import Gates
from model import GPT
from search import Search
from tasks import margins
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


def test_whether_a_circuit_is_needed_is_known_as_soon_as_the_prompts_seen_say_so(tmp_path, monkeypatch):
    model, cfg, constants = toy_setup(tmp_path, parallel_model())
    search = Search(model, constants, toy_pairs(24), batch=4)
    mask = as_mask(model, CIRCUIT)
    without = search.loss_without(mask)
    batches = []

    def counted(model, pairs, nodes):
        batches.append(len(pairs))
        return margins(model, pairs, nodes)

    monkeypatch.setattr("search.margins", counted)
    for necessity, needed, most in ((without - 1e-4, True, 6), (without + 1e-4, False, 6), (without / 12, True, 3)):
        batches.clear()
        assert search.is_needed(mask, necessity) is needed and len(batches) <= most
    assert without > 0.1


# --- several starts -------------------------------------------------------------------------------

@pytest.fixture
def several(monkeypatch):
    """circuit: of so many edges and losses; best: the one that is chosen, and the aims of each round of starts, as shares of the target."""
    def circuit(edges, loss, apart, error=0.01, certificate=1):
        return SimpleNamespace(size=(edges + 1, edges), loss=loss, loss_apart=apart, error_apart=error, starts=None, certificate=certificate)

    said = []
    monkeypatch.setattr(find, "replace", lambda c, **change: SimpleNamespace(**{**vars(c), **change}))
    monkeypatch.setattr(find, "with_loss_apart", lambda search, c, apart: c)

    def best(*rounds, joined=(None, None, None), minimal=True):
        asked = []

        def from_starts(search, gates, starts, aim, cfg, say):
            asked.append(round(aim / 0.15, 3))
            return [find.Start(0, None, c) for c in rounds[len(asked) - 1]]

        def join(search, circuits, aim, cfg, say):
            assert all(c.certificate for c in circuits)
            return joined[find.SLACKS.index(round(aim / 0.15, 3))] if circuits else None

        monkeypatch.setattr(find, "from_starts", from_starts)
        monkeypatch.setattr(find, "join", join)
        return find.best_start(None, None, None, None, find.FindConfig(minimal=minimal), said.append), asked

    return circuit, best, said


def test_starts_are_joined_further_and_further_below_the_target_until_that_holds_on_pairs_set_apart(several):
    circuit, best, said = several
    starts = [circuit(9, 0.09, 0.1), circuit(8, 0.09, 0.1)]  # these hold, and end nothing
    found, asked = best(starts, joined=(circuit(4, 0.13, 0.14), circuit(3, 0.1, 0.1), None))
    assert found.size[1] == 4 and asked == [0.6] and found.starts == [(10, 9, 0.1), (9, 8, 0.1), (5, 4, 0.14)]
    found, asked = best(starts, joined=(circuit(4, 0.13, 0.151), circuit(5, 0.1, 0.12), None))
    assert found.size[1] == 5 and asked == [0.6] and len(found.starts) == 4 and not said
    found, asked = best(starts, joined=(circuit(4, 0.13, 0.149, error=0.02), circuit(5, 0.1, 0.149, error=0.02), None))  # both by luck
    assert found.size[1] == 8 and len(found.starts) == 4  # of all that hold the smallest
    found, asked = best([circuit(9, 0.09, 0.2)], joined=(circuit(4, 0.13, 0.18), circuit(6, 0.1, 0.16), circuit(7, 0.09, 0.17)))
    assert found.size[1] == 6 and len(found.starts) == 4 and "none holds" in said[-1]  # none does: the best of all
    found, asked = best([circuit(9, 0.09, 0.14)])  # together they do not do what is asked
    assert found.size[1] == 9


def test_starts_that_cannot_be_minimal_so_far_below_the_target_try_again_nearer_to_it(several):
    circuit, best, said = several
    plain, small = circuit(30, 0.14, 0.14, certificate=None), circuit(9, 0.09, 0.14)
    found, asked = best([plain, small], [circuit(6, 0.11, 0.14)], joined=(circuit(4, 0.13, 0.14), None, None))
    assert found.size[1] == 4 and asked == [0.6, 0.75] and [edges for _, edges, _ in found.starts] == [9, 6, 4]
    found, asked = best([plain], [plain], [plain], joined=(circuit(4, 0.13, 0.14), None, None))  # which is not to be had
    assert found.size[1] == 30 and asked == [0.6, 0.75, 0.9]
    failed = circuit(30, 0.2, 0.2, certificate=None)
    found, asked = best([failed, failed])  # nor is the target itself: nothing else is tried
    assert found.size[1] == 30 and asked == [0.6]


def test_starts_that_are_not_to_be_minimal_go_further_below_the_target_until_one_holds(several):
    circuit, best, said = several
    found, asked = best([circuit(9, 0.13, 0.14), circuit(5, 0.13, 0.149), circuit(3, 0.13, 0.2)], minimal=False)
    assert found.size[1] == 5 and asked == [0.9] and found.starts == [(10, 9, 0.14), (6, 5, 0.149), (4, 3, 0.2)]
    found, asked = best([circuit(5, 0.13, 0.149, error=0.02)], [circuit(6, 0.11, 0.13)], minimal=False)  # the first may be luck
    assert found.size[1] == 6 and asked == [0.9, 0.75]
    found, asked = best([circuit(5, 0.13, 0.17)], [circuit(6, 0.11, 0.2)], [circuit(7, 0.09, 0.3)], minimal=False)
    assert found.size[1] == 5 and asked == [0.9, 0.75, 0.6] and "none holds" in said[-1]
    found, asked = best([circuit(5, 0.2, 0.1), circuit(4, 0.3, 0.1)], minimal=False)  # none meets it: the loss says so
    assert found.size[1] == 5 and asked == [0.9]


@pytest.mark.parametrize("varied, target", [(False, 0.5), (True, 0.65)])
def test_starts_in_processes_end_as_they_do_in_turn(varied, target, tmp_path, capfd):
    model, cfg, constants = toy_setup(tmp_path, parallel_model(cross=-0.3), minimal=True, starts=3, target_loss=(target,), varied=varied)
    apart = toy_pairs(200, "heldout")
    one, two = (list(find.find(model, toy_pairs(256), apart, constants, replace(cfg, jobs=jobs), print)) for jobs in (1, 2))
    assert one[0].starts == two[0].starts and len(one[0].starts) > 3 and one[0].loss == two[0].loss
    assert kept_of(one[0].mask) == kept_of(two[0].mask)
    said = capfd.readouterr().out
    assert all(f"\n[start {i}] " in said for i in range(3))


def test_a_start_that_tries_again_keeps_its_number(tmp_path, capfd):
    model, cfg, constants = toy_setup(tmp_path, parallel_model(), minimal=True, starts=3, jobs=2)
    search = Search(model, constants, toy_pairs(24))
    again = [find.Start(seed) for seed in find.seeds_of(cfg)[1:]]
    find.from_starts(search, Gates(model, False), again, 0.5, cfg, print)
    said = capfd.readouterr().out
    assert "[start 1] " in said and "[start 2] " in said and "[start 0] " not in said


class NoGradient:
    """A search that can be pickled and no more."""
    @property
    def model(self):
        raise ValueError("no gradient")


def test_what_ends_a_start_in_its_process_is_said_by_the_run():
    cfg = find.FindConfig(minimal=True, starts=2, jobs=2)
    with pytest.raises(ValueError, match="no gradient"):
        find.from_starts(NoGradient(), None, [find.Start(0), find.Start(1)], 0.1, cfg, print)


@pytest.mark.parametrize("options, exchanged", [(dict(starts=1), True), (dict(starts=2), False),
                                                (dict(starts=2, method="attribution"), True)])
def test_a_start_is_exchanged_only_where_it_is_joined_to_no_other(options, exchanged, tmp_path, monkeypatch):
    model, cfg, constants = toy_setup(tmp_path, parallel_model(), minimal=True, **options)
    asked = []

    def smallest(*args, exchange):
        asked.append(exchange)
        return Search(model, constants, toy_pairs(24)).fit(all_nodes(model), all_edges(model))

    monkeypatch.setattr(find, "smallest", smallest)
    list(find.find(model, toy_pairs(256), None, constants, cfg, lambda text: None))
    assert set(asked) == {exchanged}


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
    losses = varied.varied.worst_losses(circuit, apart)
    assert losses.shape == (40,) and losses.mean() > at_means + 0.01
    got = find.with_loss_apart(varied, circuit, apart)
    assert got.loss_apart == pytest.approx(losses.mean().item())
    assert got.error_apart == pytest.approx(losses.std().item() / 40 ** 0.5)  # of that loss, not of that at the means
