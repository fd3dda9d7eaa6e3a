"""Which edges of an inference graph are stored in integers, in how many bits, and which alike.

A range belongs to an edge. An edge is stored once, and whatever only moves its entries keeps its
encoding. What takes it in fewer bits, or what meets others in a concatenation, takes it through a
`Convert`, which makes an edge with a range of its own. What has no integers runs in floats, and so
does what lies between such operations, or between one and an output.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.program import functions
from hybrid_jax.quantization.grids import OFF
from hybrid_jax.quantization.specs import Quantizer, SiteSpec, Spec

EDGE = Quantizer(8, "affine")
"""How an edge is stored that no site alone takes."""

_SCHEMES = {"weight": ("symmetric", "binary"), "activation": ("affine", "symmetric")}
_CHEAP = (
    *(p.Add, p.Multiply, p.Maximum, p.Clip, p.Function, p.Concatenate, p.Constant),
    *(p.Reshape, p.Transpose, p.Broadcast, p.Pad, p.Slice, p.Gather),
)


class Slot(NamedTuple):
    """What edges of one encoding share."""

    name: str  # of the first of them
    quantizer: Quantizer  # how they are stored
    site: str | None = None  # the site whose input's range is that of all of them; None without one
    # An encoding that does not depend on a range; None for one that does
    fixed: p.Encoding | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A program with the conversions that a spec asks for, and how its edges are stored."""

    program: p.Program  # in floats; `Convert` stands where an encoding changes
    slots: dict[str, Slot | None]  # {edge: slot}, or None of an edge in floats
    # {output of a convolution or dense layer: quantizer of its kernel}
    kernels: dict[str, Quantizer]
    spec: Spec  # how the sites of the traced function are quantized

    @property
    def stored(self) -> dict[str, Slot]:
        """{name: slot} of all that have a range."""
        found = {slot.name: slot for slot in self.slots.values() if slot}
        return {name: slot for name, slot in found.items() if slot.fixed is None}

    @property
    def ranged(self) -> list[str]:
        """Outputs of the convolutions and dense layers whose kernels have a range."""
        sources = self.program.sources
        return [name for name, own in self.kernels.items() if name in sources and own.bits != OFF]

    def replace(self, params: p.Params) -> "Plan":
        """The same plan with other weights."""
        return dataclasses.replace(self, program=self.program.replace(params))

    def as_stored(self, op: p.Operation) -> bool:
        """Whether all that an operation returns are entries of what it takes, stored alike."""
        held = {slot and slot.name for slot in map(self.slots.get, op.inputs)}
        kept = op.same_encoding or isinstance(op, p.Concatenate)
        own = self.slots[op.output]
        return kept and held == {own and own.name}


def plan(program: p.Program, spec: Spec) -> Plan:
    """Plans how a program in floats is stored, each site as `spec` says.

    What is no site has kernels of 8 bits. What has no integers is refused: groups, 8-bit floats,
    dynamic ranges, and signs of a kernel with zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hybrid_jax import core, quantization
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params, x = {name: jnp.ones((2, 2)) for name in 'ab'}, jnp.ones((1, 2))
      >>> spec = quantization.spec(core.trace(fn, params, x), weight_bits=4, first_last_bits=4)
      >>> planned = plan(p.lower(fn, params, x), spec)
      >>> {edge: slot and slot.quantizer.bits for edge, slot in planned.slots.items()}
      {'x': None, 'x/8 bits': 8, 'a': 8, 'b': None}
    """
    wanted = {name: site_of(spec, source) for name, source in program.sources.items()}
    for own in filter(None, wanted.values()):
        _check_integral("weight", own.name, own.weight)
        _check_integral("activation", own.name, own.activation)
    floats = _in_floats(program, wanted)
    slots = _slots(program, wanted, floats)
    return check_signs(_Planning(program, spec, wanted, floats, slots).plan())


def check_signs(planned: Plan) -> Plan:
    """Returns the plan if no binary kernel has a zero, but for channels that are zero throughout.

    One has if it is pruned, or of a transposed convolution, each phase of which has the entries
    that the others have not.
    """
    for op in planned.program.weighted:
        if op.output in planned.ranged and planned.kernels[op.output].scheme == "binary":
            zero = np.asarray(op.weights.values) == 0
            if planned.program.sources[op.output].copies == 1:
                zero = zero & ~zero.all(tuple(range(zero.ndim - 1)))
            if zero.any():
                raise ValueError(f"weight of {op.name!r} must have no zero to be binary, got some")
    return planned


