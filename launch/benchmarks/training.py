"""Training steps with convolutions in their fastest forms: against XLA's own, and PyTorch's.

A ratio is of seconds in the cores that the process has: `taskset -c 0` gives it one.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
import optax

from hybrid_jax import core, data, pruning, training
from launch.benchmarks import measure, peers
from launch.benchmarks.measure import Row, Size
from launch.benchmarks.quantization import qat_stepping

STEPS = 3
"""Steps in one loop."""


def steps(size: Size) -> Iterator[Row]:
    """A plain step of each network, against XLA's own forms and PyTorch."""
    for name, own in _networks(size):
        batch, state = measure.training_batch(own), measure.plain_state
        loss = measure.plain_loss(own.small)
        run, seconds = measure.compiled(training.make_step(loss), state(own), batch)
        xla = jax.jit(_in_own_forms(loss), donate_argnums=0)
        theirs, needed = measure.compiled(xla, state(own), batch)
        note = f"compiled in {seconds:.1f} s, XLA's own in {needed:.1f} s"
        options = dict(pairs=_pairs(size), images=size.batch)
        yield measure.ratio(f"{name}: step / XLA's own", run, theirs, note=note, **options)
        peer = peers.stepping(own.small, batch)
        if peer is not None:
            # 0.65 of its speed.
            yield measure.ratio(f"{name}: step / PyTorch", run, peer, target=1.54, **options)


def other_steps(size: Size) -> Iterator[Row]:
    """Pruned, quantization-aware and distilled steps, against the plain one."""
    for name, own in _networks(size):
        plain, needed = measure.compiled(
            measure.plain_step(own.small), measure.plain_state(own), measure.training_batch(own)
        )
        masks = pruning.masks(measure.plain_state(own).params, 0.5)
        sparse = functools.partial(pruning.hold_masks, masks=masks)
        kinds = {
            "with held masks": (measure.plain_stepping(own, sparse), None, None),
            "of QAT": (*qat_stepping(own), None),
            "of QAT with a teacher": (*qat_stepping(own, teacher=True), 2.5),
        }
        for kind, (run, seconds, target) in kinds.items():
            note = f"compiled in {seconds:.1f} s, plain in {needed:.1f} s" if seconds else ""
            yield measure.ratio(
                f"{name}: step {kind} / plain", run, plain, pairs=_pairs(size), target=target,
                images=size.batch, note=note,
            )  # fmt: skip


def loop(size: Size) -> Iterator[Row]:
    """Steps in a `lax.scan`, against as many one by one."""
    step = training.make_step(measure.plain_loss(size.small))

    def scanned(state, batch):
        return jax.lax.scan(lambda state, _: step(state, batch), state, length=STEPS)

    made = jax.jit(core.fast_convolutions(scanned), donate_argnums=0)
    state, batch = measure.plain_state(size), measure.training_batch(size)
    run, seconds = measure.compiled(made, state, batch)
    yield measure.ratio(
        f"scan of {STEPS} steps / separate steps", run, measure.plain_stepping(size, steps=STEPS),
        pairs=_pairs(size), images=STEPS * size.batch, note=f"compiled in {seconds:.1f} s",
    )  # fmt: skip


def waiting(size: Size) -> Iterator[Row]:
    """Making a batch on the host and handing it over, against the step that it is for."""
    images = np.zeros((5000, *size.small_image), np.uint8)
    made = data.batches(data.Arrays(images, np.zeros(5000, np.int32)), size.batch, seed=0)
    step = measure.plain_stepping(size)
    yield measure.ratio(
        "batch / step", lambda: jax.device_put(next(made)), step, pairs=size.pairs, target=0.02
    )


BENCHMARKS = (steps, other_steps, loop, waiting)


def _pairs(size):
    """Fewer than elsewhere: there are many networks, and XLA's own steps take seconds."""
    return max(size.step_pairs // 3, 1)


def _networks(size):
    for name, module in size.trained.items():
        yield name, dataclasses.replace(size, small=module)


def _in_own_forms(loss_fn):
    """A training step as one would write it, with XLA's own convolutions."""

    def step(state, batch):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (new, metrics)), grads = gradient(state.params, state.state, batch, state.key)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = state.replace(step=state.step + 1, params=params, state=new, opt_state=opt_state)
        return moved, {"loss": loss, **metrics}

    return step
