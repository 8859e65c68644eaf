"""validate.py: every line of the card against a plain computation, the controls on a toy, and the files that it refuses."""
import copy
import hashlib
import json
import random
import re
from dataclasses import replace
from itertools import count as counter

import numpy as np
import pytest
import torch
import torch.nn as nn

import case as loading
import measures
import validate
from circuit import FINAL, Circuit, all_edges, between
from config import sole_user
from case import Case
from circuit_file import circuit_of
from data.tinypython.filler import FILES, GROWN, NOUNS, VARIABLES
from data.tinypython.tokenizer import DEFAULT, load_tokenizer
from prune import PruneConfig, node_means
from tasks import Pairs, TASKS, calibrate, load_pairs, margins
from toy import (TOY, Digits, all_nodes, best_fit, hand_made, nats, one_thread, plain_margins, random_edges, random_model,  # noqa: F401
                 scaled, toy_circuit, toy_pairs, toy_setup, without_afrac)
from ablations import donor_of
from measures import (agreement, bank_of, complement, frozen, frozen_norms, generalisation, halves, idle, longer, necessity, necessity_refit, renamed,
                      resample, resample_task, resampled, resampled_in_task, standalone, sufficiency, zero_ablation)
from tokens import fingerprint
from validate import verdict

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
OPTIONS = dict(n_layer=2, afrac=0.5, afrac_loctypes="attn_in,attn_v,mlp_neuron,mlp_out", enable_bigram_table=True)


def quiet(text):
    pass


def random_case(tmp_path, share=0.7, **options) -> Case:
    """A random circuit of a random model, with all that a card needs."""
    model, cfg, _ = toy_setup(tmp_path, random_model(**{**OPTIONS, **options}))
    means = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    mask = {s: torch.rand(len(m)) < share for s, m in all_nodes(model).items()}
    circuit = Circuit(mask, random_edges(model), 1.3, 0.4, 0.0)
    return Case(model, TOY, Digits(), circuit, means, cfg, toy_pairs(64), toy_pairs(40, "heldout"), str(tmp_path / "train.bin"), 0)


def whole(case: Case) -> Case:
    """The same with nothing left out of the circuit."""
    return replace(case, circuit=replace(case.circuit, mask=all_nodes(case.model), edges=all_edges(case.model)))


def test_losses_without_abstopk_and_with_it_are_what_plain_sums_give(tmp_path):
    case = random_case(tmp_path)
    plain = lambda model: nats(scaled(plain_margins(model, case.circuit.mask, case.circuit.edges, case.constants, case.heldout), 1.3, 0.4))
    free, (mask, edges, means) = without_afrac(case.model), (case.circuit.mask, case.circuit.edges, case.constants)
    fit, held_out = (plain_margins(free, mask, edges, means, pairs) for pairs in (case.fit, case.heldout))
    want = {"standalone": plain(free), "with_topk": plain(case.model), "standalone_refit": nats(scaled(held_out, *calibrate(fit.float())))}
    assert standalone(case) == pytest.approx(want, rel=1e-3) and want["standalone"] != want["with_topk"]
    free_case = replace(case, circuit=replace(case.circuit, standalone=True))
    assert standalone(free_case) == pytest.approx(want, rel=1e-3) and sufficiency(free_case) == pytest.approx(want["standalone"], rel=1e-4)


# --- other ablations ------------------------------------------------------------------------------

def test_sufficiency_necessity_and_zero_ablation_are_what_plain_sums_give(tmp_path):
    case = random_case(tmp_path)
    mask, edges, means = case.circuit.mask, case.circuit.edges, case.constants
    plain = lambda means, pairs: plain_margins(case.model, mask, edges, means, pairs)
    assert sufficiency(case) == pytest.approx(nats(scaled(plain(means, case.heldout), 1.3, 0.4)), rel=1e-4)
    inverse = plain_margins(case.model, {s: ~m for s, m in mask.items()}, all_edges(case.model), means, case.heldout)
    assert necessity(case) == pytest.approx(nats(inverse), rel=1e-4)
    rest = [plain_margins(case.model, {s: ~m for s, m in mask.items()}, all_edges(case.model), means, p) for p in (case.fit, case.heldout)]
    assert necessity_refit(case)["necessity_refit"] == pytest.approx(nats(scaled(rest[1], *calibrate(rest[0].float()))), rel=1e-3)
    zeros = {s: 0 * m for s, m in means.items()}
    assert zero_ablation(case)["zero_ablation"] == pytest.approx(nats(scaled(plain(zeros, case.heldout), 1.3, 0.4)), rel=1e-4)


def test_recalibrating_fits_scale_and_shift_to_the_fit_pairs_alone(tmp_path):
    case = random_case(tmp_path)
    assert len(case.fit) == 24 and torch.equal(case.fit.answer, case.train.answer[:48])
    case.fit, case.heldout = toy_pairs(24), toy_pairs(30, "heldout")
    first_right = lambda pairs: torch.randn(2 * len(pairs), generator=torch.Generator().manual_seed(len(pairs))) + 0.5
    want = nats(scaled(first_right(case.heldout), *best_fit(first_right(case.fit))))
    assert case.refit(first_right) == pytest.approx(want, rel=1e-3)


