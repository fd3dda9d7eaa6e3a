"""Rows of the table, the sizes to run at, and the two ways to measure."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core, deploy, models, quantization, training
from hybrid_jax import program as p

Batch = dict[str, jax.Array]
Sparse = Callable[[optax.GradientTransformation], optax.GradientTransformation]
"""Wraps an optimizer."""


class Row(NamedTuple):
    """One measurement.

    Attributes:
      name: What was measured; of a ratio 'this / that'.
      value: Median of a ratio or of seconds.
      low: Lower quartile.
      high: Upper quartile.
      unit: '×' for a ratio, 's' for seconds.
      target: The most that `value` should be; None if none is set.
      note: What else is worth knowing.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    target: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Size:
    """What the benchmarks run on.

    Attributes:
      large: Model for one large image: tracing, shrinking, inference, masks.
      large_image: Its (H, W, C).
      small: Model that is trained, and that the experts are.
      small_image: Its (H, W, C).
      batch: B of a training step.
      pairs: How many pairs a ratio of inferences is taken over.
      step_pairs: How many pairs a ratio of training steps is taken over.
      calls: How many calls seconds are taken over.
      deployed: {name: model} whose inference is measured in every runtime, for the small image.
      deployed_batches: Batch sizes of it.
      trained: {name: model} whose training steps are measured.
      embedded: {name: (model, (H, W, C))} that run on microcontrollers; choices are of the first.
      embedded_images: How many images each answers there.
      embedded_layers: Which of the single layers are counted there.
      processors: Those microcontrollers, of `deploy.PROCESSORS`.
    """

    large: nn.Module
    large_image: tuple[int, int, int]
    small: nn.Module
    small_image: tuple[int, int, int]
    batch: int
    pairs: int
    step_pairs: int
    calls: int
    deployed: Mapping[str, nn.Module]
    deployed_batches: tuple[int, ...] = (1, 32)
    trained: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    embedded: Mapping[str, tuple[nn.Module, tuple[int, int, int]]] = dataclasses.field(
        default_factory=dict
    )
    embedded_images: int = 2
    embedded_layers: Sequence[int] = (0, 6)
    processors: Sequence[str] = ("Cortex-M4F", "Cortex-M0+")


_TINY = models.ResNet(10, blocks=(1,), widths=(4,))
SIZES = {
    "small": Size(
        _TINY,
        (8, 8, 3),
        _TINY,
        (8, 8, 3),
        batch=4,
        pairs=2,
        step_pairs=1,
        calls=2,
        deployed={"tiny": _TINY},
        deployed_batches=(1, 2),
        trained={"tiny": _TINY},
        embedded={"tiny": (_TINY, (8, 8, 3))},
    ),
    "full": Size(
        large=models.create("resnet50", 1000),
        large_image=(224, 224, 3),
        small=models.create("resnet20", 10),
        small_image=(32, 32, 3),
        batch=32,
        pairs=30,
        step_pairs=15,
        calls=5,
        deployed={
            "vgg16_bn": models.create("vgg16_bn", 10),
            "resnet20": models.create("resnet20", 10),
            "resnet56": models.create("resnet56", 10),
            "mobilenet_v2": models.create("mobilenet_v2", 10, stem="cifar"),
            "densenet40": models.create("densenet40", 10),
        },
        trained={
            "resnet20": models.create("resnet20", 10),
            "resnet56": models.create("resnet56", 10),
            "vgg16_bn": models.create("vgg16_bn", 10),
            "mobilenet_v2": models.create("mobilenet_v2", 10, stem="cifar"),
            "resnet8 of 64, 256, 256": models.create("resnet8", 10, widths=(64, 256, 256)),
        },
        embedded={
            # That of MLPerf Tiny: 12.5 M MACs.
            "resnet8": (models.create("resnet8", 10, shortcut="project"), (32, 32, 3)),
            "mobilenet_v2 × 0.35": (models.create("mobilenet_v2", 10, width=0.35), (96, 96, 3)),
        },
        embedded_images=3,
        embedded_layers=range(7),
        processors=("Cortex-M4F", "Cortex-M7", "Cortex-M3", "Cortex-M0+"),
    ),
}

_MOMENTUM = optax.chain(
    optax.trace(0.9), optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3)
)


def ratio(
    name: str,
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    *inputs: Any,
    pairs: int,
    target: float | None = None,
    note: str = "",
    images: int = 0,
) -> Row:
    """Measures the time of `fn` over that of `reference`, called by turns.

    The note says the times; or the images per second, if so many take part in a call.
    """
    measured = deploy.latency(fn, reference, *inputs, pairs=pairs, warmup=1)
    times = measured.p50, measured.reference_p50
    said = " / ".join(f"{images / s:.0f}" if images else _readable(s) for s in times)
    said += " images/s" if images else ""
    note = f"{said}; {note}" if note else said
    return Row(name, measured.ratio, *measured.spread, "×", target, note)


