import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.report import File, Results, Row, choice, choose, headline, shipping
from hybrid_jax.report.formatting import percent


def a_row(name, role, accuracy, size, ratio=None, noise=0.02, correct=None, **facts):
    quartiles = None if ratio is None else (ratio - noise, ratio + noise)
    file = File(f"deploy/{name}.onnx", size, accuracy, ratio=ratio, ratio_quartiles=quartiles)
    return Row(name, role, accuracy, correct, files={"onnx": file}, **facts)


def of(*rows, **facts):
    return Results((a_row("net", "parent", 0.98, 400_000, 1.0), *rows), **facts)


def chosen(results):
    return {target: own.row.name for target, own in choose(results).items()}


def text(results):
    return " ".join(headline(results))


INT8 = a_row("int8", "parent_int8", 0.979, 100_000, 0.5)


def test_the_smallest_file_within_the_loss_is_chosen():
    rows = INT8, a_row("a", "single", 0.971, 50_000, 0.4), a_row("b", "single", 0.968, 20_000, 0.3)
    assert chosen(of(*rows)) == {"onnx": "a"}
    assert chosen(of(*rows, allowed_loss=0.02)) == {"onnx": "b"}
    assert chosen(of(*rows, allowed_loss=0.005)) == {"onnx": "int8"}
    # Exactly the allowed loss is allowed: 0.98 − 0.97 is 0.010000000000000009 in floats.
    assert chosen(of(*rows, a_row("c", "expert", 0.97, 10_000, 0.4))) == {"onnx": "c"}


def test_where_none_is_within_the_loss_the_least_is_taken_and_said():
    rows = a_row("a", "single", 0.9, 50_000), a_row("b", "single", 0.8, 20_000)
    # The parent has no file: what the row says of it counts.
    results = Results((Row("net", "parent", 0.98), *rows))
    assert chosen(results) == {"onnx": "a"}
    assert "No file loses at most 1 point; this one loses least." in text(results)


def test_controls_and_files_that_were_not_run_or_made_are_not_chosen():
    small = a_row("a", "single", 0.98, 50_000)
    failed = File("deploy/a.onnx", error="no such operation")
    for row in (
        a_row("a", "control", 0.98, 50_000),
        Row("a", "single", 0.98, files={"onnx": File("deploy/a.onnx", 50_000)}),
        Row("a", "single", 0.98, files={"onnx": failed}),
    ):
        assert chosen(of(row)) == {"onnx": "net"}
    assert chosen(of(small)) == {"onnx": "a"}
    assert headline(Results((Row("a", "single", 0.98),))) == [
        "Nothing to ship: no file of this run was run on the test images."
    ]


def test_a_line_for_the_file_and_one_for_the_reason():
    lines = headline(of(INT8, a_row("cut", "single", 0.9749, 50_000, 0.4)))
    assert lines == [
        "Ship cut, accuracy 97.49 % (−0.51 points against the parent): deploy/cut.onnx has 50.0 kB "
        "(8.00× smaller than the parent).",
        "It is the smallest of 2 files that lose at most 1 point.",
    ]


def test_the_parent_is_shipped_where_nothing_beats_it():
    lost = a_row("cut", "single", 0.9, 50_000, 0.4)
    assert "Nothing that was made beats the float parent: the nearest is “cut” (−8.00" in (
        text(of(lost))
    )
    large = a_row("cut", "single", 0.98, 500_000, 0.4)
    assert "beats the float parent: what loses at most 1 point is no smaller." in text(of(large))
    assert "beats the float parent: there is no other file." in text(of())


def test_the_parent_in_int8_is_shipped_where_it_beats_all():
    worse = a_row("mix", "mixture", 0.975, 150_000, 0.8)
    assert "without training: no other file is better in anything beyond the noise." in text(
        of(INT8, worse)
    )
    faster = a_row("mix", "mixture", 0.975, 150_000, 0.3)
    said = text(of(INT8, faster))
    assert "without training: no other file that loses at most 1 point is smaller." in said
    assert "“mix” (−0.40 points against int8) is 1.50× larger than it." in said


