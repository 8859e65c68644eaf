"""Does the card tell a right circuit from a wrong one? On planted models, where it is known.

Circuits of these kinds are made in models of tools/planting.py, and the lines of the card that its
verdict needs are measured (measures.py):

- `true`: the planted circuit made minimal; `nothing`: no node at all.
- `missing`: the true one without one part, a node with its edges or an edge; the cheapest first.
- `idle`: the true one and one to five parts more, on paths through the model's random weights.
- `wrong`: a copy of its shape at other nodes: as many at each site, with as many edges and paths.
- `wrong_best`: of many such copies the one with the least loss.
- `wrong_fitted`: what minimising leaves of the whole model where a true node is forbidden; where
  that misses the target for each of them, there is no second way, and the least loss is printed.
- `certified`: what the pruner finds on few pairs, from which nothing can go, where it is not the
  planted circuit.
- In models with two copies of a circuit, apart from the rest: `one_of_two` and `both`.

The card alone decides: `true` where it shows sufficient and needed and finds no idle part. Printed:
how many of each kind are judged right, the numbers behind it, and each error with its numbers.
"""
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

# before torch: how its threads wait (SPIN in config.py) is read while it loads
from config import as_script, bounded, die, parse

from case import Case
from circuit import Circuit, Nodes, drop_unconnected, edges_of
from data.tinypython.tokenizer import load_tokenizer
from measures import agreement, idle, necessity, necessity_refit, sufficiency
from minimise import minimise, quiet
from model import GPT
from prune import PruneConfig, constants_of
from search import Search
from tasks import Pairs, answer_ids, load_pairs
from tools.planted import (PROMPT, Planted, PlantedConfig, as_circuit, cell, needed, parts_found,
                           plant, prunings, settings_of, truth_of, words_of)
from validate import verdict

Parts = tuple[set, set]  # nodes (site, channel), edges (site, channel, site, channel)
MOST_EXTRA = 5    # idle parts that are added
TRIES = 200       # of drawing something at random, before we say that there is none
VISITS = 100_000  # steps of one search for a copy, before it begins anew with other draws
FEW_PAIRS = 64    # so few that what is minimal on them is now and then another circuit
SCHEDULES = (120, 200, 300)  # steps of mask learning, which end in different circuits
NOT_TRUE = {"sufficient", "needed"}
# What the judge must say of each kind: that it lacks one of these; of `true`, nothing.
FLAWS = {"true": set(), "nothing": NOT_TRUE, "missing": NOT_TRUE, "idle": {"idle"},
         "wrong": NOT_TRUE, "wrong_best": NOT_TRUE, "wrong_fitted": NOT_TRUE | {"idle"},
         "certified": NOT_TRUE | {"idle"},
         # of two ways to do a task, neither is needed, and of both together each part can go
         "one_of_two": {"needed"}, "both": {"idle"}}
COPIES = ("one_of_two", "both")  # not in the total: there, what is right is a matter of words


@dataclass
class CardsConfig:
    shape: str = "2x64"
    cases: str = "quote,quote2,bracket,bracket2"
    seeds: int = bounded(3, at_least=1)     # of model, pairs and draws alike: 0, 1, 2
    draws: int = bounded(4, at_least=1)     # circuits of missing, idle and wrong in each model
    best_of: int = bounded(16, at_least=1)  # copies among which wrong_best is chosen
    copies: bool = True                     # also models with two copies of a circuit
    data: str = "data/tinypython"           # for the means: train.bin
    tokenizer: str = "data/tinypython/tokenizer.tiktoken"
    target_loss: float = bounded(0.02, above=0)  # nats, as tools/planted.py has it
    mean_tokens: int = bounded(65536, at_least=1)
    fit_pairs: int = bounded(256, at_least=1)
    heldout_pairs: int = bounded(256, at_least=1)


@dataclass
class Subject:
    """A planted model, its true circuits (one, or two copies), and what a card needs."""
    name: str  # case and seed
    planted: Planted
    tokenizer: object
    constants: Nodes
    settings: PruneConfig
    heldout: Pairs
    search: Search
    truths: list[Parts]

    def __post_init__(self):
        self.model = self.planted.model
        self.true = self.truths[0]


