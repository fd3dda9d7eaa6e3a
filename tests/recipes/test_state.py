"""States on disk: equal to the bit, and a damaged one is named."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, models
from hybrid_jax import program as p
from hybrid_jax.quantization import Range
from hybrid_jax.recipes import ptq, state
from hybrid_jax.recipes.cut import Cut, Model, deployed, with_functions


@pytest.fixture(scope="module")
def parent():
    """A layer of 3 inputs and 4 outputs, and one of 4 and 2."""
    params = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.linspace(-1, 1, 8).reshape(4, 2)}
    network = models.Network(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], None, params)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((16, 3)), jnp.float32)
    return Model(Cut(network, images, params))


@pytest.fixture(scope="module")
def made(parent):
    """A state with a network that is cut, quantized and deployed, and one of sites only."""
    kept = {"a": (np.arange(3), np.array([0, 2])), "b": (np.array([0, 2]), np.arange(2))}
    small = {"a": parent.cut.variables["a"][:, ::2], "b": parent.cut.variables["b"][::2]}
    cut = Cut(parent.cut.source, parent.cut.images, small, kept).with_bits(4, 8, 4)
    spans = {
        name: {
            "weight": Range(jnp.full((1, n), -9.0), jnp.full((1, n), 9.0)),
            "activation": Range(jnp.float32(-3), jnp.float32(30)),
        }
        for name, n in (("a", 2), ("b", 2))
    }
    masks = {"a": jnp.array([[True, False], [True, True], [True, True]])}
    sites = Model(cut, masks, spans, facts={"macs": [20, 10]})
    whole = Model(cut, masks, spans)
    (ready,) = with_functions([deployed(whole)])
    return state.State(
        parent, (ready,), (sites,), None, (0.5,), 0.25, {"one": ready}, {"seconds": 1.5}
    )


def test_a_state_comes_back_to_the_bit(parent, made, tmp_path):
    path = tmp_path / "stages" / "00.safetensors"
    state.save(path, made)
    back = state.load(path, parent.cut)
    for ours, theirs in zip(
        (*made.experts, *made.before, made.singles["one"], made.parent),
        (*back.experts, *back.before, back.singles["one"], back.parent),
        strict=True,
    ):
        for name in ("masks", "ranges", "weights"):
            chex.assert_trees_all_equal(getattr(ours, name), getattr(theirs, name))
        chex.assert_trees_all_equal(ours.cut.variables, theirs.cut.variables)
        assert dict(ours.facts) == theirs.facts
        assert ours.cut.bits == theirs.cut.bits
    assert (back.thresholds, back.share, back.facts) == ((0.5,), 0.25, {"seconds": 1.5})
    x = made.parent.cut.images
    model = back.experts[0]
    np.testing.assert_array_equal(
        model.fn(model.params, x), made.experts[0].fn(made.experts[0].params, x)
    )


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9, 0.99])
def test_a_flipped_bit_is_named(parent, made, tmp_path, position):
    path = tmp_path / "00.safetensors"
    state.save(path, made)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00\.safetensors must be"):
        state.load(path, parent.cut)


def test_stages_run_once_and_in_order(parent, tmp_path):
    ran = []

    def note(name):
        def stage(before):
            ran.append(name)
            facts = {**before.facts, "ran": [*before.facts.get("ran", []), name]}
            return before._replace(facts=facts)

        return state.Stage(name, stage)

    start = state.State(parent)
    first = state.run([note("a"), note("b")], start, tmp_path)
    assert first.facts["ran"] == ["a", "b"]
    longer = state.run([note("a"), note("b"), note("c")], start, tmp_path)
    assert longer.facts["ran"] == ["a", "b", "c"]
    assert ran == ["a", "b", "c"]
    with pytest.raises(ValueError, match="names of their own, got 'a' twice"):
        state.run([note("a"), note("a")], start, tmp_path / "other")
    with pytest.raises(ValueError, match="stage 'nothing' must return a State, got NoneType"):
        state.run([state.Stage("nothing", lambda before: None)], start, tmp_path / "other")


def test_a_damaged_file_is_made_again(parent, tmp_path, capsys):
    ran = []

    def note(name):
        def stage(before):
            ran.append(name)
            return before

        return state.Stage(name, stage)

    stages, start = [note("a"), note("b"), note("c")], state.State(parent)
    state.run(stages, start, tmp_path)
    a, b, c = sorted((tmp_path / "stages").iterdir())
    b.unlink()
    state.run(stages, start, tmp_path)
    assert ran == ["a", "b", "c"]  # the last one says all
    c.write_bytes(c.read_bytes()[:100])
    capsys.readouterr()
    state.run(stages, start, tmp_path)
    assert ran == ["a", "b", "c", "b", "c"]
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith(f"{c} must be the state of a stage, got: ")
    assert told.endswith("; its stage is done again")
    assert state.load(a, parent.cut).facts.keys() == {"seconds"}


def test_a_state_of_another_run_or_stage_is_not_taken(parent, made, tmp_path):
    path = tmp_path / "00_a.safetensors"
    state.save(path, made, "ours")
    path.rename(tmp_path / "01_b.safetensors")
    state.save(path, made, "ours")
    for other, whose in ((path, "theirs"), (tmp_path / "01_b.safetensors", "ours")):
        with pytest.raises(
            core.Damaged, match=rf"{other.name} must be of this run, got stage 00_a"
        ):
            state.load(other, parent.cut, whose=whose)
    assert state.load(path, parent.cut, whose="ours").thresholds == (0.5,)


def test_a_run_is_finished_when_its_last_stage_is(parent, tmp_path):
    stages = [state.Stage("a", lambda before: before), state.Stage("b", lambda before: before)]
    start = state.State(parent)
    state.run(stages[:1], start, tmp_path)
    assert state.finished(stages, start, tmp_path) is None
    state.run(stages, start, tmp_path)
    assert state.finished(stages, start, tmp_path).facts.keys() == {"seconds"}


def test_an_equalized_network_is_rebuilt_from_its_weights(parent, tmp_path):
    # Its plan is that of the network as it was: of what was equalized only the weights are kept.
    cut = parent.cut.with_bits(8, 8, 8)
    model = ptq.equalize(ptq.quantized(parent, cut.bits))
    before = parent.cut.network.predict(parent.cut.variables, parent.cut.images)
    program = model.cut.plan.replace(model.weights).program
    np.testing.assert_allclose(p.run(program)(parent.cut.images), before, rtol=1e-4)
