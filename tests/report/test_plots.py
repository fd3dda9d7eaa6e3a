import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation

from hybrid_jax.report import plots


def _boxes(figure):
    """Pixel boxes of the labels beside the axes."""
    figure.draw_without_rendering()
    texts = figure.axes[0].findobj(Annotation)
    return {t.get_text(): super(Annotation, t).get_window_extent() for t in texts}


@pytest.mark.parametrize("cost", plots.COSTS)
def test_every_row_has_its_label_and_no_two_overlap(make_results, cost):
    rows = make_results()["rows"]
    figure = plots.accuracy_against(cost, rows)
    boxes = _boxes(figure)
    assert len(boxes) == len(rows)
    assert "expert 2  97.50 %" in boxes
    for a, b in itertools.combinations(boxes.values(), 2):
        assert not a.overlaps(b)
    for box in boxes.values():
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1


def test_thirty_equal_points_are_labelled_without_overlap():
    rows = [
        {"name": f"a net with a very long name {i}", "kind": "expert", "accuracy": 0.9, "bytes": 10}
        for i in range(30)
    ]
    rows = [{**row, "name": f"{i} {row['name']}"} for i, row in enumerate(rows)]
    figure = plots.accuracy_against("bytes", rows)
    boxes = _boxes(figure)
    assert len(boxes) == 30
    for a, b in itertools.combinations(boxes.values(), 2):
        assert not a.overlaps(b)
    for box in boxes.values():
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
        assert box.x1 <= figure.bbox.x1


def test_rows_without_the_cost_are_left_out():
    rows = [
        {"name": "dense", "kind": "dense", "accuracy": 0.9, "macs": 100},
        {"name": "oracle", "kind": "control", "accuracy": 1.0, "macs": None},
        {"name": "free", "kind": "expert", "accuracy": 0.5, "macs": 0},
        {"name": "failed", "kind": "expert", "accuracy": float("nan"), "macs": 50},
    ]
    assert list(_boxes(plots.accuracy_against("macs", rows))) == ["dense  90.00 %"]
    assert plots.accuracy_against("bytes", rows) is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_pareto_front_holds_exactly_what_nothing_beats(points):
    costs, scores = map(np.array, zip(*points, strict=True))
    front = plots.pareto_front(costs, scores)
    kept = {(costs[i], scores[i]) for i in front}
    expected = {
        (c, s)
        for c, s in points
        if not any((d <= c and t >= s) and (d, t) != (c, s) for d, t in points)
    }
    assert kept == expected
    assert np.all(np.diff(costs[front]) > 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_spread_labels_are_apart_in_order_and_within(wanted):
    places = plots.spread_labels(np.sort(wanted), gap=0.1, low=0.0, high=1.0)
    assert np.all(np.diff(places) >= 0.1 - 1e-9)
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9


def test_spread_labels_leaves_what_is_apart_where_it_is():
    np.testing.assert_allclose(plots.spread_labels([0.1, 0.5], 0.2, 0.0, 1.0), [0.1, 0.5])


def test_layer_map_shows_widths_and_leaves_missing_cells_empty():
    row = {"dense_width": 32, "sparsity": 0.25, "weight_bits": 4, "activation_bits": None}
    rows = [
        {"model": "expert 0", "site": "params/Conv_0/kernel", "width": 16, **row},
        {"model": "expert 1", "site": "params/Conv_1/kernel", "width": 24, **row},
    ]
    figure = plots.layers(rows)
    texts = [[t.get_text() for t in axes.texts] for axes in figure.axes]
    assert texts == [["16", "", "", "24"], ["25", "", "", "25"], ["4", "", "", "4"], [""] * 4]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["Conv_0", "Conv_1"]


def test_stacked_stages_are_drawn_one_line_per_expert():
    history = {
        "experts": [{"step": 0, "loss": [2.0, 3.0]}, {"step": 1, "loss": [1.0, float("nan")]}],
        "gate": [{"step": 0, "loss": 0.5}, {"step": 5, "accuracy": 0.9}],
    }
    figure = plots.training_curve(history, "loss")
    assert set(_boxes(figure)) == {"experts 0", "experts 1", "gate"}
    lines = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert lines == [[2.0, 1.0], [3.0], [0.5]]
    assert plots.training_curve({"parent": []}, "loss") is None


def test_sensitivity_has_a_labelled_line_for_each_layer_in_order():
    losses = {f"params/conv{i}/kernel": np.array([2.0 + i, 1.0]) for i in range(60)}
    figure = plots.sensitivity(losses, [0.8, 0.2], dense=0.5, ylabel="cross-entropy")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [*(f"conv{i}" for i in range(60)), "nothing removed"]
    assert lines["conv3"].get_xdata().tolist() == [20.0, 80.0]
    assert lines["conv3"].get_ydata().tolist() == [1.0, 5.0]
    assert axes.get_xlabel() == "sparsity of the one layer (%)"
    assert axes.get_ylabel() == "cross-entropy"
    figure.draw_without_rendering()
    # The legend lies beside the axes, and nothing is cut off.
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= figure.bbox.y0


def test_gate_plots_need_a_gate():
    assert plots.gate_usage(None, None) is None
    assert plots.gate_entropy([], 4) is None
    assert plots.gate_entropy([None, 0.5], 4) is not None
    assert plots.gate_usage(np.full((1000, 8), 1 / 8).tolist(), None) is not None
