"""What a user gives as his network, Linen, NNX, Keras or functions, as a `Network`."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta, unfreeze

from hybrid_jax import core
from hybrid_jax.models.network import KEY, Network, statistics

MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Names by which a module is told its mode -> what they are in training."""


def take(given: Any, x: Any, training: str | None = None, seed: int | None = 0) -> Network:
    """Takes a network as it was written: (predict, train, params), with every mode as functions.

    `given` is

    - a Linen module, whose variables are then initialised from `seed`, or stay shapes where that is
      None, as `restore` takes them; or (module, variables): params are the variables. It draws from
      the key, and what it changes, it returns.
    - an NNX module: params are its state as a pure dictionary, without its generators, which are
      made of the key. The module itself stays as it is.
    - a Keras model on its JAX backend: params are {path of a variable: array}, without the seeds.
    - functions: (predict, train, params), or (predict, params) where nothing is to be trained.

    A module's mode is set by the arguments of its `__call__`, else by its attributes, that are in
    `MODES`; `training` names another one, and 'not NAME' one that is False in training. A module
    without any is the same in both, which is an error where it has running statistics. `x` is a
    batch, or its `jax.ShapeDtypeStruct`; both functions are traced for it.

    Example:
      >>> module = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> network = take(module, jax.ShapeDtypeStruct((1, 3), jnp.float32))
      >>> network.predict(network.params, jnp.ones((5, 3))).shape
      (5, 2)
    """
    shapes = jax.tree.map(core.abstract, x)
    written = kind(given)
    network = _READERS[written](given, shapes, training, seed)
    leaves = core.flatten_paths(network.params)
    if not leaves:
        raise ValueError("given must have parameters, got none")
    for path, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"given must have arrays as parameters, got {leaf!r} at {path!r}")
    out = _traced("predict(params, x)", jax.eval_shape, network.predict, network.params, shapes)
    if network.train is not None:
        both = _traced(
            "train(params, x, key)", jax.eval_shape, network.train, network.params, shapes, KEY
        )
        if not isinstance(both, tuple) or len(both) != 2:
            raise ValueError(
                f"train(params, x, key) must return (out, new params), got {type(both).__name__}"
            )
        core.check_same_structure("the out of train", out, both[0])
        core.check_same_structure("the new params of train", network.params, both[1])
    if written in ("Linen", "NNX"):
        _check_mode(given[0] if isinstance(given, tuple) else given, training, network, shapes)
    return network


def kind(given: Any) -> str:
    """Which of the kinds that `take` knows `given` is."""
    parts = given if isinstance(given, tuple) else (given,)
    if isinstance(parts[0], nn.Module) and len(parts) <= 2:
        return "Linen"
    if len(parts) in (2, 3) and callable(parts[0]):
        return "functions"
    if isinstance(given, nnx.Module):
        return "NNX"
    # Who has a Keras model has imported Keras.
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(given, keras.Model):
        return "Keras"
    raise TypeError(
        "given must be a Linen module, (module, variables), an NNX module, a Keras model, "
        f"(predict, train, params) or (predict, params), got {_described(given)}"
    )


def _functions(given, shapes, training, seed):
    *functions, params = given
    if training is not None:
        raise ValueError(f"training must be None where functions are given, got {training!r}")
    return Network(functions[0], functions[1] if len(functions) == 2 else None, params)


def _linen(given, shapes, training, seed):
    module, variables = given if isinstance(given, tuple) else (given, None)
    arguments, attributes = _modes(module, training)
    evaluation, trained = (
        (module.clone(**_set(attributes, mode)), _set(arguments, mode)) for mode in (False, True)
    )
    if variables is None:
        variables = _initialized(*evaluation, shapes, seed)
    variables = meta.unbox(unfreeze(variables))
    changing = [name for name in variables if name != "params"]

    def predict(params, x):
        return evaluation[0].apply(params, x, **evaluation[1])

    def train(params, x, key):
        out, changed = trained[0].apply(
            params, x, **trained[1], rngs=_streams(key), mutable=changing
        )
        return out, params | changed

    return Network(predict, train, variables)


def _initialized(module, arguments, shapes, seed):
    def init(key):
        x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return module.init(_streams(key), x, **arguments)

    if seed is None:
        return _traced("init(rngs, x)", jax.eval_shape, init, KEY)
    return _traced("init(rngs, x)", jax.jit(init), jax.random.key(seed))


def _streams(key):
    """Keys of all streams: Linen takes that of 'params' for those that are not named."""
    params, dropout = jax.random.split(key)
    return {"params": params, "dropout": dropout}


