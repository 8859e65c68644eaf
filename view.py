"""Circuit file -> one self-contained HTML page.

    python -m tools.inspect --circuit=out/demo/single_double_quote/circuit.json   # if wanted
    python view.py out/demo/single_double_quote/circuit.json [--out=FILE]

Notable features:
- The whole circuit as a graph from the tokens up to the two answer logits, one mark per node.
  Counted edges are solid (blue +, orange -, width |weight|). The residual stream that joins a
  write to the later reads of its channel is dashed and grey. The channels of one attention head
  share a box (paper, sections 2.1 and 3.1).
- Rows are ordered by barycenter and placed by least squares, so that most links run straight up.
- Hover or focus a node or an edge to see its numbers and neighbours; click a node to colour the
  tokens of the held-out prompts by its activation. Works from the keyboard, in light and in dark,
  without a network.
- The attention of each head of the circuit over each prompt, sink included: who looks where.
- Where tools.inspect left circuit.nodes.json beside the circuit: of each node the share of tokens
  on which it is on, and examples from the data with what stands around them.
- Bad input is one line on stderr and exit status 2, and nothing is written.

The page itself is view.html, and how a graph is laid out and drawn is in graph.js, which other
pages use as well; this script makes one file of them, a title and a circuit.
"""

import argparse
import html
import json
import math
import re
import sys
from pathlib import Path

from circuit import read_circuit
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


def render(circuit: dict, command: str, described: dict | None = None) -> str:
    """The page of a circuit that `read_circuit` gave; `command` is shown at its foot. described:
    what `read_nodes` gave."""
    shown = dict(circuit, command=command, heads=with_constants(circuit), described=described)

    # a file holds the means of every channel, the page needs those of the nodes
    shown["means"] = {}
    for site, channels in circuit["nodes"].items():
        means = circuit["means"][site]
        shown["means"][site] = [means[channel] for channel in channels]

    title = html.escape(f"{circuit['task']} · circuit")
    return page(PAGE, title=title, data=as_data(shown))


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


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "view.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def refuse(message: str) -> None:  # argparse's own takes more than a line
        die(f"{message}; usage: python view.py CIRCUIT.json [--out=FILE]")

    parser.error = refuse
    parser.add_argument("circuit", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the circuit, ending in .html")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = read_arguments(argv)
    try:
        circuit = read_circuit(str(args.circuit))
    except OSError as e:
        die(f"cannot read {args.circuit}: {e.strerror}; give the circuit.json that prune.py wrote")
    except ValueError as e:
        die(e)

    out = args.out or args.circuit.with_suffix(".html")
    if out.resolve() == args.circuit.resolve():
        die(f"{out} is the circuit itself; choose another --out=FILE")

    try:
        described = read_nodes(nodes_path(args.circuit), circuit)
    except ValueError as e:  # it is beside the matter: the circuit can be shown without
        print(f"view.py: {e}; the page is without it", file=sys.stderr)
        described = None

    # half a surrogate pair in a task's name cannot be encoded; the page shows a question mark
    page = render(circuit, f"python view.py {args.circuit}", described)
    page = page.encode("utf-8", errors="replace")

    def write(file) -> None:
        file.write(page)

    try:
        write_atomic(str(out), write)
    except OSError as e:
        die(f"cannot write {out}: {e.strerror}; choose another place with --out=FILE")

    print(summary(circuit))
    print(out)
    return 0


if __name__ == "__main__":
    as_script(main)
