"""The paper's evidence on small models, one command a figure.

    python -m tools.figures                    # all, in about five hours on 2 cores: make figures
    python -m tools.figures --only=fig2,fig10

Trains the models that a figure needs (the table below; train.py in child processes), prunes them,
measures, and writes docs/figures/NAME.png and NAME.json. docs/figures.md is made of those files
alone, so that no picture can differ from what is said of it. What is finished is not done again:
stop it whenever you like, and go on. A figure is measured anew where its models are others now, or
with --again.

How each is measured: tools/figures_sizes.py, figures_inside.py, figures_lists.py and
figures_trust.py. It needs pip install -r requirements-extra.txt
"""
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, nearest, parse, sole_user, write_atomic

from model_files import weights_hash
from tokens import read_data
from tools.figures_inside import (binarised, draw_binarised, draw_fig10, draw_tokens, fig10,
                                  tokens)
from tools.figures_lab import Found, Lab, Progress, Run
from tools.figures_lists import draw_fig8, fig8
from tools.figures_sizes import (ablations, appendix_d, draw_beside_recipe, draw_fig2, draw_fig3,
                                 draw_fig31, draw_fig32, fig2, fig3, fig31, fig32)
from tools.figures_trust import BRIDGES, critique, draw_critique, draw_fig9, fig9

FORMAT = 3    # of NAME.json: to be changed with how figures are measured
# Tasks that models of this size solve to 0.02 nats or less (docs/results.md).
TASKS = ("single_double_quote", "while_return_true", "if_equals", "enumerate_range")
TRIES = 3.5   # dense runs until one has the loss of a sparse one, expected


@dataclass
class FiguresConfig:
    only: str = ""                  # fig2,fig10; "" = all
    out_dir: str = "out/figures"    # of runs and circuits
    docs: str = "docs"              # of figures.md, and figures/ with pictures and numbers
    data: str = "data/tinypython"
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    jobs: int = bounded(2, at_least=1)  # processes at a time
    again: bool = False             # measure anew what is there


# --- the table of runs ---------------------------------------------------------------------------

# width -> minutes on one core
WIDTHS = {64: 4, 96: 5, 128: 6, 160: 7}
SHARES = (0.5, 1.0, 2.0)  # L0 as a multiple of that of the demo's model, of width 128
# The grid has j = 1: with the recipe's 4, the widest models have hardly a weight to place freely.
GRID_FLOOR = "--min_per_neuron=1"
# The recipe less one part. Without its factor the rate is too high or too low for some of the time:
# both that of the end and that of the dense beginning (times the root of the density) are tried.
ABLATIONS = {
    "no_anneal": ("sparse from the start", ("--anneal_start=0", "--anneal_end=0.001")),
    "no_factor": ("the rate without its factor", ("--sharkfin=false",)),
    "no_factor_low": ("the same, a fifth of the rate", ("--sharkfin=false", "--lr=0.015")),
    "no_floor": ("no j floor", ("--min_per_neuron=0",)),
    "no_topk": ("no AbsTopK", ("--afrac=0",)),
    "topk_eighth": ("AbsTopK 1/8", ("--afrac=0.125",)),
    "topk_half": ("AbsTopK 1/2", ("--afrac=0.5",)),
    "no_sinks": ("no sinks", ("--sink=false",)),
    # at the same L0: matrices and embeddings have 393,216 and 524,288 entries
    "embed_denser": ("denser embeddings, sparser matrices",
                     ("--embed_density=0.055", "--density=0.02")),
    "embed_sparser": ("sparser embeddings, denser matrices",
                      ("--embed_density=0.02", "--density=0.0667")),
}


def name_of(width: int, share: float) -> str:
    """The run of a place of the grid."""
    return f"width{width}_l0_{share:g}"


def options_of(width: int, share: float) -> tuple[str, ...]:
    """At a fixed L0: matrices grow with the square of the width, embeddings with the width (the
    published family, paper A.1)."""
    density = 0.04 * share * (128 / width) ** 2
    embeddings = 0.04 * share * 128 / width
    return (f"--d_model={width}", f"--density={density:.6g}", f"--embed_density={embeddings:.6g}",
            GRID_FLOOR)


