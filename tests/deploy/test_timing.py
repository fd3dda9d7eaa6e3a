import time

import jax
import numpy as np
import pytest

from hybrid_jax import core, deploy, pruning


def after(seconds, calls, name):
    def fn(x):
        calls.append(name)
        time.sleep(seconds)
        return x

    return fn


def test_ratio_of_known_times():
    # 20 ms against 40 ms: a ratio of 0.5.
    calls = []
    measured = deploy.latency(
        after(0.02, calls, "f"), after(0.04, calls, "r"), np.ones(1), pairs=6, warmup=1
    )
    assert 0.02 <= measured.p50 <= measured.p95
    assert 0.04 <= measured.reference_p50 <= measured.reference_p95
    assert 0.4 < measured.ratio < 0.8
    # Interleaved: after the warm-up each pair has both, in alternating order, each twice.
    assert "".join(calls) == "fr" + "rrffffrr" * 3


def test_percentiles_of_made_up_times(monkeypatch):
    # The function takes 1..20, the reference always 2: p50 10.5, p95 = 1 + 0.95 * 19 = 19.05,
    # quartiles of the ratio (1 + 0.25 * 19) / 2 = 2.875 and (1 + 0.75 * 19) / 2 = 7.625.
    # The warm-up, and the call before each that counts, take longer.
    late = {"f": range(1, 21), "r": [2] * 20}
    given = {name: iter([9.0, *(t for x in late[name] for t in (99.0, float(x)))]) for name in late}
    monkeypatch.setattr(core, "seconds", lambda fn: next(given[fn]))
    measured = deploy.latency("f", "r", pairs=20, warmup=1)
    np.testing.assert_allclose(measured[:5], (10.5, 19.05, 2, 2, 5.25))
    np.testing.assert_allclose(measured.quartiles, (5.75, 15.25))
    np.testing.assert_allclose(measured.spread, (2.875, 7.625))


def two_layers(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


PARAMS = {"a": np.ones((4, 8), np.float32), "b": np.ones((8, 2), np.float32)}


def test_the_time_of_a_part_is_a_mean(monkeypatch):
    monkeypatch.setattr(core, "seconds", lambda fn, x: {"f": 2.0, "r": 4.0}[fn])
    measured = deploy.latency("f", "r", np.zeros(4), pairs=3, parts=4)
    assert (measured.p50, measured.reference_p50, measured.ratio) == (0.5, 1.0, 0.5)
    assert measured.quartiles == (0.5, 0.5)


def test_widths_are_really_cut_and_timed_against_the_whole(monkeypatch):
    timed = []

    def record(fn, reference, x, pairs, warmup):
        # Hidden units of ones: 4 inputs, so that each output is 4 times the width.
        timed.append((float(fn(x)[0, 0]), float(reference(x)[0, 0]), pairs, warmup))
        return deploy.Latency(0, 0, 0, 0, ratio=len(timed) / 10, spread=(0, 0))

    monkeypatch.setattr(deploy.timing, "latency", record)
    x = np.ones((1, 4), np.float32)
    table = deploy.width_latencies(two_layers, PARAMS, {"a": [4, 2, 8]}, x, pairs=7, warmup=2)
    assert timed == [(16.0, 32.0, 7, 2), (8.0, 32.0, 7, 2)]
    assert table == {"a": {8: 1.0, 4: 0.1, 2: 0.2}}
    assert pruning.paying_widths(table) == {"a": (4, 8)}


def test_bad_widths():
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="group of widths must be one of a, got 'b'"):
        deploy.width_latencies(two_layers, PARAMS, {"b": [4]}, x)
    with pytest.raises(ValueError, match=r"width of group 'a' must be .*\[1, 8\], got 9"):
        deploy.width_latencies(two_layers, PARAMS, {"a": [9]}, x)


def test_bad_arguments():
    with pytest.raises(ValueError, match="pairs must be an integer of at least 1, got 0"):
        deploy.latency(abs, abs, 1, pairs=0)
    with pytest.raises(ValueError, match="warmup must be an integer of at least 1, got 0"):
        deploy.latency(abs, abs, 1, warmup=0)
