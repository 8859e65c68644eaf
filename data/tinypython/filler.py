"""Ordinary code for a task's prompt to stand in: word lists, and small pieces drawn from them.

- Every piece takes a `random.Random` and returns text; the same state gives the same text.
- Nothing here has anything to do with what a prompt asks, so that the answer never follows from it.
- The words are this file's own: those of idioms.py, which make up the pretraining data, are more,
  and validate.py renames a prompt's names to some that are only there.
"""
import random

# --- words -----------------------------------------------------------------------------------
# Their order is part of every task: it decides which prompts a seed draws.

NOUNS = """account answer batch block book box buffer button cache card cell city client color
column config count customer data day device document email entry event field file folder game
graph group header image index input item job key label layer letter level limit line list map
match message model month name node note number object offset option order page param parent part
path pattern payment person picture player point port price product project query queue record
region report request result room route row rule sample score section sensor server session shape
signal size sound source stage state station step store stream string student table tag target task
team test text ticket time title token total tree type unit user value vector version view weight
width window word worker year""".split()
VERBS = """add build check clean close collect compare copy count create delete draw fetch filter
find format get group join list load log make mark merge move open parse pick plot print process
read remove render report reset run save scan search select send set show skip sort split start
stop store sum test trim update use validate write""".split()
ADJECTIVES = """active bad big blue bright closed cold dark done empty extra fast final first free
full good green hidden high invalid large last late local long lost low main missing new next old
open plain private public quick ready red second short simple slow small strong total unknown valid
warm wrong""".split()

# names of variables, parameters and attributes
VARIABLES = """a age b c color count d data email end first height index info item k key label last
left length level limit line message n name node number offset path price result right row score
size source speed start state step target text title total user value weight width word x
y""".split()

# variables that a loop adds to
GROWN = """acc body buffer chars collected current found history known out output pending seen
summary unique used visited""".split()

# a file to read and one to write, told apart by the name alone
FILES = (
    ("in_path", "out_path"),
    ("in_file", "out_file"),
    ("infile", "outfile"),
    ("reader", "writer"),
    ("read_path", "write_path"),
    ("source_path", "target_path"),
    ("config_path", "log_path"),
)

# files, and how they are opened
OPENED = (
    ("config_path", "r"),
    ("read_path", "r"),
    ("csv_path", "r"),
    ("log_file", "r"),
    ("output_file", "w"),
    ("output_path", "w"),
    ("write_path", "w"),
    ("log_path", "w"),
)


def words(r: random.Random, low: int = 1, high: int = 6) -> str:
    """`low` to `high` words, as in a message or a comment."""
    n = r.randint(low, high)
    return " ".join(r.choice(r.choice((NOUNS, VERBS, ADJECTIVES))) for _ in range(n))


def number(r: random.Random) -> str:
    """A whole number; one in ten has three digits, most have one or two."""
    if r.random() < 0.9:
        return str(r.randint(0, 99))
    return str(r.randint(100, 999))


def variable(r: random.Random) -> str:
    """A variable's name."""
    return r.choice(VARIABLES)


def own_word(shared: str, choices: list[str]) -> str:
    """A word for one prompt of a pair, where the other has no place for it.

    `shared`, what both prompts have, decides it. If it were drawn, two pairs could differ in this
    word alone, and so have their other prompt in common.
    """
    return random.Random(shared).choice(choices)


# --- lines -----------------------------------------------------------------------------------

# What a line or a condition can be. The kind is drawn first, and only that kind draws further.
LINES = (
    "number", "sum", "call", "text", "method", "message", "comment", "list", "if", "return",
)
SHORT_CONDITIONS = ("name", "not", "greater", "equal", "in")
LONG_CONDITIONS = ("length", "divisible")


