"""Fig. 8 of tools/figures.py: where bracket counting fails, said beforehand from the circuit.

A circuit that averages over the tokens so far, in attention without positions, is misled by
whatever changes the average: by long lists, and by brackets that open nothing. `fig8` predicts both
from tables of what the circuit's first attention makes of each token, before anything is run, and
then measures them, in the circuit and in the whole model. `draw_fig8` draws it from its numbers
alone.
"""
import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from case import Case
from circuit import Nodes
from data.tinypython.filler import NOUNS, function, number, variable
from model import record
from tasks import Pairs, Task, answer_id, calibrated, load_pairs, margins
from tools.figures_lab import Found, Lab, case_in, known

BRACKETS = "bracket_counting"
TARGET = 0.3        # nats: models of this size hardly come to the paper's 0.15 on this task
LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 30, 35, 40, 45, 50)  # of lists; the task's go to 6
LISTS = 64          # prompts of each length
SHORT = 2           # elements of the lists behind a comment
REMARK = (" at", " [")  # the token of a comment that is exchanged, and for which
WHERE = {"predicted": "predicted", "circuit": "in the circuit", "model": "in the model"}


# --- prompts -----------------------------------------------------------------------------------

def lists(n: int, remark: bool = False) -> Task:
    """Flat and nested lists of n elements as the task has them, behind little else, so that long
    ones have room; remark: behind a comment as well, in which REMARK's first token stands once."""
    def prompts(r) -> tuple[str, str]:
        before = function(r, high=1)
        if remark:
            before += f"    # see{REMARK[0]} {number(r)} for the {r.choice(NOUNS)}\n"
        row = ", ".join(number(r) for _ in range(n))
        start = f"{before}    {variable(r)} = "
        return f"{start}[{row}", f"{start}[[{row}"

    name = f"lists of {n} and a remark" if remark else f"lists of {n}"
    return Task(name, "close a list by its nesting depth", ("]\n", "]]\n"), prompts)


def list_pairs(case: Case, n: int, remark: bool = False) -> Pairs:
    """LISTS pairs of `lists`. ValueError where the context is too short for them."""
    T = case.model.config.block_size
    return load_pairs(lists(n, remark), case.tokenizer, LISTS, "heldout", T)


# --- the prediction ----------------------------------------------------------------------------

@torch.no_grad()
def first_attention(case: Case) -> Nodes:
    """What the circuit's first attention makes of each token of the vocabulary: queries, keys and
    values, each (vocab, channels). Without positions they hang on nothing else. ValueError where
    there are positions."""
    config = case.model.config
    if config.d_pos_emb is not None or case.model.transformer.wpe.weight.any():
        raise ValueError(f"{case.settings.model} has positions: its first attention is no function "
                         "of tokens alone")
    every = torch.arange(config.vocab_size).unsqueeze(1)  # prompts of one token
    seen = {}
    keep = record(seen)

    def node(site: str, x: Tensor) -> Tensor:
        return keep(site, case.nodes(site, x))  # as it is once the other nodes are held

    case.reduced.sublayers[0](case.reduced.embed(every), node)
    return {name: seen[f"0.attn.{name}"].squeeze(1) for name in "qkv"}


def averaged(case: Case, tables: Nodes, pairs: Pairs) -> Tensor:
    """What the value nodes of the circuit's first attention gather at the last token of each
    prompt, (2n, nodes): by arithmetic from the tables of `first_attention`, nothing is run."""
    c = case.model.config
    by_head = {name: table.unflatten(-1, (c.n_head, c.d_head)) for name, table in tables.items()}
    rows = torch.arange(len(pairs.ids))
    query = by_head["q"][pairs.ids[rows, pairs.last]]  # (2n, H, D)
    scores = torch.einsum("nhd,nthd->nht", query, by_head["k"][pairs.ids]) / math.sqrt(c.d_head)
    padding = torch.arange(pairs.ids.shape[1]) > pairs.last[:, None]
    scores = scores.masked_fill(padding[:, None], -math.inf)
    sinks = case.model.transformer.h[0].attn.attn_imp
    if sinks is not None:  # one more place to look at, whose value is zero
        sink = sinks.sink_logit.view(1, -1, 1).expand(len(scores), -1, 1)
        scores = torch.cat([scores, sink], -1)
    share = scores.softmax(-1)[..., : pairs.ids.shape[1]]
    gathered = torch.einsum("nht,nthd->nhd", share, by_head["v"][pairs.ids]).flatten(1)
    return gathered[:, case.circuit.mask["0.attn.v"]]


def toward_second(margin: Tensor) -> Tensor:
    """Right minus wrong logit of each prompt (2n,) -> second answer's minus first's."""
    sign = 2.0 * (torch.arange(len(margin)) % 2) - 1.0
    return margin * sign


def said_by(case: Case, pairs: Pairs) -> Tensor:
    """The circuit's calibrated logit of the second answer, less that of the first, (2n,)."""
    margin = margins(case.reduced, pairs, case.nodes)
    return toward_second(calibrated(margin, case.circuit.scale, case.circuit.shift))


def features(case: Case, tables: Nodes, pairs: Pairs) -> Tensor:
    """What a prediction is linear in, (2n, nodes + 1): the averages, and a constant."""
    return F.pad(averaged(case, tables, pairs), (0, 1), value=1.0).double()


