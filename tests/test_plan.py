"""plan.py: its numbers are those of the run, and it allocates and writes nothing."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plan
import train
from config import parse, to_toml
from model import GPT
from optim import L0AdamW, param_groups
from tokens import LARGEST_TABLE
from tools import bench_memory

ROOT = Path(__file__).resolve().parent.parent


def config(*argv) -> train.TrainConfig:
    return train.of_the_family(parse(train.TrainConfig, list(argv)))


def on_meta(cfg) -> GPT:
    with torch.device("meta"):
        model = GPT(train.model_config(cfg, 2048))
    if cfg.positions == "none":
        model.transformer.wpe.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("options", [
    ["--sink=false", "--positions=added"], ["--positions=concat", "--bias_density=1", "--embed_density=0.1"],
    ["--bigram=none", "--density=1"],
], ids=str)
def test_parameters_and_nonzeros_are_those_of_a_model_after_a_step(options):
    cfg = config("--d_model=32", "--density=0.05", *options)
    model = GPT(train.model_config(cfg, 2048))
    if cfg.positions == "none":
        model.transformer.wpe.weight.requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    optimizer = L0AdamW(param_groups(model, cfg.density, cfg.embed_density, cfg.bias_density), lr=0.0)
    optimizer.set_schedule(0.0, lambda target: target)
    optimizer.step()
    rows = {name: (n, l0) for name, _, n, l0 in plan.tensors(cfg, on_meta(cfg))}
    counted = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.replace(".h.0.", ".h.*.").replace(".h.1.", ".h.*.")
            n, l0 = counted.get(key, (0, 0))
            dense = "ln_" in name or "sink" in name or "bigram" in name
            counted[key] = n + p.numel(), 0 if dense else l0 + int(p.count_nonzero())
    assert rows == counted


@pytest.mark.parametrize("e, pfrac, l0", [(1, 1 / 8, 0.9e6), (2, 1 / 4, 1.9e6), (4, 1 / 2, 3.7e6), (8, 1, 7.4e6), (16, 2, 14.8e6)])
def test_two_overrides_name_a_member_of_the_published_family(e, pfrac, l0):
    cfg = config(f"--config={ROOT}/configs/sweep.toml", f"--expansion={e}", f"--pfrac={pfrac}")
    model = on_meta(cfg)
    dense = ("bigram_table", "ln_")
    rows = [row for row in plan.tensors(cfg, model) if not any(part in row[0] for part in (*dense, "bias"))]
    # the paper's totals, 7.42M e^2, count the embeddings as if they grew with e^2 as well
    matrices = sum(row[2] for row in rows if ".h." in row[0])
    assert matrices == pytest.approx(8 * 12 * 256**2 * e**2) and cfg.max_steps * cfg.batch_size * cfg.block_size == pytest.approx(32e9, rel=1e-4)
    assert sum(row[3] for row in rows) == pytest.approx(l0, rel=0.04)  # the names are rounded


def test_the_paper_scale_configs_are_the_published_models():
    cfg = config(f"--config={ROOT}/configs/paper_475m.toml")
    assert (cfg.d_model, cfg.d_pos_emb, cfg.density, cfg.embed_density, cfg.sink) == (2048, 32, 1 / 1024, 1 / 128, True)
    # csp_yolo2 has room for 1,024 positions, of which it was trained on 256
    assert plan.learnt(on_meta(cfg)) + (1024 - 256) * 32 + 2048 == pytest.approx(419_122_688, abs=2048)
    cfg = config(f"--config={ROOT}/configs/authors_1.9M.toml")
    assert sum(row[3] for row in plan.tensors(cfg, on_meta(cfg))) == pytest.approx(1.9e6, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [(3, 256, 8), (1, 128, 16)], ids=["mostly sublayers", "mostly logits"])
def test_the_predicted_memory_is_near_the_measured(size, checkpointing):
    cfg = bench_memory.settings(bench_memory.MemoryConfig(device="cpu"), size, checkpointing)
    assert bench_memory.predicted(cfg) == pytest.approx(bench_memory.measured(cfg), rel=0.06)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_fits_is_the_most_that_fits(checkpointing):
    cfg = config("--d_model=512", "--n_layer=4", "--block_size=256")
    model = on_meta(cfg)
    for there in (1e9, 5e9, 40e9):
        rows = plan.rows_that_fit(cfg, model, there, checkpointing)
        assert plan.memory(cfg, model, rows, checkpointing).peak <= there < plan.memory(cfg, model, rows + 1, checkpointing).peak
    assert plan.rows_that_fit(cfg, model, 1e6, checkpointing) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_planning_the_largest_model_takes_no_memory_and_writes_nothing(tmp_path):
    code = ("import re, sys; sys.path.insert(0, sys.argv.pop(1)); import train; code = train.main(sys.argv[1:]); "
            "print(re.search('VmHWM: *([0-9]+)', open('/proc/self/status').read().replace('\\t', ' '))[1]); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), f"--config={ROOT}/configs/sweep.toml", "--expansion=16", "--pfrac=2",
                           "--plan"], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"WORLD_SIZE": "8"})
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    *lines, most = done.stdout.splitlines()
    assert int(most) < 1_000_000  # KiB: of 1.6B parameters, 6.4 GB, nothing was made
    assert "for a vocabulary of 2048 tokens" in lines[0]
    assert any(line.startswith("memory of each of 8 process(es), 64 sequences") for line in lines)


def test_a_name_of_the_family_and_another_width_are_refused(tmp_path, capsys):
    named = ["--expansion=1", "--pfrac=1"]
    for option in ("--d_model=64", "--density=0.5", "--n_head=2"):
        with pytest.raises(SystemExit) as stop:
            train.main([*named, option, "--plan"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and option.removeprefix("--").split("=")[0] in err
    # what a run has written names both, and they agree
    (tmp_path / "train.toml").write_text(to_toml(config(*named)))
    assert config(f"--config={tmp_path}/train.toml") == config(*named)


def test_of_a_large_vocabulary_no_counted_table_is_planned():
    """Evaluation makes none: of 50,257 tokens it would be 10 GB."""
    cfg = config("--d_model=32", "--bigram=none")
    weights = []
    for vocab in (LARGEST_TABLE, LARGEST_TABLE + 1):
        with torch.device("meta"):
            model = GPT(train.model_config(cfg, vocab))
        weights.append(plan.memory(cfg, model, 4, False).weights)
    assert weights[0] - weights[1] > 0.99 * 4 * LARGEST_TABLE**2


@pytest.mark.parametrize("options", [["--expansion=4"], ["--pfrac=1"], ["--expansion=2", "--pfrac=3"]], ids=str)
def test_half_a_name_of_the_family_is_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*options, "--plan"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "name no model" in err