def _check_integral(role, name, quantizer):
    if quantizer.bits == OFF:
        return
    if quantizer.scheme not in _SCHEMES[role]:
        raise ValueError(
            f"{role} of {name!r} must be {' or '.join(_SCHEMES[role])} to be integers, "
            f"got {quantizer.scheme}"
        )
    if quantizer.group is not None:
        raise ValueError(
            f"{role} of {name!r} must have one scale for each output channel, "
            f"got groups of {quantizer.group}"
        )
    if quantizer.dynamic:
        raise ValueError(
            f"{role} of {name!r} must have a range that is known, got {quantizer.learning!r}"
        )


def site_of(spec: Spec, source: p.Source | None) -> SiteSpec | None:
    """How the site of a kernel is quantized; None of what is none.

    The turns of a loop, 'name#2' and so on, are quantized as the loop is.
    """
    if source is None or source.site is None:
        return None
    known = {own.name: own for own in spec.sites}
    if source.site in known:
        return known[source.site]
    loop = source.site.rpartition("#")[0] or source.site
    if f"{loop}#2" in known:
        raise ValueError(
            f"kernel {loop!r} must be used in one loop or outside of loops, got both: which "
            "ranges are those of a turn cannot be told"
        )
    return spec[loop]


def _in_floats(program, wanted) -> set[str]:
    """Outputs of the operations that compute in floats."""
    readers, made = program.readers, program.makers
    off = {n for n, own in wanted.items() if own and OFF in (own.activation.bits, own.weight.bits)}
    floats = {op.output for op in program.operations if not op.integral} | off

    def cheap(op):
        return isinstance(op, _CHEAP) or (isinstance(op, p.Conv) and op.output not in wanted)

    # Forwards: what takes a result that there is in floats alone, and nothing else takes.
    for op in program.operations:
        alone = (n in floats - off and len(readers[n]) == 1 for n in op.inputs)
        if cheap(op) and any(alone):
            floats.add(op.output)
    # Backwards: what is taken in floats alone, and does not return floats of integers itself.
    for op in reversed(program.operations):
        taken = all(reader.output in floats for reader in readers[op.output])
        if taken and isinstance(op, _CHEAP) and not op.returns_floats:
            floats.add(op.output)
    return floats - {name for name in floats if isinstance(made[name], p.Constant)}


def _slots(program, wanted, floats) -> dict[str, Slot]:
    """{edge: slot} of every edge, as those take it that compute in integers."""
    readers, found = program.readers, {}
    for names in _classes(program, floats):
        read = [(op, name) for name in names for op in readers[name] if not _passes(op, names)]
        takers = [(op, name) for op, name in read if op.output not in floats]
        sites = [(wanted[op.output], name) for op, name in takers if wanted.get(op.output)]
        others = [op for op, _ in takers if not wanted.get(op.output)]
        # Whoever takes it in floats takes what is stored, too.
        taken = [name for _, name in read] + [n for n in names if n in program.outputs]
        found |= dict.fromkeys(names, _slot(program, names, sites, others, taken))
    return found


def _classes(program, floats) -> list[list[str]]:
    """Edges that have one encoding, each of them in one list."""
    members = {name: [name] for name in program.tensors}

    def join(first, second):
        if members[first] is not members[second]:
            members[first] += members[second]
            members.update(dict.fromkeys(members[second], members[first]))

    inside = [op for op in program.operations if op.output not in floats]
    readers, makers = program.readers, program.makers
    for op in inside:
        if op.same_encoding:
            join(op.inputs[0], op.output)
    for op in inside:
        for name in op.inputs if isinstance(op, p.Concatenate) else ():
            own = members[name]
            alone = all(
                reader is op or _passes(reader, own) for member in own for reader in readers[member]
            )
            # What nothing else takes is made in the encoding of the whole.
            if alone and all(makers.get(member) and member not in floats for member in own):
                join(op.output, name)
    order = {name: i for i, name in enumerate(program.tensors)}
    unique = {min(own, key=order.get): own for own in members.values()}
    return [sorted(own, key=order.get) for own in unique.values()]


def _passes(op, names):
    """Whether an operation hands entries on among edges of one encoding."""
    return op.output in names and (op.same_encoding or isinstance(op, p.Concatenate))


def _slot(program, names, sites, others, taken) -> Slot:
    """The slot of edges of which sites and others take some."""
    makers, name = program.makers, names[0]
    quantizers = [own.activation for own, _ in sites]
    whole = [quantizer for quantizer in quantizers if _is_edge(quantizer)]
    if quantizers and not others and len(set(quantizers)) == 1:
        quantizer = quantizers[0]
    else:
        quantizer = whole[0] if whole else EDGE
    if any(n in program.inputs and program.tensors[n].dtype == "uint8" for n in names):
        return Slot(name, EDGE, fixed=p.Encoding(1.0))
    made = [makers[n] for n in names if n in makers and not _passes(makers[n], names)]
    kind = made[0].kind if len(made) == 1 and isinstance(made[0], p.Function) else None
    if kind in functions.FIXED and _is_edge(quantizer):
        return Slot(name, EDGE, fixed=p.Encoding(*functions.FIXED[kind]))
    given = [
        own.name
        for own, edge in sites
        if own.activation == quantizer
        and _covers(program, names, edge, taken)
        and not _takes_in(program, own.name)
    ]
    return Slot(name, quantizer, given[0] if given else None)


