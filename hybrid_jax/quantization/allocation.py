"""Allocation: the bits of every site, and channel widths, at the least damage within budgets."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import core
from hybrid_jax.quantization import program, specs
from hybrid_jax.quantization.sensitivity import Sensitivity
from hybrid_jax.quantization.specs import ROLES


class Allocation(NamedTuple):
    """What `allocate_bits` chose."""

    # {site name: {'weight': int, 'activation': int}} of every site: data for the `bits` of
    # `fake_quantized`, and what `with_bits` takes
    bits: dict[str, dict[str, int]]
    widths: dict[str, int]  # {group name: channels kept} of the groups that had a choice
    damage: float  # the sum of the damages chosen
    costs: dict[str, int]  # {name: what the formula counts}


def allocate_bits(
    sensitivity: Sensitivity,
    formula: Any,
    spec: specs.Spec,
    budgets: Mapping[str, int],
    *,
    rules: Iterable[tuple[str, Mapping[str, int | Iterable[int]]]] = (),
    widths: Mapping[str, Mapping[int, float]] | None = None,
) -> Allocation:
    """Chooses bits, and widths of coupled channels with them, at the least total damage.

    The damages of all choices are added, as in HAWQ-V2 (Dong et al., arXiv 1911.03852), and
    minimized by an integer program, exactly (see `program.solve`). Budgets, {'bytes', 'bops',
    'macs', of a program's formula 'memory': the most it may be}, are kept to the byte.

    `sensitivity` is {site name: {role: {bits: damage}}}; the bits listed are the choices. Damages
    of sites that share a kernel are added, they get the same bits; a site or role left out keeps
    its bits in `spec`. `formula` is `cost.formula(graph, scales=scale_counts(graph, spec))`;
    without `scales` every kernel below 32 bits is counted with one scale for each output channel,
    which is right for the default quantizers only. With that of `cost.of_program` operations take
    the place of sites, see `stored.of_operations`. `rules` are (pattern on the site's name, {role:
    bits}) pairs, the bits one number, which needs no damage, or several; they take the place of the
    site's choices, and the first match wins. `widths` are {group name: {channels kept: damage}}, in
    the unit of the bits' damages; groups left out keep all channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hybrid_jax import cost
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.ones((4, 8)), 'b': jnp.ones((8, 4))}
      >>> graph = core.trace(fn, params, jnp.ones((1, 4)))
      >>> sensitivity = {'a': {'weight': {2: 0.3, 8: 0.0}}, 'b': {'weight': {2: 0.1, 8: 0.0}}}
      >>> spec, formula = specs.spec(graph), cost.formula(graph)
      >>> found = allocate_bits(sensitivity, formula, spec, {'bytes': 90})  # 32 + 8 + 12 scales · 4
      >>> found.bits['a']['weight'], found.bits['b']['weight'], found.costs['bytes']
      (8, 2, 88)
    """
    for name, roles in sensitivity.items():
        core.check_choice("site of sensitivity", name, formula.kernels)
        for role in roles:
            core.check_choice(f"role in sensitivity[{name!r}]", role, ROLES)
    if not budgets:
        raise ValueError(f"budgets must hold one of {', '.join(formula.costs)}, got none")
    options, damage = _bit_choices(sensitivity, formula, spec, rules)
    options |= {("width", name): (n,) for name, n in formula.widths.items()}
    for name, table in (widths or {}).items():
        core.check_choice("group of widths", name, formula.widths)
        for width in table:
            core.check_integer(f"a width of {name!r}", width, 1, formula.widths[name])
        options["width", name] = _sorted(f"widths[{name!r}]", table)
        damage.append(_damage(f"widths[{name!r}]", ("width", name), options, table))
    limits = []
    for name, budget in budgets.items():
        core.check_choice("budgets", name, formula.costs)
        budget = core.check_integer(f"budget of {name}", budget)
        rows = tuple(tuple(_sum(part, options) for part in row) for row in formula.costs[name])
        limits.append(program.Limit(name, budget, rows))
    choice = program.solve(options, damage, limits)
    chosen = {decision: options[decision][index] for decision, index in choice.items()}
    bits = {
        site: {"weight": chosen["weight", path], "activation": chosen["activation", site]}
        for site, path in formula.kernels.items()
    }
    kept = {name: chosen["width", name] for name in widths or {}}
    by_role = [{site: roles[role] for site, roles in bits.items()} for role in ROLES]
    total = sum(float(table.values[choice[table.of[0]]]) for table in damage)
    return Allocation(bits, kept, total, formula.count(kept, *by_role))


def with_bits(spec: specs.Spec, bits: Mapping[str, Mapping[str, int]]) -> specs.Spec:
    """The same spec with other bits: what `allocate_bits` chose, to be stated for good.

    `bits` is {site name: {'weight', 'activation' or both: bits}}; sites left out keep theirs.
    """
    changed = {site.name: site for site in spec.sites}
    for name, roles in bits.items():
        site = changed[core.check_choice("site of bits", name, changed)]
        for role, width in roles.items():
            core.check_choice(f"role in bits[{name!r}]", role, ROLES)
            width = core.check_integer(f"bits of {name!r}", width)
            quantizer = dataclasses.replace(getattr(site, role), bits=width)
            site = dataclasses.replace(site, **{role: quantizer})
        changed[name] = site
    return dataclasses.replace(spec, sites=tuple(changed.values()))


def _bit_choices(sensitivity, formula, spec, rules):
    """Options of the decisions on bits, and tables of their damages."""
    options, damage = {}, []
    ruled = core.match_rules(rules, formula.kernels, default={})
    for site, path in formula.kernels.items():
        for role in ruled[site]:
            core.check_choice(f"role in the rule for {site!r}", role, ROLES)
        for role, decision in (("weight", ("weight", path)), ("activation", ("activation", site))):
            name = f"choices of {role} bits for {site!r}"
            table = sensitivity.get(site, {}).get(role)
            bits = ruled[site].get(role, table)
            if bits is None:
                bits = getattr(spec[site], role).bits
            bits = _sorted(name, bits if isinstance(bits, Iterable) else (bits,))
            getattr(spec[site], role).check_bits(name, np.array(bits))
            if options.setdefault(decision, bits) != bits:
                raise ValueError(
                    f"{name} must be those of the other sites of kernel {path!r}, "
                    f"{options[decision]}, got {bits}"
                )
            if len(bits) > 1 or (table and bits[0] in table):
                name = f"sensitivity[{site!r}][{role!r}]"
                damage.append(_damage(name, decision, options, table or {}))
    return options, damage


def _sorted(name, choices):
    choices = tuple(sorted(core.check_integer(name, choice) for choice in choices))
    if not choices:
        raise ValueError(f"{name} must be at least one, got none")
    return choices


def _damage(name, decision, options, table):
    missing = [choice for choice in options[decision] if choice not in table]
    if missing:
        raise ValueError(f"{name} must have a damage for {missing[0]}, got {sorted(table)}")
    values = np.array([float(table[choice]) for choice in options[decision]])
    core.check_finite(name, {"damage": values})
    return program.Table((decision,), values)


def _sum(part, options):
    """An amount of the formula for every combination of options."""
    tables = []
    for term in part.terms:
        combinations = itertools.product(*(options[decision] for decision in term.of))
        values = np.array([term.value(*chosen) for chosen in combinations], np.int64)
        shape = tuple(len(options[decision]) for decision in term.of)
        tables.append(program.Table(term.of, values.reshape(shape)))
    return program.Sum(tuple(tables), part.unit)
