"""The mixture of experts: all of them run and weighed, or the gate and the one that it chose."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.experts.mapping import map_each, map_experts
from hybrid_jax.experts.routing import Routed, Routing, top_k

ExpertFn = Callable[[Any, jax.Array], jax.Array]  # (params, x (B, ...)) -> logits (B, ...)
GateFn = Callable[[Any, jax.Array], jax.Array]  # (gate_params, x (B, ...)) -> gate logits (B, E)


class Aux(NamedTuple):
    """What a mixture computed on the way, for losses and reports.

    The counts are of inputs whose weight is not 0.
    """

    gate_logits: jax.Array  # float `(B, E)`
    # float `(B, E)`, the logits that the routing went by (with their noise, if any)
    scores: jax.Array
    weights: jax.Array  # float `(B, E)`, those that the outputs were weighed by
    expert_logits: jax.Array  # float `(E, B, ...)`
    unrouted: jax.Array  # int32 (), inputs without any weight, whose output is zero
    nan_gates: jax.Array  # int32 (), inputs with NaN among their gate logits, whose output is NaN


def mixture(
    expert_fn: ExpertFn | Sequence[ExpertFn],
    gate_fn: GateFn,
    routing: Routing | None = None,
    method: str = "auto",
    choices: core.Choices | None = None,
) -> Callable[..., tuple[jax.Array, Aux]]:
    """Makes the mixture that runs all experts on every input and weighs their logits.

    `expert_fn(params, x)` makes logits `(B, N)`, or maps of any rank `(B, ...)`, of one expert, or
    is one function for each expert, whose parameters then are a list. `gate_fn(gate_params, x)`
    makes gate logits `(B, E)`. The routing is `soft`, `top_k`, `noisy_top_k`, ..., by default
    `top_k(1)`, whose outputs are those of `one_of`. Experts are run by `method` with `choices`, as
    by `map_experts`.

    Returns:
      `moe(stack, gate_params, x, key=None, *, weight=None)` -> (logits `(B, ...)`, `Aux`), with
      axis E leading in `stack`, or E pytrees in it. NaN gate logits of an input make its logits
      NaN. `weight` is `(B,)`, None where all inputs count. An input of weight 0, as padding has,
      takes no expert, and its logits are 0; the gate and the experts see one that counts in its
      place, so that whatever it holds reaches no other input, and no gradient as long as any input
      counts.

    Example:
      >>> expert_fn = lambda params, x: x @ params
      >>> moe = mixture(expert_fn, expert_fn, method='unroll')
      >>> experts, gate = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.eye(2)
      >>> moe(experts, gate, jnp.array([[1.0, 0.0], [0.0, 1.0]]))[0]
      Array([[1., 0.],
             [0., 2.]], dtype=float32)
    """
    routing = top_k(1) if routing is None else routing
    if isinstance(expert_fn, Sequence):
        experts = map_each(listed(expert_fn), method, choices)
    else:
        experts = map_experts(expert_fn, method, (0, None), choices)

    def moe(stack, gate_params, x, key=None, *, weight=None):
        x = core.filled(x, weight)
        expert_logits = experts(stack, x)
        gate_logits = gate_fn(gate_params, x)
        check_gate(gate_logits, x, len(expert_logits))
        routed = routing(gate_logits, key, weight)
        return weigh(gate_logits, routed, expert_logits, weight)

    return moe


def combine(expert_logits: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum over experts; a one-hot weight gives that expert's logits to the bit.

    Every control is this with other weights: those of `random()`, of `oracle`, or 1/E for the plain
    average. All experts count: a non-finite output of one with weight 0 is not hidden.

    `expert_logits` are `(E, B, ...)` of any rank, `weights` `(B, E)`, the sum is `(B, ...)`.
    """
    if expert_logits.shape[:2] != weights.shape[::-1]:
        raise ValueError(
            f"expert_logits must have leading axes {weights.shape[::-1]}, as the weights have, "
            f"got shape {expert_logits.shape}"
        )
    # Not a matrix product, which accelerators round to fewer bits.
    return (jnp.expand_dims(weights.T, tuple(range(2, expert_logits.ndim))) * expert_logits).sum(0)


def weigh(
    gate_logits: jax.Array,
    routed: Routed,
    expert_logits: jax.Array,
    weight: jax.Array | None,
) -> tuple[jax.Array, Aux]:
    """The weighted sum and the `Aux` of a mixture, with its counts."""
    unrouted = core.selected((routed.weights == 0).all(-1), weight).sum()
    nan_gates = core.selected(jnp.isnan(gate_logits).any(-1), weight).sum()
    aux = Aux(gate_logits, routed.scores, routed.weights, expert_logits, unrouted, nan_gates)
    return combine(expert_logits, routed.weights), aux


def one_of(expert_fns: Sequence[ExpertFn], gate_fn: GateFn) -> Callable[..., jax.Array]:
    """Makes the mixture for the edge, which runs the gate and one expert for each image.

    The experts' shapes may differ. A batch goes through image by image; `jax.vmap` of this would
    run every expert. Ties go to the lowest index.

    `edge(params_list, gate_params, x)` -> logits `(B, ...)` has one params pytree for each of the
    `expert_fns`. NaN gate logits of an image make its logits NaN.

    Example:
      >>> edge = one_of([lambda w, x: x * w, lambda w, x: x + w], lambda g, x: x @ g)
      >>> edge([3.0, 0.5], jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      Array([[3. , 0. ],
             [0.5, 1.5]], dtype=float32)
    """
    expert_fns = listed(expert_fns)

    def edge(params_list, gate_params, x):
        check_experts(expert_fns, params_list, x)

        def one(x):
            gate_logits = gate_fn(gate_params, x)
            check_gate(gate_logits, x, len(expert_fns))
            branches = [
                lambda params, x, e=e, fn=fn: fn(params[e], x) for e, fn in enumerate(expert_fns)
            ]
            chosen = jnp.argmax(gate_logits[0])
            logits = jax.lax.switch(chosen, branches, list(params_list), x)
            return jnp.where(jnp.isnan(gate_logits).any(), jnp.nan, logits)

        return core.one_by_one(one, x)

    return edge


def listed(expert_fns: Sequence[ExpertFn]) -> list[ExpertFn]:
    """The functions as a list; raises ValueError if there is none."""
    if not (fns := list(expert_fns)):
        raise ValueError("expert_fns must hold at least 1 function, got 0")
    return fns


def check_experts(expert_fns: list[ExpertFn], params_list: Sequence[Any], x: jax.Array) -> None:
    """Raises ValueError unless there are parameters for each, and all outputs are of one shape."""
    if len(params_list) != len(expert_fns):
        raise ValueError(f"params_list must hold {len(expert_fns)} pytrees, got {len(params_list)}")
    image = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    outputs = [jax.eval_shape(*pair, image) for pair in zip(expert_fns, params_list, strict=True)]
    first, *others = (f"{output.dtype}{list(output.shape)}" for output in outputs)
    for e, other in enumerate(others, 1):
        if other != first:
            raise ValueError(f"expert_fns[{e}] must return {first} as the first does, got {other}")


def check_gate(gate_logits: jax.Array, x: jax.Array, num_experts: int) -> None:
    """Raises ValueError unless the gate's outputs are `(B, E)`."""
    if gate_logits.shape != (x.shape[0], num_experts):
        raise ValueError(
            f"gate_fn must return shape {(x.shape[0], num_experts)}, got {gate_logits.shape}"
        )
