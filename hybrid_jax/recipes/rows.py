"""What a run has made, on the test images, which nothing reads before: a row for each model."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import cost, experts
from hybrid_jax import program as p
from hybrid_jax.program.memory import plan
from hybrid_jax.recipes import cascade, controls, ptq
from hybrid_jax.recipes.controls import EQUAL, cost_of
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.gate import check_fitted
from hybrid_jax.recipes.state import State
from hybrid_jax.recipes.task import Task
from hybrid_jax.report import Row


class Shipped(NamedTuple):
    """What can be written for devices: its inference graph, and its outputs on the test images."""

    program: p.Program | p.Choice
    outputs: np.ndarray


class Evaluated(NamedTuple):
    """The rows of a run, what can be shipped by its name, and facts for the report."""

    rows: list[Row]
    shipped: dict[str, Shipped]
    facts: dict[str, Any]


def evaluate(task: Task, state: State, k: int = 2) -> Evaluated:
    """Returns the rows of everything that a run has made; `k` is that of the top-k mixture."""
    found = _Rows(task)
    dense = state.parent
    outputs = task.outputs(dense.cut.network.predict, dense.cut.variables, task.judged)
    found.add("parent", "parent", outputs, cost_of(dense), program=dense.cut.program)
    if not _is_int8(state):
        int8 = int8_parent(task, state)
        found.add_model("parent in int8", "parent_int8", int8, note="without training")
    if len(state.experts) == 1:
        found.add_model("compressed", "single", state.experts[0], note=_note(state.experts[0]))
    elif state.experts:
        _mixture(found, task, state, k)
    for name, model in state.singles.items():
        equal = EQUAL.get(name)
        found.add_model(name, "control", model, note=_note(model), rival=True, equal=equal)
    return Evaluated(found.rows, found.shipped, found.facts)


def int8_parent(task: Task, state: State) -> Any:
    """Returns the parent in integers, without training.

    Its kernels have 7 bits: stored in int8 they are no larger than those of 8, for which an ONNX
    file that is right on every x86 needs slower kernels.
    """
    bits = state.parent.cut.with_bits(7, 8, 7).bits
    return ptq.calibrate(task, ptq.quantized(state.parent, bits), 512, "minmax")


class _Rows:
    """Rows in the making."""

    def __init__(self, task: Task):
        self.task = task
        self.rows: list[Row] = []
        self.shipped: dict[str, Shipped] = {}
        self.facts: dict[str, Any] = {"confusion": {}}

    def add(self, name, role, outputs, price, program=None, **more):
        """Adds a row of outputs on the test images, and of what it costs."""
        test = self.task.judged
        score = self.task.score(outputs, test)
        costs = price if isinstance(price, dict) else _price(price)
        whole = self.task.objective.metric == "accuracy" and score.dtype == bool
        correct = score.astype(int).tolist() if whole else np.round(score, 6).tolist()
        memory = program and max(plan(part).size for part in program.parts)
        row = Row(name, role, float(score.mean()), correct, memory=memory, **costs, **more)
        self.rows.append(row)
        if self.task.splits.num_classes and outputs.ndim == 2 and role != "bound":
            self.facts["confusion"][name] = _confusion(outputs, test.labels)
        if program is not None:
            self.shipped[name] = Shipped(program, outputs)

    def add_model(self, name, role, model, **more):
        """Adds a row of a deployed model."""
        outputs = self.task.outputs(model.fn, model.params, self.task.judged)
        self.add(name, role, outputs, cost_of(model), model.encoded(), **more)


def _mixture(found: _Rows, task: Task, state: State, k: int) -> None:
    """Adds the experts, what chooses among them, and the controls that take no training."""
    test, made = task.judged, state.experts
    outputs = np.stack([task.outputs(model.fn, model.params, test) for model in made])
    prices, programs = [cost_of(model) for model in made], [model.encoded() for model in made]
    best, source = best_expert(task, state)
    for e, model in enumerate(made):
        own = programs[e] if source is made and e == best else None
        found.add(f"expert {e}", "expert", outputs[e], prices[e], own, note=_note(model))
    each, all_of_them = [_price(price) for price in prices], np.ones(len(made))

    def add(name, role, weights, used, worst=1, gate=_NOTHING, program=None, **more):
        costs = _mixed(each, gate, used, worst)
        found.add(name, role, np.asarray(_combine(outputs, weights)), costs, program, **more)

    if state.gate:
        check_fitted(made, state.gate)
        logits = jnp.asarray(task.outputs(state.gate.fn, state.gate.params, test))
        gate, program = (
            _price(cost_of(state.gate)),
            p.Mixture(state.gate.encoded(), tuple(programs)),
        )
        for n in dict.fromkeys((1, k)):
            weights = experts.top_k(n)(logits).weights
            role, own = ("mixture", program) if n == 1 else ("control", None)
            used = np.asarray((weights > 0).mean(0))
            add(f"top-{n} mixture", role, weights, used, n, gate, own, note=f"{n} of them run")
        soft = experts.soft()(logits).weights
        add("soft mixture", "control", soft, all_of_them, len(made), gate, note="all of them run")
        found.facts |= _gate_use(task, logits)
        random = experts.random()(logits, task.key("random gate")).weights
        used = np.asarray(random.mean(0))
        add("random gate", "control", random, used, note="not deployable", rival=True)
    else:
        answered = controls.answered(task, state, outputs)
        used = controls.runs_of(answered)
        note = f"{', '.join(f'{part:.0%}' for part in used[1:])} of the images went on"
        costs = _mixed(each, _NOTHING, used, len(made))
        own = state.thresholds, state.share, cascade.confidence(task)
        program = p.Cascade(tuple(programs), *own)
        found.add("cascade", "mixture", np.asarray(answered.logits), costs, program, note=note)
    alike = jnp.full((len(outputs[0]), len(made)), 1 / len(made))
    note = "of their outputs: all of them run"
    add("average of all experts", "control", alike, all_of_them, len(made), note=note)
    if task.splits.label_kind == "classes":
        oracle = experts.oracle(jnp.asarray(outputs), jnp.asarray(test.labels))
        note = "not deployable: reads the label"
        add("oracle gate", "bound", oracle, np.asarray(oracle.mean(0)), note=note)
        found.facts["disagreement"] = jax.jit(experts.disagreement)(outputs).tolist()
    if source is not made:
        note = f"expert {best} before joint training, by validation"
        found.add_model("best expert", "expert", source[best], note=note)


def best_expert(task: Task, state: State) -> tuple[int, Sequence[Any]]:
    """Returns the index of the expert that is best on validation images, and whose it is.

    Of those after joint training and before; of equals the first, and one after.
    """
    validation = task.splits.validation
    sets = [made for made in (state.experts, state.before) if made]
    means = [task.scores(made, validation).mean(-1) for made in sets]
    which = int(np.argmax([own.max() for own in means]))
    return int(means[which].argmax()), sets[which]


_NOTHING = {"parameters_total": 0, "parameters_active": 0, "macs": 0, "bops": 0}
_combine = jax.jit(experts.combine)


def _price(counted: cost.Cost) -> dict[str, float]:
    kept = counted.nonzero
    return {
        "parameters_total": kept,
        "parameters_active": kept,
        "macs": counted.macs,
        "bops": counted.bops,
    }


def _mixed(each: Sequence[dict], gate: dict, used: np.ndarray, worst: int) -> dict[str, float]:
    """All experts and the gate are stored; `used` (E,) is how often each expert runs."""
    mean = {
        name: float(sum(u * own[name] for u, own in zip(used, each, strict=True)) + gate[name])
        for name in ("parameters_active", "macs", "bops")
    }
    total = sum(own["parameters_total"] for own in (*each, gate))
    dearest = sorted((own["macs"] for own in each), reverse=True)[:worst]
    return mean | {"parameters_total": total, "macs_worst": sum(dearest) + gate["macs"]}


def _note(model: Any) -> str:
    spec = model.facts.get("spec")
    bits = sorted({own["weight"] for own in model.cut.bits.values()})
    text = f"{' and '.join(map(str, bits))}-bit weights"
    if spec is None:
        return text
    removed = model.facts.get("removed", spec["sparsity"])  # an earlier version did not say
    return f"{removed:.0%} of channels removed by {spec['criterion']}, {text}"


def _is_int8(state: State) -> bool:
    """Whether what was made is the parent in int8 itself."""
    if len(state.experts) != 1 or state.experts[0].cut.kept:
        return False
    return {b for own in state.experts[0].cut.bits.values() for b in own.values()} == {8}


def _confusion(outputs: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Counts (N, N) of images by their class (down) and the answer."""
    classes = outputs.shape[-1]
    answers = outputs.argmax(-1)
    counts = np.bincount(labels * classes + answers, minlength=classes**2)
    return counts.reshape(classes, classes).tolist()