def test_a_row_of_the_bank_is_one_position_of_the_data_at_every_site(tmp_path):
    model = random_model(**OPTIONS)
    np.random.default_rng(1).permutation(10)[:8].astype("<u2").tofile(tmp_path / "one.bin")  # a single window
    ids, record = torch.from_numpy(np.fromfile(tmp_path / "one.bin", "<u2").astype(np.int64))[None], {}
    model(ids, nodes=lambda s, x: record.setdefault(s, x))
    bank = bank_of(model, str(tmp_path / "one.bin"), 640, 0)
    assert set(bank) == {*model.sites, "final_resid"}
    everything = torch.cat([record[s.replace("attn.v", "attn.y")][0] for s in model.sites], 1)  # (T, all nodes)
    distance = torch.cdist(torch.cat([bank[s] for s in model.sites], 1), everything, compute_mode="donot_use_mm_for_euclid_dist")
    assert len(distance) == 640 and distance.min(1).values.max() < 1e-4
    assert distance.argmin(1).bincount(minlength=8).min() > 40  # all eight, 80 each but for chance


def test_a_bank_is_of_windows_as_long_as_asked(tmp_path, monkeypatch):
    model, lengths = random_model(**OPTIONS | dict(block_size=1024)), []
    np.random.default_rng(1).integers(0, 10, 2000).astype("<u2").tofile(tmp_path / "train.bin")
    monkeypatch.setattr(model, "embed", lambda ids: lengths.append(ids.shape) or type(model).embed(model, ids))
    bank = bank_of(model, str(tmp_path / "train.bin"), 64, 0, 20)
    assert lengths == [(4, 20)] and {len(rows) for rows in bank.values()} == {64}


def test_resampling_is_what_a_forward_pass_per_prompt_gives(tmp_path):
    case = random_case(tmp_path)
    bank = bank_of(case.model, case.data, 160, 0)
    pairs = toy_pairs(20, "heldout")
    got = resampled(case, bank, torch.Generator().manual_seed(5), pairs)
    draws = torch.randint(160, pairs.ids.shape, generator=torch.Generator().manual_seed(5))
    for row, (ids, last) in enumerate(zip(pairs.ids, pairs.last.tolist())):
        def fn(site, x):
            x = x.clone()
            for t in range(last + 1):
                of = {"attn.y": site[:-1] + "v", "attn.v": None}.get(site.split(".", 1)[-1], site)  # a value once it is gathered
                for i in range(x.shape[-1] if of in case.circuit.mask else 0):
                    if not case.circuit.mask[of][i]:
                        x[0, t, i] = bank[of][draws[row, t], i]
            return x
        logits = case.reduced(ids[None, : last + 1], nodes=fn)[0][0, -1]
        torch.testing.assert_close(got[row], logits[pairs.answer[row]] - logits[pairs.wrong[row]], rtol=1e-4, atol=1e-4)


def test_resampling_averages_draws_and_a_bank_of_means_is_mean_ablation(tmp_path, monkeypatch):
    case = random_case(tmp_path)
    flat = {s: c.expand(8, -1) for s, c in case.constants.items()}
    monkeypatch.setattr(measures, "bank_of", lambda *_: flat)
    assert resample(case)["resample"] == pytest.approx(sufficiency(case), rel=1e-4)
    each = iter(torch.tensor([1.0, 3.0, 5.0, 7.0, 0.5]))
    monkeypatch.setattr(measures, "resampled", lambda *_: torch.full((80,), next(each)))
    want = np.mean([nats(scaled(torch.full((80,), float(m)), 1.3, 0.4)) for m in (1, 3, 5, 7)])
    assert resample(case)["resample"] == pytest.approx(want, rel=1e-4)
    assert sum(1 for _ in each) == 0  # four draws, and one to calibrate


def test_resampling_draws_afresh_for_each_prompt_and_repeats_with_the_seed(tmp_path):
    case = random_case(tmp_path, share=0.5)
    bank = bank_of(case.model, case.data, 160, 0)
    twice = load_pairs(TOY, Digits(), 1, "train", 8).take(torch.tensor([0, 0]))
    got = resampled(case, bank, case.generator(), twice)
    assert not torch.allclose(got[:2], got[2:])
    assert resample(case) == resample(case) != resample(replace(case, seed=1))


def test_resampling_in_the_task_is_what_a_forward_pass_per_prompt_gives(tmp_path):
    case = random_case(tmp_path)
    pairs, lengths = toy_pairs(20, "heldout"), case.train.last + 1
    got, generator = resampled_in_task(case, torch.Generator().manual_seed(5), pairs), torch.Generator().manual_seed(5)
    for row, (ids, last) in enumerate(zip(pairs.ids, pairs.last.tolist())):
        donor, seen = donor_of(ids[: last + 1], case.train, generator), {}
        assert int(lengths[donor]) == last + 1  # there are prompts of every length
        case.model(case.train.ids[donor][None, : last + 1], nodes=lambda s, x: seen.setdefault(s, x))

        def fn(site, x):
            of = {"attn.y": site[:-1] + "v", "attn.v": None}.get(site.split(".", 1)[-1], site)
            return torch.where(case.circuit.mask[of], x, seen[site]) if of in case.circuit.mask else x
        logits = case.reduced(ids[None, : last + 1], nodes=fn)[0][0, -1]
        torch.testing.assert_close(got[row], logits[pairs.answer[row]] - logits[pairs.wrong[row]], rtol=1e-4, atol=1e-4)
    assert resample_task(case) == resample_task(case) != resample_task(replace(case, seed=1))


