"""A circuit as lines of numpy: the function `circuit` of a program (tools/program.py).

- `total`, `statement`: a sum as text, and a statement as lines.
- `Writer`: walks along the model's sublayers, as its forward pass does, and writes one line for
  each node that is in the circuit. All that is held is folded into constants.
"""
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from circuit import FINAL, MAPS, Circuit, Nodes, between, graph_of
from model import GPT, SITES

COLUMNS = 100


# --- what a line is made of -----------------------------------------------------------------

def number(x: float, digits: int) -> str:
    return f"{x:.{digits}g}"


def total(terms: Iterable[tuple[float, str]], constant: float, digits: int) -> str:
    """`0.5 * a - b + 0.1`, from [(0.5, "a"), (-1, "b")] and 0.1."""
    text = ""
    for weight, name in terms:
        size = number(abs(weight), digits)
        product = name if size == "1" else f"{size} * {name}"
        text += f" {'-' if weight < 0 else '+'} {product}"
    if number(constant, digits) not in ("0", "-0") or not text:
        text += f" {'-' if constant < 0 else '+'} {number(abs(constant), digits)}"
    text = text.removeprefix(" + ")
    return f"-{text[3:]}" if text.startswith(" - ") else text


def statement(start: str, expression: str, mark: str = "") -> list[str]:
    """The lines of `start` and an expression, the mark at the end of the first. What is too long
    for one goes over several, in its own brackets where it has some: broken behind the commas of a
    dict, and else before signs, and where that is not enough behind commas."""
    comment = f"  # {mark}" if mark else ""
    line = f"    {start}{expression}{comment}"
    if len(line) <= COLUMNS:
        return [line]
    own = re.match(r"\w*[({]", expression)
    opening, closing = "(", ")"
    if own and closes(expression) == len(expression) - 1:
        opening, closing = own[0], expression[-1]
        expression = expression[own.end() : -1]
    room = COLUMNS - 9  # eight columns in front, and a bracket behind
    lines = [f"    {start}{opening}{comment}"]
    row = ""
    breaks = r"(?<=, )(?=\d+: )" if opening == "{" else r"(?= [+-] )"
    for part in re.split(breaks, expression):
        pieces = [part] if len(part) <= room else re.split(r"(?<=, )|(?= [+-] )", part)
        for piece in pieces:
            if row and len((row + piece).strip()) > room:
                lines.append(f"        {row.strip()}")
                row = ""
            row += piece
    return [*lines, f"        {row.strip()}{closing}"]


def closes(expression: str) -> int:
    """Where the first bracket of an expression is closed."""
    depth = 0
    for i, letter in enumerate(expression):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and letter in ")]}":
            return i
    return -1


def in_braces(entries: Iterable[tuple[int, str]]) -> str:
    """`{5: x, 7: y}`: a dict of names as it stands in the program."""
    return "{" + ", ".join(f"{key}: {name}" for key, name in entries) + "}"


def plain_name(site: str, channel: int) -> str:
    """`L0_mlp_neuron_12` for node 12 of 0.mlp.post_act, by the names of the published config."""
    layer, _, place = site.partition(".")
    return f"L{layer}_{SITES[place]}_{channel}" if place else f"final_{channel}"


# --- a circuit as lines ---------------------------------------------------------------------