def planted_config(cfg: CardsConfig) -> PlantedConfig:
    """The options that the two share."""
    return PlantedConfig(
        shapes=cfg.shape, cases=cfg.cases, data=cfg.data, target_loss=cfg.target_loss,
        mean_tokens=cfg.mean_tokens, train_pairs=cfg.fit_pairs, fit_pairs=cfg.fit_pairs)


def subject_of(cfg: CardsConfig, case: str, seed: int, tokenizer,
               variant: str = "single") -> Subject:
    """Plant a case and make its circuits minimal. ValueError where the shape has no room for it."""
    planted = plant(planted_config(cfg), cfg.shape, case, variant, "far", seed, tokenizer)
    settings = replace(settings_of(planted_config(cfg)), seed=seed)
    constants = constants_of(planted.model, settings)
    search = Search(planted.model, constants, planted.pairs)
    # at the target itself, below which the card calls a part idle
    truths = [needed(planted, truth_of(planter, "mean"), search, cfg.target_loss)
              for planter in planted.truths]
    heldout = load_pairs(planted.task, tokenizer, cfg.heldout_pairs, "heldout", PROMPT, seed)
    return Subject(f"{case} seed {seed}", planted, tokenizer, constants, settings, heldout, search,
                   truths)


def fitted(subject: Subject, parts: Parts) -> Circuit:
    """The parts as a circuit, less those without a path, its calibration fitted."""
    return subject.search.fit(*as_circuit(subject.model, *parts))


def has_paths(subject: Subject, parts: Parts) -> bool:
    """Whether every part lies on a path from the tokens to the answers."""
    mask, edges = as_circuit(subject.model, *parts)
    kept = drop_unconnected(subject.model, mask, answer_ids(subject.planted.pairs), edges)
    return parts_found(subject.model, Circuit(kept, edges, 1.0, 0.0, 0.0)) == parts


def everything(model: GPT) -> Parts:
    """All nodes and edges of a model."""
    nodes = {(site, i) for site in model.sites for i in range(model.config.site_width(site))}
    mask, _ = as_circuit(model, nodes, ())
    return nodes, {tuple(e[:4]) for e in edges_of(model, mask)}


# --- missing: one part less; idle: some parts more -------------------------------------------

def without_part(parts: Parts, part: tuple) -> Parts:
    """Less an edge, or a node and with it the edges that begin or end there."""
    nodes, edges = parts  # the ends of an edge are nodes
    return nodes - {part}, {e for e in edges if part not in (e, e[:2], e[2:])}


def missing(subject: Subject, n: int, rng: random.Random) -> list[Parts]:
    """The true circuit without one part, n times another: first without the one that it misses
    least, where a judge is most likely to err."""
    found = [without_part(subject.true, part) for part in sorted(set.union(*subject.true))]
    rng.shuffle(found)
    least = min(found, key=lambda parts: fitted(subject, parts).loss)
    found.remove(least)
    return [least, *found][:n]


def with_idle(subject: Subject, every: Parts, rng: random.Random, tries: int = 20) -> Parts:
    """The true circuit and one to `MOST_EXTRA` parts more, all of them with a path."""
    into = defaultdict(list)  # node -> the edges that end there
    for edge in sorted(every[1]):
        into[edge[2:]].append(edge)
    ends = sorted(node for node in every[0] if node[0].endswith("resid_delta"))
    nodes, edges = subject.true
    room = rng.randint(1, MOST_EXTRA)
    for _ in range(TRIES):
        end = rng.choice(rng.choice([sorted(nodes), ends]))
        more = detour(nodes, edges, end, into, rng)
        grown = nodes | more[0], edges | more[1]
        n = len(more[0]) + len(more[1])
        if more[1] and n <= room and has_paths(subject, grown):
            nodes, edges = grown
            room -= n
    if edges != subject.true[1]:
        return nodes, edges
    if tries == 0:
        raise ValueError(f"{subject.name} has no idle path of at most {MOST_EXTRA} parts")
    return with_idle(subject, every, rng, tries - 1)  # with other room


def detour(nodes: set, edges: set, end: tuple, into: dict, rng: random.Random) -> Parts:
    """What a random path to `end` adds: it begins with a read or at a node that is there."""
    new_nodes = {end} - nodes
    new_edges = set()
    ways = into[end]
    while ways:
        edge = rng.choice(ways)
        new_edges |= {edge} - edges
        new_nodes |= {edge[:2]} - nodes
        ways = [] if edge[:2] in nodes else into[edge[:2]]
    return new_nodes, new_edges


