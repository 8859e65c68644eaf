"""Circuit file -> one self-contained HTML page; of two circuits, one page that lays them over each
other.

    python -m tools.inspect --circuit=out/demo/single_double_quote/circuit.json   # if wanted
    python view.py out/demo/single_double_quote/circuit.json [--out=FILE]
    python view.py A/circuit.json B/circuit.json [--out=FILE]

Notable features:
- The whole circuit as a graph from the tokens up to the two answer logits, one mark per node.
  Counted edges are solid (blue +, orange -, width |weight|). The residual stream that joins a
  write to the later reads of its channel is dashed and grey. The channels of one attention head
  share a box (paper, sections 2.1 and 3.1).
- Rows are ordered by barycenter and placed by least squares, so that most links run straight up.
- Hover or focus a node or an edge to see its numbers and neighbours; click a node to colour the
  tokens of the held-out prompts by its activation. Find nodes by name, place or token. Save the
  graph as an SVG. Works from the keyboard, in light and in dark, without a network.
- The attention of each head of the circuit over each prompt, sink included: who looks where.
- Where tools.inspect left circuit.nodes.json beside the circuit: of each node the share of tokens
  on which it is on, and examples from the data with what stands around them.
- Where tools.program left program.py beside circuit.json: the program, each line lit with its node.
- Two circuits: what both have, and what only one of them has, by colour, dash and letter.
- Bad input is one line on stderr and exit status 2, and nothing is written. What lies beside a
  circuit and does not fit it is left out, and a line says so.

The page itself is view.html, and how a graph is laid out and drawn is in graph.js, which other
pages use as well; this script makes one file of them, a title and the circuits.
"""

import argparse
import html
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from circuit_file import read_circuit
from config import as_script, die, write_atomic

PAGE = Path(__file__).with_name("view.html")
GRAPH = Path(__file__).with_name("graph.js")
NODES_FORMAT = "sparse-circuit-nodes-1"


def nodes_path(circuit_path: Path) -> Path:
    """Where the descriptions of a circuit's nodes lie: circuit.json -> circuit.nodes.json."""
    return Path(circuit_path).with_suffix(".nodes.json")


