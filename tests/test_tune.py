"""tools/tune.py: trials that go on where they stopped, never mix with others, and end in a config that prune.py takes."""
import json
import math
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import prune
from config import parse
from model import GPT
from prune import PruneConfig
from tools import tune
from toy import TOY, Digits, one_thread, random_model, toy_setup  # noqa: F401

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
SMALL = ["--task=toy", "--target_loss=0.4", "--mean_tokens=2048", "--train_pairs=64", "--fit_pairs=24", "--heldout_pairs=50", "--steps=12",
         "--batch_pairs=8", "--lr=0.03", "--k_coef=0.01", "--starts=1", "--apart_pairs=0"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Runs tune.py on the toy task; `toy.seen` are the settings of the trials."""
    monkeypatch.setattr("tasks.TASKS", {"toy": TOY})
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    toy_setup(tmp_path)
    find, seen = tune.find, []

    def watch(model, pairs, apart, constants, cfg, say):
        seen.append(cfg)
        yield from find(model, pairs, apart, constants, cfg, say)

    monkeypatch.setattr(tune, "find", watch)
    return SimpleNamespace(folder=tmp_path / "toy", seen=seen,
                           run=lambda *args: tune.main([f"--model={tmp_path}", f"--data={tmp_path}", *SMALL, *args]))


def score_by_lr(monkeypatch, toy, stop_at=None, edges=lambda cfg: 1 + abs(round(100 * math.log(cfg.lr / 0.01))), loss=0.3):
    """In place of pruning: a circuit with the fewer edges the nearer lr is to 0.01."""
    def fake(model, pairs, apart, constants, cfg, say):
        if len(toy.seen) == stop_at:
            raise KeyboardInterrupt
        toy.seen.append(cfg)
        yield from (SimpleNamespace(size=(3, edges(cfg)), loss=loss) for _ in cfg.target_loss)

    monkeypatch.setattr(tune, "find", fake)


def refused(toy, capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        toy.run(*args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and not (toy.folder / "tuned.toml").exists()
    return err


def test_without_optuna_one_line_says_what_to_install(toy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install -r requirements-extra.txt" in refused(toy, capsys) and not toy.folder.exists()


def test_the_ranges_lie_around_what_is_given_and_the_papers_centres():
    given = PruneConfig(lr=0.5, k_coef=0.0, weight_decay=1e-6)
    for k, (low, high) in tune.ranges(given).items():
        assert 0 < low < high
        for value in (tune.searched(given)[k], tune.searched(PruneConfig(**tune.PAPER))[k], tune.searched(PruneConfig())[k]):
            assert low <= value <= high or value == 0, k
    assert tune.ranges(PruneConfig(beta2=0.1, warmup=0.9, init_noise_bias=0.8)).items() >= {"warmup": (0.005, 1.0), "init_noise_bias": (0.01, 1.0)}.items()
    assert tune.settings(tune.searched(PruneConfig())) == {k: getattr(PruneConfig(), k) for k in tune.PAPER}


class TestWithOptuna:
    @pytest.fixture(autouse=True)
    def needs_optuna(self):
        pytest.importorskip("optuna")

    def test_tuning_ends_in_a_config_with_which_prune_finds_the_circuit_that_was_tuned(self, toy, capsys):
        toy.run("--trials=3", "--minimal")
        out = capsys.readouterr().out
        lines = out.splitlines()
        trials = [re.fullmatch(r"trial (\d)/3  (\d+) nodes  (\d+) edges  loss ([\d.]+)  best so far (\d+) edges  \d+ s left", line) for line in lines if line.startswith("trial")]
        assert [m[1] for m in trials] == ["1", "2", "3"]
        edges = [int(m[3]) for m in trials]
        assert [int(m[5]) for m in trials] == [min(edges[: i + 1]) for i in range(3)]
        path = toy.folder / "tuned.toml"
        assert lines[-1] == f"python prune.py --config={path}" and not any(cfg.minimal for cfg in toy.seen)
        cfg = parse(PruneConfig, [f"--config={path}"])
        best = toy.seen[edges.index(min(edges))]
        # trials have one start, for time; the config has as many as prune.py takes of itself
        assert cfg == replace(best, minimal=True, starts=3) and list(tomllib.loads(path.read_text())) == list(asdict(cfg))
        shown = tomllib.loads("\n".join(line for line in lines if " = " in line))
        assert shown == {k: getattr(best, k) for k in tune.PAPER}
        assert prune.main([f"--config={path}", "--minimal=false", "--starts=1"]) == 0
        assert json.loads((toy.folder / "circuit.json").read_text())["n_edges"] == min(edges)

    def test_the_first_trial_is_what_was_given_and_the_second_the_papers(self, toy, monkeypatch):
        score_by_lr(monkeypatch, toy)
        toy.run("--trials=6", "--weight_decay=0")
        given = parse(PruneConfig, [f"--model={toy.folder.parent}", f"--data={toy.folder.parent}", *SMALL])
        assert toy.seen[0] == replace(given, weight_decay=1e-4)  # zero has no place on a log scale: the least there is
        assert toy.seen[1] == replace(given, **tune.PAPER)
        spans = tune.ranges(given)
        for cfg in toy.seen[2:]:
            assert replace(cfg, **tune.PAPER) == replace(given, **tune.PAPER)  # all else as given
            assert all(spans[k][0] <= v <= spans[k][1] * (1 + 1e-6) for k, v in tune.searched(cfg).items())
        assert len({cfg.lr for cfg in toy.seen}) == 6

    def test_many_trials_find_a_better_place_than_both_starts(self, toy, monkeypatch, capsys):
        score_by_lr(monkeypatch, toy)
        toy.run("--trials=30")
        scores = [abs(math.log(cfg.lr / 0.01)) for cfg in toy.seen]
        assert min(scores) < 0.5 * min(scores[:2])
        assert parse(PruneConfig, [f"--config={toy.folder}/tuned.toml"]) == replace(toy.seen[scores.index(min(scores))], starts=3)

    def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(self, toy, monkeypatch, capsys):
        score_by_lr(monkeypatch, toy)
        toy.run("--trials=14")
        whole, tuned = list(toy.seen), (toy.folder / "tuned.toml").read_text()
        (toy.folder / "tune.journal").unlink(), (toy.folder / "tuned.toml").unlink(), toy.seen.clear()
        for stop_at in (0, 1, 5, 12):
            score_by_lr(monkeypatch, toy, stop_at)
            with pytest.raises(KeyboardInterrupt):  # what as_script answers
                toy.run("--trials=14")
            assert len(toy.seen) == stop_at and not (toy.folder / "tuned.toml").exists()
        score_by_lr(monkeypatch, toy)
        toy.run("--trials=14")
        assert "has 12 trials" in capsys.readouterr().out
        assert toy.seen == whole and (toy.folder / "tuned.toml").read_text() == tuned
        toy.run("--trials=14")  # nothing left to do
        assert len(toy.seen) == 14
        toy.run("--trials=15")
        assert len(toy.seen) == 15

    def test_trials_of_other_weights_or_other_settings_are_not_mixed_in(self, toy, monkeypatch):
        score_by_lr(monkeypatch, toy)
        toy.run("--trials=3")
        runs = [["--steps=13"], ["--seed=1"], ["--target_loss=0.3"], ["--k_rate=0"]]
        for n, other in enumerate(runs, 2):
            toy.run("--trials=3", *other)
            assert len(toy.seen) == 3 * n
        toy.run("--trials=3"), toy.run("--trials=3", "--jobs=2"), toy.run("--trials=3", "--minimal")
        assert len(toy.seen) == 3 * (len(runs) + 1)  # these had been run, and what has no bearing on a trial parts no studies
        model = GPT.load(str(toy.folder.parent))
        model.lm_head.weight.data *= 1.01
        model.save(str(toy.folder.parent))
        toy.run("--trials=3")
        assert len(toy.seen) == 3 * (len(runs) + 2)

    def test_several_targets_are_scored_by_their_geometric_mean(self, toy, monkeypatch, capsys):
        def find(model, pairs, apart, constants, cfg, say):
            yield from (SimpleNamespace(size=(3, edges), loss=0.1) for edges in (2, 32))
        monkeypatch.setattr(tune, "find", find)
        toy.run("--trials=1", "--target_loss=0.5,0.2")
        assert "2 edges  loss 0.100; 3 nodes  32 edges" in (out := capsys.readouterr().out) and "best so far 8 edges" in out

    def test_a_circuit_above_the_target_is_worse_than_any_and_alone_makes_no_config(self, toy, monkeypatch, capsys):
        score_by_lr(monkeypatch, toy, loss=0.5)
        assert "no trial met 0.4 nats" in refused(toy, capsys, "--trials=2")
        losses = iter([0.1, 0.5, math.nan, math.inf])
        edges = {0.1: 999_999, 0.5: 1}

        def find(model, pairs, apart, constants, cfg, say):
            loss = next(losses)
            toy.seen.append(cfg)
            yield SimpleNamespace(size=(3, edges.get(loss, 1)), loss=loss)

        toy.seen.clear()
        monkeypatch.setattr(tune, "find", find)
        toy.run("--trials=4", "--seed=5")
        assert parse(PruneConfig, [f"--config={toy.folder}/tuned.toml"]) == replace(toy.seen[0], starts=3)

    @pytest.mark.parametrize("args, says", [
        (["--trials=0"], "trial"), (["--trials=x"], "trials"), (["--trails=3"], "'trials'"), (["--task=all"], "one task"), (["--method=attribution"], "learned"),
        (["--task=toi"], "'toy'"), (["--target_loss=1e-9"], "does not solve toy"), (["--model={tmp}/nowhere"], "nowhere"), (["--data={tmp}/nowhere"], "nowhere"),
        (["--fit_pairs=99"], "fit_pairs")], ids=str)
    def test_bad_input_is_one_line_exit_2_and_nothing_written(self, toy, capsys, args, says):
        assert says in refused(toy, capsys, *(a.format(tmp=toy.folder.parent) for a in args)) and not toy.folder.exists()

    def test_a_model_of_another_vocabulary_is_refused(self, toy, capsys):
        random_model(vocab_size=11).save(str(toy.folder.parent))
        assert "10 tokens" in refused(toy, capsys)

    def test_a_damaged_journal_is_named(self, toy, monkeypatch, capsys):
        score_by_lr(monkeypatch, toy)
        toy.folder.mkdir()
        (toy.folder / "tune.journal").write_text("not\na\njournal\n")
        assert "tune.journal is damaged" in refused(toy, capsys)

    def test_the_command_is_a_module_of_tools(self, toy):
        assert toy.run("--trials=1") == 0
        assert len(toy.seen) == 1 and not (toy.folder / "circuit.json").exists()
        tune.tune(parse(tune.TuneConfig, [f"--model={toy.folder.parent}", f"--data={toy.folder.parent}", *SMALL, "--trials=1"]))  # the trial is there
        assert len(toy.seen) == 1 and parse(PruneConfig, [f"--config={toy.folder}/tuned.toml"]) == replace(toy.seen[0], starts=3)
        root = Path(tune.__file__).resolve().parent.parent
        ran = subprocess.run([sys.executable, "-m", "tools.tune", "--trials=0"], cwd=root, capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr == "tune.py: trials must be at least 1, not 0\n"
