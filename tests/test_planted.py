"""tools/planted.py: what is planted is there, is needed and is found; the arithmetic of scores."""
import json

import pytest
import torch

from circuit import edges_of
from data.tinypython.tokenizer import load_tokenizer
from search import Search
from model import GPT
from prune import PruneConfig, constants_of
from tasks import TASKS, calibrate, calibrated, load_pairs, loss_of, margins
from tools import planted
from tools.planted import (
    CASES, PlantedConfig, Score, as_circuit, cell, least_loss, main, measure, needed, parts_found,
    plant, precision_recall, row, score, truth_of)
from tools.planting import SHAPES, background
from toy import one_thread, prompts_as_data  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = dict(shapes="2x64", seeds=1, train_pairs=256, fit_pairs=64, mean_tokens=4096, steps=120,
             batch_pairs=16)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    """Text of the kind that the tasks' prompts are, for the means."""
    return prompts_as_data(tmp_path_factory.mktemp("data"), tokenizer)


@pytest.fixture(scope="module")
def config(data):
    return PlantedConfig(**QUICK, data=data)


# --- the planted models ----------------------------------------------------------------------

def calibrated_loss(model, pairs):
    margin = margins(model, pairs)
    return loss_of(calibrated(margin, *calibrate(margin)))


SIZE = {"quote": (11, 7), "quote2": (15, 11), "bracket": (7, 4), "bracket2": (9, 6)}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_circuit_does_the_task_alone_and_no_edge_of_what_it_needs_can_be_cut(
        case, config, tokenizer):
    made = plant(config, "2x64", case, "single", "far", 0, tokenizer)
    (planter,) = made.truths
    truth = truth_of(planter, "mean")
    constants = constants_of(made.model, PruneConfig(data=config.data, mean_tokens=4096))
    pairs = load_pairs(made.task, tokenizer, 128, "heldout", 128)
    assert calibrated_loss(made.model, pairs) < config.target_loss
    search = Search(made.model, constants, made.pairs.first(256))
    assert search.fit(*as_circuit(made.model, *truth)).loss <= config.target_loss
    nodes, edges = needed(made, truth, search, config.target_loss)
    whole, least = least_loss(made, (nodes, edges), search)
    assert whole <= config.target_loss < least
    assert nodes <= truth[0] and edges <= truth[1]
    if case in SIZE:  # of the others the prompts do not ask for all that is written
        assert (nodes, edges) == truth and (len(nodes), len(edges)) == SIZE[case]
    else:
        assert len(edges) > len(truth[1]) / 2


def test_the_planted_channels_also_do_other_things(config, tokenizer):
    made = plant(config, "2x64", "quote", "single", "far", 0, tokenizer)
    (planter,) = made.truths
    everything = {site: torch.ones(made.model.config.site_width(site), dtype=torch.bool)
                  for site in made.model.sites}
    others = [e for e in edges_of(made.model, everything) if tuple(e[:4]) not in planter.edges]
    busy = {(e[0], e[1]) for e in others} | {(e[2], e[3]) for e in others}
    assert planter.nodes <= busy
    # and tokens that have nothing to do with the task are on them
    read = next(i for site, i in planter.nodes if site == "0.mlp.act_in")
    assert (made.model.transformer.wte.weight[:, read] != 0).sum() > 300


def test_two_copies_share_nothing_and_each_solves_the_task(config, tokenizer):
    made = plant(config, "2x64", "bracket", "copy", "far", 0, tokenizer)
    first, second = (truth_of(planter, "mean") for planter in made.truths)
    assert not first[0] & second[0] and not first[1] & second[1]
    constants = constants_of(made.model, PruneConfig(data=config.data, mean_tokens=4096))
    search = Search(made.model, constants, made.pairs.first(64))
    for truth in (first, second):
        assert search.fit(*as_circuit(made.model, *truth)).loss <= config.target_loss


def test_a_distractor_solves_the_task_in_part(config, tokenizer):
    """Without the planted circuit the hint is left: better than a coin, far from the target."""
    left = {}
    for variant in ("partial", "single"):
        made = plant(config, "2x64", "bracket", variant, "far", 0, tokenizer)
        ((_, value, _, channel),) = [e for e in made.truths[0].edges if "1.attn.resid" in e[2]]
        written = made.model.transformer.h[1].attn.c_proj
        written.weight[channel, value] = 0.0
        written.bias[channel] = 0.0
        left[variant] = calibrated_loss(made.model, made.pairs.first(128))
    assert 0.1 < left["partial"] < 0.67 and left["single"] > 0.69


def test_a_shape_keeps_its_density_and_its_rows_of_positions_have_one_norm():
    model = background(SHAPES["2x64"], 0)
    share = (model.transformer.h[1].mlp.c_fc.weight != 0).float().mean().item()
    assert 0.8 / 16 < share <= 1 / 16
    rows = model.transformer.wpe.weight
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))
    assert (rows[1:, 0] > rows[:-1, 0]).all()


# --- what is found ---------------------------------------------------------------------------

