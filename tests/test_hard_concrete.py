"""tools/hard_concrete.py: the distribution of gates, their budget, what is written, exact resume."""
import math

import pytest
import torch

from model import GPT
from optim import nonzeros_of
from test_train import argv, as_alone, data, interrupt, log, same, state, weights  # noqa: F401
from tools import hard_concrete
from tools.hard_concrete import WeightGates, clipped


def test_the_expected_number_of_open_gates_is_that_of_many_draws():
    gates = WeightGates([torch.zeros(40_000), torch.zeros(10_000)], seed=1)
    with torch.no_grad():
        gates.log_odds[0].fill_(-1.5)
        gates.log_odds[1].fill_(0.7)
    counted = [sum((z > 0).sum().item() for z in gates.draw()) for _ in range(5)]
    assert gates.n_open().item() == pytest.approx(sum(counted) / 5, rel=0.01)
    first, second = gates.draw(), gates.draw()
    assert not same(first, second)  # noise anew in every pass
    assert any((z == 1).any() and (z == 0).any() for z in first)  # exactly shut and exactly open
    other = WeightGates([torch.zeros(100)], seed=2), WeightGates([torch.zeros(100)], seed=3)
    assert not same(*(gates.draw() for gates in other))  # and anew for every seed


def test_settled_gates_shut_where_the_middle_of_the_noise_does():
    log_odds = torch.tensor([-9.0, math.log(1 / 11) - 0.01, 0.0, math.log(11) + 0.01, 9.0])
    assert clipped(log_odds)[[0, 1]].tolist() == [0, 0] and clipped(log_odds)[[3, 4]].tolist() == [1, 1]
    assert clipped(log_odds)[2].item() == pytest.approx(0.5)


def test_the_price_follows_the_budget():
    gates = WeightGates([torch.zeros(10)], seed=0)
    gates.adjust(torch.tensor(20.0), 10, rate=0.1)
    dear = gates.price.item()
    gates.adjust(torch.tensor(5.0), 10, rate=0.1)
    assert dear > 1 > gates.price.item() / dear


@pytest.fixture
def run(data, tmp_path):  # noqa: F811
    def run(name, **over):
        out = tmp_path / name
        return hard_concrete.main(argv(data, out, max_steps=60, **over)), out
    return run


def test_what_is_written_keeps_the_budget_and_is_a_model_as_any_other(run, capsys):
    status, out = run("run")
    model = GPT.load(str(out))
    counts = {name: p.count_nonzero().item() for name, p in model.named_parameters()}
    dense = ("ln_", "sink", "bigram", "wpe")
    budget = sum(nonzeros_of(p.numel(), 0.2) for name, p in model.named_parameters() if not any(d in name for d in dense))
    sparse = sum(n for name, n in counts.items() if not any(d in name for d in dense))
    assert status == 0 and 0 < sparse <= budget
    entries = log(out)
    assert entries[-1]["nonzeros"] < 0.8 * entries[0]["nonzeros"]  # expected, and falling
    # what it was evaluated as is what was written: the weights with their settled gates
    raw = state(out)["weights"]
    name = "transformer.h.0.mlp.c_fc.weight"
    assert raw[name].count_nonzero() > counts[name] and entries[-1]["val_loss"]["idioms"] < math.log(64)
    # once more, when there is nothing to do
    before = weights(out)
    assert run("run", resume=True)[0] == 0 and same(weights(out), before)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, monkeypatch, capsys):
    _, straight = run("straight")
    draw = WeightGates.draw

    def interrupted(gates):
        if gates.passes == 24:
            interrupt()()
        return draw(gates)

    with monkeypatch.context() as m:
        m.setattr(WeightGates, "draw", interrupted)
        status, out = run("stopped")
    assert status == 130 and not (out / "final_model.pt").exists()  # no model as any other yet
    assert "go on with: python -m tools.hard_concrete --config=" in capsys.readouterr().out
    status, stopped = run("stopped", resume=True)
    assert status == 0 and same(weights(straight), weights(stopped)) and same(state(straight)["gates"], state(stopped)["gates"])


@pytest.mark.parametrize("over, environment, said", [({"plan": True}, {}, "no --plan"), ({"keep_every": 5}, {}, "no --keep_every"),
                                                     ({"grad_checkpointing": True}, {}, "no --grad_checkpointing"),
                                                     ({}, {"WORLD_SIZE": "2", "RANK": "0"}, "one process")])
def test_what_it_cannot_do_it_says(run, monkeypatch, capsys, over, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hard_concrete, "begin", lambda cfg: pytest.fail("begun"))
    with pytest.raises(SystemExit) as refused:
        run("run", **over)
    assert refused.value.code == 2 and said in capsys.readouterr().err
