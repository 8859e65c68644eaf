"""Real code for the data: where it comes from, and what of it is kept.

- `stdlib`, `installed`: the .py files of this Python; `packages`: the wheels of packages.txt, read
  as zip files. Nothing is ever imported or run.
- Folders of .py files, and the forms in which corpora of code are published: .jsonl, .jsonl.gz,
  .jsonl.zst (a key `content` or `text`) and .parquet (a column of that name).
- `chunks` names the work, piece by piece, in an order that does not hang on the machine;
  `documents_of` does one piece, in whatever process.
"""
import ast
import glob
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

NAMED = ("stdlib", "installed", "packages")
CORPORA = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
KEYS = ("content", "text")  # of a document in a corpus
# Folders that are left out: lists of test cases read unlike other code. (idlelib: half tests.)
TESTS = ("test", "tests", "testing", "idlelib")
FILES = 16  # of a chunk
BYTES = 1 << 18  # of a chunk, at least, where it is made of documents and not of names

# A piece of work: what its items are (file: paths; raw: bytes of .py files; line: of a .jsonl;
# text), and the items.
Chunk = tuple[str, list]


# --- where it comes from ---------------------------------------------------------------------

def check_source(source: str) -> None:
    """ValueError, in one line, where a source is neither known by name nor there."""
    if source in NAMED:
        return
    for path in source.split(","):
        if not (os.path.isdir(path) or (os.path.isfile(path) and path.endswith(CORPORA))):
            raise ValueError(
                f"--source={path}: not {', '.join(NAMED)}, a folder that exists, or a file that "
                f"ends in {', '.join(CORPORA)}")


def chunks(source: str, wheels: Path) -> Iterator[Chunk]:
    """The work that a source is, always in the same order. ValueError where it cannot be had."""
    if source in ("stdlib", "installed"):
        paths = sysconfig.get_paths()
        skip = (*TESTS, "site-packages", "dist-packages")
        files = tree(Path(paths["stdlib"]), skip)
        if source == "installed":
            for site in sorted({paths["purelib"], paths["platlib"]}):
                files += tree(Path(site), TESTS)
        yield from in_pieces("file", shuffled(files))
    elif source == "packages":
        for wheel in download(Path(__file__).with_name("packages.txt"), wheels):
            yield from in_pieces("raw", files_of(wheel))
    else:
        for path in source.split(","):
            yield from chunks_of_path(path)


def chunks_of_path(path: str) -> Iterator[Chunk]:
    """Of a folder, all .py files and all corpora in it; or of one corpus."""
    corpora = [path]
    if os.path.isdir(path):
        yield from in_pieces("file", shuffled(tree(Path(path))))
        found = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
        corpora = sorted(file for file in found if file.endswith(CORPORA))
    for file in corpora:
        if file.endswith(".parquet"):
            yield from in_pieces("text", texts_of_parquet(file))
        else:
            yield from in_pieces("line", lines_of(file))


def in_pieces(kind: str, items: Iterable) -> Iterator[Chunk]:
    """A few items at a time: names of files, or documents until they are large enough."""
    piece = []
    size = 0
    for item in items:
        piece.append(item)
        size += len(item) if isinstance(item, (bytes, str)) else 0
        if size >= BYTES or (kind in ("file", "raw") and len(piece) >= FILES):
            yield kind, piece
            piece = []
            size = 0
    if piece:
        yield kind, piece


def tree(root: Path, skip: tuple[str, ...] = ()) -> list[tuple[Path, str]]:
    """The .py files under a folder, each with its path below it."""
    found = []
    for folder, folders, files in os.walk(root):
        # os.walk goes where this list, changed in place, says
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                found.append((path, path.relative_to(root).as_posix()))
    return found


def shuffled(files: list[tuple[Path, str]]) -> list[Path]:
    """In the order of their names' hashes, so that the first of them are a fair sample of all."""
    return [path for path, name in sorted(files, key=lambda file: digest(file[1]))]


