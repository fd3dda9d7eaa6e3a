"""The training loop: progress, records, checkpoints, resumption, and a check on the loss."""

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hybrid_jax import core
from hybrid_jax.core import versions
from hybrid_jax.training.checkpoints import Checkpoints
from hybrid_jax.training.progress import progress
from hybrid_jax.training.records import Path, drop_records, write_record
from hybrid_jax.training.signals import Held
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.steps import Batch, Metrics, Step

_AHEAD = 2
"""Steps that the device is given before it has done them: a signal has to wait for them all."""
AGREED = 10
"""Steps between questions to all processes: each waits for the step before it to be done."""


def fit(
    step: Step,
    state: TrainState,
    batches: Callable[[int], Iterator[Batch]],
    *,
    steps: int,
    name: str,
    checkpoint: Checkpoints | None = None,
    records: Path | None = None,
    evaluate: Callable[[TrainState], dict[str, Any]] | None = None,
    every: int | None = None,
    record_every: int = 50,
    seconds: float = 120.0,
    scan: bool = False,
    resident: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains until step `steps`, from the newest checkpoint that is whole, if there is one.

    Resuming is bit-equal to never having stopped, since everything random depends on the step
    alone. Stopped at any moment, it leaves complete checkpoints of finite values, and whole lines.
    SIGTERM, SIGINT and SIGHUP wait until the step under way is done and saved, see `signals.Held`.
    Of several processes all are asked every `AGREED` steps whether one got a signal, and the first
    writes the records.
    A loss, or a parameter to be saved, that is not finite is a FloatingPointError with its step.

    `step` is of `make_step` or `make_stacked_step`; `state` is where to start, and stays usable;
    batches(first step) iterates from that step on, as `data.batches` does. `records` is the file of
    {'name', 'step', 'loss', …}, each metric the mean since the record before, a list over experts
    for a stack, every `record_every` steps, when the loss is looked at. evaluate(state) -> dict of
    numbers or (E,) arrays is added to it, `every` so many steps, as checkpoints are made; None is
    the end only. Checkpoints are also made once `seconds` have passed since the last.

    With `scan` all steps up to the next record or checkpoint are one program, a `lax.scan`, as an
    accelerator wants it; signals and time are looked at after it. XLA rounds otherwise in it than
    step by step, so that a run keeps to one of both. `resident` are arrays (n, …) on the device, of
    which batch['index'] (B,) is what a batch has besides.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from hybrid_jax.training import create_state, make_step
      >>> def loss_fn(params, state, batch, key):
      ...     return (params['w'] - batch['label']) ** 2, (state, {})
      >>> state = create_state({'w': jnp.float32(0)}, {}, optax.sgd(0.25), jax.random.key(0))
      >>> batches = lambda first: itertools.repeat({'label': jnp.float32(1)})
      >>> state = fit(make_step(loss_fn), state, batches, steps=3, name='parent')
      >>> int(state.step), state.params['w'].item()
      (3, 0.875)
    """
    core.check_integer("steps", steps, 0)
    core.check_integer("record_every", record_every, 1)
    every = max(steps, 1) if every is None else core.check_integer("every", every, 1)

    state = core.copy(state)
    saved = checkpoint.newest(state) if checkpoint else None
    state, window = saved or (state, [])  # the metrics that no record holds yet
    done = int(np.ravel(core.whole(state.step))[0])
    if done > steps:
        raise ValueError(f"steps must be at least the {done} that {name} has done, got {steps}")
    if records is not None:
        drop_records(records, name, after=done)

    ends = (every, record_every) if scan else (1,)
    run = _scanned(step, resident or {}) if scan else functools.partial(_one, _compiled(step))
    begun, underway = time.monotonic(), collections.deque()
    saving = checkpoint or contextlib.nullcontext()
    with Held() as held, saving, progress(name, steps, start=done) as show:
        given = batches(done)
        while done < steps:
            end = min(steps, *(n * (done // n + 1) for n in ends))
            chunk = list(itertools.islice(given, end - done))
            if len(chunk) < end - done:
                break
            state, metrics = run(state, chunk)
            window += metrics
            underway.append(metrics)
            if len(underway) > _AHEAD:
                jax.block_until_ready(underway.popleft())
            done = end
            note = ""
            boundary = done % every == 0 or done == steps
            came, due = _agreed(done, held.came, time.monotonic() - begun >= seconds)
            save = checkpoint and (boundary or came or due)
            if boundary or done % record_every == 0:
                means = _means(name, done, window)
                note = "  ".join(f"{key} {np.mean(value):.4g}" for key, value in means.items())
                if boundary:
                    _check_parameters(name, done, state)
                    means |= evaluate(state) if evaluate else {}
                if records is not None:
                    values = {key: np.asarray(value).tolist() for key, value in means.items()}
                    write_record(records, {"name": name, "step": done, **values})
                window = []
            if save:
                window = _looked_at(name, done, window)
                if not boundary:
                    _check_parameters(name, done, state)
                checkpoint.save(done, state, window)
                begun = time.monotonic()
            if came:
                if checkpoint:
                    checkpoint.wait()
                held.deliver(came)
            show(done, note)
    if done < steps:
        raise ValueError(f"batches must reach step {steps} of {name}, got no more after {done}")
    return state


def _compiled(step: Step) -> Step:
    """A step compiled as what runs often is, which a jit within another can't say for itself."""
    if not hasattr(step, "lower"):
        return step
    return jax.jit(step, donate_argnums=0, compiler_options=versions.run_often())


def _one(step: Step, state: TrainState, chunk: Sequence[Batch]) -> tuple[TrainState, list[Metrics]]:
    """One step."""
    state, metrics = step(state, *chunk)
    return state, [metrics]


def _scanned(step: Step, resident: Mapping[str, Any]) -> Callable:
    """run(state, chunk) -> (state, metrics of each step), all steps of a chunk as one program."""

    @jax.jit
    def several(state, chunk, resident):
        def one(state, batch):
            taken = {name: own[batch["index"]] for name, own in resident.items()}
            return step(state, {**batch, **taken})

        return jax.lax.scan(one, state, jax.tree.map(lambda *own: jnp.stack(own), *chunk))

    compiled = _compiled(several)

    def run(state: TrainState, chunk: Sequence[Batch]) -> tuple[TrainState, list[Metrics]]:
        state, metrics = compiled(state, tuple(chunk), resident)
        metrics = core.whole(metrics)
        return state, [{n: own[i] for n, own in metrics.items()} for i in range(len(chunk))]

    return run


def _agreed(done: int, came: int | None, due: bool) -> tuple[int | None, bool]:
    """The signal that came to one of the processes, and whether one is to save: alike in all."""
    if jax.process_count() == 1:
        return came, due
    if done % AGREED:
        return None, False
    wishes = multihost_utils.process_allgather(np.array([came or 0, due])).max(0)
    return int(wishes[0]) or None, bool(wishes[1])


def _looked_at(name: str, done: int, window: list[Metrics]) -> list[dict[str, Any]]:
    """The last metrics as JSON, whose losses are checked; the one place that waits for them."""
    window = core.whole(window)
    for step, metrics in enumerate(window, done - len(window) + 1):
        if not np.all(np.isfinite(metrics["loss"])):
            loss = np.ravel(metrics["loss"])
            worst = int(np.argmin(np.isfinite(loss)))
            whose = f" of expert {worst}" if np.ndim(metrics["loss"]) else ""
            raise FloatingPointError(
                f"{name}: loss{whose} must be finite, got {loss[worst]} at step {step}; "
                "lower the learning rate or clip the gradient"
            )
    return jax.tree.map(lambda value: np.asarray(value).tolist(), window)


def _means(name: str, done: int, window: list[Metrics]) -> dict[str, np.ndarray]:
    """Means of the last metrics."""
    window = core.whole(window)
    _looked_at(name, done, window)
    return {key: np.mean([np.float64(m[key]) for m in window], axis=0) for key in window[0]}


def _check_parameters(name: str, done: int, state: TrainState) -> None:
    """Catches what the last update broke before it is saved: no loss has seen it yet."""
    try:
        core.check_finite("params", state.params)
    except ValueError as error:
        raise FloatingPointError(
            f"{name}: {error} after step {done}; lower the learning rate or clip the gradient"
        ) from None
