"""Does the card tell a right circuit from a wrong one? On planted models, where it is known.

Circuits of these kinds are made in models of tools/planting.py, their calibration is fitted, and
the lines of the card that its verdict needs are measured (measures.py):

- `true`: the planted circuit made minimal; `nothing`: no node at all.
- `missing`: the true one without one part, a node with its edges or an edge; the cheapest first.
- `idle`: the true one and one to five parts more, on paths through the model's random weights.
- `wrong`: a copy of its shape at other nodes: as many at each site, with as many edges and paths.
- `wrong_best`: of many such copies the one with the least loss.
- `wrong_fitted`: what minimising leaves of the whole model where a true node is forbidden; where
  that misses the target for each of them, there is no second way, and the least loss is printed.
- In models with two copies of a circuit, apart from the rest: `one_of_two` and `both`.

The card alone decides: `true` where it shows sufficient and needed and finds no idle part. Printed:
how many of each kind are judged right, the numbers behind it, and each error with its numbers.

    python -m tools.planted_cards
    python -m tools.planted_cards --cases=quote --seeds=1 --copies=false
"""
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, nearest, parse

from torch import Tensor

from circuit import Nodes, alone, edges_of, graph_of
from data.tinypython.tokenizer import load_tokenizer
from measures import Case, agreement, correlation, idle, necessity, sufficiency
from minimise import Search, minimise
from model import GPT
from prune import PruneConfig, constants_of
from tasks import Pairs, answer_ids, load_pairs, margins
from tools.planted import (CASES, PROMPT, Planted, PlantedConfig, as_circuit, cell, needed,
                           parts_found, plant, quiet, truth_of)
from tools.planting import SHAPES
from validate import verdict

Parts = tuple[set, set]  # nodes (site, channel), edges (site, channel, site, channel)

MOST_EXTRA = 5    # idle parts that are added
TRIES = 200       # of drawing something at random, before we say that there is none
VISITS = 20_000   # steps of one search for a copy, before it begins anew with other draws
NOT_TRUE = {"sufficient", "needed"}
# What the judge must say of each kind: that it lacks one of these; of `true`, nothing.
FLAWS = {"true": set(), "nothing": NOT_TRUE, "missing": NOT_TRUE, "idle": {"idle"},
         "wrong": NOT_TRUE, "wrong_best": NOT_TRUE, "wrong_fitted": NOT_TRUE | {"idle"},
         # of two ways to do a task, neither is needed, and of both together each part can go
         "one_of_two": {"needed"}, "both": {"idle"}}
COPIES = ("one_of_two", "both")  # not in the total: there, what is right is a matter of words


@dataclass
class CardsConfig:
    shape: str = "2x64"
    cases: str = "quote,quote2,bracket,bracket2"
    seeds: int = bounded(3, at_least=1)    # of model, pairs and draws alike: 0, 1, 2
    draws: int = bounded(4, at_least=1)    # circuits of missing, idle and wrong in each model
    best_of: int = bounded(32, at_least=1)  # copies among which wrong_best is chosen
    copies: bool = True                    # also models with two copies of a circuit
    data: str = "data/tinypython"          # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    target_loss: float = bounded(0.02, above=0)  # nats, as tools/planted.py has it
    mean_tokens: int = bounded(65536, at_least=1)
    fit_pairs: int = bounded(256, at_least=1)
    heldout_pairs: int = bounded(256, at_least=1)


# --- a planted model and all that its circuits are measured with ------------------------------

@dataclass
class Subject:
    """A planted model, its true circuit, and what a card needs."""
    case: str
    seed: int
    planted: Planted
    tokenizer: object
    constants: Nodes
    settings: PruneConfig
    heldout: Pairs
    search: Search
    truths: list[Parts]  # the true circuit; of a model with copies, each of them

    @property
    def model(self) -> GPT:
        return self.planted.model

    @property
    def true(self) -> Parts:
        return self.truths[0]

    @property
    def answers(self) -> list[int]:
        return answer_ids(self.planted.pairs)


