"""How far to trust a circuit: its faithfulness card, printed, and kept as `validation` in its file.

- Its lines (measures.py): harder ablations than those of pruning, the model beside the circuit, and
  prompts that pruning never saw; all but the idle parts on held-out pairs.
- Controls (controls.py) prune, with the same settings, where there is nothing to find; the card
  begins with how many times as many edges that takes. Each run is kept in the file as soon as it is
  done: stop it whenever you like, and only what is missing is run.
- A verdict in four words: sufficient, needed, beats nonsense, follows the model; each with its
  number and what was asked. What was not shown is named as well.
- A file that is truncated, edited, or of another model or other data is refused in one line, and
  not written.

    python validate.py --circuit=out/demo/single_double_quote/circuit.json
    python validate.py --circuit=out/demo --jobs=2          # out/demo/*/circuit.json, then a table
    python validate.py --circuit=out/demo --controls=false  # without the 21 of them
    python validate.py --circuit=out/demo --level=nonsense --control_seeds=1  # 3, minutes each

Paper 2.2 and Appendix E; the critique is Drori, "Weight-sparse circuits may be interpretable yet
unfaithful" (2026).
"""
import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, one_of, parse, sole_user

from case import Case, CaseConfig, case_of, check_data
from circuit_file import read_circuit, write_circuit
from controls import CONTROLS, Subject, factor_of, run_control
from data.tinypython.tokenizer import tokenizer_for, tokenizer_hash
from find import HELD_OUT
from measures import (DRAWS, POSITIONS, SUBSETS, TRIED, agreement, complement, frozen_norms,
                      generalisation, idle, necessity, necessity_refit, resample, resample_task,
                      standalone, sufficiency, zero_ablation)
from model import device_of
from processes import in_processes, result_or_reason

# What the verdict asks for, each stated beside its number. Held-out pairs may put a circuit above
# its target by HELD_OUT of find.py.
# Nats that the model loses without it, recalibrated, where a coin flip loses 0.693: two mechanisms
# for a task leave each other's logits tilted, and only that would look like a need.
NECESSARY = 0.35
BEATS = 3.0       # times its edges that learnable nonsense needs, in the luckiest run of any
# Correlation with the model where neither labels nor the last token tell: of no node it is 0.
FOLLOWS = 0.3

Say = Callable[[str], None]  # where progress goes, a line at a time


@dataclass
class ValidateConfig(CaseConfig):
    circuit: str = "out/demo/single_double_quote/circuit.json"  # or a directory of tasks' folders
    window: int = bounded(0, at_least=0)  # tokens of data at a time; 0 = as when it was pruned
    jobs: int = bounded(1, at_least=1)  # with a directory: processes at a time
    seed: int = bounded(0, at_least=0)  # of draws and halves; pairs have the circuit's own
    controls: bool = True           # prune where there is nothing to find (controls.py)
    level: str = one_of("all", "memorise", "nonsense", "wiring")  # which of them
    control_seeds: int = bounded(3, at_least=1)  # runs of each of the seven controls
    again: bool = False             # measure even where the file's card is complete


# --- the card --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Line:
    """A line of the card: two numbers, what they are called and their keys in the file."""
    name: str
    key: str
    beside: str
    beside_key: str
    strict: bool = False  # harder than what pruning asks: the verdict says if it misses the target
    note: str = ""        # why it is shown where nothing is asked of it


LINES = (
    Line("sufficiency", "sufficiency", "unpruned model", "unpruned_loss"),
    Line("necessity", "necessity", "recalibrated", "necessity_refit"),
    Line("idle parts (no nats)", "idle", "of", "idle_of"),
    Line("without AbsTopK", "standalone", "recalibrated", "standalone_refit"),
    Line("resample in the task", "resample_task", "recalibrated", "resample_task_refit",
         strict=True),
    Line("half the complement", "complement_random", f"worst of {SUBSETS}", "complement_worst",
         strict=True),
    Line("frozen norms", "frozen_norms", "recalibrated", "frozen_norms_refit", strict=True),
    Line("agreement (no nats)", "agreement", "beyond the last token", "agreement_beyond"),
    Line("longer prompts", "generalisation_longer",
         "unpruned model", "generalisation_longer_unpruned", strict=True),
    Line("other names", "generalisation_names",
         "unpruned model", "generalisation_names_unpruned", strict=True),
    Line("resample anywhere", "resample", "recalibrated", "resample_refit",
         note="not asked: values of other text are noise at thousands of nodes at once"),
    Line("zero ablation", "zero_ablation", "recalibrated", "zero_ablation_refit",
         note="not asked: it was found among means, and many nodes are never near zero"),
)
# what fills the lines after sufficiency and necessity: each gives the keys of a line or two
MEASURES = (necessity_refit, idle, standalone, resample_task, complement, frozen_norms, agreement,
            generalisation, resample, zero_ablation)