def seconds(
    name: str, fn: Callable[[], Any], *, calls: int, target: float | None = None, note: str = ""
) -> Row:
    """Measures the seconds of a call, after a first one that is only noted."""
    first = core.seconds(fn)
    times = [core.seconds(fn) for _ in range(calls)]
    low, median, high = np.percentile(times, [25, 50, 75]).tolist()
    note = "; ".join(filter(None, [f"first call {_readable(first)}", note]))
    return Row(name, median, low, high, "s", target, note)


def inputs(batch: int, shape: tuple[int, int, int]) -> jax.Array:
    """Makes images (B, H, W, C) of normal noise."""
    return jax.random.normal(jax.random.key(0), (batch, *shape))


def variables(module: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> Any:
    """Initializes `module` for images (H, W, C)."""
    # XLA's own generator: the default one takes longer to compile than to run.
    return _jitted_init(module)(jax.random.key(seed, impl="rbg"), jnp.zeros((1, *shape)))


def integers(
    model: tuple[Callable[..., Any], Any],
    images: jax.Array,
    bits: int,
    first_last_bits: int | None = None,
) -> p.Program:
    """Makes a program with kernels of so many bits of (fn, params), calibrated on the images."""
    graph = core.trace(*model, images[:1])
    ends = first_last_bits or bits
    spec = quantization.spec(graph, weight_bits=bits, first_last_bits=ends)
    planned = quantization.plan(p.lower(*model, images), spec)
    ranges = quantization.calibrate_edges(planned, [(images,)])
    return quantization.encode(planned, ranges, images)


def predict(module: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes (variables, images) -> logits (B, N): a new function, of which nothing is cached."""
    return lambda variables, images: module.apply(variables, images, False)


def train(module: nn.Module) -> Callable[[Any, jax.Array], tuple[jax.Array, Any]]:
    """Makes (variables, images) -> (logits, {'batch_stats': …}) in training mode."""
    return lambda variables, images: module.apply(variables, images, True, mutable=["batch_stats"])


def optimizer(sparse: Sparse = lambda inner: inner) -> optax.GradientTransformation:
    """Momentum with decoupled weight decay, the same for each side of a pair; `sparse` wraps it."""
    return sparse(_MOMENTUM)


def training_batch(size: Size) -> Batch:
    """Makes a batch for a step of the small model."""
    labels = jnp.arange(size.batch, dtype=jnp.int32) % size.small.num_classes
    return {"image": inputs(size.batch, size.small_image), "label": labels}


def plain_loss(module: nn.Module) -> Callable[..., Any]:
    """Makes the loss of a training step of `module`, as it is."""
    forward = train(module)
    return training.loss_of(
        lambda params, state, images, key: forward({"params": params, **state}, images),
        training.classification(),
    )


@functools.cache
def plain_step(module: nn.Module) -> Callable[..., Any]:
    """Makes the training step of `module`, compiled once however often it is the reference."""
    return training.make_step(plain_loss(module))


def plain_state(
    size: Size, sparse: Sparse = lambda inner: inner, seed: int = 0
) -> training.TrainState:
    """Makes the state of the small model before its first step; `sparse` wraps the optimizer."""
    made = variables(size.small, size.small_image, seed)
    state = {"batch_stats": made["batch_stats"]}
    return training.create_state(made["params"], state, optimizer(sparse), jax.random.key(seed))


def plain_stepping(
    size: Size, sparse: Sparse = lambda inner: inner, steps: int = 1
) -> Callable[[], Any]:
    """Makes a call that takes `steps` training steps of the small model."""
    state = plain_state(size, sparse)
    return stepping(plain_step(size.small), state, training_batch(size), steps)


def stepping(
    step: Callable[..., Any], state: training.TrainState, batch: Batch, steps: int = 1
) -> Callable[[], Any]:
    """Makes a call that takes `steps` training steps, from where the one before it ended."""

    def run():
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        return state, metrics

    return run


def compiled(
    step: Callable[..., Any], state: training.TrainState, batch: Batch
) -> tuple[Callable[[], Any], float]:
    """Compiles a step: a call that takes it, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    made = step.lower(state, batch).compile()
    return stepping(made, state, batch), time.perf_counter() - start


@functools.cache
def _jitted_init(module):
    return jax.jit(module.init)


def _readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
