"""Calibration: the ranges of every site of a model, streamed over batches of its inputs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax

from hybrid_jax import core
from hybrid_jax.quantization import grids, specs
from hybrid_jax.quantization.observers import METHODS, Observer, conclude, observe, observer


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
    kept. `method` is a name in `observers.METHODS` ('minmax', 'ema', 'percentile', 'mse',
    'entropy', 'mean_abs', 'ternary') or an `Observer`, for tensors whose quantizer states none;
    `bits`, as `Spec.bits` gives them, take the place of the spec's, which only 'mse' and 'entropy'
    mind. Of `stacked` parameters (and bits) every leaf has a leading axis E: all experts see each
    batch, and the ranges have the axis too.

    Returns:
      Ranges, float32 and trainable: {site name: {'weight': Range, 'activation': Range}}, without
      those that are 'dynamic', and {join name: {'activation': Range}} if the spec has joins. A
      kernel's have the kernel's rank, with 1 (or the number of groups) for the axes that are summed
      over, or are () per tensor; an activation's are (). A site in a `scan` has one for all of its
      iterations. What is constantly 0 (a dead channel) has the range [0, 0], of the least scale.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x) @ params['w']
      >>> params, x = {'w': jnp.array([[0.5], [-2.0]])}, jnp.array([[-1.0, 3.0]])
      >>> ranges = calibrate(fn, params, [(x,)], specs.spec(core.trace(fn, params, x)))
      >>> print(*ranges['w']['activation'], *ranges['w']['weight'])
      0.0 3.0 [[-2.]] [[0.5]]
    """
    # One observer of each name, so that equal trees hold equal ones.
    default, watches = observer(method), {name: observer(name) for name in METHODS}

    def see(params, *inputs):
        def rule(site, x, kernel, apply):
            seen = {}
            for role, tensor in (("weight", kernel), ("activation", x)):
                quantizer = getattr(spec[site.name], role)
                if quantizer.learning != "dynamic":
                    watch = watches.get(quantizer.method, default)
                    shape = specs.range_shape(site, quantizer)
                    seen[role] = _Observed(observe(watch, tensor, shape), watch, shape)
            return apply(x, kernel), seen

        def at_join(join, x):
            watch = watches.get(spec[join.name].activation.method, default)
            return x, {"activation": _Observed(observe(watch, x, ()), watch, ())}

        _, seen = core.at_sites(fn, rule, at_join if spec.joins else None)(params, *inputs)
        return jax.tree.map(_fold, seen, is_leaf=_is_observed)

    def later(old, new):
        return jax.tree.map(lambda a, b: a.merge(b.state), old, new, is_leaf=_is_observed)

    def finish(seen, bits):
        return {
            name: {
                role: conclude(
                    got.watch,
                    got.state,
                    got.shape,
                    getattr(spec[name], role).grid,
                    bits[name][role] if name in bits else getattr(spec[name], role).bits,
                )
                for role, got in roles.items()
            }
            for name, roles in seen.items()
        }

    core.check_known("calibrate", params=params)

    def over_experts(f, axes):
        return jax.jit(core.fast_convolutions(jax.vmap(f, axes) if stacked else f))

    step = later_step = seen = None
    for batch in core.check_batches(batches):
        step = step or over_experts(see, (0, *(None for _ in batch)))
        later_step = later_step or over_experts(later, (0, 0))
        new = step(params, *batch)
        seen = new if seen is None else later_step(seen, new)
    names = [own.name for own in (*spec.sites, *spec.joins)]
    missed = [name for name in names if name not in seen]
    if missed:
        raise ValueError(f"fn must run every site of spec outside `while`, got no {missed[0]!r}")
    for name in names:
        states = {role: observed.state for role, observed in seen[name].items()}
        ends = {role: grids.Range(state.low, state.high) for role, state in states.items()}
        core.check_finite(f"what calibration saw at {name!r}", ends)
    widths = spec.bits() if bits is None else bits
    ranges = over_experts(finish, (0, None if bits is None else 0))(seen, widths)
    return {name: ranges[name] for name in names}


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