def test_a_donor_is_another_prompt_with_as_many_tokens_or_as_few_more_as_there_are():
    lengths, generator = torch.tensor([5, 7, 7, 9]), torch.Generator().manual_seed(0)
    donors = Pairs(torch.arange(4)[:, None].expand(4, 9).clone(), lengths - 1, lengths, lengths)

    def drawn(prompt):
        return {donor_of(torch.as_tensor(prompt), donors, generator) for _ in range(40)}

    assert drawn([8] * 7) == {1, 2} == drawn([8] * 6)
    assert drawn([8] * 8) == {3} == drawn([8] * 12)
    assert drawn([1] * 7) == {2} and drawn([2] * 7) == {1}  # never itself
    assert drawn([3] * 9) == {1, 2} and drawn([0] * 5) == {1, 2}


def test_halves_of_the_complement_keep_the_circuit_and_wake_about_half_of_the_rest(tmp_path):
    case = random_case(tmp_path, share=0.3)
    every, drawn = all_edges(case.model), list(halves(case))
    woken = {"mask": [0, 0], "edges": [0, 0]}
    for c in drawn:
        for kind, all_of in (("mask", all_nodes(case.model)), ("edges", every)):
            for key, kept in getattr(case.circuit, kind).items():
                now = getattr(c, kind)[key]
                assert not (kept & ~now).any()
                woken[kind][0] += int((now & all_of[key] & ~kept).sum())
                woken[kind][1] += int((all_of[key] & ~kept).sum())
    assert len(drawn) == measures.SUBSETS
    assert all(some / all == pytest.approx(0.5, abs=0.1) for some, all in woken.values())
    assert any(not torch.equal(a, b) for a, b in zip(drawn[0].mask.values(), drawn[1].mask.values()))


def test_the_complements_losses_are_the_mean_and_the_worst_of_plain_computations(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "SUBSETS", 3)
    case = random_case(tmp_path)
    losses = []
    for c in halves(case):
        fit, held = (plain_margins(case.model, c.mask, c.edges, case.constants, p) for p in (case.fit, case.heldout))
        losses.append(nats(scaled(held, *calibrate(fit))))
    got = complement(case)
    assert got["complement_random"] == pytest.approx(np.mean(losses), rel=1e-3)
    assert got["complement_worst"] == pytest.approx(max(losses), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"d_pos_emb": 3}, {"residual_activation_type": "relu", "tied_unembed": True}])
def test_frozen_norms_are_the_model_itself_where_nothing_is_ablated(options, tmp_path):
    case = whole(random_case(tmp_path, **options))
    torch.testing.assert_close(frozen(case, case.heldout), margins(case.model, case.heldout), rtol=1e-4, atol=1e-4)
    assert frozen_norms(case)["frozen_norms"] == pytest.approx(sufficiency(case), rel=1e-4)


