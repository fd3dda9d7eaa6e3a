"""What a run has so far, and how its stages follow each other: each is done once and kept."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from hybrid_jax import core, models
from hybrid_jax.quantization import Range
from hybrid_jax.recipes.cut import Cut, Model, with_functions
from hybrid_jax.report.formatting import duration


class State(NamedTuple):
    """What a run has made.

    Attributes:
      parent: The dense network.
      experts: Its compressed networks: one, or those of a mixture.
      before: The experts as they were before they were trained together with the gate.
      gate: What chooses among the experts.
      thresholds: Of a cascade: how sure each expert but the last must be to answer.
      share: Of a cascade: how much of the answer before a later one keeps.
      singles: {name: network} of the controls.
      facts: What else stages tell each other and the report: JSON.
    """

    parent: Model
    experts: tuple[Model, ...] = ()
    before: tuple[Model, ...] = ()
    gate: Model | None = None
    thresholds: tuple[float, ...] = ()
    share: float = 0.0
    singles: Mapping[str, Model] = {}
    facts: Mapping[str, Any] = {}


class Stage(NamedTuple):
    """A stage: a name, a function from state to state, and how many steps it trains."""

    name: str
    run: Callable[[State], State]
    steps: int = 0


def named(stage: Stage | Callable[[State], State]) -> Stage:
    """Returns a stage; a function alone is named by its `__name__`."""
    return stage if isinstance(stage, Stage) else Stage(stage.__name__, stage)


def run(
    stages: Sequence[Stage | Callable[[State], State]],
    state: State,
    workdir: core.Path,
    sources: Callable[[str], models.Network] | None = None,
    whose: str = "",
) -> State:
    """Returns the state after all stages; those that an earlier process has done are not run.

    After each, the state is written to `workdir`/stages as one file, with a digest of every array.

    Args:
      stages: A function alone is named by its `__name__`.
      state: That of the parent.
      workdir: Where the run lies.
      sources: (origin) -> network of what is not cut from the parent: 'gate', 'member 0', ….
      whose: What tells the run from others; their files are taken for damaged.

    Raises:
      ValueError: If two stages have one name, or a stage returns no `State`.
    """
    stages = list(map(named, stages))
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"stages must have names of their own, got {name!r} twice")
    files = _files(stages, workdir)
    state, first = _resumed(files, state, sources, whose)
    begun = time.monotonic()
    for i, stage in enumerate(stages[first:], first):
        _tell(stages, i, first, time.monotonic() - begun)
        start = time.perf_counter()
        state = stage.run(state)
        if not isinstance(state, State):
            raise ValueError(
                f"stage {stage.name!r} must return a State, got {type(state).__name__}"
            )
        seconds = dict(state.facts.get("seconds", {}))
        seconds[stage.name] = round(time.perf_counter() - start, 2)
        state = state._replace(facts={**state.facts, "seconds": seconds})
        save(files[i], state, whose)
    return state


def finished(
    stages: Sequence[Stage | Callable[[State], State]],
    state: State,
    workdir: core.Path,
    sources: Callable[[str], models.Network] | None = None,
    whose: str = "",
) -> State | None:
    """Returns the state after all stages, if they are done; arguments as of `run`."""
    *_, last = _files(list(map(named, stages)), workdir)
    return load(last, state.parent.cut, sources, whose) if last.exists() else None


def _files(stages, workdir) -> list[core.Path]:
    return [
        workdir / "stages" / f"{i:02}_{stage.name}.safetensors" for i, stage in enumerate(stages)
    ]


def _resumed(files, state, sources, whose) -> tuple[State, int]:
    """The state of the last file that is whole, and how many stages it has behind it."""
    for i in reversed(range(len(files))):
        try:
            if files[i].exists():
                state = load(files[i], state.parent.cut, sources, whose)
                core.say(f"{i + 1} of {len(files)} stages are done")
                return state, i + 1
        except core.Damaged as error:
            core.say(f"{error}; its stage is done again")
    return state, 0


def _tell(stages, i, first, seconds) -> None:
    """Says on stderr which stage begins, its share of the run, and about how long is left."""
    steps = [stage.steps for stage in stages]
    done, left = sum(steps[first:i]), sum(steps[i:])
    share = f", {steps[i] / sum(steps):.0%} of the training" if steps[i] else ""
    rest = f", about {duration(seconds * left / done)} left" if done and left else ""
    core.say(f"stage {i + 1} of {len(stages)}: {stages[i].name}{share}{rest}")


def save(path: core.Path, state: State, whose: str = "") -> None:
    """Writes a state as one safetensors file: its arrays, their digests, and the rest as JSON.

    It is that of the run `whose`, after the stage that the file is named after.
    """
    arrays: dict[str, np.ndarray] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {str(key): strip(value) for key, value in node.items()}
        if isinstance(node, np.ndarray | jax.Array | np.generic):
            name = str(len(arrays))
            arrays[name] = np.array(node, order="C")
            return {"array": name}
        if isinstance(node, list | tuple):
            return [strip(value) for value in node]
        return node

    tree = strip(
        {
            "whose": [whose, path.name],
            "parent": _stored(state.parent),
            "experts": list(map(_stored, state.experts)),
            "before": list(map(_stored, state.before)),
            "gate": state.gate and _stored(state.gate),
            "thresholds": state.thresholds,
            "share": state.share,
            "singles": {name: _stored(model) for name, model in state.singles.items()},
            "facts": state.facts,
        }
    )
    digests = {name: core.digest(array) for name, array in arrays.items()}
    text = json.dumps(tree)
    digests["state"] = hashlib.sha256(text.encode()).hexdigest()
    metadata = {"state": text, "digests": json.dumps(digests)}
    core.write_atomically({path: safetensors.numpy.save(arrays, metadata)})


def load(
    path: core.Path,
    parent: Cut,
    sources: Callable[[str], models.Network] | None = None,
    whose: str = "",
) -> State:
    """Reads what `save` wrote; `parent` has the functions of the dense network.

    Raises:
      core.Damaged: If the file is damaged, or of another run or stage.
    """
    try:
        content = path.read_bytes()
        arrays = safetensors.numpy.load(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        metadata = json.loads(header)["__metadata__"]
        text, digests = metadata["state"], json.loads(metadata["digests"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise core.Damaged(f"{path} must be the state of a stage, got: {error}") from None
    found = {name: core.digest(array) for name, array in arrays.items()}
    if found | {"state": hashlib.sha256(text.encode()).hexdigest()} != digests:
        raise core.Damaged(f"{path} must be as it was written, got something else: it is damaged")
    tree = json.loads(text)
    run, stage = tree.pop("whose", (whose, path.name))  # that of an earlier version does not say
    if (run, stage) != (whose, path.name):
        raise core.Damaged(f"{path} must be of this run, got stage {stage} of another")

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            if set(node) == {"array"}:
                return arrays[node["array"]]
            return {key: fill(value) for key, value in node.items()}
        return [fill(value) for value in node] if isinstance(node, list) else node

    def model(stored: dict) -> Model:
        origin = stored.get("origin", "")
        return _model(stored, sources(origin) if origin else parent.source, parent.images)

    tree = fill(tree)
    lists = [list(map(model, tree[name])) for name in ("experts", "before")]
    singles = {name: model(stored) for name, stored in tree["singles"].items()}
    gate = tree["gate"] and model(tree["gate"])
    every = [m for m in (*lists[0], *lists[1], *singles.values(), gate) if m and m.has_function]
    found = iter(with_functions(every) if every else ())

    def ready(own: Model) -> Model:
        return next(found) if own.has_function else own

    made, before = (tuple(map(ready, own)) for own in lists)
    singles = {name: ready(own) for name, own in singles.items()}
    return State(
        model(tree["parent"]),
        made,
        before,
        gate and ready(gate),
        tuple(tree["thresholds"]),
        tree.get("share", 0.0),
        singles,
        tree["facts"],
    )


def _stored(model: Model) -> dict[str, Any]:
    """A model without its functions."""
    ranges = {
        name: {role: [span.low, span.high] for role, span in own.items()}
        for name, own in model.ranges.items()
    }
    return {
        "variables": core.flatten_paths(model.cut.variables),
        "kept": model.cut.kept,
        "bits": model.cut.bits,
        "origin": model.cut.origin,
        "learning": model.cut.learning,
        "masks": model.masks,
        "ranges": ranges,
        "weights": model.weights,
        "facts": model.facts,
    }


def _model(stored: dict, source: models.Network, images: jax.Array) -> Model:
    """A model of what `_stored` returned, still without its function."""
    flat = jax.tree.map(jax.numpy.asarray, stored["variables"])
    variables = core.map_with_path(lambda path, _: flat[path], source.params)
    kept = {path: tuple(axes) for path, axes in stored["kept"].items()}
    ranges = {
        name: {role: Range(*map(jax.numpy.asarray, span)) for role, span in own.items()}
        for name, own in stored["ranges"].items()
    }
    masks, weights = jax.tree.map(jax.numpy.asarray, (stored["masks"], stored["weights"]))
    told = {"origin": stored.get("origin", ""), "learning": stored.get("learning", {})}
    cut = Cut(source, images, variables, kept, stored["bits"], **told)
    return Model(cut, masks, ranges, weights, None, stored["facts"])
