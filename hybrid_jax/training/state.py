"""What training carries from step to step, for one model or for a stack of experts."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core, experts


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes. A stack of experts has a leading axis E on every leaf.

    The gradient moves `params`, floats, in Linen {'params': …}, and not `state`: running
    statistics, bits, masks; in Linen {'batch_stats': …}, so that `params | state` is the variables
    dict. `step` counts updates. The typed `key` never changes: step t draws from `fold_in(key, t)`,
    so that a resumed run draws what an unbroken one draws.
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
    """Makes the state before the first step. It owns its memory: steps may donate it."""
    for path, leaf in core.flatten_paths(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params must be float arrays, got {jnp.result_type(leaf)} at {path!r}; "
                "what is not trained belongs in state"
            )
    if not core.is_key(key):
        raise TypeError(f"key must be a typed key (jax.random.key), got {key!r}")
    params = core.copy(params)
    return core.copy(TrainState(jnp.int32(0), params, state, tx.init(params), key, tx))


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """Stacks states of E experts of equal shapes, which share the optimizer of the first."""
    if not states:
        raise ValueError("states must hold at least one TrainState, got none")
    return experts.stack([state.replace(tx=states[0].tx) for state in states])