LEVELS = {"memorise": "memorising", "nonsense": "nonsense", "wiring": "untrained wiring"}


def lines_of(case: Case, stated: dict, say: Say = print) -> dict:
    """The card but for its controls. ValueError where the circuit lacks the losses that its file
    states."""
    card = {"sufficiency": sufficiency(case), "necessity": necessity(case)}
    for key, loss in card.items():
        said = stated.get(key)
        # another machine adds up in another order; an edit changes more than that
        if not (isinstance(said, (int, float)) and abs(said - loss) <= 0.002 + 0.01 * loss):
            raise ValueError(
                f"it states a {key} of {said} nats, but has {loss:.4f}: it was edited, or the "
                "tokenizer or tasks.py are others now; prune the task again"
            )
    for measure in MEASURES:
        say(f"  {measure.__name__.replace('_', ' ')}")
        card |= measure(case)
    return card


def missing_controls(runs: dict[str, list[dict]], seeds: int, level: str) -> list[tuple[str, int]]:
    """The runs (control's key, seed) of a level that a card lacks; the n-th of a list has seed n,
    and an empty one says that the task has no such control."""
    missing = []
    for key, control in CONTROLS.items():
        if level in ("all", control.level) and runs.get(key) != []:
            missing += [(key, seed) for seed in range(len(runs.get(key, [])), seeds)]
    return missing


def with_control(case: Case, runs: dict[str, list[dict]], key: str, seed: int,
                 say: Say = print) -> dict[str, list[dict]]:
    """A card's controls with one run more."""
    # its own means, over the data that this command was given
    subject = Subject(case.model, case.task, case.tokenizer, case.constants, case.settings,
                      case.train, case.heldout, os.path.dirname(case.data))

    def say_further_in(text: str) -> None:
        say(f"    {text.strip()}")

    say(f"  control: {CONTROLS[key].name}, seed {seed}")
    run = run_control(subject, key, seed, case.circuit.size[1], say_further_in)
    return runs | {key: [] if run is None else [*runs.get(key, []), run]}


def verdict(card: dict, target: float, n_edges: int) -> dict:
    """What was shown and what was not, in four words: each with its number, the threshold beside it
    and whether the number passes (None: not measured); and all of it in a sentence."""
    level = factor_of(card.get("controls", {}), n_edges, "nonsense")
    shown = {
        "sufficient": claim(card["sufficiency"], at_most=target + HELD_OUT),
        "needed": claim(card.get("necessity_refit"), at_least=NECESSARY),
        "beats_controls": claim(None if level is None else level.least, at_least=BEATS),
        "follows": claim(card.get("agreement_beyond"), at_least=FOLLOWS),
    }
    nonsense = "its controls not run"
    if level is not None:
        nonsense = f"nonsense needs {times(level.least)} its edges"
        if level.met == 0:
            nonsense = f"nonsense met the target in none of {level.runs} runs"
        if level.unsettled:  # with more steps it might have met it, with however few edges
            nonsense += f", but {level.unsettled} of {level.runs} runs were still getting better"
            shown["beats_controls"]["shown"] = False
    said = {
        "sufficient": f"sufficient ({show(card['sufficiency'])} nats on held-out pairs",
        "needed": f"needed ({show(card.get('necessity_refit'))} nats without it, recalibrated",
        "beats_controls": f"beats nonsense ({nonsense}",
        "follows": "follows the model "
                   f"(correlation {show(card.get('agreement_beyond'))} within one answer, beyond "
                   "what the last token says",
    }
    yes = []
    no = []
    for key, result in shown.items():
        passed = yes if result["shown"] else no
        passed.append(f"{said[key]}; asked: {result['asked']})")
    text = f"Shown: {', '.join(yes) or 'nothing'}."
    if no:
        text += f" Not shown: {', '.join(no)}."
    if card.get("idle"):
        text += f" {card['idle']} of {card['idle_of']} parts tried can go alone."
    # a line that was not stated, None, is no failure
    past = [line.name for line in LINES if line.strict and (card.get(line.key) or 0) > target]
    if past:
        text += f" Its loss exceeds the target with {', '.join(past)}."
    return {**shown, "verdict": text}