def table() -> dict[str, Run]:
    """Every run, by name. {out}: the directory of all of them."""
    sparse = "configs/figures/sparse.toml"
    runs = {f"sparse{seed}": Run(sparse, (f"--seed={seed}",)) for seed in range(3)}
    runs["dense"] = Run("configs/figures/dense.toml", minutes=4)  # for `Lab.matched` to vary
    runs["long0"] = Run("configs/figures/long.toml", minutes=10)
    for width, minutes in WIDTHS.items():
        for share in SHARES:
            runs[name_of(width, share)] = Run(sparse, options_of(width, share), minutes)
    for name, (_, options) in ABLATIONS.items():
        runs[name] = Run(sparse, options)
    runs["hard_concrete"] = Run(sparse, minutes=10, script="-m tools.hard_concrete")
    for seed, name in enumerate(BRIDGES):
        dense = f"dense_{name}"
        runs[dense] = Run("configs/demo_dense.toml", (f"--seed={seed}",), minutes=3)
        runs[name] = Run("configs/demo_bridge.toml", (f"--seed={seed}", f"--dense={{out}}/{dense}"),
                         18, "bridge.py", (dense,))
    return runs


SPARSE = ("sparse0", "sparse1", "sparse2")
GRID = {(width, share): name_of(width, share) for width in WIDTHS for share in SHARES}


# --- the figures ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Figure:
    """One figure: what the paper says, and how it is measured and drawn here."""
    where: str            # in the paper
    says: str             # there
    measure: Callable[[Lab], Found]
    draw: Callable
    runs: tuple[str, ...]  # of the table
    minutes: float        # expected on two cores, beside those of its runs
    matched: int = 0      # so many sparse runs need a dense one of the same loss


FIGURES = {
    "fig10": Figure("Fig. 10", "kurtosis of the final residual stream rises with sparsity and with "
                    "size", fig10, draw_fig10, (*GRID.values(), "dense"), 0.5),
    "fig2": Figure("Fig. 2", "at the same validation loss, sparse circuits have 16 times fewer "
                   "edges than dense ones", fig2, draw_fig2, SPARSE, 40, matched=3),
    "tokens": Figure("3.2", "token losses of a dense and a sparse model correlate 0.93, of two "
                     "dense seeds 0.94", tokens, draw_tokens, SPARSE, 0.5, matched=3),
    "fig31": Figure("Fig. 31", "learned masks find smaller circuits than attribution, by a wide "
                    "margin at every loss", fig31, draw_fig31, SPARSE, 5),
    "fig32": Figure("Fig. 32", "circuits are sufficient, and necessary", fig32, draw_fig32,
                    SPARSE, 1),
    "binarised": Figure("Appendix C", "nodes can be replaced by steps of two levels", binarised,
                        draw_binarised, SPARSE, 4),
    "fig8": Figure("Fig. 8", "the circuit tells that long lists fail, and that an open bracket in "
                   "a comment misleads", fig8, draw_fig8, ("long0", *SPARSE), 8),
    "fig3": Figure("Fig. 3", "sparser is worse and smaller at a fixed size; larger is better on "
                   "both at a fixed L0", fig3, draw_fig3, tuple(GRID.values()), 28),
    "ablations": Figure("2.1, A.2", "annealing with the rate's factor and AbsTopK do their part; "
                        "the j floor has fewer dead neurons, at a slightly worse loss; sinks make "
                        "circuits cleaner at about the same loss",
                        ablations, draw_beside_recipe, (*SPARSE, *ABLATIONS), 24),
    "appendix_d": Figure("Appendix D", "gates on weights that are learnt with them (HardConcrete) "
                         "do slightly worse at the same L0", appendix_d, draw_beside_recipe,
                         (*SPARSE, "hard_concrete"), 4),
    "fig9": Figure("Fig. 9", "a dense model is steered by a sparse one's circuit", fig9, draw_fig9,
                   tuple(f"{kind}{run}" for run in BRIDGES for kind in ("dense_", "")), 8),
    "critique": Figure("Drori 2026", "(not the paper) masks fit nonsense and random weights too, "
                       "norms shift, zeros give smaller circuits", critique, draw_critique,
                       SPARSE[:1], 40, matched=1),
}