# --- wrong: the same shape elsewhere ---------------------------------------------------------

def place_of(node: tuple) -> tuple:
    """Writes and reads of one channel of the stream are at one place: so its paths are kept."""
    site, i = node
    return ("stream", i) if site.endswith(("act_in", "resid_delta")) else node


def a_copy(subject: Subject, every: Parts, rng: random.Random) -> Parts:
    """The true circuit's shape at other nodes, all of them: as many at each site, an edge for each
    of its edges, a head for each of its heads, and paths from the tokens to the answers."""
    for _ in range(TRIES):
        moved = Mover(subject, every[1], rng).move({})
        if moved is not None and has_paths(subject, moved):
            return moved
    raise ValueError(f"{subject.name}: there is no other circuit of the shape of the true one")


class Mover:
    """One search for a copy: place after place is moved at random, and moved again where a later
    one finds no edges to it."""

    def __init__(self, subject: Subject, edges: set, rng: random.Random):
        self.config = subject.model.config
        self.nodes, self.wires = subject.true
        self.edges = edges  # all of the model's
        self.rng = rng
        self.visits = 0
        # from the answers backward, so that there are edges between one and those before it
        sites = subject.model.sites
        backward = sorted(self.nodes, key=lambda node: (-sites.index(node[0]), node))
        self.order = list(dict.fromkeys(map(place_of, backward)))

    def move(self, to: dict) -> Parts | None:
        """Nodes and edges, where the places `to` have been moved; None where there is no way on, or
        the search took too long."""
        if len(to) == len(self.order):
            return ({self.moved(node, to) for node in self.nodes},
                    {self.moved(e[:2], to) + self.moved(e[2:], to) for e in self.wires})
        place = self.order[len(to)]
        kind = place[0]
        width = self.config.site_width("0.attn.act_in" if kind == "stream" else kind)
        taken = {i for other, i in [*self.order, *to.values()] if other == kind}
        free = [i for i in range(width) if i not in taken]
        self.rng.shuffle(free)
        for i in free:
            self.visits += 1
            trial = to | {place: (kind, i)}
            found = None
            if self.visits <= VISITS and self.fits(place, trial):
                found = self.move(trial)
            if found is not None:
                return found
        return None

    def moved(self, node: tuple, to: dict) -> tuple:
        """The node in a place's stead; of a place that was not moved yet, nothing."""
        place = to.get(place_of(node))
        return () if place is None else (node[0], place[1])

    def fits(self, place: tuple, to: dict) -> bool:
        """Whether the place moved last has its edges to those moved before it, and its head."""
        for e in self.wires:
            moved = self.moved(e[:2], to) + self.moved(e[2:], to)
            if len(moved) == 4 and moved not in self.edges:
                return False
        if not place[0].endswith((".q", ".k", ".v")):
            return True
        near = [other for other in to if other[0][:-1] == place[0][:-1]]  # of the same layer
        return all(self.one_head(other, place) == self.one_head(to[other], to[place])
                   for other in near)

    def one_head(self, a: tuple, b: tuple) -> bool:
        return a[1] // self.config.d_head == b[1] // self.config.d_head


def second_way(subject: Subject, every: Parts) -> tuple[Parts | None, float]:
    """What minimising leaves of the whole model less that true node which it misses least, None
    where the model cannot do the task without; and the loss so (nats)."""
    rests = [without_part(every, node) for node in sorted(subject.true[0])]
    least = min((fitted(subject, parts) for parts in rests), key=lambda circuit: circuit.loss)
    target = subject.settings.target_loss[0]
    if least.loss > target:
        return None, least.loss
    smaller = minimise(subject.search, least, target, quiet)
    return parts_found(subject.model, smaller), least.loss


def certified(subject: Subject) -> list[Parts]:
    """The minimal circuits that the pruner finds on few pairs, less the planted one."""
    found = []
    for steps in SCHEDULES:
        settings = replace(subject.settings, fit_pairs=FEW_PAIRS, steps=steps)
        ((_, circuit, _),) = prunings(subject.planted, subject.constants, settings, ("minimal",))
        parts = parts_found(subject.model, circuit)
        if parts not in (subject.true, *found):
            found.append(parts)
    return found


