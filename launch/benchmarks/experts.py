"""A stack of experts against separate ones in training, and the mixture against one expert."""

from collections.abc import Iterator

import jax

from hybrid_jax import experts, training
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size

EXPERTS = 4
METHODS = ("vmap", "map", "unroll")


def stacked_step(size: Size) -> Iterator[Row]:
    """A step of a stack of experts, by each method and by the measured one, against E steps."""
    batch, loss = measure.training_batch(size), measure.plain_loss(size.small)
    states = [measure.plain_state(size, seed=e) for e in range(EXPERTS)]
    step = measure.plain_step(size.small)
    chosen = experts.fastest(step, training.stack_states(states), batch, in_axes=(0, None))
    alone = [measure.stepping(step, training.copy(state), batch) for state in states]
    for label, method in [*zip(METHODS, METHODS, strict=True), ("auto", chosen)]:
        stacked = training.make_stacked_step(loss, method=method)
        yield measure.ratio(
            f"step of {EXPERTS} stacked experts, {label} / {EXPERTS} separate steps",
            measure.stepping(stacked, training.stack_states(states), batch),
            lambda: [run() for run in alone],
            pairs=size.step_pairs if label == "auto" else max(size.step_pairs // 5, 1),
            target=1.0 if label == "auto" else None,
            note=f"chose {chosen}" if label == "auto" else "",
        )


def mixture_inference(size: Size) -> Iterator[Row]:
    """The gate and the one expert that it chose, and all experts, against one expert at batch 1.

    Deployed, parameters are constants of the program. As arguments the mixture is handed E times
    the buffers at each call, used or not, which on a small network costs more than the gate.
    """
    predict, images = measure.predict(size.small), measure.inputs(1, size.small_image)
    params = [measure.variables(size.small, size.small_image, seed=e) for e in range(EXPERTS)]
    gate = experts.gate_cnn(EXPERTS)
    gate_params = measure.variables(gate, size.small_image)
    one = (predict, params[0])
    edge = (experts.one_of([predict] * EXPERTS, gate.apply), params, gate_params)
    every = (experts.mixture(predict, gate.apply), experts.stack(params), gate_params)
    for name, mixture, run, target in (
        ("top-1 mixture, gate and one expert", edge, _with_constants, 1.2),
        ("the same, parameters as arguments", edge, _with_arguments, None),
        ("top-1 mixture, all experts", every, _with_constants, None),
    ):
        yield measure.ratio(
            f"{name} / one expert",
            run(*mixture),
            run(*one),
            images,
            pairs=size.pairs,
            target=target,
        )


BENCHMARKS = (stacked_step, mixture_inference)


def _with_constants(fn, *params):
    return jax.jit(lambda images: fn(*params, images))


def _with_arguments(fn, *params):
    compiled = jax.jit(fn)
    return lambda images: compiled(*params, images)