def test_the_pruner_finds_the_whole_planted_circuit(config, tokenizer):
    made = plant(config, "2x64", "quote", "single", "far", 0, tokenizer)
    scores = measure(config, made, "mean", ["learned", "minimal"])
    assert scores["learned"].recall == (1.0, 1.0)
    assert scores["minimal"].recall == (1.0, 1.0) and scores["minimal"].precision == (1.0, 1.0)


def test_a_value_that_only_a_bias_makes_is_found(config, tokenizer):
    """Every token has the same value, and yet what is gathered of it moves with the attention of
    its head."""
    for seed in (0, 1, 2):
        made = plant(config, "2x64", "bracket", "single", "far", seed, tokenizer)
        scores = measure(config, made, "mean", ["minimal"])
        assert scores["minimal"].recall == scores["minimal"].precision == (1.0, 1.0), seed


def test_precision_and_recall_of_lists():
    truth = {("a", 1), ("a", 2), ("b", 1), ("b", 2)}
    assert precision_recall(truth, truth) == (1.0, 1.0)
    assert precision_recall({("a", 1), ("c", 1)}, truth) == (0.5, 0.25)
    assert precision_recall({*truth, ("c", 1)}, truth) == (0.8, 1.0)
    assert precision_recall(set(), truth) == (0.0, 0.0)


def test_of_two_truths_the_one_found_better_counts():
    first = ({("a", 1), ("b", 1)}, {("a", 1, "b", 1)})
    second = ({("a", 2), ("b", 2), ("b", 3)}, {("a", 2, "b", 2), ("a", 2, "b", 3)})
    found = ({("a", 2), ("b", 2), ("a", 1)}, {("a", 2, "b", 2)})
    got = score(found, [first, second], 0.01, 0.5, 1.0)
    assert got.planted == (3, 2) and got.found == (3, 1)
    assert got.precision == (pytest.approx(2 / 3), 1.0)
    assert got.recall == (pytest.approx(2 / 3), 0.5)


def test_lists_become_masks_and_come_back(config, tokenizer):
    made = plant(config, "2x64", "types2", "single", "far", 0, tokenizer)
    nodes, edges = truth_of(made.truths[0], "mean")
    mask, chosen = as_circuit(made.model, nodes, edges)
    circuit = planted.Circuit(mask, chosen, 1.0, 0.0, 0.0)
    assert parts_found(made.model, circuit) == (nodes, edges)


def test_under_zero_ablation_constant_nodes_count(config, tokenizer):
    (planter,) = plant(config, "2x64", "quote", "single", "far", 0, tokenizer).truths
    mean, zero = truth_of(planter, "mean")[0], truth_of(planter, "zero")[0]
    assert [site for site, _ in zero - mean] == ["1.attn.q"] and mean < zero


# --- the table and the command ---------------------------------------------------------------

def test_a_cell_has_the_median_and_the_range():
    assert cell([0.5], ".2f") == "0.50" and cell([0.1, 0.9, 0.5], ".2f") == "0.50 (0.10 to 0.90)"
    scores = [Score((2, 1), (n, 1), (0.5, 1.0), (1.0, 1.0), 0.01, 0.3, 2.0) for n in (2, 4)]
    assert row(("s",), scores) == (
        "| s | 2 | 3 (2 to 4) | 0.50 | 1.00 | 1 | 1 | 1.00 | 1.00 | 0.010 | 0.300 | 2 |")


def test_the_saved_model_is_one_that_the_ordinary_commands_prune(
        data, tmp_path, capsys, tokenizer):
    out = tmp_path / "model"
    options = {**QUICK, "cases": "quote", "methods": "attribution", "data": data, "save": out}
    assert main([f"--{key}={value}" for key, value in options.items()]) == 0
    printed = capsys.readouterr().out
    assert "| 2x64 | quote | single | far | mean | attribution | 11 |" in printed
    model, content = GPT.load(str(out)), json.loads((out / "planted.json").read_text())
    pairs = load_pairs(TASKS[content["task"]], tokenizer, 64, "heldout", 128)
    assert calibrated_loss(model, pairs) < 0.02
    (circuit,) = content["circuits"]
    assert sum(map(len, circuit["nodes"].values())) == 11 and len(circuit["edges"]) == 7


@pytest.mark.parametrize("option, says", [
    ("cases=quot", "cases has no 'quot'; the nearest is 'quote'"),
    ("shapes=3x3", "shapes has no '3x3'"),
    ("fit_pairs=2000", "fit_pairs 2000 exceeds"),
])
def test_bad_words_are_one_line_and_status_2(option, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"--{option}"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_shape_without_room_for_the_circuit_is_one_line(config, tokenizer, monkeypatch):
    monkeypatch.setattr(planted, "SOLVED", -1.0)
    monkeypatch.setattr(planted, "DRAWS", 1)
    with pytest.raises(ValueError, match="no draw of 2x64 lets bracket"):
        plant(config, "2x64", "bracket", "single", "far", 0, tokenizer)
