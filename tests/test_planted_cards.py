"""tools/planted_cards.py: each kind of circuit is what it claims to be, and the card tells them apart."""
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from measures import partial_correlation
from data.tinypython.tokenizer import load_tokenizer
from tools import planted_cards
from tools.planted import parts_found
from tools.planted_cards import (
    FEW_PAIRS, MOST_EXTRA, Card, CardsConfig, a_copy, card_of, certified, circuits, everything, fitted, has_paths, main, missing,
    report, second_way, subject_of, with_idle, without_part)
from toy import one_thread, prompts_as_data  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory):
    """Few pairs, and text of the kind that the tasks' prompts are, for the means."""
    folder = prompts_as_data(tmp_path_factory.mktemp("data"), tokenizer)
    return CardsConfig(data=folder, mean_tokens=4096, fit_pairs=64, heldout_pairs=64)


@pytest.fixture(scope="module")
def subject(config, tokenizer):
    return subject_of(config, "quote", 0, tokenizer)


@pytest.fixture(scope="module")
def every(subject):
    return everything(subject.model)


# --- the kinds -------------------------------------------------------------------------------

def test_a_missing_circuit_lacks_one_part_and_no_other(subject):
    nodes, edges = subject.true
    drawn = missing(subject, 100, random.Random(0))
    assert len(drawn) == len(nodes) + len(edges) == 18
    gone_nodes, gone_edges = Counter(), Counter()
    for less in drawn:
        node, edge = nodes - less[0], edges - less[1]
        assert less[0] <= nodes and less[1] <= edges
        if node:  # with all edges that begin or end there
            (n,) = node
            assert edge == {e for e in edges if n in (e[:2], e[2:])}
        else:
            assert len(edge) == 1
            gone_edges.update(edge)
        gone_nodes.update(node)
    assert set(gone_nodes) == nodes and set(gone_edges) == edges  # each part once
    assert {*gone_nodes.values(), *gone_edges.values()} == {1}


def test_the_first_missing_part_is_the_one_missed_least(subject):
    drawn = missing(subject, 100, random.Random(0))
    losses = [fitted(subject, parts).loss for parts in drawn]
    assert losses[0] == min(losses) < max(losses)
    assert missing(subject, 3, random.Random(0)) == drawn[:3] != missing(subject, 3, random.Random(1))


def test_an_idle_circuit_has_the_true_one_in_it_and_more_parts_with_a_path(subject, every):
    nodes, edges = subject.true
    sizes = set()
    for seed in range(30):
        more = with_idle(subject, every, random.Random(seed))
        new = len(more[0] - nodes) + len(more[1] - edges)
        assert nodes <= more[0] and edges <= more[1] and 1 <= new <= MOST_EXTRA, seed
        assert more[0] <= every[0] and more[1] <= every[1] and has_paths(subject, more), seed
        sizes.add((len(more[0] - nodes), len(more[1] - edges)))
    assert len(sizes) > 2  # not always the same
    assert fitted(subject, more).size == (len(more[0]), len(more[1]))


