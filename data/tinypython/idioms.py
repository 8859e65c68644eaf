"""Simple, repetitive, varied Python programs (paper A.6, the first part of the data).

A program is one to four pieces (functions, classes, loose statements) that share a few names and
habits: which quotes, how many blank lines, which words. Most idioms are templates in GRAMMAR:
`$name` and the like are slots, filled by the method of that name, by a list of words or by another
rule; a digit (`$name1`) means the same again wherever it stands in the template. A slot of several
lines takes the indentation of its own. What a template cannot say (matching quotes, signatures,
what a file's name means) is a method of Pen.

All that the twenty tasks (paper Table 1) turn on is here, each in many guises and among other code.
Everything is valid Python. Programs come in blocks, each drawn from the seed and its own number, so
that many processes can write them; inside a block no program comes twice.

    python data/tinypython/idioms.py [SEED]     # five to look at

The bytes of train.bin hang on the order of the random draws: a method that draws once more or in
another order makes other data, and so another model, from the same seed.
"""

import random
import re
import sys
from collections.abc import Iterator
from itertools import count, islice

# --- words -----------------------------------------------------------------------------------

NOUNS = """
account action address age album alert answer apple area array author backup bag ball bank basket
batch bird block board body book bottle bowl box branch bridge bucket buffer bus button cache cake
call camera card cart case cat cell chain chair channel chapter child circle city client clock
cloud code coin color column command comment config contact cookie copy corner cost country course
crate cup customer day deck desk device dish doctor document dog door draft driver edge editor
email engine entry error event farm field file filter fish flag floor flower folder fruit game
garden gate goal grade graph group guest guide hand header hill home horse host hotel hour house
image index island item job key kitchen label lamp language layer leaf lesson letter level library
light line link list lock machine map market mark match meal member menu message metric minute
model month movie name node note number object offer office order owner page painting paper parent
park part path patient pattern payment people photo phone piece place plan planet plant plate
player point pool post price product profile project prize question queue radio rain rate record
region report request result river road robot room route row rule sale sample school score screen
season seat section seed segment sensor server session shape shelf shop signal size skill song
source stage star station step stock stone store story street string student survey table tag
target task teacher team temperature test text ticket time title token tool town track train tree
trip truck type unit user value vector version video village wall watch water weight wheel window
winner word worker year zone
""".split()
VERBS = """
add apply append build calculate call change check choose clean clear close collect compare
compute convert copy count create decode delete describe draw drop encode end fetch fill filter
find finish fix format get group handle join keep list load log look make map mark match measure
merge move open order parse pick play plot prepare print process pull push read receive remove
rename render repeat replace report reset reverse run save scan search select send set show
shuffle skip solve sort split start stop store sum swap test track trim turn update use validate
visit walk watch write
""".split()
ADJECTIVES = """
active bad big black blue bold bright broken busy cheap clean clear closed cold common dark deep
dry early easy empty equal extra fast final first free fresh full good gray great green half happy
hard heavy hidden hot invalid large last late light local long lost low main missing modern new
next nice old open other plain public quick quiet rare ready red remote rich round sad safe second
secret sharp short simple single slow small soft strong sweet tall tiny total unknown valid warm
weak white whole wide wild wrong yellow young
""".split()
PEOPLE = """
Alice Anna Ben Bob Carol Dan David Emma Eve Frank Grace Henry Ivan Jack Kate Leo Lisa Maria Max
Nina Oscar Paul Rosa Sam Tom Zoe
""".split()
SMALL = "a and at by for from in is no not of on or the to was with you your".split()
# Second words of names, so that names are as many in 10B tokens as in 10M.
SUFFIXES = """
id key name list map set count total index size limit path file type code text value item info data
node line row group table state level rate ratio score cost price date time start end min max sum
""".split()
LETTERS = "x x x y y y a b n c d k m v w p q s t".split()
VARIABLES = """
value name item data result total count text line word key index size width height number score
price user node limit start end left right first last row col points lines words items values
names numbers users scores rows state step level length message title label path info target
source offset delta speed weight color age email
""".split()
COLLECTIONS = """
items values names numbers words lines rows users scores points keys nodes files records tasks
orders entries data xs tokens parts groups labels prices letters pairs cells cards events books
""".split()
SINGULAR = """
item value name number word line row user score point key node record task order entry x token
part group label price letter pair cell card event book c s w n v i t
""".split()
READ_FILES = """
infile src source input_file input_path reader in_path src_path source_path config_path in_file
read_path data_in template
""".split()
WRITE_FILES = """
outfile dst dest output_file output_path writer out_path dst_path target_path log_path out_file
write_path data_out report
""".split()
ANY_FILES = """
path filename file_name file_path fname log_file data_path name csv_path target
""".split()
# Names made of two words, of which the first tells what the file is for.
READ_STEMS = "in input src source read config template reader".split()
WRITE_STEMS = "out output dst dest write target report log writer".split()
FILE_SUFFIXES = "path file name data dir csv json text list".split()
EXTENSIONS = "txt csv json log md py xml html dat ini".split()
# What a loop builds up. `current` is the one that task set_or_string asks about.
ACCUMULATORS = ["current"] * 12 + """
letters seen result text names output found visited unique message buffer total words found_items
keys parts acc out tags state chars pending history collected line summary known remaining answer
used body values title items label path s
""".split()
ERRORS = ["ValueError"] * 3 + """
KeyError TypeError RuntimeError IndexError OSError NotImplementedError
""".split()
MODULES = """
os sys re json math time random csv string logging datetime itertools collections functools
""".split()

