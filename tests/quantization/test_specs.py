import jax.numpy as jnp
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


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "first_last_bits"])
@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4])
def test_bits_outside(graph, name, bits):
    with pytest.raises(ValueError, match=f"{name} must be 2 to 8, or 32 for off, got {bits}"):
        q.spec(graph, **{name: bits})


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


def test_bad_quantizers(graph):
    with pytest.raises(ValueError, match="did you mean affine"):
        q.Quantizer(scheme="afine")
    with pytest.raises(ValueError, match="scheme must be 'affine' with learning 'pact'"):
        q.Quantizer(scheme="symmetric", learning="pact")
    with pytest.raises(ValueError, match=rf"activation must be per tensor.*{STEM}"):
        q.spec(graph, [(STEM, {"activation": q.Quantizer(per_channel=True)})])


def test_a_shared_kernel_with_two_quantizers():
    graph = core.trace(lambda p, x: x @ p["w"] @ p["w"], {"w": jnp.eye(3)}, jnp.ones((1, 3)))
    assert q.spec(graph).weight_bits == {"w": 8, "w#2": 8}
    with pytest.raises(ValueError, match="sites that share kernel 'w' must quantize it alike"):
        q.spec(graph, [("w#2", {"weight": 4})])