def test_frozen_norms_are_what_rescaling_by_hand_gives(tmp_path):
    case = random_case(tmp_path, afrac=None)  # then the reads can be rescaled after the norm
    model, reduced, pairs, out = case.model, case.reduced, case.heldout, []
    rms = lambda h: (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt()
    for ids, last, answer, wrong in zip(pairs.ids, pairs.last.tolist(), pairs.answer, pairs.wrong):
        ids, free, own = ids[None, : last + 1], {}, {}
        free_end = model.run(model.embed(ids), nodes=lambda s, x: free.setdefault(s, x))

        def fn(site, x):
            own[site] = x
            if site.endswith("act_in"):
                read = site.replace("attn.act_in", "resid_in").replace("mlp.act_in", "resid_mid")
                x = x * rms(own[read]) / rms(free[read])
            return case.nodes(site, x)

        h = reduced.run(reduced.embed(ids), nodes=fn)[:, -1] / rms(free_end[:, -1]) * model.transformer.ln_f.weight
        logits = (h @ model.lm_head.weight.T)[0] + model.bigram_table[ids[0, -1]]
        out.append(logits[answer] - logits[wrong])
    torch.testing.assert_close(frozen(case, pairs), torch.stack(out), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(torch.stack(out), margins(reduced, pairs, case.nodes), rtol=1e-2)
    assert all(isinstance(b.ln_1, nn.RMSNorm) for m in (model, reduced) for b in m.transformer.h)


def test_frozen_norms_are_not_stated_for_layer_norm(tmp_path):
    assert set(frozen_norms(random_case(tmp_path, rms_norm=False)).values()) == {None}


# --- agreement and generalisation -----------------------------------------------------------------

def test_agreement_is_the_correlation_of_logit_differences(tmp_path):
    case = random_case(tmp_path)
    sign = np.tile([1.0, -1.0], 40)
    a = plain_margins(case.model, case.circuit.mask, case.circuit.edges, case.constants, case.heldout).numpy() * sign
    b = margins(case.model, case.heldout).numpy() * sign
    got = agreement(case)
    assert got["agreement"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-3)
    assert got["agreement_within"] == pytest.approx(np.mean([np.corrcoef(a[i::2], b[i::2])[0, 1] for i in (0, 1)]), abs=1e-3)
    none = {s: torch.zeros_like(m) for s, m in case.circuit.mask.items()}
    c, beyond = plain_margins(case.model, none, case.circuit.edges, case.constants, case.heldout).numpy() * sign, []
    for i in (0, 1):  # what is left of both once the circuit of no node is regressed out
        left = [x[i::2] - np.polyval(np.polyfit(c[i::2], x[i::2], 1), c[i::2]) for x in (a, b)]
        beyond.append(np.corrcoef(*left)[0, 1])
    assert got["agreement_beyond"] == pytest.approx(np.mean(beyond), abs=2e-3)
    same = agreement(whole(case))
    assert same["agreement"] == pytest.approx(1) and same["agreement_within"] == pytest.approx(1)
    case.model.transformer.wpe.weight.zero_()
    nothing = replace(case, circuit=replace(case.circuit, mask=all_nodes(case.model, False)))  # it knows the last token, which never varies
    assert agreement(nothing)["agreement_within"] == agreement(nothing)["agreement_beyond"] == pytest.approx(0, abs=1e-6)


tokenizer = load_tokenizer(DEFAULT)
words = lambda *texts: set(re.findall(r"\w+", " ".join(texts)))


@pytest.mark.parametrize("name", TASKS)
def test_longer_prompts_are_the_tasks_own_behind_whole_functions(name):
    task = TASKS[name]
    more, lengths = longer(task, tokenizer, 128), []
    for i in range(30):
        plain, now = task.prompts(random.Random(i)), more.prompts(random.Random(i))
        before = now[0].removesuffix(plain[0])
        assert now == (before + plain[0], before + plain[1]) and before.startswith("def ") and before.endswith("\n")
        compile(before, name, "exec")
        size = max(len(tokenizer.encode_ordinary(p)) for p in now)
        assert size <= 128 or before.count("def ") == 1
        lengths.append(size)
    assert np.median(lengths) > 90
    assert longer(task, tokenizer, 1).prompts(random.Random(0))[0].removesuffix(task.prompts(random.Random(0))[0]).count("def ") == 1
    pairs = load_pairs(more, tokenizer, 20, "heldout", 128)
    assert pairs.ids.shape[1] <= 128


@pytest.mark.parametrize("name", TASKS)
def test_other_names_are_the_same_prompts_with_names_that_the_task_never_has(name):
    task = TASKS[name]
    other, changed = renamed(task, 0), 0
    draws = [task.prompts(random.Random(i)) for i in range(300)]
    known, always = words(*(p for pair in draws for p in pair)), set.intersection(*(words(*pair) for pair in draws))
    for i, plain in enumerate(draws[:60]):
        now, to = other.prompts(random.Random(i)), {}
        for p, q in zip(plain, now):
            assert re.sub(r"\w+", "", p) == re.sub(r"\w+", "", q)
            for a, b in zip(re.findall(r"\w+", p), re.findall(r"\w+", q), strict=True):
                assert to.setdefault(a, b) == b  # throughout both prompts
        moved = {a: b for a, b in to.items() if a != b}
        assert len(set(to.values())) == len(to)
        assert moved.keys() <= {*VARIABLES, *NOUNS, *GROWN} - words(*task.answers) - always - {f for pair in FILES for f in pair}
        assert not set(moved.values()) & known - {*task.answers}
        assert {w for w in to if w in VARIABLES} - moved.keys() <= always | words(*task.answers)
        changed += bool(moved)
    assert changed > 30
    assert len(load_pairs(other, tokenizer, 20, "heldout", 128)) == 20


def test_generalisation_is_the_calibrated_loss_on_those_pairs_and_the_models_own(tmp_path):
    model = random_model(vocab_size=tokenizer.n_vocab, block_size=100, n_layer=1)
    cfg = PruneConfig(seed=3, fit_pairs=8)
    task, means = TASKS["for_while"], {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    circuit = Circuit({s: torch.rand(len(m)) < 0.5 for s, m in all_nodes(model).items()}, random_edges(model), 1.3, 0.4, 0.0)
    train, heldout = (load_pairs(task, tokenizer, n, split, 100, 3) for n, split in ((8, "train"), (12, "heldout")))
    got = generalisation(Case(model, task, tokenizer, circuit, means, cfg, train, heldout, "", 0))
    for kind, other in (("longer", longer(task, tokenizer, 100)), ("names", renamed(task, 3))):
        pairs = load_pairs(other, tokenizer, 12, "heldout", 100, 3)
        assert got[f"generalisation_{kind}_unpruned"] == pytest.approx(nats(margins(model, pairs)), rel=1e-4)
        plain = plain_margins(model, circuit.mask, circuit.edges, means, pairs)
        assert got[f"generalisation_{kind}"] == pytest.approx(nats(scaled(plain, 1.3, 0.4)), rel=1e-3)


def test_generalisation_is_not_stated_where_there_are_no_such_prompts(tmp_path, monkeypatch):
    got = generalisation(random_case(tmp_path))  # digits have no names
    assert got["generalisation_names"] is got["generalisation_names_unpruned"] is None
    monkeypatch.setattr(measures, "load_pairs", lambda *_: (_ for _ in ()).throw(ValueError("none that fits the context")))
    assert set(generalisation(random_case(tmp_path)).values()) == {None}


# --- idle parts -----------------------------------------------------------------------------------

def test_a_circuit_is_judged_on_as_many_pairs_as_its_certificate_names(tmp_path, monkeypatch):
    model, cfg, content = toy_circuit(tmp_path, minimal=True, steps=40)
    assert content["validation"]["minimal"]["pairs"] == cfg.fit_pairs == 24
    content["validation"]["minimal"]["pairs"] = 60  # as where several starts were joined
    monkeypatch.setattr(loading, "load_model", lambda *_: (model, Digits()))
    monkeypatch.setattr(loading, "check_tokenizer", lambda *_: None)
    monkeypatch.setattr(loading, "tokenizer_for", lambda *_: None)
    monkeypatch.setattr(loading, "tokenizer_hash", lambda *_: None)
    monkeypatch.setattr(loading, "task_in", lambda *_: TOY)
    case = loading.case_of(loading.CaseConfig(data=str(tmp_path)), content)
    assert len(case.fit) == 60 and case.limit == content["validation"]["minimal"]["target"]


def test_idle_parts_are_those_without_which_the_target_is_met_all_the_same(tmp_path, monkeypatch):
    model, cfg, c = toy_circuit(tmp_path, minimal=True, steps=40)
    circuit, means = circuit_of(c, model)
    case = Case(model, TOY, Digits(), circuit, means, cfg, toy_pairs(256), toy_pairs(100, "heldout"), "", 0, c["validation"]["minimal"]["target"])
    assert idle(case) == {"idle": 0, "idle_of": 5}  # of a minimal circuit none
    mask = {s: m.clone() for s, m in circuit.mask.items()}
    mask["0.attn.act_in"][1] = mask["0.attn.v"][0] = mask["0.attn.resid_delta"][1] = True  # the live path that means nothing
    wider = replace(case, circuit=replace(circuit, mask=mask, edges=all_edges(model)))
    wider.circuit.edges = between(model, mask)
    assert idle(wider)["idle"] == 5 and idle(wider)["idle_of"] == 10  # three nodes and two edges
    monkeypatch.setattr(measures, "TRIED", 6)  # of a large circuit a sample
    assert idle(wider)["idle_of"] == 6 and 1 <= idle(wider)["idle"] <= 5 and idle(wider) == idle(wider)
    # what is kept so that the model misses the circuit is not idle
    assert idle(replace(wider, missed=99.0))["idle"] == 0


# --- the verdict ----------------------------------------------------------------------------------

def run(met, edges, flat=True):
    return {"met": met, "flat": flat, "edges": edges, "nodes": 3, "loss": 0.1, "loss_heldout": 0.1, "loss_at_size": 0.69, "curve": []}


GOOD = {"sufficiency": 0.1, "necessity": 2.0, "necessity_refit": 0.6, "agreement_beyond": 0.6, "controls": {"exchanged_answers": [run(False, 5)], "random_signs": [run(True, 2)]}}


@pytest.mark.parametrize("change, word, shown", [
    ({}, None, None), ({"sufficiency": 0.159}, None, None), ({"sufficiency": 0.161}, "sufficient", False), ({"sufficiency": float("nan")}, "sufficient", False),
    ({"necessity": 0.01}, None, None), ({"necessity_refit": 0.34}, "needed", False), ({"agreement_within": 0.9, "agreement_beyond": 0.29}, "follows", False),
    ({"controls": {"exchanged_answers": [run(True, 29), run(False, 5)]}}, "beats_controls", False), ({"controls": {"exchanged_answers": [run(True, 30)]}}, None, None),
    ({"controls": {"exchanged_answers": [run(True, 40), run(False, 5, flat=False)]}}, "beats_controls", False),  # that one had not settled
    ({"controls": {"random_signs": [run(False, 5, flat=False)], "exchanged_answers": [run(True, 40, flat=False)]}}, None, None),
    ({"controls": {}}, "beats_controls", None), ({"controls": {"random_signs": [run(True, 900)]}}, "beats_controls", None)])
def test_each_word_of_the_verdict_follows_from_its_number_alone(change, word, shown):
    got = verdict({**GOOD, **change}, 0.15, 10)
    assert "trustworthy" not in got
    for key in ("sufficient", "needed", "beats_controls", "follows"):
        assert got[key]["shown"] is (shown if key == word else True), key
        assert got[key]["asked"].split()[-1].replace(".", "").isdigit()
    text = got["verdict"]
    assert ("Not shown:" in text) == (word is not None)
    if word is not None:
        name = {"beats_controls": "beats nonsense", "follows": "follows the model"}.get(word, word)
        assert text.index("Not shown:") < text.index(f"{name} (")
    json.dumps(got, allow_nan=False) if word != "sufficient" else None


def test_a_circuit_that_is_wrong_in_every_way_is_called_nothing():
    """What an earlier card called trustworthy: sufficiency 0.60, necessity 0.00, a control met at 27 edges against 26."""
    bad = {"sufficiency": 0.6, "necessity": 0.0, "necessity_refit": 0.0, "resample_task": 45.0, "agreement_beyond": 0.0, "controls": {"exchanged_answers": [run(True, 27)]}}
    got = verdict(bad, 0.15, 26)
    assert got["verdict"].startswith("Shown: nothing. Not shown: ") and "resample in the task" in got["verdict"]
    assert not any(got[key]["shown"] for key in ("sufficient", "needed", "beats_controls", "follows"))


def test_idle_parts_and_harder_lines_are_said_behind_the_words():
    text = verdict({**GOOD, "idle": 3, "idle_of": 9, "generalisation_names": 0.5, "frozen_norms": 0.1, "resample": 9.0}, 0.15, 10)["verdict"]
    assert "3 of 9 parts tried can go alone" in text and text.endswith("Its loss exceeds the target with other names.")


# --- the command ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The content of a toy circuit file, and the folder of its model and data."""
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    return toy_circuit(folder, minimal=True, steps=40)[2], folder


@pytest.fixture
def command(toy_run, tmp_path, monkeypatch):
    """Writes circuit files and runs validate.py on them: exit status, stdout, stderr."""
    c, folder = toy_run
    monkeypatch.setitem(TASKS, "toy", TOY)
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    monkeypatch.setattr("sys.argv", ["validate.py"])
    path = tmp_path / "run" / "toy" / "circuit.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(c))

    def run(*args, circuit=path):
        try:
            return validate.main([f"--circuit={circuit}", f"--data={folder}", *args])
        except SystemExit as e:
            return e.code

    run.path = path
    return run


def test_a_setting_that_an_older_file_lacks_has_its_default(command, measured):
    c = json.loads(command.path.read_text())
    del c["settings"]["fit_pairs"]
    c["settings"]["train_pairs"] = PruneConfig().fit_pairs
    command.path.write_text(json.dumps(c))
    assert command("--controls=false") == 0
    assert json.loads(command.path.read_text())["validation"]["card"]["refitted_on"] == PruneConfig().fit_pairs


@pytest.mark.parametrize("stored, asked, used", [(8, 0, 8), (0, 0, 8), (5, 0, 5), (5, 3, 3)])
def test_resampling_takes_the_window_that_is_asked_or_that_pruning_had(command, toy_run, monkeypatch, stored, asked, used):
    seen = []
    monkeypatch.setattr(validate, "MEASURES", (lambda case: seen.append(case.settings.window) or {},))
    monkeypatch.setattr(validate, "verdict", lambda *_: {})
    monkeypatch.setattr(validate, "card_text", lambda content: "")
    assert toy_run[0]["settings"]["window"] == 8  # the whole block
    c = json.loads(command.path.read_text())
    c["settings"]["window"] = stored
    if not stored:  # as circuits were before there were windows
        del c["settings"]["window"]
    command.path.write_text(json.dumps(c))
    assert command("--controls=false", f"--window={asked}") == 0 and seen == [used]


def test_the_card_is_written_into_the_file_and_what_was_there_stays(command, toy_run, capsys):
    assert command("--control_seeds=1") == 0
    now, out = json.loads(command.path.read_text()), capsys.readouterr().out
    old, card = toy_run[0], now["validation"]
    assert {k: v for k, v in now.items() if k != "validation"} == {k: v for k, v in old.items() if k != "validation"}
    assert card["minimal"] == old["validation"]["minimal"] and card["sufficiency"] == pytest.approx(old["validation"]["sufficiency"], abs=1e-4)
    for key in ("zero_ablation", "resample", "resample_task", "complement_random", "complement_worst", "frozen_norms", "agreement", "generalisation_longer"):
        assert key in card
    assert card["idle"] == 0 and card["needed"]["shown"] is True and card["sufficient"]["shown"] is True
    runs = card["controls"]
    assert not runs["permuted_answers"][0]["met"] and set(runs["random_signs"][0]) >= {"loss", "nodes", "edges", "met", "curve", "loss_at_size"}
    assert runs["foreign_answers"] == []  # no other task's answers are digits
    for text in ("sufficiency", "resample in the task", "permuted answers", "random signs", "n/a", card["verdict"], f"{card['frozen_norms']:.3f}"):
        assert text in out
    card_lines = out[out.rindex("toy: 3 nodes"):].splitlines()
    assert card_lines[1].strip() == "memorising: 0 of 1 runs met the target"
    # what it cost is kept, whatever is asked for next
    before = command.path.read_bytes()
    for options in ((), ("--controls=false",), ("--level=memorise",)):
        assert command("--control_seeds=1", *options) == 0 and command.path.read_bytes() == before


@pytest.fixture
def measured(monkeypatch):
    """What validate.py measures from now on, in place of measuring it: `lines`, and (control, seed)."""
    done = []

    def lines(case, stated, say):
        done.append("lines")
        return {line.key: 0.5 for line in validate.LINES} | {"agreement_beyond": 0.5, "idle_of": 1, "necessity_refit": 0.5}

    def one(subject, key, seed, n_edges, say):
        done.append((key, seed))
        return None if key == "foreign_answers" else run(key == "exchanged_answers", 40 + seed)

    monkeypatch.setattr(validate, "lines_of", lines)
    monkeypatch.setattr(validate, "run_control", one)

    def since():
        found = list(done)
        done.clear()
        return found
    return since


def test_a_complete_card_is_not_measured_again_unless_asked_or_set_otherwise(command, measured, capsys):
    command("--controls=false")
    before, first = command.path.read_bytes(), capsys.readouterr().out
    assert measured() == ["lines"]
    assert command("--controls=false") == 0 and command.path.read_bytes() == before and measured() == []
    assert capsys.readouterr().out in first
    assert command("--controls=false", "--again") == 0 and measured() == ["lines"]
    assert command("--controls=false", "--seed=1") == 0 and measured() == ["lines"]
    command("--seed=1", "--window=3", "--controls=false")
    assert measured() == ["lines"]


def test_a_card_hangs_on_what_the_data_are_and_not_on_how_their_path_is_spelt(command, toy_run, measured, capsys):
    command("--level=wiring", "--control_seeds=1")
    measured()
    before = command.path.read_bytes()
    folder = toy_run[1]
    for spelt in (f"{folder}/", f"{folder}/../{folder.name}"):
        assert command(f"--data={spelt}", "--controls=false") == 0 and command("--controls=false", "--window=8") == 0
    assert measured() == [] and command.path.read_bytes() == before


def test_a_complete_card_of_another_model_or_with_a_verdict_of_its_own_is_not_believed(command, measured, capsys):
    command("--controls=false")
    whole = json.loads(command.path.read_text())
    capsys.readouterr()
    whole["validation"]["verdict"] = "Shown: everything."
    command.path.write_text(json.dumps(whole))
    assert command("--controls=false") == 0 and "Shown: everything" not in capsys.readouterr().out
    whole["model"]["sha256"] = "0" * 64
    command.path.write_text(json.dumps(whole))
    assert command("--controls=false") == 2 and "not those that it was found in" in capsys.readouterr().err


def test_a_circuit_that_was_pruned_anew_meanwhile_stays_as_it_is(command, measured, monkeypatch, capsys):
    one = validate.run_control

    def pruned_meanwhile(*args):
        other = json.loads(command.path.read_text())
        other["logit_scale"] *= 2
        command.path.write_text(json.dumps(other))
        return one(*args)

    monkeypatch.setattr(validate, "run_control", pruned_meanwhile)
    assert command("--level=wiring", "--control_seeds=1") == 2
    assert "pruned anew meanwhile" in capsys.readouterr().err
    now = json.loads(command.path.read_text())
    assert "controls" not in now["validation"] and measured() == ["lines", ("random_signs", 0)]


def test_two_commands_do_not_write_one_card(command, measured, capsys):
    with sole_user(str(command.path.parent)):
        assert command("--controls=false") == 2
    assert "another process validates it" in capsys.readouterr().err and measured() == []


def test_idle_parts_are_not_stated_where_channels_of_the_last_stream_were_pruned(tmp_path):
    case = random_case(tmp_path)
    mask = {**case.circuit.mask, FINAL: torch.ones(case.model.config.d_model, dtype=torch.bool)}
    assert idle(replace(case, circuit=replace(case.circuit, mask=mask), constants={**case.constants, FINAL: torch.zeros(case.model.config.d_model)})) == {
        "idle": None, "idle_of": None}


def test_only_the_controls_that_a_card_lacks_are_run_and_none_is_lost(command, measured, capsys):
    nonsense = ["exchanged_answers", "foreign_answers", "irrelevant_feature"]
    command("--level=wiring", "--control_seeds=1")
    assert measured() == ["lines", *((key, 0) for key in ("random_signs", "permuted_rows", "before_training"))]
    assert "its controls not run" in capsys.readouterr().out  # those that the verdict looks at
    command("--level=nonsense", "--control_seeds=1")
    assert measured() == [(key, 0) for key in nonsense]
    command("--level=nonsense", "--control_seeds=3")  # of what there is not, one try was enough
    assert measured() == [(key, seed) for key in nonsense if key != "foreign_answers" for seed in (1, 2)]
    command("--controls=false", "--seed=1")  # other draws for the lines: controls have seeds of their own
    assert measured() == ["lines"]
    command("--level=wiring", "--control_seeds=1", "--again", "--seed=1")
    assert measured()[0] == "lines" and measured() == []
    card = json.loads(command.path.read_text())["validation"]
    assert {key: len(runs) for key, runs in card["controls"].items()} == {
        "exchanged_answers": 3, "foreign_answers": 0, "irrelevant_feature": 3, "random_signs": 1, "permuted_rows": 1, "before_training": 1}
    assert card["beats_controls"]["shown"] is True and card["beats_controls"]["value"] == 20.0
    command("--window=3", "--controls=false", "--seed=1")  # other means: those were of another circuit's world
    assert "controls" not in json.loads(command.path.read_text())["validation"]


def test_a_run_of_controls_that_is_stopped_goes_on_where_it_was(command, measured, monkeypatch):
    one = validate.run_control

    def stopped(subject, key, seed, *rest):
        if (key, seed) == ("exchanged_answers", 1):
            raise KeyboardInterrupt
        return one(subject, key, seed, *rest)

    monkeypatch.setattr(validate, "run_control", stopped)
    with pytest.raises(KeyboardInterrupt):
        command("--level=nonsense", "--control_seeds=2")
    assert measured() == ["lines", ("exchanged_answers", 0)]
    monkeypatch.setattr(validate, "run_control", one)
    command("--level=nonsense", "--control_seeds=2")
    assert measured()[0] == ("exchanged_answers", 1)


def edited(**change):
    def edit(c):
        return json.dumps({**c, **{k: v(c[k]) for k, v in change.items()}})
    return edit


BAD = [
    (edited(task=lambda t: "single_doubel_quote"), "the nearest is 'single_double_quote'"),
    (edited(nodes=lambda n: {("0.attn.vv" if s == "0.attn.v" else s): x for s, x in n.items()},
            edges=lambda e: json.loads(json.dumps(e).replace('"0.attn.v"', '"0.attn.vv"'))), "the nearest is '0.attn.v'"),
    (edited(model=lambda m: {**m, "sha256": "0" * 64}), "not those that it was found in"),
    (edited(model=lambda m: {**m, "dir": "/nowhere/at/all"}), "--model=DIR"),
    (edited(model=lambda m: {}), "--model=DIR"),
    (lambda c: json.dumps(c)[:-700], "truncated"),
    (lambda c: json.dumps(c)[: len(json.dumps(c)) // 2], "truncated"),
    (lambda c: "", "truncated"),
    (edited(n_edges=lambda n: n + 1), "edited"),
    (edited(logit_scale=lambda x: -x), "edited"),
    (edited(means=lambda m: {**m, "0.attn.resid_delta": [x + 3 for x in m["0.attn.resid_delta"]]}), "edited"),
    (edited(validation=lambda v: {**v, "necessity": v["necessity"] / 2}), "edited"),
    (edited(settings=lambda s: {**s, "stepps": 3}), "stepps"),
    (edited(settings=lambda s: {**s, "steps": "300"}), "steps"),
    (edited(settings=lambda s: {**s, "fit_pairs": 0}), "fit_pairs"),
    (edited(validation=lambda v: {**v, "controls": {"random_signs": [{}]}}), "random_signs.met"),
    (edited(validation=lambda v: {**v, "card": "x"}), "validation.card"),
    (edited(validation=lambda v: {**v, "minimal": {**v["minimal"], "pairs": "x"}}), "minimal.pairs"),
    (edited(edges=lambda e: [[*e[0][:4], e[0][4] + 1], *e[1:]]), "has no weight"),
]


@pytest.mark.parametrize("make, says", BAD)
def test_a_spoilt_file_is_one_line_exit_2_and_unchanged(make, says, command, toy_run, capsys):
    command.path.write_text(make(toy_run[0]))
    before = command.path.read_bytes()
    assert command() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("validate.py: ") and says in err and str(command.path) in err
    assert command.path.read_bytes() == before and [p.name for p in command.path.parent.iterdir()] == ["circuit.json"]


@pytest.mark.parametrize("args, says", [
    (["--circuit=/nowhere/circuit.json"], "/nowhere/circuit.json"), (["--data=/nowhere"], "/nowhere/train.bin"), (["--model=/nowhere"], "/nowhere"),
    (["--jobs=0"], "jobs"), (["--device=gpu"], "device"), (["--sede=1"], "'seed'"), (["--controls=maybe"], "controls")])
def test_bad_options_are_one_line_exit_2_and_nothing_written(args, says, command, capsys):
    before = command.path.read_bytes()
    assert command(*args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and command.path.read_bytes() == before


def test_a_circuit_whose_means_are_of_other_data_is_refused(command, toy_run, tmp_path, capsys):
    content, folder = toy_run
    ids = np.fromfile(folder / "train.bin", "<u2")
    command.path.write_text(json.dumps({**content, "data": fingerprint(ids)}))
    assert command("--controls=false") == 0
    before = command.path.read_bytes()
    ids[:2048] = ids[:2048][::-1]
    ids.tofile(tmp_path / "train.bin")
    capsys.readouterr()
    assert command(f"--data={tmp_path}", "--controls=false", "--again=true") == 2
    err = capsys.readouterr().err
    assert "means are of other data" in err and str(tmp_path) in err and err.count("\n") == 1
    assert command.path.read_bytes() == before


def test_a_circuit_of_another_model_is_refused_even_where_the_weights_that_it_names_agree(command, toy_run, tmp_path, capsys):
    model = hand_made()
    model.transformer.wte.weight[8, 5] = 0.1
    model.save(str(tmp_path / "other"))
    before = command.path.read_bytes()
    assert command(f"--model={tmp_path / 'other'}") == 2
    assert "not those that it was found in" in capsys.readouterr().err and command.path.read_bytes() == before
    hand_made().save(str(tmp_path / "moved"))
    same = hashlib.sha256((tmp_path / "moved" / "final_model.pt").read_bytes()).hexdigest() == toy_run[0]["model"]["sha256"]
    assert command(f"--model={tmp_path / 'moved'}", "--controls=false") == (0 if same else 2)


def test_a_card_that_an_edited_circuit_kept_does_not_count(command):
    command("--controls=false")
    c = json.loads(command.path.read_text())
    command.path.write_text(json.dumps({**c, "logit_scale": -c["logit_scale"]}))
    before = command.path.read_bytes()
    assert command("--controls=false") == 2 and command.path.read_bytes() == before


def test_a_directory_is_all_its_circuits_the_bad_one_named_and_the_rest_written(command, toy_run, capsys):
    bad = command.path.parent.parent / "worse" / "circuit.json"
    bad.parent.mkdir()
    bad.write_text("{")
    assert command("--controls=false", circuit=command.path.parent.parent) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and str(bad) in err and bad.read_text() == "{"
    card = json.loads(command.path.read_text())["validation"]
    (row,) = [line for line in out.splitlines() if line.startswith("| toy |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["toy", "3, 2", f"{card['sufficiency']:.3f}"] and cells[-7:] == ["–", "–", "–", "yes", "yes", "–", "yes"]
    head = next(line for line in out.splitlines() if line.startswith("| task"))
    assert head.count("|") == row.count("|") == out.splitlines()[out.splitlines().index(head) + 1].count("|")
    bad.unlink()
    assert command("--controls=false", circuit=command.path.parent.parent) == 0
    assert command(circuit=bad.parent) == 2
    assert "circuit.json" in capsys.readouterr().err
