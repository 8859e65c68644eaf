"""Retune the eight hyperparameters of mask learning for one model and one task (paper A.5), with
optuna's TPE.

- A trial is one mask learning and discretising; its score is the circuit's edges at the target loss
  on training pairs (several targets: their geometric mean). Held-out pairs are not looked at, and
  trials do not minimise: that takes longest.
- The first trial is the settings as given, the second the paper's. Each later one depends on the
  seed and on the trials before it alone: a search that was stopped goes on as if it had not been.
- DIR/task/tune.journal holds the trials; those of other weights or other settings lie in it side by
  side and do not mix.
- DIR/task/tuned.toml, at the end, is a config for prune.py.

    python -m tools.tune --model=out/demo --task=single_double_quote --trials=32

Options are those of prune.py, and --trials. It needs pip install -r requirements-extra.txt
"""
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse, to_toml, write_atomic

from circuit import Circuit
from find import find
from minimise import quiet
from model import GPT
from model_files import weights_hash
from prune import PruneConfig, check_prune, constants_of, geometric_mean
from tasks import (Pairs, Task, calibrate, calibrated, load_model, load_pairs, loss_of, margins,
                   task_of)

# The centres of the paper's own search; these eight are what is searched.
PAPER = dict(k_coef=1e-4, init_noise_scale=1e-2, init_noise_bias=1e-1, weight_decay=1e-3, lr=3e-3,
             beta2=0.95, warmup=5e-2, heaviside_temp=1.0)
# What is beyond has no meaning: a gate above 1 is clamped, a share is at most the whole. Of beta2,
# 1 - beta2 is what is searched and bounded: 0.95 and 0.995 differ tenfold, not by 5%.
AT_MOST = dict(init_noise_bias=1.0, beta2=1.0, warmup=1.0)
WIDTH = 10  # the search goes so many times below and above what is given, the default and the paper
# The score of a circuit above the target is this plus its loss: worse than any circuit that meets
# it, for no model here has as many edges; and the better the nearer.
MISSED = 1e6


@dataclass
class TuneConfig(PruneConfig):
    trials: int = bounded(32, at_least=1)  # in all, with those of earlier calls
    starts: int = bounded(1, at_least=1)   # of each trial


# --- what is searched ------------------------------------------------------------------------

def searched(cfg: PruneConfig) -> dict[str, float]:
    """The eight values as they are searched, on a log scale."""
    values = {key: getattr(cfg, key) for key in PAPER}
    values["beta2"] = 1 - values["beta2"]
    return values


def settings(values: dict[str, float]) -> dict[str, float]:
    """The inverse of `searched`."""
    beta2 = round(1 - values["beta2"], 9)  # 0.95, not 0.9500000000000001
    return {**values, "beta2": beta2}


def ranges(cfg: PruneConfig) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value that is searched, of each of the eight."""
    centres = [searched(c) for c in (cfg, PruneConfig(), replace(cfg, **PAPER))]
    found = {}
    for key in PAPER:
        values = [centre[key] for centre in centres]
        lowest = min(v for v in values if v > 0)  # zero has no place on a log scale
        found[key] = (lowest / WIDTH, min(max(values) * WIDTH, AT_MOST.get(key, math.inf)))
    return found


def score_of(circuits: list[Circuit], targets: tuple[float, ...]) -> float:
    """The geometric mean of the circuits' edges; past MISSED where one does not meet its target."""
    losses = []
    for circuit, target in zip(circuits, targets):
        if not circuit.loss <= target:  # nor does NaN
            losses.append(circuit.loss if math.isfinite(circuit.loss) else MISSED)
    if losses:
        return MISSED + max(losses)
    return geometric_mean(circuit.size[1] for circuit in circuits)  # as tasks' sizes are averaged


# --- the search ------------------------------------------------------------------------------

def needs_optuna():
    """The package. Exits with status 2 and one line where it is not installed."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        die("tuning needs optuna: pip install -r requirements-extra.txt")
    return optuna


def solved_pairs(cfg: PruneConfig, task: Task, model: GPT, tokenizer) -> Pairs:
    """The task's training pairs. ValueError where the whole model does not solve it on them."""
    T = model.config.block_size
    pairs = load_pairs(task, tokenizer, cfg.train_pairs, "train", T, cfg.seed)
    pairs = pairs.to(cfg.device)
    # calibrated, as its circuits will be
    whole = margins(model, pairs.first(cfg.fit_pairs))
    loss = loss_of(calibrated(whole, *calibrate(whole)))
    target = min(cfg.target_loss)
    if not loss <= target:
        raise ValueError(f"the unpruned model does not solve {task.name}: loss {loss:.3f} nats on "
                         f"training pairs, target {target}; train longer, or raise --target_loss")
    return pairs