def read_nodes(path: Path, circuit: dict) -> dict | None:
    """What tools.inspect found of a circuit's nodes; None where there is no such file.

    ValueError, in one line, where it is damaged or of another circuit.
    """
    again = "run python -m tools.inspect --circuit=CIRCUIT.json again"
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != NODES_FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {NODES_FORMAT!r}")
        for nodes in content["nodes"].values():
            for node in nodes:
                check_description(node)
        channels = {site: [n["channel"] for n in nodes] for site, nodes in content["nodes"].items()}
        same = channels == circuit["nodes"] and content["model"] == circuit["model"]["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
        why = " ".join(str(e).split())[:80]
        raise ValueError(f"{path} cannot be used ({type(e).__name__}: {why}); {again}") from e
    if not same:
        raise ValueError(f"{path} is of another circuit; {again}")
    return content


def check_description(node: dict) -> None:
    """ValueError, or an error of another kind, where the page could not show it."""
    values = [node["mean"], node["on"]]
    for example in node["examples"]:
        texts = example["tokens"]
        values += [example["quantile"], *example["activations"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a token is no text")
        if not 0 <= example["at"] < len(texts) == len(example["activations"]):
            raise ValueError("an example has not one activation per token")
    # None: not measured, as of published circuits
    if not all(value is None or math.isfinite(value) for value in values):
        raise ValueError("a value is no finite number")


def program_path(circuit_path: Path) -> Path | None:
    """Where the program of a circuit lies; None of a circuit that is not named circuit.json, for a
    folder has one program."""
    path = Path(circuit_path)
    return path.with_name("program.py") if path.name == "circuit.json" else None


# at the end of a line that computes a node
MARK = re.compile(r"#\s*(\d+\.(?:attn|mlp)\.[a-z_]+\.\d+|final_resid\.\d+)\s*$")


def read_program(path: Path, circuit: dict) -> list[list] | None:
    """A program's lines, each [text, id of the node that it computes or None]; None where there is
    no such file.

    A node's lines are the one that bears its mark and what is indented further below it, up to
    the next mark or an empty line. ValueError, in one line, where it is unreadable or the marks
    are not exactly the circuit's nodes.
    """
    again = "run python -m tools.program CIRCUIT again"
    try:
        texts = path.read_text("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}; {again}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8; {again}") from e

    lines = []
    node = None
    depth = 0
    for text in texts:
        indent = len(text) - len(text.lstrip())
        mark = MARK.search(text)
        if mark:
            node = mark[1]
            depth = indent
        elif not text.strip() or indent <= depth:
            node = None
        lines.append([text, node])

    marked = {node for text, node in lines if MARK.search(text)}
    if marked != {f"{site}.{c}" for site, channels in circuit["nodes"].items() for c in channels}:
        raise ValueError(f"{path} is of another circuit; {again}")
    return lines


def with_constants(circuit: dict) -> list[dict]:
    """The heads of a circuit, with what the page needs to draw their attention: the sink, and what
    each query and key channel is held at, for those outside the circuit. [] in an older file."""
    width = circuit["model"]["d_head"]
    found = []
    for layer, head, sink in circuit.get("heads", []):
        place = slice(head * width, head * width + width)
        found.append({"layer": layer, "head": head, "sink": sink,
                      "q": circuit["means"][f"{layer}.attn.q"][place],
                      "k": circuit["means"][f"{layer}.attn.k"][place]})
    return found


def for_page(circuit: dict) -> dict:
    """What the page needs of a circuit that `load` or `read_circuit` gave."""
    shown = {"path": "", "described": None, "program": None}  # where only the circuit was read
    shown |= dict(circuit, heads=with_constants(circuit))

    # a file holds the means of every channel, the page needs those of the nodes
    shown["means"] = {}
    for site, channels in circuit["nodes"].items():
        means = circuit["means"][site]
        shown["means"][site] = [means[channel] for channel in channels]
    return shown


def render(circuit: dict, command: str, other: dict | None = None) -> str:
    """The page of a circuit, or of it and an other, as `load` or `read_circuit` gave them;
    `command` is shown at its foot."""
    circuits = [circuit] if other is None else [circuit, other]
    tasks = " and ".join(dict.fromkeys(each["task"] for each in circuits))
    what = "circuit" if other is None else "two circuits"
    data = as_data({"circuits": [for_page(each) for each in circuits], "command": command})
    return page(PAGE, title=html.escape(f"{tasks} · {what}"), data=data)


def page(template: Path, **parts: str) -> str:
    """A page that needs no other file: its template with each mark @@NAME@@ replaced by the part
    `name`, and @@GRAPH@@ by graph.js. ValueError where marks and parts are not the same."""
    parts["graph"] = GRAPH.read_text("utf-8")
    text, *marked = re.split("@@([A-Z]+)@@", template.read_text("utf-8"))
    marks = {mark.lower() for mark in marked[::2]}
    if marks != set(parts):
        odd = ", ".join(sorted(marks ^ set(parts)))
        raise ValueError(f"{template} and its parts differ in {odd}")

    # cut at all marks before anything is filled in, which may look like a mark itself
    for mark, following in zip(marked[::2], marked[1::2]):
        text += parts[mark.lower()] + following
    return text


def as_data(content: object) -> str:
    """JSON that can stand in a <script>: a token may well be "</script>", and "<" written as an
    escape is the same to JSON and nothing to HTML."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def summary(circuit: dict) -> str:
    """One line: sizes, losses in nats."""
    task = circuit["task"].encode("ascii", "replace").decode()  # what any terminal can print
    return (
        f"{' '.join(task.split())}: {circuit['n_nodes']} nodes, {circuit['n_edges']} edges; "
        f"loss {nats(circuit['loss_heldout'])} nats held out "
        f"(target {nats(circuit['target_loss'])}, "
        f"unpruned model {nats(circuit['unpruned_loss'])}); "
        f"necessity {nats(circuit['validation'].get('necessity'))}"
    )


def nats(loss: object) -> str:
    return f"{loss:.3f}" if isinstance(loss, (int, float)) else "-"


def check_shapes(a: dict, b: dict) -> None:
    """ValueError, in one line, where the models of two circuits have not the same sizes."""
    for size in ("n_layer", "d_model", "n_head", "d_head", "d_mlp"):
        sizes = (a["model"][size], b["model"][size])
        if sizes[0] != sizes[1]:
            raise ValueError(f"{size} is {sizes[0]} and {sizes[1]}")
    for site in a["means"].keys() & b["means"].keys():
        widths = (len(a["means"][site]), len(b["means"][site]))
        if widths[0] != widths[1]:
            raise ValueError(f"{site} has {widths[0]} and {widths[1]} channels")


def overlay_path(a: Path, b: Path) -> Path:
    """Beside A, by what tells the path of B from its own:
    out/demo/quote/circuit.json, out/demo1/quote/circuit.json -> circuit.over.demo1.html."""
    own = a.resolve().with_suffix("").parts
    other = list(b.resolve().with_suffix("").parts)
    start = 0
    while start < min(len(own), len(other)) and own[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(own), len(other)) - start and own[-1 - end] == other[-1 - end]:
        end += 1
    differing = "-".join(other[start:len(other) - end]) or b.stem
    return a.with_name(f"{a.stem}.over.{differing[-100:]}.html")  # a name has 255 bytes at most


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "view.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def refuse(message: str) -> None:  # argparse's own takes more than a line
        die(f"{message}; usage: python view.py CIRCUIT.json [OTHER.json] [--out=FILE]")

    parser.error = refuse
    parser.add_argument("circuits", type=Path, nargs="+", metavar="circuit",
                        help="one circuit.json, or two to lay over each other")
    parser.add_argument("--out", type=Path,
                        help="default: beside the (first) circuit, ending in .html")
    args = parser.parse_args(argv)
    if len(args.circuits) > 2:
        refuse(f"{len(args.circuits)} circuits, but a page has one or two")
    return args


def load(path: Path) -> dict:
    """A circuit, its `path`, and what lies beside its file: its `program` and what its nodes do
    (`described`), or None. Ends in one line on stderr where that cannot be shown."""
    try:
        circuit = read_circuit(str(path))
    except OSError as e:
        die(f"cannot read {path}: {e.strerror}; give the circuit.json that prune.py wrote")
    except ValueError as e:
        die(e)

    described = read_beside(read_nodes, nodes_path(path), circuit)
    program = read_beside(read_program, program_path(path), circuit)
    return circuit | {"path": str(path), "described": described, "program": program}


def read_beside(read: Callable, path: Path | None, circuit: dict):
    """What `read` makes of a file beside a circuit's; None, and a line on stderr, where that is of
    another circuit or damaged: the circuit can be shown without."""
    if path is None:
        return None
    try:
        return read(path, circuit)
    except ValueError as e:
        print(f"view.py: {e}; the page is without it", file=sys.stderr)
        return None


def main(argv: list[str]) -> int:
    args = read_arguments(argv)
    paths = args.circuits
    out = args.out or paths[0].with_suffix(".html")
    if len(paths) == 2:
        out = args.out or overlay_path(*paths)
        if paths[0].resolve() == paths[1].resolve():
            die(f"{paths[1]} is given twice; give two circuits, or one")
    read = [file for path in paths for file in (path, nodes_path(path), program_path(path)) if file]
    if out.resolve() in [file.resolve() for file in read]:
        die(f"{out} is what the page is made of; choose another --out=FILE")

    circuits = [load(path) for path in paths]
    if len(paths) == 2:
        try:
            check_shapes(*circuits)
        except ValueError as e:
            die(f"{paths[0]} and {paths[1]} are of models of different shapes: {e}; "
                "give two circuits of one architecture")

    # half a surrogate pair in a task's name cannot be encoded; the page shows a question mark
    content = render(circuits[0], f"python view.py {' '.join(map(str, paths))}", *circuits[1:])
    content = content.encode("utf-8", errors="replace")

    def write(file) -> None:
        file.write(content)

    try:
        write_atomic(str(out), write)
    except OSError as e:
        die(f"cannot write {out}: {e.strerror}; choose another place with --out=FILE")

    for circuit in circuits:
        print(summary(circuit))
    print(out)
    return 0


if __name__ == "__main__":
    as_script(main)
