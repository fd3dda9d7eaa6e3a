import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from networks import networks

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax import quantization as q
from hybrid_jax.quantization import deployed, reconstruction

STEM, DEPTHWISE, HEAD = (f"params/{name}/kernel" for name in ("stem", "depthwise", "head"))
KEY = jax.random.key(0)


def planned(fn, params, batches, bits, *rules, per_channel=False):
    """A plan and ranges of its edges."""
    quantizers = {"weight": q.Quantizer(bits, per_channel=per_channel), "activation": 8}
    spec = q.spec(core.trace(fn, params, *batches[0]), [*rules, (".*", quantizers)])
    made = q.plan(p.lower(fn, params, *batches[0]), spec)
    return made, q.calibrate_edges(made, batches, "mse")


def named(made):
    """{site: output} of the operations of a plan."""
    return {source.site: name for name, source in made.program.sources.items()}


def grids_of(made, ranges):
    return {n: made.kernels[n].grid(ranges[n]["weight"]) for n in made.ranged}


class Case(NamedTuple):
    """The digits network at some bits, and ways to round it."""

    made: q.Plan
    ranges: dict
    errors: Callable
    """weights -> squared errors of every edge, on images held out."""
    learned: Callable
    """blocks -> weights."""


@pytest.fixture(scope="module")
def case(digits):
    @functools.cache
    def at(bits):
        batches = [(batch,) for batch in digits.images[:512].reshape(8, 64, 8, 8, 1)]
        made, ranges = planned(digits.fn, digits.params, batches, bits, per_channel=bits == 2)
        held_out = (digits.held_out_images,)
        expected = p.edges(made.program, held_out)
        run = jax.jit(lambda params: deployed.edges(made.replace(params), ranges, held_out))

        def errors(params):
            got = run(params)
            return jax.tree.map(lambda a, b: float(jnp.mean((a - b) ** 2)), got, expected)

        @functools.cache
        def learned(blocks=()):
            steps = 1200 if bits == 2 else 300
            return q.adaround(made, ranges, batches, KEY, blocks, steps=steps)

        return Case(made, ranges, errors, learned)

    return at


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_adaround_beats_rounding_at_every_layer(case, bits):
    here = case(bits)
    nearest, learned = here.errors(here.made.program.params), here.errors(here.learned())
    for op in here.made.program.weighted:
        assert learned[op.output] < nearest[op.output], op.output


@pytest.mark.slow
def test_blocks_beat_layers_at_the_end_of_the_network(case):
    here = case(2)
    blocks = ("params/(expand|project)/kernel", "params/(depthwise|pointwise|head)/kernel")
    output = here.made.program.output
    by_block, by_layer, nearest = (
        here.errors(params)[output]
        for params in (here.learned(blocks), here.learned(), here.made.program.params)
    )
    assert by_block < by_layer < nearest


def test_kernels_lie_on_their_grids_next_to_the_float_weights(digits, case):
    here = case(4)
    rounded, floats = here.learned(), here.made.program.params
    grids = grids_of(here.made, here.ranges)
    assert len(grids) == 6
    for name, grid in grids.items():
        before, after = floats[name]["kernel"], rounded[name]["kernel"]
        np.testing.assert_allclose(after, q.dequantize(q.quantize(after, grid), grid), rtol=1e-6)
        inside = jnp.abs(before) < 7 * grid.scale
        step = jnp.abs(after - before) / grid.scale
        assert float(step[inside].max()) < 1.0001
        assert 0 < np.mean(step[inside] > 0.5) < 0.5  # Some, not most, go the other way.
    # What is stored is what was learned: encoding rounds it to itself.
    integers = q.encode(here.made.replace(rounded), here.ranges, digits.images[:8])
    for op in integers.weighted:
        kernel = op.weights.values * op.weights.scale
        np.testing.assert_allclose(kernel, rounded[op.output]["kernel"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("examples", "most"), [(2, 2), pytest.param(8, 3, marks=pytest.mark.slow)])
def test_a_drawn_network_as_one_block_is_no_worse(examples, most):
    @settings(max_examples=examples)
    @given(networks(most))
    def check(network):
        x = network.images(8)
        with jax.numpy_rank_promotion("allow"):
            made, ranges = planned(network.fn, network.params, [(x,)], 3)
            new = q.adaround(made, ranges, [(x[:4],), (x[4:],)], KEY, [".*"], steps=8)
            q_fn = jax.jit(q.as_deployed(made))
            wanted = jax.tree.leaves(network.fn(network.params, x))

            def error(params):
                got = jax.tree.leaves(q_fn(params, ranges, x))
                return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(got, wanted, strict=True))

            # Biases are rounded to steps of the sums, which is not learned.
            assert error(new) <= 1.01 * error(made.program.params)
            q.encode(made.replace(new), ranges, x)

    check()


