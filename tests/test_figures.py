"""tools/figures.py: every figure on tiny models, work that goes on where it stopped, a page that says what the numbers say."""
import ast
import json
import math
import os
import random
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge import BridgeConfig
from circuit_file import read_circuit
from config import parse
from data.tinypython.tokenizer import load_tokenizer
from measures import correlation
from model import GPT, GPTConfig
from optim import kind_of
from plan import tensors
from prune import geometric_mean, prune
from tasks import Task, calibrate, calibrated, loss_of, margins
from tools import figures, figures_inside, figures_lab, figures_lists, figures_sizes, figures_trust
from tools.figures_inside import binarise, binary, first_levels, kurtosis, levels_at_first, stream_kurtosis, two_level
from tools.figures_lab import CLOSE, TRIES, Found, Lab, Run, common_tasks, next_steps
from tools.figures_sizes import agree, compared, growing
from toy import TOY, Digits, hand_made, one_thread, random_model  # noqa: F401
import train
from test_train import argv, write_data
from tools.hard_concrete import HardConcreteConfig
from train import TrainConfig

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = str(ROOT / "data/tinypython/tokenizer.tiktoken")
TINY = dict(mean_tokens=512, train_pairs=64, fit_pairs=24, apart_pairs=0, heldout_pairs=40, steps=60, batch_pairs=16,
            lr=0.03, k_coef=0.01, k_rate=0.02, init_noise_scale=0.01, init_noise_bias=0.1)
AIM = 0.4
GRID = {(2, 1.0): "sparse0", (2, 2.0): "more", (4, 1.0): "sparse1", (4, 2.0): "wide"}
RUNS = ("sparse0", "sparse1", "more", "wide", "varied", "bridge0", "dense_bridge0", "hard_concrete")


# --- a lab whose models are made by hand --------------------------------------------------------

def patched(monkeypatch) -> None:
    """The toy task in place of the twenty, and targets that its models can meet."""
    monkeypatch.setattr("tasks.TASKS", {"toy": TOY})
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    for module in (figures_sizes, figures_inside, figures_trust):
        monkeypatch.setattr(module, "AIM", AIM)
    monkeypatch.setattr(figures_sizes, "TARGETS", (0.6, AIM))
    monkeypatch.setattr(figures_sizes, "HELD_OUT", 20)
    monkeypatch.setattr(figures_inside, "BIN_STEPS", 60)
    monkeypatch.setattr(figures_inside, "VAL_TOKENS", 256)
    monkeypatch.setattr(figures_trust, "STEERED", {"toy": AIM})


def finish(lab: Lab, name: str, model: GPT, loss: float) -> None:
    """A run as training leaves it, as far as figures look at it."""
    folder = Path(lab.folder(name))
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder))
    (folder / "log.jsonl").write_text(json.dumps({"step": 1, "val_loss": {"a": loss - 1, "b": loss + 3}, "dead_neurons": 0.25}) + "\n")
    lab.mark(name, True)


def wider(noise: float) -> GPT:
    """The model made by hand with weights that mean nothing beside its own."""
    model = hand_made()
    for name, p in model.named_parameters():
        if "mlp" in name:
            p.add_(torch.randn_like(p) * noise)
    return model


def made_lab(folder: Path) -> Lab:
    """Two seeds, a grid of four, a variation; the dense ones have the loss of the sparse within 0.01 nats."""
    data = folder / "data"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        rng.integers(0, 10, 4000).astype("<u2").tofile(data / name)
    # a quarter and three quarters: a loss of x - 1 and of x + 3 is one of x + 2
    (data / "meta.json").write_text(json.dumps({"vocab_size": 10, "val_parts": {"a": [0, 1000], "b": [1000, 4000]}}))
    runs = {name: Run("configs/figures/sparse.toml", (f"--seed={n}",)) for n, name in enumerate((*RUNS, "dense"))}
    lab = Lab(out=str(folder / "runs"), runs=runs, tasks=("toy",), grid=GRID, ablations={"varied": "without something"},
              data=str(data), tokenizer=TOKENIZER, jobs=1, seeds=(0, 1), pruning=TINY)
    for n, name in enumerate(RUNS):
        finish(lab, name, wider(0.01 * n), 2.0 + 0.1 * n)
    finish(lab, "dense", wider(0.5), 2.2)
    for seed in (0, 1):
        finish(lab, lab.dense_run(seed, figures_lab.FIRST_STEPS), wider(0.05), 2.01 + 0.1 * seed)
    return lab


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> tuple[Lab, figures.FiguresConfig]:
    folder = tmp_path_factory.mktemp("figures")
    return made_lab(folder), figures.FiguresConfig(docs=str(folder / "docs"), out_dir=str(folder / "runs"))


@pytest.fixture
def shared(common, monkeypatch):
    """One lab for the figures: what one of them has pruned, the others find."""
    patched(monkeypatch)
    return common


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    patched(monkeypatch)
    return made_lab(tmp_path)


# what the commands leave that fig9 and critique call
def steered(run: str) -> None:
    curve = {"mean": [0.1, 0.9], "q25": [0.0, 0.8], "q75": [0.2, 1.0]}
    folder = Path(run) / "steer" / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    among = {"mean": [0.01, 0.2], "q25": [0.0, 0.1], "q75": [0.1, 0.3]}
    content = {"strength": [0.0, 1.0], "nodes": ["0.attn.act_in.0"], "n_pairs": 200, "steered": curve, "random": curve, "random_node": None,
               "dense_mean_difference": curve, "absolute": {"steered": among}, "best_single": {"steered": among}}
    (folder / "steer.json").write_text(json.dumps(content))


