"""The optimizers of the recipes: a direction by name, a rate that warms up and falls, decay."""

from collections.abc import Callable

import numpy as np
import optax

from hybrid_jax import core, quantization

MOMENTUM = 0.9
RANGES = 0.02
"""Of another rate than Adam's, the part by which ranges move: it is some fifty times as large."""


def _adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def _sgd() -> optax.GradientTransformation:
    return optax.trace(MOMENTUM, nesterov=True)


DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {"adam": _adam, "sgd": _sgd}
"""What turns gradients of weights into directions, by name, open to users."""


def optimizer(
    learning_rate: float,
    weight_decay: float,
    steps: int,
    first: int = 0,
    flat: bool = True,
    direction: str = "adam",
) -> optax.GradientTransformation:
    """A direction with a tenth of warm-up and a cosine to zero; kernels alone decay.

    Adam's gradients are clipped at a norm of 1. Ranges take Adam's direction whatever that of the
    weights is, each update a fraction of their width, and stay ranges.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.

    `learning_rate` is that of the peak, and `weight_decay` per step and unit of it. It goes on with
    the schedule after its `first` steps. What `flat` makes faster to compile and to launch cannot
    tell what of its state belongs to a weight, as masks that change ask it.
    """
    whole = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)

    def schedule(count):
        return whole(count + first)

    def kernels(params):
        return core.map_with_path(lambda path, w: not _is_range(path) and np.ndim(w) > 1, params)

    def kinds(params):
        return core.map_with_path(lambda path, _: _is_range(path), params)

    own = DIRECTIONS[core.check_choice("direction", direction, DIRECTIONS)]()
    if direction != "adam":
        ranges = optax.chain(_adam(), optax.scale(RANGES))
        own = optax.partition({True: ranges, False: own}, kinds)
    # As one vector: a few operations instead of a few per leaf.
    elif flat:
        own = optax.flatten(own)
    decay = optax.add_decayed_weights(weight_decay, mask=kernels)
    rate = optax.scale_by_learning_rate(schedule)
    return optax.chain(own, decay, quantization.scale_by_width(), rate)


def _is_range(path: str) -> bool:
    return "ranges/" in path