def adaround(fn, params, x, bits=2, blocks=(), rules=(), **options):
    batches = [(x,), (x[::-1],)]
    made, ranges = planned(fn, params, batches, bits, *rules)
    new = q.adaround(made, ranges, batches, KEY, blocks, **{"steps": 30} | options)
    return made, ranges, new


@pytest.mark.slow
def test_the_same_key_gives_the_same_rounding(model):
    once, again = (adaround(model.fn, model.params, model.x, 3)[2] for _ in range(2))
    chex.assert_trees_all_equal(once, again)


def test_pruned_weights_stay_zero_and_32_bits_stay_as_they_are(model):
    params = jax.tree.map(jnp.copy, model.params)
    kernel = params["params"]["stem"]["kernel"]
    mask = np.asarray(jax.random.bernoulli(KEY, 0.5, kernel.shape))
    params["params"]["stem"]["kernel"] = jnp.where(mask, kernel, 0.0)
    made, _, new = adaround(model.fn, params, model.x, rules=[(HEAD, {"weight": 32})])
    names, floats = named(made), made.program.params
    assert not np.any(np.asarray(new[names[STEM]]["kernel"])[~mask])
    np.testing.assert_array_equal(new[names[HEAD]]["kernel"], floats[names[HEAD]]["kernel"])
    moved = new[names[DEPTHWISE]]["kernel"] != floats[names[DEPTHWISE]]["kernel"]
    assert np.any(moved)


def test_grouped_convolution_in_another_layout_and_a_kernel_used_twice():
    def fn(p, x):
        x = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", feature_group_count=2)
        x = jax.nn.relu(x).mean((2, 3))
        return jax.nn.relu(x @ p["twice"]) @ p["twice"]

    params = {
        "conv": jax.random.normal(KEY, (6, 2, 3, 3)),
        "twice": jax.random.normal(jax.random.key(1), (6, 6)),
    }
    x = jax.random.normal(jax.random.key(2), (16, 4, 5, 5))
    made, ranges, new = adaround(fn, params, x, steps=100)
    # Each use is an operation with weights of its own.
    assert list(new) == ["conv", "twice", "twice#2"]
    q_fn, expected = jax.jit(q.as_deployed(made)), fn(params, x)
    nearest, learned = (
        jnp.mean((q_fn(p, ranges, x) - expected) ** 2) for p in (made.program.params, new)
    )
    assert learned < nearest


def test_a_kernel_that_takes_in_a_shift_makes_nothing_of_what_stands_for_zero():
    # Of x = 5 nothing is left but the bias of 1, whichever way the kernel is rounded.
    def fn(p, x):
        return lax.conv((x - 5.0) / 3.0, p["w"], (1, 1), "VALID") + 1.0

    params = {"w": jnp.array([0.4, 0.45, 1.0]).reshape(1, 3, 1, 1)}
    x = jnp.array([[5.0, 5.0, 5.0], [6.0, 6.0, 5.0]]).reshape(2, 3, 1, 1)
    made, _, new = adaround(fn, params, x)
    assert np.any(new["w"]["bias"] != made.program.params["w"]["bias"])
    np.testing.assert_allclose(p.apply(made.program, new, x[:1]), np.ones((1, 1, 1, 1)), rtol=1e-5)


def test_what_is_no_operation_is_part_of_a_block():
    def fn(p, x):
        return jnp.sort(jax.nn.relu(x @ p["a"]), -1) @ p["b"], x @ p["b"]

    params = {name: jax.random.normal(jax.random.key(i), (4, 4)) for i, name in enumerate("ab")}
    x = jax.random.normal(KEY, (8, 4))
    made, ranges, new = adaround(fn, params, x, 3, blocks=["a|b"], steps=100)
    assert any(isinstance(op, p.Call) for op in made.program.operations)
    q_fn = q.as_deployed(made)

    def error(weights):
        pairs = zip(q_fn(weights, ranges, x), fn(params, x), strict=True)
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)

    assert error(new) < error(made.program.params)