def open_study(journal: str, plain: PruneConfig, task: Task):
    """The trials of this model and these settings in the file `journal`, and how many there are."""
    optuna = needs_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # neither what is searched parts two studies, nor what has no bearing on a trial
    free = {*PAPER, "model", "out_dir", "jobs"}
    fixed = {key: value for key, value in asdict(plain).items() if key not in free}
    if task.file is not None:  # its pairs are what counts, wherever they lie
        fixed["task"] = task.file.sha256
    name = json.dumps({"sha256": weights_hash(plain.model), **fixed}, sort_keys=True)
    try:
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(journal))
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    except (ValueError, KeyError) as e:
        raise ValueError(f"{journal} is damaged ({type(e).__name__}); "
                         "remove it to search anew") from e
    return study, len(done)


def next_trial(study, i: int, given: PruneConfig):
    """Trial number `i` of a study, counted from 0, and the settings that it tries."""
    span = ranges(given)
    # seeded by the trial's number, not drawn from one stream: a search that goes on draws the same
    sampler = needs_optuna().samplers.TPESampler(seed=1000 * given.seed + i, constant_liar=False)
    study.sampler = sampler
    # two starts that are known to be sane, moved into the ranges where they lie outside
    if i < 2:
        start = searched((given, replace(given, **PAPER))[i])
        study.enqueue_trial({k: min(max(v, span[k][0]), span[k][1]) for k, v in start.items()})
    trial = study.ask()
    values = {key: trial.suggest_float(key, *span[key], log=True) for key in PAPER}
    return trial, settings(values)


def run_trials(study, done: int, cfg: TuneConfig, given: PruneConfig, run: Callable) -> None:
    """Bring a study from `done` trials to `cfg.trials`: each is `run(settings)` and a line."""
    clock = time.monotonic()
    for i in range(done, cfg.trials):
        trial, values = next_trial(study, i, given)
        circuits = run(values)
        study.tell(trial, score_of(circuits, cfg.target_loss))

        sizes = [f"{c.size[0]} nodes  {c.size[1]} edges  loss {c.loss:.3f}" for c in circuits]
        best = "none" if study.best_value >= MISSED else f"{study.best_value:.4g} edges"
        n = i + 1
        # by the trials of this call alone: earlier ones took no time of it
        left = (time.monotonic() - clock) / (n - done) * (cfg.trials - n)
        print(f"trial {n}/{cfg.trials}  {'; '.join(sizes)}  best so far {best}  {left:.0f} s left",
              flush=True)


def tune(cfg: TuneConfig) -> None:
    """Bring the trials of a model and task to `cfg.trials`; write the best settings to
    DIR/task/tuned.toml.

    ValueError or OSError, in one line, where that cannot be done. After Ctrl-C the same command
    goes on: every trial that ended is kept.
    """
    needs_optuna()
    if cfg.task == "all" or cfg.method != "learned":
        raise ValueError("tuning takes one task, not all, and the learned method")
    # tuned.toml is a config for prune.py, which knows no --trials
    given = PruneConfig(**{f.name: getattr(cfg, f.name) for f in fields(PruneConfig)})
    plain = replace(given, minimal=False)  # in a trial; tuned.toml has it as given
    task = task_of(cfg.task)
    folder = os.path.join(cfg.out_dir or cfg.model, task.name)
    journal = os.path.join(folder, "tune.journal")
    model, tokenizer = load_model(cfg.model, cfg.tokenizer, cfg.device)
    pairs = solved_pairs(cfg, task, model, tokenizer)
    constants = constants_of(model, cfg)

    def run(values: dict[str, float]) -> list[Circuit]:
        return list(find(model, pairs, None, constants, replace(plain, **values), quiet))

    os.makedirs(folder, exist_ok=True)  # only now: bad input leaves nothing behind
    study, done = open_study(journal, plain, task)
    if done:
        print(f"{journal} has {done} trials of this model and these settings")
    run_trials(study, done, cfg, given, run)
    if study.best_value >= MISSED:
        raise ValueError(f"no trial met {min(cfg.target_loss)} nats on {cfg.fit_pairs} training "
                         "pairs; raise --target_loss, or try more trials")
    write_best(study, max(done, cfg.trials), given, os.path.join(folder, "tuned.toml"))


def write_best(study, n_trials: int, given: PruneConfig, path: str) -> None:
    """Write the best settings as a config for prune.py; print them, and the command for it."""
    # trials have one start, for time; what they found is worth as many as prune.py takes
    starts = max(given.starts, PruneConfig.starts)
    toml = to_toml(replace(given, **settings(study.best_params), starts=starts))
    head = f"# {study.best_value:.4g} edges on training pairs, the fewest of {n_trials} trials\n"
    write_atomic(path, (head + toml).encode())
    print()
    for line in toml.splitlines():
        if line.split(" = ")[0] in PAPER:
            print(line)
    print(f"\npython prune.py {shlex.quote('--config=' + path)}")


def main(argv: list[str]) -> int:
    cfg = parse(TuneConfig, argv)
    try:
        check_prune(cfg)
        tune(cfg)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