# --- the card, its judge and the command -----------------------------------------------------

@dataclass
class Card:
    """What was measured of a circuit, and what the judge says it lacks: nothing, if it is true."""
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
        lacks = ", ".join(sorted(self.lacks)) or "nothing"
        return f"{self.kind}, {self.name}: {self.size} nodes, edges; it lacks {lacks}; {said}"


def card_of(subject: Subject, kind: str, parts: Parts) -> Card:
    """Fit a circuit's calibration, measure it and judge it by the card alone."""
    circuit = fitted(subject, parts)
    case = Case(
        model=subject.model, task=subject.planted.task, tokenizer=subject.tokenizer,
        circuit=circuit, constants=subject.constants, settings=subject.settings,
        train=subject.planted.pairs, heldout=subject.heldout, data="", seed=0)
    card = {"sufficiency": sufficiency(case), "necessity": necessity(case)}
    card |= necessity_refit(case) | idle(case) | agreement(case)
    shown = verdict(card, subject.settings.target_loss[0], circuit.size[1])
    lacks = {key for key in NOT_TRUE if not shown[key]["shown"]}
    lacks |= {"idle"} if card["idle"] else set()
    numbers = {"loss": circuit.loss, **card}
    return Card(kind, subject.name, circuit.size, numbers, shown["follows"]["shown"], lacks)


def circuits(subject: Subject, cfg: CardsConfig) -> Iterator[tuple[str, Parts]]:
    """(kind, circuit) of all that are made in one model."""
    rng = random.Random(f"cards {subject.name}")
    if len(subject.truths) > 1:
        first, second = subject.truths
        yield "one_of_two", first
        yield "both", (first[0] | second[0], first[1] | second[1])
        return
    every = everything(subject.model)
    yield "true", subject.true
    yield "nothing", (set(), set())
    yield from (("missing", parts) for parts in missing(subject, cfg.draws, rng))
    for _ in range(cfg.draws):
        yield "idle", with_idle(subject, every, rng)
        yield "wrong", a_copy(subject, every, rng)
    copies = [a_copy(subject, every, rng) for _ in range(cfg.best_of)]
    yield "wrong_best", min(copies, key=lambda parts: fitted(subject, parts).loss)
    parts, loss = second_way(subject, every)
    print(f"{subject.name}: without any one true node the whole model has at least {loss:.3f} nats",
          flush=True)
    if parts is not None:
        yield "wrong_fitted", parts
    yield from (("certified", parts) for parts in certified(subject))


COLUMNS = {"sufficiency": ".3f", "necessity": ".2f", "necessity_refit": ".2f", "idle": ".0f",
           "agreement": ".2f", "agreement_within": ".2f", "agreement_beyond": ".2f"}


def report(cards: list[Card]) -> str:
    """The table (counts, then medians and ranges) and the total."""
    names = ["kind", "circuits", "judged right", "follow", *COLUMNS]
    lines = [f"| {' | '.join(names)} |", len(names) * "|---" + "|"]
    for kind in FLAWS:
        of_kind = [card for card in cards if card.kind == kind]
        if of_kind:
            cells = [kind, len(of_kind), sum(c.right for c in of_kind),
                     sum(c.follows for c in of_kind)]
            cells += [cell([c.numbers[key] for c in of_kind], COLUMNS[key]) for key in COLUMNS]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    counted = [card for card in cards if card.kind not in COPIES]
    right = sum(card.right for card in counted)
    passed = sum(not card.lacks for card in counted if card.kind != "true")
    lines.append(f"judged right: {right} of {len(counted)}, {right / max(1, len(counted)):.1%}; "
                 f"others called true: {passed}")
    return "\n".join(lines)


def run(cfg: CardsConfig) -> None:
    """Judge the circuits of every case and seed; print the errors as they come, then a table."""
    cases = words_of(planted_config(cfg))["cases"]
    tokenizer = load_tokenizer(cfg.tokenizer)
    cards = []
    for case in cases:
        for seed in range(cfg.seeds):
            for variant in ("single", "copy")[:1 + cfg.copies]:
                subject = subject_of(cfg, case, seed, tokenizer, variant)
                for kind, parts in circuits(subject, cfg):
                    cards.append(card_of(subject, kind, parts))
                    if not cards[-1].right:
                        print(f"error: {cards[-1].line()}", flush=True)
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
