"""AdaRound and block reconstruction: which way each weight is rounded, learned from activations."""

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.quantization import grids, model, specs
from hybrid_jax.quantization.blocks import Block, cut, marked, observed

# ζ and γ of the paper: the stretch with which the rectified sigmoid reaches 0 and 1.
_HIGH, _LOW = 1.1, -0.1
# The exponent β falls from the first to the last, after this part of the steps without any
# regularization.
_FIRST_BETA, _LAST_BETA, _FREE = 20.0, 2.0, 0.2


class _Kernel(NamedTuple):
    value: jax.Array
    grid: grids.Grid


def adaround(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    spec: specs.Spec,
    ranges: Mapping[str, Mapping[str, grids.Range]],
    key: jax.Array,
    blocks: Sequence[str] = (),
    *,
    bits: Any = None,
    steps: int = 1000,
    learning_rate: float = 0.1,
    regularization: float = 40.0,
) -> Any:
    """Learns for each weight whether it is rounded up or down, from what that does to activations.

    Rounding to the nearest is best for weights one by one, but not for their sum. Block by block,
    in the order in which they run, the rounding h of all the block's weights is learned to minimize

        n · E(ŵ(h)) / E(ŵ nearest) + λ Σ (1 − |2h − 1|^β)        ŵ = s · clip(⌊w/s⌋ + h, low, high)

    with h = clip(1.2 σ(v) − 0.1, 0, 1) for a learned v, and n the number of weights. E is the mean
    over batches of the squared difference between the float model and this one in what the sites
    after the block take, and in the outputs of the model that come from the block. Here activations
    are quantized, and earlier kernels rounded as learned, so that a block makes up for the error
    made before it. β falls, which drives h to 0 or 1. As errors are measured in those of rounding
    to nearest, λ means the same for every layer. A block keeps the nearest rounding if the learned
    one is no better on `batches`.

    By default each kernel is a block of its own: AdaRound. Several kernels at once, such as those
    of a residual block, are BRECQ's block reconstruction, with all errors weighted alike.

    What one block takes and is to give is held in memory for all batches at once. A block is
    compiled unless an earlier one was the same program on the same shapes.

    `fn` is in evaluation mode, batches are all of the same shapes, and `key` is for their order.
    `ranges` are those of `calibrate`, and `bits`, as `Spec.bits` gives them, replace the spec's.
    A weight that is exactly 0 (pruned) stays 0. `blocks` are patterns on names of sites, of which
    the first match counts: the sites of one pattern are one block, and a kernel that none matches
    is one of its own. There are `steps` of Adam for v in each block, each on one batch;
    `regularization` is λ.

    Returns:
      `params`, with every quantized kernel on the points of its grid that were chosen:
      `fake_quantized` with the same ranges and bits rounds it to itself. A kernel of 32 bits stays
      as it is.

    Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv
    2004.10568, section 3; Li et al., BRECQ: Pushing the Limit of Post-Training
    Quantization by Block Reconstruction, arXiv 2102.05426.

    Example:
      >>> fn = lambda params, x: x @ params['w']
      >>> params, x = {'w': jnp.array([[0.4], [0.45], [7.0]])}, jnp.array([[1.0, 1.0, 0.0]])
      >>> rules = [('w', {'weight': 4, 'activation': 32})]
      >>> spec = specs.spec(core.trace(fn, params, x), rules)
      >>> span = grids.Range(jnp.full((1, 1), -7.0), jnp.full((1, 1), 7.0))
      >>> new = adaround(fn, params, [(x,)], spec, {'w': {'weight': span}}, jax.random.key(0))
      >>> print(new['w'].sum())  # Of 0.4 + 0.45 rounding to nearest makes 0, this 1; and 7.
      8.0
    """
    batches = list(core.check_batches(batches, alike=True))
    core.check_integer("steps", steps, 1)
    core.check_positive("learning_rate", learning_rate)
    core.check_positive("regularization", regularization)
    grid_of = _grids(fn, params, spec, ranges, batches[0], bits)
    groups = _groups(core.trace(fn, params, *batches[0]), grid_of, blocks)

    widths = spec.bits() if bits is None else bits
    widths = {
        name: {"weight": grids.OFF, "activation": int(roles["activation"])}
        for name, roles in widths.items()
    }
    q_fn = functools.partial(model.fake_quantized(marked(fn), spec), bits=widths)
    closed = jax.make_jaxpr(q_fn)(params, ranges, *batches[0])
    flat = core.flatten_paths(params)
    variables = dict(zip(flat, closed.jaxpr.invars))
    inputs = closed.jaxpr.invars[len(jax.tree.leaves((params, ranges))) :]
    cuts = [
        cut(closed.jaxpr, sites, {path: variables[path] for path in paths}, inputs)
        for sites, paths in groups
    ]
    observe = observed(fn, closed, cuts)
    learn = _learner(learning_rate, regularization)
    for index, block in enumerate(cuts):
        old = jax.tree.unflatten(jax.tree.structure(params), flat.values())
        seen = [observe(block, params, old, ranges, batch) for batch in batches]
        for one in seen:
            core.check_finite(f"what the block of {', '.join(block.sites)} sees", one._asdict())
        kernels = [
            _Kernel(flat[path], grids.spread(grid_of[path], flat[path].shape))
            for path in block.kernels
        ]
        order = jax.random.randint(jax.random.fold_in(key, index), (steps,), 0, len(seen))
        flat |= zip(block.kernels, learn(block, kernels, seen, order.tolist()))
    return jax.tree.unflatten(jax.tree.structure(params), flat.values())


