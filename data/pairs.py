"""Pairs of prompts from a file, as they are written; tasks.py encodes them (docs/tasks.md).

- `.jsonl`, a pair a line: {"prompts": [a, b], "answers": [x, y]}. A prompt is text or a list of
  token ids, an answer is text or a token id.
- `.csv`: columns clean, corrupted, answer, wrong; all of it text.
- The first line that is not as it should be is a ValueError of one line, with its number.
"""
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

FEWEST = 64  # pairs in a file: of these about 16 are held out, and fewer say nothing
COLUMNS = ("clean", "corrupted", "answer", "wrong")  # of a .csv; a .jsonl has two keys


@dataclass(frozen=True)
class Line:
    """A pair as a file has it: each prompt text or token ids, each answer text or a token id."""
    number: int     # where it begins in the file, counted from 1
    prompts: tuple  # two
    answers: tuple  # two: the right token of the first and of the second prompt


@dataclass(frozen=True)
class PairFile:
    path: str
    sha256: str
    lines: tuple[Line, ...]


def read_pairs(path: str) -> PairFile:
    """The pairs of a .jsonl or .csv file, as they are written.

    ValueError, in one line, with the number of the first line that is not as it should be.
    """
    try:
        with open(path, "rb") as f:
            raw = f.read()
        text = raw.decode("utf-8").removeprefix("\ufeff")  # the mark that Windows begins with
        parse_lines = csv_lines if path.lower().endswith(".csv") else json_lines
        lines = tuple(parse_lines(text))
    except OSError as e:
        raise ValueError(f"cannot read the pairs in {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        number = raw.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}, line {number}: it is not UTF-8") from e
    except ValueError as e:
        raise ValueError(f"{path}, {e}") from e
    if len(lines) < FEWEST:
        raise ValueError(f"{path} has {len(lines)} pairs; a task needs at least {FEWEST}")
    return PairFile(path, hashlib.sha256(raw).hexdigest(), lines)


def json_lines(text: str) -> Iterator[Line]:
    """Of a .jsonl; ValueError that begins with the line's number."""
    # not splitlines, which also cuts at characters that may stand inside a JSON string
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            prompts, answers = pair_of_json(row)
        except ValueError as e:
            raise ValueError(f"line {number}: {e}") from e
        yield Line(number, prompts, answers)


def pair_of_json(row: str) -> tuple[tuple, tuple]:
    try:
        content = json.loads(row)
    except json.JSONDecodeError as e:
        raise ValueError(f"it is not JSON ({e.msg} at column {e.colno})") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; brackets too deep
        raise ValueError("it is not JSON that can be read") from e
    if not isinstance(content, dict):
        raise ValueError('it is not an object {"prompts": [.., ..], "answers": [.., ..]}')
    for key in ("prompts", "answers"):
        if key not in content:
            raise ValueError(f"it has no key '{key}'")
        if not (isinstance(content[key], list) and len(content[key]) == 2):
            raise ValueError(f"its '{key}' are not a list of two")
    for prompt in content["prompts"]:
        # type(), because true is an int as well
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not (is_ids or isinstance(prompt, str)):
            raise ValueError("a prompt is neither text nor a list of token ids")
    for answer in content["answers"]:
        if not (type(answer) is int or isinstance(answer, str)):
            raise ValueError("an answer is neither text nor a token id")
    return tuple(content["prompts"]), tuple(content["answers"])


def csv_lines(text: str) -> Iterator[Line]:
    """Of a .csv, which begins with a header; ValueError that begins with the line's number."""
    rows = csv_rows(text)
    number, header = next(rows, (1, []))
    names = [name.strip().lower() for name in header]
    if any(names.count(column) != 1 for column in COLUMNS):
        raise ValueError(f"line {number}: a header names the columns {', '.join(COLUMNS)}, each "
                         f"once; this one has {', '.join(header)[:80]!r}")
    places = [names.index(column) for column in COLUMNS]
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {number}: {len(row)} cells under a header of {len(header)}; a "
                             "text with a comma, a quote or a newline stands in double quotes")
        clean, corrupted, answer, wrong = [row[place] for place in places]
        yield Line(number, (clean, corrupted), (answer, wrong))


def csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its first line."""
    # a file with the line ends of Windows has them inside its texts too; models are not used to it
    rows = csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline=""), strict=True)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise ValueError(f"line {number}: it is not CSV ({e})") from e
        if row is None:
            return
        if any(cell.strip() for cell in row):  # a spreadsheet can end in rows of nothing
            yield number, row
