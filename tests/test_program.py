"""tools/program.py: a program computes what the circuit does, alone, and says what it is made of."""
import math
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from circuit import FINAL, Circuit, alone, answers_of, drop_unconnected, without_edges
from measures import Case
from tasks import margins
from tools import program
from tools.listing import COLUMNS, plain_name, statement, total
from tools.program import loaded, margins_by, spoken, write_down
from toy import EVERY_SITE, TOY, Digits, all_nodes, one_thread, random_edges, random_model, toy_pairs, toy_setup  # noqa: F401

pytestmark = pytest.mark.usefixtures("seed", "one_thread")
ROOT = Path(__file__).resolve().parent.parent


class Tokens(Digits):
    """Digits, with what the vocabulary in program.npz is read by."""
    special_tokens_set = set()

    def decode_single_token_bytes(self, token):
        return str(token).encode()


def random_case(tmp_path, share=0.6, standalone=True, final=False, **options) -> Case:
    options = {"n_layer": 2, "keep": 0.5, "bias": True, "afrac": 0.5, "afrac_loctypes": EVERY_SITE, **options}
    model, cfg, _ = toy_setup(tmp_path, random_model(**options))
    constants = {s: torch.randn(len(m)) for s, m in all_nodes(model).items()}
    mask = {s: torch.rand(len(m)) < share for s, m in all_nodes(model).items()}
    edges = random_edges(model)
    mask = drop_unconnected(model, mask, [2, 3], edges)
    if final:
        mask[FINAL] = torch.rand(6) < 0.7
        constants[FINAL] = torch.randn(6)
    circuit = Circuit(mask, edges, 1.3, 0.4, 0.0, standalone=standalone)
    return Case(model, TOY, Tokens(), circuit, constants, cfg, toy_pairs(64), toy_pairs(20, "heldout"), "", 0)


def content_for(case):
    return {"task": "toy", "task_description": "say \\ which", "answers": ["2", "3"], "n_nodes": 1, "n_edges": 1,
            "model": {"dir": "out/toy"}}


OPTIONS = [
    dict(), dict(sink=False), dict(d_pos_emb=3), dict(activation_type="relu", bias=False), dict(enable_bigram_table=True, n_layer=3),
    dict(afrac=None), dict(final=True), dict(final=True, d_pos_emb=2, sink=False), dict(share=0.15), dict(share=1.0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_program_computes_the_margins_of_the_circuit_standing_alone(tmp_path, options):
    case = random_case(tmp_path, **options)
    free = alone(case.model, replace(case.circuit, standalone=True), case.constants)(case.heldout).double()
    made = write_down(case, content_for(case), {}, 8)
    got = margins_by(loaded(made, tmp_path), case.heldout, answers_of(case))
    torch.testing.assert_close(got, free, atol=2e-4, rtol=1e-4)
    assert free.std() > 1e-3  # it says different things of different prompts
    assert max(map(len, made.text.splitlines())) <= 100


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_competition_it_computes_those_of_the_circuit_in_its_model(tmp_path, options):
    case = random_case(tmp_path, **options)
    in_model = alone(case.model, replace(case.circuit, standalone=False), case.constants)(case.heldout).double()
    made = write_down(case, content_for(case), {}, 8, competing=True)
    got = margins_by(loaded(made, tmp_path), case.heldout, answers_of(case))
    torch.testing.assert_close(got, in_model, atol=2e-4, rtol=1e-4)