def _learner(learning_rate, regularization):
    """learn(block, kernels, seen batches, their order) -> rounded kernels."""
    optimizer = optax.adam(learning_rate)

    @functools.partial(jax.jit, static_argnums=0)
    def step(block, *args):
        once = functools.partial(_step, optimizer, regularization, block)
        return core.fast_convolutions(once)(*args)

    error = jax.jit(_error, static_argnums=0)
    programs: dict[str, Block] = {}

    def learn(block, kernels, seen, order):
        values = [kernel.value for kernel in kernels]
        text = jax.jit(block).lower(seen[0].streams, seen[0].constants, values).as_text()
        # Blocks of the same program are one to `jit`, so that it is compiled once.
        block = programs.setdefault(text, block)

        def mean_error(ups):
            return statistics.fmean(float(error(block, ups, kernels, one)) for one in seen)

        nearest = [jnp.round(_position(kernel)) for kernel in kernels]
        unit = mean_error(nearest)
        logits = [_logit(_position(kernel)) for kernel in kernels]
        state = optimizer.init(logits)
        # Not a scan: XLA's own convolutions are far slower on a CPU inside a loop than outside.
        for count, which in enumerate(order):
            done = count / len(order)
            logits, state = step(block, logits, state, kernels, seen[which], unit, done)
        learned = [(_up(v) >= 0.5).astype(jnp.float32) for v in logits]
        best = learned if mean_error(learned) < unit else nearest
        return list(map(_rounded, kernels, best))

    return learn


def _step(optimizer, regularization, block, logits, state, kernels, seen, unit, done):
    """One step of Adam on one batch, with the part `done` of all steps behind it."""
    count = sum(kernel.value.size for kernel in kernels)
    beta = _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * jnp.clip((done - _FREE) / (1 - _FREE), 0, 1)
    strength = jnp.where(done < _FREE, 0.0, regularization)

    def loss(logits):
        ups = [_up(v) for v in logits]
        undecided = sum(jnp.sum(1 - jnp.abs(2 * up - 1) ** beta) for up in ups)
        relative = _error(block, ups, kernels, seen) / jnp.maximum(
            unit, jnp.finfo(jnp.float32).tiny
        )
        return count * relative + strength * undecided

    gradients = jax.grad(loss)(logits)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(logits, updates), state


def _error(block, ups, kernels, seen):
    """The squared error of what the block gives on one batch."""
    outs = block(seen.streams, seen.constants, list(map(_rounded, kernels, ups)))
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), (list(outs), list(seen.targets)))
    differences = (a - b for a, b in zip(*floats))
    return sum(jnp.sum(jnp.square(difference)) for difference in differences)


def _position(kernel):
    """Where each weight lies between the two points of the grid around it, in [0, 1)."""
    steps = kernel.value.astype(jnp.float32) / kernel.grid.scale
    return steps - jnp.floor(steps)


def _rounded(kernel, up):
    """The kernel on its grid where `up`, h, is 0 or 1, and between its points where it is not."""
    lowest, highest = grids.steps(kernel.grid)
    below = jnp.floor(kernel.value.astype(jnp.float32) / kernel.grid.scale)
    value = jnp.clip(below + up, lowest, highest) * kernel.grid.scale
    return jnp.where(kernel.value == 0, 0.0, value).astype(kernel.value.dtype)


def _up(v):
    return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


def _logit(up):
    """The v of an h in [0, 1]."""
    return jax.scipy.special.logit((up - _LOW) / (_HIGH - _LOW))


def _grids(fn, params, spec, ranges, batch, bits):
    """{path of a kernel that is quantized: its grid}."""
    found: dict[str, grids.Grid] = {}
    flat = core.flatten_paths(params)
    graph = core.trace(fn, params, *batch)
    kernels = model.integer_kernels(fn, spec, params, ranges, *batch, bits=bits)
    for name, (integers, grid) in kernels.items():
        site = graph.site(name)
        leaf = flat[site.path]
        if spec[name].weight.learning == "dynamic":
            raise ValueError(f"ranges must be calibrated, got 'dynamic' for the kernel of {name!r}")
        if grid.low.dtype != jnp.int32:
            scheme = spec[name].weight.scheme
            raise ValueError(f"kernels must have integer grids, got {scheme!r} for {name!r}")
        shapes = {leaf.shape, site.kernel_shape, integers.shape}
        if len(shapes) > 1 or (grids.quantize(leaf, grid) != integers.astype(jnp.int32)).any():
            raise ValueError(
                f"a quantized kernel must be a parameter as it stands, outside loops, got {name!r}"
            )
        first = found.setdefault(site.path, grid)
        if not jax.tree.all(jax.tree.map(jnp.array_equal, first, grid)):
            raise ValueError(f"sites that share kernel {site.path!r} must have one range for it")
    if not found:
        raise ValueError("spec must quantize at least one kernel, got 32 bits for all")
    return found


def _groups(graph, quantized, patterns):
    """(names of sites, paths of kernels) of each block, in the order in which they run."""
    sites = {site.name: site.path for site in graph.sites if site.path in quantized}
    rules = [(pattern, index) for index, pattern in enumerate(patterns)]
    groups: dict[Any, dict[str, str]] = {}
    label_of: dict[str, Any] = {}
    for name, label in core.match_rules(rules, sites, default=None).items():
        label = sites[name] if label is None else label
        if label_of.setdefault(sites[name], label) != label:
            raise ValueError(f"blocks must not part the sites of kernel {sites[name]!r}")
        groups.setdefault(label, {})[name] = sites[name]
    return [(tuple(group), tuple(dict.fromkeys(group.values()))) for group in groups.values()]