def _gate_use(task: Task, gate_logits: jax.Array) -> dict[str, Any]:
    """How the top-1 mixture uses its experts, by class and in all, and whether it has collapsed."""
    chosen, test = experts.top_k(1)(gate_logits).weights, task.judged
    share = experts.usage(chosen)
    use = {"share": share.tolist(), "entropy": float(experts.usage_entropy(share))}
    use |= {"collapsed": bool(experts.collapsed(share))}
    use["unused"] = np.flatnonzero(experts.unused(share)).tolist()
    if task.splits.label_kind == "classes":
        labels = jnp.asarray(test.labels)
        use["usage"] = experts.usage_per_class(chosen, labels, task.splits.num_classes).tolist()
    return {"gate": use}


def layers(state: State) -> list[dict[str, Any]]:
    """Returns width, zeros and bits of every site of the networks that were made."""

    @functools.cache
    def wide(origin):
        cut = next(model.cut for model in state.experts if model.cut.origin == origin)
        return {site.name: site.width for site in cost_of(Model(cut.whole)).sites}

    return [
        {
            "model": f"expert {e}" if len(state.experts) > 1 else "compressed",
            "site": site.name,
            "width": site.width,
            "dense_width": wide(model.cut.origin)[site.name],
            "sparsity": site.sparsity,
            "weight_bits": site.weight_bits,
            "activation_bits": site.activation_bits,
        }
        for e, model in enumerate(state.experts)
        for site in cost_of(model).sites
    ]
