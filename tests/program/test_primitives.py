"""What is known of each primitive, and what is not: how its channels leave, what it lowers to."""

import dataclasses

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from hybrid_jax import core
from hybrid_jax.core import functions, interpreter, versions
from hybrid_jax.core.primitives import PRIMITIVES
from hybrid_jax.core.primitives.elementwise import ELEMENTWISE
from hybrid_jax.program.read import lowering

# {what is known: the primitives with labels of which it is not}, of those that are not element-wise
MISSING = {
    "resize": """
        argmax argmin concatenate cumlogsumexp cummax cummin cumprod cumsum dot_general
        optimization_barrier pmax pmin psum psum_invariant reduce_and reduce_max reduce_min
        reduce_or reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum rev
        sort squeeze stack transpose""",  # their parameters hold no sizes
    "arrangement": """
        argmax argmin concatenate conv_general_dilated cumlogsumexp cummax cummin cumprod cumsum
        dot_general gather optimization_barrier pad pmax pmin psum psum_invariant reduce_and
        reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window_max reduce_window_min
        reduce_window_sum sort stack tile""",  # what they make is no parameter moved about
    "an operation": """
        argmax argmin cumlogsumexp cummax cummin cumprod cumsum pmax pmin psum psum_invariant
        reduce_and reduce_or reduce_prod reduce_window_min sort""",  # kept as a call
}
UNWRITTEN = """
    add_any clz complex conj digamma erf_inv imag lgamma name nextafter population_count pvary real
    reduce_precision sharding_constraint shift_left shift_right_arithmetic shift_right_logical"""


def test_what_is_known_of_each_primitive():
    known = {
        "resize": {name for name, row in PRIMITIVES.items() if row.resize},
        "arrangement": {name for name, row in PRIMITIVES.items() if row.arrange},
        "an operation": {*lowering._RULES, *lowering._SAME},
    }
    for what, own in known.items():
        assert sorted({*PRIMITIVES} - own) == MISSING[what].split(), what
    assert known["an operation"] - {*PRIMITIVES} == set(functions.SAME)
    written = ELEMENTWISE & {*functions.FUNCTIONS, *functions.SAME}
    assert sorted(ELEMENTWISE - written) == UNWRITTEN.split()
    calls = {*versions.CALLS, *versions.REMAT, *versions.CUSTOM, "scan", "while", "cond"}
    assert set(interpreter.REBUILD) == calls
    assert not calls & {*PRIMITIVES, *ELEMENTWISE, *lowering._RULES}
    assert not {*PRIMITIVES} & ELEMENTWISE


def test_channels_pass_a_primitive_of_ones_own(monkeypatch):
    """Once it has a row, which says how its channels lie, what is left of it, and what it costs."""
    own = Primitive("backwards")

    @own.def_impl
    def run(x, *, size):
        assert x.shape[-1] == size
        return x[..., ::-1]

    own.def_abstract_eval(lambda x, *, size: x)
    mlir.register_lowering(own, mlir.lower_fun(run, multiple_results=False))

    def fn(params, x):
        return own.bind(x @ params["a"], size=4) @ params["b"]

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    params, x = jax.tree.map(np.float32, (params, rng.normal(size=(5, 3))))
    graph = core.trace(fn, params, x)
    assert [len(group.members) for group in graph.groups] == [1]  # What it makes, "b" may ignore.
    assert graph.macs == 12 + 8
    row = core.Primitive(
        labels=lambda labels, params, values, outvars: [
            dataclasses.replace(values[0], labels=(values[0].labels[0], values[0].labels[1][::-1]))
        ],
        resize=lambda eqn, values, ins, outs: core.bind(eqn, values, size=int(outs[0][1].sum())),
        macs=lambda eqn, operands, result: 5 * 100,
    )
    monkeypatch.setitem(core.PRIMITIVES, "backwards", row)
    graph = core.trace(fn, params, x)
    assert graph.macs == 12 + 100 + 8
    keep = {"a": np.array([True, False, True, True])}
    _, small, certificate = core.shrink(fn, params, core.expand(keep, graph.groups, params), x)
    np.testing.assert_array_equal(small["a"], params["a"][:, [0, 2, 3]])
    np.testing.assert_array_equal(small["b"], params["b"][[0, 1, 3]])
    assert certificate.difference < 1e-6
    assert certificate.macs == (120, 9 + 100 + 6)
