"""What a plan stores, before there are ranges: edges as encodings, operations as a spec."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from hybrid_jax import program as p
from hybrid_jax.quantization.grids import OFF
from hybrid_jax.quantization.planning import Plan
from hybrid_jax.quantization.schemes import SCHEMES
from hybrid_jax.quantization.specs import Quantizer, SiteSpec, Spec

_FLOAT = Quantizer(OFF, "affine")


def encodings(planned: Plan) -> dict[str, p.Encoding | None]:
    """{edge: None of floats, else an encoding}, equal where edges are stored alike.

    Their scales say nothing, for ranges are not known: what is stored where depends on none.
    """
    order = {name: i for i, name in enumerate(planned.stored)}
    found = {}
    for name, slot in planned.slots.items():
        found[name] = slot and (slot.fixed or p.Encoding(2.0 + order[slot.name]))
        if slot is None and planned.program.tensors[name].dtype == "uint8":
            found[name] = p.Encoding(1.0)  # as it comes
    return found


def of_operations(planned: Plan, names: Iterable[str]) -> Spec:
    """How operations are quantized, by the names of their outputs; others are in floats."""
    makers = {op.output: op for op in planned.program.weighted}

    def quantizers(name):
        slot = planned.slots[makers[name].inputs[0]] if name in makers else None
        return (planned.kernels[name], slot.quantizer) if slot else (_FLOAT, _FLOAT)

    return Spec(tuple(SiteSpec(name, *quantizers(name)) for name in names))


def chosen_operations(planned: Plan, choices: Mapping[str, Sequence[int]]) -> list[str]:
    """Outputs of the operations whose bits may be any of these: {role: bits}.

    They are sites in integers, out of loops, whose schemes have all of the bits.
    """
    known = {own.name: own for own in planned.spec.sites}
    found = []
    for op in planned.program.weighted:
        source, slot = planned.program.sources.get(op.output), planned.slots[op.inputs[0]]
        own = known.get(source.site) if source else None
        if own and slot and all(_has(getattr(own, role), own_bits) for role, own_bits in choices.items()):
            found.append(op.output)
    return found


def at_bits(planned: Plan, bits: Mapping[str, int]) -> Plan:
    """The plan with what is in integers at these bits, {role: bits}, where its scheme has them.

    A role left out keeps its own.
    """

    def at(quantizer, role):
        width = bits.get(role, quantizer.bits)
        off = quantizer.bits == OFF or not _has(quantizer, [width])
        return quantizer if off else dataclasses.replace(quantizer, bits=width)

    slots = {
        name: slot and slot._replace(quantizer=at(slot.quantizer, "activation"))
        for name, slot in planned.slots.items()
    }
    kernels = {name: at(own, "weight") for name, own in planned.kernels.items()}
    return dataclasses.replace(planned, slots=slots, kernels=kernels)


def _has(quantizer, bits):
    return set(bits) <= set(SCHEMES[quantizer.scheme].bits)
