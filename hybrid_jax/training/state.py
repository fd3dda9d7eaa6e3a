"""What training carries from step to step, for one model or for a stack of experts."""

from collections.abc import Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core, experts

Tree = TypeVar("Tree")


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes. A stack of experts has a leading axis E on every leaf.

    Attributes:
      step: () int32, updates done.
      params: What the gradient moves: a pytree of float arrays. In Linen {'params': …}, so that
        `params | state` is the variables dict and every path is the one `core` speaks of.
      state: What it does not move: BatchNorm's running statistics, bits, masks of the model. Any
        pytree of arrays; in Linen {'batch_stats': …}.
      key: () typed key that all randomness of training comes from. It never changes: step t draws
        from `fold_in(key, t)`, so that a resumed run draws what an unbroken one draws.
    """

    step: jax.Array
    params: Any
    state: Any
    opt_state: optax.OptState
    key: jax.Array
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)


def create_state(
    params: Any, state: Any, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Makes the state before the first step. It owns its memory: steps may donate it.

    `state` are arrays that the gradient does not move, {} if there are none; `tx.init(params)` is
    called here; `key` is a typed one, of `jax.random.key`.

    Example:
      >>> state = create_state({'w': jnp.ones(3)}, {}, optax.sgd(0.1), jax.random.key(0))
      >>> int(state.step), state.params['w'].shape
      (0, (3,))
    """
    for path, leaf in core.flatten_paths(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params must be float arrays, got {jnp.result_type(leaf)} at {path!r}; "
                "what is not trained belongs in state"
            )
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be a typed key (jax.random.key), got {key!r}")
    params = copy(params)
    return copy(TrainState(jnp.int32(0), params, state, tx.init(params), key, tx))


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of E experts of equal shapes; the optimizer is the first one's.

    What differs between experts must therefore live in the leaves (`params`, `state`,
    `opt_state`), as `pruning.hold_masks` keeps its masks, and not in the closure of `tx`.
    """
    if not states:
        raise ValueError("states must hold at least one TrainState, got none")
    return experts.stack([state.replace(tx=states[0].tx) for state in states])


def expert_state(states: TrainState, index: int) -> TrainState:
    """Takes expert `index` out of a stack: the inverse of `stack_states`."""
    return jax.tree.map(lambda leaf: leaf[index], states)


def copy(tree: Tree) -> Tree:
    """Copies every leaf to an array of its own, with the dtype and sharding it has.

    Two leaves that share a buffer cannot both be donated, and a donated buffer is gone for
    whoever else holds it.
    """
    leaves, structure = jax.tree.flatten(tree)
    # One program for all that are free to move; one for each shape would take longer to compile.
    free = [core.is_traced(leaf) or getattr(leaf, "committed", None) is False for leaf in leaves]
    copies = iter(_copies([leaf for leaf, own in zip(leaves, free) if own]))
    return structure.unflatten(
        next(copies) if own else jnp.copy(leaf) if isinstance(leaf, jax.Array) else jnp.array(leaf)
        for leaf, own in zip(leaves, free)
    )


@jax.jit
def _copies(leaves):
    return [jnp.copy(leaf) for leaf in leaves]
