"""Gram matrices of what enters every kernel: all that a layer-wise least-squares problem needs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.core import checks
from hybrid_jax.core.fast_convolution import fast_convolutions
from hybrid_jax.core.graph import trace
from hybrid_jax.core.patches import patches
from hybrid_jax.core.paths import flatten_paths, match_rules
from hybrid_jax.core.replacement import at_sites
from hybrid_jax.core.sites import Site


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["sites"])
@dataclasses.dataclass(frozen=True)
class Gram:
    """XᵀX of the patches X of a kernel: `matrix` float32 (G, n, n), the same at all `sites`."""

    matrix: jax.Array
    sites: tuple[Site, ...]

    @property
    def site(self) -> Site:
        """The first site, for `kernel_matrix` and `kernel_from_matrix`."""
        return self.sites[0]


def input_grams(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    exempt: Sequence[str] = (),
    stacked: bool = False,
) -> dict[str, Gram]:
    """Sums XᵀX at every site over batches, in float32: {path of the kernel: Gram}, in order of use.

    A kernel used again (shared, or in a `scan`) has one matrix, the sum over its uses. `fn` is in
    evaluation mode; `exempt` are regular expressions on whole paths of kernels to leave out: what
    is not a parameter itself at its site (standardized, sliced from a stack, reshaped), is used as
    different matrices or lies in a `while` loop. Of `stacked` parameters every leaf has a leading
    axis E, and the matrices too; all experts see each batch.

    Example:
      >>> fn = lambda params, x: x @ params['w']
      >>> batches = [(jnp.array([[1.0, 2.0]]),), (jnp.array([[0.0, 3.0]]),)]
      >>> input_grams(fn, {'w': jnp.ones((2, 1))}, batches)['w'].matrix.tolist()
      [[[1.0, 2.0], [2.0, 13.0]]]
    """
    checks.check_finite("params", params)
    total = step = sites = None
    for batch in checks.check_batches(batches):
        if step is None:
            one = jax.eval_shape(
                lambda p: jax.tree.map(lambda x: x[0], p) if stacked else p, params
            )
            sites = _sites(trace(fn, one, *batch).sites, flatten_paths(one), exempt)
            see = functools.partial(_see, fn, sites)
            see = jax.vmap(see, (0, *(None for _ in batch))) if stacked else see
            step = jax.jit(fast_convolutions(see))
        new = step(params, *batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    for path in sites:
        if path not in total:
            raise ValueError(f"fn must use {path!r} outside `while`, or it must be exempt")
        if jnp.any(total[path][1] > 0):
            raise ValueError(_not_itself(path, "other values"))
    grams = {path: total[path][0] for path in sites}
    checks.check_finite("inputs of the kernels", {path: g.matrix for path, g in grams.items()})
    return grams


def check_grams(params: Any, grams: Mapping[str, Gram]) -> None:
    """Raises unless every Gram matrix is of a parameter of `params`, and of its shape."""
    leaves = flatten_paths(params)
    for path, gram in grams.items():
        if path not in leaves:
            raise ValueError(
                f"grams must be of parameters, got {path!r} among: {', '.join(leaves)}"
            )
        shape = jnp.shape(leaves[path])
        if shape != gram.site.kernel_shape:
            raise ValueError(
                f"params must have shape {gram.site.kernel_shape} at {path!r}, got {shape}"
            )


def _sites(found, leaves, exempt):
    """{path: the sites that use it}, of those not exempt."""
    sites = {}
    for site in found:
        sites[site.path] = (*sites.get(site.path, ()), site)
    left_out = match_rules([(pattern, True) for pattern in exempt], sites, default=False)
    sites = {path: used for path, used in sites.items() if not left_out[path]}
    for path, used in sites.items():
        if used[0].kernel_shape != leaves[path].shape:
            raise ValueError(_not_itself(path, f"shape {used[0].kernel_shape}"))
        if len({_layout(site) for site in used}) > 1:
            names = ", ".join(site.name for site in used)
            raise ValueError(
                f"kernel {path!r} must be the same matrix wherever it is used, or exempt; "
                f"got different ones at: {names}"
            )
    return sites


def _layout(site):
    return site.kind, site.kernel_in_axes, site.kernel_out_axes, site.groups, site.kernel_shape


def _not_itself(path, what):
    return (
        f"kernel {path!r} must be the parameter itself at its site, or exempt; it has {what} there"
    )


def _see(fn, sites, params, *inputs):
    """{path: (Gram, how many of the kernel's entries are not the parameter's)} of one batch."""
    leaves = flatten_paths(params)

    def rule(site, x, kernel, apply):
        if site.path not in sites:
            return apply(x, kernel), None
        rows = patches(site, x, apply).astype(jnp.float32)
        gram = jnp.einsum("gpi,gpj->gij", rows, rows, precision=lax.Precision.HIGHEST)
        others = jnp.sum(kernel != leaves[site.path].astype(kernel.dtype))
        return apply(x, kernel), (gram, others)

    _, records = at_sites(fn, rule)(params, *inputs)
    seen = {}
    for path, used in sites.items():
        mine = [records[site.name] for site in used if site.name in records]
        if mine:
            # Iterations of the scans around a site are leading axes.
            gram = sum(gram.reshape(-1, *gram.shape[-3:]).sum(0) for gram, _ in mine)
            seen[path] = Gram(gram, used), sum(others.sum() for _, others in mine)
    return seen