def validated(path: str) -> None:
    content = json.loads(Path(path).read_text())
    edges = 10 * content["n_edges"]
    content["validation"] |= {
        "frozen_norms_refit": 0.25, "complement_worst": 0.5,
        "controls": {"exchanged_answers": [{"met": True, "flat": True, "edges": edges}],
                     "random_signs": [{"met": False, "flat": True, "edges": 5}]}}
    Path(path).write_text(json.dumps(content))


def called(self, commands: dict) -> None:
    for command in commands.values():
        options = dict(option.removeprefix("--").split("=", 1) for option in command[1:])
        if command[0] == "steer.py":
            assert Path(options["circuit"]).is_file() and Path(options["dense"]).is_dir()
            steered(options["run"])
        else:
            assert command[0] == "validate.py" and options["level"] in ("nonsense", "wiring") and options["control_seeds"] == "1"
            validated(options["circuit"])


NAMES = ("fig10", "fig2", "tokens", "fig31", "fig32", "binarised", "fig3", "ablations", "appendix_d", "fig9", "critique")
RUNS_OF = {"fig10": (*GRID.values(), "dense"), "fig3": GRID.values(), "ablations": ("sparse0", "sparse1", "varied"),
           "appendix_d": ("sparse0", "sparse1", "hard_concrete"), "fig9": ("dense_bridge0", "bridge0")}


