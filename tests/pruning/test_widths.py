import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, pruning


def fn(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


PARAMS = {
    "a": jnp.array([[1.0, -3.0, 2.0], [0.5, 1.0, 4.0]]),
    "b": jnp.array([[1.0], [2.0], [0.25]]),
}
X = jnp.array([[1.0, 2.0], [0.0, 1.0]])
GROUPS = core.trace(fn, PARAMS, X).groups
SCORES = {"a": jnp.array([1.0, 1.0, 9.0])}


def difference(y, reference):
    return jnp.mean(jnp.abs(y - reference))


def test_the_best_channels_are_kept():
    keep = pruning.keep_widths(SCORES, {"a": 2})
    assert keep["a"].tolist() == [True, False, True]
    assert pruning.keep_widths(SCORES, {})["a"].tolist() == [True, True, True]


def test_damage_by_hand():
    # Hidden: [2, 0, 10] and [0.5, 1, 4]; outputs 2 + 0 + 2.5 = 4.5 and 0.5 + 2 + 1 = 3.5.
    # Width 2 keeps channels 0 and 2: 4.5 and 1.5. Width 1 keeps 2: 2.5 and 1.
    tried = {"a": (1, 2, 3)}
    found = pruning.width_sensitivity(fn, PARAMS, [(X,)], GROUPS, SCORES, tried, difference)
    assert found == {"a": {1: (2.0 + 2.5) / 2, 2: 1.0, 3: 0.0}}
    halves = [(X[:1],), (X[1:],)]
    assert pruning.width_sensitivity(fn, PARAMS, halves, GROUPS, SCORES, tried, difference) == found


def test_one_compilation_for_all_widths():
    traced = []

    def watched(params, x):
        traced.append(1)
        return fn(params, x)

    tried = {"a": (1, 2, 3)}
    pruning.width_sensitivity(watched, PARAMS, [(X,), (X,)], GROUPS, SCORES, tried, difference)
    # The whole model, and the narrowed one.
    assert len(traced) == 2


def test_bad_input():
    def measure(batches=((X,),), scores=SCORES, widths=None, fn=fn):
        tried = {"a": (2,)} if widths is None else widths
        return pruning.width_sensitivity(fn, PARAMS, batches, GROUPS, scores, tried, difference)

    with pytest.raises(ValueError, match=r"width of 'a' must be an integer in \[1, 3\], got 4"):
        measure(widths={"a": (4,)})
    with pytest.raises(ValueError, match="group of widths must be one of a, got 'b'"):
        measure(widths={"b": (1,)})
    with pytest.raises(ValueError, match="widths must hold some for 'a', got none"):
        measure(widths={"a": ()})
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        measure(batches=())
    with pytest.raises(ValueError, match="damage must be finite, got 1 NaN"):
        measure(fn=lambda params, x: fn(params, x) * jnp.float32(np.nan))
