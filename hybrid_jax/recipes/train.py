"""Training of compressed networks: quantized at their sites, then up to what is deployed."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from hybrid_jax import core, experts, pruning, quantization, training
from hybrid_jax.recipes.cut import Cut, Model, deployed, with_functions
from hybrid_jax.recipes.optimizer import optimizer
from hybrid_jax.recipes.prune import of_kernels
from hybrid_jax.recipes.task import Task
from hybrid_jax.recipes.taught import UNTAUGHT, Taught

CALIBRATION_BATCHES = 8
BATCHNORM_BATCHES = 20


def parent(task: Task, dense: Model, settings: Any) -> Model:
    """Returns the dense network after `settings.steps` steps of training without a teacher."""
    cut = dense.cut
    params, rest = cut.split(cut.variables)
    forward = task.computed(in_training(cut, cut.network.train))
    tx = optimizer(
        settings.learning_rate, settings.weight_decay, settings.steps, direction=settings.optimizer
    )
    step = training.make_step(task.loss(forward), task.augmented, choices=task.choices)
    state = task.start("parent", {"params": params}, {"rest": rest}, tx)
    trained = task.fit("parent", step, state, settings.steps, settings.batch_size)
    variables = cut.merge(trained.params["params"], trained.state["rest"])
    return dense._replace(cut=cut.with_variables(variables))


def compress(
    task: Task,
    parent: Model,
    made: Sequence[Model],
    name: str,
    settings: Any,
    alpha: float,
    steps: int | None = None,
    weights: np.ndarray | None = None,
) -> list[Model]:
    """Returns the networks trained by distillation: as they are cut, and then as deployed.

    For the last part of the steps, `settings.deployed`, each is what a device computes, with
    BatchNorm folded. Before, it is alive: for a first part of these, `settings.floats`, they are
    not quantized, and then at their sites. Those of one program are trained as one stack under one
    `jit`.

    `settings` are those of config.experts, of which `steps` may be others; `alpha` is the teacher's
    share of the loss, `weights` (E, n) those of each training image for each network, None for all
    alike. Checkpoints are named after `name`.
    """
    steps = settings.steps if steps is None else steps
    last = round(settings.deployed * steps)
    first = round(settings.floats * (steps - last))
    inner = functools.partial(
        optimizer,
        settings.learning_rate,
        settings.weight_decay,
        steps,
        direction=settings.optimizer,
    )
    fit = functools.partial(
        fit_each,
        task,
        taught=task.taught(parent) if alpha else UNTAUGHT,
        alpha=alpha,
        batch_size=settings.batch_size,
        method=settings.method,
        weights=weights,
    )
    if first:
        made = in_floats(task, made, f"{name}_floats", settings, fit, inner(), first)
    tx = inner(first, flat=not settings.schedule)
    made = at_sites(task, made, name, settings, fit, tx, steps - last - first)
    made = with_functions(list(map(deployed, made)))
    if not last:
        return made
    trained = fit(
        f"{name}_deployed",
        [as_forward(model.fn) for model in made],
        [model.params for model in made],
        [{} for _ in made],
        [pruning.hold_masks(inner(steps - last), held(model)) for model in made],
        steps=last,
    )
    return [model.trained(params) for model, (params, _) in zip(made, trained, strict=True)]


def in_floats(task, made, name, settings, fit, tx, steps) -> list[Model]:
    """Returns the networks after training in floats."""
    predicts, groups = _programs(task, made)
    parts = [model.cut.split(model.cut.variables) for model in made]
    starts = [{"params": params} for params, _ in parts]
    first = {fn: made[members[0]].cut for fn, members in groups.items()}
    forwards = {fn: task.computed(in_training(cut, cut.network.train)) for fn, cut in first.items()}
    trained = fit(
        name,
        [forwards[fn] for fn in predicts],
        starts,
        [{"rest": rest} for _, rest in parts],
        [
            pruning.hold_masks(tx, _masked(own, model.masks))
            for model, own in zip(made, starts, strict=True)
        ],
        steps=steps,
    )
    return [
        model._replace(
            cut=model.cut.with_variables(model.cut.merge(params["params"], state["rest"]))
        )
        for model, (params, state) in zip(made, trained, strict=True)
    ]


def _programs(task, made) -> tuple[list[Callable], dict[Callable, list[int]]]:
    """The function of each network, one for those of one program, and the numbers of these."""
    predicts = experts.alike(
        [model.cut.network.predict for model in made],
        [model.cut.variables for model in made],
        task.image,
    )
    return predicts, {fn: [e for e, own in enumerate(predicts) if own is fn] for fn in predicts}


def at_sites(task, made, name, settings, fit, tx, steps) -> list[Model]:
    """Returns the networks after training quantized at their sites, with ranges of these."""
    predicts, groups = _programs(task, made)
    forwards, starts = {}, {}
    for fn, members in groups.items():
        cuts = [made[e].cut for e in members]
        quantized = quantization.fake_quantized(cuts[0].network.train, cuts[0].spec)
        forwards[fn] = in_training(cuts[0], quantized)
        starts |= zip(members, _starts(task, cuts, settings), strict=True)
    params, states = zip(*(starts[e] for e in range(len(made))), strict=True)
    sparse = [
        sparsified(tx, model, own, settings, steps) for model, own in zip(made, params, strict=True)
    ]
    computed = {fn: task.computed(forward) for fn, forward in forwards.items()}
    trained = fit(name, [computed[fn] for fn in predicts], params, states, sparse, steps=steps)
    done = list(made)
    for fn, members in groups.items():
        stack = [experts.stack([trained[e][part] for e in members]) for part in (0, 1)]
        state = _batchnorm(task, made[members[0]].cut, forwards[fn], *stack, settings)
        for e, own in zip(members, experts.unstack(state), strict=True):
            (cut, masks, *_), params = made[e], trained[e][0]
            if settings.schedule:
                masks = {path: params["params"][path] != 0 for path in masks}
            cut = cut.with_variables(cut.merge(params["params"], own["rest"]))
            done[e] = made[e]._replace(cut=cut, masks=masks, ranges=params["ranges"])
    return done


def sparsified(
    tx: optax.GradientTransformation, model: Model, params: Any, settings: Any, steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer of a network at its sites that holds its zeros, or lets them come in.

    As `settings.schedule` says, they come in over the first half of `steps`.
    """
    graph = model.cut.graph
    masked = functools.partial(_masked, params)
    if not (model.masks and settings.schedule):
        return pruning.hold_masks(tx, masked(model.masks))
    kernels = {path: kernel for path, kernel in graph.kernels.items() if path in model.masks}
    return pruning.prune_by_schedule(
        tx,
        lambda params: masked(
            pruning.magnitude(kernels, {path: params["params"][path] for path in kernels})
        ),
        pruning.SCHEDULES[settings.schedule](settings.weight_sparsity, max(steps // 2, 1)),
        of_kernels(graph, settings.weight_granularity, "params/"),
        pruning.ALLOCATIONS[settings.weight_allocation](graph),
    )


def _masked(params: Any, values: Mapping[str, Any]) -> Any:
    """Masks, or scores, of some weights among `params`."""
    nothing = jax.tree.map(lambda _: optax.MaskedNode(), params)
    return {**nothing, "params": {**nothing["params"], **values}}


def _starts(task, cuts: Sequence[Cut], settings) -> list[tuple[Any, Any]]:
    """(params, state) of networks of one program before the first step, quantized at sites."""
    cut = cuts[0]
    params, rest = zip(*(own.split(own.variables) for own in cuts), strict=True)
    state = {"rest": experts.stack(rest), "bits": experts.stack([own.spec.bits() for own in cuts])}
    floats = in_training(cut, cut.network.train)
    state = _batchnorm(task, cut, floats, {"params": experts.stack(params)}, state, settings)
    states = experts.unstack(state)
    ranges = quantization.calibrate(
        cut.network.predict,
        experts.stack([cut.merge(*own) for own in zip(params, (s["rest"] for s in states))]),
        [(images,) for images in task.sample(settings.batch_size, CALIBRATION_BATCHES)],
        cut.spec,
        settings.calibration,
        bits=state["bits"],
        stacked=True,
    )
    ranges = experts.unstack(core.gathered(ranges))
    own = [{"params": p, "ranges": r} for p, r in zip(params, ranges)]
    return list(zip(own, states, strict=True))


def _batchnorm(task, cut: Cut, forward, params, state, settings):
    """The state of a stack with its running statistics estimated anew."""
    if not cut.statistics:
        return state
    method = settings.method
    mapped = experts.map_experts(forward, method, (0, 0, None, None), task.choices)
    images, key = task.sample(settings.batch_size, BATCHNORM_BATCHES), task.key("batchnorm")
    one = jax.tree.map(lambda leaf: leaf[0], (params, state))
    try:
        found = training.running_statistics(forward, *one, task.images[:2], key)
    except ValueError as error:
        # Statistics of another kind than BatchNorm's are what training has left.
        core.say(f"running statistics are not estimated anew: {error}")
        return state
    return core.gathered(
        training.reestimate_batchnorm(mapped, params, state, images, key, statistics=found)
    )


def in_training(cut: Cut, train: Callable) -> Callable:
    """Returns the forward function of a step of a network in training mode.

    `train` takes (variables, images, key), or of a network quantized at its sites (variables,
    ranges, images, key, bits=…); params are {'params': {path: leaf}, 'ranges'}, and the state is
    {'rest': {path: leaf}, 'bits'}.
    """

    def forward(params, state, images, key):
        variables = cut.merge(params["params"], state["rest"])
        if "ranges" in params:
            outputs, new = train(variables, params["ranges"], images, key, bits=state["bits"])
        else:
            outputs, new = train(variables, images, key)
        return outputs, state | {"rest": cut.split(new)[1]}

    return forward


@functools.cache
def as_forward(fn: Callable) -> Callable:
    """Returns the forward function of a step of a network as it is deployed."""

    def forward(params, state, images, key):
        return fn(params, images), state

    return forward


def fit_each(
    task: Task,
    name: str,
    forwards: Sequence[Callable],
    params: Sequence[Any],
    states: Sequence[Any],
    optimizers: Sequence[optax.GradientTransformation],
    *,
    taught: Taught,
    steps: int,
    batch_size: int,
    alpha: float,
    method: str = "auto",
    weights: np.ndarray | None = None,
) -> list[tuple[Any, Any]]:
    """Trains E networks, those of one forward function as one stack; returns (params, state) each.

    `optimizers` of one forward function differ in their state alone, `weights` (E, n) are as of
    `Task.fit`; `alpha` is the share in the loss of what is `taught`.
    """
    key = task.key(name)
    trained: list[Any] = [None] * len(params)
    for g, forward in enumerate(dict.fromkeys(forwards)):
        members = [e for e, own in enumerate(forwards) if own is forward]

        @jax.jit
        def start(params, states, members=members):
            made = []
            for e, own, state in zip(members, params, states, strict=True):
                own_key = jax.random.fold_in(key, e)
                made.append(training.create_state(own, state, optimizers[e], own_key))
            return training.stack_states(made)

        step = training.make_stacked_step(
            task.loss(forward, alpha),
            task.augmented,
            taught.teach,
            per_expert=() if weights is None else ("weight",),
            method=method if len(members) > 1 else "unroll",
            choices=task.choices,
        )
        stack = task.fit(
            f"{name}{g or ''}",
            step,
            start([params[e] for e in members], [states[e] for e in members]),
            steps,
            batch_size,
            None if weights is None else weights[members],
            taught,
        )
        for e, own in zip(members, experts.unstack(stack), strict=True):
            trained[e] = own.params, own.state
    return trained


def held(model: Model) -> Any:
    """Returns the masks of a deployed model's `params`, as `pruning.hold_masks` takes them."""
    masks = jax.tree.map(lambda _: optax.MaskedNode(), model.params)
    if model.masks:
        for name, own in model.weights.items():
            if "kernel" in own:
                masks["params"][name]["kernel"] = own["kernel"] != 0
    return masks
