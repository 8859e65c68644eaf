"""A circuit in words: sentences from rules, each with the number behind it (tools.program
--algorithm).

What a program's variables do at every token of the held-out prompts is asked, in this order:
- is it the same at every token; does the token alone decide it (a detector); does the position?
- a head: is its query constant; where does it look from the last token; what does it find there,
  and how much of it is the sink's?
- a write: does its value at the last token divide the answers, and by how much does it move them?

A rule that the numbers do not decide says nothing, so a circuit may have fewer sentences than
parts. They say what is seen on these prompts; that it is the cause is for an intervention to show
(edit the program, or the model).
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from circuit import Circuit

DECIDED = 0.9    # of the variance that a rule has to explain
SAME = 1e-3      # of a variable's size: what varies less is constant
FAR = 0.25       # of the largest distance from the usual value: such a token is detected
COUNTS = 1.5     # times as much that a head gathers in long prompts as in short ones
LOOKS = 0.5      # of a head's attention on so few tokens that they can be named
NAMED = 3        # tokens at most in a list
DIVIDES = 0.75   # share of the prompts that a threshold must get right
MOST = 12        # sentences


@dataclass
class Seen:
    """The variables of a program on prompts, all tokens one after the other."""
    variables: dict[str, np.ndarray]  # name -> (tokens,)
    heads: dict[str, np.ndarray]      # name -> (prompts, vocabulary + 1): shares of the last token
    texts: list[str]                  # of each token id
    ids: np.ndarray                   # (tokens,)
    position: np.ndarray              # (tokens,)
    last: np.ndarray                  # (prompts,): where each prompt's last token is
    first_answer: np.ndarray          # (prompts,) bool: whether the first answer is right


def look(logits_of, prompts: list[list[int]], first_answer: list[bool], texts: list[str]) -> Seen:
    """Run a program on prompts. logits_of: its function of that name; texts: of each token id; the
    last column of `heads` is the sink's."""
    values = {}
    heads = {}
    for ids in prompts:
        for name, x in logits_of(ids)[1].items():
            if np.shape(x) == (len(ids),) and name != "t":
                values.setdefault(name, []).append(x)
            elif np.shape(x) == (len(ids), len(ids)):
                shares = np.bincount(ids, weights=x[-1], minlength=len(texts) + 1)
                shares[-1] = 1 - shares.sum()
                heads.setdefault(name, []).append(shares)
    lengths = np.array([len(ids) for ids in prompts])
    return Seen(
        variables={name: np.concatenate(parts) for name, parts in values.items()},
        heads={name: np.stack(rows) for name, rows in heads.items()},
        texts=texts,
        ids=np.concatenate([np.array(ids) for ids in prompts]),
        position=np.concatenate([np.arange(n) for n in lengths]),
        last=lengths.cumsum() - 1,
        first_answer=np.array(first_answer),
    )


# --- what the numbers decide ------------------------------------------------------------------

def explained(x: np.ndarray, group: np.ndarray) -> float:
    """Share of the variance of x (n,) that the mean of each group (n,) explains."""
    _, group = np.unique(group, return_inverse=True)
    counts = np.bincount(group)
    means = np.bincount(group, weights=x) / counts
    return float(np.var(means[group]) / max(np.var(x), 1e-30))


def by_token(x: np.ndarray, seen: Seen) -> list[tuple[str, float]]:
    """(text, mean of x) of the tokens at which x is far from usual, those first that bring most of
    that over the prompts."""
    usual = np.median(x)
    found = []
    for token in np.unique(seen.ids):
        here = x[seen.ids == token]
        found.append((abs(here.mean() - usual), len(here), seen.texts[token], here.mean()))
    farthest = max(found)[0]
    far = [entry for entry in found if entry[0] >= FAR * farthest]
    far.sort(key=lambda entry: -entry[0] * entry[1])
    return [(text, mean) for _, _, text, mean in far]


def divides(x: np.ndarray, first: np.ndarray) -> tuple[float, float, bool]:
    """The threshold on x (n,) that tells the prompts of the two answers apart best, the share that
    it gets right, and whether those of the first answer lie above it."""
    order = np.argsort(x)
    right = first[order]
    # above[i]: right where all from i on are said to have the first answer
    above = (np.concatenate([[0], (~right).cumsum()]) + right.sum()
             - np.concatenate([[0], right.cumsum()]))
    best = {True: above.max() / len(x), False: 1 - above.min() / len(x)}
    is_above = best[True] >= best[False]
    i = int(above.argmax() if is_above else above.argmin())
    i = min(max(i, 1), len(x) - 1)
    return (x[order[i - 1]] + x[order[i]]) / 2, best[is_above], is_above


# --- sentences --------------------------------------------------------------------------------

def value(x: float) -> str:
    return f"{x:+.3g}" if abs(x) >= 5e-4 else "0"


