"""Sensitivity: what each site's bits do to the outputs or to the loss, one tensor at a time.

A sensitivity is {site name: {'weight', 'activation' or both: {bits: damage}}}, as `allocate_bits`
takes it. `sensitivity` measures it, `hessian_sensitivity` predicts it for kernels.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.program import apply
from hybrid_jax.quantization import grids, model, specs
from hybrid_jax.quantization.deployed import as_deployed
from hybrid_jax.quantization.lookup import range_at, range_of
from hybrid_jax.quantization.planning import Plan
from hybrid_jax.quantization.specs import ROLES

Sensitivity = dict[str, dict[str, dict[int, float]]]


def kl_divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """Mean over the batch of KL(softmax(reference) ‖ softmax(logits)), in nats.

    Both are (..., N): of the quantized model, and of the float one. Source: Cai et al., ZeroQ: A
    Novel Zero Shot Quantization Framework, arXiv 2001.00281, where it is the measure of
    sensitivity.
    """
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, logits))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def squared_difference(outputs: jax.Array, reference: jax.Array) -> jax.Array:
    """Mean of (outputs − reference)² over all their entries: of what is no logits of classes."""
    return jnp.mean(jnp.square(outputs.astype(jnp.float32) - reference.astype(jnp.float32)))


DAMAGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "kl": kl_divergence,
    "squared_difference": squared_difference,
}
"""What a change does to outputs, by name, open to users: damage(outputs, reference) -> ()."""


def increase(loss: jax.Array, reference: jax.Array) -> jax.Array:
    """The quantized model's loss minus the float one's; the damage where `fn` returns a loss."""
    return loss.astype(jnp.float32) - reference.astype(jnp.float32)


def sensitivity(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    spec: specs.Spec,
    ranges: Mapping[int, Any],
    damage: Callable[[Any, Any], jax.Array] = kl_divergence,
    *,
    around: Mapping[str, Mapping[str, int]] | None = None,
    roles: Sequence[str] = ROLES,
) -> Sensitivity:
    """Measures the damage of one tensor's bits, for each tensor and each of several bit-widths.

    `fn(params, *inputs)` is in evaluation mode; or it returns a loss, with labels among the inputs,
    for `damage=increase`. `damage(outputs, outputs of the float model)` is float32 (), and the mean
    over batches, each weighed by how many examples it holds, is taken. `ranges` {bits: ranges at
    these bits} are the bits to try; those that do not depend on bits ('minmax') are given several
    times: `dict.fromkeys((2, 4, 8), ranges)`. The other tensors keep the bits of `around`, {site
    name: {role: bits}} of all sites as `allocate_bits` returns it, or 32: measured once more around
    a first allocation, damages are those of a step from it. It is one compilation, for bits and
    ranges are data.

    Example:
      >>> from hybrid_jax.quantization import calibration
      >>> fn = lambda params, x: x @ params['w']
      >>> params, x = {'w': jnp.array([[1.0, -0.4]])}, jnp.ones((1, 1))
      >>> whole = specs.Quantizer(8)  # one range for the kernel: steps of 1 at 2 bits
      >>> spec = specs.spec(core.trace(fn, params, x), rules=[('w', {'weight': whole})])
      >>> ranges = calibration.calibrate(fn, params, [(x,)], spec)
      >>> most = lambda y, reference: jnp.max(jnp.abs(y - reference))
      >>> found = sensitivity(fn, params, [(x,)], spec, {2: ranges}, most, roles=['weight'])
      >>> round(found['w']['weight'][2], 4)
      0.4
    """
    for role in roles:
        core.check_choice("roles", role, ROLES)
    if not roles or not ranges:
        raise ValueError(f"roles and ranges must not be empty, got {roles} and {list(ranges)}")
    names = [site.name for site in spec.sites]
    for name, role, width in itertools.product(names, roles, ranges):
        _check_bits(width, getattr(spec[name], role))
    base = {name: dict.fromkeys(ROLES, grids.OFF) for name in names} if around is None else around
    first = next(iter(ranges.values()))
    for spans in ranges.values():
        for name, known in spans.items():
            for role in known:
                range_at(spans, name, role)
    for name in names:
        core.check_choice("site of around", name, base)
        for role, width in base[name].items():
            if width not in (*ranges, grids.OFF):
                raise ValueError(f"around must have bits of ranges at {name!r}, got {role} {width}")
    tries = {}
    for name, role, width in itertools.product(names, roles, ranges):
        bits = {**base, name: {**base[name], role: width}}
        tries[name, role, width] = _at_bits(ranges, bits, first), bits
    result: Sensitivity = {name: {role: {} for role in roles} for name in names}
    found = _damages(model.fake_quantized(fn, spec), fn, params, batches, tries, damage)
    for (name, role, width), value in found.items():
        result[name][role][width] = value
    return result


def plan_sensitivity(
    planned: Plan,
    batches: Iterable[tuple[Any, ...]],
    ranges: Mapping[int, Any],
    operations: Iterable[str],
    choices: Mapping[str, Sequence[int]],
    damage: Callable[[Any, Any], jax.Array] = kl_divergence,
) -> Sensitivity:
    """Measures, on the function that is deployed, what fewer bits of one kernel or input do.

    The other operations have the most bits of `choices`, {role: bits}, and the damage of that is
    none; a role left out has those of the plan. Those that take one edge in fewer bits share the
    damage equally. `planned` has what is stored in fewer bits for one operation alone, of the
    fewest bits; `ranges` are {bits: ranges of its edges and kernels} for all of the choices,
    `operations` as `chosen_operations` finds them.
    The result is {output of an operation: {role: {bits: damage}}}, of the roles with more than one
    choice.
    """
    makers, operations = planned.program.makers, list(operations)
    edges = {name: planned.slots[makers[name].inputs[0]].name for name in operations}
    most, widest = {role: max(own) for role, own in choices.items()}, ranges[max(ranges)]
    chosen = {"weight": operations, "activation": edges.values()}

    def own(name, role):
        if name in chosen[role] and role in most:
            return most[role]
        return planned.kernels[name].bits if role == "weight" else stored[name].quantizer.bits

    stored = planned.stored
    base = {name: {role: own(name, role) for role in known} for name, known in widest.items()}
    shares = collections.Counter(edges.values())
    tries: dict[Any, Any] = {None: (_at_bits(ranges, base, widest), base)}
    several = [role for role, own in choices.items() if len(set(own)) > 1]
    for name, role in itertools.product(operations, several):
        key = name if role == "weight" else edges[name]
        for width in sorted(set(choices[role]) - {most[role]} if key in base else ()):
            bits = {**base, key: {**base[key], role: width}}
            tries[name, role, width] = _at_bits(ranges, bits, widest), bits
    reference = functools.partial(apply, planned.program)
    params = planned.program.params
    found = _damages(as_deployed(planned), reference, params, batches, tries, damage)
    least, result = found.pop(None), {name: {} for name in operations}
    for (name, role, width), value in found.items():
        share = shares[edges[name]] if role == "activation" else 1
        table = result[name].setdefault(role, {most[role]: 0.0})
        table[width] = (value - least) / share
    return result


def _at_bits(ranges, bits, first):
    """The ranges of each name and role at its bits; those of `first` where it is off."""
    return {
        name: {role: ranges.get(bits[name][role], first)[name][role] for role in known}
        for name, known in first.items()
    }


def _damages(q_fn, reference, params, batches, tries, damage) -> dict[Any, float]:
    """The mean damage of each of {key: (ranges, bits)} over the batches; one compilation."""
    reference = jax.jit(core.fast_convolutions(reference))

    @jax.jit
    @core.fast_convolutions
    def one(params, spans, bits, inputs, outputs):
        return damage(q_fn(params, spans, *inputs, bits=bits), outputs)

    found: dict[Any, list[jax.Array]] = {key: [] for key in tries}
    sizes = []
    for batch in core.check_batches(batches):
        outputs = reference(params, *batch)
        sizes.append(core.batch_size(batch))
        # A compiled call for each, not a loop within: on a CPU a convolution in a loop is slow.
        for key, (spans, bits) in tries.items():
            found[key].append(one(params, spans, jax.tree.map(jnp.int32, bits), batch, outputs))
    means = {
        key: float(np.average(np.array(values, np.float64), weights=sizes))
        for key, values in found.items()
    }
    core.check_finite("damage", {str(key): np.asarray(value) for key, value in means.items()})
    return means


def hessian_trace(
    loss: Callable[..., jax.Array], params: Any, *inputs: Any, key: jax.Array, probes: int = 32
) -> dict[str, jax.Array]:
    """Estimates the trace of the Hessian's diagonal block of each parameter, by Hutchinson.

        tr(H_ℓ) = E[v_ℓ · (H v)_ℓ],    v = ±1 with equal probability

    One Hessian-vector product of the whole network serves all parameters: the blocks off the
    diagonal have mean zero. It is forward over reverse, the derivative of the gradient along v.

    `loss` is loss(params, *inputs) -> float32 () of the float model, with parameters all of
    floating point. Over `probes` v the mean is taken, one after the other. The result is {path of
    the parameter: float32 ()}.

    Source: Yao et al., PyHessian: Neural Networks Through the Lens of the Hessian, arXiv
    1912.07145.

    Example:
      >>> loss = lambda params: params['a'] ** 2 + 3 * params['b'] ** 2
      >>> trace = hessian_trace(loss, {'a': 1.0, 'b': 1.0}, key=jax.random.key(0), probes=4)
      >>> print(trace['a'], trace['b'])
      2.0 6.0
    """
    core.check_integer("probes", probes, 1)
    gradient = jax.grad(loss)

    @jax.jit
    def probe(params, inputs, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        v = tree.unflatten(
            [jax.random.rademacher(k, jnp.shape(x), x.dtype) for k, x in zip(keys, leaves)]
        )
        _, hv = jax.jvp(lambda p: gradient(p, *inputs), (params,), (v,))
        return jax.tree.map(lambda a, b: jnp.sum(a * b, dtype=jnp.float32), v, hv)

    params = jax.tree.map(jnp.asarray, params)
    traces = [probe(params, inputs, k) for k in jax.random.split(key, probes)]
    return core.flatten_paths(jax.tree.map(lambda *each: sum(each) / probes, *traces))


def hessian_sensitivity(
    fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    spec: specs.Spec,
    ranges: Mapping[int, Any],
    traces: Mapping[str, jax.Array],
) -> Sensitivity:
    """Predicts the damage of quantizing each kernel from the curvature of the loss.

        Ω(site, bits) = tr(H) / n · ‖Q(w) − w‖²,    n the number of weights

    `ranges` is {bits: ranges at these bits}, for the bits to try, and `traces` {path: tr(H)} of all
    kernels, as `hessian_trace` estimates it; of `inputs` only the shapes matter. The result is
    {site name: {'weight': {bits: Ω}}}: sites that share a kernel share its Ω equally, and of
    activations it says nothing.

    Source: Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks,
    arXiv 1911.03852.
    """
    if not ranges:
        raise ValueError("ranges must hold the bits to try, got none")
    widths = list(ranges)
    for site, width in itertools.product(spec.sites, widths):
        _check_bits(width, site.weight)
    core.check_finite("traces", dict(traces))

    def rule(site, x, kernel, apply):
        errors = []
        for bits, spans in ranges.items():
            quantizer, real = spec[site.name].weight, kernel.astype(jnp.float32)
            shape, span = specs.range_shape(site, quantizer), range_of(spec, spans, site, "weight")
            rounded = specs.apply(real, quantizer, span, bits, shape, kernel.size)
            errors.append(jnp.sum(jnp.square(rounded - real)))
        return apply(x, kernel), jnp.stack(errors)

    errors = jax.jit(lambda params: core.at_sites(fn, rule)(params, *inputs)[1])(params)
    sizes = {path: np.size(leaf) for path, leaf in core.flatten_paths(params).items()}
    sites = core.trace(fn, params, *inputs).sites
    uses = collections.Counter(site.path for site in sites)
    result: Sensitivity = {}
    for site in sites:
        core.check_choice("kernel of traces", site.path, traces)
        curvature = float(traces[site.path]) / sizes[site.path] / uses[site.path]
        omega = curvature * np.asarray(errors[site.name], np.float64).reshape(-1, len(widths))
        damages = omega.sum(axis=0).tolist()
        result[site.name] = {"weight": dict(zip(widths, damages, strict=True))}
    return result


def _check_bits(width, quantizer):
    quantizer.check_bits("bits of ranges", core.check_integer("bits of ranges", width, 1, 8))
