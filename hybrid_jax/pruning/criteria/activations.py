"""Criteria of what a network computes on data: the norms of inputs, the independence of outputs."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import (
    CRITERIA,
    Kernels,
    check_statistics,
    gradient,
    in_float32,
    score,
)

Batches = Iterable[tuple[Any, ...]]
"""Yields the inputs of a model as tuples."""


def wanda(kernels: Kernels, params: Any, norms: Any) -> Any:
    """Scores a weight by |w| · ‖x‖₂, with x all that it is ever multiplied by.

    M. Sun et al., A Simple and Effective Pruning Approach for Large Language Models (arXiv
    2306.11695). There the inputs of one output compete with each other: `uniform` with
    `contrib.n_m` of n in all C inputs. It prunes a layer at a time, each seeing what the pruned
    ones before it compute; for that, work out `norms`, what `activation_norms` gives, anew with the
    masked parameters.
    """
    check_statistics("norms", params, norms)
    return score(lambda kernel, w, norm: abs(w) * norm, kernels, params, norms)


def activation_norms(fn: Callable[..., Any], params: Any, batches: Batches) -> Any:
    """‖x‖₂ for each weight: the root of the sum of squares of all that it is multiplied by.

    The sum runs over all batches, positions and uses of the weight; each tap of a convolution has
    a norm of its own, padding counts as zero.

    `fn(params, *inputs) -> outputs` is in evaluation mode. A site in a `while` loop, or in a
    function with a derivative rule of its own, out of which nothing is carried back, is an error.
    """

    def squares(site, x, kernel, apply):
        # Its derivative with respect to a weight is the sum of x² over all that the weight meets.
        return apply(jnp.square(x), kernel)

    total, _ = _over_batches(_at_kernels(fn, squares), fn, params, batches)
    return core.on_device(jax.tree.map(lambda leaf: leaf.__array_namespace__().sqrt(leaf), total))


def chip(kernels: Kernels, params: Any, independence: Any) -> Any:
    """Scores a filter by the independence of its feature map from the layer's other ones (CHIP).

    Y. Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks (arXiv
    2110.13981). The scores of a filter's weights add up to its independence, of
    `channel_independence`: summed over a coupled group, the filters that make a channel count.
    """
    check_statistics("independence", params, independence)
    return score(lambda kernel, w, shares: shares, kernels, params, independence)


def channel_independence(fn: Callable[..., Any], params: Any, batches: Batches) -> Any:
    """‖A‖_* − ‖A without row o‖_*, averaged over images, for the output A (O, H·W) of each site.

    ‖·‖_* is the nuclear norm. A is what the convolution itself computes (the authors take the map
    after the activation). Costs O singular value decompositions of (O, min(O, H·W)) for each image
    and site; a few hundred images are enough. The independence of a filter is spread evenly over
    its weights, and summed over the sites where a kernel is used again. `fn` is as of
    `activation_norms`.
    """

    def shares(site, x, kernel, apply):
        matrix = core.kernel_matrix(site, kernel)  # (G, n, O/G)
        maps = core.output_matrix(site, apply(x, jax.lax.stop_gradient(kernel)))  # (G, P, O/G)
        each = _independence(jnp.moveaxis(maps, 1, 2).reshape(-1, maps.shape[1]))
        return matrix * (each.reshape(len(matrix), 1, -1) / matrix.shape[1]).astype(matrix.dtype)

    of_image = _at_kernels(fn, shares)

    def over_images(params, *inputs):
        def add(total, image):
            one, weighed = of_image(params, *jax.tree.map(lambda leaf: leaf[None], image))
            return jax.tree.map(jnp.add, total, one), weighed

        total, weighed = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)
        return total, jax.tree.map(jnp.sum, weighed)

    total, count = _over_batches(over_images, fn, params, batches)
    return core.on_device(jax.tree.map(lambda leaf: leaf / count, total))


CRITERIA |= {
    "wanda": lambda given: wanda(
        given.kernels,
        given.params,
        activation_norms(given.needed("fn"), given.params, given.needed("batches")),
    ),
    "chip": lambda given: chip(
        given.kernels,
        given.params,
        channel_independence(given.needed("fn"), given.params, given.needed("batches")),
    ),
}


def _independence(maps: jax.Array) -> jax.Array:
    """(O,): by how much the nuclear norm of `maps` (O, P) falls when a row is set to zero."""
    # The norm does not see a rotation of the columns: R (min(O, P), O) stands for the maps.
    columns = jnp.linalg.qr(maps.T.astype(jnp.float32), mode="r")
    without = jax.lax.map(
        lambda o: jnp.linalg.norm(columns.at[:, o].set(0.0), "nuc"), jnp.arange(len(maps))
    )
    return jnp.linalg.norm(columns, "nuc") - without


def _at_kernels(fn: Callable[..., Any], weigh: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Works out an array for the kernel of each site, and adds it up where the kernel is kept."""
    # `weigh(site, x, kernel, apply)` is linear in the kernel, and its derivative is that array. The
    # derivative with respect to the parameters carries it back through transposes, slices and
    # stacks, and adds up the uses of one kernel.

    def rule(site, x, kernel, apply):
        x = jax.lax.stop_gradient(x)
        return jax.lax.stop_gradient(apply(x, kernel)), jnp.sum(weigh(site, x, kernel, apply))

    def total(params, *inputs):
        _, records = core.at_sites(fn, rule)(params, *inputs)
        weighed = {name: jnp.sum(record.astype(jnp.float32)) for name, record in records.items()}
        return sum(weighed.values(), start=jnp.float32(0)), weighed

    return gradient(total, has_aux=True)


def _over_batches(
    step: Callable[..., Any], fn: Callable[..., Any], params: Any, batches: Batches
) -> tuple[Any, int]:
    """Sums `step(params, *batch)` over the batches, for kernels; on the host. Counts examples."""
    step, total, graph, count = jax.jit(core.fast_convolutions(step)), None, None, 0
    for batch in core.check_batches(batches):
        new, weighed = step(*in_float32((params, *batch)))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        graph = graph or core.trace(fn, params, *batch)
        count += core.batch_size(batch)
    _check_carried(core.flatten_paths(total), weighed, graph.sites)
    xp = core.namespace(total)
    of_kernels = core.map_with_path(
        lambda path, leaf: xp.asarray(leaf) if path in graph.kernels else optax.MaskedNode(), total
    )
    return of_kernels, count


def _check_carried(total: dict[str, Any], weighed: dict[str, Any], sites: Any) -> None:
    """Raises if what was worked out at a site did not reach its kernel."""
    for site in sites:
        if site.name not in weighed:
            raise ValueError(f"fn must use {site.path!r} outside `while`, where nothing is seen")
        seen = (total[site.path], weighed[site.name])
        if not core.is_traced(seen) and jnp.all(seen[0] == 0) and seen[1] != 0:
            raise ValueError(
                f"fn must use {site.path!r} outside a function with a derivative rule of its own"
            )
