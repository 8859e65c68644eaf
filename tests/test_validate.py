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

import validate
from circuit import Circuit, all_edges, circuit_of
from data.tinypython.filler import FILES, GROWN, NOUNS, VARIABLES
from data.tinypython.tokenizer import DEFAULT, load_tokenizer
from prune import PruneConfig, node_means
from tasks import TASKS, calibrate, load_pairs, margins
from toy import (TOY, Digits, all_nodes, best_fit, hand_made, nats, one_thread, plain_margins, random_edges, random_model,  # noqa: F401
                 scaled, toy_circuit, toy_pairs, toy_setup)
from validate import (Case, agreement, bank_of, case_of, complement, control, frozen, frozen_norms, generalisation, halves, longer,
                      necessity, nonsense, nonsense_control, random_weights, renamed, resample, resampled, shuffled, sufficiency, verdict,
                      zero_ablation)

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


# --- other ablations ------------------------------------------------------------------------------

def test_sufficiency_necessity_and_zero_ablation_are_what_plain_sums_give(tmp_path):
    case = random_case(tmp_path)
    mask, edges, means = case.circuit.mask, case.circuit.edges, case.constants
    plain = lambda means, pairs: plain_margins(case.model, mask, edges, means, pairs)
    assert sufficiency(case) == pytest.approx(nats(scaled(plain(means, case.heldout), 1.3, 0.4)), rel=1e-4)
    inverse = plain_margins(case.model, {s: ~m for s, m in mask.items()}, all_edges(case.model), means, case.heldout)
    assert necessity(case) == pytest.approx(nats(inverse), rel=1e-4)
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
    monkeypatch.setattr(validate, "bank_of", lambda *_: flat)
    assert resample(case)["resample"] == pytest.approx(sufficiency(case), rel=1e-4)
    each = iter(torch.tensor([1.0, 3.0, 5.0, 7.0, 0.5]))
    monkeypatch.setattr(validate, "resampled", lambda *_: torch.full((80,), next(each)))
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
    assert len(drawn) == validate.SUBSETS
    assert all(some / all == pytest.approx(0.5, abs=0.1) for some, all in woken.values())
    assert any(not torch.equal(a, b) for a, b in zip(drawn[0].mask.values(), drawn[1].mask.values()))


def test_the_complements_losses_are_the_mean_and_the_worst_of_plain_computations(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "SUBSETS", 3)
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


# --- controls -------------------------------------------------------------------------------------

def test_nonsense_swaps_the_prompts_of_half_the_pairs_and_no_answer():
    pairs = toy_pairs(200)
    got, swapped = nonsense(pairs), []
    assert torch.equal(got.answer, pairs.answer) and torch.equal(got.wrong, pairs.wrong)
    assert set(got.answer[::2].tolist()) == {2} and set(got.answer[1::2].tolist()) == {3}
    for i in range(0, 400, 2):
        there = [(tuple(p.ids[j].tolist()), int(p.last[j])) for p in (pairs, got) for j in (i, i + 1)]
        assert sorted(there[:2]) == sorted(there[2:])  # each prompt once
        swapped.append(there[:2] != there[2:])
    assert 70 < sum(swapped) < 130


def test_nonsense_is_the_same_rule_for_a_pair_in_any_company():
    pairs = toy_pairs(100)
    few = (pairs.last[::2] == pairs.last.min()).nonzero().flatten()  # less padded by themselves
    apart, together = nonsense(pairs.take(few)), nonsense(pairs).take(few)
    assert apart.ids.shape[1] < pairs.ids.shape[1] and torch.equal(apart.ids, together.ids)


def toy_case(tmp_path, **options) -> Case:
    model, cfg, c = toy_circuit(tmp_path, minimal=True, steps=40, **options)
    circuit, means = circuit_of(c, model)
    return Case(model, TOY, Digits(), circuit, means, cfg, toy_pairs(256), toy_pairs(100, "heldout"), str(tmp_path / "train.bin"), 0)


def test_the_control_finds_what_pruning_found_and_cannot_meet_nonsense(tmp_path):
    case = toy_case(tmp_path)
    same = control(case, case.model, case.train, case.heldout, case.constants, quiet)
    assert same["met"] and (same["nodes"], same["edges"]) == case.circuit.size == (3, 2)
    assert same["loss"] == pytest.approx(case.circuit.loss, abs=1e-3) and same["loss_heldout"] == pytest.approx(sufficiency(case), abs=1e-3)
    lost = nonsense_control(case, quiet)
    assert not lost["met"] and lost["loss"] > 0.6 and lost["loss_heldout"] > 0.6