def claim(value: float | None, at_least: float | None = None,
          at_most: float | None = None) -> dict:
    """Whether a number passes its threshold; None where there is no number."""
    if at_most is not None:
        passes = value is not None and value <= at_most  # NaN is no proof
        asked = f"at most {at_most:.3g}"
    else:
        passes = value is not None and value >= at_least
        asked = f"at least {at_least:.3g}"
    # JSON has no infinity
    number = value if value is None or math.isfinite(value) else None
    return {"shown": None if value is None else passes, "value": number, "asked": asked}


def times(factor: float) -> str:
    return f"{factor:.1f} times" if math.isfinite(factor) else "more than any number of"


def show(x) -> str:
    if isinstance(x, int):
        return str(x)
    return f"{x:.3f}" if isinstance(x, float) else "n/a"


def card_text(content: dict) -> str:
    """The card of a circuit file's content, for the terminal."""
    v = {**content, **content["validation"]}  # unpruned_loss stands outside the card
    rows = [f"{v['task']}: {v['n_nodes']} nodes, {v['n_edges']} edges, "
            f"target {v['target_loss']} nats"]
    runs = v.get("controls", {})
    for level, name in LEVELS.items():  # the number that counts comes first
        factor = factor_of(runs, v["n_edges"], level)
        if factor is not None:
            row = f"  {name}: {factor.met} of {factor.runs} runs met the target"
            if factor.met:
                row += f", with {times(factor.least)} its edges at least"
                if math.isfinite(factor.median):
                    row += f" ({times(factor.median)} in the median)"
            if factor.unsettled:
                row += f"; {factor.unsettled} were still getting better"
            rows.append(row)
    for line in LINES:
        beside = f"{line.beside} {show(v.get(line.beside_key))}"
        note = f"   ({line.note})" if line.note else ""
        rows.append(f"  {line.name:20} {show(v[line.key]):>6}   {beside}{note}")
    for key, control in CONTROLS.items():
        for run in runs.get(key, []):
            met = "met" if run["met"] else "not met"
            rows.append(f"  {control.name:22} {show(run['loss']):>6}   {met} with "
                        f"{run['nodes']} nodes, {run['edges']} edges; at {v['n_edges']} edges "
                        f"{show(run['loss_at_size'])}; held out {show(run['loss_heldout'])}")
    rows.append(f"  {v['verdict']}")
    return "\n".join(rows)


# --- the command -----------------------------------------------------------------------------

# What the runs of controls hang on, of `measured_with`; their seeds are their own.
OF_CONTROLS = ("circuit", "data", "tokenizer", "window")