@pytest.mark.parametrize("case", ["quote", "bracket2"])
def test_a_wrong_circuit_is_of_the_same_shape_and_shares_no_node(case, config, tokenizer):
    subject = subject_of(config, case, 0, tokenizer)
    every = everything(subject.model)
    drawn = [a_copy(subject, every, random.Random(seed)) for seed in range(5)]
    nodes, edges = subject.true
    for wrong in drawn:
        assert not wrong[0] & nodes and not wrong[1] & edges
        assert Counter(site for site, _ in wrong[0]) == Counter(site for site, _ in nodes)
        assert Counter((a, b) for a, _, b, _ in wrong[1]) == Counter((a, b) for a, _, b, _ in edges)
        assert wrong[1] <= every[1] and has_paths(subject, wrong)
        for a, b in (("1.attn.q", "1.attn.v"), ("1.attn.k", "1.attn.v")):  # what met, meets
            heads = [{i // 8 for site, i in wrong[0] if site == which} for which in (a, b)]
            assert not heads[0] or heads[0] == heads[1]
    assert len({tuple(sorted(wrong[0])) for wrong in drawn}) == 5


def test_a_part_that_leads_nowhere_has_no_path(subject, every):
    nodes, edges = subject.true
    assert has_paths(subject, subject.true)
    assert not has_paths(subject, ({*nodes, ("0.mlp.post_act", 3)}, edges))
    first, second = sorted(edges)[0], sorted(nodes)[0]
    assert not has_paths(subject, without_part(subject.true, first))
    assert not has_paths(subject, without_part(subject.true, second))
    assert has_paths(subject, (set(), set()))


def test_everything_is_all_nonzero_weights(subject, every):
    block = subject.model.transformer.h[0]
    up = {e for e in every[1] if e[2] == "0.mlp.post_act"}
    assert len(up) == int((block.mlp.c_fc.weight != 0).sum())
    assert len(every[0]) == sum(subject.model.config.site_width(site) for site in subject.model.sites)


def test_there_is_no_second_way_past_a_true_node(subject, every, monkeypatch):
    parts, least = second_way(subject, every)
    assert parts is None and least > 0.1
    # where some loss would do, there is one, and it has not all true nodes
    monkeypatch.setattr(subject.settings, "target_loss", (least + 0.001,))
    parts, _ = second_way(subject, every)
    assert parts is not None and not subject.true[0] <= parts[0]


# --- the judge -------------------------------------------------------------------------------

def test_certified_are_the_minimal_circuits_that_are_not_the_planted_one_each_once(subject, every, monkeypatch):
    planted, other = (fitted(subject, parts) for parts in (subject.true, a_copy(subject, every, random.Random(0))))
    asked = []

    def prunings(of, constants, settings, methods):
        asked.append((settings.steps, settings.fit_pairs, settings.seed))
        assert of is subject.planted and methods == ("minimal",)
        of_steps = {120: planted, 200: other, 300: other}[settings.steps]
        yield "minimal", replace(of_steps, certificate="nothing can go"), 0.0

    monkeypatch.setattr(planted_cards, "prunings", prunings)
    found = certified(subject)
    assert found == [parts_found(subject.model, other)] != [subject.true]
    assert asked == [(120, FEW_PAIRS, 0), (200, FEW_PAIRS, 0), (300, FEW_PAIRS, 0)]
    card = card_of(subject, "certified", found[0])
    assert card.right and card.lacks >= {"sufficient"}


def test_the_judge_tells_the_kinds_apart(subject, every):
    rng = random.Random(0)
    true = card_of(subject, "true", subject.true)
    assert not true.lacks and true.right and true.follows
    assert true.size == (11, 7) and true.numbers["sufficiency"] < 0.01
    less = card_of(subject, "missing", missing(subject, 1, rng)[0])
    assert less.lacks == {"sufficient"} and less.right and less.numbers["necessity"] > 1
    more = card_of(subject, "idle", with_idle(subject, every, rng))
    assert more.lacks == {"idle"} and more.right
    wrong = card_of(subject, "wrong", a_copy(subject, every, rng))
    assert wrong.lacks == {"sufficient", "needed"} and wrong.right
    # under other names they are errors
    assert not card_of(subject, "missing", subject.true).right
    assert "missing, quote seed 0: (11, 7)" in card_of(subject, "missing", subject.true).line()


def test_what_no_node_has_does_not_count_beyond(subject):
    nothing = card_of(subject, "nothing", (set(), set()))
    assert nothing.lacks == {"sufficient", "needed"} and nothing.size == (0, 0)
    assert nothing.numbers["agreement_beyond"] == 0 < 0.1 < nothing.numbers["agreement_within"]
    assert card_of(subject, "true", subject.true).numbers["agreement_beyond"] > 0.5


def test_of_two_copies_neither_is_needed_and_of_both_each_part_can_go(config, tokenizer):
    twice = subject_of(config, "bracket", 0, tokenizer, "copy")
    (one, first), (both, union) = circuits(twice, config)
    assert (one, both) == ("one_of_two", "both") and first[0] < union[0] and len(union[0]) == 14
    cards = [card_of(twice, one, first), card_of(twice, both, union)]
    assert "sufficient" not in cards[0].lacks
    assert cards[1].lacks == {"idle"} and cards[1].right


@pytest.mark.parametrize("kind, lacks, right", [
    ("true", set(), True), ("true", {"idle"}, False), ("true", {"needed"}, False),
    ("missing", {"sufficient"}, True), ("missing", {"idle"}, False), ("missing", set(), False),
    ("idle", {"idle", "sufficient"}, True), ("idle", {"sufficient"}, False),
    ("wrong", {"needed"}, True), ("wrong", set(), False), ("nothing", {"sufficient"}, True)])
def test_what_a_right_judgement_is(kind, lacks, right):
    assert Card(kind, "", (1, 1), {}, True, lacks).right is right


def test_a_partial_correlation_takes_out_what_both_share():
    torch.manual_seed(0)
    c, a, b = torch.randn(3, 4000).double()
    assert partial_correlation(a + 3 * c, b + 3 * c, c) == pytest.approx(0, abs=0.05)
    assert partial_correlation(a + 3 * c, a + 3 * c, c) == pytest.approx(1)
    assert partial_correlation(a, a + b, c) == pytest.approx(0.5 ** 0.5, abs=0.05)
    assert partial_correlation(2 * c, a + c, c) == 0


# --- the command -----------------------------------------------------------------------------

def test_the_report_counts_and_leaves_copies_out_of_the_total():
    numbers = dict.fromkeys(
        ["sufficiency", "necessity", "necessity_refit", "idle", "agreement", "agreement_within", "agreement_beyond"], 0.5)
    cards = [Card(kind, "", (1, 1), numbers, False, lacks) for kind, lacks in [
        ("true", set()), ("missing", {"needed"}), ("wrong", set()), ("idle", {"sufficient"}),
        ("both", set())]]
    text = report(cards)
    assert "judged right: 2 of 4, 50.0%; others called true: 1" in text
    assert "| both | 1 | 0 | 0 | 0.500 | 0.50 |" in text and "one_of_two" not in text


@pytest.mark.parametrize("option, says", [
    ("cases=quot", "cases has no 'quot'; the nearest is 'quote'"),
    ("shape=3x3", "shapes has no '3x3'"),
    ("draws=0", "draws must be at least 1"),
])
def test_bad_words_are_one_line_and_status_2(option, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"--{option}"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