def listed(entries: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{text!r} {value(x)}" for text, x in entries)


def of_variable(name: str, seen: Seen) -> str:
    """What decides a variable, or nothing."""
    x = seen.variables[name]
    if np.ptp(x) <= SAME * max(1e-9, np.abs(x).max()):
        return f"{name} is {value(x.mean())} at every token."
    r2 = explained(x, seen.ids)
    if r2 >= DECIDED:
        far = by_token(x, seen)
        more = f" and {len(far) - NAMED} more" if len(far) > NAMED else ""
        return (f"{name} detects {listed(far[:NAMED])}{more}, and is {value(np.median(x))} at most "
                f"others (the token explains {r2:.2f} of it).")
    r2 = explained(x, seen.position)
    if r2 >= DECIDED:
        early = x[seen.position == 0].mean()
        late = x[seen.position >= np.quantile(seen.position, 0.9)].mean()
        return (f"{name} tells the position: {value(early)} at the first token, {value(late)} at "
                f"the last ones (the position explains {r2:.2f} of it).")
    return ""


def of_head(name: str, queries: list[str], keys: list[str], seen: Seen) -> str:
    """How a head looks, from the last token, or nothing."""
    shares = seen.heads[name].mean(axis=0)
    sink = shares[-1]
    query = "with the same query at every token"
    if queries:
        query = f"by {' and '.join(queries)}"
    if not queries and not keys:
        length = seen.position[seen.last] + 1
        of_sink = seen.heads[name][:, -1]
        few = of_sink[length <= np.quantile(length, 0.1)].mean()
        many = of_sink[length >= np.quantile(length, 0.9)].mean()
        does = "counts tokens" if 1 - many >= COUNTS * (1 - few) else "averages"
        return (f"{name} looks at all tokens alike; the sink takes {few:.2f} of it in short "
                f"prompts, {many:.2f} in long ones: it {does}.")
    order = np.argsort(-shares[:-1])[:NAMED]
    if shares[order].sum() + sink < LOOKS:
        return ""
    named = ", ".join(f"{seen.texts[i]!r} {shares[i]:.2f}" for i in order if shares[i] >= 0.05)
    found = f"looks at {named}" if named else "finds no token"
    return f"From the last token {name}, {query}, {found}; the sink takes {sink:.2f}."


def of_write(name: str, seen: Seen, answers: list[str]) -> str:
    """Whether a write at the last token divides the answers, or nothing."""
    x = seen.variables[name][seen.last]
    threshold, share, above = divides(x, seen.first_answer)
    if share < DIVIDES:
        return ""
    first = value(x[seen.first_answer].mean())
    second = value(x[~seen.first_answer].mean())
    return (f"At the last token {name} is {first} in the mean before {answers[0]!r} and {second} "
            f"before {answers[1]!r}: {value(threshold)} divides {100 * share:.0f}% of the prompts.")


def of_answer(name: str, weights: list[float], norm: float, answers: list[str]) -> str:
    """By how much a write moves the answers. weights: of the unembedding."""
    moved = (weights[0] - weights[1]) / norm
    if moved == 0:
        return ""
    return (f"A unit of {name} moves the logit of {answers[0]!r}, less that of {answers[1]!r}, by "
            f"{value(moved)}.")


def algorithm(circuit: Circuit, name_of, d_head: int, weights: dict[int, list[float]], seen: Seen,
              answers: list[str]) -> list[str]:
    """The sentences of a circuit, in the order in which it runs, at most MOST: where there are
    more, those of single reads and neurons go first. name_of(site, channel): its variable;
    weights: {channel: its weight in the unembedding of each answer}."""
    said = []  # (what goes first where there are too many, sentence)

    def say(rank: int, sentence: str) -> None:
        if sentence:
            said.append((rank, sentence))

    for site, kept in circuit.mask.items():
        channels = kept.nonzero().flatten().tolist()
        if site.endswith("attn.v"):
            layer = site.split(".")[0]
            for head in sorted({c // d_head for c in channels}):
                beside = {}
                for z in "qk":
                    of_head_z = circuit.mask[f"{site[:-1]}{z}"].nonzero().flatten().tolist()
                    beside[z] = [name_of(f"{site[:-1]}{z}", c) for c in of_head_z
                                 if c // d_head == head]
                say(0, of_head(f"L{layer}_head{head}", beside["q"], beside["k"], seen))
        for channel in channels:
            name = name_of(site, channel)
            if site.endswith("resid_delta"):
                say(1, of_write(name, seen, answers))
                if channel in weights:
                    norm = float(seen.variables["norm"][seen.last].mean())
                    say(0, of_answer(name, weights[channel], norm, answers))
            else:
                say(3 if site.endswith("act_in") else 2, of_variable(name, seen))
    least = sorted(rank for rank, _ in said)[:MOST][-1] if said else 0
    kept = [entry for entry in said if entry[0] <= least]
    while len(kept) > MOST:  # the last ones of the least wanted kind
        kept.reverse()
        kept.remove(next(entry for entry in kept if entry[0] == least))
        kept.reverse()
    return [sentence for _, sentence in kept]