def subject_of(cfg: CardsConfig, case: str, seed: int, tokenizer,
               variant: str = "single") -> Subject:
    """Plant a case and make its circuit minimal. ValueError where the shape has no room for it."""
    shared = {"data": cfg.data, "target_loss": cfg.target_loss, "train_pairs": cfg.fit_pairs,
              "fit_pairs": cfg.fit_pairs}
    planted = plant(PlantedConfig(**shared), cfg.shape, case, variant, "far", seed, tokenizer)
    settings = PruneConfig(**shared | {"target_loss": (cfg.target_loss,)},
                           mean_tokens=cfg.mean_tokens, heldout_pairs=cfg.heldout_pairs)
    constants = constants_of(planted.model, settings)
    search = Search(planted.model, constants, planted.pairs.first(cfg.fit_pairs))
    # at the target itself, below which the card calls a part idle
    truths = [needed(planted, truth_of(planter, "mean"), search, cfg.target_loss)
              for planter in planted.truths]
    heldout = load_pairs(planted.task, tokenizer, cfg.heldout_pairs, "heldout", PROMPT, seed)
    return Subject(case, seed, planted, tokenizer, constants, settings, heldout, search,
                   truths)


def connected(subject: Subject, parts: Parts) -> Parts:
    """The parts that are left where those without a path are dropped."""
    return parts_found(subject.model, subject.search.fit(*as_circuit(subject.model, *parts)))


def everything(model: GPT) -> Parts:
    """All nodes and edges of a model."""
    nodes = {(site, i) for site in model.sites for i in range(model.config.site_width(site))}
    mask, edges = as_circuit(model, nodes, ())
    return nodes, {tuple(e[:4]) for e in edges_of(model, mask)}


# --- missing: one part less ------------------------------------------------------------------

def loss_of_parts(subject: Subject, parts: Parts) -> float:
    """Nats on the pairs that calibration is fitted to."""
    return subject.search.fit(*as_circuit(subject.model, *parts)).loss


def missing(subject: Subject, n: int, rng: random.Random) -> list[Parts]:
    """The true circuit without one part, n times another: first without the one that it misses
    least, where a judge is most likely to err."""
    found = [without_part(subject.true, part) for part in sorted(set.union(*subject.true))]
    rng.shuffle(found)
    least = min(found, key=lambda parts: loss_of_parts(subject, parts))
    found.remove(least)
    return [least, *found][:n]


def without_part(parts: Parts, part: tuple) -> Parts:
    """Less an edge, or a node and with it the edges that begin or end there."""
    nodes, edges = parts
    if len(part) == 4:
        return nodes, edges - {part}
    return nodes - {part}, {e for e in edges if part not in (e[:2], e[2:])}


# --- idle: some parts more -------------------------------------------------------------------

def with_idle(subject: Subject, every: Parts, rng: random.Random) -> Parts:
    """The true circuit and one to `MOST_EXTRA` parts more, all of them with a path."""
    nodes, edges = map(set, subject.true)
    room = rng.randint(1, MOST_EXTRA)
    into = defaultdict(list)  # node -> the edges that end there
    for e in sorted(every[1]):
        into[e[2:]].append(e)
    for _ in range(TRIES):
        more = detour(subject, nodes, edges, into, rng)
        n = len(more[0]) + len(more[1])
        if not 0 < n <= room:
            continue
        grown = nodes | more[0], edges | more[1]
        if connected(subject, grown) == grown:
            nodes, edges = grown
            room -= n
    if edges == subject.true[1]:  # an edge alone is rare: where there is none, what is next
        return with_idle(subject, every, rng)
    return nodes, edges


def detour(subject: Subject, nodes: set, edges: set, into: dict, rng: random.Random) -> Parts:
    """A path at random that ends in the circuit, and begins there or with a read: its new parts."""
    model = subject.model
    heads = model.lm_head.weight[subject.answers]
    wanted = {i for i in range(model.config.d_model) if heads[:, i].any()}
    wanted |= {i for site, i in nodes if site.endswith("act_in")}
    writes = [(site, i) for site in model.sites if site.endswith("resid_delta")
              for i in sorted(wanted) if (site, i) not in nodes and i < model.config.d_model]
    end = rng.choice(sorted(nodes) if rng.random() < 0.5 else writes)
    new_nodes = set() if end in nodes else {end}
    new_edges = set()
    while not end[0].endswith("act_in"):
        ways = [e for e in into[end] if e not in edges]
        if not ways:
            break
        edge = rng.choice(ways)
        new_edges.add(edge)
        end = edge[:2]
        if end in nodes:
            break
        new_nodes.add(end)
    return new_nodes, new_edges