def test_a_controls_heldout_loss_is_that_of_its_own_model_circuit_and_means(tmp_path, monkeypatch):
    case, asked = random_case(tmp_path), []
    other, means = random_model(**OPTIONS), {s: torch.randn_like(c) for s, c in case.constants.items()}
    found = Circuit({s: torch.rand(len(m)) < 0.6 for s, m in case.circuit.mask.items()}, random_edges(other), 0.7, -0.3, 0.39)
    monkeypatch.setattr(validate, "find", lambda *args: asked.extend(args) or iter([found]))
    got = control(case, other, case.train, case.heldout, means, quiet)
    assert [a is b for a, b in zip(asked, (other, case.train, means, case.settings))] == [True] * 4
    want = nats(scaled(plain_margins(other, found.mask, found.edges, means, case.heldout), 0.7, -0.3))
    assert got["loss_heldout"] == pytest.approx(want, rel=1e-3) and (got["nodes"], got["edges"]) == found.size
    assert got["loss"] == 0.39 and got["met"]
    found.loss = 0.41
    assert not control(case, other, case.train, case.heldout, means, quiet)["met"]


def test_nonsense_controls_prune_the_permuted_training_pairs_and_are_scored_on_permuted_heldout_pairs(tmp_path, monkeypatch):
    case, seen = toy_case(tmp_path), {}
    monkeypatch.setattr(validate, "control", lambda *args: seen.update(zip(("case", "model", "train", "heldout"), args)))
    nonsense_control(case, quiet)
    assert seen["model"] is case.model
    for kind in ("train", "heldout"):
        assert torch.equal(seen[kind].ids, nonsense(getattr(case, kind)).ids) and not torch.equal(seen[kind].ids, getattr(case, kind).ids)


def test_shuffled_weights_are_the_same_values_elsewhere_and_norms_and_bigram_table_stay():
    for options in ({}, {"tied_unembed": True}, {"learnable_bigram_table": True, "bias": True, "d_pos_emb": 3}):
        model = random_model(**{**OPTIONS, **options})
        model.bigram_table.data.copy_(torch.randn(10, 10))
        before = copy.deepcopy(model.state_dict())
        now = shuffled(model, torch.Generator().manual_seed(0)).state_dict()
        for name, old in before.items():
            assert torch.equal(model.state_dict()[name], old)
            assert torch.equal(now[name].flatten().sort().values, old.flatten().sort().values)
            if "ln_" in name or name in ("final_logits_bias", "bigram_table"):
                assert torch.equal(now[name], old)
            elif old.numel() > 7:  # fewer can stay in place by chance
                assert not torch.equal(now[name], old), name
        if options.get("tied_unembed"):
            assert torch.equal(now["lm_head.weight"], now["transformer.wte.weight"])


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_random_weight_control_prunes_the_shuffled_model_with_its_own_means(ablation, tmp_path, monkeypatch):
    case, seen = random_case(tmp_path), {}
    case.settings.ablation = ablation
    monkeypatch.setattr(validate, "control", lambda _, model, train, heldout, constants, say: seen.update(locals()) or {})
    random_weights(case, quiet)
    assert seen["train"] is case.train and seen["heldout"] is case.heldout
    assert not torch.equal(seen["model"].lm_head.weight, case.model.lm_head.weight)
    own = node_means(seen["model"], case.data, case.settings.mean_tokens, 0)
    for site, c in seen["constants"].items():
        torch.testing.assert_close(c, own[site] * (ablation == "mean"))


# --- agreement and generalisation -----------------------------------------------------------------

def test_agreement_is_the_correlation_of_logit_differences(tmp_path):
    case = random_case(tmp_path)
    sign = np.tile([1.0, -1.0], 40)
    a = plain_margins(case.model, case.circuit.mask, case.circuit.edges, case.constants, case.heldout).numpy() * sign
    b = margins(case.model, case.heldout).numpy() * sign
    got = agreement(case)
    assert got["agreement"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-3)
    assert got["agreement_within"] == pytest.approx(np.mean([np.corrcoef(a[i::2], b[i::2])[0, 1] for i in (0, 1)]), abs=1e-3)
    same = agreement(whole(case))
    assert same["agreement"] == pytest.approx(1) and same["agreement_within"] == pytest.approx(1)
    case.model.transformer.wpe.weight.zero_()
    nothing = replace(case, circuit=replace(case.circuit, mask=all_nodes(case.model, False)))  # it knows the last token, which never varies
    assert agreement(nothing)["agreement_within"] == pytest.approx(0, abs=1e-6)


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