FIELDS = """
id kind status owner size color weight height width depth speed price amount rating priority version
created updated enabled visible language country city email phone url host port user password title
summary body author tags notes position rank level stock currency tax discount
""".split()
CONSTANTS = """
MAX_SIZE MIN_SIZE LIMIT DEFAULT_NAME TIMEOUT RETRIES DEBUG VERBOSE ROOT BASE_PATH ENCODING SEPARATOR
WIDTH HEIGHT COLORS LEVELS VERSION SEED BATCH EPOCHS THRESHOLD RATE ORIGIN UNITS STEPS SCALE
""".split()
TYPES = "int str float bool list dict tuple set bytes".split()
HINTS = "int str float bool list dict".split()
UNITS = "cm km kg ms px mb kb min sec deg pt em".split()
STATES = """
idle ready running paused stopped open closed draft sent paid shipped done failed active locked
""".split()

# Slots that a plain list of words fills; twice in a list is twice as often.
WORDS = {
    "anynoun": NOUNS,
    "small": SMALL,
    "index": list("iiiijkn"),
    "extension": EXTENSIONS,
    "error": ERRORS,
    "module": MODULES,
    "op": "+ + - *".split(),
    "compare": "== == == != < > >= <=".split(),
    "bool": ["True", "True", "False"],
    "suffix": SUFFIXES,
    "field": FIELDS,
    "constant": CONSTANTS,
    "type": TYPES,
    "hint": HINTS,
    "unit": UNITS,
    "state": STATES,
    "file": ["f", "f", "f", "file", "fh", "handle", "fp"],
}

# --- grammar: {rule: {template: weight}} -----------------------------------------------------

