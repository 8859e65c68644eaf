"""A circuit written down as a program: a few dozen lines of numpy that run by themselves.

    python -m tools.program out/demo/single_double_quote/circuit.json
    python out/demo/single_double_quote/program.py 'print("the total'
    python -m tools.program out/demo     # every task's circuit there, then a table

- One line a node, with its inputs and weights; a head is one expression. What is held at its mean
  is folded into the constants, and the tokens that matter are in a table above.
- `program.py` stands beside circuit.json and needs numpy and `program.npz` alone. In that: the
  vocabulary, and what the norms see of the stream but no line of the circuit writes.
- It has no AbsTopK, in which channels outside the circuit decide (docs/ablation.md). How far that
  is from the circuit in its model is printed: both losses, and how their margins correlate. A
  circuit that was found with `prune.py --standalone` runs so by itself, and is the same. With
  `--competition` the program has AbsTopK as well, at the price of weights that it does not show.
- As many digits are written as it takes: the program's logit differences are those of the circuit
  as PyTorch runs it (without AbsTopK, or with `--competition` with it), within 1e-4 on every
  held-out prompt; or it says by how much not.
- `--names=FILE`: lines such as `L0_mlp_neuron_12 = "quote_type"` (TOML); `--names=tokens`: each by
  the tokens that turn it on most.
- `--algorithm`: in words, from rules and with the numbers behind each (tools/algorithm.py).
"""
import argparse
import io
import keyword
import re
import runpy
import statistics
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, die, write_atomic

import numpy as np
import torch
from torch import Tensor

from case import Case, CaseConfig, case_of
from circuit import Circuit, alone
from circuit_file import answers_of, read_circuit
from live import serves
from measures import correlation, standalone
from tasks import Pairs
from tools.algorithm import algorithm, look
from tools.listing import COLUMNS, Writer, number, plain_name

REST = Path(__file__).with_name("program_rest.py")
DASHES = "# --- the same in every program"
DIGITS = range(3, 9)  # of every number in the program: as few as are exact
EXACT = 1e-4          # logits
TRIED = 32            # pairs on which the digits are chosen
PROMPTS = 128         # pairs of which --algorithm speaks
# names that a program has already
TAKEN = set("""ANSWERS BIGRAM CALIBRATION DATA EMBEDDING EPS IDS LONGEST Path TABLES TOKENS WORDS
    argparse attention circuit compete embed gelu kept kept_of_read largest last logits logits_of
    main math norm np own re relu rms shown stream sys t tokens_of whole""".split())


# --- names ----------------------------------------------------------------------------------

SPOKEN = {
    "\n": "newline", "\t": "tab", '"': "dquote", "'": "quote", "(": "open", ")": "close",
    "[": "bracket", "]": "unbracket", "{": "brace", "}": "unbrace", ":": "colon", ",": "comma",
    ".": "dot", "=": "equals", "+": "plus", "-": "minus", "*": "times", "/": "slash", "<": "less",
    ">": "more", "#": "hash", "%": "percent", "!": "not", "@": "at", "\\": "backslash",
}


def spoken(token: str) -> str:
    """A token as part of a name: `('` is open_quote."""
    text = ""
    for letter in token:
        is_word = letter.isalnum() or letter == "_"
        text += letter if is_word else f" {SPOKEN.get(letter, '')} "
    return "_".join(text.split()) or "space"


def read_names(path: str, nodes: set[str]) -> dict[str, str]:
    """A TOML file of `plain_name = "name"`. ValueError where it names what is no node of the
    circuit, what is no name in Python, or two alike."""
    try:
        names = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no TOML: {e}") from None
    for plain, name in names.items():
        if plain not in nodes:
            raise ValueError(f"{path} names {plain}, which is no node of the circuit")
        usable = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not usable or name in TAKEN or re.fullmatch(r"stream_\d+|L\d+_head\d+", name):
            raise ValueError(f"{path} calls {plain} {name!r}, which cannot be a name here")
    given = [names.get(plain, plain) for plain in nodes]
    twice = {name for name in given if given.count(name) > 1}
    if twice:
        raise ValueError(f"{path} gives two nodes the name {min(twice)}")
    return names


# --- what stands around it ------------------------------------------------------------------

