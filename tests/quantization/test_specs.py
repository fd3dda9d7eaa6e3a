import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core
from hybrid_jax import quantization as q

STEM, DEPTHWISE, HEAD = (f"params/{name}/kernel" for name in ("stem", "depthwise", "head"))


@pytest.fixture(scope="module")
def graph(model):
    return core.trace(model.fn, model.params, model.x)


def test_defaults(graph):
    spec = q.spec(graph, weight_bits=4, activation_bits=3)
    assert spec.weight_bits == {STEM: 8, DEPTHWISE: 4, HEAD: 8}
    assert spec.activation_bits == {STEM: 8, DEPTHWISE: 3, HEAD: 8}
    site = spec[DEPTHWISE]
    assert site.weight == q.Quantizer(4, "symmetric", per_channel=True)
    assert site.activation == q.Quantizer(3, "affine", per_channel=False)
    assert hash(spec) == hash(q.spec(graph, weight_bits=4, activation_bits=3))


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_first_and_last_have_at_least_their_bits(graph, bits):
    spec = q.spec(graph, weight_bits=bits, activation_bits=bits, first_last_bits=4)
    assert spec.weight_bits == {STEM: max(bits, 4), DEPTHWISE: bits, HEAD: max(bits, 4)}


def test_the_first_rule_that_matches_wins(graph):
    pact = q.Quantizer(4, "affine", learning="pact")
    rules = [(STEM, {"weight": 3}), (".*/(stem|head)/.*", {"weight": 5, "activation": pact})]
    spec = q.spec(graph, rules)
    assert spec.weight_bits == {STEM: 3, DEPTHWISE: 8, HEAD: 5}
    assert spec[HEAD].activation == pact
    assert spec[STEM].activation.bits == 8


def test_bits_are_int32_scalars(graph):
    bits = q.spec(graph, weight_bits=4).bits()
    assert list(bits) == [STEM, DEPTHWISE, HEAD]
    assert bits[DEPTHWISE]["weight"].dtype == jnp.int32
    assert int(bits[DEPTHWISE]["weight"]) == 4


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4])
def test_bits_outside(graph, bits):
    for name in ("weight_bits", "first_last_bits"):
        with pytest.raises(ValueError, match=f"{name} must be 2 to 8, or 32 for off, got {bits}"):
            q.spec(graph, **{name: bits})
    if bits == 1:  # {0, scale}: an unsigned activation has it
        assert q.spec(graph, activation_bits=1).activation_bits[DEPTHWISE] == 1
        return
    with pytest.raises(ValueError, match=f"activation_bits must be 1 to 8, or 32.* got {bits}"):
        q.spec(graph, activation_bits=bits)


@pytest.mark.parametrize(
    ("scheme", "bits", "allowed"),
    [("symmetric", 1, "2 to 8"), ("affine", 9, "1 to 8"), ("binary", 2, "1"), ("e4m3", 4, "8")],
)
def test_bits_that_a_scheme_has_not(scheme, bits, allowed):
    with pytest.raises(ValueError, match=f"bits must be {allowed}, or 32 for off, got {bits}"):
        q.Quantizer(bits, scheme, learning="fixed")


def test_bits_that_are_no_integer(graph):
    with pytest.raises(ValueError, match=r"weight_bits must be an integer, got 4\.5"):
        q.spec(graph, weight_bits=4.5)


def test_bad_rules(graph):
    with pytest.raises(ValueError, match=r"rule '\.\*nothing' must match at least one path"):
        q.spec(graph, [(".*nothing", {"weight": 4})])
    with pytest.raises(ValueError, match="did you mean weight"):
        q.spec(graph, [(STEM, {"weights": 4})])
    with pytest.raises(ValueError, match="bits must be 2 to 8, or 32 for off, got 64"):
        q.spec(graph, [(STEM, {"weight": 64})])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scheme": "afine"}, "did you mean affine"),
        ({"learning": "lsqq"}, "did you mean lsq"),
        ({"learning": "pact"}, "scheme with learning 'pact' must be one of affine, got"),
        (
            {"scheme": "affine", "learning": "pact", "power_of_two": True},
            "power_of_two must be False with learning 'pact'",
        ),
        ({"bits": 1, "scheme": "binary"}, "learning 'lsq' must be one of .*, got 'binary'"),
        ({"group": 4}, "per_channel must be True with a group, got group 4"),
        ({"group": 0, "per_channel": True}, "group must be an integer of at least 1, got 0"),
        ({"method": "entrpy"}, "did you mean entropy"),
    ],
)
def test_bad_quantizers(wrong, message):
    with pytest.raises(ValueError, match=message):
        q.Quantizer(**wrong)