GRAMMAR = {
    # inside strings
    "text": {
        "$noun": 8, "$adjective": 8, "$verb": 7, "$person": 7, "$adjective $noun": 15,
        "$verb the $noun": 10, "$label: $adjective": 3, "$label: $number": 2,
        "$verb $number $noun": 8, "$words": 14, "$sentence": 12, "($noun)": 1,
        "[$adjective] $noun": 1, "$noun, $noun": 1, "$number, $number": 1, "$noun #$number": 1,
        "no $noun.": 1, "$noun = ": 1, "$verb {}": 1, "": 1, ", ": 1,
    },
    "label": {"$noun": 3, "$adjective $noun": 2},
    "formatted": {
        "$label: {$name}": 2, "$label {$name}": 2, "$label is {$name}": 1, "the {$name}": 1,
        "{$name} $label": 1, "$label: {$name}, {$name}": 1, "$label: {len($collection)}": 1,
        "{$name} + {$name}": 1, "the $words is {$name}": 4, "$words: {$name}": 1,
        "$words {$name}": 1, "$sentence is {$name}": 1, "the $words $words is {$name}": 2,
        "$sentence $words is {$name}": 1,
    },
    "unformatted": {
        "$label: $adjective": 1, "$label $verb": 1, "$label is $adjective": 1, "the $label": 1,
        "the $words is $adjective": 2, "the $words is not $adjective": 2, "$words": 1,
        "$sentence is not $adjective": 1, "the $words $words is $adjective": 1,
        "$sentence $words is not $adjective": 1,
    },
    # names and expressions
    "function": {
        "$verb_$noun": 10, "$verb": 4, "is_$adjective": 2, "$verb_$adjective_$noun": 2,
        "$verb_$compound": 2, "has_$noun": 1, "$noun_of": 1, "to_$noun": 1, "get_$field": 1,
        "set_$field": 1,
    },
    "compound": {
        "$noun_$suffix": 6, "$adjective_$noun": 4, "$noun_$field": 2, "n_$nouns": 1,
        "$verb_$suffix": 1, "$adjective_$noun_$suffix": 1,
    },
    "attribute": {
        "$noun": 4, "$variable": 5, "name": 1, "value": 1, "x": 1, "y": 1, "$field": 2,
        "$compound": 1,
    },
    "accumulator": {
        "$collection": 3, "$noun": 2, "$nouns": 2, "$name": 2, "$compound": 1, "all_$nouns": 1,
    },
    "callee": {
        "print": 9, "log": 4, "$collection.append": 4, "$verb": 2, "logger.info": 1, "self.log": 1,
        "out.write": 1, "warn": 1, "queue.put": 1, "logger.error": 1,
    },
    "aggregate": {"len": 3, "sum": 1, "max": 1, "min": 1, "sorted": 1, "list": 1, "set": 1},
    "value": {"$number": 8, "$name": 7, "$word": 5},
    "expression": {
        "$name $op $number": 6, "$name $op $value": 2, "$aggregate($collection)": 5,
        "$function($name)": 4, "$value": 3, "$collection[$number]": 2,
    },
    "condition": {
        "$name": 9, "not $name": 3, "$name $compare $value": 12, "$name == $bool": 3,
        "$name == None": 1, "$name in $collection": 4, "$name is None": 1, "$name is not None": 1,
        "len($collection) $compare $number": 4, "$name and $name": 1, "$name % $number == 0": 1,
        "$name % $number == $number": 2,
        "$name.startswith($word)": 1, "$function($name)": 1,
    },
    # lines: never a comment alone, so that a body may consist of any of them
    "line": {
        "$say": 12, "$assign": 5, "$flag": 4, "$augment": 1, "$swap": 6, "$ternary": 2, "$call": 3,
        "$fstring": 3, "$method": 1, "$comprehension": 1, "$sort": 2, "$remark\n$assign": 1,
        "assert $condition": 1,
    },
    "say": {
        "$callee($string)": 36, "$callee($string, $name)": 5, "$callee($name, $string)": 2,
        "$callee($string, $string)": 1, "$callee($string + $name)": 1,
        "$name = $function($string)": 2, "$name = $verb($string) + $name": 1,
        "$name = $verb($string) or $value": 1, "$callee($string)  # $text": 1,
        "$callee($q1$label: {}$q1.format($name))": 1, "$callee(len($string))": 1,
        "$callee($verb($string))": 1, "raise $error($string)": 1,
    },
    "fstring": {
        "$printer(f$q1$formatted$q1)": 5, "$printer($q1$unformatted$q1)": 4,
        "$name = f$q1$formatted$q1": 1,
    },
    "printer": {"print": 4, "log": 1, "$collection.append": 1},
    "assign": {"$name = $value": 1, "$name = $expression": 1},
    "flag": {"$name = $bool": 5, "$name = None": 1},
    "augment": {"$name += $value": 2, "$name -= $number": 1, "$name *= $number": 1},
    "swap": {
        "$name1, $name2 = $name2, $name1": 6, "$letter1, $letter2 = $letter2, $letter1": 5,
        "$attribute1, $attribute2 = $attribute2, $attribute1": 2,
        "$item1, $item2 = $item2, $item1": 1, "$name1, $name2 = $name2, $name1 $op $name2": 3,
        "$letter1, $letter2 = $letter2, $letter1 % $letter2": 1,
        "$letter1, $letter2 = $letter2, $letter1 + $letter2": 1,
        "$name1, $name2, $name3 = $name2, $name3, $name1": 1,
        "$name1, $name2 = $number, $number": 1,
    },
    "ternary": {
        "$name = $value if $name else $value": 4, "$name = $value if $condition else $value": 7,
    },
    "call": {
        "$name = $function($name, $value)": 1, "$function($name)": 1,
        "$function($name, $attribute=$value)": 1, "$function($name1=$name1, $name2=$name2)": 1,
        "$name = $function($flat)": 1,
        "$collection.append($name)": 1, "$collection.sort()": 1, "$name.$function()": 1,
        "print($name)": 1, "print($name, $name)": 1,
    },
    "sort": {
        "$name = sorted($collection, key=lambda $letter1: $letter1$tail)": 2,
        "$collection.sort(key=lambda $letter1: $letter1$tail)": 2,
        "$verb = lambda $letter1: $letter1$tail": 2,
        "$verb = lambda $letter1, $letter2=$number: $letter1 $op $letter2": 1,
        "$collection = list(map(lambda $letter1: $letter1$tail, $collection))": 1,
        "$name = max($collection, key=lambda $letter1: len($letter1))": 1,
    },
    "rest": {
        " + $collection": 3, " * $number": 2, " if $name else $value": 3, " or $name": 1,
        "  # $text": 2,
    },
    "tail": {"[0]": 1, "[1]": 1, ".$attribute": 2, " $op $number": 2, "[$word]": 1},
    "comprehension": {
        "$collection = [$item1$do for $item1 in $collection$filter]": 3,
        "$name = sum($item1 for $item1 in $collection)": 1,
        "$collection = [$verb($item1) for $item1 in $collection]": 1,
        "$collection = {$item1: len($item1) for $item1 in $collection}": 1,
        "$collection = [[$item1 for $item1 in row] for row in $collection]": 1,
        "$collection = [$item1 for $item1 in $collection if $item1 $compare $value]": 1,
    },
    "do": {"": 2, " * $number": 1, ".strip()": 1, ".lower()": 1},
    "filter": {"": 3, " if $name": 1},
    "method": {
        "$name1 = $name1.strip()": 1, "$name = $name.lower()": 1, "$name = $name.split($q1,$q1)": 1,
        "$name = $q1, $q1.join($collection)": 1, "$name = $name.replace($word, $word)": 1,
        "$name = $name[:$number]": 1, "$name = $name[::-1]": 1, "$name = str($name)": 1,
        "$name = int(input($string))": 1, "$name = $q1-$q1.join($collection)": 1,
    },
    "remark": {
        "# $text": 4, "# $verb the $noun ($adjective first)": 1, "# don't $verb it twice": 1,
        "# TODO: $verb it": 1, "# $collection[$number": 1, "# see [$number] for the $noun": 1,
        '# a "$noun" is $adjective': 1, "# $name = $number": 1,
    },
    # blocks
    "for": {
        "for $item in $collection:": 6, "for $name in $collection:": 3,
        "for $index in range($number):": 2, "for $index in range($name):": 2,
        "for $name in range($number):": 1, "for $index in range(len($collection)):": 1,
        "for $index in range(1, $number):": 1, "for $index, $item in enumerate($collection):": 6,
        "for $index, $name in enumerate($collection):": 1,
        "for key, value in $collection.items():": 1, "for k, v in $collection.items():": 1,
        "for $letter1, $letter2 in zip($collection, $collection):": 1, "for $letter in $nest:": 1,
    },
    "loop": {
        "$for\n    $body": 12,
        "for $index in range($number):\n    $letter1, $letter2 = $letter2, $letter1 + $letter2": 1,
    },
    "while": {
        "while $name1:\n    $body\n    $name1 $step": 4,
        "while $name1 $compare $value:\n    $body\n    $name1 $step": 3,
        "while $collection1:\n    $name = $collection1.pop()\n    $body": 1,
        "while not $name1:\n    $body\n    $name1 = $function($name1)": 1,
        "while True:\n    $body\n    if $condition:\n        break": 2,
        "while $name:\n    $body": 2,
        "while $letter2:\n    $letter1, $letter2 = $letter2, $letter1 % $letter2": 1,
    },
    "step": {"-= 1": 2, "+= $number": 1, "= $function($name)": 1},
    "branch": {
        "if $condition:\n    $body": 5, "if $condition:\n    $body\nelse:\n    $body": 4,
        "if $condition:\n    $body\nelif $condition:\n    $body": 3,
        "if $condition:\n    $body\nelif $condition:\n    $body\nelse:\n    $body": 5,
        "if $condition:\n    $body\n$for\n    $body": 3,
        "if $condition:\n    $body\n    $for\n        $body": 3,
        "if $condition:\n    $body\n$name = $value if $condition else $value": 1,
        "if $name1 > $name2:\n    $name1, $name2 = $name2, $name1": 2,
        "if $letter1 < $letter2:\n    $letter1, $letter2 = $letter2, $letter1": 1,
    },
    "flagtest": {
        "if $name == $bool:\n    $body": 4, "$name1 = $bool\nif $name1 == $bool:\n    $body": 3,
        "if $name == $bool:\n    $name = $bool": 2, "$name = $bool\n$name = $bool": 1,
    },
    "guard": {
        "if $condition:\n    raise $error($string)": 4,
        "if $condition:\n    $say\n    raise $error($string)": 1, "if $condition:\n    $exit": 2,
    },
    "attempt": {
        "try:\n    $body\nexcept $error:\n    $body": 3,
        "try:\n    $body\nexcept $error as e:\n    print(e)": 1,
        "try:\n    $body\nexcept $error:\n    pass": 1,
        "try:\n    $body\nexcept ($error, $error):\n    raise $error($string)": 1,
        "try:\n    $body\nfinally:\n    $say": 1,
    },
    "oneliner": {
        "def $verb($letter1): return $letter1 $op $number": 1,
        "def $letter1($letter2): return $letter2$tail": 1, "if $function($name): $name = $bool": 1,
        "while $function($name): $augment": 1, "for $index in range($number): print($name)": 1,
        "def $letter1($letter2):\n    return $letter2 $op $number": 2,
    },
    "block": {
        "$loop": 6, "$while": 4, "$branch": 6, "$flagtest": 3, "$guard": 3, "$attempt": 1,
        "$openfile": 2,
    },
    "idiom": {
        "$say": 6, "$say\n$say": 4, "$say\n$say\n$say": 6, "$fstring": 8, "$fstring\n$fstring": 4,
        "$numeric": 2, "$formatting": 2, "$lookup": 2, "$settings": 2, "$check": 2, "$status": 1,
        "$constants": 1, "$query": 2, "$brackets": 26, "$entries": 9, "$swap": 36,
        "$ternary": 8, "$call": 2, "$assign": 2,
        "$flag": 2, "$sort": 4, "$comprehension": 2, "$method": 2, "assert $condition, $string": 1,
        "$remark\n$line": 2, "$loop": 7, "$while": 6, "$branch": 7, "$flagtest": 4, "$guard": 4,
        "$attempt": 2, "$openfile": 24, "$buildup": 50, "$oneliner": 3,
    },
    # what a program is about, beyond the tasks: so that lines do not repeat in billions of tokens
    "numeric": {
        "$name1 = $name2 $op $number\n$name3 = $name1 / ($name2 + $number)": 1,
        "$name = ($name $op $name) $op $number": 2, "$name = round($name / $number.$number, 2)": 1,
        "$name = abs($name - $number) % $number1": 1, "$name = $number.$number * $name": 2,
        "$name = min(max($name, $number), $number)": 1, "$name = $name ** 2 + $name ** 2": 1,
        "$name = $name // $number + $name % $number": 1, "$name = divmod($name, $number)": 1,
        "$name, $name = divmod($name, $number)": 1, "$name = -$name": 1,
        "$name = pow($name, $number)": 1, "$name = int($name * $number) / $number1": 1,
        "$compound = $name $op $compound $op $number": 2,
    },
    "formatting": {
        "print(f$q1$label: {$name:.2f} $unit$q1)": 2, "print(f$q1{$name:>$number} {$name}$q1)": 1,
        "print($q1%s is %d $unit$q1 % ($name, $name))": 1, "$name = f$q1{$name}_{$name}.$extension$q1": 2,
        "print($q1{}: {}$q1.format($name, $compound))": 1, "print($string, $name, sep=$q1, $q1)": 1,
        "print($q1-$q1 * $number)": 1, "$name = str($name).zfill($number)": 1,
        "$name = $string.join($collection)": 1, "print(f$q1{$name} $unit, {$compound} $unit$q1)": 2,
    },
    "lookup": {
        "$name = $collection.get($word, $value)": 2, "$name = $collection[$word][$number]": 1,
        "$name = $compound[$name]": 2, "$compound = $collection.index($name)": 1,
        "$name = $collection.setdefault($word, [])": 1, "$name = $collection[$number:$number]": 1,
        "$name = next(iter($collection), None)": 1, "$name = $collection[-$number]": 1,
        "$name = {$word: $value, $word: $value}[$name]": 1, "$name = getattr($name, $word, None)": 1,
        "$collection[$q1$field$q1] = $value": 2, "$name = $name1.$field + $name1.$compound": 1,
        "$name = $noun.$field": 2, "del $collection[$word]": 1,
    },
    "settings": {
        "$noun.$field = $value": 3, "$noun.$field = $noun.$compound": 1,
        "$noun = $klassname($field=$value, $compound=$value)": 2,
        "$noun = dict($field=$value, $field1=$value)": 1,
        "$compound = {\n    $q1$field$q1: $value,\n    $q1$compound$q1: $value,\n}": 1,
        "$compound = config.get($q1$field$q1, $value)": 1, "$compound = $value": 2,
        "$compound = $name\n$compound = $number": 1, "os.environ[$q1$constant$q1] = $word": 1,
    },
    "klassname": {"$base": 1, "$base$base": 3},
    "check": {
        "assert $compound $compare $value": 1, "assert isinstance($name, $type), $string": 1,
        "if isinstance($name, $type):\n    $body": 1, "if not isinstance($name, ($type, $type)):\n    $exit": 1,
        "if $number < $compound <= $number:\n    $body": 1, "if $name in ($value, $value, $value):\n    $body": 1,
        "if $compound is None:\n    $compound = $value": 2, "if any($item1 $compare $value for $item1 in $collection):\n    $body": 1,
        "if all($item1.$field for $item1 in $collection):\n    $body": 1,
        "if $noun.$field $compare $value:\n    $body": 2,
    },
    "status": {
        "if $noun.status == $q1$state$q1:\n    $noun.status = $q1$state$q1": 2,
        "$noun.status = $q1$state$q1 if $condition else $q1$state$q1": 1,
        "state = {$q1$state$q1: $q1$state$q1, $q1$state$q1: $q1$state$q1}[state]": 1,
        "while state != $q1$state$q1:\n    state = $function(state)": 1,
        "if state == $q1$state$q1:\n    $body\nelif state == $q1$state$q1:\n    $body\nelse:\n    $exit": 1,
    },
    "constants": {
        "$constant = $value": 2, "$constant = $number\n$constant = $word": 1,
        "$constant = ($value, $value, $value)": 1, "$constant = $q1$noun.$extension$q1": 1,
        "$constant = $number * $number": 1, "$constant = {$word, $word, $word}": 1,
    },
    "query": {
        "$collection = [$item1.$field for $item1 in $collection if $item1.$field $compare $value]": 2,
        "$collection = {$item1.$field: $item1 for $item1 in $collection}": 1,
        "$compound = sum($item1.$field for $item1 in $collection)": 1,
        "$compound = len({$item1.$field for $item1 in $collection})": 1,
        "$compound = max($collection, key=lambda $letter1: $letter1.$field)": 1,
        "$collection = sorted($collection, key=lambda $letter1: ($letter1.$field, $letter1.$compound))": 1,
        "$collection = list(filter(None, $collection))": 1, "$name = $collection.count($value)": 1,
        "$collection = [($item1, $item1.$compound) for $item1 in $collection]": 1,
    },
    "typed": {
        "def $function($letter1: $hint, $letter2: $hint) -> $hint:\n    return $letter1 $op $letter2": 1,
        "def $function($compound: $hint, $name: $hint = $number) -> $hint:\n    $idiom\n    return $name": 2,
        "def $function($compound: $hint | None = None) -> None:\n    $idiom": 1,
        "@property\ndef $field(self) -> $hint:\n    return self._$field": 1,
    },
    "generator": {
        "def $function($collection1):\n    for $item1 in $collection1:\n        if $condition:\n            yield $item1": 1,
        "def $function($letter1):\n    while $letter1 $compare $number:\n        yield $letter1\n        $letter1 += $number": 1,
        "def $function($collection1, $name1=$number):\n    for $index1 in range(0, len($collection1), $name1):\n"
        "        yield $collection1[$index1:$index1 + $name1]": 1,
        "def $function($name1):\n    for $index1 in range($name1):\n        yield $index1 $op $number": 1,
    },
    "test": {
        "def test_$function():\n    assert $function1($value) == $value": 1,
        "def test_$compound():\n    $name1 = $function($value)\n    assert $name1 $compare $value": 1,
        "def test_$function1():\n    $collection1 = [$value, $value]\n    assert $function1($collection1) == $nest": 1,
        "def test_$compound():\n    $noun1 = $klassname($field=$value)\n    assert $noun1.$field == $value": 1,
    },
    "record": {
        "class $klassname:\n    $field: $hint\n    $compound: $hint = $number": 1,
        "@dataclass\nclass $klassname:\n    $field: $hint\n    $field1: $hint = $number\n    $compound: $hint | None = None": 2,
        "$klassname = namedtuple($q1$base$q1, [$q1$field$q1, $q1$compound$q1])": 1,
        "class $klassname(Exception):\n    pass": 1,
        "class $klassname(Enum):\n    $constant = $number\n    $constant1 = $number": 1,
    },
    # pieces
    "return": {
        "return $name": 3, "return $expression": 2, "return $bool": 4, "return $nest": 3,
        "return $name, $name": 1, "return $string": 1, "return $condition": 1,
        "return $value if $name else $value": 2, "return $function($name)": 1,
    },
    "default": {"None": 2, "0": 1, "True": 1, "False": 1, "$number": 1, "$word": 1},
    "docstring": {'"""$action the $noun."""': 2, '"""$action the $noun and $verb it."""': 1},
    "search": {
        "def $function($signature):\n    while True:\n        $body\n"
        "        if $condition:\n            return $bool": 3,
        "def $function($signature):\n    while True:\n        if $condition:\n"
        "            return True\n        $body": 2,
        "def $function($signature):\n    $for\n        if $condition:\n"
        "            return $bool\n    return $bool": 4,
        "def $function($signature):\n    $line\n    $for\n        $body\n"
        "        return $name\n    return None": 1,
    },
    "recursion": {
        "def $function1($letter1):\n    if $letter1 $compare $number:\n"
        "        return $value\n    return $function1($letter1 - 1) $op $letter1": 1,
        "def $function1($letter1):\n    if not $letter1:\n        return []\n"
        "    return $function1($letter1[1:]) + [$letter1[0]]": 1,
        "def $function1($letter1):\n"
        "    return $number if $letter1 == 0 else $letter1 * $function1($letter1 - 1)": 1,
    },
    "import": {
        "import $module": 6, "from collections import Counter": 1, "from pathlib import Path": 1,
        "from math import sqrt": 1, "import $module\nimport $module": 2,
    },
    "main": {"if __name__ == $q1__main__$q1:\n    $body": 1},
    "piece": {
        "$define": 10, "$klass": 4, "$idiom": 3, "$idiom\n$idiom": 2, "$idiom\n$idiom\n$idiom": 2,
        "$search": 2, "$recursion": 1, "$typed": 1, "$generator": 1, "$test": 1, "$record": 1,
    },
}


