"""view.py: the page holds the whole circuit, needs no network, survives hostile text, says no."""

import contextlib
import html
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from view import NODES_FORMAT, main, nodes_path, page

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason=f"none of {BROWSERS} on PATH")
WIDTH = {"act_in": 256, "q": 256, "k": 256, "v": 256, "resid_delta": 256, "post_act": 1024}
SITES = ("attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta",
         "mlp.act_in", "mlp.post_act", "mlp.resid_delta")
MATRICES = (("attn.act_in", "attn.q"), ("attn.act_in", "attn.k"), ("attn.act_in", "attn.v"),
            ("attn.v", "attn.resid_delta"),
            ("mlp.act_in", "mlp.post_act"), ("mlp.post_act", "mlp.resid_delta"))
HOSTILE = ["</script><b>", "a & 'b' \"c\"", "<!--", "\t\u2028é", "@@DATA@@"]


def make_circuit(
    per_site: int = 2, n_layer: int = 2, edge_share: float = 0.4, seed: int = 0, final: bool = False
) -> dict:
    """A synthetic circuit of the shape that prune.py writes; final: it names final_resid, too."""
    rng = random.Random(seed)
    # the residual channels that reads and writes share, and the channels of three heads
    stream = rng.sample(range(256), 4 + 2 * per_site)
    in_heads = [h * 16 + i for h in (2, 9, 13) for i in range(16)]
    nodes = {}
    means = {}
    edges = []
    for layer in range(n_layer):
        for name in SITES:
            site = f"{layer}.{name}"
            width = WIDTH[name.split(".")[1]]
            pool = range(width)
            if "act_in" in name or "resid" in name:
                pool = stream
            elif "attn" in name:
                pool = in_heads
            nodes[site] = sorted(rng.sample(pool, rng.randint(max(1, per_site - 1), per_site)))
            means[site] = [round(rng.gauss(0, 0.3), 5) for _ in range(width)]
        for a, b in MATRICES:
            edges += make_edges(rng, f"{layer}.{a}", f"{layer}.{b}", nodes, edge_share)

    def weight():
        return round(rng.gauss(0, 1), 4)

    if final:
        nodes["final_resid"] = sorted(rng.sample(stream, 3))
        means["final_resid"] = [weight() for _ in range(256)]
    in_qkv = {(layer, c // 16) for layer in range(n_layer) for z in "qkv" for c in nodes[f"{layer}.attn.{z}"]}
    examples = [make_example(rng, i, nodes) for i in range(6)]
    words = ["('", "(\"", "'", " name", "\n   ", "def", " =", " print", ")", *HOSTILE]
    reads = sorted({c for site, cs in nodes.items() if site.endswith(("act_in", "final_resid")) for c in cs})
    writes = sorted({c for site, cs in nodes.items() if site.endswith("final_resid" if final else "delta") for c in cs})
    answers = ["')\n", "\")\n"]
    return {
        "format": "sparse-circuit-2",
        "model": {"dir": "out/demo", "sha256": "ab" * 32, "n_layer": n_layer, "d_model": 256,
                  "n_head": 16, "d_head": 16, "d_mlp": 1024},
        "task": "single_double_quote",
        "task_description": "Close a string with the quote that opened it <&>.",
        "answers": answers,
        "target_loss": 0.15, "loss": 0.1123, "loss_heldout": 0.1241, "unpruned_loss": 0.0113,
        "ablation": "mean", "logit_scale": 1.7, "logit_shift": 0.02,
        "nodes": nodes,
        "edges": edges,
        "embedding": [[i, w, c, weight()] for c in reads
                      for i, w in enumerate(rng.sample(words, 6))],
        "unembedding": [[t, a, c, weight()] for c in writes[::2] for t, a in zip((7, 8), answers)],
        "heads": [[layer, head, weight() if layer else None] for layer, head in sorted(in_qkv)],
        "means": means,
        "n_nodes": sum(map(len, nodes.values())),
        "n_edges": len(edges),
        "validation": {"sufficiency": 0.1241, "necessity": 3.412,
                       "minimal": {"certified": True, "statement": "Each of the <9> parts was left out."},
                       "verdict": "Shown: sufficient & needed.",
                       "controls": {"random_signs": [{"loss": 0.69, "edges": 77, "met": False, "flat": True, "curve": [[300, 9, 8, 0.7]]}]}},
        "examples": examples,
        "seed": 0,
        "settings": {"steps": 500, "k_coef": 1e-4, "adam": {"lr": 0.003}},
    }


def make_edges(rng: random.Random, a: str, b: str, nodes: dict, share: float) -> list[list]:
    """Some of the weights from the nodes of site a to those of b; in all, no node is left alone."""
    chosen = {(c, d) for c in nodes[a] for d in nodes[b] if rng.random() < share}
    if "v" in b or "mlp" in b:
        chosen |= {(c, rng.choice(nodes[b])) for c in nodes[a]}
    chosen |= {(rng.choice(nodes[a]), d) for d in nodes[b]}
    return [[a, c, b, d, round(rng.gauss(0, 1), 4)] for c, d in sorted(chosen)]


def make_example(rng: random.Random, i: int, nodes: dict) -> dict:
    quote = "'\""[i % 2]
    other = "\"'"[i % 2]
    tokens = ["def", " greet", "(", "name", ",", " times", "):", "\n   ", " for", " i", " in",
              " range", "(", "times", "):", "\n       ", " print", f"({quote}", "hello", " <", "b",
              ">", " &", "amp", ";", HOSTILE[i % 5]]
    activations = {}
    for site, channels in nodes.items():
        activations[site] = []
        for _ in channels:
            row = [round(rng.gauss(0, 1), 4) * (rng.random() < 0.3) for _ in tokens]
            activations[site].append(row)
    return {
        "tokens": tokens, "answer": f"{quote})\n", "wrong": f"{other})\n",
        "p_answer": 0.97 - 0.1 * i, "p_answer_unpruned": 0.9992, "activations": activations,
    }


def save(circuit: object, folder: Path) -> Path:
    path = folder / "circuit.json"
    path.write_text(circuit if isinstance(circuit, str) else json.dumps(circuit))
    return path


def describe(circuit: dict) -> dict:
    """What tools.inspect writes beside a circuit."""
    rng = random.Random(1)

    def example(quantile: float) -> dict:
        tokens = ["def", " f", "(", HOSTILE[0], "\n    "]
        return {"quantile": quantile, "tokens": tokens, "activations": [rng.gauss(0, 1) for _ in tokens], "at": 2}

    nodes = {site: [{"channel": c, "mean": 0.25, "on": 0.125, "examples": [example(q) for q in (1, 1, 0.9, 0)]}
                    for c in channels] for site, channels in circuit["nodes"].items()}
    return {"format": NODES_FORMAT, "model": circuit["model"]["sha256"], "data": "data/<b>/val.bin", "tokens": 65536,
            "window": 128, "seed": 0, "nodes": nodes}


def view(*args: object) -> subprocess.CompletedProcess:
    """The script with these arguments, in this process: to load PyTorch anew takes seconds."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["view.py"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*map(str, args)])
        except SystemExit as e:
            code = e.code
        finally:
            sys.argv = argv
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def test_the_script_itself_draws_and_refuses(tmp_path):
    def script(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, ROOT / "view.py", path], capture_output=True, text=True)

    done = script(save(make_circuit(), tmp_path))
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "circuit.html").exists()
    refused(script(tmp_path / "nothing.json"), "nothing.json")


def page_of(circuit: dict, folder: Path) -> str:
    done = view(save(circuit, folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(folder / "circuit.html")
    return (folder / "circuit.html").read_text("utf-8")


def embedded(page: str) -> dict:
    """The circuit in a page of one."""
    data = r'<script type="application/json" id="circuits">(.*?)</script>'
    [circuit] = json.loads(re.search(data, page, re.S)[1])["circuits"]
    return circuit


def test_page_holds_every_node_and_edge_and_needs_no_network(tmp_path):
    circuit = make_circuit()
    page = page_of(circuit, tmp_path)
    assert embedded(page)["nodes"] == circuit["nodes"]
    assert embedded(page)["edges"] == circuit["edges"]
    for site, channels in circuit["nodes"].items():  # the means are cut down to the nodes
        assert embedded(page)["means"][site] == [circuit["means"][site][c] for c in channels]
    fetching = r"https?://|@import|url\(|<link|<img|\bsrc=|fetch\(|import\("
    assert not re.search(fetching, page.replace("'", ""))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circuit.html", "circuit.json"]


def test_hostile_text_stays_text(tmp_path):
    circuit = make_circuit()
    circuit["task"] = "</title><script>alert(1)</script> @@DATA@@ \ud800"
    page = page_of(circuit, tmp_path)
    assert page.count("</script>") == 3 and page.count("</title>") == 1
    assert "<b>" not in page.split("<script>")[0]
    assert "<" not in re.search(r'id="circuits">(.*?)</script>', page, re.S)[1]
    assert embedded(page)["task"] == circuit["task"]
    shown = [ex["tokens"] for ex in embedded(page)["examples"]]
    assert shown == [ex["tokens"] for ex in circuit["examples"]]


def test_values_that_json_lacks_become_null_and_out_names_the_file(tmp_path):
    circuit = make_circuit()
    circuit["loss_heldout"] = float("inf")
    circuit["validation"]["necessity"] = float("nan")
    text = json.dumps(circuit).replace("0.1123", "1e999")
    assert view(save(text, tmp_path), f"--out={tmp_path / 'x.html'}").returncode == 0
    data = embedded((tmp_path / "x.html").read_text("utf-8"))
    assert data["loss"] is data["loss_heldout"] is data["validation"]["necessity"] is None
    assert not (tmp_path / "circuit.html").exists()


def test_page_fills_each_mark_once_whatever_the_parts_look_like(tmp_path):
    template = tmp_path / "x.html"
    template.write_text("<a>@@DATA@@<b>@@GRAPH@@<c>@@TITLE@@")
    filled = page(template, data="@@TITLE@@", title="@@DATA@@ \\1")
    graph = (ROOT / "graph.js").read_text("utf-8")
    assert filled == f"<a>@@TITLE@@<b>{graph}<c>@@DATA@@ \\1"
    for parts in ({"title": ""}, {"title": "", "data": "", "more": ""}):  # too few, too many
        with pytest.raises(ValueError, match="more|data"):
            page(template, **parts)
    assert not re.search("</script|<!--", graph)  # either would end, or change, the script it stands in


def without(key: str) -> dict:
    return {k: v for k, v in make_circuit().items() if k != key}


def changed(**values: object) -> dict:
    return make_circuit() | values


def with_edge(edge: list) -> dict:
    circuit = make_circuit()
    return changed(edges=circuit["edges"] + [edge], n_edges=circuit["n_edges"] + 1)


BAD = {
    "truncated": (json.dumps(make_circuit())[:-400], "not JSON"),
    "empty": ("", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "a list": ([1, 2], "not a circuit"),
    "no edges": (without("edges"), "'edges'"),
    "no nodes and no seed": ({k: v for k, v in without("nodes").items() if k != "seed"}, "'nodes'"),
    "other format": (changed(format="sparse-circuit-9"), "sparse-circuit-9"),
    "model without d_head": (
        changed(model={"dir": "x", "sha256": "y", "n_layer": 2, "d_model": 8, "n_head": 1}),
        "d_head"),
    "unknown site": (changed(nodes={"0.attn.z": [1]}), "0.attn.z"),
    "edge to nowhere": (with_edge(["0.attn.act_in", 999, "0.attn.v", 1, 0.5]), "0.attn.act_in.999"),
    "edge of a list": (with_edge([["0.attn.act_in"], 1, "0.attn.v", 1, 0.5]), "unhashable"),
    "edge without weight": (with_edge(["0.attn.act_in", 1, "0.attn.v", 1]), "weight"),
    "count off": (changed(n_nodes=999), "n_nodes"),
    "nodes a list": (changed(nodes=[3]), "wrong type"),
    "example without tokens": (changed(examples=[{}]), "examples[0].tokens"),
    "text for a loss": (changed(loss="<b>"), "'loss'"),
    "heads of a string": (changed(heads=["012"]), "head"),
    "head without its constants": (changed(means={s: m for s, m in make_circuit()["means"].items() if not s.endswith("attn.q")}), "attn.q"),
    "head past the last": (changed(heads=[[0, 16, None]]), "head"),
    "one answer": (changed(answers=["x"]), "answers"),
}


def refused(done: subprocess.CompletedProcess, word: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("view.py: ") and done.stderr.count("\n") == 1
    assert word in done.stderr


@pytest.mark.parametrize("name", BAD)
def test_bad_circuit_is_one_line_exit_2_and_no_file(name, tmp_path):
    content, word = BAD[name]
    refused(view(save(content, tmp_path)), word)
    assert [p.name for p in tmp_path.iterdir()] == ["circuit.json"]


def test_bad_paths_are_one_line_exit_2_and_no_file(tmp_path):
    refused(view(tmp_path / "nothing.json"), "nothing.json")
    refused(view(tmp_path), "cannot read")
    refused(view(), "usage")
    good = save(make_circuit(), tmp_path)
    before = good.read_bytes()
    refused(view(good, f"--out={tmp_path / 'no' / 'x.html'}"), "--out")
    refused(view(good, f"--out={tmp_path}"), "--out")
    refused(view(good, f"--out={good}"), "--out")
    refused(view(good, "--colour=red"), "--colour")
    assert [p.name for p in tmp_path.iterdir()] == ["circuit.json"] and good.read_bytes() == before


def open_page(page: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM after the scripts ran, and every line that it wrote to the console, errors too."""
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--disable-quic", *flags]
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *quiet,
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
         "--window-size=1400,1000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_what_the_nodes_do_in_the_data_is_on_the_page_where_it_was_measured(tmp_path):
    circuit = make_circuit(final=True)
    assert embedded(page_of(circuit, tmp_path))["described"] is None
    found = describe(circuit)
    nodes_path(tmp_path / "circuit.json").write_text(json.dumps(found))
    page = page_of(circuit, tmp_path)
    assert embedded(page)["described"] == found and page.count("</script>") == 3


def spoilt(**values: object) -> dict:
    return describe(make_circuit()) | values


def with_example(**values: object) -> dict:
    found = spoilt()
    found["nodes"]["0.attn.q"][0]["examples"][0] |= values
    return found


UNUSABLE = {
    "truncated": json.dumps(spoilt())[:-40],
    "a list": "[1]",
    "other format": json.dumps(spoilt(format="sparse-circuit-nodes-9")),
    "other model": json.dumps(spoilt(model="x")),
    "other circuit": json.dumps(spoilt(nodes={})),
    "a number for a token": json.dumps(with_example(tokens=[1, 2, 3, 4, 5])),
    "too few activations": json.dumps(with_example(activations=[0.5])),
    "outside its text": json.dumps(with_example(at=5)),
    "text for an activation": json.dumps(with_example(activations=list("<b>12"))),
    "no number": json.dumps(with_example(quantile=float("nan"))),
    "no mean": json.dumps(spoilt()).replace('"mean"', '"man"'),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_description_is_a_line_and_the_page_is_drawn_without(name, tmp_path):
    plain = page_of(make_circuit(), tmp_path)
    nodes_path(tmp_path / "circuit.json").write_text(UNUSABLE[name])
    done = view(save(make_circuit(), tmp_path))
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "circuit.nodes.json" in done.stderr and "tools.inspect" in done.stderr
    assert (tmp_path / "circuit.html").read_text("utf-8") == plain


def test_heads_bring_their_constants_and_an_older_file_has_none(tmp_path):
    circuit = make_circuit()
    for head, (layer, number, sink) in zip(embedded(page_of(circuit, tmp_path))["heads"], circuit["heads"], strict=True):
        assert (head["layer"], head["head"], head["sink"]) == (layer, number, sink)
        for z in "qk":
            assert head[z] == circuit["means"][f"{layer}.attn.{z}"][16 * number : 16 * number + 16]
    assert embedded(page_of(without("heads"), tmp_path))["heads"] == []


def make_program(circuit: dict) -> str:
    """Of the form that tools.program writes: a marked line a node, some statements over several lines."""
    lines = ['"""A circuit </script><b> as a program."""', "import numpy as np", "", "TABLE = {'\\t': '@@DATA@@'}", ""]
    for site, channels in circuit["nodes"].items():
        lines.append(f"    # {site}, not a node: # {site}")
        for i, channel in enumerate(channels):
            name = f"L{site.replace('.', '_')}_{channel}"
            if i % 2:
                lines += [f"    {name} = (  # {site}.{channel}", "        0.5 * t +", "        0.25)", "    y = 0"]
            else:
                lines.append(f"    {name} = 0.5 * t + 0.1  # {site}.{channel}")
        lines += [" " * 9, "        # indented, but behind an empty line"]
    return "\n".join(lines) + "\n"


def test_the_program_beside_a_circuit_is_on_its_page_each_line_with_its_node(tmp_path):
    circuit = make_circuit(final=True)
    assert embedded(page_of(circuit, tmp_path))["program"] is None
    text = make_program(circuit)
    (tmp_path / "program.py").write_text(text, "utf-8")
    page = page_of(circuit, tmp_path)
    program = embedded(page)["program"]
    assert "\n".join(line for line, _ in program) + "\n" == text and page.count("</script>") == 3

    ids = [f"{site}.{c}" for site, cs in circuit["nodes"].items() for c in cs]
    lines = {id: [line for line, of in program if of == id] for id in ids}
    for site, channels in circuit["nodes"].items():
        for i, channel in enumerate(channels):
            own = lines[f"{site}.{channel}"]
            assert own[0].endswith(f"# {site}.{channel}")
            assert own[1:] == (["        0.5 * t +", "        0.25)"] if i % 2 else [])
    assert sum(map(len, lines.values())) == sum(of is not None for _, of in program)


def test_a_program_of_another_circuit_or_none_at_all_is_left_out_and_said(tmp_path):
    circuit = make_circuit()
    text = make_program(circuit)
    first = f"0.attn.act_in.{circuit['nodes']['0.attn.act_in'][0]}"
    path = tmp_path / "program.py"
    without = "; the page is without it\n"

    def said():
        done = view(save(circuit, tmp_path))
        assert done.returncode == 0 and done.stderr.endswith(without) and done.stderr.count("\n") == 1
        return done.stderr

    for wrong in (text.replace(f"# {first}\n", "\n"), f"{text}x = 1  # 1.mlp.post_act.1023\n", ""):
        path.write_text(wrong)
        assert said() == f"view.py: {path} is of another circuit; run python -m tools.program CIRCUIT again{without}"
    path.write_bytes(b"\xff")
    assert "not UTF-8" in said()
    path.unlink()
    path.mkdir()
    assert str(path) in said()


def test_a_program_is_of_the_file_named_circuit_json_alone(tmp_path):
    (tmp_path / "program.py").write_text("")
    other = tmp_path / "smaller.json"
    other.write_text(json.dumps(make_circuit()))
    assert view(other).returncode == 0 and (tmp_path / "smaller.html").exists()


def pair(tmp_path: Path, a: dict, b: dict) -> tuple[Path, Path]:
    """The circuits' files, in folders as two runs have them."""
    folders = tmp_path / "demo" / "quote", tmp_path / "demo1" / "quote"
    for folder in folders:
        folder.mkdir(parents=True)
    return save(a, folders[0]), save(b, folders[1])


def test_two_circuits_give_one_page_beside_the_first_that_names_the_second(tmp_path):
    a, b = make_circuit(), make_circuit(seed=1) | {"task": "other_</title>task"}
    paths = pair(tmp_path, a, b)
    assert view(paths[0]).returncode == 0
    own = paths[0].with_suffix(".html")
    before = own.read_bytes()
    done = view(*paths)
    assert (done.returncode, done.stderr) == (0, "")
    over = own.with_name("circuit.over.demo1.html")
    assert done.stdout.splitlines()[-1] == str(over) and own.read_bytes() == before
    page = over.read_text("utf-8")
    data = json.loads(re.search(r'id="circuits">(.*?)</script>', page, re.S)[1])
    assert [c["edges"] for c in data["circuits"]] == [a["edges"], b["edges"]]
    assert [c["path"] for c in data["circuits"]] == [*map(str, paths)]
    assert "single_double_quote and other_&lt;/title&gt;task" in page.split("</title>")[0]

    paths[0].with_name("small.json").write_text(json.dumps(make_circuit(seed=2)))  # of one folder: by its name
    assert view(paths[0], paths[0].with_name("small.json")).returncode == 0
    assert own.with_name("circuit.over.small.html").exists() and own.read_bytes() == before
    assert view(*paths, f"--out={tmp_path / 'x.html'}").returncode == 0 and (tmp_path / "x.html").exists()


def test_two_circuits_that_do_not_fit_are_refused(tmp_path):
    a = make_circuit()
    paths = pair(tmp_path, a, make_circuit(n_layer=3))
    refused(view(*paths), "n_layer is 2 and 3")
    narrower = {site: mean[:-1] if site == "1.mlp.resid_delta" else mean for site, mean in a["means"].items()}
    save(a | {"means": narrower}, paths[1].parent)
    refused(view(*paths), "1.mlp.resid_delta has 256 and 255 channels")
    save(a, paths[1].parent)
    refused(view(paths[0], paths[0]), "twice")
    refused(view(*paths, paths[1]), "3 circuits")
    refused(view(paths[0], tmp_path / "nothing.json"), "nothing.json")
    refused(view(*paths, f"--out={paths[1]}"), "--out")
    refused(view(*paths, f"--out={paths[1].with_name('program.py')}"), "--out")
    save("[]", paths[1].parent)
    refused(view(*paths), str(paths[1]))
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("program.py"))


@needs_browser
@pytest.mark.parametrize("size", [dict(), dict(per_site=12, n_layer=4, edge_share=0.5, final=True)],
                         ids=["small", "large"])
def test_browser_draws_one_mark_per_node_and_one_line_per_edge_without_error(size, tmp_path):
    circuit = make_circuit(**size)
    page_of(circuit, tmp_path)
    dom, console = open_page(tmp_path / "circuit.html", tmp_path)
    assert console == []
    marks = re.findall(r'<g class="node[^"]*" data-id="([^"]+)"', dom)
    assert sorted(marks) == sorted(f"{s}.{c}" for s, cs in circuit["nodes"].items() for c in cs)
    assert len(re.findall(r'<path class="edge (?:pos|neg)" d=', dom)) == circuit["n_edges"]
    assert dom.count("node picked") == 1 and 'aria-pressed="true"' in dom
    assert "NaN" not in dom and "undefined" not in dom.split("<script")[0]
    assert re.search(r'<span[^>]*style="background: color-mix[^>]*>', dom)
    body = dom.split("<script")[0]
    assert "controls.random_signs" in body and "0.69 nats with 77 edges, target not met" in body and "3.412" in body and "curve" not in body
    assert "Shown: sufficient &amp; needed. Each of the &lt;9&gt; parts was left out." in body
    assert "<b>" + "hello" not in dom and "&lt;/script&gt;&lt;b&gt;" in body


ACT = """<script>
const hint = document.getElementById('tip');
const point = (el, x) => el.dispatchEvent(
  new PointerEvent('pointermove', {bubbles: true, clientX: x, clientY: x}));
const press = (el, key) => el.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
const all = document.querySelectorAll('.node, .end, .hit');
const seen = {tips: 0, lit: 0, picked: 0, tokens: 0, all: all.length};
for (const el of all) {
  point(el, 5);
  seen.tips += !hint.hidden;
  seen.lit += document.querySelectorAll('.on').length > 1;
}
for (const el of document.querySelectorAll('.node')) {
  press(el, 'Enter');
  seen.picked += el.matches('.picked');
  point(document.querySelector('pre span'), 9);
  seen.tokens += hint.textContent.startsWith(el.dataset.id + ' = ');
}
seen.data = {};
for (const el of document.querySelectorAll('.node')) {
  press(el, 'Enter');
  const text = document.getElementById('data').textContent;
  seen.data[el.dataset.id] = text.includes('on at 12.5% of 65,536 tokens of data/<b>/') ? document.querySelectorAll('#data dd').length : text;
}
const change = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event('change'));
};
seen.looks = [];
for (const head of document.getElementById('head').options) {
  for (const prompt of [0, 3]) {
    change('head', head.value);
    change('prompt', prompt);
    for (const key of ['ArrowUp', 'ArrowUp', 'ArrowDown'])
      press(document.getElementById('pattern'), key);
    seen.looks.push(document.getElementById('looked').innerText);
    seen.tips_of_tokens = [...document.querySelectorAll('#looked span')].map(s => s.dataset.tip);
    seen.looks.push(seen.tips_of_tokens);
  }
}
seen.chosen = [];
for (const el of document.querySelectorAll('.node')) {
  const before = document.getElementById('head').value;
  press(el, 'Enter');
  seen.chosen.push([el.dataset.id, before, document.getElementById('head').selectedOptions[0].text]);
}
document.querySelector('[data-go]').click();
point(document.body, 1);
seen.hidden = hint.hidden;
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


@needs_browser
def test_hovering_and_selecting_work_for_every_node_and_link(tmp_path):
    circuit = make_circuit(final=True)
    nodes_path(tmp_path / "circuit.json").write_text(json.dumps(describe(circuit)))
    page = page_of(circuit, tmp_path)
    (tmp_path / "act.html").write_text(page.replace("</body>", ACT), "utf-8")
    dom, console = open_page(tmp_path / "act.html", tmp_path)
    assert console == []
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]+)"', dom)[1]))
    assert seen["tips"] == seen["lit"] == seen["all"] > circuit["n_nodes"] + circuit["n_edges"]
    assert seen["hidden"]
    assert seen["picked"] == seen["tokens"] == circuit["n_nodes"]
    assert set(seen["data"].values()) == {4} and len(seen["data"]) == circuit["n_nodes"]
    check_attention(circuit, seen)


def check_attention(circuit: dict, seen: dict) -> None:
    """The shares that the page shows of the last token but one, in prompts 0 and 3, of every head."""
    looks = iter(seen["looks"])
    for layer, head, sink in circuit["heads"]:
        for e in (0, 3):
            example = circuit["examples"][e]
            T = len(example["tokens"]) - 1  # one up from the last
            channels = {}
            for z in "qk":
                site = f"{layer}.attn.{z}"
                for c in range(16 * head, 16 * head + 16):
                    held = [circuit["means"][site][c]] * T
                    if c in circuit["nodes"][site]:
                        held = example["activations"][site][circuit["nodes"][site].index(c)]
                    channels[z, c] = held
            logits = [sum(channels["q", c][T - 1] * channels["k", c][s] for c in range(16 * head, 16 * head + 16)) / 4
                      for s in range(T)]
            parts = [math.exp(x) for x in logits]
            whole = sum(parts) + (0 if sink is None else math.exp(sink))
            text, tips = next(looks), next(looks)
            shown = [float(tip.split(": ")[1].rstrip("%")) for tip in tips]
            assert len(tips) == T + 1 and shown[T] == 0  # it cannot see what comes after it
            assert shown[:T] == pytest.approx([100 * part / whole for part in parts], abs=0.051)
            stated = re.match(r"sink (.*?)%", text)
            assert (stated is None) == (sink is None)
            if stated:
                assert float(stated[1]) == pytest.approx(100 * math.exp(sink) / whole, abs=0.051)
    for node, before, now in seen["chosen"]:  # a channel of a head brings up that head
        place = re.fullmatch(r"(\d+)\.attn\.[qkv]\.(\d+)", node)
        if place:
            assert now == f"layer {place[1]} head {int(place[2]) // 16}"


@needs_browser
def test_browser_opens_a_circuit_without_nodes_or_examples(tmp_path):
    empty = dict(nodes={}, edges=[], examples=[], embedding=[], unembedding=[])
    page_of(changed(**empty, n_nodes=0, n_edges=0), tmp_path)
    assert open_page(tmp_path / "circuit.html", tmp_path)[1] == []


@needs_browser
def test_browser_check_notices_a_script_that_throws(tmp_path):
    page = page_of(make_circuit(), tmp_path)
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("'use strict';", "'use strict'; missing();", 1), "utf-8")
    assert "missing is not defined" in "".join(open_page(broken, tmp_path)[1])
