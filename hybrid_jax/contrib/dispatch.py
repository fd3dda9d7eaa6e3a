"""Dispatch with a capacity: each expert runs on the inputs gathered for it, and on no others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.contrib.capacity import best_inputs
from hybrid_jax.experts.mapping import map_experts
from hybrid_jax.experts.mixture import Aux, ExpertFn, GateFn, check_gate, weigh
from hybrid_jax.experts.routing import Routing, top_k
from hybrid_jax.experts.stacking import count


def gathered(
    expert_fn: ExpertFn,
    gate_fn: GateFn,
    routing: Routing | None = None,
    *,
    k: int = 1,
    capacity_factor: float = 1.25,
    method: str = "auto",
) -> Callable[..., tuple[jax.Array, Aux, jax.Array]]:
    """Makes the mixture that gathers inputs to `(E, C, ...)`, for large batches and accelerators.

    Each expert runs on C = `capacity(B, E, k, capacity_factor)` inputs: those with the largest
    weights for it, ties by the lowest index. What has a weight beyond them is dropped: counted for
    each expert, and the input's other weights grow so that their sum stays. An input that all its
    experts drop has zero logits, and counts in `Aux.unrouted`. Nothing drops with a capacity of B,
    nor with `expert_choice` of the same `k` and factor; then it is `mixture`. Sources: Fedus et
    al., Switch Transformers, arXiv 2101.03961, section 2.2; that the largest weights go first,
    Riquelme et al., arXiv 2106.05974, section 4.

    `expert_fn(params, x)` -> logits `(C, N)`, or maps `(C, ...)`, must treat each input alone, as
    at inference; `gate_fn(gate_params, x)` -> gate logits `(B, E)`; `routing` is `top_k(1)` by
    default, `k` how many experts it chooses, and `method` that of `map_experts`.

    Returns:
      `moe(stack, gate_params, x, key=None, *, weight=None)` -> (logits `(B, ...)`, `Aux`, dropped
      int32 `(E,)`), the first two as of `mixture`. NaN gate logits make the input's logits NaN
      alone.

    Example:
      >>> expert_fn = lambda params, x: x @ params
      >>> moe = gathered(expert_fn, expert_fn, capacity_factor=1.0, method='unroll')
      >>> experts, gate = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.eye(2)
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
      >>> logits, aux, dropped = moe(experts, gate, x)  # the first expert has 2 places for 3 inputs
      >>> dropped.tolist(), int(aux.unrouted)
      ([1, 0], 1)
    """
    core.check_integer("k", k, 1)
    core.check_positive("capacity_factor", capacity_factor)
    routing = top_k(1) if routing is None else routing
    experts = map_experts(expert_fn, method)

    def moe(stack, gate_params, x, key=None, *, weight=None):
        x = core.filled(x, weight)
        gate_logits = gate_fn(gate_params, x)
        check_gate(gate_logits, x, count(stack))
        routed = routing(gate_logits, key, weight)
        best = best_inputs(routed.weights, k, capacity_factor, weight)
        dropped = ((routed.weights > 0) & ~best.held).sum(0)
        expert_logits = _scatter(experts(stack, x[best.indices]), best, len(x))
        kept = routed._replace(weights=_without_dropped(routed.weights, best.held))
        return *weigh(gate_logits, kept, expert_logits, weight), dropped

    return moe


def _scatter(outputs, best, batch):
    """(E, C, ...), in the places that are taken, at their inputs' indices of zeros (E, B, ...)."""

    def scatter(output, index):
        zeros = jnp.zeros((batch, *output.shape[1:]), output.dtype)
        return zeros.at[index].set(core.selected(output, best.taken), unique_indices=True)

    return jax.vmap(scatter)(outputs, best.indices)


def _without_dropped(weights, held):
    """Weights (B, E) of what is held, each row's sum as before, to the bit where nothing drops."""
    lost = (weights > 0) & ~held  # NaN is not lost
    kept = jnp.where(lost, 0, weights)
    left = kept.sum(-1)
    grow = lost.any(-1) & (left > 0)
    factor = jnp.where(grow, weights.sum(-1) / jnp.where(grow, left, 1), 1)
    return kept * factor[:, None]
