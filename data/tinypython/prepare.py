"""Makes the training data (paper A.6): train.bin and val.bin (token ids, uint16), and meta.json.

    python data/tinypython/prepare.py [--tokens=6_000_000] [--idioms=0.7]
                                      [--source=stdlib|installed|packages|DIR]

- Two parts: idioms (idioms.py, generated) and real code (.py files of this Python installation, of
  a directory, or of the wheels in packages.txt, which are read as zip files; nothing is ever
  imported or run).
- Real code is deduplicated by content; what does not parse, was generated or is mostly a table is
  dropped.
- A document goes to train or val by its hash, so never to both. Each ends with <|endoftext|>.
- The same options and inputs give the same bytes.
"""

import ast
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # run as a script, from wherever

from config import as_script, bounded, die, parse  # noqa: E402
from data.tinypython.idioms import programs  # noqa: E402
from data.tinypython.tokenizer import (  # noqa: E402
    DEFAULT, EOT, load_tokenizer, tokenizer_hash)

THREADS = 2  # of the tokenizer: any machine has two cores
BATCH = 64  # documents that are tokenized at once


@dataclass
class PrepareConfig:
    out: str = str(HERE)  # folder for the three files
    tokens: int = bounded(6_000_000, at_least=1)  # in all
    idioms: float = bounded(0.7, at_least=0, at_most=1)  # their share of the tokens
    source: str = "stdlib"  # of real code: stdlib, installed, packages or a folder
    seed: int = 0  # of the idioms and of the order of documents
    val: float = bounded(0.02, above=0, below=1)  # share of the documents in val.bin
    tokenizer: str = str(DEFAULT)  # a .tiktoken file, or what a published model has
    wheels: str = str(HERE / "wheels")  # where the packages are kept


# --- real code -------------------------------------------------------------------------------

# Folders that are left out: lists of test cases read unlike other code. (idlelib: half tests.)
TESTS = ("test", "tests", "testing", "idlelib")


def read_source(source: str, wheels: Path) -> Iterator[bytes]:
    """The .py files of a source, as they are."""
    if source in ("stdlib", "installed"):
        paths = sysconfig.get_paths()
        yield from tree(Path(paths["stdlib"]), skip=(*TESTS, "site-packages", "dist-packages"))
        if source == "installed":
            for site in sorted({paths["purelib"], paths["platlib"]}):
                yield from tree(Path(site), skip=TESTS)
    elif source == "packages":
        for wheel in download(HERE / "packages.txt", wheels):
            yield from files_of(wheel)
    else:
        yield from tree(Path(source))


def tree(root: Path, skip: tuple[str, ...] = ()) -> Iterator[bytes]:
    """The .py files under a folder, in an order that does not hang on the file system."""
    for folder, folders, files in os.walk(root):
        # os.walk goes where this list, changed in place, says
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for file in sorted(files):
            if not file.endswith(".py"):
                continue
            try:
                content = Path(folder, file).read_bytes()
            except OSError:  # a dangling link, a file that we may not read
                continue
            yield content