def line(r: random.Random) -> str:
    """One statement (of one or two lines) or comment; its strings come in both quote styles."""
    a = variable(r)
    b = variable(r)
    q = r.choice("'\"")  # without both styles around it, a quote would tell of itself
    match r.choice(LINES):
        case "number":
            return f"{a} = {number(r)}"
        case "sum":
            return f"{a} = {b} + {number(r)}"
        case "call":
            return f"{a} = {r.choice(VERBS)}_{r.choice(NOUNS)}({b})"
        case "text":
            return f"{a} = {q}{words(r, 1, 2)}{q}"
        case "method":
            return f"{a}.{r.choice(VERBS)}({b})"
        case "message":
            return f"{r.choice(('print', 'log', 'send', 'show'))}({q}{words(r)}{q})"
        case "comment":
            return f"# {words(r, 2)}"
        case "list":
            return f"{a} = [{number(r)}, {number(r)}]"
        case "if":
            return f"if {a}:\n    {b} = {number(r)}"
        case "return":
            return f"if {a} > {number(r)}:\n    return {b}"


def assignment(r: random.Random) -> str:
    """A variable set to a number or to another variable."""
    name = variable(r)
    values = (number(r), variable(r))  # both are drawn, whichever is taken
    return f"{name} = {r.choice(values)}"


def condition(r: random.Random, *, long: bool = False) -> str:
    """A condition that ends in a name or a number; a long one has at least seven tokens."""
    a = variable(r)
    b = variable(r)
    match r.choice(LONG_CONDITIONS if long else SHORT_CONDITIONS + LONG_CONDITIONS):
        case "name":
            return a
        case "not":
            return f"not {a}"
        case "greater":
            return f"{a} > {number(r)}"
        case "equal":
            return f"{a} == {b}"
        case "in":
            return f"{a} in {b}"
        case "length":
            return f"len({r.choice(NOUNS)}s) {r.choice(('>', '<', '=='))} {number(r)}"
        case "divisible":
            return f"{a} % {number(r)} == {number(r)}"


def open_call(r: random.Random) -> str:
    """A file opened to read or to write, as its name says."""
    q = r.choice("'\"")
    path, mode = r.choice(OPENED)
    return f"open({path}, {q}{mode}{q})"


def grown(r: random.Random, item: str) -> tuple[str, str]:
    """How a variable that a loop adds to starts, and how it grows."""
    return r.choice((
        ("set()", f".add({item})"),
        ('""', f" += {item}"),
        ("[]", f".append({item})"),
        ("0", " += 1"),
    ))


def bracket_remark(r: random.Random) -> str:
    """A comment that opens a bracket or a brace: a bare one, wherever it stands, tells nothing."""
    index = number(r)
    noun = r.choice(NOUNS)
    return r.choice((
        f"# {noun}s[{index}",
        f"# see [{index}] for the {noun}",
        f"# a {{{noun}}}",
        f"# {noun}: {{{index}",
    ))


def loop_header(r: random.Random) -> str:
    """A `for` line of any of three kinds."""
    items = r.choice(NOUNS) + "s"
    return r.choice((
        f"for i, {variable(r)} in enumerate({items}):\n",
        f"for i in range(len({items})):\n",
        f"for key, value in {items}.items():\n",
    ))


# --- blocks, each of which ends with a newline ------------------------------------------------

def indented(text: str, by: int = 4) -> str:
    """Every line of `text`, `by` spaces further in."""
    return "".join(" " * by + row + "\n" for row in text.split("\n"))


def if_block(r: random.Random) -> str:
    """An `if` inside a function, with two statements in its body."""
    return f"    if {condition(r)}:\n{indented(line(r), 8)}        {assignment(r)}\n"


def function(r: random.Random, *, low: int = 0, high: int = 4) -> str:
    """A function's header and `low` to `high` statements, for a prompt to go on with."""
    parameters = ", ".join(r.sample(VARIABLES, r.randint(0, 3)))
    text = f"def {r.choice(VERBS)}_{r.choice(NOUNS)}({parameters}):\n"
    if r.random() < 0.2:  # most functions have no docstring
        text += f'    """{words(r, 2).capitalize()}."""\n'
    for _ in range(r.randint(low, high)):
        text += indented(line(r))
    return text


def whole_function(r: random.Random) -> str:
    """A function to its end, and blank lines after it."""
    body = function(r, high=3)
    return f"{body}    return {variable(r)}\n" + "\n" * r.randint(1, 2)
