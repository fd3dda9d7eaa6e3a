"""The mixture of experts: all of them run and weighed, or the gate and the one that it chose."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.experts.mapping import map_experts
from hybrid_jax.experts.routing import Routing, top_k

ExpertFn = Callable[[Any, jax.Array], jax.Array]  # (params, x (B, ...)) -> logits (B, N)
GateFn = Callable[[Any, jax.Array], jax.Array]  # (gate_params, x (B, ...)) -> gate logits (B, E)


class Aux(NamedTuple):
    """What a mixture computed on the way, for losses and reports.

    Attributes:
      gate_logits: float `(B, E)`.
      scores: float `(B, E)`, the logits that the routing went by (with their noise, if any).
      weights: float `(B, E)`.
      expert_logits: float `(E, B, N)`.
    """

    gate_logits: jax.Array
    scores: jax.Array
    weights: jax.Array
    expert_logits: jax.Array


def mixture(
    expert_fn: ExpertFn, gate_fn: GateFn, routing: Routing | None = None, method: str = "auto"
) -> Callable[..., tuple[jax.Array, Aux]]:
    """Makes the mixture that runs all experts on every input and weighs their logits.

    Args:
      expert_fn: `expert_fn(params, x)` -> logits `(B, N)`, of one expert.
      gate_fn: `gate_fn(gate_params, x)` -> gate logits `(B, E)`.
      routing: From `soft`, `top_k`, `noisy_top_k`, ...; default `top_k(1)`, whose outputs are those
        of `one_of`. A mixture of one expert is that expert.
      method: How the experts are run, as for `map_experts`.

    Returns:
      `moe(stack, gate_params, x, key=None)` -> (logits `(B, N)`, `Aux`), with axis E leading in
      `stack`. It raises ValueError if the gate's outputs are not `(B, E)`. NaN gate logits of an
      input make its logits NaN.

    Example:
      >>> expert_fn = lambda params, x: x @ params
      >>> moe = mixture(expert_fn, expert_fn, method='unroll')
      >>> experts, gate = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.eye(2)
      >>> moe(experts, gate, jnp.array([[1.0, 0.0], [0.0, 1.0]]))[0]
      Array([[1., 0.],
             [0., 2.]], dtype=float32)
    """
    routing = top_k(1) if routing is None else routing
    experts = map_experts(expert_fn, method, in_axes=(0, None))

    def moe(stack, gate_params, x, key=None):
        expert_logits = experts(stack, x)
        gate_logits = gate_fn(gate_params, x)
        _check_gate(gate_logits, x, len(expert_logits))
        routed = routing(gate_logits, key)
        aux = Aux(gate_logits, routed.scores, routed.weights, expert_logits)
        return combine(expert_logits, routed.weights), aux

    return moe


def combine(expert_logits: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum over experts; a one-hot weight gives that expert's logits to the bit.

    Every control is this with other weights: those of `random()`, of `oracle`, or 1/E for the plain
    average. All experts count: a non-finite output of one with weight 0 is not hidden.

    Args:
      expert_logits: float `(E, B, N)`.
      weights: float `(B, E)`.

    Returns:
      float `(B, N)`.

    Example:
      >>> combine(jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]]), jnp.array([[0.5, 0.5]]))
      Array([[2., 3.]], dtype=float32)
    """
    # Not a matrix product, which accelerators round to fewer bits.
    return (weights.T[:, :, None] * expert_logits).sum(0)


def one_of(expert_fns: Sequence[ExpertFn], gate_fn: GateFn) -> Callable[..., jax.Array]:
    """Makes the mixture for the edge, which runs the gate and one expert for each image.

    The experts' shapes may differ. A batch goes through image by image; `jax.vmap` of this would
    run every expert. Ties go to the lowest index.

    Args:
      expert_fns: E functions `expert_fn(params, x)` -> logits `(B, N)`.
      gate_fn: `gate_fn(gate_params, x)` -> gate logits `(B, E)`.

    Returns:
      `edge(params_list, gate_params, x)` -> logits `(B, N)`, with one params pytree for each
      expert. It raises ValueError if the numbers of functions, parameters and gate outputs differ.
      NaN gate logits of an image make its logits NaN.

    Raises:
      ValueError: If there is no expert.

    Example:
      >>> edge = one_of([lambda w, x: x * w, lambda w, x: x + w], lambda g, x: x @ g)
      >>> edge([3.0, 0.5], jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      Array([[3. , 0. ],
             [0.5, 1.5]], dtype=float32)
    """
    expert_fns = list(expert_fns)
    if not expert_fns:
        raise ValueError("expert_fns must hold at least 1 function, got 0")

    def edge(params_list, gate_params, x):
        if len(params_list) != len(expert_fns):
            raise ValueError(
                f"params_list must hold {len(expert_fns)} pytrees, got {len(params_list)}"
            )

        def one(x):
            gate_logits = gate_fn(gate_params, x)
            _check_gate(gate_logits, x, len(expert_fns))
            branches = [
                lambda params, x, e=e, fn=fn: fn(params[e], x) for e, fn in enumerate(expert_fns)
            ]
            chosen = jnp.argmax(gate_logits[0])
            logits = jax.lax.switch(chosen, branches, list(params_list), x)
            return jnp.where(jnp.isnan(gate_logits).any(), jnp.nan, logits)

        if x.shape[0] == 1:
            return one(x)
        return jax.lax.map(lambda image: one(image[None])[0], x)

    return edge


def _check_gate(gate_logits, x, num_experts):
    if gate_logits.shape != (x.shape[0], num_experts):
        raise ValueError(
            f"gate_fn must return shape {(x.shape[0], num_experts)}, got {gate_logits.shape}"
        )
