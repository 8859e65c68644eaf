"""tools/refute.py: what a node is said to do, on a circuit whose every part is known."""
import json

import pytest
import torch

from circuit_file import circuit_of
from model import GPT
from tasks import Pairs
from test_validate import command, toy_run  # noqa: F401
from toy import plain_margins
from tools import refute
from tools.refute import NUMBERS, counterparts


@pytest.fixture
def found(command, toy_run, capsys):  # noqa: F811
    """The numbers of the toy circuit: uniform attention copies the deciding token to the answer."""
    folder = toy_run[1]
    assert refute.main([f"--circuit={command.path}", f"--data={folder}", "--pairs=40"]) == 0
    out = capsys.readouterr().out
    found = json.loads((command.path.parent / "refute.json").read_text())
    assert f"{found['loss']:.3f} nats" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
            if ".attn." in line and line.count("|") == 8]
    assert rows == [[f"{node['site']}.{node['channel']}", *(f"{node[key]:.3f}" for key in NUMBERS)]
                    for node in found["nodes"]]
    return found


def test_each_node_of_a_path_that_carries_the_answer_turns_it(found, command, toy_run):  # noqa: F811
    assert found["right"] > 0.9 and found["pairs"] == 40
    names = [f"{node['site']}.{node['channel']}" for node in found["nodes"]]
    listed = json.loads(command.path.read_text())["nodes"]
    kept = [f"{site}.{i}" for site, channels in listed.items() for i in channels]
    assert names == kept and len(names) == 3
    for node in found["nodes"]:
        assert node["held"] > 0.69  # nothing else knows
        assert node["held_right"] == pytest.approx(0.5)  # one answer to all
        # the other prompt's answer; where one of a pair was wrong, both have that already
        assert node["exchanged_turned"] >= 1 - 2.01 * (1 - found["right"])
        assert node["mirrored_turned"] > 0.8
        assert node["mirrored_first"] == pytest.approx(0.5, abs=0.1)  # those of both
        assert node["held_in_model"] > 0.5


def test_the_numbers_are_those_of_plain_sums(found, command, toy_run):  # noqa: F811
    content = json.loads(command.path.read_text())
    model = GPT.load(content["model"]["dir"])
    circuit, constants = circuit_of(content, model)
    from tasks import load_pairs
    from toy import Digits, TOY, nats, scaled
    pairs = load_pairs(TOY, Digits(), content["settings"]["heldout_pairs"], "heldout", model.config.block_size,
                       content["settings"]["seed"]).first(40)
    for node in found["nodes"]:
        mask = {site: kept.clone() for site, kept in circuit.mask.items()}
        mask[node["site"]][node["channel"]] = False
        margin = plain_margins(model, mask, circuit.edges, constants, pairs)
        assert nats(scaled(margin, circuit.scale, circuit.shift)) == pytest.approx(node["held"], abs=1e-4)


def test_where_a_head_looks_adds_up_and_is_what_attention_does(found):
    (head,) = found["heads"][""]
    shares = head["looks"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    # uniform, whatever runs before it: it has no query and no key
    assert [(held["site"], held["moved"]) for held in head["without"]] == [("0.attn.act_in", 0)]
    # each prompt's tokens alike: no token has more than its share of the places
    assert max(shares.values()) < 0.7


def test_a_token_has_its_counterpart_from_the_start_or_from_the_end():
    ids = torch.tensor([[5, 6, 1, 2, 7, 8, 0], [5, 6, 3, 7, 8, 0, 0],    # two tokens in place of one
                        [4, 1, 9, 0, 0, 0, 0], [4, 2, 9, 0, 0, 0, 0],    # one in place of one
                        [3, 1, 0, 0, 0, 0, 0], [3, 1, 1, 0, 0, 0, 0]])   # one more
    pairs = Pairs(ids, torch.tensor([5, 4, 2, 2, 1, 2]), torch.zeros(6), torch.ones(6))
    got = [row[: last + 1] for row, last in zip(counterparts(pairs).tolist(), pairs.last.tolist())]
    assert got == [[0, 1, -1, 2, 3, 4], [0, 1, 3, 4, 5], [0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 1]]


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        refute.main([f"--circuit={tmp_path}/none.json"])
    assert refused.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