def tables_of(case: Case, channels: Iterable[int], digits: int) -> list[str]:
    """The lines of TABLES, one a channel whose embedding is read: the tokens that bring most into
    it over the task's prompts, as many as there is room for."""
    lines = ["TABLES = {  # channel: {token: what it puts in}; the others are in program.npz"]
    prompts = torch.tensor([token for ids in case.heldout.prompts() for token in ids])
    ids, counts = prompts.unique(return_counts=True)
    for channel in sorted(channels):
        entries = case.model.transformer.wte.weight[ids, channel]
        row = f"    {channel}: {{"
        for i in (entries.abs() * counts).argsort(descending=True).tolist():
            key = literal(case.tokenizer.decode_single_token_bytes(int(ids[i])))
            piece = f"{key}: {number(entries[i].item(), digits)}, "
            if entries[i] == 0 or len(row) + len(piece) > COLUMNS:
                break
            row += piece
        lines.append(f"{row.removesuffix(', ')}}},")
    return [*lines, "}"]


def literal(token: bytes) -> str:
    """A token as it stands in a program: its text, or its bytes where that is part of a letter."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def arrays_of(case: Case, writer: Writer, answers: list[int]) -> dict[str, np.ndarray]:
    """What program.npz holds; float32, as in the model."""
    model = case.model
    c = model.config
    tokens = [b""] * c.vocab_size  # special tokens are no text
    for token in range(c.vocab_size):
        try:
            tokens[token] = case.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # an id that the tokenizer leaves out
            continue
    for token in case.tokenizer.special_tokens_set:
        tokens[case.tokenizer.encode_single_token(token)] = b""
    bigram = model.final_logits_bias[answers].expand(c.vocab_size, -1)
    if model.bigram_table is not None:
        bigram = bigram + model.bigram_table[:, answers]
    eps = model.transformer.ln_f.eps
    eps = torch.finfo(torch.float32).eps if eps is None else eps  # PyTorch's own default
    arrays = {"eps": torch.tensor(eps), "longest": torch.tensor(c.block_size),
              "embedding": model.transformer.wte.weight, "unembedding": writer.unembedding(),
              "bigram": bigram}
    arrays |= {f"held.{read}": held.float() for read, held in writer.held.items()}
    if c.d_pos_emb is None and model.transformer.wpe.weight.any():
        arrays["positions"] = model.transformer.wpe.weight
    if c.d_pos_emb is not None:
        for i, block in enumerate(model.transformer.h):
            arrays[f"beside.{i}.attn"] = block.ln_p1(model.transformer.wpe.weight)
            arrays[f"beside.{i}.mlp"] = block.ln_p2(model.transformer.wpe.weight)
    if writer.competing:
        arrays |= writer.matrices
    found = {key: value.detach().numpy() for key, value in arrays.items()}
    return found | {"vocabulary": np.array([token.hex() for token in tokens])}


def head_of(case: Case, content: dict, said: str) -> list[str]:
    """The program's own description, and what is the same at every token."""
    circuit = case.circuit
    task = " ".join(f"{content['task']}: {content['task_description']}".split())
    lines = [
        f'"""{task}',
        "",
        f"A circuit of {content['model']['dir']}: {content['n_nodes']} nodes, "
        f"{content['n_edges']} edges; all else is held at its mean, folded into constants.",
        said,
        '"""',
    ]
    lines = [line.replace("\\", "\\\\") for line in lines]
    return [
        *lines,
        "import numpy as np",
        "",
        f"ANSWERS = {content['answers']!r}",
        f"CALIBRATION = ({circuit.scale:.6g}, {circuit.shift:.6g})  # of the difference of logits",
    ]


@dataclass
class Program:
    """A circuit as a program, and how well it does."""
    text: str
    arrays: dict[str, np.ndarray]
    lines: int        # of its own, above what all programs share
    code: int         # of these, less docstrings, comments and blank ones
    digits: int
    error: float = 0.0        # logits: the largest difference to the circuit without AbsTopK
    correlation: float = 0.0  # of its margins with those of the circuit in its model
    losses: dict | None = None  # nats, of `measures.standalone`


def write_down(case: Case, content: dict, names: dict[str, str], digits: int,
               competing: bool = False, said: str = "") -> Program:
    """The program of a circuit with so many digits; competing: as of Writer."""
    answers = answers_of(case)
    writer = Writer(case.model, case.circuit, case.constants, answers, names, digits, competing)
    function = writer.function()
    tables = tables_of(case, writer.read_channels, digits)
    own = [*head_of(case, content, said), "", *tables, "", "", *function]
    text = "\n".join(own) + "\n\n\n" + shared(competing)
    arrays = arrays_of(case, writer, answers)
    return Program(text, arrays, len(own), code_lines("\n".join(own)), digits)


def shared(competing: bool) -> str:
    """What is the same in every program, or in every competing one."""
    rest = REST.read_text(encoding="utf-8")
    rest = rest[rest.index(DASHES):].replace("import numpy as np\n\n", "", 1)
    rest, contest, more = re.split("# --- .*competition.*\n|# --- .*again\n", rest)
    return rest + contest * competing + more


