"""What the library has by name, by a key of the configuration: each name computes its own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import contrib, core, data, experts, pruning, quantization, recipes, training
from hybrid_jax.quantization import learning
from hybrid_jax.recipes import choices, controls, gate, pipeline, prune, ptq, state, train, within
from hybrid_jax.recipes.config import single_spec
from tests.recipes import strangers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(**changes of config.experts) -> (task, config) of two convolutions of 8 and 12."""
    images, labels = strangers.digits()
    splits = data.take((images[:200], labels[:200]))
    given = strangers.functions()

    def make(precision="float32", **changes):
        config = recipes.default_config()
        config.precision = precision
        config.effort = "finetune"
        config.experts.steps, config.experts.batch_size, config.experts.deployed = 6, 8, 0.0
        config.experts.update(**changes)
        path, read = tmp_path_factory.mktemp("run"), recipes.read(config)
        return pipeline.prepare(given, splits, read, path, recipes.EFFORTS["finetune"]).task, read

    return make


def pruned(task, config):
    (made,) = prune.prune(task, task.parent, [single_spec(config)], jax.random.key(0))
    return made


def trained(task, config):
    made = pruned(task, config)
    (found,) = train.compress(task, task.parent, [made], "experts", config.experts, 0.5)
    return found


def test_the_first_steps_are_in_floats(run):
    task, config = run(floats=0.5, optimizer="sgd")
    trained(task, config)
    records = training.read_records(task.workdir / "records.jsonl")
    steps = {record["name"]: record["step"] for record in records}
    assert steps == {"experts_floats": 3, "experts": 3}


def test_precision_is_that_of_products_in_training(run):
    """What enters them is rounded last, so that ranges are of floats of 32 bits."""
    task, config = run(precision="bfloat16")
    seen = []

    def fit(name, forwards, params, states, optimizers, *, steps):
        seen.extend(zip(forwards, params, states, strict=True))
        return list(zip(params, states, strict=True))

    made, tx = [pruned(task, config)], optax.sgd(0.1)
    train.in_floats(task, made, "experts_floats", config.experts, fit, tx, 1)
    train.at_sites(task, made, "experts", config.experts, fit, tx, 1)
    floats, sites = (
        str(jax.make_jaxpr(forward)(*parts, task.images[:2], jax.random.key(0)))
        for forward, *parts in seen
    )
    for text in (floats, sites):
        lines = [line for line in text.splitlines() if "conv_general" in line or "dot_gen" in line]
        assert len(lines) == 3
        assert all("bf16" in line.split("=")[0] for line in lines)
    rounded = [line for line in sites.splitlines() if "= round[" in line]
    assert rounded
    assert all("f32" in line.split("=")[0] for line in rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained(task, config).params)} == {
        jnp.dtype("float32")
    }


def widths(model):
    return [model.cut.variables[name].shape[-1] for name in ("stem", "body")]


def zeros(masks):
    return {path: int((~mask).sum()) for path, mask in masks.items()}


def test_allocations_of_channels_by_hand(run):
    # Of 8 and 12 a half. erk: densities as (3 + 3 + 1 + 8) / 72 = 0.208 and (3 + 3 + 8 + 12) / 864
    # = 0.0301; 10 channels as 0.208 · 8 : 0.0301 · 12 = 1.667 : 0.361, so the first takes all 8.
    assert widths(pruned(*run(allocation="uniform"))) == [4, 6]
    assert widths(pruned(*run(allocation="erk"))) == [8, 2]
    task, config = run(allocation="global")
    (scores,) = prune.channel_scores(task, task.parent, [single_spec(config)], [jax.random.key(0)])
    best = np.sort(np.concatenate([np.asarray(own) for own in scores.values()]))[-10]
    expected = [int((np.asarray(scores[name]) >= best).sum()) for name in ("stem", "body")]
    assert widths(pruned(task, config)) == expected
    assert sum(expected) == 10


