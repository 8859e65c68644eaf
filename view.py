"""Circuit file -> one self-contained HTML page.

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
- Bad input is one line on stderr and exit status 2, and nothing is written.

The page itself is view.html; this script puts a title and a circuit into it.
"""

import argparse
import html
import json
import re
from pathlib import Path

from circuit import read_circuit
from config import as_script, die, write_atomic

PAGE = Path(__file__).with_name("view.html")


def render(circuit: dict, command: str) -> str:
    """The page of a circuit that `read_circuit` gave; `command` is shown at its foot."""
    shown = dict(circuit, command=command)

    # a file holds the means of every channel, the page needs those of the nodes
    shown["means"] = {}
    for site, channels in circuit["nodes"].items():
        means = circuit["means"][site]
        shown["means"][site] = [means[channel] for channel in channels]

    # a token may well be "</script>": written so, "<" is the same to JSON and nothing to HTML
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(f"{circuit['task']} · circuit")

    # cut at both marks before anything is filled in, which may look like a mark itself
    before, between, after = re.split("@@TITLE@@|@@DATA@@", PAGE.read_text("utf-8"))
    return before + title + between + data + after


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

    # half a surrogate pair in a task's name cannot be encoded; the page shows a question mark
    page = render(circuit, f"python view.py {args.circuit}").encode("utf-8", errors="replace")

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