def chosen(only: str) -> list[str]:
    """The figures of --only, in their order. ValueError, in one line, for an unknown one."""
    names = only.split(",") if only else list(FIGURES)
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"unknown figure '{name}'; the nearest is '{nearest(name, FIGURES)}' "
                             f"(there are {', '.join(FIGURES)})")
    return names


def expected(lab: Lab, names: Iterable[str]) -> float:
    """Minutes that figures take, with the runs that are still to be trained."""
    minutes = sum(FIGURES[name].minutes for name in names)
    runs = lab.missing(dict.fromkeys(run for name in names for run in FIGURES[name].runs))
    minutes += sum(lab.runs[run].minutes for run in runs) / lab.jobs
    searches = max([FIGURES[name].matched for name in names], default=0)
    return minutes + searches * TRIES * lab.runs["dense"].minutes / lab.jobs


# --- one figure --------------------------------------------------------------------------------

def pyplot():
    """matplotlib.pyplot, for files alone. ValueError, in one line, where there is none."""
    try:
        import matplotlib
        matplotlib.use("Agg")  # no screen needed
        import matplotlib.pyplot
    except ImportError:
        raise ValueError("figures need matplotlib: pip install -r requirements-extra.txt") from None
    return matplotlib.pyplot


def made_of(lab: Lab, name: str) -> dict:
    """What a figure hangs on that can change: its models and the settings."""
    weights = {run: None if lab.diverged(run) else weights_hash(lab.folder(run))
               for run in FIGURES[name].runs}
    settings = {"tasks": lab.tasks, "pruning": lab.pruning, "commands":
                [lab.command(run) for run in ("dense", *FIGURES[name].runs)]}
    content = {"format": FORMAT, "data": lab.data_hash, "weights": weights, **settings}
    return json.loads(json.dumps(content))


def read_row(docs: str, name: str) -> dict | None:
    """The numbers of a figure as they were written; None where they, or the picture, are not
    there."""
    folder = Path(docs) / "figures"
    try:
        row = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        whole = row["name"] == name and {"measured", "models", "minutes", "data"} <= row.keys()
        return row if whole and (folder / f"{name}.png").exists() else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def make(lab: Lab, cfg: FiguresConfig, name: str) -> dict:
    """Measure and draw one figure, unless it is there; its row. ValueError or OSError, in one line,
    where it cannot be had."""
    figure = FIGURES[name]
    lab.train(figure.runs, may_diverge=True)  # a figure that cannot do without says so
    source = made_of(lab, name)
    row = read_row(cfg.docs, name)
    if row is not None and row.get("made_of") == source and not cfg.again:
        return row
    clock = time.monotonic()
    found = figure.measure(lab)
    row = {
        "name": name, "where": figure.where, "says": figure.says, "measured": found.measured,
        "models": found.models, "minutes": round((time.monotonic() - clock) / 60, 1),
        "table": found.table, "data": found.data, "made_of": source,
    }
    folder = os.path.join(cfg.docs, "figures")
    os.makedirs(folder, exist_ok=True)
    write_atomic(os.path.join(folder, f"{name}.png"), picture(figure.draw, found.data))
    write_atomic(os.path.join(folder, f"{name}.json"), json.dumps(row, allow_nan=False).encode())
    return row


def picture(draw: Callable, data: dict) -> bytes:
    """A figure as a PNG."""
    plt = pyplot()
    canvas = plt.figure(figsize=(7.5, 4.5), layout="constrained")
    draw(canvas, json.loads(json.dumps(data)))  # the numbers as the file has them
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=110)
    plt.close(canvas)
    return png.getvalue()


# --- the page ----------------------------------------------------------------------------------

