"""From the data to the page on a tiny scale; the configs, the Makefile and the README name what
exists and works."""
import hashlib
import html
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bridge
import prune
import steer
import tasks
import train
import validate
import view
from config import parse
from data.tinypython.prepare import PrepareConfig
from data.tinypython.tokenizer import load_tokenizer
from model import GPT
from tools import tune
from tools.bench_memory import MemoryConfig
from tools.bench_model import BenchModelConfig
from tools.figures import FiguresConfig
from tools.formation import FormationConfig
from tools.hard_concrete import HardConcreteConfig
from tools.inspect import InspectConfig
from tools.planted import PlantedConfig
from tools.planted_cards import CardsConfig
from tools.published import PublishedConfig
from tools.refute import RefuteConfig
from tools.repeats import RepeatsConfig
from toy import TOY, Digits, hand_made, toy_setup

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
TASK, BLOCK = "bracket_counting", 64
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def python(*args, cwd=ROOT):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    ran = python("data/tinypython/prepare.py", f"--out={out}", "--tokens=200000")
    assert ran.returncode == 0, ran.stderr
    return out


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A model after a few steps of training. Its loss and its page are real; it solves no task."""
    out = tmp_path_factory.mktemp("run")
    assert train.main([
        f"--data_dir={data}", f"--out_dir={out}", "--device=cpu", "--n_layer=1", "--d_model=32",
        "--bigram=counts", f"--block_size={BLOCK}", "--batch_size=8", "--max_steps=6",
        "--density=0.2", "--eval_tokens=512", "--lr=0.01"]) == 0
    return out


@pytest.fixture(scope="module")
def circuit(run, data, tmp_path_factory):
    """circuit.json of the trained model with one more head channel, wired by hand, that looks for
    ` [[`."""
    tokenizer = load_tokenizer()
    model = GPT.load(str(run))
    solved = tmp_path_factory.mktemp("solved")
    one, two = (tokenizer.encode_ordinary(a)[0] for a in ("]\n", "]]\n"))
    block = model.transformer.h[0]
    wte = model.transformer.wte.weight
    head = model.lm_head.weight
    attn_in = block.attn.c_attn.weight
    attn_out = block.attn.c_proj.weight
    values = 2 * model.config.n_head * model.config.d_head  # the first value's row
    with torch.no_grad():
        for weight in (wte[:, :2], head[:, :2], attn_out[:2], block.mlp.c_proj.weight[:2],
                       attn_in[values], attn_out[:, 0]):
            weight.zero_()
        wte[tokenizer.encode_ordinary(" [[")[0], 0] = 20.0
        attn_in[values, 0] = 10.0
        attn_out[1, 0] = 10.0
        # no more than needed: at a loss of 0.000 no gradient tells which nodes matter
        head[[one, two], 1] = torch.tensor([-0.6, 0.6])
        model.final_logits_bias[[one, two]] = torch.tensor([3.0, 0.0])
        if model.bigram_table is not None:
            model.bigram_table[:, [one, two]] = 0.0
    model.save(str(solved))
    assert prune.main([
        f"--model={solved}", f"--task={TASK}", f"--data={data}", "--target_loss=0.3",
        "--mean_tokens=150000", "--steps=60", "--batch_pairs=8", "--train_pairs=64",
        "--fit_pairs=32", "--heldout_pairs=32", "--lr=0.05", "--k_coef=0.01"]) == 0
    return solved / TASK / "circuit.json"


# --- the pipeline -----------------------------------------------------------------------------

def test_every_stage_leaves_its_files(data, run, circuit):
    assert {"train.0000.bin", "val.0000.bin", "bigrams.npy", "meta.json"} <= {p.name for p in data.iterdir()}
    files = {"beeg_config.json", "final_model.pt", "train.toml", "log.jsonl", "state.pt"}
    assert files <= {p.name for p in run.iterdir()}
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    meta = json.loads((data / "meta.json").read_text())
    assert last["step"] == 6 and set(last["val_loss"]) == set(meta["val_parts"])
    assert circuit.is_file()


def test_the_circuit_of_the_pipeline_is_small_meets_its_target_and_is_needed(circuit):
    c = json.loads(circuit.read_text())
    nodes = sorted([site, i] for site, channels in c["nodes"].items() for i in channels)
    assert nodes == [["0.attn.act_in", 0], ["0.attn.resid_delta", 1], ["0.attn.v", 0]]
    assert c["n_edges"] == 2 and c["loss"] <= 0.3
    assert c["loss_heldout"] < 0.5 < c["validation"]["necessity"]


def test_the_circuits_means_are_those_of_the_pretraining_data(circuit, data):
    c = json.loads(circuit.read_text())
    tokens = np.fromfile(data / "train.0000.bin", "<u2").astype(np.int64)
    rows = torch.from_numpy(tokens[: len(tokens) // BLOCK * BLOCK]).view(-1, BLOCK)
    model = GPT.load(c["model"]["dir"])
    means = {}

    def average(site, x):
        means[site] = x.mean((0, 1))
        return x

    with torch.no_grad():
        model.run(model.embed(rows), nodes=average)
    for site, values in c["means"].items():
        mean = means[site]
        distance = (torch.tensor(values) - mean).norm()
        assert distance < 0.5 * mean.norm() + 0.02 * len(mean) ** 0.5, site


def test_the_page_shows_every_node_and_edge(circuit):
    c = json.loads(circuit.read_text())
    assert view.main([str(circuit)]) == 0
    page = circuit.with_suffix(".html").read_text()
    (held,) = json.loads(re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page, re.S)[1])["circuits"]
    assert held["nodes"] == c["nodes"] and len(held["edges"]) == c["n_edges"]
    text = html.unescape(page)
    assert TASK in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_a_target_that_a_coin_flip_meets_gives_an_empty_circuit_and_still_a_page(
        run, data, tmp_path):
    assert prune.main([
        f"--model={run}", f"--data={data}", f"--out_dir={tmp_path}", "--target_loss=5",
        "--mean_tokens=512", "--steps=2", "--batch_pairs=2", "--train_pairs=16", "--fit_pairs=8",
        "--heldout_pairs=16"]) == 0
    file = tmp_path / "single_double_quote" / "circuit.json"
    assert json.loads(file.read_text())["n_edges"] == 0
    assert view.main([str(file)]) == 0 and file.with_suffix(".html").stat().st_size > 1000


# --- pairs from a file, through every command -----------------------------------------------------

@pytest.fixture
def file_task(tmp_path, monkeypatch):
    """A toy model that does two tasks at once, a file of pairs of both, and the common options."""
    monkeypatch.setattr("tasks.load_tokenizer", lambda path: Digits())
    model = hand_made()
    block = model.transformer.h[0]
    block.mlp.c_fc.weight[1, 3] = 1.0  # answers 6 and 7: by way of an MLP
    block.mlp.c_proj.weight[4, 1] = 1.0
    model.lm_head.weight[6:8, 4] = torch.tensor([1.0, -1.0])
    toy_setup(tmp_path, model)

    r = random.Random(0)
    prompts = list(dict.fromkeys(TOY.prompts(r) for _ in range(120)))
    lines = []
    for i, pair in enumerate(prompts):
        answers = [6, "7"] if i % 3 == 0 else ["2", "3"]
        lines.append(json.dumps({"prompts": pair, "answers": answers}))
    path = tmp_path / "my pairs, é.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    options = [f"--model={tmp_path}", f"--data={tmp_path}", f"--task={path}", "--target_loss=0.4",
               "--mean_tokens=2048", "--fit_pairs=40", "--lr=0.03", "--k_coef=0.01"]
    return SimpleNamespace(path=path, n=len(prompts), options=options,
                           folder=tmp_path / "my_pairs__é")


def pruned(file_task):
    assert prune.main([*file_task.options, "--method=attribution", "--minimal"]) == 0
    return file_task.folder / "circuit.json"


def test_a_file_of_pairs_is_pruned_with_all_its_answers(file_task, capsys):
    c = json.loads(pruned(file_task).read_text())
    out = capsys.readouterr().out
    sha256 = hashlib.sha256(file_task.path.read_bytes()).hexdigest()
    assert c["task"] == "my_pairs__é" and c["settings"]["task"] == str(file_task.path)
    assert c["task_file"] == {"path": str(file_task.path), "sha256": sha256}

    # both ways to the answers: a circuit for the answers of one pair alone would lack one
    assert set(c["answers"][:2]) == {"2", "3"} and set(c["answers"][2:]) == {"6", "7"}
    nodes = {f"{site}.{i}" for site, channels in c["nodes"].items() for i in channels}
    assert {"0.attn.v.1", "0.attn.resid_delta.3", "0.mlp.post_act.1"} <= nodes
    assert {e[0] for e in c["unembedding"]} == {2, 3, 6, 7}
    assert c["loss"] < 0.4 and c["loss_heldout"] < 0.5 < c["validation"]["necessity"]
    assert {e["answer"] for e in c["examples"]} <= {"2", "3", "6", "7"}

    # as many pairs as there are, and one line that says so
    said = [line for line in out.splitlines() if "fewer pairs" in line]
    sizes = c["settings"]["train_pairs"], c["settings"]["heldout_pairs"]
    assert sum(sizes) + c["settings"]["apart_pairs"] == file_task.n and c["settings"]["apart_pairs"] == (sizes[0] + c["settings"]["apart_pairs"]) // 4
    assert c["validation"]["heldout_pairs"] == sizes[1]
    assert c["validation"]["minimal"]["pairs"] == c["settings"]["fit_pairs"] == 40
    apart = c["settings"]["apart_pairs"]
    assert len(said) == 1 and f"train_pairs={sizes[0]}, fit_pairs=40, apart_pairs={apart}, heldout_pairs={sizes[1]}" in said[0]


def test_the_circuit_of_a_file_is_validated_with_that_file_alone(file_task, capsys):
    circuit = pruned(file_task)
    options = [f"--circuit={circuit}", f"--data={circuit.parent.parent}", "--again"]
    assert validate.main(options) == 0
    card = json.loads(circuit.read_text())["validation"]
    assert card["beats_controls"]["shown"] in (True, False) and "exchanged_answers" in card["controls"] and card["resample"] > 0
    assert card["generalisation_longer"] is card["generalisation_names"] is None

    def refuses(says, *more):
        before = circuit.read_bytes()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            validate.main([*options, *more])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and says in err, err
        assert circuit.read_bytes() == before

    moved = file_task.path.with_name("elsewhere.jsonl")
    file_task.path.rename(moved)
    refuses("is not there; say where it is with --task=FILE")
    assert validate.main([*options, f"--task={moved}"]) == 0  # the very same pairs are drawn
    assert json.loads(circuit.read_text())["validation"] == card
    lines = moved.read_text(encoding="utf-8").splitlines()
    file_task.path.write_text("\n".join(lines[1:]), encoding="utf-8")
    refuses("are not those that it was found with")


def test_the_circuit_of_a_file_has_a_page(file_task):
    circuit = pruned(file_task)
    assert view.main([str(circuit)]) == 0
    page = circuit.with_suffix(".html").read_text(encoding="utf-8")
    (held,) = json.loads(re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page, re.S)[1])["circuits"]
    assert len(held["answers"]) == 4 and "my_pairs__é" in page


def test_settings_are_tuned_on_a_file_and_name_it(file_task, capsys):
    pytest.importorskip("optuna")
    options = [*file_task.options, "--steps=12", "--batch_pairs=8"]
    assert tune.main([*options, "--trials=1"]) == 0
    tuned = file_task.folder / "tuned.toml"
    assert parse(prune.PruneConfig, [f"--config={tuned}"]).task == str(file_task.path)
    assert prune.main([f"--config={tuned}"]) == 0 and (file_task.folder / "circuit.json").exists()

    # trials of an edited file are others; those of the same pairs elsewhere are not
    capsys.readouterr()
    text = file_task.path.read_text(encoding="utf-8")
    file_task.path.write_text(text.rsplit("\n", 1)[0], encoding="utf-8")
    assert tune.main([*options, "--trials=1"]) == 0
    assert "has 1 trials" not in capsys.readouterr().out
    assert tune.main([*options, "--trials=1"]) == 0
    assert "has 1 trials" in capsys.readouterr().out


# --- configs ----------------------------------------------------------------------------------

def loaded(path, *overrides):
    keys = set(tomllib.loads(path.read_text()))
    kind = train.TrainConfig
    if keys & {"task", "target_loss", "k_coef", "heldout_pairs"}:
        kind = prune.PruneConfig
    elif "dense" in keys:
        kind = bridge.BridgeConfig
    return parse(kind, [f"--config={path}", *overrides])


@each_config
def test_every_config_opens_with_a_comment_and_holds_only_valid_values(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20
    cfg = loaded(path)
    if isinstance(cfg, train.TrainConfig):
        train.check_run(cfg, 1)
    else:
        prune.check_prune(cfg)


@each_config
def test_every_training_config_starts_steps_and_saves_on_a_shrunken_batch(path, data, tmp_path):
    if not isinstance(loaded(path), train.TrainConfig):
        pytest.skip("a config of another script")
    out = tmp_path / "out"
    small = dict(n_layer=1, batch_size=2, grad_accum=1, block_size=16, max_steps=1, dtype="float32",
                 compile="false", eval_tokens=64, device="cpu", data_dir=data, out_dir=out)
    script = train
    if isinstance(loaded(path), bridge.BridgeConfig):
        script = bridge
        dense = small | dict(out_dir=tmp_path / "dense", density=1, afrac=0)
        assert train.main([f"--{k}={v}" for k, v in dense.items()]) == 0
        small |= dict(dense=tmp_path / "dense", bridge_rows=1)
    assert script.main([f"--config={path}", *(f"--{k}={v}" for k, v in small.items())]) == 0
    try:
        model = GPT.load(str(out))
        assert model.config.d_model == train.of_the_family(loaded(path)).d_model
        assert (out / "state.pt").stat().st_size > 0
    finally:
        shutil.rmtree(out)  # up to a gigabyte


# --- Makefile and README ------------------------------------------------------------------------

STAGES = ["prepare.py", "train.py --config=configs/demo.toml", "prune.py", "validate.py", "view.py"]
PRODUCTS = ["data/tinypython/meta.json", "out/demo/finished",
            "out/demo/single_double_quote/circuit.json"]

BRIDGE_STAGES = ["prepare.py", "train.py --config=configs/demo_dense.toml",
                 "bridge.py --config=configs/demo_bridge.toml"]
BRIDGE_PRODUCTS = ["data/tinypython/meta.json", "out/demo_dense/finished",
                   "out/demo_bridge/finished"]
for steered in ("single_double_quote", "while_return_true"):
    BRIDGE_STAGES += [
        f"prune.py --model=out/demo_bridge --task={steered}",
        f"steer.py --run=out/demo_bridge --dense=out/demo_dense --task={steered}"]
    BRIDGE_PRODUCTS += [f"out/demo_bridge/{steered}/circuit.json",
                        f"out/demo_bridge/steer/{steered}/steer.json"]


def make_demo(folder, *options, target="demo"):
    (folder / "requirements.txt").touch()
    ready = folder / ".venv/ready"
    ready.parent.mkdir(exist_ok=True)
    ready.touch()
    (folder / "requirements-extra.txt").write_text("matplotlib==0\n")
    command = ["make", "-n", "-f", ROOT / "Makefile", *options, target]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [line for line in ran.stdout.splitlines() if ".py" in line and "echo" not in line]


def test_make_demo_runs_its_stages_in_order(tmp_path):
    commands = make_demo(tmp_path)
    assert len(commands) == len(STAGES)
    assert all(stage in command for stage, command in zip(STAGES, commands))
    assert "--task=single_double_quote" in commands[2] and "--model=out/demo" in commands[2]
    assert all("out/demo/single_double_quote/circuit.json" in command for command in commands[3:])


@pytest.mark.parametrize("made", range(4))
def test_a_second_make_demo_redoes_only_what_is_missing(made, tmp_path):
    for product in PRODUCTS[:made]:
        (tmp_path / product).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / product).touch()
    commands = make_demo(tmp_path)
    assert [s for s in STAGES if any(s in c for c in commands)] == STAGES[made:]


@pytest.mark.parametrize("made", range(8))
def test_make_bridge_runs_its_stages_in_order_and_only_what_is_missing(made, tmp_path):
    for product in BRIDGE_PRODUCTS[:made]:
        (tmp_path / product).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / product).touch()
    commands = make_demo(tmp_path, target="bridge")
    stages = [next(s for s in BRIDGE_STAGES[::-1] if s in c) for c in commands]
    assert stages == BRIDGE_STAGES[made:]


def test_data_and_run_can_be_put_elsewhere(tmp_path):
    commands = make_demo(tmp_path, "OUT=elsewhere/run", "TASK=bracket_counting")
    assert "--model=elsewhere/run" in commands[2]
    assert all("elsewhere/run/bracket_counting/circuit.json" in c for c in commands[3:])


def test_the_makefile_names_only_files_that_exist():
    text = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\S+\.(?:py|toml|txt)\b", text)):
        name = name.replace("$(DATA)", "data/tinypython").removeprefix("--config=")
        assert (ROOT / name).exists(), name


KINDS = {
    "train.py": train.TrainConfig,
    "prune.py": prune.PruneConfig,
    "tasks.py": tasks.TasksConfig,
    "bridge.py": bridge.BridgeConfig,
    "steer.py": steer.SteerConfig,
    "validate.py": validate.ValidateConfig,
    "data/tinypython/prepare.py": PrepareConfig,
    "tools/bench.py": train.TrainConfig,
    "tools/bench_memory.py": MemoryConfig,
    "tools/bench_model.py": BenchModelConfig,
    "tools/figures.py": FiguresConfig,
    "tools/formation.py": FormationConfig,
    "tools/hard_concrete.py": HardConcreteConfig,
    "tools/inspect.py": InspectConfig,
    "tools/planted.py": PlantedConfig,
    "tools/planted_cards.py": CardsConfig,
    "tools/published.py": PublishedConfig,
    "tools/refute.py": RefuteConfig,
    "tools/repeats.py": RepeatsConfig,
    "tools/tune.py": tune.TuneConfig,
}


DOCS = ["README.md", "docs/circuits.md", "docs/figures.md", "docs/formation.md", "docs/programs.md", "docs/results.md",
        "docs/faithfulness.md", "docs/training.md", "docs/published.md", "docs/tasks.md", "docs/planted.md",
        "docs/speed.md", "docs/tools.md"]


@pytest.mark.parametrize("page", DOCS)
def test_commands_in_the_docs_name_files_and_options_that_exist(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")  # a command may go on in the next line
    started = r"^ *(?:python3?|torchrun --\S+) +(\S+\.py|-m tools\.\w+)(.*)$"
    commands = re.findall(started, text, re.M)
    assert commands
    for script, rest in commands:
        options = shlex.split(rest, comments=True)
        if script.startswith("out/"):
            continue  # a program that an earlier command of the page writes: a clone has none
        if script.startswith("-m "):
            script = script.removeprefix("-m ").replace(".", "/") + ".py"
        assert (ROOT / script).is_file(), script
        if script in KINDS:
            configs = f"--config={ROOT}/configs/"
            parse(KINDS[script], [o.replace("--config=configs/", configs) for o in options])
        else:
            source = (ROOT / script).read_text()
            named = [o.split("=")[0] for o in options if o.startswith("--")]
            assert all(f'"{name}"' in source for name in named), options
    for target in re.findall(r"\]\(([^):#]+)\)", text):  # links and pictures within the repository
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_readme_names_files_and_targets_that_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ *make (\w+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for cell in re.findall(r"^\| (`[^|]+`) \|", text, re.M):  # in the table of files: one or more
        for file in re.findall(r"`([^`]+)`", cell):
            assert (ROOT / file).exists(), file
