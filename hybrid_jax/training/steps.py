"""One update: of one model, and of a stack of experts under one `jit`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from hybrid_jax import core, experts
from hybrid_jax.training.state import TrainState

Batch = Mapping[str, Any]
"""'image' (B, H, W, C), 'label' (B, …); optional 'weight' (B,) float32, 'teacher': outputs (B, …).

An example of weight 0 does not count, see `core.examples`. With 'view' (B,) uint32 each image is
augmented by itself, as that number alone decides, see `of_views`.
"""

Metrics = dict[str, jax.Array]
Forward = Callable[[Any, Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]
"""forward(params, state, images (B, H, W, C), key) -> (outputs (B, …), new_state), in training."""

LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
"""loss_fn(params, state, batch, key) -> (loss (), (new_state, metrics: dict of scalars))."""

Augment = Callable[[jax.Array, jax.Array], jax.Array]
Teacher = Callable[[jax.Array], jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    loss_fn: LossFn,
    augment: Augment | None = None,
    teacher: Teacher | None = None,
    *,
    choices: core.Choices | None = None,
) -> Step:
    """Makes the jitted step of one model: step(state, batch) -> (state, metrics with 'loss').

    `loss_fn` is (params, state, batch, key) -> (loss (), (new_state, metrics)); `augment`, (images
    (B, H, W, C), key) -> images, whose attribute `labels`, if it has one, moves labels by the same
    key; `teacher`, of these images -> outputs (B, …), put into batch['teacher']. Convolutions have
    their fastest forms, kept in `choices`, of which a run that is to be resumed bit by bit has its
    own. The state handed in is donated. On a sharded batch and a replicated
    state the step is data parallel.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = _keys(state.key, state.step)
        batch = _prepare(batch, augment_key, augment, teacher)
        return _update(loss_fn, state, batch, loss_key)

    return jax.jit(core.fast_convolutions(step, choices=choices), donate_argnums=0)


def make_stacked_step(
    loss_fn: LossFn,
    augment: Augment | None = None,
    teacher: Teacher | None = None,
    *,
    per_expert: Sequence[str] = (),
    method: str = "auto",
    choices: core.Choices | None = None,
) -> Step:
    """Makes the jitted step of E experts: equal to E separate steps on the same batch.

    The images are augmented, and seen by the teacher, once for all experts (drawn from the first
    expert's key); `loss_fn`, of one expert, draws from each one's own. `method` is that of
    `experts.map_experts`; `per_expert` names the entries of the batch that have a leading axis E,
    such as 'weight' (E, B). States and metrics have that axis on every leaf; states handed in are
    donated.
    """

    def update(state: TrainState, own: Batch, shared: Batch) -> tuple[TrainState, Metrics]:
        _, loss_key = _keys(state.key, state.step)
        return _update(loss_fn, state, {**shared, **own}, loss_key)

    update_all = experts.map_experts(update, method, in_axes=(0, 0, None), choices=choices)
    prepare = core.fast_convolutions(
        lambda shared, key: _prepare(shared, key, augment, teacher), choices=choices
    )

    def step(states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = _own_entries(batch, per_expert, experts=states.step.shape[0])
        augment_key, _ = _keys(states.key[0], states.step[0])
        shared = {name: leaf for name, leaf in batch.items() if name not in own}
        return update_all(states, own, prepare(shared, augment_key))

    return jax.jit(step, donate_argnums=0)


def of_views(augment: Augment) -> Augment:
    """Returns an augmentation by number: (images (B, H, W, C), view (B,) uint32) -> images.

    An image of one number is always augmented alike, in whatever batch.

    Example:
      >>> import jax.numpy as jnp
      >>> noisy = of_views(lambda images, key: images + jax.random.normal(key, images.shape))
      >>> images, view = jnp.zeros((3, 1, 1, 1)), jnp.array([5, 7, 5], jnp.uint32)
      >>> first, second, third = noisy(images, view).ravel().tolist()
      >>> first == third != second
      True
    """

    def one(image, view):
        return augment(image[None], jax.random.fold_in(jax.random.key(0), view))[0]

    return jax.vmap(one)


def _keys(key: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    augment_key, loss_key = jax.random.split(jax.random.fold_in(key, step))
    return augment_key, loss_key


def _prepare(
    batch: Batch, key: jax.Array, augment: Augment | None, teacher: Teacher | None
) -> Batch:
    if augment is not None:
        moves = {"image": augment, "label": getattr(augment, "labels", None)}
        for name, move in moves.items():
            if move and "view" in batch:
                batch = {**batch, name: of_views(move)(batch[name], batch["view"])}
            elif move:
                batch = {**batch, name: move(batch[name], key)}
    if teacher is not None:
        batch = {**batch, "teacher": jax.lax.stop_gradient(teacher(batch["image"]))}
    return batch


def _update(
    loss_fn: LossFn, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    gradient = jax.value_and_grad(core.one_pass_affine(loss_fn), has_aux=True)
    (loss, (new_state, metrics)), grads = gradient(state.params, state.state, batch, key)
    # Optax relies on promotion (Adam's bias correction takes a float to an integer power).
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(step=state.step + 1, params=params, state=new_state, opt_state=opt_state)
    return new, {"loss": loss, **metrics}


def _own_entries(batch: Batch, names: Sequence[str], experts: int) -> Batch:
    for name in names:
        if name not in batch:
            raise ValueError(f"per_expert must name entries of the batch, got {name!r}")
        if batch[name].ndim == 0 or batch[name].shape[0] != experts:
            raise ValueError(
                f"batch[{name!r}] must have a leading axis of {experts} experts, "
                f"got shape {batch[name].shape}"
            )
    return {name: batch[name] for name in names}