@pytest.mark.parametrize("name", pruning.ALLOCATIONS)
def test_allocations_of_zeros_are_planned_as_they_are_made(run, name):
    task, config = run(
        sparsity=0.25, weight_sparsity=0.5, allocation=name, weight_allocation=name, weight_bits=3
    )
    made, spec = pruned(task, config), single_spec(config)
    total = sum(mask.size for mask in made.masks.values())
    lost = zeros(made.masks)
    if name == "uniform":
        assert lost == {path: (mask.size + 1) // 2 for path, mask in made.masks.items()}
    else:
        assert sum(lost.values()) == (total + 1) // 2
        assert lost["body"] > made.masks["body"].size // 2  # the largest
    (scores,) = prune.channel_scores(task, task.parent, [spec], [jax.random.key(0)])
    keep = prune.kept_channels(task.parent.cut.graph, spec, scores)
    assert controls.planned_cost(task.parent.cut, spec, keep) == controls.cost_of(made)


ZEROS = {
    # Of 72, 864 and 120 weights a half.
    "unstructured": {"stem": 36, "body": 432, "head/w": 60},
    # Of 8 and 12 channels a half: what makes them, and what reads them.
    "channels": {"stem": 4 * 9, "body": 864 - 4 * 6 * 9, "head/w": 6 * 10},
}


@pytest.mark.parametrize("name", pruning.GRANULARITIES)
def test_zeros_are_of_whole_units(run, name):
    """At the start, and where a schedule brings them in."""
    asked = {"sparsity": 0.0, "weight_sparsity": 0.5, "weight_granularity": name}
    task, config = run(**asked)
    made, spec = pruned(task, config), single_spec(config)
    assert zeros(made.masks) == ZEROS[name]
    whole = {group.name: np.ones(group.size, bool) for group in task.parent.cut.graph.groups}
    planned = controls.planned_cost(task.parent.cut, spec, whole)
    assert planned == controls.cost_of(made)
    before = pruned(*run(**asked, schedule="one_shot"))
    settings = dataclasses.replace(config.experts, schedule="one_shot")
    params = {"params": core.flatten_paths(before.cut.variables), "ranges": {}}
    tx = train.sparsified(optax.sgd(0.01), before, params, settings, steps=2)
    update, opt_state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        updates, opt_state = update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    found = {path: int((params["params"][path] == 0).sum()) for path in ZEROS[name]}
    assert found == ZEROS[name]


def test_a_granularity_that_a_network_does_not_have_is_told_at_the_start(run, monkeypatch):
    monkeypatch.setitem(pruning.GRANULARITIES, "2:4", contrib.GRANULARITIES["n_m"])
    message = "weight_granularity must be one that the network has, .*got '2:4': m must divide"
    with pytest.raises(ValueError, match=message):
        run(weight_sparsity=0.5, weight_granularity="2:4")  # one channel goes into the stem


def test_an_allocation_of_the_users_own(run, monkeypatch):
    """It spares every unit of the network but those of the last kernel, or group, by name."""

    def last(graph):
        def allocate(units, paths, sparsity, at_least):
            whole = {name: jnp.ones(rows.shape, bool) for name, rows in units.items()}
            name = max(paths, key=paths.get)
            own = {name: units[name]}
            return whole | pruning.uniform().allocate(own, paths, sparsity, at_least)

        return pruning.Allocation("last", allocate)

    monkeypatch.setitem(pruning.ALLOCATIONS, "last", last)
    task, config = run(allocation="last", weight_allocation="last", weight_sparsity=0.5)
    made = pruned(task, config)
    assert widths(made) == [4, 12]
    assert zeros(made.masks) == {"stem": 18, "body": 0, "head/w": 0}


@pytest.mark.parametrize("name", pruning.RECOVERIES)
@pytest.mark.parametrize("sparsities", [(0.5, 0.0), (0.0, 0.6), (0.5, 0.5)])
def test_a_recovery_answers_for_what_is_removed(run, name, sparsities):
    """Channels, zeros or both: outputs are nearer to the parent's, and all the same is removed."""
    asked = dict(zip(("sparsity", "weight_sparsity"), sparsities, strict=True))
    task, _ = run(**asked)
    expected = task.parent.cut.network.predict(task.parent.cut.variables, task.images)
    plain, own = (pruned(*run(**asked, recovery=key)) for key in ("", name))
    off = [
        float(jnp.square(m.cut.network.predict(m.cut.variables, task.images) - expected).mean())
        for m in (plain, own)
    ]
    assert off[1] < 0.8 * off[0]
    assert widths(own) == widths(plain)
    assert zeros(own.masks) == zeros(plain.masks)
    assert own.facts["difference"] < 1e-4
    for path, mask in own.masks.items():
        assert not np.any(np.asarray(core.flatten_paths(own.cut.variables)[path])[~mask])


@pytest.mark.parametrize("name", pruning.SCHEDULES)
def test_zeros_come_in_over_the_first_half_as_a_schedule_says(run, name):
    task, config = run(weight_sparsity=0.5, schedule=name)
    before = pruned(task, config)
    assert set(zeros(before.masks).values()) == {0}
    params = {"params": core.flatten_paths(before.cut.variables), "ranges": {"low": jnp.zeros(3)}}
    tx = train.sparsified(optax.sgd(0.01), before, params, config.experts, steps=8)
    update, opt_state, schedule = jax.jit(tx.update), tx.init(params), pruning.SCHEDULES[name]
    for step in range(8):
        updates, opt_state = update(jax.tree.map(jnp.ones_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
        for path, mask in before.masks.items():
            expected = math.floor(float(schedule(0.5, 4)(step)) * mask.size + 0.5)
            assert int((params["params"][path] == 0).sum()) == expected
    assert float(params["ranges"]["low"][0]) == pytest.approx(-0.08)


def test_zeros_come_in_while_a_network_trains_and_stay(run):
    task, config = run(
        weight_sparsity=0.5, schedule="cubic", weight_allocation="erk", deployed=0.34
    )
    made = trained(task, config)
    dense, spec = task.parent.cut, single_spec(config)
    total = sum(mask.size for mask in made.masks.values())
    assert sum(zeros(made.masks).values()) == total // 2
    at_start = prune.weight_masks(made.cut.graph, made.cut.variables, 0.5, config.experts)
    assert zeros(made.masks) == zeros(at_start)
    for path, mask in made.masks.items():
        kernel = core.flatten_paths(made.cut.variables)[path]
        np.testing.assert_array_equal(np.asarray(kernel) != 0, mask)
    # The last part of training, on the deployed network, left them where they were.
    kept = [int((own["kernel"] == 0).sum()) for own in made.weights.values()]
    assert sum(kept) == total // 2
    keep = {group.name: np.zeros(group.size, np.float32) for group in dense.graph.groups}
    keep = prune.kept_channels(dense.graph, spec, keep)
    assert controls.planned_cost(dense, spec, keep) == controls.cost_of(made)


def quantizers(model, role):
    return {getattr(site, role).learning for site in model.cut.spec.sites}


@pytest.mark.parametrize("name", learning.of_activations())
def test_activations_are_learned_as_the_key_says(run, name):
    task, config = run(activation_learning=name)
    made = pruned(task, config)
    assert (quantizers(made, "weight"), quantizers(made, "activation")) == ({"lsq"}, {name})
    planned = {slot.quantizer.learning for slot in made.cut.plan.stored.values() if slot.site}
    assert planned == {name}


def test_fixed_ranges_stay_as_calibrated_and_are_kept_with_the_state(run, tmp_path):
    task, config = run(weight_learning="fixed", activation_learning="fixed")
    start, made = pruned(task, config), trained(task, config)
    ((params, _),) = train._starts(task, [start.cut], config.experts)
    expected = quantization.edge_ranges(start.cut.plan, params["ranges"], start.cut.images)
    of_sites = {name for name, slot in made.cut.plan.stored.items() if slot.site}
    of_sites = [(name, "activation") for name in of_sites]
    for name, role in [*of_sites, *((name, "weight") for name in made.cut.plan.ranged)]:
        np.testing.assert_array_equal(*(np.stack(r[name][role]) for r in (made.ranges, expected)))
    assert len(of_sites) == 3
    state.save(tmp_path / "stage", state.State(task.parent, (made,)))
    (back,) = state.load(tmp_path / "stage", task.parent.cut).experts
    assert back.cut.spec == made.cut.spec


def test_a_learning_of_the_users_own(run, monkeypatch):
    """One whose gradient is zero: a kernel that learns by it stays as it is."""

    def nothing(x, quantizer, span, bits, count, key):
        return jax.lax.stop_gradient(quantization.fake_quant(x, quantizer.grid(span, bits), key))

    monkeypatch.setitem(learning.LEARNING, "nothing", quantization.Learning(nothing))
    task, config = run(weight_learning="nothing", weight_decay=0.0)
    before, after = (core.flatten_paths(f(task, config).cut.variables) for f in (pruned, trained))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {"head/b"}


def constant(own, images):
    return jnp.broadcast_to(own["params"], (len(images), 10))


@pytest.mark.parametrize("name", ["separable", "linear"])
def test_the_gate_is_the_one_of_the_key(run, name):
    task, config = run()
    made = [recipes.Model(None, {}, {}, own, constant) for own in jnp.eye(10)[:2]]
    settings = dataclasses.replace(config.gate, network=name, size=4, steps=2, batch_size=8)
    own = gate.learn_gate(task, None, made, settings, 0.0, "unroll")
    # Of 4×4 pixels.
    macs = {"separable": 16 * 9 * 8 + 4 * 9 * 8 + 4 * 8 * 16 + 16 * 2, "linear": 16 * 2}
    assert controls.cost_of(own).macs == macs[name]
    assert jax.jit(own.fn)(own.params, task.images[:8]).shape == (8, 2)
    started = core.flatten_paths(gate.source(task, 2, settings).params)
    for path, leaf in core.flatten_paths(own.cut.variables).items():
        assert not np.array_equal(started[path], leaf)


@pytest.mark.parametrize("name", experts.ROUTINGS)
def test_the_gate_trains_with_the_routing_of_the_key(run, name, monkeypatch):
    """What it is called with, and what weights come of that."""
    seen = []

    def spy(fns, gate_fn, routing, *rest):
        seen.append(routing)
        raise InterruptedError

    monkeypatch.setattr(experts, "mixture", spy)
    task, config = run()
    made = [recipes.Model(None, {}, {}, own, constant) for own in jnp.eye(10)[:3]]
    settings = dataclasses.replace(config.gate, routing=name, k=2, noise=3.0)
    with pytest.raises(InterruptedError):
        gate.learn_gate(task, None, made, settings, 0.0, "unroll")
    logits = jnp.array([[3.0, 2.0, 1.0]]).repeat(200, 0)
    weights = seen[0](logits, jax.random.key(0)).weights
    chosen = np.unique(np.asarray(weights > 0), axis=0).tolist()
    assert {sum(row) for row in chosen} == {3 if name == "soft" else 2 if "k" in name else 1}
    assert (len(chosen) > 1) == name.startswith("noisy")
    moved = jax.grad(lambda x: seen[0](x, jax.random.key(0)).weights[:, 0].sum())(logits)
    assert np.all(moved[:, 0] > 0)  # also where it was not chosen


@pytest.mark.parametrize("name", quantization.ROUNDINGS)
def test_kernels_are_rounded_as_the_key_says(run, name):
    task, _ = run()
    model = ptq.calibrate(
        task, ptq.quantized(task.parent, task.parent.cut.with_bits(3, 8, 3).bits), 64, "minmax"
    )
    made = ptq.round_kernels(task, model, 64, name)
    floats, rounded = (m.cut.plan.replace(m.weights).program.params for m in (model, made))
    for layer in floats:
        same = np.array_equal(floats[layer]["kernel"], rounded[layer]["kernel"])
        assert same == (name == "nearest")


def test_what_is_learned_is_as_the_key_says(tmp_path, monkeypatch):
    def task(loss, **changes):
        config = recipes.default_config()
        recipes.override(config, {"effort": "ptq", "loss": loss} | changes)
        given = strangers.functions(), data.take(strangers.digits()), recipes.read(config)
        return pipeline.prepare(*given, tmp_path, recipes.EFFORTS["ptq"]).task

    own = training.classification()._replace(metric="mine")
    monkeypatch.setitem(training.OBJECTIVES, "mine", lambda: own)
    assert [task(name).objective.metric for name in ("", "classification", "mine")] == [
        "accuracy",
        "accuracy",
        "mine",
    ]
    with pytest.raises(
        ValueError, match=r"loss must .* arrays of shapes \(2, 10\), \(2,\)"
    ) as told:
        task("regression")
    assert "\n" not in str(told.value)


def test_an_effort_of_the_users_own_is_one_by_name(run, monkeypatch):
    config = recipes.default_config()
    config.effort = "mine"
    with pytest.raises(ValueError, match=r"effort must be one of ptq, .*, got 'mine'"):
        recipes.read(config)
    monkeypatch.setitem(recipes.EFFORTS, "mine", lambda task, config: [])
    assert recipes.read(config).effort == "mine"
    recipes.check_read("mine", ["ptq.images", "gate.k"])


def test_a_budget_is_kept_by_the_damage_of_the_key(run, monkeypatch):
    """To one of the user's own that likes damage, the least bits and widths are the best."""

    def liked(outputs, reference):
        return -quantization.kl_divergence(outputs, reference)

    monkeypatch.setitem(quantization.DAMAGES, "liked", liked)
    monkeypatch.setattr(within, "_measure", lambda *_: lambda made: made[0].facts["predicted"])
    task, config = run()
    made = {}
    for damage in ("kl", "liked"):
        budget = dataclasses.replace(config.budget, bops=0.05, damage=damage)
        own = dataclasses.replace(config, budget=budget)
        (made[damage],) = within.pruned(task, task.parent, own, [single_spec(own)])
    bops = [controls.cost_of(own).bops for own in made.values()]
    assert bops[1] < bops[0] <= 0.05 * controls.cost_of(task.parent).bops


def test_bits_without_training_are_chosen_by_the_damage_of_the_key(run, monkeypatch):
    task, config = run()
    seen = []

    def spy(*arguments):
        seen.append(arguments[-1])
        raise InterruptedError

    monkeypatch.setattr(choices, "measure_bits", spy)
    budget = dataclasses.replace(config.budget, bops=0.05, damage="squared_difference")
    with pytest.raises(InterruptedError):
        within.quantized(task, task.parent, dataclasses.replace(config, budget=budget))
    assert seen == [quantization.squared_difference]


def test_damage_is_of_classes_where_there_are_any(run):
    task, config = run()
    assert within.damage_of(task, config) is quantization.kl_divergence
    values = dataclasses.replace(task, splits=dataclasses.replace(task.splits, class_names=None))
    assert within.damage_of(values, config) is quantization.squared_difference
    # (1² + 3²) / 2
    got = quantization.squared_difference(jnp.array([1.0, 3.0]), jnp.zeros(2))
    assert float(got) == 5.0
