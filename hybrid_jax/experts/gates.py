"""Tiny gates from images, or features of images, `(B, H, W, C)` to gate logits `(B, E)`.

Any pure function `gate_fn(gate_params, x)` is a gate, whatever wrote it, and is counted, pruned and
quantized as any model. Those of `GATES`, Linen modules, see the image averaged down to about `size`
pixels a side, so that they cost little beside an expert; `gate.apply` is the `gate_fn`. With
`shared_stem` a gate sees the features that the experts go on from. `linear_probe` is fit in closed
form by `ridge`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_jax import core


class _Gate(nn.Module):
    num_experts: int
    features: tuple[int, ...]
    size: int

    def __post_init__(self):
        core.check_integer("num_experts", self.num_experts, 1)
        core.check_integer("size", self.size, 1)
        for channels in self.features:
            core.check_integer("features", channels, 1)
        super().__post_init__()


class _CNNGate(_Gate):
    separable: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _shrink(x, self.size)
        for i, features in enumerate(self.features):
            stride, own = 1 if i == 0 else 2, x.shape[-1]
            if self.separable and i:
                x = nn.relu(nn.Conv(own, (3, 3), stride, feature_group_count=own)(x))
                x = nn.relu(nn.Conv(features, (1, 1))(x))
            else:
                x = nn.relu(nn.Conv(features, (3, 3), stride)(x))
        return nn.Dense(self.num_experts)(x.mean((1, 2)))


class _MLPGate(_Gate):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _shrink(x, self.size)
        x = x.reshape(len(x), -1)
        for features in self.features:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_experts)(x)


def gate_cnn(num_experts: int, features: Sequence[int] = (8, 16), size: int = 8) -> nn.Module:
    """A gate of 3x3 convolutions on the down-scaled image, the first at stride 1, the others at 2.

    `features` are the output channels of each; `()` leaves a dense layer on the mean of each
    channel, the head for the features of a `shared_stem`. The image is averaged down to `size`
    pixels a side (the least above it that is a whole division); a smaller one is left as it is.

    Example:
      >>> gate = gate_cnn(num_experts=4)
      >>> images = jax.numpy.zeros((2, 32, 32, 3))
      >>> variables = gate.init(jax.random.key(0), images)
      >>> gate.apply(variables, images).shape
      (2, 4)
    """
    return _CNNGate(num_experts, tuple(features), size)


def gate_separable(num_experts: int, features: Sequence[int] = (8, 16), size: int = 8) -> nn.Module:
    """A `gate_cnn` whose convolutions after the first are one of each channel and a 1x1.

    It has about a ninth of their MACs. Source: Howard et al., MobileNets, arXiv 1704.04861.
    """
    return _CNNGate(num_experts, tuple(features), size, separable=True)


def gate_mlp(num_experts: int, features: Sequence[int] = (16,), size: int = 8) -> nn.Module:
    """A gate of dense layers of `features` units on the pixels of the image averaged down.

    Unlike a `gate_cnn` it knows where in the image something is. `()` leaves one linear layer.
    """
    return _MLPGate(num_experts, tuple(features), size)


GATES: dict[str, Callable[[int, Sequence[int], int], nn.Module]] = {
    "cnn": gate_cnn,
    "separable": gate_separable,
    "mlp": gate_mlp,
    "linear": lambda num_experts, features, size: gate_mlp(num_experts, (), size),
}
"""Every gate by name, open to users: f(num_experts, features, size) -> a Linen module."""


def shared_stem(stem_fn: Callable[..., jax.Array], moe: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a mixture whose stem runs once for each image, before the gate and all experts.

    `stem_fn(stem_params, x)` makes features `(B, ...)`, and the gate and the experts of `moe`, a
    `mixture` or `one_of`, are functions of these. The result takes the stem's parameters before its
    other arguments: `moe(stem_params, experts, gate_params, x, ...)`. The stem sees inputs of
    weight 0 no more than the mixture does.

    Example:
      >>> from hybrid_jax import experts
      >>> edge = experts.one_of([lambda w, h: h * w] * 2, lambda gate, h: h @ gate)
      >>> whole = shared_stem(lambda stem, x: x @ stem, edge)
      >>> stem, gate = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.eye(2)
      >>> whole(stem, [2.0, 3.0], gate, jnp.array([[0.0, 1.0]]))  # features [1, 0]: expert 0
      Array([[2., 0.]], dtype=float32)
    """

    def run(stem_params, experts, gate_params, x, *args, **kwargs):
        x = core.filled(x, kwargs.get("weight"))
        return moe(experts, gate_params, stem_fn(stem_params, x), *args, **kwargs)

    return run


