"""A quantization-aware training step against a plain one, and against Qwix where installed."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core, quantization, training
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size


def qat_step(size: Size) -> Iterator[Row]:
    """A step with 8-bit kernels and activations, bits static or data, against a plain one."""
    plain = measure.plain_stepping(size)
    for name, bits_as_data in (("QAT step", False), ("QAT step, bits as data", True)):
        ours, _ = qat_stepping(size, bits_as_data)
        yield measure.ratio(f"{name} / plain", ours, plain, pairs=size.step_pairs, target=1.5)


def qat_step_against_qwix(size: Size) -> Iterator[Row]:
    """A step of ours against one of each of Qwix's providers; no row without Qwix."""
    if importlib.util.find_spec("qwix") is None:
        return
    ours, _ = qat_stepping(size)
    for provider in ("OdmlQatProvider", "QtProvider"):
        name, theirs = f"QAT step / Qwix {provider}", _qwix(size, provider)
        yield measure.ratio(name, ours, theirs, pairs=size.step_pairs, target=1.0)


BENCHMARKS = (qat_step, qat_step_against_qwix)


def qat_stepping(
    size: Size, bits_as_data: bool = False, teacher: bool = False
) -> tuple[Callable[[], Any], float]:
    """Makes a call that takes a QAT step, and says how many seconds compiling it took.

    With `teacher` the network in floats sees the images too, and is distilled from.
    """
    return measure.compiled(*qat(size, bits_as_data, teacher), measure.training_batch(size))


def qat(
    size: Size, bits_as_data: bool = False, teacher: bool = False
) -> tuple[Callable[..., Any], training.TrainState]:
    """Makes a QAT step and the state before it; arguments as of `qat_stepping`."""
    variables = measure.variables(size.small, size.small_image)
    predict, batch = measure.predict(size.small), measure.training_batch(size)
    spec = quantization.spec(core.trace(predict, variables, batch["image"]))
    ranges = quantization.calibrate(predict, variables, [(batch["image"],)], spec)
    q_train = quantization.fake_quantized(measure.train(size.small), spec)

    def forward(params, state, images, key):
        own = {"params": params["params"], "batch_stats": state["batch_stats"]}
        logits, updates = q_train(own, params["ranges"], images, bits=state["bits"])
        return logits, state | updates

    params = {"params": variables["params"], "ranges": ranges}
    bits = spec.bits() if bits_as_data else None
    state = {"batch_stats": variables["batch_stats"], "bits": bits}
    taught = functools.partial(predict, variables) if teacher else None
    return _made(forward, params, state, taught)


def _qwix(size, provider):
    import qwix

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    module = qwix.quantize_model(size.small, getattr(qwix, provider)([rule]))
    batch = measure.training_batch(size)

    def forward(params, state, images, key):
        # Qwix relies on promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return module.apply({"params": params, **state}, images, True, mutable=list(state))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = dict(module.init(jax.random.key(0), batch["image"], True))
    made = _made(forward, variables.pop("params"), variables)
    return measure.compiled(*made, batch)[0]


def _made(forward, params, state, teacher=None):
    loss = training.loss_of(forward, training.classification(), 0.0 if teacher is None else 0.5)
    step = training.make_step(loss, teacher=teacher)
    return step, training.create_state(params, state, measure.optimizer(), jax.random.key(0))
