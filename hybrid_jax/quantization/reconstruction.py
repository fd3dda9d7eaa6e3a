"""AdaRound and block reconstruction: which way each weight is rounded, learned from activations."""

import dataclasses
import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.quantization import deployed, grids
from hybrid_jax.quantization.lookup import range_at
from hybrid_jax.quantization.planning import Plan

# ζ and γ of the paper: the stretch with which the rectified sigmoid reaches 0 and 1.
_HIGH, _LOW = 1.1, -0.1
# The exponent β falls from the first to the last, after this part of the steps without any
# regularization.
_FIRST_BETA, _LAST_BETA, _FREE = 20.0, 2.0, 0.2


class _Kernel(NamedTuple):
    """A kernel and its bias in floats, and the grid of the kernel."""

    value: jax.Array
    bias: jax.Array
    grid: grids.Grid


class _Seen(NamedTuple):
    """What a block takes on one batch of inputs, and what it is to give."""

    inputs: list[jax.Array]
    targets: list[jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A slice of a plan, from some kernels up to the edges that operations after it take."""

    planned: Plan  # of the slice alone
    # {output of a convolution or dense layer whose rounding is learned: its source}
    sources: dict[str, p.Source]

    def __call__(self, inputs, spans, kernels, ups):
        """Its outputs, stored, of kernels rounded by `ups`; all but names are arguments."""
        ranges = {n: {"activation": span} for n, span in zip(self.planned.stored, spans)}
        params = {**self.planned.program.params, **self.rounded(kernels, ups)}
        values = deployed.edges(self.planned.replace(params), ranges, inputs)
        return [values[name] for name in self.planned.program.outputs]

    def rounded(self, kernels, ups):
        """{output: weights on their grids where h is 0 or 1}."""
        found = {}
        for (name, source), kernel, up in zip(self.sources.items(), kernels, ups, strict=True):
            value = _rounded(kernel, up)
            bias = kernel.bias + source.moved(value - kernel.value)
            found[name] = {"kernel": value, "bias": bias}
        return found


def adaround(
    planned: Plan,
    ranges: Mapping[str, Mapping[str, grids.Range]],
    batches: Iterable[tuple[Any, ...]],
    key: jax.Array,
    blocks: Sequence[str] = (),
    *,
    steps: int = 1000,
    learning_rate: float = 0.1,
    regularization: float = 40.0,
) -> p.Params:
    """Learns for each weight whether it is rounded up or down, from what that does to activations.

    Rounding to the nearest is best for weights one by one, but not for their sum. Block by block,
    in the order in which they run, the rounding h of all the block's weights is learned to minimize

        n · E(ŵ(h)) / E(ŵ nearest) + λ Σ (1 − |2h − 1|^β)        ŵ = s · clip(⌊w/s⌋ + h, low, high)

    with h = clip(1.2 σ(v) − 0.1, 0, 1) for a learned v, and n the number of weights. E is the mean
    over batches of the squared difference, between the program in floats and as it is stored, in
    the outputs of the block and its edges that later operations take. Earlier kernels are rounded
    as learned, so that a block makes up for the error made before it. β falls, which drives h to 0
    or 1. As errors are measured in those of rounding to nearest, λ means the same for every layer.
    A block keeps the nearest rounding if the learned one is no better on `batches`.

    By default each kernel is a block of its own: AdaRound. Several kernels at once, such as those
    of a residual block, are BRECQ's block reconstruction: `blocks` are patterns on outputs of
    convolutions and dense layers, of which the first match counts, and those of one pattern are one
    block. What a block takes and is to give is held in memory for all batches, which are of one
    shape.

    `planned` has the weights of the float model, of which one that is exactly 0 (pruned) stays 0,
    and `ranges` are as `calibrate_edges` returns them. Each block takes so many `steps` of Adam on
    v, a batch each, in an order drawn with `key`; `regularization` is λ. Returned are the plan's
    weights, with every quantized kernel on the points of its grid that were chosen.

    Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv
    2004.10568, section 3; Li et al., BRECQ, arXiv 2102.05426.

    Example:
      >>> from hybrid_jax import quantization
      >>> fn, x = lambda params, x: x @ params['w'], jnp.array([[1.0, 1.0, 0.0]])
      >>> params = {'w': jnp.array([[0.4], [0.45], [7.0]])}
      >>> spec = quantization.spec(core.trace(fn, params, x), [('w', {'weight': 4})])
      >>> planned = quantization.plan(p.lower(fn, params, x), spec)
      >>> ranges = quantization.calibrate_edges(planned, [(x,)])
      >>> new = adaround(planned, ranges, [(x,)], jax.random.key(0))
      >>> print(new['w']['kernel'].sum())  # Of 0.4 + 0.45 nearest makes 0, this 1.
      8.0
    """
    batches = list(core.check_batches(batches, alike=True))
    core.check_integer("steps", steps, 1)
    core.check_positive("learning_rate", learning_rate)
    core.check_positive("regularization", regularization)
    program, kernels = planned.program, _kernels(planned, ranges)
    for name in planned.stored:
        range_at(ranges, name, "activation", ())
    pieces = [_block(planned, names) for names in _groups(list(kernels), blocks)]
    taken = {name for block in pieces for name in block.planned.program.inputs}
    given = {name for block in pieces for name in block.planned.program.outputs}

    @jax.jit
    @core.fast_convolutions
    def see(floats, params, batch):
        exact = p.edges(program.replace(floats), batch)
        stored = deployed.edges(planned.replace(params), ranges, batch)
        return {name: stored[name] for name in taken}, {name: exact[name] for name in given}

    learn, params = _learner(learning_rate, regularization), dict(program.params)
    for index, block in enumerate(pieces):
        seen, own = [], block.planned.program
        for batch in batches:
            stored, exact = see(program.params, params, batch)
            seen.append(_Seen([stored[n] for n in own.inputs], [exact[n] for n in own.outputs]))
            what = f"what the block of {', '.join(block.sources)} sees"
            core.check_finite(what, seen[-1]._asdict())
        order = jax.random.randint(jax.random.fold_in(key, index), (steps,), 0, len(seen))
        spans = [ranges[name]["activation"] for name in block.planned.stored]
        params |= learn(block, [kernels[n] for n in block.sources], spans, seen, order.tolist())
    return params


def _learner(learning_rate, regularization):
    """learn(block, kernels, ranges, seen batches, their order) -> rounded weights."""
    optimizer = optax.adam(learning_rate)

    @functools.partial(jax.jit, static_argnums=0)
    def step(block, *args):
        once = functools.partial(_step, optimizer, regularization, block)
        return core.fast_convolutions(once)(*args)

    error = jax.jit(_error, static_argnums=0)
    programs: dict[str, _Block] = {}

    def learn(block, kernels, spans, seen, order):
        nearest = [jnp.round(_position(kernel)) for kernel in kernels]
        # Blocks of the same program are one to `jit`, so that it is compiled once.
        text = jax.jit(block).lower(seen[0].inputs, spans, kernels, nearest).as_text()
        alike = programs.setdefault(text, block)

        def mean_error(ups):
            return statistics.fmean(float(error(alike, ups, kernels, spans, one)) for one in seen)

        unit = mean_error(nearest)
        logits = [_logit(_position(kernel)) for kernel in kernels]
        state = optimizer.init(logits)
        # Not a scan: XLA's own convolutions are far slower on a CPU inside a loop than outside.
        for count, which in enumerate(order):
            done = count / len(order)
            logits, state = step(alike, logits, state, kernels, spans, seen[which], unit, done)
        learned = [(_up(v) >= 0.5).astype(jnp.float32) for v in logits]
        best = learned if mean_error(learned) < unit else nearest
        return block.rounded(kernels, best)

    return learn


def _step(optimizer, regularization, block, logits, state, kernels, spans, seen, unit, done):
    """One step of Adam on one batch, with the part `done` of all steps behind it."""
    count = sum(kernel.value.size for kernel in kernels)
    beta = _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * jnp.clip((done - _FREE) / (1 - _FREE), 0, 1)
    strength = jnp.where(done < _FREE, 0.0, regularization)

    def loss(logits):
        ups = [_up(v) for v in logits]
        undecided = sum(jnp.sum(1 - jnp.abs(2 * up - 1) ** beta) for up in ups)
        error = _error(block, ups, kernels, spans, seen)
        relative = error / jnp.maximum(unit, jnp.finfo(jnp.float32).tiny)
        return count * relative + strength * undecided

    gradients = jax.grad(loss)(logits)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(logits, updates), state


def _error(block, ups, kernels, spans, seen):
    """The squared error of what the block gives on one batch."""
    outs = block(seen.inputs, spans, kernels, ups)
    pairs = zip(outs, seen.targets, strict=True)
    return sum(jnp.sum(jnp.square(got - wanted)) for got, wanted in pairs)


def _position(kernel):
    """Where each weight lies between the two points of the grid around it, in [0, 1)."""
    steps = kernel.value / kernel.grid.scale
    return steps - jnp.floor(steps)


def _rounded(kernel, up):
    """The kernel on its grid where `up`, h, is 0 or 1, and between its points where it is not."""
    lowest, highest = grids.steps(kernel.grid)
    below = jnp.floor(kernel.value / kernel.grid.scale)
    value = jnp.clip(below + up, lowest, highest) * kernel.grid.scale
    return jnp.where(kernel.value == 0, 0.0, value)


def _up(v):
    return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


def _logit(up):
    return jax.scipy.special.logit((up - _LOW) / (_HIGH - _LOW))


def _kernels(planned, ranges) -> dict[str, _Kernel]:
    found = {}
    for name in planned.ranged:
        own, quantizer = planned.program.params[name], planned.kernels[name]
        if quantizer.scheme == "binary":
            raise ValueError(f"kernels must have integer grids, got 'binary' for {name!r}")
        shape = own["kernel"].shape
        grid = quantizer.grid(range_at(ranges, name, "weight", shape))
        found[name] = _Kernel(own["kernel"], own["bias"], grids.spread(grid, shape))
    if not found:
        raise ValueError("planned must quantize at least one kernel, got 32 bits for all")
    return found


def _groups(names, patterns) -> list[list[str]]:
    rules = [(pattern, index) for index, pattern in enumerate(patterns)]
    groups: dict[Any, list[str]] = {}
    for name, label in core.match_rules(rules, names, default=None).items():
        groups.setdefault(name if label is None else label, []).append(name)
    return list(groups.values())


def _block(planned, names) -> _Block:
    program = planned.program
    made: set[str] = set()
    beyond: set[str] = set()
    body = []
    for op in program.operations:
        if not beyond.isdisjoint(op.inputs):
            if op.output in names:
                raise ValueError(
                    f"a block must hold every kernel that lies between its own, got {op.output!r} "
                    f"cut off in the block of {', '.join(names)}"
                )
            beyond.add(op.output)
        elif op.output in names or not made.isdisjoint(op.inputs):
            inside = op.output in names or op.output not in program.sources
            (made if inside else beyond).add(op.output)
            body += [op] if inside else []
    readers = program.readers
    taken = dict.fromkeys(name for op in body for name in op.inputs if name not in made)
    given = [
        op.output
        for op in body
        if op.output in program.outputs or any(o.output not in made for o in readers[op.output])
    ]
    # Floats whatever the model takes, and kernels whose rounding is learned as they are given.
    tensors = {n: dataclasses.replace(program.tensors[n], dtype="float32") for n in (*taken, *made)}
    own = p.Program(tuple(taken), tuple(given), tensors, tuple(body))
    slots = {name: planned.slots[name] for name in tensors}
    kernels = {n: k for n, k in planned.kernels.items() if n not in program.sources}
    own = dataclasses.replace(planned, program=own, slots=slots, kernels=kernels)
    return _Block(own, {name: program.sources[name] for name in names})