def test_a_mixture_that_an_expert_beats_on_every_axis_is_not_praised():
    expert, mixture = (
        a_row("expert 1", "expert", 0.975, 20_000, 0.3),
        a_row("mix", "mixture", 0.974, 60_000, 0.5),
    )
    said = text(of(INT8, expert, mixture))
    assert said.startswith("Ship expert 1, accuracy 97.50 %")
    assert ("“mix” buys nothing: “expert 1” is more accurate, smaller and faster.") in said
    # Ahead by less than chance explains: 2 of 200 images, p = 0.5.
    right = [1] * 195 + [0] * 5
    better = a_row("mix", "mixture", 0.985, 60_000, 0.5, correct=[1] * 197 + [0] * 3)
    other = a_row("expert 1", "expert", 0.975, 20_000, 0.3, correct=right)
    assert "“expert 1” is as accurate within chance, smaller and faster." in text(
        of(INT8, other, better)
    )
    # Beyond it: 10 of 200.
    better = a_row("mix", "mixture", 1.0, 60_000, 0.5, correct=[1] * 200)
    other = a_row("expert 1", "expert", 0.975, 20_000, 0.3, correct=[1] * 190 + [0] * 10)
    said = text(of(INT8, other, better))
    assert "buys nothing" not in said
    assert "“mix” (+2.50 points against expert 1, p = 0.002) is 3.00× larger than it." in said


def test_a_mixture_that_is_shipped_says_what_it_does_not_beat():
    rows = (
        a_row("mix", "mixture", 0.979, 60_000, 0.5, correct=[1] * 10),
        a_row("equal", "control", 0.979, 60_000, 0.5, correct=[1] * 10, rival=True),
        a_row("blind", "control", 0.3, 60_000, 0.5, correct=[0] * 7 + [1] * 3, rival=True),
    )
    assert "In accuracy it does not beat equal." in text(of(INT8, *rows))


def test_times_within_the_noise_are_alike():
    a = a_row("a", "single", 0.98, 100, 1.02)
    b = a_row("b", "single", 0.98, 100, 1.05)
    c = a_row("c", "single", 0.98, 100, 1.10)
    results = of(a, b, c)
    own = {found.row.name: found for found in choice.candidates(results)}
    assert choice.axes(results, own["a"], own["b"])["time"] == 0
    assert choice.axes(results, own["a"], own["c"])["time"] == 1
    assert choice.axes(results, own["c"], own["a"])["time"] == -1
    measured = a_row("a", "single", 0.98, 100, 1.01)
    measured.files["onnx"].__dict__["milliseconds"] = 1.5
    assert "and takes 1.50 ms an image (the parent's time, within the noise)." in text(of(measured))


def test_axes_without_numbers_are_left_out_and_macs_stand_in_for_time():
    a = a_row("a", "single", 0.98, 100, macs=10, memory=5)
    b = a_row("b", "single", 0.97, 200, macs=20)
    results = of(a, b)
    own = {found.row.name: found for found in choice.candidates(results)}
    assert choice.axes(results, own["a"], own["b"]) == {"accuracy": 1, "bytes": 1, "MACs": 1}
    assert choice.dominates(results, own["a"], own["b"])
    assert not choice.dominates(results, own["a"], own["a"])


FILES = st.tuples(st.sampled_from([0.9, 0.97, 0.975, 0.98]), st.integers(1, 4), st.floats(0.1, 2))


@given(st.lists(FILES, min_size=1, max_size=6), st.sampled_from([0.0, 0.01, 0.1]))
def test_what_is_chosen_is_never_dominated_by_what_is_allowed(files, loss):
    rows = [
        a_row(f"net {i}", "single", accuracy, size, ratio)
        for i, (accuracy, size, ratio) in enumerate(files)
    ]
    results = of(*rows, allowed_loss=loss)
    (own,) = choose(results).values()
    assert own.file.accuracy >= 0.98 - loss - 1e-9
    for other in choice.candidates(results):
        allowed = other.file.accuracy >= 0.98 - loss - 1e-9
        assert not (allowed and choice.dominates(results, other, own))
        assert not (allowed and other.file.bytes < own.file.bytes)


