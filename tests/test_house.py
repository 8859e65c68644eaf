"""The rules of the house, so that they stay: columns, length of functions, and arrows that point one way."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The rooms from the ground up: a file imports only from those before its own.
ROOMS = ["config", "fast", "ops", "model_files", "model", "optim", "tokens", "jobs", "plan", "train", "tasks", "circuit", "circuit_file",
         "live", "ablations", "search", "masks", "edge_masks", "minimise", "processes", "find", "prune", "case", "controls", "measures", "validate", "coupled", "bridge", "steer", "view"]
# Packages that only side paths need: they may be imported where they are used.
OPTIONAL = {"matplotlib", "optuna", "rustbpe", "safetensors", "triton", "pyarrow", "zstandard"}
DATA = {"data/tinypython/idioms.py", "data/tinypython/filler.py"}  # tables of words and templates

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "fast", "tools", "data", "data/tinypython")
    for path in (ROOT / folder).glob("*.py")
)
every_script = pytest.mark.parametrize("script", SCRIPTS)


def tree(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def imported(node: ast.AST) -> list[str]:
    """The modules that an import names, as written; of anything else none."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module]
    return []


def functions(script: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree(script)) if isinstance(n, ast.FunctionDef)]


def test_the_rooms_are_all_there_and_no_others():
    top = {s.removesuffix(".py") for s in SCRIPTS if "/" not in s}
    assert top == set(ROOMS) - {"fast"}


@pytest.mark.parametrize("script", [s for s in (*SCRIPTS, "view.html", "graph.js") if s not in DATA])
def test_no_line_passes_100_columns(script):
    lines = (ROOT / script).read_text().splitlines()
    assert [f"{i}: {len(line)}" for i, line in enumerate(lines, 1) if len(line) > 100] == []


@every_script
def test_no_function_passes_60_lines(script):
    assert [f.name for f in functions(script) if f.end_lineno - f.lineno + 1 > 60] == []


@every_script
def test_arrows_point_up_the_list(script):
    room = script.removesuffix(".py").split("/")[0]
    allowed = set(ROOMS) if room == "tools" else set(ROOMS[:ROOMS.index(room)]) if room in ROOMS else {"config"}
    seen = {name.split(".")[0] for node in ast.walk(tree(script)) for name in imported(node)}
    assert seen & set(ROOMS) - {room} <= allowed
    assert room == "tools" or "tools" not in seen


@every_script
def test_only_optional_packages_are_imported_inside_a_function(script):
    inside = {name.split(".")[0] for f in functions(script) for node in ast.walk(f) for name in imported(node)}
    assert inside <= OPTIONAL | {"fast"}  # fast/cuda.py, where Triton is


@every_script
def test_no_room_reaches_into_anothers_privates(script):
    private = [alias.name for node in ast.walk(tree(script)) if isinstance(node, ast.ImportFrom)
               and node.module != "__future__" for alias in node.names if alias.name.startswith("_")]
    assert private == []


@every_script
def test_lambda_stands_only_as_a_key(script):
    nodes = list(ast.walk(tree(script)))
    keys = {id(n.value) for n in nodes if isinstance(n, ast.keyword) and n.arg == "key"}
    assert [n.lineno for n in nodes if isinstance(n, ast.Lambda) and id(n) not in keys] == []


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "import as_script" in (ROOT / s).read_text()])
def test_scripts_import_config_before_torch(script):
    order = [name for node in tree(script).body for name in imported(node)]
    torch_last = order.index("torch") if "torch" in order else len(order)
    assert order.index("config") < torch_last