def made(shared, monkeypatch, name: str) -> dict:
    lab, cfg = shared
    monkeypatch.setattr(Lab, "call", called)
    figure = replace(figures.FIGURES[name], runs=tuple(RUNS_OF.get(name, ("sparse0", "sparse1"))))
    monkeypatch.setitem(figures.FIGURES, name, figure)
    return figures.make(lab, cfg, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_leaves_a_picture_its_numbers_and_a_row(shared, monkeypatch, name):
    pytest.importorskip("matplotlib")
    row = made(shared, monkeypatch, name)
    folder = Path(shared[1].docs) / "figures"
    png = (folder / f"{name}.png").read_bytes()
    assert png[:4] == b"\x89PNG" and len(png) > 5000
    assert json.loads((folder / f"{name}.json").read_text()) == json.loads(json.dumps(row))
    assert row["name"] == name and row["says"] == figures.FIGURES[name].says and row["measured"] and row["models"]
    said = figures.text_of(row)
    assert row["measured"] in said and row["says"] in said and "nan" not in said

    # the second time nothing is measured, pruned or drawn
    monkeypatch.setattr(figures, "picture", lambda draw, data: pytest.fail("drawn anew"))
    monkeypatch.setattr(figures_lab, "prune", lambda *args: pytest.fail("pruned anew"))
    assert made(shared, monkeypatch, name) == json.loads(json.dumps(row))


def test_what_the_figures_say_of_the_tiny_models(shared, monkeypatch):
    pytest.importorskip("matplotlib")
    lab, _ = shared
    rows = {name: made(shared, monkeypatch, name) for name in NAMES}
    # all are the same circuit of two edges, so no model has more of them than another
    assert [row["edges"] for row in rows["fig2"]["data"]["minimal"]] == pytest.approx([2.0, 2.0])
    assert [row["ratio"] for row in rows["fig2"]["data"]["rows"]] == pytest.approx([1.0] * 2 * len(figures_sizes.TARGETS))
    assert "0.4 nats 1 times fewer" in rows["fig2"]["measured"] and "ones have 2.0." in rows["fig2"]["measured"]
    assert rows["fig2"]["measured"].endswith("Minimal ones of toy have 1 times fewer: 2, and 2")
    assert rows["fig2"]["table"] == [["target, nats", "tasks", "sparse", "dense", "times fewer"], ["0.6", "1", "2", "2", "1.0"], ["0.4", "1", "2", "2", "1.0"]]
    assert [p["edges"] for p in rows["fig3"]["data"]["points"]] == pytest.approx([2.0] * 4)
    assert [p["loss"] for p in rows["fig3"]["data"]["points"]] == pytest.approx([4.0, 4.2, 4.1, 4.3])
    assert rows["ablations"]["data"]["rows"][-1]["loss"] == pytest.approx(4.4)
    # beside the run of the same seed, 4.0
    assert "without something +0.400 nats, x 1.0 edges, 25% dead, L0 x " in rows["ablations"]["measured"]
    assert "HardConcrete gates +0.700 nats, x 1.0 edges, 25% dead, L0 x " in rows["appendix_d"]["measured"]
    assert all(row["l0"] == sum(int(p.count_nonzero()) for name, p in GPT.load(lab.folder(row["run"])).named_parameters() if kind_of(name) != "dense")
               for row in rows["ablations"]["data"]["rows"])
    # at all gates the circuit is the model, and the model without it knows nothing
    for curve in rows["fig32"]["data"]["curves"].values():
        assert curve[0]["gates"] == 1 and curve[0]["sufficiency"] > AIM > curve[-1]["sufficiency"]
        assert curve[-1]["necessity"] > 0.6 and curve[0]["necessity"] < 0.6
        assert all(row["necessity_refit"] < row["necessity"] + 0.02 for row in curve)
    # of values that differ most by the deciding token, two levels lose little
    for row in rows["binarised"]["data"]["rows"]:
        assert row["nodes"] == 3 and row["before"] < AIM + 0.05 and row["after"] < 0.6
    shown = rows["tokens"]["data"]["correlations"]
    assert len(shown["dense and sparse"]) == 2 and all(-1 <= r <= 1 for kind in shown.values() for _, _, r in kind)
    assert rows["fig9"]["data"]["curves"]["toy, bridge0"]["steered"]["mean"] == [0.1, 0.9]
    assert "toy: P of the other answer, between the two, 0.100 to 0.900 by 1 channels (among all tokens 0.010 to 0.200)" in rows["fig9"]["measured"]
    for found in rows["critique"]["data"]["found"].values():
        assert found["nonsense"]["least"] == pytest.approx(10) and found["wiring"]["least"] is None and found["frozen"] == 0.25
    assert "1 of 1 runs met the target, with 10.0 times or more" in rows["critique"]["measured"]
    assert "0 of 1 runs met the target and" in rows["critique"]["measured"] and rows["critique"]["table"][0][2:] == ["sparse0", "dense0_2400"]
    # kurtosis by numpy, also of the dense model
    found = rows["fig10"]["data"]
    assert f"a dense one without AbsTopK {found['dense']:.1f}, a Gaussian 3" in rows["fig10"]["measured"]
    assert found["dense"] == pytest.approx(stream_kurtosis(lab, "dense"))
    assert found["dense"] != pytest.approx(found["points"][0]["kurtosis"])
    model = GPT.load(lab.folder("more"))
    ids = torch.from_numpy(np.fromfile(Path(lab.data) / "val.bin", "<u2")[:8].astype(np.int64))[None]
    with torch.no_grad():
        x = model.run(model.embed(ids))[0].double().numpy()
    away = x - x.mean(-1, keepdims=True)
    assert kurtosis(torch.from_numpy(x)).numpy() == pytest.approx((away**4).mean(-1) / (away**2).mean(-1) ** 2)


# --- the page ---------------------------------------------------------------------------------

def test_the_page_has_what_the_numbers_have(shared, monkeypatch):
    pytest.importorskip("matplotlib")
    lab, cfg = shared
    for name in ("fig3", "fig2"):
        made(shared, monkeypatch, name)
    docs = Path(cfg.docs)
    page = figures.page_of(cfg.docs)
    for name in ("fig3", "fig2"):
        row = json.loads((docs / "figures" / f"{name}.json").read_text())
        assert f"| [{name}](#{name}), {row['where']} | {row['says']} | {row['measured']} | {row['models']} |" in page
        assert f"(figures/{name}.png)" in page
        for cells in row["table"]:
            assert figures.cells(cells) in page
    # of an earlier version's it says so
    assert "*older*: [" not in page
    with monkeypatch.context() as later:
        later.setattr(figures, "FORMAT", figures.FORMAT + 1)
        older = figures.page_of(cfg.docs)
        assert older.count("*older*: [") == older.count("\n## ") >= 2  # every row: other tests may have left some
    # it follows the numbers; and what has no picture, or is damaged, has no row
    path = docs / "figures" / "fig2.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"measured": "something | else"}))
    assert "| something / else |" in figures.page_of(cfg.docs)
    path.write_text("{")
    assert "[fig2]" not in figures.page_of(cfg.docs) and "[fig3]" in figures.page_of(cfg.docs)
    path.write_text(json.dumps(row))
    picture = docs / "figures" / "fig2.png"
    kept = picture.read_bytes()
    picture.unlink()
    assert "[fig2]" not in figures.page_of(cfg.docs)
    picture.write_bytes(kept)
    assert figures.page_of(cfg.docs) == page


def test_the_page_of_the_project_is_that_of_its_numbers(tmp_path):
    assert (ROOT / "docs/figures.md").read_text() == figures.page_of(str(ROOT / "docs"))
    assert "None has been run yet" in figures.page_of(str(tmp_path))


# --- the command ------------------------------------------------------------------------------

def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        figures.main(list(args))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and not out
    return err


def test_an_unknown_figure_is_one_line(capsys, tmp_path):
    err = refused(capsys, "--only=fig2,fgi10", f"--out_dir={tmp_path / 'runs'}")
    assert "unknown figure 'fgi10'; the nearest is 'fig10'" in err and not (tmp_path / "runs").exists()


def test_without_matplotlib_it_is_one_line_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    err = refused(capsys, "--only=fig2", f"--out_dir={tmp_path / 'runs'}")
    assert "pip install -r requirements-extra.txt" in err and not (tmp_path / "runs").exists()


def test_without_data_it_is_one_line_before_any_work(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    err = refused(capsys, f"--data={tmp_path}", f"--out_dir={tmp_path / 'runs'}")
    assert "meta.json is missing" in err and "prepare.py" in err and not (tmp_path / "runs").exists()


def test_two_commands_do_not_work_in_one_directory(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    with figures.sole_user(str(tmp_path)):
        data = write_data(tmp_path / "data")
        assert "another process makes figures" in refused(capsys, f"--out_dir={tmp_path}", f"--data={data}")


def test_a_figure_that_cannot_be_made_ends_no_other(lab, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def fails(lab):
        raise ValueError("no task has a circuit")

    def works(lab):
        return Found("1.0 times", "sparse0", {"x": [1, 2]})

    def draw(figure, data):
        figure.subplots().plot(data["x"])

    for name, measure in (("fig2", fails), ("fig10", works)):
        monkeypatch.setitem(figures.FIGURES, name, figures.Figure("Fig.", "much", measure, draw, ("sparse0",), 1))
    cfg = figures.FiguresConfig(docs=str(tmp_path / "docs"))
    (tmp_path / "docs").mkdir()
    assert figures.make_all(lab, cfg, ["fig2", "fig10"]) == 2
    out, err = capsys.readouterr()
    assert err == "fig2: not made: no task has a circuit\n" and "1.0 times" in out and "min left" in out
    page = (tmp_path / "docs" / "figures.md").read_text()
    assert "1.0 times" in page and "[fig2]" not in page
    assert figures.make_all(lab, cfg, ["fig10"]) == 0

    # of other weights it is measured anew, and also where that is asked for
    calls = []
    monkeypatch.setitem(figures.FIGURES, "fig10", replace(figures.FIGURES["fig10"], measure=lambda lab: calls.append(1) or works(lab)))
    figures.make_all(lab, cfg, ["fig10"])
    assert calls == []
    figures.make_all(lab, replace(cfg, again=True), ["fig10"])
    hand_made(sink=True).save(lab.folder("sparse0"))
    figures.make_all(lab, cfg, ["fig10"])
    assert calls == [1, 1]


# --- models, each trained once ----------------------------------------------------------------

STUB = """
import os, sys, time
options = dict(o[2:].split("=", 1) for o in sys.argv[1:])
folder = options["out_dir"]
begun = os.path.join(folder, "begun")
print("step 1", options["resume"], flush=True)
if options.get("wait"):
    open(begun, "w").close()
    time.sleep(60)
if options["resume"] == "false" and options.get("fails"):
    sys.exit("no space left")
open(os.path.join(folder, "final_model.pt"), "w").write(options["seed"])
"""


@pytest.fixture
def stub(tmp_path) -> Lab:
    """A lab whose runs are a script that trains nothing."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    lab = Lab(out=str(tmp_path / "runs"), runs={}, tasks=(), grid={}, ablations={}, jobs=2, data=str(write_data(tmp_path / "data")))
    lab.runs["a"] = Run("x.toml", ("--seed=1",), script=str(script))
    lab.runs["b"] = Run("x.toml", ("--seed=2", "--fails=1"), script=str(script))
    lab.runs["c"] = Run("x.toml", ("--seed=3", "--of={out}/a"), script=str(script), after=("a",))
    lab.runs["d"] = Run("x.toml", ("--seed=4", "--wait=1"), script=str(script))
    return lab


def printed(lab: Lab, name: str) -> list[str]:
    return Path(lab.log_of(name)).read_text().splitlines()


def test_runs_are_trained_once_in_their_order(stub, capsys):
    assert stub.missing(["c", "a"]) == ["a", "c"]
    stub.train(["c"])
    assert stub.is_finished("a") and stub.is_finished("c") and f"--of={stub.out}/a" in stub.command("c")
    assert capsys.readouterr().out.count("is trained") == 2 and stub.missing(["c"]) == []
    stub.train(["c"])
    assert printed(stub, "a") == ["step 1 false"]
    # another command is another run, which begins anew
    stub.runs["a"] = replace(stub.runs["a"], options=("--seed=7",))
    assert stub.missing(["c"]) == ["a"]
    stub.train(["a"])
    assert printed(stub, "a")[1:] == ["step 1 false"] and (Path(stub.folder("a")) / "final_model.pt").read_text() == "7"


def test_a_run_on_other_data_begins_anew(stub):
    stub.train(["a"])
    path = Path(stub.data) / "train.bin"
    ids = np.fromfile(path, "<u2")
    ids[::-1].tofile(path)
    stub = replace(stub)  # another call
    assert stub.missing(["a"]) == ["a"]
    stub.train(["a"])
    assert printed(stub, "a") == ["step 1 false", "step 1 false"]


def test_a_loss_that_becomes_no_number_is_a_result_where_it_may_be_one(stub):
    script = Path(stub.runs["a"].script)
    script.write_text("print('step 9: the loss is not finite, so the run stops here. Try less'); raise SystemExit(1)")
    with pytest.raises(ValueError, match="step 9"):
        stub.train(["a"])
    stub.train(["a"], may_diverge=True)
    assert "step 9" in stub.diverged("a") and not stub.is_finished("a")
    n = len(printed(stub, "a"))
    stub.train(["a"], may_diverge=True)
    assert len(printed(stub, "a")) == n  # nor tried again
    row = {"label": "a rate too high", "run": "a", "diverged": stub.diverged("a")}
    assert figures_sizes.beside(row, {}, 4).startswith("a rate too high: did not train (step 9") and figures_sizes.table_beside([row])[1][1] == "diverged"


def test_a_run_that_failed_goes_on(stub):
    with pytest.raises(ValueError, match=r"--seed=2.* ended with status 1: no space left \(.*figures.log\)"):
        stub.train(["b"])
    assert not stub.is_finished("b")
    stub.train(["b"])
    assert stub.is_finished("b") and printed(stub, "b")[-1] == "step 1 true"


def test_children_end_with_whoever_started_them(stub, monkeypatch):
    started = []
    child = Lab.child
    monkeypatch.setattr(Lab, "child", lambda self, *args: started.append(child(self, *args)) or started[-1])
    sleep = figures_lab.time.sleep

    def interrupted(seconds):
        if (Path(stub.folder("d")) / "begun").exists():
            raise KeyboardInterrupt
        sleep(0.02)

    monkeypatch.setattr(figures_lab.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stub.train(["d"])
    (one,) = started
    assert one.returncode == -15 and not stub.is_finished("d")


def test_a_command_of_the_project_that_fails_is_one_line(stub, tmp_path):
    (tmp_path / "fails.py").write_text("import sys; sys.exit('no circuit there')")
    with pytest.raises(ValueError, match="ended with status 1: no circuit there"):
        stub.call({str(tmp_path / "logs" / "x.log"): [str(tmp_path / "fails.py")]})


# --- dense models of the same loss ------------------------------------------------------------

@pytest.mark.parametrize("per_doubling, bend", [(0.1, 0.0), (0.3, 0.0), (0.25, 0.03), (0.6, 0.05)])
def test_the_steps_that_give_a_loss_are_found_in_few_tries(per_doubling, bend):
    rng = random.Random(1)
    for _ in range(20):
        wanted = 2.9 + rng.uniform(-0.25, 0.25)
        tried = {}
        while not tried or min(abs(loss - wanted) for loss in tried.values()) > CLOSE:
            steps = next_steps(tried, wanted)
            assert steps not in tried and steps >= 1
            doublings = math.log2(steps / 2000)
            tried[steps] = 2.9 - per_doubling * doublings + bend * doublings**2 + rng.uniform(-0.004, 0.004)
            assert len(tried) <= TRIES, tried


def test_a_dense_run_within_the_margin_is_matched_and_no_other(lab, monkeypatch):
    assert lab.matched() == {"sparse0": "dense0_2400", "sparse1": "dense1_2400"}
    assert lab.loss_of("sparse0") == pytest.approx(4.0)  # parts weighed by their tokens

    # 0.03 nats away: another is trained, for that seed alone
    finish(lab, "dense0_2400", hand_made(), 2.03)
    trained = []

    def fake(names):
        for name in lab.missing(names):
            trained.append(name)
            steps = int(name.split("_")[1])
            finish(lab, name, hand_made(), 2.03 - 0.2 * math.log2(steps / 2400))

    monkeypatch.setattr(lab, "train", fake)
    found = lab.matched()
    assert found["sparse1"] == "dense1_2400" and found["sparse0"] == trained[-1] and len(trained) < 3
    assert abs(lab.loss_of(found["sparse0"]) - lab.loss_of("sparse0")) <= CLOSE
    assert "--seed=0" in lab.command(found["sparse0"])

    monkeypatch.setattr(figures_lab, "TRIES", 1)
    with pytest.raises(ValueError, match="no dense run within 0.02 nats"):
        lab.matched()


# --- circuits, each pruned once ---------------------------------------------------------------

def test_prunings_that_were_interrupted_go_on(lab, monkeypatch, capsys):
    done = []

    def counted(loaded, task, cfg, *args):
        if len(done) == 1 and not capsys.readouterr().out.count("again"):
            raise KeyboardInterrupt
        done.append(cfg.model)
        return prune(loaded, task, cfg, *args)

    monkeypatch.setattr(figures_lab, "prune", counted)
    wanted = [lab.pruning_of(run, "toy", AIM, "paper") for run in ("sparse0", "sparse1")]
    with pytest.raises(KeyboardInterrupt):
        lab.circuits(wanted)
    assert len(done) == 1
    print("again")
    first, second = lab.circuits(wanted)
    assert done == [lab.folder("sparse0"), lab.folder("sparse1")] and first["n_edges"] >= 2 <= second["n_edges"]
    assert "1 s left" not in capsys.readouterr().out
    assert lab.circuits(wanted) == [first, second] and len(done) == 2
    assert wanted[0].starts == 1 and wanted[0].out_dir.endswith("paper_0.4/sparse0")


def test_that_a_task_has_no_circuit_is_kept_with_its_reason(lab, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(figures_lab, "prune", lambda *args: done.append(1) or prune(*args))
    asked = lab.pruning_of("sparse0", "toy", 0.0001, "paper")
    assert lab.circuits([asked]) == [None] and "no circuit: the unpruned model does not solve toy" in capsys.readouterr().out
    assert lab.circuits([asked]) == [None] and len(done) == 1
    assert "does not solve toy" in figures_lab.known(asked)
    lab.circuits([replace(asked, seed=1)])  # other settings are another question
    assert len(done) == 2
    wider(0.2).save(lab.folder("sparse0"))  # and so are other weights
    assert figures_lab.known(replace(asked, seed=1)) is None
    # data that are not there are no answer
    with pytest.raises(ValueError, match="train.bin is missing"):
        lab.circuits([replace(asked, data=lab.out)])
    assert figures_lab.known(replace(asked, data=lab.out)) is None


def test_ways_of_pruning_do_not_share_a_folder(lab):
    kinds = {kind: lab.pruning_of("sparse0", "toy", AIM, kind) for kind in figures_lab.KINDS}
    assert len({cfg.out_dir for cfg in kinds.values()}) == len(kinds)
    assert [kinds[kind].minimal for kind in ("paper", "minimal", "attribution", "zero")] == [False, True, False, True]
    assert kinds["attribution"].method == "attribution" and kinds["zero"].ablation == "zero"


# --- arithmetic ---------------------------------------------------------------------------------

def test_sizes_are_compared_over_the_tasks_that_both_have():
    assert compared({"a": 2, "b": 8, "c": None}, {"a": 8, "b": 32, "c": 5}) == {
        "tasks": ["a", "b"], "first": pytest.approx(4), "second": pytest.approx(16), "ratio": pytest.approx(4)}
    assert compared({"a": None}, {"a": 3}) == {"tasks": [], "first": None, "second": None, "ratio": None}
    assert geometric_mean([0, 4]) == pytest.approx(2)  # no edge counts as one
    edges = {("x", "a", 0.1): 3, ("y", "a", 0.1): None, ("x", "b", 0.1): 1, ("y", "b", 0.1): 1}
    assert common_tasks(edges, ["x", "y"], ["a", "b"], 0.1) == ["b"]


def test_claims_are_counted_step_by_step():
    points = [{"width": w, "l0": x, "loss": loss} for w, x, loss in
              ((1, 1, 3.0), (1, 2, 2.5), (1, 4, 2.6), (2, 1, 2.9), (2, 2, 2.4), (2, 4, 2.3))]
    assert agree(points, "width", "l0", "loss", False) == "3 of 4 steps"
    assert agree(points, "l0", "width", "loss", False) == "3 of 3 steps"
    assert growing(10) == [1, 2, 3, 4, 6, 8, 10] and growing(1) == [1]


def test_kurtosis_of_values_by_hand():
    x = torch.zeros(3, 8)
    x[0, 3] = 5.0
    x[1] = torch.tensor([1.0, -1.0]).repeat(4)
    x[2] = torch.arange(8.0)
    # one of n channels: ((n - 1)^3 + 1) / (n (n - 1)); two values: 1; 0 to 7: 37.0 / 21 ...
    fourth = sum((k - 3.5) ** 4 for k in range(8)) / 8
    assert kurtosis(x).tolist() == pytest.approx([(7**3 + 1) / 56, 1.0, fourth / 5.25**2])
    assert kurtosis(torch.randn(4, 100000)).tolist() == pytest.approx([3.0] * 4, abs=0.1)


def test_two_levels_of_values_by_hand():
    # two clusters, which the threshold at 1/4 alone tells apart; a node that never varies
    x = torch.tensor([[0.0, 2.0], [0.2, 2.0], [2.0, 2.0], [2.2, 2.0], [6.0, 2.0]])
    left, right = first_levels(x)
    errors = {}
    for share in (0.25, 0.5, 0.75):
        low, high = x[x[:, 0] <= 6 * share, 0], x[x[:, 0] > 6 * share, 0]
        errors[share] = (((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum()).item()
    best = min(errors, key=errors.get)
    assert left[0].item() == pytest.approx(x[x[:, 0] <= 6 * best, 0].mean().item())
    assert right[0].item() == pytest.approx(x[x[:, 0] > 6 * best, 0].mean().item())
    assert left[1].item() == right[1].item() == 2.0
    y = torch.tensor([0.0, 1.4, 1.6, 9.0])
    one, three = torch.tensor(1.0), torch.tensor(2.0)
    assert two_level(y, one, three, 0.0).tolist() == [1.0, 1.0, 2.0, 2.0]
    assert two_level(y, one, three, 1.0).tolist() == pytest.approx(y.tolist())
    assert two_level(y, one, three, 0.5).tolist() == pytest.approx([0.5, 1.2, 1.8, 5.5])


def test_a_binarised_circuit_has_two_values_at_each_node(lab, monkeypatch):
    cfg = lab.pruning_of("sparse0", "toy", AIM, "minimal")
    lab.circuits([cfg])
    case = figures_lab.case_in(lab, os.path.join(cfg.out_dir, "toy", "circuit.json"))
    levels = levels_at_first(case)
    assert {site for site, m in case.circuit.mask.items() if m.any()} == levels.keys()
    inner = binary(case, levels, 0.0)
    seen = {}

    def node(site, x):
        seen[site] = inner(site, x)
        return seen[site]

    with torch.no_grad():
        case.reduced.run(case.reduced.embed(case.heldout.ids), nodes=node)
        plain = margins(case.reduced, case.heldout, binary(case, levels, 1.0))
    for site, m in case.circuit.mask.items():
        for channel in m.nonzero().flatten().tolist():
            assert len(seen[site][..., channel].unique()) <= 2
    # warm, the nodes are as they were
    assert plain == pytest.approx(margins(case.reduced, case.heldout, case.nodes).numpy(), abs=1e-5)
    found = binarise(case)
    assert found["before"] == pytest.approx(read_circuit(os.path.join(cfg.out_dir, "toy", "circuit.json"))["loss_heldout"], abs=1e-4)
    assert binarise(case) == found  # drawn from a seed
    # what is learnt and no better is not taken
    monkeypatch.setattr(figures_inside, "annealed", lambda case, levels, lr: {s: (b, a) for s, (a, b) in levels.items()})
    worse = binarise(case)
    assert not worse["learnt"] and worse["after"] == worse["at_once"]


def test_the_nodes_that_are_no_steps_are_those_whose_steps_pass_the_target(lab, monkeypatch):
    cfg = lab.pruning_of("sparse0", "toy", AIM, "minimal")
    lab.circuits([cfg])
    case = figures_lab.case_in(lab, os.path.join(cfg.out_dir, "toy", "circuit.json"))
    levels = levels_at_first(case)
    names = [f"{site}.{i}" for site, m in case.circuit.mask.items() for i in m.nonzero().flatten().tolist()]

    def stepped(steps, pairs):
        """Margins with the named nodes at the nearer of their levels."""
        def node(site, x):
            x = case.nodes(site, x).clone()
            for place, i in enumerate(case.circuit.mask[site].nonzero().flatten().tolist() if site in levels else []):
                left, right = levels[site][0][place], levels[site][1][place]
                if f"{site}.{i}" in steps:
                    x[..., i] = torch.where((x[..., i] - left).abs() < (x[..., i] - right).abs(), left, right)
            return x
        return margins(case.reduced, pairs, node)

    def loss(steps, pairs):
        return loss_of(calibrated(stepped(steps, pairs), *calibrate(stepped(steps, case.fit))))

    alone = {name: loss([name], case.fit) for name in names}
    bound = (min(alone.values()) + max(alone.values())) / 2  # some pass it alone
    assert max(alone.values()) > min(alone.values()) + 0.01
    monkeypatch.setattr(figures_inside, "AIM", bound)
    found = figures_inside.graded(case, levels)
    none = {f"{site}.{channel}" for site, channel in found["graded"]}
    steps = [name for name in names if name not in none]
    assert {name for name in names if alone[name] > bound} <= none < set(names)
    assert loss(steps, case.fit) <= bound + 1e-4
    assert found["but_graded"] == pytest.approx(loss(steps, case.heldout), abs=1e-4)
    cheapest = min(alone, key=alone.get)
    assert cheapest in steps


# --- Fig. 8 on a model of which it is known where it fails --------------------------------------

def counting(tokenizer) -> GPT:
    """One head averages over all tokens a value of 28 that ` [[` has and hardly another; `]]` wins while three times the
    average is above 1, that is up to 83 tokens and the sink."""
    model = GPT(GPTConfig(vocab_size=2048, block_size=128, n_layer=1, n_head=1, d_head=8, d_model=8, rms_norm=True, bias=False,
                          tied_unembed=False, sink=True)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.fill_(1.0 if "ln_" in name else 0.0)
    one, two = (tokenizer.encode_ordinary(answer)[0] for answer in ("]\n", "]]\n"))
    block = model.transformer.h[0]
    model.transformer.wte.weight[:, 2] = 1.0  # so that no norm divides by nothing
    model.transformer.wte.weight[tokenizer.encode_ordinary(" [[")[0], 0] = 20.0
    model.transformer.wte.weight[tokenizer.encode_ordinary(" [")[0], 0] = 0.03
    block.attn.c_attn.weight[16, 0] = 10.0
    block.attn.c_proj.weight[1, 0] = 1.0
    model.lm_head.weight[two, 1] = 3.0
    model.lm_head.weight[two, 2] = -1.0
    model.final_logits_bias[one] = 0.0
    return model


def test_where_long_lists_fail_is_said_beforehand(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    lab = made_lab(tmp_path)
    tokenizer = load_tokenizer()
    lab.runs["long0"] = Run("configs/figures/long.toml")
    lab.seeds = (0,)
    np.random.default_rng(0).integers(0, 2048, 40_000).astype("<u2").tofile(Path(lab.data) / "train.bin")
    (Path(lab.data) / "meta.json").write_text(json.dumps({"vocab_size": 2048, "val_parts": {"a": [0, 1000]}}))
    finish(lab, "long0", counting(tokenizer), 2.0)
    # of the other the task is no question: a model without a single weight has no circuit
    blank = counting(tokenizer)
    blank.lm_head.weight.zero_()
    finish(lab, "sparse0", blank, 2.0)
    monkeypatch.setattr(figures_lists, "LISTS", 8)
    monkeypatch.setattr(figures_lists, "LENGTHS", (1, 3, 8, 15, 25, 30, 90))
    lab.pruning = TINY | {"steps": 40, "batch_pairs": 8}
    found = figures_lists.fig8(lab)
    of_model = found.data["found"]["long0"]
    assert list(found.data["found"]) == ["long0"] and of_model["r2"] > 0.8
    # what is not there is named, with its reason
    assert list(found.data["missing"]) == ["sparse0"] and "sparse0: not to be had: " in found.measured
    assert [row["n"] for row in of_model["lengths"]] == [1, 3, 8, 15, 25, 30]  # the context ends
    # it fails, and where it was said to, or beside that
    tried = [1, 3, 8, 15, 25, 30, None]
    places = {key: tried.index(of_model["fails"][key]["nested"]) for key in ("predicted", "circuit", "model")}
    assert places["model"] < 6 and places["circuit"] < 6 and abs(places["predicted"] - places["circuit"]) <= 1
    assert of_model["fails"]["model"]["flat"] is None  # an average that falls misleads nested ones alone
    p = [row["circuit"]["nested"] for row in of_model["lengths"]]
    assert p == sorted(p, reverse=True)
    # a bracket in a comment counts for a little
    for key in ("circuit", "predicted", "model"):
        before, after = of_model["remark"][key]
        assert after > before
    assert len(figures.picture(figures_lists.draw_fig8, found.data)) > 5000
    # nothing to be had is a row as well
    monkeypatch.setattr(figures_lists, "known", lambda cfg: "no")
    monkeypatch.setattr(Lab, "circuits", lambda self, wanted: [None for _ in wanted])
    none = figures_lists.fig8(lab)
    assert "long0: not to be had: no" in none.measured and len(figures.picture(figures_lists.draw_fig8, none.data)) > 3000


def test_a_remark_differs_in_one_token_alone():
    tokenizer = load_tokenizer()
    plain, bracket = (tokenizer.encode_ordinary(text) for text in figures_lists.REMARK)
    assert len(plain) == len(bracket) == 1
    r = random.Random(0)
    for _ in range(50):
        for prompt in figures_lists.lists(2, remark=True).prompts(r):
            assert tokenizer.encode_ordinary(prompt).count(plain[0]) == 1


def test_averages_are_what_the_first_attention_gathers(tmp_path, monkeypatch):
    patched(monkeypatch)
    lab = made_lab(tmp_path)
    model = random_model(sink=True, afrac=0.5, keep=0.9)
    model.transformer.wpe.weight.zero_()
    finish(lab, "more", model, 2.0)
    cfg = lab.pruning_of("more", "toy", 5.0, "paper")
    (content,) = lab.circuits([cfg])
    assert content is not None
    case = figures_lab.case_in(lab, os.path.join(cfg.out_dir, "toy", "circuit.json"))
    for site in ("0.attn.q", "0.attn.k", "0.attn.v", "0.attn.act_in"):
        case.circuit.mask[site] |= torch.rand(case.circuit.mask[site].shape) < 0.7
    case = replace(case)  # with what hangs on the mask
    tables = figures_lists.first_attention(case)
    seen = {}

    def node(site, x):
        seen[site] = case.nodes(site, x)
        return seen[site]

    with torch.no_grad():
        case.reduced.run(case.reduced.embed(case.heldout.ids), nodes=node)
    rows = torch.arange(len(case.heldout.ids))
    gathered = seen["0.attn.y"][rows, case.heldout.last][:, case.circuit.mask["0.attn.v"]]
    assert figures_lists.averaged(case, tables, case.heldout) == pytest.approx(gathered.numpy(), abs=1e-5)
    case.model.transformer.wpe.weight[1, 0] = 1.0
    with pytest.raises(ValueError, match="has positions"):
        figures_lists.first_attention(case)


# --- the table of runs ----------------------------------------------------------------------------

def settings_of(lab: Lab, name: str) -> TrainConfig:
    scripts = {"train.py": TrainConfig, "bridge.py": BridgeConfig, "-m tools.hard_concrete": HardConcreteConfig}
    script = lab.runs[name].script
    options = lab.command(name)[len(script.split()):]
    return parse(scripts[script], [option.replace("--config=", f"--config={ROOT}/") for option in options])


def test_every_run_of_the_table_is_a_command_that_its_script_takes():
    lab = figures.lab_of(figures.FiguresConfig())
    settings = {name: settings_of(lab, name) for name in lab.runs}
    for name, figure in figures.FIGURES.items():
        assert set(figure.runs) <= lab.runs.keys(), name
    assert all(run.after == () or run.after[0] in lab.runs for run in lab.runs.values())
    assert len({tuple(lab.command(name)) for name in lab.runs}) == len(lab.runs)
    assert len(figures.GRID) == 12 and len({cfg.seed for cfg in (settings[f"sparse{n}"] for n in range(3))}) == 3
    # at a fixed L0 both matrices and embeddings keep their numbers of nonzeros, whatever the width
    for share in figures.SHARES:
        counts = []
        for width in figures.WIDTHS:
            cfg = settings[figures.name_of(width, share)]
            with torch.device("meta"):
                model = GPT(train.model_config(cfg, 2048))
            rows = tensors(cfg, model)
            counts.append((sum(l0 for name, *_, l0 in rows if ".h." in name and name.endswith("weight")),
                           sum(l0 for name, *_, l0 in rows if "wte" in name or "lm_head" in name)))
        assert [x for pair in counts for x in pair] == pytest.approx([*counts[0]] * len(counts), rel=0.01)
    demo = settings_of(lab, "sparse0")
    wanted = parse(TrainConfig, [f"--config={ROOT}/configs/demo.toml"])
    free = dict(out_dir="", log_interval=1, eval_interval=1, save_interval=1)
    assert replace(demo, **free) == replace(wanted, **free)
    assert figures.expected(lab, list(figures.FIGURES)) <= 300  # minutes on two cores


def test_configs_of_figures_are_all_used():
    used = {run.config for run in figures.table().values()}
    assert {f"configs/figures/{path.name}" for path in (ROOT / "configs/figures").glob("*.toml")} <= used
    for path in used:
        tomllib.loads((ROOT / path).read_text())


def test_the_rate_without_its_factor(tmp_path):
    data = write_data(tmp_path / "data")
    rates = {}
    for sharkfin in ("true", "false"):
        out = tmp_path / sharkfin
        assert train.main(argv(data, out, sharkfin=sharkfin, eval_interval=12, eval_tokens=64)) == 0
        rates[sharkfin] = [(e["lr"], e["density"]) for e in map(json.loads, (out / "log.jsonl").read_text().splitlines())]
    for (lr, density), (plain, same) in zip(rates["true"], rates["false"], strict=True):
        assert density == same and lr == pytest.approx(plain * math.sqrt(0.2 / density))


@pytest.mark.parametrize("module", [figures_sizes, figures_inside, figures_lists, figures_trust])
def test_a_figure_has_at_most_40_lines(module):
    functions = [n for n in ast.parse(Path(module.__file__).read_text()).body if isinstance(n, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 40} == {}