@torch.no_grad()
def reading_of(case: Case, tables: Nodes) -> tuple[Tensor, float]:
    """Weights (nodes + 1,) with which the averages make the circuit's logit difference, by least
    squares on the pairs that it was found on; and R2 on held-out pairs of the task."""
    x = features(case, tables, case.fit)
    wanted = said_by(case, case.fit).double()
    weights = torch.linalg.lstsq(x, wanted.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    predicted = features(case, tables, case.heldout) @ weights
    wanted = said_by(case, case.heldout).double()
    r2 = 1 - (predicted - wanted).square().mean() / wanted.var(correction=0).clamp(min=1e-12)
    return weights, r2.item()


# --- what then happens -------------------------------------------------------------------------

@torch.no_grad()
def on_lists(case: Case, tables: Nodes, weights: Tensor, pairs: Pairs) -> dict:
    """The mean probability of `]]`, between the two answers, of flat and of nested lists: as
    predicted, in the circuit and in the whole model."""
    values = {"predicted": features(case, tables, pairs) @ weights,
              "circuit": said_by(case, pairs),
              "model": toward_second(margins(case.model, pairs))}
    found = {}
    for name, value in values.items():
        p = value.sigmoid()
        found[name] = {"flat": p[::2].mean().item(), "nested": p[1::2].mean().item()}
    return found


def fails_at(rows: list[dict], name: str, kind: str) -> int | None:
    """The first length at which lists of a kind are more often closed as those of the other."""
    for row in rows:
        p = row[name][kind]
        if (p < 0.5) == (kind == "nested"):
            return row["n"]
    return None


def brackets_of(case: Case) -> dict:
    """Prediction and measurement of one circuit."""
    tables = first_attention(case)
    weights, r2 = reading_of(case, tables)  # all that the prediction is made of
    rows = []
    for n in LENGTHS:
        try:
            pairs = list_pairs(case, n)
        except ValueError:  # longer than the context
            break
        rows.append({"n": n, **on_lists(case, tables, weights, pairs)})
    fails = {key: {kind: fails_at(rows, key, kind) for kind in ("nested", "flat")} for key in WHERE}

    # the same prompts with one token exchanged: others would differ by more than it does
    plain, bracket = (answer_id(text, case.tokenizer) for text in REMARK)
    before = list_pairs(case, SHORT, remark=True)
    after = replace(before, ids=torch.where(before.ids == plain, bracket, before.ids))
    remark = [on_lists(case, tables, weights, pairs) for pairs in (before, after)]
    return {"r2": r2, "lengths": rows, "fails": fails,
            "remark": {key: [found[key]["flat"] for found in remark] for key in WHERE}}


# --- the figure --------------------------------------------------------------------------------

def fig8(lab: Lab) -> Found:
    """Predicted from the circuit, then measured: where long lists fail, and what a bracket in a
    comment does. Of the models whose circuit averages anything in its first attention."""
    names = ["long0", *(f"sparse{seed}" for seed in lab.seeds)]
    lab.train(names)
    wanted = [lab.pruning_of(name, BRACKETS, TARGET, "minimal", starts=3) for name in names]
    found = {}
    missing = {}
    for name, cfg, circuit in zip(names, wanted, lab.circuits(wanted)):
        if circuit is None:
            missing[name] = known(cfg)
        elif not circuit["validation"].get("minimal"):
            missing[name] = "its circuit is not minimal"
        elif "0.attn.v" not in circuit["nodes"]:
            missing[name] = "its circuit averages nothing in its first attention"
        else:
            found[name] = brackets_of(case_in(lab, os.path.join(cfg.out_dir, BRACKETS,
                                                                "circuit.json")))
    text = [in_words(name, of_model) for name, of_model in found.items()]
    text += [f"{name}: not to be had: {why}" for name, why in missing.items()]
    return Found("; ".join(text), f"{', '.join(names)}, at {TARGET} nats",
                 {"found": found, "missing": missing})


def in_words(name: str, of_model: dict) -> str:
    """One model's row."""
    first, *_, last = of_model["lengths"]
    text = [f"{name} (the prediction has R2 {of_model['r2']:.2f} on the task's own prompts)"]
    for kind in ("nested", "flat"):
        said = []
        for key, where in WHERE.items():
            fails = of_model["fails"][key][kind]
            from_to = f"{first[key][kind]:.2f} to {last[key][kind]:.2f} {where}"
            said.append(f"{from_to} (wrong at {fails})" if fails else f"{from_to} (never wrong)")
        text.append(f"P(]]) of {kind} lists of {first['n']} to {last['n']} elements "
                    f"{', '.join(said)}")
    said = [f"{before:.2f} to {after:.2f} {WHERE[key]}"
            for key, (before, after) in of_model["remark"].items()]
    text.append(f"with [ for a word of a comment, of flat ones {', '.join(said)}")
    return ": ".join((text[0], ", ".join(text[1:])))


def draw_fig8(figure, data: dict) -> None:
    axes = figure.subplots(1, max(1, len(data["found"])), sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(axes, data["found"].items()):
        n = [row["n"] for row in found["lengths"]]
        for kind, colour in (("nested", "C0"), ("flat", "C1")):
            for key, style in (("predicted", "--"), ("circuit", "o-"), ("model", "s:")):
                axis.plot(n, [row[key][kind] for row in found["lengths"]], f"{colour}{style}",
                          markersize=4, label=f"{kind}, {key}")
        axis.set_title(name)
        axis.set_xlabel("elements of the list")
    axes[0].set_ylabel("P(]]) between the two")
    if data["found"]:
        axes[0].legend(fontsize=7)
