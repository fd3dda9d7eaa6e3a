"""Tracing, grouping and slicing in seconds; the shrunk and the interpreted model against plain."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core, pruning
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size


def trace_and_group(size: Size) -> Iterator[Row]:
    """Seconds from a function to its coupled channels."""
    params, image = _shapes(size)

    def run():
        graph = core.trace(measure.predict(size.large), params, image)
        return len(graph.groups)

    yield measure.seconds("trace and group", run, calls=size.calls, target=2.0)


def trace_group_and_slice(size: Size) -> Iterator[Row]:
    """Seconds from a function to the one of half the width, on shapes."""
    params, image = _shapes(size)

    def run():
        return _halve(measure.predict(size.large), params, image)[1]

    yield measure.seconds("trace, group and slice", run, calls=size.calls, target=5.0)


def trace_to_small(size: Size) -> Iterator[Row]:
    """From a function to the small one, as in a new process: nothing traced or compiled before."""
    params, image = measure.variables(size.large, size.large_image), _shapes(size)[1]

    def trace():
        jax.clear_caches()
        fn = measure.predict(size.large)
        return fn, core.trace(fn, params, image)

    def shrink():
        fn, graph = trace()
        scores = pruning.magnitude(graph.kernels, params)
        masks = pruning.masks(scores, 0.5, pruning.channels(graph.groups))
        return core.shrink(fn, params, masks, image)[1]

    name = "trace to the small function, no certificate / trace"
    yield measure.ratio(name, shrink, lambda: trace() and (), pairs=size.calls, target=5.0)


def shrunk_forward(size: Size) -> Iterator[Row]:
    """Inference of the network at half its width against the dense one, at batch 1."""
    dense, params = measure.predict(size.large), measure.variables(size.large, size.large_image)
    images = measure.inputs(1, size.large_image)
    small, small_params, certificate = _halve(dense, params, _shapes(size)[1])
    before, after = certificate.macs
    small, dense = jax.jit(small), jax.jit(dense)
    yield measure.ratio(
        "forward at half the width / dense",
        lambda: small(small_params, images),
        lambda: dense(params, images),
        pairs=size.pairs,
        note=f"{after / before:.2f} of the MACs",
    )


def identity_at_sites(size: Size) -> Iterator[Row]:
    """Inference through the interpreter, which is to leave no trace in what XLA compiles."""
    plain, params = measure.predict(size.large), measure.variables(size.large, size.large_image)
    images = measure.inputs(1, size.large_image)
    same = core.at_sites(plain, lambda site, x, kernel, apply: (apply(x, kernel), None))
    compiled = [jax.jit(fn).lower(params, images).compile() for fn in (same, plain)]
    yield measure.ratio(
        "forward with identity at_sites / plain", *compiled, params, images, pairs=size.pairs
    )
    ours, theirs = map(_instructions, compiled)
    share = ours / theirs
    name = "compiled instructions with identity at_sites / plain"
    yield Row(name, share, share, share, "×", 1.0, f"{ours} / {theirs}")


BENCHMARKS = (
    trace_and_group,
    trace_group_and_slice,
    trace_to_small,
    shrunk_forward,
    identity_at_sites,
)


def _shapes(size):
    image = jax.ShapeDtypeStruct((1, *size.large_image), jnp.float32)
    return jax.eval_shape(size.large.init, jax.random.key(0), image), image


def _halve(fn, params, image):
    graph = core.trace(fn, params, image)
    keep = {group.name: np.arange(group.size) < group.size / 2 for group in graph.groups}
    return core.shrink(fn, params, core.expand(keep, graph.groups, params), image)


def _instructions(compiled):
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE))
