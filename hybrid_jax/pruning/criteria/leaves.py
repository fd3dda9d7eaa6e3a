"""What every criterion shares: which leaves are scored, in what, and by which name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core

Kernels = Mapping[str, core.Kernel]
"""`core.trace(...).kernels`, or some of them: what is scored."""


@dataclasses.dataclass(frozen=True)
class Given:
    """What a criterion by name works its scores out from; it asks for what it needs.

    `fn(params, *batch) -> outputs` is in evaluation mode, `loss(params, *batch) -> ()` a mean over
    the batch, and `batches` are tuples of arrays with a leading axis B.
    """

    kernels: Kernels
    params: Any
    fn: Callable[..., Any] | None = None
    loss: Callable[..., jax.Array] | None = None
    batches: Sequence[tuple[Any, ...]] | None = None
    key: jax.Array | None = None

    def needed(self, name: str) -> Any:
        """The attribute of that name, which a criterion cannot do without."""
        if (value := getattr(self, name)) is None:
            raise ValueError(f"given must have {name} for this criterion, got none")
        return value

    def mean_loss(self, params: Any) -> jax.Array:
        """The mean of the loss over the batches."""
        loss, batches = self.needed("loss"), self.needed("batches")
        return sum(loss(params, *batch) for batch in batches) / len(batches)

    def gradients(self) -> Any:
        """The gradients of the mean loss."""
        return jax.jit(core.fast_convolutions(gradient(self.mean_loss)))(self.params)


CRITERIA: dict[str, Callable[[Given], Any]] = {}
"""Every criterion of a network as it is, by name; open to users: `CRITERIA['mine'] = f`."""


def score(f: Callable[..., jax.Array], kernels: Kernels, params: Any, *rest: Any) -> Any:
    """Maps `f(kernel, leaf, *rest)` over the kernels, leaves and those of `rest` in float32.

    Where they are known they are NumPy's, so `f` uses what both kinds of arrays have. What is no
    kernel, and where `params` or one of `rest` holds `optax.MaskedNode()`, has none.
    """
    paths = core.flatten_paths(params)
    if not kernels:
        raise ValueError("kernels must hold a kernel to prune, got none")
    for path, kernel in kernels.items():
        if path not in paths:
            names = ", ".join(paths) or "no leaves"
            raise ValueError(f"params must hold kernel {path!r} to prune, got only: {names}")
        if not core.is_masked_node(paths[path]) and np.shape(paths[path]) != kernel.shape:
            raise ValueError(
                f"params must have shape {kernel.shape} at {path!r}, got {np.shape(paths[path])}"
            )

    xp = core.namespace(params, *rest)

    @np.errstate(over="ignore", invalid="ignore")
    def leaf_score(path, *leaves):
        if path not in kernels or any(map(core.is_masked_node, leaves)):
            return optax.MaskedNode()
        found = f(kernels[path], *(xp.asarray(leaf, np.float32) for leaf in leaves))
        return core.on_device(found)

    return core.map_with_path(leaf_score, params, *rest)


def restored(kernel: core.Kernel, moved: jax.Array) -> Any:
    """What was computed of `kernel.layers` or `kernel.canonical`, in the parameter's layout."""
    return kernel.restore(core.namespace(moved).asarray(moved))


def in_float32(tree: Any) -> Any:
    """Takes floats of less precision to float32: sums in bfloat16 stop growing at 256 terms."""

    def widen(leaf):
        return core.widen(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def gradient(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """`jax.grad` by the floating leaves; integers, of which there is none, stay as they are."""

    def of(params, *args):
        floats, join = floating(params)
        found = jax.grad(lambda own: f(join(own), *args), has_aux=has_aux)(floats)
        return (join(found[0]), found[1]) if has_aux else join(found)

    return of


def floating(params: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The floating leaves, and what puts others in their place."""
    leaves, structure = jax.tree.flatten(params)
    floats = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

    def join(own):
        rest = iter(own)
        return structure.unflatten(
            [next(rest) if is_float else leaf for is_float, leaf in zip(floats, leaves)]
        )

    return [leaf for is_float, leaf in zip(floats, leaves) if is_float], join


def check_statistics(name: str, params: Any, statistics: Any) -> None:
    """Raises unless `statistics` have the paths and shapes of `params`, or `MaskedNode` there."""
    expected, got = core.flatten_paths(params), core.flatten_paths(statistics)
    for path in [*expected, *got]:
        if path not in expected or path not in got:
            where = "statistics" if path in got else "params"
            raise ValueError(f"{name} must have the paths of params, got {path!r} in {where} only")
        if any(map(core.is_masked_node, (expected[path], got[path]))):
            continue
        if np.shape(expected[path]) != np.shape(got[path]):
            raise ValueError(
                f"{name} must have shape {np.shape(expected[path])} at {path!r}, "
                f"got {np.shape(got[path])}"
            )