def files_of(wheel: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not set(TESTS) & set(name.split("/")):
                yield archive.read(name)


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


BY_A_PROGRAM = re.compile(
    r"auto-?(matically )?generated|(file|module|code) (is|was) generated|"
    r"^\W*generated (by|from|with|using)|generated from ['\"]|do not edit",
    re.IGNORECASE | re.MULTILINE,
)
# a line that begins like an entry of a table; not a docstring
DATA_LINE = re.compile(r"""^\s*(['"(\[{})\]]|-?[0-9])(?!"")""", re.MULTILINE)


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


def real_code(files: Iterable[bytes], dropped: Counter) -> Iterator[str]:
    """The files worth keeping, each content once; `dropped` counts the others by their reason.

    They come in the order of their hashes, so that the first of them are a fair sample of all.
    """
    texts = {}
    for raw in files:
        try:
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            dropped["unparsable"] += 1
            continue
        if not text.strip():
            dropped["empty"] += 1
        elif digest(text) in texts:
            dropped["duplicate"] += 1
        else:
            texts[digest(text)] = text

    for key in sorted(texts):
        if generated(texts[key]):
            dropped["generated"] += 1
        elif not parses(texts[key]):
            dropped["unparsable"] += 1
        else:
            yield texts[key]


# --- tokens ----------------------------------------------------------------------------------

Document = tuple[str, np.ndarray]  # hash of its text, ids with EOT


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def encode(
    part: str, texts: Iterable[str], target: int, tokenizer: tiktoken.Encoding
) -> list[Document]:
    """One document after another until they hold `target` tokens, or no more come."""
    documents = []
    total = 0
    start = time.monotonic()
    said = start
    texts = iter(texts)
    end = tokenizer.eot_token
    while total < target:
        batch = list(islice(texts, BATCH))
        if not batch:
            break
        encoded = tokenizer.encode_ordinary_batch(batch, num_threads=THREADS)
        for text, ids in zip(batch, encoded):
            if total < target:
                documents.append((digest(text), np.array([*ids, end], dtype="<u2")))
                total += len(ids) + 1
        if time.monotonic() - said > 2:
            said = time.monotonic()
            left = max((said - start) * (target / total - 1), 0)
            print(f"{part}: {total:,} of {target:,} tokens, {left:.0f} s left", flush=True)

    took = f"{time.monotonic() - start:.0f} s"
    print(f"{part}: {total:,} tokens in {len(documents):,} documents, {took}", flush=True)
    return documents


def split(documents: list[Document], val: float) -> dict[str, list[np.ndarray]]:
    """The documents of train and of val, in their order. Of two documents each gets one.

    A hash is a fair draw that never changes: a document stays on its side whatever else comes.
    """
    # by its last 13 digits: the first ones decided the order in which the documents came
    ranked = sorted((int(key[-13:], 16) / 16**13, key) for key, _ in documents)
    n = sum(rank < val for rank, _ in ranked)
    if val > 0 and len(ranked) > 1:
        n = min(max(n, 1), len(ranked) - 1)
    chosen = {key for _, key in ranked[:n]}
    return {
        "train": [ids for key, ids in documents if key not in chosen],
        "val": [ids for key, ids in documents if key in chosen],
    }


# --- the script ------------------------------------------------------------------------------

def prepare(cfg: PrepareConfig) -> None:
    """Writes the three files. ValueError or OSError, in one line, where that is not possible."""
    start = time.monotonic()
    named = cfg.source in ("stdlib", "installed", "packages")
    if not named and not Path(cfg.source).is_dir():
        raise ValueError(
            f"--source={cfg.source}: not stdlib, installed, packages or a directory that exists"
        )
    tokenizer = load_tokenizer(cfg.tokenizer)
    if EOT not in tokenizer.special_tokens_set:
        raise ValueError(f"--tokenizer={cfg.tokenizer} has no {EOT}, which ends a document")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # better to fail now than when all is done

    documents = collect(cfg, tokenizer)
    idioms = split(documents["idioms"], cfg.val)
    code = split(documents["code"], cfg.val)
    meta = describe(cfg, tokenizer, idioms, code)
    total = meta["tokens"]["idioms"]["train"] + meta["tokens"]["code"]["train"]
    share = meta["share"]
    if sum(meta["tokens"]["code"].values()) < wanted_code(cfg):
        wanted = f"{1 - cfg.idioms:.0%}"
        print(f"{cfg.source} ran out: {share['code']:.0%} of train.bin is real code, not {wanted}")

    # the parts are mixed in train.bin and stand one behind the other in val.bin: train.py measures
    # the loss on each of them
    train = idioms["train"] + code["train"]
    random.Random(cfg.seed).shuffle(train)
    val = idioms["val"] + code["val"]
    write_all(out, {
        "train.bin": b"".join(ids.tobytes() for ids in train),
        "val.bin": b"".join(ids.tobytes() for ids in val),
        "meta.json": (json.dumps(meta, indent=1) + "\n").encode(),
    })
    print(f"{cfg.out}: {total:,} tokens in train.bin ({share['idioms']:.0%} idioms), "
          f"{sum(map(len, val)):,} in val.bin; {time.monotonic() - start:.0f} s in all")


def wanted_code(cfg: PrepareConfig) -> int:
    """How many of the tokens are to be real code."""
    return cfg.tokens - round(cfg.tokens * cfg.idioms)


def collect(cfg: PrepareConfig, tokenizer: tiktoken.Encoding) -> dict[str, list[Document]]:
    """The documents of both parts."""
    n_code = wanted_code(cfg)
    idioms = encode("idioms", programs(cfg.seed), cfg.tokens - n_code, tokenizer)

    dropped = Counter()
    texts = real_code(read_source(cfg.source, Path(cfg.wheels)), dropped)
    code = encode("code", texts, n_code, tokenizer)
    if n_code and not code:
        raise ValueError(
            f"--source={cfg.source}: no Python file in it parses; name another or use --idioms=1"
        )
    if dropped:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        print(f"code: dropped {counts}")
    return {"idioms": idioms, "code": code}


def describe(
    cfg: PrepareConfig, tokenizer: tiktoken.Encoding, idioms: dict, code: dict
) -> dict:
    """The content of meta.json."""
    parts = {"idioms": idioms, "code": code}
    documents = {}
    tokens = {}
    for part, sides in parts.items():
        documents[part] = {side: len(docs) for side, docs in sides.items()}
        tokens[part] = {side: sum(map(len, docs)) for side, docs in sides.items()}
    total = tokens["idioms"]["train"] + tokens["code"]["train"]
    val_parts = {}
    start = 0
    for part in parts:
        end = start + tokens[part]["val"]
        if end > start:  # with --idioms=0 or 1 there is one part
            val_parts[part] = [start, end]
        start = end
    return {
        "documents": documents,
        "tokens": tokens,
        "share": {part: round(tokens[part]["train"] / total, 4) for part in parts},
        "val_parts": val_parts,
        "vocab_size": tokenizer.n_vocab,
        "eot": tokenizer.eot_token,
        "tokenizer": Path(cfg.tokenizer).name,
        "tokenizer_hash": tokenizer_hash(cfg.tokenizer),
        "seed": cfg.seed,
        "source": cfg.source,
        "python": platform.python_version(),
        "options": {"tokens": cfg.tokens, "idioms": cfg.idioms, "val": cfg.val},
    }


def write_all(out: Path, files: dict[str, bytes]) -> None:
    """Each under a temporary name first, so that a full disk changes nothing.

    meta.json vouches for the others: it is the first to go and the last to come.
    """
    temporary = {}
    try:
        for name, content in files.items():
            handle, temporary[name] = tempfile.mkstemp(dir=out, prefix=f".{name}.")
            with open(handle, "wb") as f:
                f.write(content)
        (out / "meta.json").unlink(missing_ok=True)
        for name in files:
            os.chmod(temporary[name], 0o644)  # mkstemp makes private files
            os.replace(temporary.pop(name), out / name)
    finally:
        for name in temporary.values():
            os.unlink(name)


def main(argv: list[str]) -> int:
    cfg = parse(PrepareConfig, argv)
    try:
        prepare(cfg)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        die(" ".join(str(e).split()))
    return 0


if __name__ == "__main__":
    as_script(main)