def _nnx(given, shapes, training, seed):
    arguments, attributes = _modes(given, training)

    def in_mode(mode):
        module = nnx.clone(given)
        nested = {name: value for name, value in MODES.items() if name != "train"} | attributes
        module.set_attributes(**_set(nested, mode), raise_if_not_found=False)
        nnx.pop(module, nnx.Intermediate)
        return nnx.split(module, nnx.RngState, ...)

    (evaluation, rngs, state), (trained, *_) = in_mode(False), in_mode(True)

    def run(graph, mode, params, rngs, x):
        own = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(own, params)
        module = nnx.merge(graph, rngs, own)
        out = module(x, **_set(arguments, mode))
        nnx.pop(module, nnx.Intermediate)
        return out, _plain(nnx.split(module, nnx.RngState, ...)[2])

    def predict(params, x):
        return run(evaluation, False, params, rngs, x)[0]

    def train(params, x, key):
        return run(trained, True, params, _reseeded(rngs, key), x)

    return Network(predict, train, _plain(state))


def _plain(state):
    """A state as dictionaries of arrays; a place in a list is a key as well, as a string."""

    def named(tree):
        return {str(k): named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return named(nnx.to_pure_dict(state))


def _reseeded(rngs, key):
    """The states of NNX's generators, begun anew from keys of their own."""
    leaves, tree = jax.tree.flatten(rngs)
    keys = jax.random.split(key, len(leaves) + 1)

    def begun(leaf, own):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(leaf)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return jax.tree.unflatten(tree, map(begun, leaves, keys))


def _keras(given, shapes, training, seed):
    backend = sys.modules["keras"].backend.backend()
    if backend != "jax":
        raise ValueError(f"given must be on Keras's JAX backend (KERAS_BACKEND=jax), got {backend}")
    if training is not None:
        raise ValueError(f"training must be None for a Keras model, got {training!r}")
    if not given.built:
        given.build(shapes.shape)
    seeds = [v for v in given.non_trainable_variables if v.path.endswith("seed_generator_state")]
    variables = [*given.trainable_variables, *given.non_trainable_variables]
    named = {v.path: v for v in variables if not any(v is s for s in seeds)}
    if len(named) + len(seeds) != len(variables):
        raise ValueError("given must have layers of distinct names, got two variables of one path")

    def run(params, x, mode, drawn):
        known = {id(named[path]): value for path, value in params.items()} | drawn
        parts = [
            [known[id(v)] for v in part]
            for part in (given.trainable_variables, given.non_trainable_variables)
        ]
        out, changed = given.stateless_call(*parts, x, training=mode)
        after = dict(zip([v.path for v in given.non_trainable_variables], changed, strict=True))
        return out, {path: after.get(path, value) for path, value in params.items()}

    def predict(params, x):
        return run(params, x, False, {id(v): v.value for v in seeds})[0]

    def train(params, x, key):
        drawn = jax.random.bits(key, (max(len(seeds), 1), 2), jnp.uint32)
        return run(params, x, True, {id(v): bits for v, bits in zip(seeds, drawn, strict=False)})

    return Network(predict, train, {path: v.value for path, v in named.items()})


_READERS: Mapping[str, Callable[[Any, Any, str | None, int], Network]] = {
    "functions": _functions,
    "Linen": _linen,
    "NNX": _nnx,
    "Keras": _keras,
}


def _modes(module: Any, training: str | None) -> tuple[dict[str, bool], dict[str, bool]]:
    """Of `__call__`'s arguments and of the attributes, those that say the mode, in training."""
    arguments = list(inspect.signature(type(module).__call__).parameters)[2:]
    attributes = [
        name for name in vars(module) if name[0] != "_" and name not in ("parent", "name")
    ]
    names = MODES
    if training is not None:
        negated, name = training.startswith("not "), training.removeprefix("not ")
        names = {name: not negated and MODES.get(name, True)}
        if name not in [*arguments, *attributes]:
            raise ValueError(
                f"training must be an argument of __call__ or an attribute of "
                f"{type(module).__name__}, got {name!r}, expected one of "
                f"{', '.join([*arguments, *attributes])}"
            )
    found = {name: mode for name, mode in names.items() if name in arguments}
    if found:
        return found, {}
    return {}, {name: mode for name, mode in names.items() if name in attributes}


def _check_mode(module: Any, training: str | None, network: Network, shapes: Any) -> None:
    """Raises where a BatchNorm never learns, for nothing tells the module that it is trained."""
    is_nnx = isinstance(module, nnx.Module)
    averages = nnx.state(module, nnx.BatchStat) if is_nnx else network.params.get("batch_stats")
    if averages and not any(_modes(module, training)) and not statistics(network, shapes):
        raise ValueError(
            f"training must name what puts {type(module).__name__} into training mode, for its "
            f"running statistics stay as they are, got None and none of {', '.join(MODES)}"
        )


def _set(names: Mapping[str, bool], mode: bool) -> dict[str, bool]:
    """The values of the names in training, or in evaluation."""
    return {name: value == mode for name, value in names.items()}


def _traced(what: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return fn(*arguments)
    except Exception as error:
        raise ValueError(f"given must run as {what}, got {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _described(given: Any) -> str:
    if not isinstance(given, tuple):
        return type(given).__name__
    return f"({', '.join(type(part).__name__ for part in given)})"