def spread(templates: dict[str, int]) -> list[str]:
    """Each template as often as its weight says, for a plain draw from the list."""
    out = []
    for template, weight in templates.items():
        out += [template] * weight
    return out


RULES = {rule: spread(templates) for rule, templates in GRAMMAR.items()} | WORDS
SLOT = re.compile(r"\$([a-z]+)(\d?)")

# The words of which each program has a few of its own: {kind: (all, how many)}.
OWN = {
    "variable": (VARIABLES, 3),
    "letter": (LETTERS, 2),
    "collection": (COLLECTIONS, 2),
    "noun": (NOUNS, 3),
    "verb": (VERBS, 3),
    "adjective": (ADJECTIVES, 2),
    "item": (SINGULAR, 2),
    "person": (PEOPLE, 1),
}
# Texts that hold the other kind of quote, which therefore does not close them.
QUOTED = {
    "'": ['said "yes"', 'the "big" one', 'not "ok"', 'a "test" case', 'call it "done"'],
    '"': ["it's here", "don't stop", "can't open", "that's all", "isn't valid", "user's choice",
          "let's go"],
}
# How a variable that a loop builds up starts, and how it grows.
GROWN = {
    "set": (["set()"], [".add($item1)", ".add($name)"]),
    "text": (
        ['""', '""', "''"],
        [" += $item1", " += $item1", " += $name", " += str($item1)", " += $word"],
    ),
    "list": (["[]"], [".append($item1)"]),
    "count": (["0", "0", "1"], [" += 1", " += $item1"]),
    "dict": (["{}"], ["[$item1] = $value", "[$item1] += 1"]),
}
# as many grow by `.add` as by ` +=`
KINDS = ["set", "set", "set", "text", "text", "count", "list", "dict"]


