"""The prompts of the twenty tasks (paper Table 1): each function draws the two of a pair.

- They take a `random.Random`; the same state gives the same pair. The two differ only where the
  behaviour is decided; the comment shows how they end, with a bar.
- The ordinary code that they stand in is filler.py's; what they ask for stands in `TASKS`, in
  tasks.py.
"""
from data.tinypython.filler import (FILES, GROWN, NOUNS, VARIABLES, VERBS, assignment,
                                    bracket_remark, condition, function, grown, if_block, indented,
                                    line, loop_header, number, open_call, own_word, variable,
                                    whole_function, words)


def single_double_quote(r):  # print('two words|    print("two words|
    before = function(r)
    call = r.choice(("print", "log", "send", "show", "warn", "write", f"{r.choice(NOUNS)}.append",
                     f"{r.choice(VERBS)}_{r.choice(NOUNS)}", "raise ValueError"))
    text = words(r)
    return f"{before}    {call}('{text}", f'{before}    {call}("{text}'


def bracket_counting(r):  # x = [1, y|    x = [[1, y|
    before = function(r)
    element = r.choice((number, number, variable))  # numbers twice as often
    row = ", ".join(element(r) for _ in range(r.randint(1, 6)))
    start = f"{before}    {variable(r)} = "
    return f"{start}[{row}", f"{start}[[{row}"


def set_or_string_fixedvarname(r):  # current = set() ... current|    current = "" ... current|
    before = function(r, high=2)
    between = "".join(indented(line(r)) for _ in range(r.randint(0, 2)))
    item = variable(r)
    loop = f"    for {item} in {r.choice(NOUNS)}s:\n"
    if r.random() < 0.4:
        loop += indented(line(r), 8)
    end = f"\n{between}{loop}        current"
    return f"{before}    current = set(){end}", f'{before}    current = ""{end}'


def set_or_string(r):  # seen = set() ... seen|    seen = "" ... seen|
    name, other = r.sample(GROWN, 2)
    item = variable(r)
    other_start, other_growth = grown(r, item)
    others = []  # in half the prompts another variable, which may be of the wrong type
    growth = ""
    if r.random() < 0.5:
        others.append(f"    {other} = {other_start}\n")
        if r.random() < 0.5:
            growth = f"        {other}{other_growth}\n"

    before = function(r, high=2)
    place = r.randint(0, len(others))  # the other variable stands before or after
    before += "".join(others[:place])
    between = indented(line(r))  # drawn in any case: each seed's prompts hang on the order of draws
    after = "".join(others[place:]) + between * r.randint(0, 1)
    loop = f"    for {item} in {r.choice(NOUNS)}s:\n{growth}"
    end = f"\n{after}{loop}        {name}"
    return f"{before}    {name} = set(){end}", f'{before}    {name} = ""{end}'


def final_kwarg(r):  # def f(a, b=None, c|    def f(a, b, c|
    *plain, decided, last = r.sample(VARIABLES, r.randint(4, 5))
    before = whole_function(r)
    start = f"{before}def {r.choice(VERBS)}_{r.choice(NOUNS)}({', '.join(plain)}, {decided}"
    return f"{start}=None, {last}", f"{start}, {last}"


def class_init(r):  # self.name =|    self.value =|
    others = r.sample([v for v in VARIABLES if v not in ("name", "value")], r.randint(0, 3))
    asked = r.choice((("name", "value"), ("value", "name")))  # so that the place does not tell
    parameters = ", ".join(["self", *others, *asked])
    start = f"{whole_function(r)}class {r.choice(NOUNS).capitalize()}:\n"
    start += f"    def __init__({parameters}):\n"
    start += "".join(f"        self.{x} = {x}\n" for x in others)
    return f"{start}        self.name =", f"{start}        self.value ="


def with_as(r):  # with open(path, 'r')|    f = open(path, 'r')|
    before = function(r)
    call = open_call(r)
    name = own_word(before + call, ["f", "f", "f", "file", "handle", "fp"])
    return f"{before}    with {call}", f"{before}    {name} = {call}"


def bracket_brace(r):  # x = {1: 2, 3|    x = [1, 2, 3|
    element = r.choice((number, variable))
    items = [element(r) for _ in range(2 * r.randint(1, 2) + 1)]
    remark = bracket_remark(r)
    start = function(r)
    if r.random() < 0.3:  # often enough that a bracket's bare presence does not tell
        start += f"    {remark}\n"
    start += f"    {variable(r)} = "
    entries = "".join(f"{key}: {value}, " for key, value in zip(items[::2], items[1::2]))
    return f"{start}{{{entries}{items[-1]}", f"{start}[{', '.join(items)}"


def with_open(r):  # open(in_path, '|    open(out_path, '|
    read, write = r.choice(FILES)
    start = f"{function(r)}    {r.choice(('with ', 'f = ', 'file = '))}open("
    end = r.choice((", '", ', "'))
    return start + read + end, start + write + end


def for_while(r):  # for x|    while x|
    before = function(r)
    name = variable(r)
    return f"{before}    for {name}", f"{before}    while {name}"


def else_elif(r):  # else|    elif|
    start = function(r, high=3) + if_block(r)
    return f"{start}    else", f"{start}    elif"


def fstring_brace(r):  # print(f"the ... is|    print("the ... is|
    before = function(r)
    call = r.choice(("print", "print", "print", "log", f"{r.choice(NOUNS)}s.append"))
    q = r.choice("'\"")
    text = f"the {words(r, 6, 8)} is"  # long: the `f` must lie out of the last tokens' reach
    return f"{before}    {call}(f{q}{text}", f"{before}    {call}({q}{text}"


def if_ternary(r):  # x = y; new line: if len(z) > 3|    x = y if len(z) > 3|
    start = f"{function(r)}    {assignment(r)}"
    test = condition(r, long=True)
    return f"{start}\n    if {test}", f"{start} if {test}"


def var_swap(r):  # x, y = y,|    y, x = x,|
    before = function(r)
    return f"{before}    x, y = y,", f"{before}    y, x = x,"


def indent_for(r):  # a `for` line after an `if`|    the same inside the `if`|
    before = function(r, high=3) + if_block(r)
    loop = loop_header(r)
    return f"{before}    {loop}", f"{before}        {loop}"


def lambda_func(r):  # load = lambda x|    def x|
    before = function(r)
    name = r.choice("xyabncdkmvwpst")
    variable = own_word(before + name, VERBS)
    return f"{before}    {variable} = lambda {name}", f"{before}    def {name}"


def if_equals(r):  # if x|    x|
    before = function(r)
    name = variable(r)
    return f"{before}    if {name}", f"{before}    {name}"


def enumerate_range(r):  # for i, x in|    for i in|
    before = function(r)
    i = r.choice("iiiijk")
    return f"{before}    for {i}, {own_word(before + i, VARIABLES)} in", f"{before}    for {i} in"


def var_if(r):  # if x == True|    x = True|
    before = function(r)
    name = variable(r)
    value = r.choice(("True", "False"))
    return f"{before}    if {name} == {value}", f"{before}    {name} = {value}"


def while_return_true(r):  # while True|    return True|
    before = function(r)
    return f"{before}    while True", f"{before}    return True"
