"""Retune the eight hyperparameters of mask learning for one model and one task (paper A.5), with optuna's TPE.

- A trial is one mask learning and discretising; its score is the circuit's edges at the target loss on training pairs
  (several targets: their geometric mean). Held-out pairs are not looked at, and trials do not minimise: that takes longest.
- The first trial is the settings as given, the second the paper's. Each later one depends on the seed and on the trials before
  it alone, so that a search that was stopped goes on as if it had not been.
- DIR/task/tune.journal holds the trials; those of other weights or other settings lie in it side by side and do not mix.
- DIR/task/tuned.toml, at the end, is a config for prune.py. A side path: pip install -r requirements-extra.txt

    python tune.py --model=out/demo --task=single_double_quote --trials=32 [--config=configs/demo_prune.toml] [--key=value]

"""
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import torch

from circuit import calibrate, calibrated, hash_of, load, loss_of, margins
from config import die, parse, to_toml, write_atomic
from prune import PruneConfig, check, constants_of, find
from tasks import TASKS, load_pairs

PAPER = dict(k_coef=1e-4, init_noise_scale=1e-2, init_noise_bias=1e-1, weight_decay=1e-3, lr=3e-3, beta2=0.95, warmup=5e-2, heaviside_temp=1.0)
AT_MOST = dict(init_noise_bias=1.0, beta2=1.0, warmup=1.0)  # of beta2: of 1 - beta2, which is what is searched
MISSED = 1e6  # the score of a circuit above the target, plus its loss: worse than any circuit, and the nearer the better


@dataclass
class TuneConfig(PruneConfig):
    trials: int = 32


def searched(cfg: PruneConfig) -> dict[str, float]:
    """The eight values as they are searched, on a log scale."""
    return {k: 1 - getattr(cfg, k) if k == "beta2" else getattr(cfg, k) for k in PAPER}


def settings(values: dict[str, float]) -> dict[str, float]:
    return {k: round(1 - v, 9) if k == "beta2" else v for k, v in values.items()}


def ranges(cfg: PruneConfig) -> dict[str, tuple[float, float]]:
    """Ten times below and above what is given, the default and the paper's centre."""
    centres = [searched(c) for c in (cfg, PruneConfig(), replace(cfg, **PAPER))]
    return {k: (min(c[k] for c in centres if c[k] > 0) / 10, min(10 * max(c[k] for c in centres), AT_MOST.get(k, math.inf))) for k in PAPER}


def tune(cfg: PruneConfig, n: int) -> None:
    """Bring the trials of a model and task to `n`; write the best settings to DIR/task/tuned.toml.

    ValueError or OSError, in one line, where that cannot be done. Ctrl-C: exit status 130; the next call goes on.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        die("tuning needs optuna: pip install -r requirements-extra.txt")
    if cfg.task == "all" or cfg.method != "learned" or n < 1:
        raise ValueError("tuning takes one task, not all; the learned method; and at least one trial")
    given = PruneConfig(**{f.name: getattr(cfg, f.name) for f in fields(PruneConfig) if f.name != "tune"})
    plain, folder = replace(given, minimal=False), os.path.join(cfg.out_dir or cfg.model, cfg.task)
    try:
        model, tokenizer = load(cfg.model, cfg.tokenizer, cfg.device)
        pairs = load_pairs(TASKS[cfg.task], tokenizer, cfg.train_pairs, "train", model.config.block_size, cfg.seed).to(cfg.device)
        whole = margins(model, pairs.take(torch.arange(cfg.fit_pairs, device=cfg.device)))
        if not (loss := loss_of(calibrated(whole, *calibrate(whole)))) <= min(cfg.target_loss):
            raise ValueError(f"the unpruned model does not solve {cfg.task}: loss {loss:.3f} nats on training pairs, "
                             f"target {min(cfg.target_loss)}; train longer, or raise --target_loss")
        constants = constants_of(model, cfg)

        os.makedirs(folder, exist_ok=True)
        journal, toml = os.path.join(folder, "tune.journal"), os.path.join(folder, "tuned.toml")
        fixed = {k: v for k, v in asdict(plain).items() if k not in {*PAPER, "model", "out_dir", "jobs", "tune"}}
        name = json.dumps({"sha256": hash_of(cfg.model), **fixed}, sort_keys=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(storage=optuna.storages.JournalStorage(JournalFileBackend(journal)), study_name=name, load_if_exists=True)
            done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        except (ValueError, KeyError) as e:
            raise ValueError(f"{journal} is damaged ({type(e).__name__}); remove it to search anew") from e
        span, clock, i = ranges(given), time.time(), len(done)
        if i:
            print(f"{journal} has {i} trials of this model and these settings")
        while i < n:
            study.sampler = optuna.samplers.TPESampler(seed=1000 * cfg.seed + i, constant_liar=False)
            if i < 2:
                first = searched((given, replace(given, **PAPER))[i])
                study.enqueue_trial({k: min(max(v, span[k][0]), span[k][1]) for k, v in first.items()})
            trial = study.ask()
            values = settings({k: trial.suggest_float(k, *span[k], log=True) for k in PAPER})
            circuits = list(find(model, pairs, constants, replace(plain, **values), lambda text: None))
            over = max((c.loss if math.isfinite(c.loss) else MISSED for c, t in zip(circuits, cfg.target_loss) if not c.loss <= t), default=None)
            score = math.prod(max(1, c.size[1]) for c in circuits) ** (1 / len(circuits)) if over is None else MISSED + over
            study.tell(trial, score)
            i, best = i + 1, study.best_value
            print(f"trial {i}/{n}  " + "; ".join(f"{c.size[0]} nodes  {c.size[1]} edges  loss {c.loss:.3f}" for c in circuits)
                  + f"  best so far {f'{best:.4g} edges' if best < MISSED else 'none'}  {(time.time() - clock) / (i - len(done)) * (n - i):.0f} s left", flush=True)
    except KeyboardInterrupt:
        print(f"\nstopped; the trials that ended are kept in {folder}, and the same command goes on", file=sys.stderr)
        raise SystemExit(130)
    if study.best_value >= MISSED:
        raise ValueError(f"no trial met {min(cfg.target_loss)} nats on {cfg.fit_pairs} training pairs; raise --target_loss, or try more trials")
    best = replace(given, **settings(study.best_params))
    write_atomic(toml, lambda f: f.write(f"# {study.best_value:.4g} edges on training pairs, the fewest of {i} trials\n{to_toml(best)}".encode()))
    print("\n" + "".join(line for line in to_toml(best).splitlines(keepends=True) if line.split(" = ")[0] in PAPER)
          + f"\npython prune.py {shlex.quote('--config=' + toml)}")


def main(argv: list[str]) -> int:
    cfg = parse(TuneConfig, argv)
    check(cfg)
    try:
        tune(cfg, cfg.trials)
    except (ValueError, OSError) as e:
        die(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
