"""The abstract walk over a jaxpr: labels of every value, sites, multiply-accumulates."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter, versions
from hybrid_jax.core.arrangement import moved, scanned
from hybrid_jax.core.labels import (
    TANGENT,
    Labels,
    Origin,
    Value,
    barrier,
    common,
    join_origins,
    literal,
)
from hybrid_jax.core.primitives import propagate
from hybrid_jax.core.sites import Site, count_macs, describe, is_contraction, kernel_operand


class Analysis:
    """What one walk over a jaxpr finds.

    `counts` is {path: (entries, whether they are floats)} of the parameters. By the path of an
    equation are its values in and out (`equations`), the positions of the `constants` it takes, its
    site, and, of a contraction, itself and how often it runs. `barriers` are those without a rule,
    which take whole inputs; `used` are identities of the label arrays of axes that some equation
    takes.
    """

    def __init__(self, counts: Mapping[str, tuple[int, bool]]):
        self.counts = counts
        self.labels = Labels()
        self.equations: dict[interpreter.Path, tuple[list[Value], list[Value]]] = {}
        self.sites: dict[interpreter.Path, Site] = {}
        self.contractions: dict[interpreter.Path, tuple[jex.JaxprEqn, int]] = {}
        self.macs = 0
        self.barriers: set[interpreter.Path] = set()
        self.constants: dict[interpreter.Path, list[int]] = {}
        self.used: set[int] = set()
        self._names: collections.Counter[str] = collections.Counter()

    def walk(
        self, closed: jex.ClosedJaxpr, args: Sequence[Value], path: interpreter.Path, calls: int
    ) -> list[Value]:
        """Walks the jaxpr at `path`, which runs `calls` times; returns its outputs."""
        jaxpr = closed.jaxpr
        consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        env = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            if isinstance(atom, jex.Literal):
                return literal(atom.val, self.labels)
            # A constant is cut anew for each that takes it.
            return literal(consts[atom], self.labels) if atom in consts else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            here = (*path, index)
            values = [read(atom) for atom in eqn.invars]
            self.constants[here] = [
                i
                for i, atom in enumerate(eqn.invars)
                if not isinstance(atom, jex.Literal) and atom in consts
            ]
            inner = interpreter.subjaxprs(eqn, here)
            if inner:
                values = [value.plain() for value in values]
                outs = [v.plain() for v in self._enter(eqn, inner, values, here, calls)]
            else:
                self.used |= {id(axis) for value in values for axis in value.labels}
                outs = propagate(self.labels, eqn, values)
                if outs is None:
                    self.barriers.add(here)
                    outs = barrier(self.labels, eqn, values, f"goes through {eqn.primitive.name}")
                outs = [
                    dataclasses.replace(out, arrangement=arrangement)
                    for out, arrangement in zip(outs, moved(eqn, values), strict=True)
                ]
                if is_contraction(eqn):
                    self._contraction(eqn, values, outs[0], here, calls)
            self.equations[here] = values, outs
            env.update(zip(eqn.outvars, outs, strict=True))
        outs = [read(atom) for atom in jaxpr.outvars]
        for atom, out in zip(jaxpr.outvars, outs, strict=True):
            if not isinstance(atom, jex.Literal) and atom in consts:
                for axis in out.labels:
                    self.labels.freeze(axis, "is a constant that is handed on")
        return outs

    def _contraction(self, eqn, values, result, path, calls):
        if path in self.contractions:  # The body of a scan may be walked twice.
            return
        self.contractions[path] = eqn, calls
        if not interpreter.in_derivative(path):
            self.macs += calls * count_macs(eqn, values, result)
        operand = kernel_operand(eqn, values)
        if operand is None:
            return
        site = describe(eqn, values, result, operand, calls, self.counts)
        self._names[site.path] += 1
        count = self._names[site.path]
        name = site.path if count == 1 else f"{site.path}#{count}"
        self.sites[path] = dataclasses.replace(site, name=name)

    def _enter(self, eqn, inner, values, path, calls) -> list[Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, inner["body"], values, path, calls)
        if name == "while":
            return self._loop(eqn, inner, values, path, calls)
        if name == "cond":
            return self._branches(inner, values, path, calls)
        if name in versions.CUSTOM:
            return self._custom(eqn, inner, values, path, calls)
        return self.walk(inner["body"], values, (*path, "body"), calls)

    def _scan(self, eqn, closed, values, path, calls):
        consts, carried = versions.scan_counts(eqn.params)
        xs = []
        for value in values[consts + carried :]:
            self.labels.freeze(value.labels[0], "is the axis that a scan runs over")
            arrangement = scanned(value.arrangement)
            xs.append(
                Value(value.labels[1:], value.rest[1:], value.origin, arrangement=arrangement)
            )
        length = eqn.params["length"]

        def body(carry):
            args = [*values[:consts], *carry, *xs]
            return self.walk(closed, args, (*path, "body"), calls * length)

        end = consts + carried
        origins = _origins_of_carry(closed, values[:consts], values[consts:end], values[end:])
        carry, outs = self._settle(values[consts:end], origins, body)
        stacked = [
            Value((np.zeros(length, np.int32), *v.labels), (None, *v.rest), v.origin)
            for v in outs[carried:]
        ]
        return [*carry, *stacked]

    def _loop(self, eqn, inner, values, path, calls):
        conds, bodies = versions.while_counts(eqn.params)

        def body(carry):
            self.walk(inner["cond"], [*values[:conds], *carry], (*path, "cond"), calls)
            args = [*values[conds : conds + bodies], *carry]
            return self.walk(inner["body"], args, (*path, "body"), calls)

        first = values[conds + bodies :]
        origins = _origins_of_carry(inner["body"], values[conds : conds + bodies], first)
        known = [_from(origin) for origin in origins]
        # How often it runs is what its condition says.
        (rounds,) = _origins(inner["cond"].jaxpr, [*values[:conds], *known])
        origins = [join_origins([value, _from(rounds)]) for value in known]
        return self._settle(first, origins, body)[0]

    def _settle(self, carry, origins, body):
        """Walks the body of a loop until what is known of its carry holds after every round."""
        carry = [
            dataclasses.replace(v, constant=None, origin=origin, arrangement=None)
            for v, origin in zip(carry, origins, strict=True)
        ]
        while True:
            outs = body(carry)
            settled = [self._merge([a, b]) for a, b in zip(carry, outs, strict=False)]
            if [v.rest for v in settled] == [v.rest for v in carry]:
                return carry, outs
            carry = settled

    def _branches(self, inner, values, path, calls):
        results = [
            self.walk(branch, values[1:], (*path, name), calls) for name, branch in inner.items()
        ]
        index = values[0].origin
        merged = [self._merge(outs) for outs in zip(*results, strict=True)]
        return [dataclasses.replace(v, origin=join_origins([v, _from(index)])) for v in merged]

    def _merge(self, values) -> Value:
        """What is known of a value that is one of these: tied labels, common rests."""
        first, *others = values
        for other in others:
            for a, b in zip(first.labels, other.labels, strict=True):
                self.labels.tie(a, b)
        rest = tuple(common(rests) for rests in zip(*[v.rest for v in values], strict=True))
        labels = tuple(
            next((a for a in axes if not a.any()), axes[0])
            for axes in zip(*[v.labels for v in values], strict=True)
        )
        constant = common([v.constant for v in values])
        arrangement = common([v.arrangement for v in values])
        return Value(labels, rest, join_origins(values), constant, arrangement)

    def _custom(self, eqn, inner, values, path, calls):
        names = self._names.copy()
        outs = self.walk(inner["body"], values, (*path, "body"), calls)
        primals = values[versions.custom_consts(eqn.params) :]
        after, self._names = self._names, names
        if "jvp" in inner:
            tangents = [Value(v.labels, tuple(0.0 for _ in v.rest), TANGENT) for v in primals]
            both = self.walk(inner["jvp"], [*primals, *tangents], (*path, "jvp"), calls)
            zeros = versions.jvp_jaxpr(eqn.params)[1]
            self._tie_all(outs, both[: len(outs)])
            given = [out for out, zero in zip(outs, zeros, strict=True) if not zero]
            self._tie_all(given, both[len(outs) :])
        if "fwd" in inner:
            found = self.walk(inner["fwd"], primals, (*path, "fwd"), calls)
            residuals, again = versions.split_residuals(eqn.params, found, values)
            self._tie_all(outs, again)
            cotangents = [Value(v.labels, (None,) * len(v.rest), TANGENT) for v in outs]
            bwd = versions.bwd_jaxpr(eqn.params)
            back = self.walk(bwd, [*residuals, *cotangents], (*path, "bwd"), calls)
            self._tie_all(primals, back)
        self._names = after
        return outs

    def _tie_all(self, left, right):
        for a, b in zip(left, right, strict=True):
            self._merge([a, b])


def _from(origin) -> Value:
    return Value((), (), origin)


def _origins(jaxpr, args) -> list[Origin]:
    """Where each output of a jaxpr is from: an equation's are from all that it takes."""
    env = dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        taken = [env[v] for v in eqn.invars if not isinstance(v, jex.Literal) and v in env]
        env |= dict.fromkeys(eqn.outvars, _from(join_origins(taken)))
    known = [None if isinstance(v, jex.Literal) else env.get(v) for v in jaxpr.outvars]
    return [value.origin if value else frozenset() for value in known]


def _origins_of_carry(closed, consts, carry, xs=()) -> list[Origin]:
    """Where each value that a loop carries is from, after any number of rounds."""
    origins = [value.origin for value in carry]
    while True:
        known = [_from(origin) for origin in origins]
        outs = _origins(closed.jaxpr, [*consts, *known, *xs])
        after = [join_origins([a, _from(b)]) for a, b in zip(known, outs, strict=False)]
        if after == origins:
            return origins
        origins = after