def test_each_target_has_its_choice_and_alike_reasons_are_said_once(ptq):
    results = Results.from_json(ptq)
    assert chosen(results) == {"onnx": "W4A8 GPTQ", "tflite": "int8", "c": "W4A8 GPTQ"}
    lines = headline(results)
    assert [line.split(":")[0] for line in lines[:2]] == [
        "For onnx and c ship W4A8 GPTQ, accuracy 68.20 % (−0.60 points against the parent, "
        "p = 0.031)",
        "For tflite ship int8, accuracy 68.60 % (−0.20 points against the parent, within chance)",
    ]
    # 1090 / 146 = 7.47 and 1088 / 139 = 7.83; 0.412 ms · 0.43 = 0.177 ms.
    assert lines[0].split(": ")[1] == (
        "deploy/W4A8_GPTQ.onnx has 146 kB (7.47× smaller than the parent) and takes 0.177 ms an "
        "image (0.43× the parent's time); deploy/W4A8_GPTQ.c has 139 kB (7.83× smaller than the "
        "parent) and takes 0.177 ms an image (0.43× the parent's time)."
    )
    assert lines[2:] == [
        "onnx and c: It is the smallest of 2 files that lose at most 1 point.",
        "tflite: It is the parent in int8, without training: no other file that loses at most "
        "1 point is smaller.",
    ]


def test_of_another_metric_the_loss_is_a_share_of_the_parents(regression):
    results = Results.from_json(regression)
    # 1 % of 0.8731 is 0.0087: int8 loses 0.0029, the pruned network 0.0608.
    assert chosen(results) == {"onnx": "net int8"}
    assert headline(results)[0] == (
        "Ship net int8, R² 0.8702 (−0.0029 against the parent, p < 0.001): deploy/net_int8.onnx "
        "has 25.0 kB (3.84× smaller than the parent) and takes 0.247 ms an image (0.60× the "
        "parent's time)."
    )
    assert "at most 1 % of the parent's R² is smaller" in headline(results)[1]
    regression["allowed_loss"] = 0.1
    assert chosen(Results.from_json(regression)) == {"onnx": "pruned"}


def test_the_table_has_a_line_for_each_file_and_marks_the_one_to_ship(make_results):
    table = shipping.table(Results.from_json(make_results()))
    assert table.header == (
        "model", "target", "accuracy", "Δ", "size", "RAM", "MACs", "time", "× parent",
    )  # fmt: skip
    assert [row[0] for row in table.rows] == [
        "dense", "dense int8", "expert 0", "expert 1", "expert 2", "expert 3", "mixture",
    ]  # fmt: skip
    assert {table.rows[i][0] for i in table.strong} == {"expert 2"}
    # 351 / 360 = 97.50 %, −3 / 360 = −0.83 points; 0.412 ms · 0.31 = 0.128 ms.
    assert table.rows[4][2:] == (
        percent(351 / 360), "−0.83", "14.3 kB", "4.10 kB", "815 k", "0.128 ms", "0.31× (0.30–0.34)",
    )  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "c"])
def test_ram_is_the_files_where_it_says_so(ptq, target):
    table = shipping.table(Results.from_json(ptq))
    found = {row[0]: row[table.header.index("RAM")] for row in table.rows if row[1] == target}
    assert found["int8"] == {"onnx": "49.0 kB", "c": "12.6 kB"}[target]


def test_within_a_budget_the_most_accurate_file_is_shipped():
    rows = [
        Row(name, role, accuracy, macs=macs, files={"c": File(name, size, accuracy, ram=ram)})
        for name, role, accuracy, size, ram, macs in [
            ("net", "parent", 0.98, 400, 90, 9e6),
            ("int8", "parent_int8", 0.975, 100, 30, 9e6),
            ("cut", "single", 0.90, 50, 20, 5e6),
            ("less", "expert", 0.89, 20, 10, 3e6),
        ]
    ]
    found = Results(tuple(rows), limits={"bytes": 64, "memory": 25})
    assert choice.choose(found)["c"].row.name == "cut"
    assert any("the budget of 64 B and 25 B of memory" in line for line in headline(found))
    none = Results(tuple(rows), limits={"macs": 1000})
    assert choice.choose(none)["c"].row.name == "int8"
    assert any("No file keeps the budget of 1" in line for line in headline(none))