# --- wrong: the same shape elsewhere ---------------------------------------------------------

Place = tuple[str, int]  # a channel of the stream, whoever reads or writes it, or a node elsewhere


def place_of(model: GPT, node: tuple) -> Place:
    """Writes and reads of one channel of the stream are at one place: so paths are kept."""
    site, i = node
    if site.endswith(("act_in", "resid_delta")):
        return ("stream", i) if i < model.config.d_model else ("position", i)
    return node


def width_of(model: GPT, kind: str) -> range:
    """The channels that a place can have."""
    c = model.config
    if kind == "stream":
        return range(c.d_model)
    if kind == "position":
        return range(c.d_model, c.d_model + c.d_pos_emb)
    return range(c.site_width(kind))


def a_copy(subject: Subject, every: Parts, rng: random.Random) -> Parts:
    """The true circuit's shape at other nodes, all of them: as many at each site, an edge for each
    of its edges, heads for heads, and where it has a path to the answers, another."""
    for _ in range(TRIES):
        moved = Mover(subject, every[1], rng).move()
        if moved is not None and connected(subject, moved) == moved:
            return moved
    raise ValueError(f"{subject.case}, seed {subject.seed}: there is no other circuit of its shape")


class Mover:
    """One search for a copy: place after place is moved at random, and moved again where a later
    one finds none."""

    def __init__(self, subject: Subject, edges: set, rng: random.Random):
        self.model = subject.model
        self.nodes, self.wires = subject.true
        self.edges = edges
        self.rng = rng
        self.read = self.model.lm_head.weight[subject.answers].ne(0).any(0).tolist()
        self.filled = graph_of(self.model).filled.tolist()
        self.visits = 0
        self.order = self.places()

    def places(self) -> list[Place]:
        """From the answers backward, each but the first beside one that came before it."""
        order = []
        for site in reversed(self.model.sites):
            for node in sorted(n for n in self.nodes if n[0] == site):
                place = place_of(self.model, node)
                if place not in order:
                    order.append(place)
        return order

    def move(self, to: dict[Place, Place] | None = None) -> Parts | None:
        """Nodes and edges; None where the search took too long."""
        to = {} if to is None else to
        self.visits += 1
        if len(to) == len(self.order):
            return {self.moved(n, to) for n in self.nodes}, {
                (*self.moved(e[:2], to), *self.moved(e[2:], to)) for e in self.wires}
        place = self.order[len(to)]
        kind = place[0]
        taken = {p[1] for p in [*self.order, *to.values()] if p[0] == kind}
        free = [i for i in width_of(self.model, kind) if i not in taken]
        self.rng.shuffle(free)
        for i in free:
            if self.visits > VISITS:
                return None
            trial = to | {place: (kind, i)}
            if self.fits(place, trial):
                found = self.move(trial)
                if found is not None:
                    return found
        return None

    def moved(self, node: tuple, to: dict[Place, Place]) -> tuple | None:
        place = to.get(place_of(self.model, node))
        return None if place is None else (node[0], place[1])

    def fits(self, place: Place, to: dict[Place, Place]) -> bool:
        """Whether the place moved last has its edges to those moved before it, and its head."""
        kind, i = place
        if kind == "stream":
            last = not any(n[0].endswith("act_in") and n[1] == i for n in self.nodes)
            # nothing reads it but the answers; or the tokens must fill what is read of them
            if not (self.read if last else self.filled)[to[place][1]]:
                return False
        for e in self.wires:
            if place in (place_of(self.model, e[:2]), place_of(self.model, e[2:])):
                ends = self.moved(e[:2], to), self.moved(e[2:], to)
                if None not in ends and (*ends[0], *ends[1]) not in self.edges:
                    return False
        width = self.model.config.d_head
        for other in to:
            if kind[:-1] == other[0][:-1] and kind.endswith((".q", ".k", ".v")):
                same = i // width == other[1] // width
                if same != (to[place][1] // width == to[other][1] // width):
                    return False
        return True


def best_copy(subject: Subject, every: Parts, n: int, rng: random.Random) -> Parts:
    """Of n copies the one with the least loss on the pairs that are fitted to."""
    copies = [a_copy(subject, every, rng) for _ in range(n)]
    return min(copies, key=lambda parts: loss_of_parts(subject, parts))


def second_way(subject: Subject, every: Parts) -> tuple[Parts | None, float]:
    """What minimising leaves of the whole model less that true node which it misses least, None
    where the model cannot do the task without; and the loss so (nats)."""
    rests = [without_part(every, node) for node in sorted(subject.true[0])]
    losses = [loss_of_parts(subject, rest) for rest in rests]
    least = min(losses)
    target = subject.settings.target_loss[0]
    if least > target:
        return None, least
    rest = as_circuit(subject.model, *rests[losses.index(least)])
    circuit = minimise(subject.search, subject.search.fit(*rest), target, quiet)
    return parts_found(subject.model, circuit), least


# --- the card and its judge ------------------------------------------------------------------

@dataclass
class Card:
    """What was measured of one circuit, and what the judge says it lacks: nothing, if it is true."""
    kind: str
    name: str     # case and seed
    size: tuple[int, int]
    numbers: dict[str, float]
    follows: bool
    lacks: set[str]

    @property
    def right(self) -> bool:
        flaws = FLAWS[self.kind]
        return bool(flaws & self.lacks) if flaws else not self.lacks

    def line(self) -> str:
        said = ", ".join(f"{key} {value:.3g}" for key, value in self.numbers.items())
        judged = f"to lack {', '.join(sorted(self.lacks))}" if self.lacks else "true"
        return (f"{self.kind}, {self.name}: {self.size[0]} nodes, {self.size[1]} edges, judged "
                f"{judged}; {said}")


def case_for(subject: Subject, parts: Parts) -> Case:
    """A circuit as the card's measures want it, its calibration fitted."""
    return Case(
        model=subject.model, task=subject.planted.task, tokenizer=subject.tokenizer,
        circuit=subject.search.fit(*as_circuit(subject.model, *parts)),
        constants=subject.constants, settings=subject.settings, train=subject.planted.pairs,
        heldout=subject.heldout, data="", seed=subject.seed)


def card_of(subject: Subject, kind: str, parts: Parts) -> Card:
    """Measure a circuit and judge it by the card alone."""
    case = case_for(subject, parts)
    card = {"sufficiency": sufficiency(case), "necessity": necessity(case)}
    card |= idle(case) | agreement(case)
    shown = verdict(card, subject.settings.target_loss[0], case.circuit.size[1])
    lacks = {key for key in NOT_TRUE if not shown[key]["shown"]}
    if card["idle"]:
        lacks.add("idle")
    del card["idle_of"]
    numbers = {"loss": case.circuit.loss, **card, "beyond": beyond(subject, case)}
    return Card(kind, f"{subject.case} seed {subject.seed}", case.circuit.size, numbers,
                shown["follows"]["shown"], lacks)


def beyond(subject: Subject, case: Case) -> float:
    """Agreement within one answer beyond what a circuit of no node has: what the last token says by
    its embedding and by bigrams is in every circuit, and in the model. A partial correlation."""
    nothing = case_for(subject, (set(), set()))
    empty = alone(subject.model, nothing.circuit, subject.constants)(subject.heldout)
    circuit = alone(subject.model, case.circuit, subject.constants)(subject.heldout)
    whole = margins(subject.model, subject.heldout)
    found = [partial_correlation(*(margin[row::2].double() for margin in (circuit, whole, empty)))
             for row in (0, 1)]
    return sum(found) / 2


def partial_correlation(a: Tensor, b: Tensor, c: Tensor) -> float:
    """Of a and b where c is held still; 0 where that leaves nothing of one of them."""
    ab, ac, bc = correlation(a, b), correlation(a, c), correlation(b, c)
    left = (1 - ac * ac) * (1 - bc * bc)
    return (ab - ac * bc) / left ** 0.5 if left > 1e-6 else 0.0


def circuits(subject: Subject, cfg: CardsConfig) -> Iterator[tuple[str, Parts]]:
    """(kind, circuit) of all that are made in one model."""
    rng = random.Random(f"cards {subject.case} {subject.seed}")
    if len(subject.truths) > 1:
        first, second = subject.truths
        yield "one_of_two", first
        yield "both", (first[0] | second[0], first[1] | second[1])
        return
    every = everything(subject.model)
    yield "true", subject.true
    yield "nothing", (set(), set())
    for parts in missing(subject, cfg.draws, rng):
        yield "missing", parts
    for _ in range(cfg.draws):
        yield "idle", with_idle(subject, every, rng)
    for _ in range(cfg.draws):
        yield "wrong", a_copy(subject, every, rng)
    yield "wrong_best", best_copy(subject, every, cfg.best_of, rng)
    parts, loss = second_way(subject, every)
    print(f"{subject.case} seed {subject.seed}: without a true node the whole model has "
          f"{loss:.3f} nats at least", flush=True)
    if parts is not None:
        yield "wrong_fitted", parts


# --- the command -----------------------------------------------------------------------------

def row(kind: str, cards: list[Card]) -> str:
    """A line of the table: counts, then medians and ranges."""
    right = sum(card.right for card in cards)
    follow = sum(card.follows for card in cards)
    cells = [kind, str(len(cards)), str(right), str(follow)]
    cells += [cell([card.numbers[key] for card in cards], form) for key, form in COLUMNS.items()]
    return f"| {' | '.join(cells)} |"


COLUMNS = {"loss": ".3f", "sufficiency": ".3f", "necessity": ".2f", "idle": ".0f",
           "agreement": ".2f", "agreement_within": ".2f", "beyond": ".2f"}
HEADER = f"| kind | circuits | judged right | follow | {' | '.join(COLUMNS)} |\n{11 * '|---'}|"


def report(cards: list[Card]) -> str:
    """The table, the total and the errors."""
    lines = [HEADER]
    for kind in FLAWS:
        of_kind = [card for card in cards if card.kind == kind]
        if of_kind:
            lines.append(row(kind, of_kind))
    counted = [card for card in cards if card.kind not in COPIES]
    right = sum(card.right for card in counted)
    both = sum(not NOT_TRUE & card.lacks for card in counted if FLAWS[card.kind] == NOT_TRUE)
    lines.append(f"judged right: {right} of {len(counted)}, {right / len(counted):.1%}; called "
                 f"sufficient and needed though they are not: {both}")
    lines += [f"error: {card.line()}" for card in cards if not card.right]
    return "\n".join(lines)


def run(cfg: CardsConfig) -> None:
    """Judge the circuits of every case and seed, and print what comes out."""
    for option, words, known in (("cases", cfg.cases.split(","), CASES),
                                 ("shape", [cfg.shape], SHAPES)):
        for word in words:
            if word not in known:
                raise ValueError(f"{option} has no '{word}'; the nearest is "
                                 f"'{nearest(word, known)}', all are: {', '.join(known)}")
    tokenizer = load_tokenizer(cfg.tokenizer)
    cards = []
    for case in cfg.cases.split(","):
        for seed in range(cfg.seeds):
            for variant in ("single", "copy") if cfg.copies else ("single",):
                try:
                    subject = subject_of(cfg, case, seed, tokenizer, variant)
                except ValueError as e:
                    if variant == "single":
                        raise
                    print(e, flush=True)  # two copies need more room than one
                    continue
                cards += [card_of(subject, *made) for made in circuits(subject, cfg)]
    print(report(cards), flush=True)


def main(argv: list[str]) -> int:
    cfg = parse(CardsConfig, argv)
    try:
        run(cfg)
    except (ValueError, OSError) as e:
        die(e)
    return 0


if __name__ == "__main__":
    as_script(main)