def test_bad_activations(graph):
    with pytest.raises(ValueError, match=rf"activation must be per tensor.*{STEM}"):
        q.spec(graph, [(STEM, {"activation": q.Quantizer(per_channel=True)})])
    signs = q.Quantizer(1, "binary", learning="dynamic")
    with pytest.raises(ValueError, match=rf"activation must have a zero, got .*{STEM}"):
        q.spec(graph, [(STEM, {"activation": signs})])


@pytest.mark.parametrize(
    ("group", "shape"),
    [(1, (3, 3, 2, 4)), (2, (3, 3, 1, 4)), (6, (3, 1, 1, 4)), (18, (1, 1, 1, 4))],
)
def test_the_shape_of_groups(graph, group, shape):
    # The stem's kernel is (3, 3, 2, 4): 18 weights for each output channel, C innermost.
    quantizer = q.Quantizer(4, per_channel=True, group=group)
    assert q.range_shape(graph.sites[0], quantizer) == shape


@pytest.mark.parametrize("group", [4, 5, 9, 36])
def test_a_group_that_does_not_divide(graph, group):
    grouped = q.Quantizer(4, per_channel=True, group=group)
    message = rf"group must divide the summed axes \(3, 3, 2\) of '{STEM}' into blocks, got {group}"
    with pytest.raises(ValueError, match=message):
        q.spec(graph, [(STEM, {"weight": grouped})])


@pytest.mark.parametrize(
    ("layout", "group"), [("HWIO", 2), ("HWIO", 12), ("OIHW", 3), ("OIHW", 18), ("IOHW", 9)]
)
def test_groups_are_consecutive_in_the_kernel_matrix(layout, group):
    sizes = {"H": 3, "W": 3, "I": 4, "O": 5}
    kernel = jax.random.normal(jax.random.key(0), [sizes[letter] for letter in layout])
    numbers = ("NHWC", layout, "NHWC")

    def fn(params, x):
        return jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", None, None, numbers)

    site = core.trace(fn, {"k": kernel}, jnp.ones((1, 6, 6, 4))).sites[0]
    quantizer = q.Quantizer(4, per_channel=True, group=group)
    high = quantizer.range_of(kernel, q.range_shape(site, quantizer)).high
    [rows] = core.kernel_matrix(site, kernel)
    [ends] = core.kernel_matrix(site, jnp.broadcast_to(q.spread(high, kernel.shape), kernel.shape))
    groups = rows.reshape(-1, group, 5)
    np.testing.assert_array_equal(ends, jnp.repeat(groups.max(1), group, axis=0))


def test_a_shared_kernel_with_two_quantizers():
    graph = core.trace(lambda p, x: x @ p["w"] @ p["w"], {"w": jnp.eye(3)}, jnp.ones((1, 3)))
    assert q.spec(graph).weight_bits == {"w": 8, "w#2": 8}
    with pytest.raises(ValueError, match="sites that share kernel 'w' must quantize it alike"):
        q.spec(graph, [("w#2", {"weight": 4})])


def test_ranges_of_64_bits_are_rounded_to_float32():
    """The network's own dtype stays, as the steps of its grids do."""
    params, x = {"w": jnp.ones((2, 3), jnp.float32) / 3}, jnp.ones((4, 2), jnp.float32) / 7
    spec = q.spec(core.trace(dot, params, x))
    ranges = q.calibrate(dot, params, [(x,)], spec)
    quantized = q.fake_quantized(dot, spec)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda end: jnp.asarray(end, jnp.float64), ranges)
        got = quantized(params, wide, x)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, quantized(params, ranges, x))


def dot(params, x):
    return x @ params["w"]
