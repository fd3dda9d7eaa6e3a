"""Calibration: the ranges of a model's sites, or of a plan's edges, streamed over batches."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax import core
from hybrid_jax.program import evaluate
from hybrid_jax.quantization import grids, specs
from hybrid_jax.quantization.observers import METHODS, Observer, conclude, observe, observer
from hybrid_jax.quantization.planning import Plan


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    spec: specs.Spec,
    method: str | Observer = "minmax",
    *,
    bits: Any = None,
    stacked: bool = False,
) -> dict[str, dict[str, grids.Range]]:
    """Finds the ranges of kernels and activations by running the float model.

    The model, in evaluation mode, is compiled once for each shape of batch, and batches are not
    kept. `method` is a name in `observers.METHODS` or an `Observer`, for tensors whose quantizer
    states none; `bits`, as `Spec.bits` gives them, take the place of the spec's, which only 'mse'
    and 'entropy' mind. Of `stacked` parameters (and bits) every leaf has a leading axis E: all
    experts see each batch, and the ranges have the axis too.

    They are float32 and trainable, {site name: {'weight': Range, 'activation': Range}} without
    those that are 'dynamic'. A kernel's have the kernel's rank, with 1 (or the number of groups)
    for the axes that are summed over, or are () per tensor; an activation's are (). A site in a
    `scan` has one for all of its iterations. What is constantly 0 (a dead channel) has the range
    [0, 0].

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x) @ params['w']
      >>> params, x = {'w': jnp.array([[0.5], [-2.0]])}, jnp.array([[-1.0, 3.0]])
      >>> ranges = calibrate(fn, params, [(x,)], specs.spec(core.trace(fn, params, x)))
      >>> print(*ranges['w']['activation'], *ranges['w']['weight'])
      0.0 3.0 [[-2.]] [[0.5]]
    """
    watched = _watching(method)

    def see(params, *inputs):
        def rule(site, x, kernel, apply):
            seen = {}
            for role, tensor in (("weight", kernel), ("activation", x)):
                quantizer = getattr(spec[site.name], role)
                if not quantizer.dynamic:
                    shape = specs.range_shape(site, quantizer)
                    seen[role] = watched(quantizer, tensor, shape)
            return apply(x, kernel), seen

        _, seen = core.at_sites(fn, rule)(params, *inputs)
        return jax.tree.map(_fold, seen, is_leaf=_is_observed)

    core.check_known("calibrate", params=params)
    quantizers = {
        own.name: {role: getattr(own, role) for role in specs.ROLES} for own in spec.sites
    }
    return _streamed(see, params, batches, quantizers, bits, stacked)


def calibrate_edges(
    planned: Plan,
    batches: Iterable[tuple[Any, ...]],
    method: str | Observer = "minmax",
) -> dict[str, dict[str, grids.Range]]:
    """The ranges of a plan's edges and kernels, by running its program in floats; as `calibrate`.

    They are {name of a slot: {'activation': Range}}, whose ends are (), and {output of a
    convolution or dense layer: {'weight': Range}}, of the kernel's rank; a name may have both.
    """
    watched = _watching(method)
    quantizers: dict[str, dict[str, specs.Quantizer]] = {}
    for op in planned.program.weighted:
        if op.output in planned.ranged:
            quantizers[op.output] = {"weight": planned.kernels[op.output]}
    for name, slot in planned.stored.items():
        quantizers.setdefault(name, {})["activation"] = slot.quantizer

    def see(params, *inputs):
        program = planned.program.replace(params)
        seen: dict[str, dict[str, Any]] = {}
        for op in program.weighted:
            if op.output in planned.ranged:
                quantizer, kernel = planned.kernels[op.output], op.weights.values
                shape = specs.kernel_range_shape(kernel.shape, quantizer)
                seen[op.output] = {"weight": watched(quantizer, kernel, shape)}
        values, together = evaluate.edges(program, inputs), collections.defaultdict(list)
        for op in program.operations:
            slot = planned.slots[op.output]
            if slot is not None and not planned.as_stored(op):
                together[slot.name].append(values[op.output].reshape(-1))
        for name, slot in planned.stored.items():
            # Side by side, not as one batch after the other, of which some methods mind the order.
            new = watched(slot.quantizer, jnp.concatenate(together[name]), ())
            seen.setdefault(name, {})["activation"] = new
        return seen

    return _streamed(see, planned.program.params, batches, quantizers)


def _watching(method):
    """(quantizer, tensor, shape of its range) -> what its observer sees."""
    # One observer of each name, so that equal trees hold equal ones.
    default, watches = observer(method), {name: observer(name) for name in METHODS}

    def watched(quantizer, tensor, shape):
        watch = watches.get(quantizer.method, default)
        return _Observed(observe(watch, tensor, shape), watch, shape)

    return watched


def _streamed(see, params, batches, quantizers, bits=None, stacked=False):
    def later(old, new):
        return jax.tree.map(lambda a, b: a.merge(b.state), old, new, is_leaf=_is_observed)

    def finish(seen, bits):
        # Together those that are found in one way: one by one, each would be compiled.
        ways, found = collections.defaultdict(list), {name: {} for name in seen}
        for name, roles in seen.items():
            for role, got in roles.items():
                own = quantizers[name][role]
                given = bits[name][role] if name in bits else own.bits
                traced = isinstance(given, jax.Array)
                way = got.watch, own, (name, role) if traced else given
                ways[way].append((name, role, got, given))
        for (watch, own, _), places in ways.items():
            states = jax.tree.map(lambda *a: jnp.concatenate(a), *(p[2].state for p in places))
            counts = [len(got.state.low) for *_, got, _ in places]
            whole = conclude(watch, states, (sum(counts),), own.grid, places[0][3])
            starts = itertools.accumulate(counts, initial=0)
            for (name, role, got, _), start, count in zip(places, starts, counts):
                ends = (end[start : start + count].reshape(got.shape) for end in whole)
                found[name][role] = grids.Range(*ends)
        return found

    def over_experts(f, axes):
        return jax.jit(core.fast_convolutions(jax.vmap(f, axes) if stacked else f))

    step = later_step = seen = None
    for batch in core.check_batches(batches):
        step = step or over_experts(see, (0, *(None for _ in batch)))
        later_step = later_step or over_experts(later, (0, 0))
        new = step(params, *batch)
        seen = new if seen is None else later_step(seen, new)
    missed = [name for name in quantizers if name not in seen]
    if missed:
        raise ValueError(f"fn must run every site of spec outside `while`, got no {missed[0]!r}")
    for name in quantizers:
        states = {role: observed.state for role, observed in seen[name].items()}
        ends = {role: grids.Range(state.low, state.high) for role, state in states.items()}
        core.check_finite(f"what calibration saw at {name!r}", ends)
    ranges = over_experts(finish, (0, None if bits is None else 0))(seen, bits or {})
    return {name: ranges[name] for name in quantizers}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["watch", "shape"]
)
@dataclasses.dataclass(frozen=True)
class _Observed:
    """An observer's state for each entry of a range of that shape."""

    state: Any
    watch: Observer
    shape: tuple[int, ...]

    def merge(self, state):
        return dataclasses.replace(self, state=jax.vmap(self.watch.merge)(self.state, state))


def _is_observed(node):
    return isinstance(node, _Observed)


def _fold(observed):
    """Merges what the iterations of the scans around a site saw."""
    scans = observed.state.low.ndim - 1
    if not scans:
        return observed
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[scans:]), observed.state)
    first = dataclasses.replace(observed, state=jax.tree.map(lambda leaf: leaf[0], flat))
    rest = jax.tree.map(lambda leaf: leaf[1:], flat)
    return lax.scan(lambda old, new: (old.merge(new), None), first, rest)[0]
