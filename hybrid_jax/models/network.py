"""A network as every stage takes it: two functions of one pytree, whoever wrote them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core


class Network(NamedTuple):
    """A network in both its modes, with its parameters.

    predict(params, x) -> out is in evaluation mode: the same whenever it is called. train(params,
    x, key) -> (out, new params) is in training mode, None where the network is not to be trained:
    the new params differ in what a batch moves (running statistics), and what is random draws from
    `key`. `params` hold all that the functions read, statistics too; in Linen the whole variables
    dict.
    """

    predict: Callable[[Any, Any], Any]
    train: Callable[[Any, Any, jax.Array], tuple[Any, Any]] | None
    params: Any


def trainable(network: Network, stage: str = "training") -> Callable[..., tuple[Any, Any]]:
    """The training function of a network; without one the ValueError says what `stage` needs."""
    if network.train is None:
        raise ValueError(
            f"network must have a training function for {stage}, got None: "
            "give (predict, train, params), with train(params, x, key) -> (out, new params)"
        )
    return network.train


def statistics(network: Network, x: Any) -> frozenset[str]:
    """Paths of what no gradient moves: the leaves that `train` returns changed, and no floats.

    A leaf is unchanged if what comes out of the program is the very variable that went in. Of `x`,
    a batch, only shapes matter. Without a training function only what is no float is known.
    """
    flat = core.flatten_paths(network.params)
    kept = {path for path, leaf in flat.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)}
    if network.train is None:
        return frozenset(kept)
    shapes = jax.tree.map(core.abstract, (network.params, x))
    closed, (_, new) = jax.make_jaxpr(network.train, return_shape=True)(*shapes, KEY)
    core.check_same_structure("the new params of train", shapes[0], new)
    jaxpr = core.inline(closed).jaxpr
    after = jaxpr.outvars[len(jaxpr.outvars) - len(flat) :]
    unchanged = zip(flat, jaxpr.invars, after, strict=False)
    return frozenset(kept | {path for path, old, out in unchanged if out is not old})


KEY = jax.eval_shape(lambda: jax.random.key(0))