def files_of(wheel: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not set(TESTS) & set(name.split("/")):
                yield archive.read(name)


def lines_of(path: str) -> Iterator[bytes]:
    """The lines of a .jsonl, compressed or not. ValueError where the file breaks off."""
    read = partial(gzip.open if path.endswith(".gz") else open, path, "rb")
    damaged = (EOFError, gzip.BadGzipFile, zlib.error)
    if path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ValueError("a .zst file needs the package zstandard: "
                             "pip install -r requirements-extra.txt") from None
        read = partial(open_zst, path, zstandard)
        damaged = (zstandard.ZstdError,)
    try:
        with read() as f:
            for line in f:
                if line.strip():
                    yield line
    except damaged as e:
        raise ValueError(f"{path} is cut off or damaged ({e}); get it anew") from None


def open_zst(path: str, zstandard) -> io.BufferedReader:
    # large corpora are compressed in several frames and with windows past the usual 128 MB
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return io.BufferedReader(decompressor.stream_reader(open(path, "rb"), read_across_frames=True))


def texts_of_parquet(path: str) -> Iterator[str]:
    """The documents of a .parquet file, group by group. ValueError where it has none."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("a .parquet file needs the package pyarrow: "
                         "pip install -r requirements-extra.txt") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [key for key in KEYS if key in file.schema_arrow.names]
            if not columns:
                raise ValueError(f"{path} has no column {' or '.join(KEYS)}")
            for batch in file.iter_batches(batch_size=256, columns=columns[:1]):
                for text in batch.column(0).to_pylist():
                    yield text if isinstance(text, str) else ""  # a null
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} cannot be read: {e}") from None


def download(requirements: Path, wheels: Path) -> list[Path]:
    """The wheels of a file of `name==version` lines, fetched unless they are there already."""
    pins = []
    for line in requirements.read_text(encoding="utf-8").split("\n"):
        if line.strip() and not line.startswith("#"):
            name, _, version = line.strip().partition("==")
            pins.append((plain(name), version))

    present = wheels_of(pins, wheels)
    if len(present) == len(pins):
        return present

    print(f"downloading {len(pins)} wheels to {wheels}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only = ["--only-binary=:all:", "--no-deps"]  # a source package would run its setup.py
    where = [f"--dest={wheels}", f"--requirement={requirements}"]
    done = subprocess.run([*pip, *only, *where], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ValueError(
            f"pip cannot download the packages ({said}); try again later or use another --source"
        )
    present = wheels_of(pins, wheels)
    if len(present) < len(pins):
        raise ValueError(
            f"pip left out some wheels of {requirements.name}; empty {wheels} and try again"
        )
    return present


def wheels_of(pins: list[tuple[str, str]], wheels: Path) -> list[Path]:
    """Of the (name, version) pairs those that a folder holds, in their order."""
    found = {}
    for file in wheels.glob("*-*.whl"):
        name, version = file.name.split("-")[:2]
        found[plain(name), version] = file
    return [found[pin] for pin in pins if pin in found]


def plain(name: str) -> str:
    """A package's name as in the names of wheels."""
    return re.sub(r"[-_.]+", "_", name).lower()


# --- what is kept of it ----------------------------------------------------------------------

BY_A_PROGRAM = re.compile(
    r"auto-?(matically )?generated|(file|module|code) (is|was) generated|"
    r"^\W*generated (by|from|with|using)|generated from ['\"]|do not edit",
    re.IGNORECASE | re.MULTILINE,
)
# a line that begins like an entry of a table; not a docstring
DATA_LINE = re.compile(r"""^\s*(['"(\[{})\]]|-?[0-9])(?!"")""", re.MULTILINE)


def documents_of(chunk: Chunk, dropped: Counter) -> list[str]:
    """The documents of a chunk that are worth keeping; `dropped` counts the others by reason."""
    kind, items = chunk
    kept = []
    for item in items:
        try:
            text = text_of(kind, item)
        except OSError:  # a dangling link, a file that we may not read
            continue
        except (ValueError, KeyError, TypeError, RecursionError):
            dropped["bad line" if kind == "line" else "unparsable"] += 1
            continue
        reason = why_not(text)
        if reason is None:
            kept.append(text)
        else:
            dropped[reason] += 1
    return kept


def text_of(kind: str, item) -> str:
    """An item of a chunk as text. ValueError, KeyError or TypeError where it is none."""
    if kind == "line":
        content = json.loads(item)
        text = content[KEYS[0] if KEYS[0] in content else KEYS[1]]
        if not isinstance(text, str):
            raise TypeError("a document that is not text")
        text.encode()  # half of a pair of surrogates is no text either
    elif kind == "text":
        text = item
    else:
        raw = item.read_bytes() if kind == "file" else item
        text = raw.decode("utf-8-sig")
    return text.replace("\r\n", "\n")


def why_not(text: str) -> str | None:
    """The reason for which a document is left out, or None."""
    if not text.strip():
        return "empty"
    if generated(text):
        return "generated"
    return None if parses(text) else "unparsable"


def generated(text: str) -> bool:
    """Whether a program wrote it, or it holds data rather than code."""
    lines = text.splitlines()
    if BY_A_PROGRAM.search("\n".join(lines[:10])):  # such a note stands at the top
        return True
    # nobody types lines like that
    if max(map(len, lines)) > 1000 or len(text) > 200 * len(lines):
        return True
    return len(DATA_LINE.findall(text)) > 0.6 * len(lines)


def parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