class Writer:
    """Writes down the function `circuit`: one sublayer after the other, as model.py runs them."""

    def __init__(self, model: GPT, circuit: Circuit, constants: Nodes, answers: list[int],
                 names: dict[str, str], digits: int, competing: bool = False):
        """competing: with AbsTopK as the model has it, for which channels outside the circuit have
        to be computed as well."""
        self.model = model
        self.competing = competing
        self.matrices = {}  # what that takes, for program.npz
        self.mask = circuit.mask
        self.constants = constants
        self.answers = answers
        self.names = names
        self.digits = digits
        self.wires = graph_of(model).wires
        self.kept = between(model, circuit.mask, circuit.edges)
        self.lines = []
        self.written = {}  # channel of the stream -> names of the nodes that have written to it
        self.variables = {}  # channel -> what its variable holds at the moment
        self.read_channels = set()  # those whose embedding the program looks up
        # the sum of what other writes are held at, before each norm
        self.held = {}
        self.held_so_far = torch.zeros(model.config.d_model, dtype=torch.float64)

    def function(self) -> list[str]:
        """The lines of `circuit(t)`."""
        self.lines = [
            "def circuit(t):",
            '    """Token ids (T,) -> a logit for each answer, at every token; all variables."""',
            "    stream = embed(t)",
        ]
        for layer, block in enumerate(self.model.transformer.h):
            for part, norm in (("attn", block.ln_1), ("mlp", block.ln_2)):
                write = f"{layer}.{part}.resid_delta"
                if self.mask[write].any():
                    what = "attention" if part == "attn" else "MLP"
                    self.lines += ["", f"    # layer {layer}, {what}"]
                    self.read(layer, part, norm.weight)
                    self.attention(layer) if part == "attn" else self.mlp(layer)
                for channel in self.channels(write):
                    name = self.name(write, channel)
                    self.written.setdefault(channel, []).append(name)
                held = self.constants[write].masked_fill(self.mask[write], 0)
                self.held_so_far = self.held_so_far + held.double()
        self.last()
        return self.lines

    # --- pieces ------------------------------------------------------------------------------

    def channels(self, site: str) -> list[int]:
        return self.mask[site].nonzero().flatten().tolist()

    def name(self, site: str, channel: int) -> str:
        plain = plain_name(site, channel)
        return self.names.get(plain, plain)

    def add(self, start: str, expression: str, mark: str = "") -> None:
        self.lines += statement(start, expression, mark)

    def node(self, site: str, channel: int, expression: str) -> None:
        self.add(f"{self.name(site, channel)} = ", expression, f"{site}.{channel}")

    def total(self, terms: Iterable[tuple[float, str]], constant: float) -> str:
        return total(terms, constant, self.digits)

    def inputs(self, a: str, b: str, channel: int) -> tuple[list[tuple[float, str]], float]:
        """What a node of site b adds up: the edges from the circuit's nodes of site a, and all that
        is held, its bias among it."""
        wires = self.wires[a, b]
        here = wires.to == channel
        kept = here & self.kept[a, b]
        held = here & ~self.kept[a, b]
        terms = [(w, self.name(a, j)) for w, j in zip(wires.weight[kept].tolist(),
                                                      wires.source[kept].tolist())]
        constant = wires.weight[held].double() @ self.constants[a][wires.source[held]].double()
        return terms, float(constant) + self.bias(b, channel)

    def bias(self, site: str, channel: int) -> float:
        layer, _, place = site.partition(".")
        for name, (_, targets) in MAPS.items():
            if place in targets:
                bias = self.model.transformer.h[int(layer)].get_submodule(name).bias
                if bias is None:
                    return 0.0
                return bias.chunk(len(targets))[targets.index(place)][channel].item()
        raise ValueError(f"nothing is added up at {site}")

    def stream_term(self, channel: int) -> str:
        """The value of a channel at this point: a variable where the circuit writes to it."""
        self.read_channels.add(channel)
        if channel in self.written:
            return f"stream_{channel}"
        held = self.held_so_far[channel].item()
        if number(held, self.digits) == "0":
            return f"stream[:, {channel}]"
        return f"({self.total([(1.0, f'stream[:, {channel}]')], held)})"

    def stream_sum(self, channel: int) -> str:
        """The value of a channel that the circuit writes to: the token's own, what was written, and
        what other writes are held at."""
        terms = [(1.0, f"stream[:, {channel}]")]
        terms += [(1.0, name) for name in self.written[channel]]
        return self.total(terms, self.held_so_far[channel].item())

    def stream_variables(self) -> None:
        """A line for each channel that the circuit has written to since the last one."""
        for channel in self.written:
            expression = self.stream_sum(channel)
            if self.variables.get(channel) != expression:
                self.add(f"stream_{channel} = ", expression)
                self.variables[channel] = expression

    def norm(self, read: str, held: Tensor, variables: dict[int, str]) -> None:
        """The line of what a norm divides by. held: the channels that are not in `variables`, less
        the tokens' own; {channel: its variable}."""
        self.held[read] = held
        written = f", {in_braces(variables.items())}" if variables else ""
        self.add("norm = ", f'rms("{read}", stream{written})')

    def read(self, layer: int, part: str, gain: Tensor) -> None:
        site = f"{layer}.{part}.act_in"
        d_model = self.model.config.d_model
        variables = {}
        if any(channel < d_model or self.competing for channel in self.channels(site)):
            self.stream_variables()
            variables = {c: f"stream_{c}" for c in self.written}
            self.norm(f"{layer}.{part}", self.held_so_far, variables)
        for channel in self.channels(site):
            if channel >= d_model:  # positions, beside the stream
                place = channel - d_model
                self.node(site, channel, f'DATA["beside.{layer}.{part}"][: len(t), {place}]')
                continue
            term = (gain[channel].item(), self.stream_term(channel))
            self.node(site, channel, f"{self.total([term], 0.0)} / norm")
        read = f"{layer}.{part}"
        self.matrices[f"gain.{read}"] = gain
        written = in_braces(variables.items())
        self.contest(site, f'kept_of_read("{site}", "{read}", stream, {written}, norm, ')

    def contest(self, site: str, call: str, end: str = "") -> None:
        """The line that lets AbsTopK act on a site's nodes, where it is to and the model has it."""
        layer, _, place = site.partition(".")
        names = {c: self.name(site, c) for c in self.channels(site)}
        topk_at = self.model.transformer.h[int(layer)].topk_at
        if not self.competing or not names or SITES[place] not in topk_at:
            return
        k = int(self.model.config.afrac * self.model.config.site_width(site))
        self.matrices[f"k.{site}"] = torch.tensor(k)
        variables = ", ".join(names.values())
        nodes = in_braces(names.items())
        self.add(f"[{variables}] = ", f"{call}{nodes}{end})")

    def contest_of_sums(self, a: str, b: str, given: dict[int, str], act: str = "") -> None:
        """The same for a site that adds up what the site a passes on, {channel: expression}."""
        if not self.competing or not self.channels(b):
            return
        layer, _, place = b.partition(".")
        name, z = next((name, targets.index(place)) for name, (_, targets) in MAPS.items()
                       if place in targets)
        module = self.model.transformer.h[int(layer)].get_submodule(name)
        n = len(MAPS[name][1])
        weight = module.weight.chunk(n)[z]
        self.matrices[f"weight.{b}"] = weight
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.chunk(n)[z]
        self.matrices[f"bias.{b}"] = bias
        self.matrices[f"mean.{a}"] = self.constants[a]
        call = f'kept("{b}", "{a}", {in_braces(given.items())}, '
        self.contest(b, call, f", {act}" if act else "")

    def of_site(self, site: str) -> dict[int, str]:
        return {c: self.name(site, c) for c in self.channels(site)}

    def linear(self, a: str, b: str, channel: int, act: str = "") -> None:
        """The line of a node that adds up others."""
        terms, constant = self.inputs(a, b, channel)
        expression = self.total(terms, constant)
        if not terms:
            expression = f"np.full(len(t), {expression})"
        self.node(b, channel, f"{act}({expression})" if act else expression)

    def attention(self, layer: int) -> None:
        read = f"{layer}.attn.act_in"
        q, k, v, write = (f"{layer}.attn.{z}" for z in ("q", "k", "v", "resid_delta"))
        width = self.model.config.d_head
        # a head without a value writes a constant, wherever it looks
        heads = sorted({channel // width for channel in self.channels(v)})
        for head in heads:
            place = range(head * width, (head + 1) * width)
            for site in (q, k, v):
                for channel in place:
                    if self.mask[site][channel]:
                        self.linear(read, site, channel)
            if not self.competing:
                self.head(layer, head, place)
        if self.competing:  # of all heads together
            for site in (q, k, v):
                self.contest_of_sums(read, site, self.of_site(read))
            for head in heads:
                self.head(layer, head, range(head * width, (head + 1) * width))
        for channel in self.channels(write):
            terms, constant = self.inputs(v, write, channel)
            gathered = [(w, self.gathered(layer, name)) for w, name in terms]
            self.node(write, channel, self.total(gathered, constant))
        given = {c: self.gathered(layer, name) for c, name in self.of_site(v).items()}
        self.contest_of_sums(v, write, given)

    def head(self, layer: int, head: int, place: range) -> None:
        sinks = self.model.transformer.h[layer].attn.attn_imp
        sink = ""
        if sinks is not None:
            sink = f", sink={number(sinks.sink_logit[head].item(), self.digits)}"
        scores = self.scores(f"{layer}.attn.q", f"{layer}.attn.k", place)
        self.add(f"L{layer}_head{head} = ", f"attention(t, {scores}{sink})")

    def gathered(self, layer: int, name: str) -> str:
        """A value, by its name, as its head has gathered it."""
        channel = next(c for c, its in self.of_site(f"{layer}.attn.v").items() if its == name)
        return f"(L{layer}_head{channel // self.model.config.d_head} @ {name})"

    def scores(self, q: str, k: str, place: range) -> str:
        """Queries times keys over the root of d_head: what varies in both, in one, and in none."""
        scale = len(place) ** -0.5
        terms = []
        constant = 0.0
        for c in place:
            held_q = self.constants[q][c].item() * scale
            held_k = self.constants[k][c].item()
            if self.mask[q][c] and self.mask[k][c]:
                terms.append((scale, f"np.outer({self.name(q, c)}, {self.name(k, c)})"))
            elif self.mask[q][c]:
                terms.append((held_k * scale, f"{self.name(q, c)}[:, None]"))
            elif self.mask[k][c]:
                terms.append((held_q, self.name(k, c)))
            else:
                constant += held_q * held_k
        return self.total(terms, constant)

    def mlp(self, layer: int) -> None:
        read, neurons, write = (f"{layer}.mlp.{z}" for z in ("act_in", "post_act", "resid_delta"))
        act = self.model.config.activation_type
        for channel in self.channels(neurons):
            self.linear(read, neurons, channel, act)
        self.contest_of_sums(read, neurons, self.of_site(read), act)
        for channel in self.channels(write):
            self.linear(neurons, write, channel)
        self.contest_of_sums(neurons, write, self.of_site(neurons))

    def last(self) -> None:
        """From the stream to a logit for each answer."""
        self.lines += ["", "    # the answers; own(): what all channels but these say"]
        values = {channel: self.stream_sum(channel) for channel in self.written}
        held = self.held_so_far
        if FINAL in self.mask:  # published circuits name the channels that are not held there
            self.stream_variables()
            for channel in self.channels(FINAL):
                self.node(FINAL, channel, self.stream_term(channel))
            values = self.of_site(FINAL)
            self.add("stream = ", "0 * stream", "at the end all other channels are held, too")
            held = self.constants[FINAL].double()
        self.add("last = ", in_braces(values.items()))
        self.held["final"] = held
        self.add("norm = ", 'rms("final", stream, last)')

        weights = self.unembedding()
        for i in range(len(self.answers)):
            terms = [(weights[i, c].item(), f"last[{c}]") for c in values if weights[i, c] != 0]
            terms.append((1.0, f"own({i}, stream, last)"))
            said = self.total(terms, 0.0)
            if len(terms) > 1:
                said = f"({said})"
            self.add(f"logit_{i} = ", f"{said} / norm + BIGRAM[t, {i}]")
        logits = ", ".join(f"logit_{i}" for i in range(len(self.answers)))
        self.lines.append(f"    return [{logits}], locals()")

    def unembedding(self) -> Tensor:
        """(answers, d_model), the last norm's gain in it."""
        return self.model.lm_head.weight[self.answers] * self.model.transformer.ln_f.weight