def test_equal_layers_are_compiled_once(monkeypatch):
    traced = []
    error = reconstruction._error
    monkeypatch.setattr(reconstruction, "_error", lambda *a: traced.append(a[0]) or error(*a))

    def fn(p, x):
        for name in "abcd":
            x = jax.nn.relu(x @ p[name])
        return x @ p["e"]

    params = {n: jax.random.normal(jax.random.key(i), (3, 3)) for i, n in enumerate("abcde")}
    adaround(fn, params, jax.random.normal(KEY, (8, 3)), 4, steps=2)
    # Two programs, with and without the ReLU, each once for the error and once for its gradient.
    assert len(traced) == 4


def slices(fn, *groups, sizes={}):  # noqa: B006
    """For each group of kernels (outputs of operations, edges taken, edges given) of its block."""
    params = {n: jnp.ones((sizes.get(n, 3), 3)) for n in "abcd"}
    made, _ = planned(fn, params, [(jnp.ones((2, 3)),)], 4)
    made_of = [reconstruction._block(made, list(group)).planned.program for group in groups]
    return [(tuple(op.output for op in b.operations), b.inputs, b.outputs) for b in made_of]


def test_a_block_ends_where_the_next_kernel_begins_and_at_outputs():
    def residual(p, x):
        x = jax.nn.relu(x @ p["a"])
        return (x + jax.nn.relu(x @ p["b"]) @ p["c"]) @ p["d"]

    assert slices(residual, "bc", "d") == [
        (("b", "c", "add"), ("a",), ("add",)),
        (("d",), ("add",), ("d",)),
    ]

    def several(p, x):
        y = x @ p["a"]
        return jax.nn.relu(y) @ p["b"] + y @ p["c"], y

    # What is returned is an edge in floats.
    assert slices(several, "a")[0][1:] == (("x/8 bits",), ("a", "clip", "a/floats"))

    def dense_block(p, x):
        y = x @ p["a"]
        z = jnp.concatenate([x, y], -1) @ p["b"]
        return jnp.concatenate([y, z], -1) @ p["b"]

    # What others read behind another kernel is given, too.
    assert slices(dense_block, "a", sizes={"b": 6})[0][2] == ("a", "concatenate")
    assert slices(dense_block, "ab", sizes={"b": 6})[0][2] == ("concatenate_2",)


def test_bad_batches(model):
    made, ranges = planned(model.fn, model.params, [(model.x,)], 4)

    def run(batches, ranges=ranges, made=made, **options):
        q.adaround(made, ranges, batches, KEY, **options)

    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        run([])
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        run([model.x])
    with pytest.raises(ValueError, match=r"every batch must have float32\[4,6,6,2\] at '0', got"):
        run([(model.x,), (model.x[:2],)])
    bad = model.x.at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=f"what the block of {STEM} sees must be finite, got"):
        run([(bad,)])
    for name, role in ((HEAD, "weight"), (next(iter(made.stored)), "activation")):
        missing = {
            n: {r: s for r, s in own.items() if (n, r) != (name, role)} for n, own in ranges.items()
        }
        with pytest.raises(ValueError, match=rf"ranges must have \['{name}'\]\['{role}'\]"):
            run([(model.x,)], missing)
    with pytest.raises(ValueError, match="must quantize at least one kernel, got 32 bits for all"):
        run([(model.x,)], {}, planned(model.fn, model.params, [(model.x,)], 32)[0])
    signs = (".*", {"weight": q.Quantizer(1, "binary", learning="fixed")})
    binary, spans = planned(model.fn, model.params, [(model.x,)], 8, signs)
    with pytest.raises(ValueError, match="must have integer grids, got 'binary' for"):
        run([(model.x,)], spans, binary)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        run([(model.x,)], steps=0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got -1"):
        run([(model.x,)], learning_rate=-1)
    with pytest.raises(ValueError, match="rule 'stem' must match at least one path"):
        run([(model.x,)], blocks=["stem"])
    with pytest.raises(ValueError, match=f"got '{HEAD}' cut off"):
        run([(model.x,)], blocks=[f"{STEM}|{HEAD}"])