def _covers(program, names, edge, taken):
    """Whether all that is taken has entries of that edge alone, so that its range is theirs."""
    makers = program.makers

    def before(name, kinds):
        maker = makers.get(name)
        return maker.inputs[0] if isinstance(maker, kinds) and maker.inputs[0] in names else None

    def same(name):
        while (source := before(name, p.Reshape | p.Transpose | p.Broadcast)) is not None:
            name = source
        return name

    def derives(name):
        name = same(name)
        while name != same(edge):
            source = before(name, p.Slice | p.Gather | p.MaxPool | p.Largest)
            maker = makers.get(name)
            if source is None and isinstance(maker, p.Pad) and maker.value == 0:
                source = before(name, p.Pad)
            if source is None:
                return False
            name = same(source)
        return True

    return all(map(derives, taken))


def _takes_in(program, site):
    """Whether the kernel of a site has taken in what scales its input, so that it has another."""
    return any(own.site == site and own.before for own in program.sources.values())


def _is_edge(quantizer):
    return (quantizer.bits, quantizer.scheme) == (EDGE.bits, EDGE.scheme)


class _Planning:
    """A program on its way to one with conversions."""

    def __init__(self, program, spec, wanted, floats, slots):
        self.program, self.spec = program, spec
        self.wanted, self.floats, self.usual = wanted, floats, slots
        self.tensors = {name: program.tensors[name] for name in program.inputs}
        self.slots: dict[str, Slot | None] = dict.fromkeys(program.inputs)
        self.operations: list[p.Operation] = []
        self.converted: dict[tuple[str, Any], str] = {}

    def plan(self) -> Plan:
        """The plan."""
        readers = self.program.readers
        for op in self.program.operations:
            if op.output in self.floats:
                inputs, slot = [self.get(n, None) for n in self.narrowed(op)], None
            else:
                inputs, slot = self.narrowed(op), self.usual[op.output]
                takers = readers[op.output]
                if op.returns_floats and all(taker.output in self.floats for taker in takers):
                    slot = None
            self.tensors[op.output] = self.program.tensors[op.output]
            self.slots[op.output] = slot
            self.operations.append(dataclasses.replace(op, inputs=tuple(inputs)))
        outputs = tuple(self.get(name, None) for name in self.program.outputs)
        for name, end in zip(self.program.outputs, outputs, strict=True):
            tensor = self.program.tensors[name]
            self.tensors[end] = dataclasses.replace(self.tensors[end], dtype=tensor.dtype)
        program = dataclasses.replace(
            self.program,
            outputs=outputs,
            tensors=self.tensors,
            operations=tuple(self.operations),
        )
        plain = Quantizer(8, "symmetric", per_channel=True)
        kernels = {
            op.output: self.wanted[op.output].weight if self.wanted.get(op.output) else plain
            for op in program.weighted
        }
        return Plan(program, self.slots, kernels, self.spec)

    def narrowed(self, op) -> list[str]:
        """The edges that an operation takes, each stored as it takes them."""
        own = self.wanted.get(op.output)
        if own is None or own.activation.bits == OFF:
            usual = op.output not in self.floats
            return [self.get(n, self.usual[n]) if usual else n for n in op.inputs]
        (name,) = op.inputs
        usual = self.usual[name]
        alike = usual.quantizer == own.activation
        if alike or (_is_edge(usual.quantizer) and _is_edge(own.activation)):
            return [self.get(name, usual)]
        site = None if _takes_in(self.program, own.name) else own.name
        return [self.get(name, Slot("", own.activation, site))]

    def get(self, name, slot) -> str:
        """The edge of that name as it is stored so, converted if it is not."""
        held = self.slots[name]
        if held is slot or (held and slot and held.name == slot.name):
            return name
        if slot is None and held is None:
            return name
        key = name, slot and (slot.name, slot.quantizer)
        if key not in self.converted:
            # From floats the slot of the edge itself; what is narrower has one of its own.
            title = f"{name}/{'floats' if slot is None else f'{slot.quantizer.bits} bits'}"
            new, count = title, 1
            while new in self.tensors or new in self.program.tensors:
                count += 1
                new = f"{title} {count}"
            self.tensors[new] = dataclasses.replace(self.tensors[name], dtype="float32")
            self.slots[new] = slot if slot is None or slot.name else slot._replace(name=new)
            self.operations.append(p.Convert((name,), new))
            self.converted[key] = new
        return self.converted[key]