def indent(text: str, spaces: int) -> str:
    """Every line of `text` but the first, moved to the right."""
    return text.replace("\n", "\n" + " " * spaces)


class Pen:
    """Writes one program: the random stream, its habits, and the names that its pieces share.

    A method without arguments fills the slot of its name.
    """

    def __init__(self, rng: random.Random):
        self.random = rng.random
        self.quote = self.pick(("'", '"', None, None))  # None: chosen anew for every string
        self.own = {}
        for kind, (words, n) in OWN.items():
            self.own[kind] = [self.pick(words) for _ in range(n)]
        self.depth = 0  # of bodies
        self.returns = False  # inside a function

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def slot(self, kind: str) -> str:
        if kind in OWN:  # a program is about few things
            return self.pick(self.own[kind] if self.chance(0.8) else OWN[kind][0])
        if kind in RULES:
            return self.fill(self.pick(RULES[kind]))
        return getattr(self, kind)()

    def fill(self, template: str) -> str:
        """The template with its slots filled, from left to right."""
        bound = {}  # what its slots with a digit stand for

        def replace(match: re.Match) -> str:
            kind, digit = match.groups()
            text = bound.get(match[0])
            if text is None:
                text = self.slot(kind)
                while digit and text in bound.values():  # two digits, two names
                    text = self.slot(kind)
            if digit:
                bound[match[0]] = text
            if "\n" in text:
                line = template[template.rfind("\n", 0, match.start()) + 1:]
                text = indent(text, len(line) - len(line.lstrip(" ")))
            return text

        return SLOT.sub(replace, template)

    # --- names and words

    def name(self) -> str:
        """Of a variable: mostly one of the program's few."""
        u = self.random()
        if u < 0.1:
            return self.slot("compound")
        return self.slot("variable" if u < 0.73 else "letter")

    def nouns(self) -> str:
        return self.slot("noun") + "s"

    def action(self) -> str:
        return self.slot("verb").capitalize()

    def base(self) -> str:
        return self.slot("noun").capitalize()

    def number(self) -> str:
        """Mostly one digit, as in code."""
        u = self.random()
        limit = 10 if u < 0.8 else 100 if u < 0.96 else 1000
        return str(int(self.random() * limit))

    # --- strings

    def q(self) -> str:
        return self.quote or self.pick("'\"")

    def words(self) -> str:
        words = []
        for _ in range(self.pick((2, 3, 3, 4, 5, 6))):
            kind = self.pick(("noun", "noun", "verb", "adjective", "small"))
            words.append(self.slot(kind))
        if self.chance(0.1):
            return words[0] + ", " + " ".join(words[1:])
        return " ".join(words)

    def sentence(self) -> str:
        words = self.words().capitalize()
        return words + "!" if self.chance(0.08) else words

    def string(self) -> str:
        quote = self.q()
        text = self.pick(QUOTED[quote]) if self.chance(0.05) else self.slot("text")
        return quote + text + quote

    def word(self) -> str:
        quote = self.q()
        return quote + self.slot("noun" if self.chance(0.7) else "adjective") + quote

    # --- lists: elements of one kind throughout, so that only the brackets tell the depth

    def kind(self) -> str:
        return self.pick(("number", "number", "number", "value", "word", "name"))

    def flat(self, kind: str | None = None) -> str:
        kind = kind or self.kind()
        n = self.pick((1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 8))
        return "[" + ", ".join([self.slot(kind) for _ in range(n)]) + "]"

    def rows(self) -> list[str]:
        kind = self.kind()
        deeper = self.chance(0.08)
        rows = [self.flat(kind) for _ in range(self.pick((1, 1, 2, 2, 2, 3, 4)))]
        return [f"[{row}]" for row in rows] if deeper else rows

    def nest(self) -> str:
        if self.chance(0.5):
            return self.flat()
        return "[" + ", ".join(self.rows()) + "]"

    def brackets(self) -> str:
        """A flat or nested list over one line or many, assigned or handed to a call."""
        if self.chance(0.2):
            lefts = ("$function(", "print(", "$collection.append(", "$name = $verb(")
            right = ")"
        else:
            lefts = ("$collection = ", "$name = ")
            right = ""
        left = self.fill(self.pick(lefts))

        u = self.random()
        if u < 0.6:
            nest = self.nest()
            if not right and self.chance(0.2):
                right = self.slot("rest")
            return left + nest + right
        if u < 0.7:  # rows one below the other
            rows = indent(",\n".join(self.rows()), len(left) + 1)
            return f"{left}[{rows}]{right}"
        if u < 0.9:
            members = self.rows()
        else:
            members = [self.slot("value") for _ in range(self.pick((2, 3, 4, 5)))]
        comma = "," if self.chance(0.7) else ""
        inner = indent("\n" + ",\n".join(members), 4)
        return f"{left}[{inner}{comma}\n]{right}"

    def entries(self) -> str:
        """The keys of a dict (`:` follows) or members of a list (`,`), over lines or on one."""
        key = self.pick(("word", "word", "number", "name"))
        if self.chance(0.55):
            entry, start, end = f"${key}: $value", "{", "}"
        else:
            entry, start, end = f"${key}", "[", "]"
        entries = [self.fill(entry) for _ in range(self.pick((1, 2, 3, 4, 5)))]
        left = self.fill(self.pick(("$name = ", "$collection = ", "$name = $function(")))
        if left.endswith("("):
            end += ")"
        if self.chance(0.4):
            return left + start + ", ".join(entries) + end
        lines = "".join(f"\n    {entry}," for entry in entries)
        return left + start + lines + "\n" + end

    # --- blocks

    def body(self) -> str:
        """A few lines, now and then with a block among them."""
        self.depth += 1
        n = self.pick((1, 1, 1, 2, 2, 3))
        deeper = 0.15 if self.depth < 4 else 0
        lines = ["$block" if self.chance(deeper) else "$line" for _ in range(n)]
        text = self.fill("\n".join(lines))
        self.depth -= 1
        return text

    def exit(self) -> str:
        if self.returns:
            return self.pick(("return True", "return False", "return None", "return"))
        return self.fill("raise $error($string)")

    def openfile(self) -> str:
        """`with open(...) as f:` or `f = open(...)`; the name of the file tells the mode."""
        mode = self.pick(("r", "r", "w", "w", ""))
        if mode:
            path = self.telling_name(mode)
        elif self.chance(0.6):
            path = self.pick(ANY_FILES)
        else:
            path = self.fill("$q1$noun.$extension$q1")
        if not (mode and self.chance(0.95)):  # or it does not
            mode = self.pick(("", "", "r", "w"))
        quote = self.q()
        file = self.slot("file")
        opened = f"open({path}, {quote}{mode}{quote})" if mode else f"open({path})"
        if mode == "w":
            uses = (f"{file}.write($name)", f"{file}.write($string)")
        else:
            uses = (
                f"$name = {file}.read()",
                f"$collection = {file}.readlines()",
                f"for line in {file}:\n    $body",
            )
        use = self.pick(uses)

        u = self.random()
        if u < 0.5:
            if u < 0.15:
                use += "\n$line"
            return self.fill(f"with {opened} as {file}:\n    {indent(use, 4)}")
        if u < 0.58 and mode != "w":
            return self.fill(f"$name = {opened}.read()")
        if u < 0.63:
            return f"{file} = {opened} if {path} else None"
        close = f"\n{file}.close()" if u < 0.9 else ""
        return self.fill(f"{file} = {opened}\n{use}{close}")

    def telling_name(self, mode: str) -> str:
        """A variable for a file to read (`r`) or to write (`w`)."""
        if self.chance(0.5):
            return self.pick(READ_FILES if mode == "r" else WRITE_FILES)
        stem = self.pick(READ_STEMS if mode == "r" else WRITE_STEMS)
        return f"{stem}_{self.pick(FILE_SUFFIXES) if self.chance(0.6) else self.slot('noun')}"

    def buildup(self, returned: bool = False) -> str:
        """One to three variables, set up here and grown in a loop some lines later.

        What one starts as (`set()`, `""`) tells how it grows (`.add(`, ` +=`), and nothing else:
        those of one loop start differently, and grow in any order, some more than once.
        """
        kinds = KINDS
        grown = {}
        for _ in range(self.pick((1, 2, 2, 3, 3))):
            kind = self.pick(kinds)
            kinds = [other for other in kinds if other != kind]
            name = self.pick(ACCUMULATORS) if self.chance(0.6) else self.slot("accumulator")
            grown[name] = GROWN[kind]
        names = list(grown)

        lines = [f"{name} = {self.pick(start)}" for name, (start, _) in grown.items()]
        lines += ["$line"] * self.pick((0, 0, 0, 1, 1, 2, 3, 6))
        if self.chance(0.2):
            lines.append("")
        lines.append(self.pick((
            "for $item1 in $collection:",
            "for $item1 in $collection:",
            "for $index, $item1 in enumerate($collection):",
            "while $item1:",
        )))
        turns = names + [self.pick(names)]
        turns.sort(key=lambda _: self.random())
        for name in turns:
            lines += self.growing(name, grown[name][1])
        for name in turns:  # once more, behind the loop
            line = name + self.pick(grown[name][1])
            if self.chance(0.1):
                lines.append(line)
        if returned:
            lines.append(f"return {name}")
        elif self.chance(0.4):
            lines.append(f"print({name})")
        return self.fill("\n".join(lines))

    def growing(self, name: str, growth: list[str]) -> list[str]:
        """The lines inside the loop of `buildup` that let one variable grow."""
        u = self.random()
        line = name + self.pick(growth)
        if u < 0.25:
            test = f"$item1 not in {name}" if u < 0.1 else "$condition"
            return [f"    if {test}:", f"        {line}"]
        if u < 0.45:
            return ["    $line", f"    {line}"]
        if u < 0.55:
            other = name + self.pick(growth)
            return ["    if $condition:", f"        {line}", "    else:", f"        {other}"]
        return [f"    {line}"]

    def collected(self) -> str:
        return self.buildup(returned=True)

    # --- pieces

    def names(self, kind: str, n: int) -> list[str]:
        """n that differ."""
        found = []
        while len(found) < n:
            name = self.slot(kind)
            if name not in found:
                found.append(name)
        return found

    def signature(self, params: list[str] | None = None) -> str:
        """Once a parameter has a default, all that follow have one."""
        if params is None:
            params = self.names("name", self.pick((1, 2, 3)))
        plain = self.pick((0, 1, 1, 2)) if self.chance(0.5) else len(params)
        default = self.pick(("None", "None", "None", "None", "$default"))
        defaulted = [f"{name}={self.fill(default)}" for name in params[plain:]]
        return ", ".join(params[:plain] + defaulted)

    def code(self, template: str) -> str:
        """The inside of a function, where return is allowed."""
        self.returns = True
        self.depth += 1
        text = self.fill(template)
        self.returns = False
        self.depth -= 1
        return text

    def define(self) -> str:
        name = self.slot("function") if self.chance(0.8) else self.pick(LETTERS)
        params = self.names("name", self.pick((0, 1, 1, 2, 2, 3, 4)))
        lines = ["$docstring"] if self.chance(0.12) else []
        lines += ["$idiom"] * self.pick((1, 1, 1, 2, 2, 3))
        last = self.pick(("$collected", "$return", "$return", "$return", None, None))
        if last:
            lines.append(last)
        head = f"def {name}({self.signature(params)}):\n    "
        return head + indent(self.code("\n".join(lines)), 4)

    def klass(self) -> str:
        """__init__ copies its parameters to attributes of the same name, often in their order."""
        names = self.names("attribute", self.pick((1, 2, 3, 4, 5)))
        copies = [f"self.{x} = {x}" for x in names]
        if self.chance(0.4):  # or which one comes next would tell as much as its name
            copies.sort(key=lambda _: self.random())
        if self.chance(0.3):
            attribute = self.slot("collection")
            value = self.pick(("[]", "set()", "{}", "0"))
            where = self.pick((0, len(copies), len(copies)))
            copies.insert(where, f"self.{attribute} = {value}")
        lines = ["    $docstring"] if self.chance(0.15) else []
        lines.append(f"    def __init__(self, {self.signature(names)}):")
        lines += [f"        {line}" for line in copies]
        for _ in range(self.pick((0, 1, 1, 2))):
            lines += self.method_of(names)
        base = self.pick(("", "", "($base)"))
        head = f"class {self.slot('noun').capitalize()}{base}:"
        return self.fill("\n".join([head, *lines]))

    def method_of(self, names: list[str]) -> list[str]:
        """The lines of a method of a class with those attributes."""
        params = self.signature()
        if self.chance(0.5):
            params = f"self, {params}"
        else:
            params = "self"
        lines = ["", f"    def {self.slot('function')}({params}):"]
        if self.chance(0.4):
            lines.append("        " + indent(self.code("$idiom"), 8))
        end = self.pick((
            "return self.{x}",
            "return self.{x} == $value",
            "self.{x} = $value",
            "self.{x} += $number",
            "print(self.{x})",
            "print($string)",
        ))
        lines.append("        " + end.format(x=self.pick(names)))
        return lines


