"""What is known of each primitive, and what is not: how its channels leave, what it lowers to."""

from hybrid_jax.core import (
    arrangement,
    elementwise,
    functions,
    interpreter,
    resize,
    rules,
    versions,
)
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
        "resize": set(resize.RESIZE),
        "arrangement": set(arrangement._RULES),
        "an operation": {*lowering._RULES, *lowering._SAME},
    }
    for what, own in known.items():
        assert sorted(set(rules.RULES) - own) == MISSING[what].split(), what
    assert known["resize"] | known["arrangement"] <= set(rules.RULES)
    assert known["an operation"] - set(rules.RULES) == set(functions.SAME)
    written = elementwise.ELEMENTWISE & {*functions.FUNCTIONS, *functions.SAME}
    assert sorted(elementwise.ELEMENTWISE - written) == UNWRITTEN.split()
    calls = {*versions.CALLS, *versions.REMAT, *versions.CUSTOM, "scan", "while", "cond"}
    assert set(interpreter.REBUILD) == calls
    assert not calls & {*rules.RULES, *elementwise.ELEMENTWISE, *lowering._RULES}
    assert not set(rules.RULES) & elementwise.ELEMENTWISE
