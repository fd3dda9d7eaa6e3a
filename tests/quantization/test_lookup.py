import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered import in_integers

from hybrid_jax import core
from hybrid_jax import quantization as q


def fn(params, x):
    return x @ params["w"]


PARAMS, X = {"w": jnp.array([[1.0, -0.4]])}, jnp.array([[0.5], [1.0]])
SPEC = q.spec(core.trace(fn, PARAMS, X), [("w", {"weight": q.Quantizer(8)})])
USES = {
    "fake_quantized": lambda ranges: q.fake_quantized(fn, SPEC)(PARAMS, ranges, X),
    "fractional": lambda ranges: q.fractional(fn, SPEC)(
        PARAMS, ranges, {"w": {"weight": 4.0, "activation": 4.0}}, X
    ),
    "gptq": lambda ranges: q.gptq(PARAMS, core.input_grams(fn, PARAMS, [(X,)]), SPEC, ranges),
    "sensitivity": lambda ranges: q.sensitivity(fn, PARAMS, [(X,)], SPEC, {8: ranges}),
    "hessian_sensitivity": lambda ranges: q.hessian_sensitivity(
        fn, PARAMS, (X,), SPEC, {8: ranges}, {"w": jnp.float32(1.0)}
    ),
    "edge_ranges": lambda ranges: in_integers(fn, PARAMS, SPEC, ranges, X),
}
BAD = {
    "must be finite, got 1 NaN": (-1.0, np.nan),
    "must be finite, got 1 NaN or inf": (-np.inf, 1.0),
    r"must have low ≤ high, got low 0.0 and high -0\.5": (0.0, -0.5),
    r"must have low ≤ high, got low 1.0 and high -1\.0": (1.0, -1.0),
    r"must have ends of shape \(\), or of one that divides": (np.full(2, -1.0), np.full(2, 1.0)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("message", BAD)
def test_a_range_that_is_none_is_refused_where_it_comes_in(use, message):
    ranges = q.calibrate(fn, PARAMS, [(X,)], SPEC)
    USES[use](ranges)
    bad = q.Range(*map(jnp.float32, BAD[message]))
    if "shape" in message and use == "edge_ranges":  # it knows no kernel's shape
        roles = ["activation"]
    elif use in ("gptq", "hessian_sensitivity"):  # which look at kernels alone
        roles = ["weight"]
    else:
        roles = ["weight", "activation"]
    for role in roles:
        with pytest.raises(ValueError, match=rf"ranges\['w'\]\['{role}'\] {message}"):
            USES[use]({"w": ranges["w"] | {role: bad}})


def test_an_end_beyond_zero_counts_as_zero():
    # [0.2, 0.1] of an activation without negative values, whose upper end was learned below the
    # lower one, is [0, 0.1].
    span = q.Range(jnp.float32(0.2), jnp.float32(0.1))
    assert q.range_at({"w": {"activation": span}}, "w", "activation", ()) is span
    np.testing.assert_allclose(q.affine(span, 8).scale, 0.1 / 255, rtol=1e-6)


def test_traced_ranges_are_not_looked_into():
    ranges = q.calibrate(fn, PARAMS, [(X,)], SPEC)
    ranges["w"]["activation"] = q.Range(jnp.float32(0.0), jnp.float32(-0.5))
    y = jax.jit(q.fake_quantized(fn, SPEC))(PARAMS, ranges, X)
    np.testing.assert_allclose(y, jnp.zeros_like(y), atol=1e-12)