def circuit_hash(content: dict) -> str:
    """Tells a file's circuit from others, whatever its card says."""
    keys = ("nodes", "edges", "means", "logit_scale", "logit_shift", "target_loss", "settings")
    parts = [content[key] for key in keys] + [content["model"]["sha256"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def measured_with(case: Case, content: dict) -> dict:
    """What a card hangs on; where this is as it was, a card need not be measured again."""
    settings = case.settings
    return {
        "circuit": circuit_hash(content),
        "data": case.data_hash,
        "tokenizer": tokenizer_hash(tokenizer_for(settings.model, settings.tokenizer)),
        "seed": case.seed, "window": settings.window,
        "positions": POSITIONS, "draws": DRAWS, "subsets": SUBSETS, "tried": TRIED,
        "refitted_on": settings.fit_pairs,
    }


def validate(cfg: ValidateConfig, say: Say = partial(print, flush=True)) -> dict:
    """Measure what a file's card lacks, write it, and print the card; returns the content. Controls
    that are not asked for stay as they are.

    ValueError or OSError, in one line, where that cannot be done; the file then has the controls
    that were run until then.
    """
    content = read_circuit(cfg.circuit)
    try:
        with sole_user(os.path.dirname(cfg.circuit) or "."):
            complete(cfg, content, say)
    except BlockingIOError:
        raise ValueError(f"{cfg.circuit}: another process validates it; wait for that") from None
    except ValueError as e:
        raise ValueError(f"{cfg.circuit}: {e}") from e
    say(card_text(content))
    return content


def complete(cfg: ValidateConfig, content: dict, say: Say) -> None:
    """Measure what the card of a circuit's content lacks, there and in its file."""
    case = case_of(cfg, content, cfg.window, cfg.seed)
    check_data(case, content)
    card = content["validation"]
    with_what = measured_with(case, content)
    old = card.get("card", {})
    same_lines = all(old.get(key) == value for key, value in with_what.items())
    same_controls = all(old.get(key) == with_what[key] for key in OF_CONTROLS)
    runs = card.get("controls", {}) if same_controls else {}
    if cfg.again and cfg.controls:
        runs = {key: of_key for key, of_key in runs.items()
                if cfg.level != "all" and key in CONTROLS and CONTROLS[key].level != cfg.level}

    missing = missing_controls(runs, cfg.control_seeds, cfg.level) if cfg.controls else []
    whole = same_lines and {"verdict", *(line.key for line in LINES)} <= card.keys()
    if cfg.again or not whole or missing:
        say(f"validating {cfg.circuit}")
    if cfg.again or not whole:
        card = {**card, **lines_of(case, card, say), "card": with_what}
        write_card(cfg.circuit, content, card, runs)
    while missing:
        runs = with_control(case, runs, *missing[0], say)
        write_card(cfg.circuit, content, card, runs)
        missing = missing_controls(runs, cfg.control_seeds, cfg.level)
    # of a card that was whole already, as its numbers have it: not what the file says of them
    stated = content["validation"]
    content["validation"] = stated | verdict(stated, content["target_loss"], content["n_edges"])


def write_card(path: str, content: dict, card: dict, runs: dict[str, list[dict]]) -> None:
    """Put a card, its controls and the verdict of both into a circuit's content, and write it.
    ValueError where the file has another circuit by now."""
    if circuit_hash(read_circuit(path)) != circuit_hash(content):
        raise ValueError("it was pruned anew meanwhile, and stays as it is; validate it again")
    card = {key: value for key, value in card.items() if key != "controls"}
    if runs:
        card["controls"] = runs
    target = content["target_loss"]
    content["validation"] = card | verdict(card, target, content["n_edges"])
    write_circuit(path, content)


def validate_named(cfg: ValidateConfig, path: str) -> dict:
    """One circuit of several: each line that it prints stands under its task's name."""
    name = os.path.basename(os.path.dirname(path))

    def say(text: str) -> None:
        for row in text.split("\n"):
            print(f"[{name}] {row}", flush=True)

    return validate(replace(cfg, circuit=path), say)


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def print_table(contents: list[dict]) -> None:
    """A row for each circuit file's content."""
    print()
    names = [line.name for line in LINES]
    names += [f"{name}: times its edges, met" for name in LEVELS.values()]
    names += ["sufficient", "needed", "beats nonsense", "follows"]
    print_row("task", "nodes, edges", *names)
    print("|---" * (len(names) + 2) + "|")
    for content in contents:
        v = content["validation"]
        cells = [show(v[line.key]) for line in LINES]
        for level in LEVELS:
            factor = factor_of(v.get("controls", {}), content["n_edges"], level)
            cells.append("–" if factor is None
                         else f"{factor.least:.1f}, {factor.met}/{factor.runs}")
        for key in ("sufficient", "needed", "beats_controls", "follows"):
            cells.append({True: "yes", False: "no", None: "–"}[v[key]["shown"]])
        size = f"{content['n_nodes']}, {content['n_edges']}"
        print_row(content["task"], size, *cells)


def validate_all(cfg: ValidateConfig, paths: list[str]) -> int:
    """Every circuit, `jobs` at a time, then one table; exit status 2 where any was refused."""
    one = partial(validate_named, cfg)
    if cfg.jobs > 1:
        results = in_processes(one, paths, cfg.jobs)
    else:  # in this process, which has loaded PyTorch already
        results = [result_or_reason(one, path) for path in paths]
    print_table([result for result in results if isinstance(result, dict)])
    refused = [result for result in results if isinstance(result, str)]
    for reason in refused:
        print(f"validate.py: {reason}", file=sys.stderr)
    return 2 if refused else 0


def main(argv: list[str]) -> int:
    cfg = parse(ValidateConfig, argv)
    try:
        cfg = replace(cfg, device=device_of(cfg.device))
        if not os.path.isdir(cfg.circuit):
            validate(cfg)
            return 0
        paths = sorted(glob.glob(os.path.join(glob.escape(cfg.circuit), "*", "circuit.json")))
        if paths:
            return validate_all(cfg, paths)
    except (ValueError, OSError) as e:
        die(e)
    die(f"no {cfg.circuit}/*/circuit.json; prune.py writes them")


if __name__ == "__main__":
    as_script(main)