def program(rng: random.Random) -> str:
    """One program: 20 to 400 tokens as a rule, half of them above 110."""
    pen = Pen(rng)
    pieces = []
    u = pen.random()
    if u < 0.05:
        pieces.append("$remark")
    if u > 0.95:
        pieces.append("$docstring")
    if pen.chance(0.15):
        pieces.append("$import")
    pieces += ["$piece"] * pen.pick((1, 1, 1, 2, 2, 2, 2, 3, 3, 4))
    if pen.chance(0.05):
        pieces.append("$main")
    between = "\n" + "\n" * pen.pick((1, 2, 2))
    text = pen.fill(between.join(pieces)) + "\n"
    return re.sub(" +\n", "\n", text)  # of blank lines inside a block


BLOCK = 64  # programs


def block(seed: int, number: int) -> list[str]:
    """The programs of one block, no two alike; the same for the same seed and number."""
    rng = random.Random(f"{seed} {number}")
    drawn = [program(rng) for _ in range(BLOCK)]
    # a single short line is no program; a dict keeps the order
    return [text for text in dict.fromkeys(drawn) if len(text) > 60]


def programs(seed: int) -> Iterator[str]:
    """Programs without end, block by block."""
    for number in count():
        yield from block(seed, number)


if __name__ == "__main__":
    few = islice(programs(int(sys.argv[1]) if sys.argv[1:] else 0), 5)
    print(f"\n{'-' * 40}\n".join(few))