def linear_probe(features_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a gate that is one linear layer on features: of the image, of the parent or of a stem.

    Source: Alain and Bengio, Understanding intermediate layers using linear classifier probes,
    arXiv 1610.01644.

    `features_fn(features_params, x)` makes features `(B, ...)`, flattened to `(B, F)`; the gate's
    parameters are {'features': features_params, 'head': what `ridge` returns}.

    Example:
      >>> gate_fn = linear_probe(lambda scale, x: scale * x)
      >>> head = {'kernel': jnp.eye(2), 'bias': jnp.array([0.5, 0.0])}
      >>> gate_fn({'features': 2.0, 'head': head}, jnp.array([[1.0, 3.0]]))
      Array([[2.5, 6. ]], dtype=float32)
    """

    def gate_fn(gate_params, x):
        features = features_fn(gate_params["features"], x)
        head = gate_params["head"]
        return features.reshape(len(features), -1) @ head["kernel"] + head["bias"][None]

    return gate_fn


def ridge(
    features: jax.Array,
    targets: jax.Array,
    penalty: float | jax.Array = 1e-3,
    *,
    weight: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Fits a linear layer in closed form: the least squares with a penalty on the kernel.

    It minimizes ‖features · W + b − targets‖² / B + λ·‖W‖², where λ is `penalty`, above 0, times
    the mean variance of a feature, so that it means the same at any scale; raised by
    `core.damped_gram` if float32 cannot solve with it. Source: Hoerl and Kennard, Ridge Regression:
    Biased Estimation for Nonorthogonal Problems (1970).

    `features` `(B, ...)` are flattened to `(B, F)`; `targets` `(B, E)` are larger for a better
    expert: the log-probability that each gives to the label, or a one-hot row for each input's
    cluster. `weight` `(B,)` is that of each input in all means; one of weight 0 may hold anything.
    The result is {'kernel': `(F, E)`, 'bias': `(E,)`}, in float32 or wider, with kernel 0 for a
    constant feature; NaN in the features or targets makes it NaN.

    Example:
      >>> head = ridge(jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[1.0], [3.0], [5.0]]), 1e-6)
      >>> head['kernel'].round(3), head['bias'].round(3)  # 2 x + 1
      (Array([[2.]], dtype=float32), Array([1.], dtype=float32))
    """
    if not features.size:
        raise ValueError(f"features must hold at least one value, got shape {features.shape}")
    if targets.ndim != 2 or len(targets) != len(features):
        raise ValueError(
            f"targets must have shape ({len(features)}, E), one row for each row of features, "
            f"got {targets.shape}"
        )
    weight = jnp.ones(len(features)) if weight is None else core.widen(weight)
    x, targets = (
        core.selected(core.widen(each), weight)
        for each in (features.reshape(len(features), -1), targets)
    )
    mean, level = (core.weighted_mean(each, weight)[None] for each in (x, targets))
    share = (weight / weight.sum()).astype(x.dtype)
    weighed = (share[:, None] * (x - mean)).T
    exact = jax.lax.Precision.HIGHEST
    covariance = jnp.matmul(weighed, x - mean, precision=exact)
    with_targets = jnp.matmul(weighed, targets - level, precision=exact)
    damped = core.damped_gram(covariance, penalty)
    kernel = jax.scipy.linalg.solve(damped, with_targets, assume_a="pos")
    return {"kernel": kernel, "bias": (level - jnp.matmul(mean, kernel, precision=exact))[0]}


def _shrink(x, size):
    window = tuple(max(1, side // size) for side in x.shape[1:3])
    # Not nn.avg_pool, which divides by a NumPy integer: an error under strict promotion.
    return nn.pool(x, 0.0, jax.lax.add, window, window, "VALID") / math.prod(window)