def test_generalisation_is_not_stated_where_there_are_no_such_prompts(tmp_path):
    assert set(generalisation(random_case(tmp_path)).values()) == {None}  # digits have no names, and are no functions


# --- the verdict ----------------------------------------------------------------------------------

def test_the_verdict_follows_from_the_controls_and_says_what_else_is_wrong():
    good = {"sufficiency": 0.1, "necessity": 2.0}
    run = lambda met, edges: {"met": met, "edges": edges}
    state = lambda **change: tuple(verdict({**good, "nonsense": run(False, 5), "random_weights": run(False, 5), **change}, 0.15, 10).values())
    trust, text = state()
    assert trust is True and text.count(".") == 1
    for key, word in (("nonsense", "permuted answers"), ("random_weights", "shuffled weights")):
        trust, text = state(**{key: run(True, 10)})
        assert trust is False and text.startswith("Not trustworthy") and word in text and "10 edges" in text
        assert state(**{key: run(True, 11)})[0] is True
    assert "misses its target" in state(sufficiency=0.16)[1] and "misses" not in state(sufficiency=0.15)[1]
    assert "misses its target" in state(sufficiency=float("nan"))[1]
    assert "hardly needs" in state(necessity=0.29)[1] and state(necessity=0.29)[0] is True
    assert "exceeds" not in state(resample=0.15, zero_ablation=None)[1]
    trust, text = state(resample=0.16, generalisation_names=0.5, frozen_norms=0.1)
    assert trust is True and "exceeds the target with resample, other names." in text
    assert verdict(good, 0.15, 10)["trustworthy"] is None and "not run" in verdict(good, 0.15, 10)["verdict"]


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
    assert command() == 0
    now, out = json.loads(command.path.read_text()), capsys.readouterr().out
    old, card = toy_run[0], now["validation"]
    assert {k: v for k, v in now.items() if k != "validation"} == {k: v for k, v in old.items() if k != "validation"}
    assert card["minimal"] == old["validation"]["minimal"] and card["sufficiency"] == pytest.approx(old["validation"]["sufficiency"], abs=1e-4)
    for key in ("zero_ablation", "resample", "complement_random", "complement_worst", "frozen_norms", "agreement", "generalisation_longer"):
        assert key in card
    assert card["trustworthy"] is True and not card["nonsense"]["met"] and set(card["random_weights"]) >= {"loss", "nodes", "edges", "met"}
    for text in ("sufficiency", "resample", "permuted answers", "shuffled weights", "n/a", card["verdict"], f"{card['frozen_norms']:.3f}"):
        assert text in out


def test_a_complete_card_is_not_measured_again_unless_asked_or_set_otherwise(command, monkeypatch, capsys):
    calls = counter()

    def measure(case, stated, controls, say):
        next(calls)
        card = {line.key: 0.5 for line in validate.LINES} | {"verdict": "Measured.", "trustworthy": True if controls else None}
        return card | {k: {"loss": 0.7, "loss_heldout": 0.7, "nodes": 1, "edges": 1, "met": False} for k in validate.CONTROLS if controls}

    monkeypatch.setattr(validate, "card_of", measure)
    command("--controls=false")
    before, first = command.path.read_bytes(), capsys.readouterr().out
    assert command("--controls=false") == 0 and command.path.read_bytes() == before and next(calls) == 1
    assert capsys.readouterr().out in first
    assert command("--controls=false", "--again") == 0 and next(calls) == 3
    assert command("--controls=false", "--seed=1") == 0 and next(calls) == 5
    assert command("--seed=1") == 0 and next(calls) == 7  # now with its controls
    before = command.path.read_bytes()
    assert command("--seed=1", "--controls=false") == 0 and next(calls) == 8 and command.path.read_bytes() == before
    assert command("--seed=2", "--controls=false") == 0
    card = json.loads(command.path.read_text())["validation"]
    assert card["trustworthy"] is None and "nonsense" not in card and "random_weights" not in card  # those were of another seed


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
    assert cells[:3] == ["toy", "3, 2", f"{card['sufficiency']:.3f}"] and cells[-3:] == ["–", "–", "–"]
    head = next(line for line in out.splitlines() if line.startswith("| task"))
    assert head.count("|") == row.count("|") == out.splitlines()[out.splitlines().index(head) + 1].count("|")
    bad.unlink()
    assert command("--controls=false", circuit=command.path.parent.parent) == 0
    assert command(circuit=bad.parent) == 2
    assert "circuit.json" in capsys.readouterr().err