HEAD = """# The paper's evidence, on small models

```
make figures               # all of it: about five hours on 2 cores, stopped and resumed at will
make figures ONLY=fig2
python -m tools.figures --only=fig2,fig10
```

This page is written by that command, from the numbers in docs/figures/. A figure that was not run
has no row. Losses are nats; several numbers are a median and a range. Unless a row says otherwise,
sizes are geometric means of edges over tasks, at 0.15 nats, from one start of mask learning, and
circuits are as the paper's pruner leaves them. The minutes are those of the last call that worked
on a figure, on 2 cores, without training its models. The models are tiny (2 layers, width 64 to
160, 7M tokens), the paper's thousands of times larger: where they agree, that is more than was to
be expected, and where they do not, that may be the reason. *Older* rows were measured by an earlier
version of this code, on earlier data: the command measures them anew.
"""


def cells(row: Iterable[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in row)} |"


def page_of(docs: str) -> str:
    """The content of docs/figures.md: of every figure that was run."""
    rows = [row for row in map(partial(read_row, docs), FIGURES) if row is not None]
    if not rows:
        return f"{HEAD}\nNone has been run yet.\n"
    lines = [HEAD, "| figure | the paper says | here | models | minutes |",
             "| --- | --- | --- | --- | --- |"]
    for row in rows:
        link = f"[{row['name']}](#{row['name']})"
        if row.get("made_of", {}).get("format") != FORMAT:
            link = f"*older*: {link}"
        lines.append(cells((f"{link}, {row['where']}", row["says"], row["measured"], row["models"],
                            f"{row['minutes']:g}")))
    for row in rows:
        lines.append(f"\n## {row['name']}\n\n![{row['says']}](figures/{row['name']}.png)")
        if row.get("table"):
            head, *others = row["table"]
            lines.append("\n".join(["", cells(head), "| --- " * len(head) + "|",
                                    *map(cells, others)]))
        lines.append(f"\n[Its numbers](figures/{row['name']}.json)")
    return "\n".join(lines) + "\n"


# --- the command -------------------------------------------------------------------------------

def text_of(row: dict) -> str:
    """A row for the terminal."""
    return (f"{row['name']} ({row['where']}), {row['minutes']:g} min\n"
            f"  the paper: {row['says']}\n  here: {row['measured']}\n  on {row['models']}")


def lab_of(cfg: FiguresConfig) -> Lab:
    """The models and tasks that the figures are about."""
    return Lab(out=cfg.out_dir, runs=table(), tasks=TASKS, grid=GRID,
               ablations={name: label for name, (label, _) in ABLATIONS.items()},
               data=cfg.data, tokenizer=cfg.tokenizer, jobs=cfg.jobs)


def make_all(lab: Lab, cfg: FiguresConfig, names: list[str]) -> int:
    """The figures in turn, the page after each; 2 where one could not be had."""
    lab.progress = Progress(expected(lab, names))
    print(f"{len(names)} figures in {cfg.docs}/figures: about {lab.progress.total:.0f} minutes on "
          "two quiet cores; what is finished is kept", flush=True)
    status = 0
    for name in names:
        print(f"== {name}: {FIGURES[name].says}", flush=True)
        try:
            row = make(lab, cfg, name)
        except ValueError as e:  # the others may do
            print(f"{name}: not made: {e}", file=sys.stderr, flush=True)
            status = 2
            continue
        write_atomic(os.path.join(cfg.docs, "figures.md"), page_of(cfg.docs).encode())
        print(text_of(row), flush=True)
        lab.progress.did(FIGURES[name].minutes, f"{cfg.docs}/figures/{name}.png")
    return status


def main(argv: list[str]) -> int:
    cfg = parse(FiguresConfig, argv)
    try:
        names = chosen(cfg.only)
        pyplot()  # before hours go by
        read_data(cfg.data, 1)
        with sole_user(cfg.out_dir):
            return make_all(lab_of(cfg), cfg, names)
    except BlockingIOError:
        die(f"another process makes figures in {cfg.out_dir}; wait for it, or give another "
            "--out_dir")
    except (ValueError, OSError) as e:
        die(e)


if __name__ == "__main__":
    as_script(main)
