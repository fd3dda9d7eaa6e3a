"""Steps of batches that grow with the devices, and what is waited for input meanwhile.

On virtual devices, which share the cores of one processor, steps on n devices take as long at best
as n steps on one, a ratio of 1; on n accelerators 1 / n of it.
"""

from collections.abc import Iterator

import jax
import numpy as np

from hybrid_jax import data, pruning, training
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size
from launch.benchmarks.quantization import qat

EXPERTS = 4
DEVICES = (2, 4, 8)


def steps(size: Size) -> Iterator[Row]:
    """Plain, pruned, quantization-aware and stacked steps on n devices, against n on one."""
    for kind, (step, state) in _kinds(size).items():
        small = measure.training_batch(size)
        for count in _counts():
            own, batch = _laid(count, state, _larger(small, count))
            one, part = _laid(1, state, small)
            yield measure.ratio(
                f"{kind} step, {count} devices / {count} steps on one",
                measure.stepping(step, own, batch),
                measure.stepping(step, one, part, steps=count),
                pairs=size.step_pairs,
                images=count * size.batch,
            )


def waiting(size: Size) -> Iterator[Row]:
    """Making and dividing a batch for n devices, against the step that is under way meanwhile.

    Up to 1 nothing waits for it.
    """
    images, labels = np.zeros((5000, *size.small_image), np.uint8), np.zeros(5000, np.int32)
    step, state = measure.plain_step(size.small), measure.plain_state(size)
    for count in _counts():
        own, batch = _laid(count, state, _larger(measure.training_batch(size), count))
        made = data.batches(data.Arrays(images, labels), count * size.batch, seed=0)
        mesh = _mesh(count, size.batch)

        def given(made=made, mesh=mesh):
            batch = {name: leaf for name, leaf in next(made).items() if name != "index"}
            return jax.device_put(batch) if mesh is None else training.shard_batch(batch, mesh)

        run = measure.stepping(step, own, batch)
        yield measure.ratio(f"batch / step, {count} devices", given, run, pairs=size.pairs)


BENCHMARKS = (steps, waiting)


def _kinds(size):
    """{kind: (step, state)}."""
    masks = pruning.masks(measure.plain_state(size).params, 0.5)
    stacked = training.make_stacked_step(measure.plain_loss(size.small), method="map")
    states = [measure.plain_state(size, seed=e) for e in range(EXPERTS)]
    plain = measure.plain_step(size.small)
    return {
        "plain": (plain, measure.plain_state(size)),
        "pruned": (plain, measure.plain_state(size, lambda tx: pruning.hold_masks(tx, masks))),
        "QAT": qat(size),
        "stacked": (stacked, training.stack_states(states)),
    }


def _counts():
    return [count for count in DEVICES if count <= jax.device_count()]


def _larger(batch, count):
    return {name: np.concatenate([leaf] * count) for name, leaf in batch.items()}


def _mesh(count, size, stack=1):
    return training.fitting_mesh(count * size, stack, jax.devices()[:count])


def _laid(count, state, batch):
    """State and batch on so many devices."""
    stack = state.step.shape[0] if np.ndim(state.step) else 1
    mesh = _mesh(count, len(batch["label"]) // count, stack)
    if mesh is None:
        return training.copy(state), batch
    return training.place_state(state, mesh), training.shard_batch(batch, mesh)