def code_lines(text: str) -> int:
    """How many lines are neither blank nor a comment nor a docstring."""
    text = re.sub(r'''"""(.|\n)*?"""''', "", text)
    lines = [line.strip() for line in text.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


# --- does it do what the circuit does? ------------------------------------------------------

def loaded(program: Program, folder: str) -> dict:
    """The names that a program defines, once it is written to a folder and loaded from there."""
    path = Path(folder) / "program.py"
    path.write_text(program.text, encoding="utf-8")
    path.with_suffix(".npz").write_bytes(packed(program.arrays))
    return runpy.run_path(str(path), run_name="program")


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def margins_by(program: dict, pairs: Pairs, answers: list[int]) -> Tensor:
    """Right minus wrong logit of each prompt (2n,), by a program that was loaded."""
    place = {token: i for i, token in enumerate(answers)}
    found = []
    for ids, answer, wrong in zip(pairs.prompts(), pairs.answer.tolist(), pairs.wrong.tolist()):
        logits, _ = program["logits_of"](ids)
        found.append(logits[place[answer]] - logits[place[wrong]])
    return torch.tensor(found, dtype=torch.float64)


def written(case: Case, content: dict, names: dict[str, str], competing: bool) -> Program:
    """The program of a circuit, with as few digits as are exact; measured on held-out pairs.

    ValueError where the model has what the program cannot say: LayerNorm, an AbsTopK or a relu on
    the stream itself.
    """
    if not serves(case.model):
        raise ValueError("a program needs a model with RMSNorm and a plain residual stream")
    answers = answers_of(case)
    free = alone(case.model, replace(case.circuit, standalone=True), case.constants)
    in_model = alone(case.model, replace(case.circuit, standalone=False), case.constants)
    same = in_model if competing else free  # what the program is to compute
    few = case.heldout.first(TRIED)
    want = same(few).double()
    with tempfile.TemporaryDirectory() as folder:
        for digits in DIGITS:
            program = write_down(case, content, names, digits, competing)
            got = margins_by(loaded(program, folder), few, answers)
            if (got - want).abs().max() < EXACT / 2:  # a margin for the other prompts
                break
        want = same(case.heldout).double()
        got = margins_by(loaded(program, folder), case.heldout, answers)
    losses = standalone(case)
    if competing:
        said = f"Loss on held-out prompts: {losses['with_topk']:.3f} nats, AbsTopK as in the model."
    else:
        said = (f"Loss on held-out prompts: {losses['standalone']:.3f} nats as this program, "
                f"{losses['with_topk']:.3f} in the model with AbsTopK.")
    final = write_down(case, content, names, digits, competing, said)
    agrees = correlation(got, in_model(case.heldout).double())
    return replace(final, error=(got - want).abs().max().item(), correlation=agrees, losses=losses)


def nodes_of(circuit: Circuit) -> dict[str, tuple[str, int]]:
    """plain_name -> (site, channel) of every node."""
    found = {}
    for site, kept in circuit.mask.items():
        for channel in kept.nonzero().flatten().tolist():
            found[plain_name(site, channel)] = (site, channel)
    return found


def names_by_tokens(case: Case, content: dict) -> dict[str, str]:
    """plain_name -> that and the two tokens of the prompts on which the node is largest."""
    program = write_down(case, content, {}, DIGITS[-1])
    sizes = {plain: {} for plain in nodes_of(case.circuit)}  # -> token id -> largest magnitude
    with tempfile.TemporaryDirectory() as folder:
        run = loaded(program, folder)["logits_of"]
        for ids in case.heldout.first(TRIED).prompts():
            variables = run(ids)[1]
            for plain, largest in sizes.items():
                for token, x in zip(ids, np.abs(variables[plain]).tolist()):
                    largest[token] = max(x, largest.get(token, 0.0))
    names = {}
    for plain, largest in sizes.items():
        top = sorted(largest, key=largest.get, reverse=True)[:2]
        names[plain] = "_".join([plain, *(spoken(case.tokenizer.decode([i])) for i in top)])
    return names


def in_words(case: Case, program: Program, names: dict[str, str], answers: list[str]) -> list[str]:
    """The sentences of `--algorithm`, from what the program does on held-out prompts."""
    ids = answers_of(case)
    if len(ids) != 2:
        raise ValueError("--algorithm needs a task with two answers")
    few = case.heldout.first(PROMPTS)
    texts = [case.tokenizer.decode([i]) for i in range(case.model.config.vocab_size)]
    with tempfile.TemporaryDirectory() as folder:
        run = loaded(program, folder)["logits_of"]
        seen = look(run, few.prompts(), (few.answer == ids[0]).tolist(), texts)

    def name_of(site: str, channel: int) -> str:
        plain = plain_name(site, channel)
        return names.get(plain, plain)

    head = case.model.lm_head.weight[ids] * case.model.transformer.ln_f.weight
    weights = {c: head[:, c].tolist() for c in head.any(0).nonzero().flatten().tolist()}
    return algorithm(case.circuit, name_of, case.model.config.d_head, weights, seen, answers)


# --- the command ----------------------------------------------------------------------------

def write_program(path: Path, args: argparse.Namespace) -> Program:
    """Write a circuit's program beside it; prints what it is. ValueError or OSError, in one line
    and with nothing written, where that cannot be done."""
    content = read_circuit(str(path))
    cfg = CaseConfig(circuit=str(path), model=args.model, task=args.task, data=args.data,
                     tokenizer=args.tokenizer)
    case = case_of(cfg, content)
    names = {}
    if args.names == "tokens":
        names = names_by_tokens(case, content)
    elif args.names:
        names = read_names(args.names, set(nodes_of(case.circuit)))
    program = written(case, content, names, args.competition)
    out = path.with_name("program.py")
    # the data first: a program without them would say so, data without a program do no harm
    write_atomic(str(out.with_suffix(".npz")), packed(program.arrays))
    write_atomic(str(out), program.text.encode())
    exact = "exact" if program.error < EXACT else f"NOT exact: off by {program.error:.2g} logits"
    print(f"{content['task']}: {program.lines} lines ({program.code} of code), "
          f"{program.digits} digits; "
          f"{exact} (at most {program.error:.1e}); "
          f"{program.losses['standalone']:.3f} nats held out, {program.losses['with_topk']:.3f} "
          f"with AbsTopK, margins correlate {program.correlation:.3f}\n{out}", flush=True)
    if args.algorithm:
        sentences = in_words(case, program, names, content["answers"])
        text = "".join(f"- {sentence}\n" for sentence in sentences)
        write_atomic(str(path.with_name("algorithm.txt")), text.encode())
        print(text, end="", flush=True)
    return program


def circuits_in(path: Path) -> list[Path]:
    """A circuit's file, or those of a run's tasks. ValueError where there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*/circuit.json"))
    if not found:
        raise ValueError(f"no {path}/*/circuit.json; prune.py writes them")
    return found


def print_table(paths: list[Path], programs: list[Program], competing: bool) -> None:
    """Every circuit of a run: its size, its program's, both losses (nats), and what is exact."""
    print("\n| task | nodes | edges | lines, of code | standalone | recalibrated | with AbsTopK "
          "| margins correlate | largest error, logits |\n" + 9 * "|---" + "|")
    for path, program in zip(paths, programs):
        content = read_circuit(str(path))
        print(f"| {content['task']} | {content['n_nodes']} | {content['n_edges']} "
              f"| {program.lines}, {program.code} | {program.losses['standalone']:.3f} "
              f"| {program.losses['standalone_refit']:.3f} "
              f"| {program.losses['with_topk']:.3f} | {program.correlation:.3f} "
              f"| {program.error:.1e} |")
    lines = statistics.median(program.lines for program in programs)
    code = statistics.median(program.code for program in programs)
    n_shared = len(shared(competing).splitlines())
    print(f"median length: {lines:g} lines, {code:g} of code, and {n_shared} that all share")


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.program", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    def refuse(message: str) -> None:  # argparse's own takes more than a line
        die(f"{message}; usage: python -m tools.program CIRCUIT.json [--names=FILE]")

    parser.error = refuse
    parser.add_argument("circuit", type=Path, help="a circuit.json, or a run with several tasks")
    parser.add_argument("--names", default="", help="a TOML file of names, or: tokens")
    parser.add_argument("--competition", action="store_true", help="with AbsTopK, as in the model")
    parser.add_argument("--algorithm", action="store_true", help="and in words")
    parser.add_argument("--model", default="", help="its directory; else where the circuit says")
    parser.add_argument("--task", default="", help="a file of pairs that was moved")
    parser.add_argument("--data", default="data/tinypython")
    parser.add_argument("--tokenizer", default="data/tinypython/tokenizer.tiktoken")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = read_arguments(argv)
    try:
        paths = circuits_in(args.circuit)
        programs = [write_program(path, args) for path in paths]
        if len(paths) > 1:
            print_table(paths, programs, args.competition)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
