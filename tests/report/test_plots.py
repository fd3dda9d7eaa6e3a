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


def _against(points):
    return plots.accuracy_against(points, "size", "B", "accuracy")


def _check_labels(figure, count):
    boxes = _boxes(figure)
    assert len(boxes) == count
    for a, b in itertools.combinations(boxes.values(), 2):
        assert not a.overlaps(b)
    for box in boxes.values():
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    return boxes


@pytest.mark.parametrize("cost", ["macs", "bops"])
def test_every_row_has_its_label_and_no_two_overlap(make_results, cost):
    rows = make_results()["rows"]
    points = [plots.Point(r["name"], r["role"], r[cost], r["accuracy"]) for r in rows]
    assert "expert 2  97.50 %" in _check_labels(_against(points), len(points))


@pytest.mark.parametrize("count", [14, 30])
def test_many_points_of_one_accuracy_are_labelled_without_overlap(count):
    names = [f"{i} a net with a very long name" for i in range(count)]
    _check_labels(
        _against([plots.Point(name, "expert", 10 + i, 0.9) for i, name in enumerate(names)]), count
    )


def test_points_without_a_number_are_left_out():
    points = [
        plots.Point("dense", "parent", 100, 0.9),
        plots.Point("oracle", "bound", None, 1.0),
        plots.Point("free", "expert", 0, 0.5),
        plots.Point("failed", "expert", 50, None),
    ]
    assert _against(points) is None  # One is left, which says nothing.
    points.append(plots.Point("cut", "single", 10, 0.8))
    assert set(_boxes(_against(points))) == {"dense  90.00 %", "cut  80.00 %"}


def test_a_bound_is_not_on_the_front():
    points = [plots.Point("net", "parent", 10, 0.9), plots.Point("oracle", "bound", 9, 1.0)]
    (front,) = (line for line in _against(points).axes[0].lines if line.get_linewidth() == 1)
    assert front.get_ydata().tolist() == [90.0]


def test_confusion_shows_counts_and_leaves_zeros_empty():
    figure = plots.confusion([[3, 1], [0, 2]], ["cat", "dog"])
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.texts] == ["3", "1", "", "2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog"]


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
    assert texts == [["16", "", "", "24"], ["25%", "", "", "25%"], ["4", "", "", "4"], [""] * 4]
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


@pytest.mark.parametrize("factor", [0.99, 0.6])
def test_numbers_beside_a_loss_are_plain_and_within_the_figure(factor):
    """Within a decade, where a log axis has no power of ten, and over more."""
    history = {"parent": [{"step": s, "loss": 2.3 * factor**s} for s in (1, 3, 8)]}
    figure = plots.training_curve(history, "loss")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = [t.get_text() for t in axes.get_yticklabels(which="both")]
    assert len([float(text) for text in texts if text]) > 1
    assert axes.get_tightbbox().x0 >= 0


@pytest.mark.parametrize("roles", [["parent", "single"], list(plots.ROLES)])
def test_the_legend_is_above_the_axes(roles):
    points = [plots.Point(role, role, i + 1.0, 0.9 + i / 99) for i, role in enumerate(roles)]
    figure = _against(points)
    figure.draw_without_rendering()
    [legend], [axes] = figure.legends, figure.axes
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1


def test_sensitivity_has_a_labelled_line_for_each_layer_in_order():
    losses = {f"params/conv{i}/kernel": np.array([2.0 + i, 1.0]) for i in range(60)}
    figure = plots.sensitivity(losses, [0.8, 0.2], dense=0.5, ylabel="cross-entropy")
    (axes,) = figure.axes
    assert [line.get_xdata().tolist() for line in axes.lines[:60]] == [[20.0, 80.0]] * 60
    assert axes.lines[3].get_ydata().tolist() == [1.0, 5.0]
    assert axes.lines[60].get_ydata().tolist() == [0.5, 0.5]
    assert axes.get_xlabel() == "sparsity of the one layer (%)"
    assert axes.get_ylabel() == "cross-entropy"
    assert {"conv3", "nothing removed"} <= set(_check_labels(figure, 61))


def test_gate_plots_need_a_gate():
    assert plots.gate_usage(None, None) is None
    assert plots.gate_entropy([], 4) is None
    assert plots.gate_entropy([None, 0.5], 4) is not None
    assert plots.gate_usage(np.full((1000, 8), 1 / 8).tolist(), None) is not None
