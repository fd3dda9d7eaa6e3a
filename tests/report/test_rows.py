import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.report import File, Results, Row, read, save
from hybrid_jax.report.rows import ROLES, Mean, difference

NUMBERS = st.none() | st.floats(0, 1e9)
FILES = st.builds(
    File, st.text(), bytes=NUMBERS, ratio=NUMBERS, ratio_quartiles=st.none() | st.just((0.5, 1.0)),
    kernel_bits=st.sampled_from([(), (4, 8)]),
)  # fmt: skip


@given(
    st.builds(
        Row,
        st.text(),
        st.sampled_from(ROLES),
        NUMBERS,
        correct=st.none() | st.lists(st.integers(0, 1)).map(tuple),
        files=st.dictionaries(st.text(), FILES, max_size=2),
        rival=st.booleans(),
        equal=st.sampled_from([None, "bytes", "bops"]),
    )
)
def test_a_row_survives_json(row):
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


@pytest.mark.parametrize("role", ["dense", "Parent", ""])
def test_a_role_that_there_is_not_is_refused(role):
    with pytest.raises(ValueError, match="role of row 'net' must be one of parent, parent_int8"):
        Row("net", role, 0.9)


def test_other_keys_give_one_error_that_names_them(make_results):
    for change, message in (
        (lambda r: r["rows"][2].update(kind="expert"), r"rows\[2\] must have .* got 'kind': a run"),
        (lambda r: r["rows"][2].pop("role"), r"rows\[2\] must have .* got no 'role'"),
        (lambda r: r["rows"][0]["files"]["onnx"].update(p95=1), r"files\['onnx'\] must .* 'p95'"),
        (lambda r: r["rows"][0].update(macs="3 M"), r"rows\[0\].macs must be a number, got '3 M'"),
        (lambda r: r["rows"][0].update(equal="size"), r"equal of row 'dense' must be one of"),
        (lambda r: r["rows"][0].update(name="mixture"), r"names of their own, got 'mixture' twice"),
        (lambda r: r["rows"].__setitem__(1, "net"), r"rows\[1\] must be an object, got str"),
        (lambda r: r.update(exports=[]), r"results must have the keys rows, .* got 'exports'"),
        (lambda r: r.update(rows=[]), r"results.rows must hold at least one row"),
    ):
        results = make_results()
        change(results)
        with pytest.raises(ValueError, match=message) as error:
            Results.from_json(results)
        assert "\n" not in str(error.value)


def test_what_is_missing_or_not_finite_is_none():
    value = {"name": "net", "role": "parent", "accuracy": math.nan, "macs": math.inf, "note": None}
    assert Row.from_json(value) == Row("net", "parent", None)
    assert Results.from_json({"rows": [value], "gate": None}).gate == {}


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.json of a finished run, got"):
        read(tmp_path)
    for text in ("", "{", "[]", "\0", "{}", "[" * 10**5):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results.json must be as it was written, got: .*\S"):
            read(tmp_path)


def test_results_that_were_altered_are_not_believed(make_results, tmp_path):
    results = Results.from_json(make_results())
    save(results, tmp_path)
    assert read(tmp_path).rows == results.rows
    path = tmp_path / "results.json"
    text = path.read_text()
    path.write_text(re.sub(r'("accuracy": 0\.)(\d)', r"\g<1>9\2", text, count=1))
    assert path.read_text() != text
    with pytest.raises(ValueError, match="it was changed; the command of the run writes it again"):
        read(tmp_path)


def test_differences_of_means_are_paired():
    # 0.9 − 0.8 = 0.1 and 0.92 − 0.9 = 0.02: mean 0.06, deviation 0.08 / √2.
    gap = difference(Mean((0.9, 0.92)), Mean((0.8, 0.9)))
    assert gap == pytest.approx(0.06)
    assert gap.std == pytest.approx(0.08 / math.sqrt(2))
    assert difference(0.5, None) is None
    assert Mean((0.1, 0.1, 0.1)) == 0.1
    assert Mean((1.0,)).std is None
