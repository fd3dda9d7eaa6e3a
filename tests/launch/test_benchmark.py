"""Every benchmark runs, and what it measured is in the table."""

import importlib.util
import io
import json
import math

import pytest
import rich.console

from launch import benchmark, benchmarks

ROWS = {
    "core": [
        "trace and group",
        "trace, group and slice",
        "trace to the small function, no certificate / trace",
        "forward at half the width / dense",
        "forward with identity at_sites / plain",
        "compiled instructions with identity at_sites / plain",
    ],
    "pruning": [
        "training step with hold_masks / plain",
        "training step with prune_by_schedule, no mask update / plain",
        "10 training steps with prune_by_schedule, 1 mask update / plain",
        # 3*3*3*4 + 2*3*3*4*4 + 4*10 weights of kernels, 10 + 3*2*4 of biases and BatchNorm
        "masks of 0.00047 M parameters, uniform",
        "masks of 0.00047 M parameters, global",
        "trace and group",
        "channels to half of the MACs",
        "sensitivity of 4 kernels at 4 sparsities",
    ],
    "quantization": ["QAT step / plain", "QAT step, bits as data / plain"],
    "training": [
        "tiny: step / XLA's own",
        "tiny: step with held masks / plain",
        "tiny: step of QAT / plain",
        "tiny: step of QAT with a teacher / plain",
        "scan of 3 steps / separate steps",
        "batch / step",
    ],
    "scaling": [
        *(
            f"{kind} step, {count} devices / {count} steps on one"
            for kind in ("plain", "pruned", "QAT", "stacked")
            for count in (2, 4)
        ),
        *(f"batch / step, {count} devices" for count in (2, 4)),
    ],
    "experts": [
        *(
            f"step of 4 stacked experts, {method} / 4 separate steps"
            for method in ("vmap", "map", "unroll", "auto")
        ),
        "top-1 mixture, gate and one expert / one expert",
        "the same, parameters as arguments / one expert",
        "top-1 mixture, all experts / one expert",
    ],
    "microcontroller": [
        f"{network}, {processor} {optimize}"
        for network in ("tiny int8", "tiny int4", "mixture of two int8", "cascade, int4 then int8")
        for processor in ("Cortex-M4F", "Cortex-M0+")
        for optimize in ("-O2", "-Os")
    ],
}
SLOW = ("quantization", "microcontroller", "scaling")
QWIX = ["QAT step / Qwix OdmlQatProvider", "QAT step / Qwix QtProvider"]


def text(results):
    console = rich.console.Console(file=io.StringIO(), width=250)
    console.print(benchmark.table(results))
    return console.file.getvalue()


def names(what):
    if what == "deploy":
        return list(deployed())
    rows = [*ROWS[what]]
    if what == "quantization" and importlib.util.find_spec("qwix"):
        rows += QWIX
    if what == "training" and importlib.util.find_spec("torch"):
        rows.insert(1, "tiny: step / PyTorch")
    return rows


def deployed():
    """One row for each runtime, variant and batch; C's floats are no reference, its int8 is."""
    for target in ("stablehlo", "onnx", "openvino", "tflite", "packed", "c"):
        if target == "openvino" and not importlib.util.find_spec("openvino"):
            continue
        first = [] if target == "c" else ["dense int8", "half float32"]
        reference = "dense int8" if target == "c" else "dense float32"
        # In the order in which the variants are made: dense, then half.
        for variant in [*first, "half int8"]:
            for batch in (1, 2):
                yield f"{target}: tiny {variant} / {reference}, batch {batch}"
    for target in ("onnx", "openvino"):
        if importlib.util.find_spec("openvino" if target == "openvino" else "onnxruntime"):
            for form in ("8 bits, uint8", "7 bits, int8"):
                for batch in (1, 2):
                    yield f"{target}: tiny {form} / 8 bits, int8, batch {batch}"


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # by Qwix
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.slow if what in SLOW else ())
        for what in benchmarks.BENCHMARKS
    ],
)
def test_every_row_is_there_and_finite(what):
    if what == "microcontroller":
        pytest.importorskip("ziglang")
        pytest.importorskip("unicorn")
    results = benchmark.main(what, "small")
    assert [row["name"] for row in results["rows"]] == names(what)
    for row in results["rows"]:
        assert 0 < row["low"] <= row["value"] <= row["high"] < math.inf, row
        assert row["name"] in text(results)
    json.dumps(results)


def test_microcontrollers_are_left_out_with_a_word(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main("microcontroller", "small")["rows"] == []
    assert "left out without ziglang and unicorn" in capsys.readouterr().err


def test_identity_at_sites_compiles_to_as_much():
    rows = benchmarks.BENCHMARKS["core"][-1](benchmarks.SIZES["small"])
    assert [row.value for row in rows][-1] == 1.0


def test_a_missed_target_is_marked_at_full_size_alone():
    rows = [
        benchmarks.Row("slow / fast", 2.0, 1.5, 2.5, "×", 1.05)._asdict(),
        benchmarks.Row("trace", 1.25, 1.0, 1.5, "s", 2.0)._asdict(),
    ]
    results = {"what": "core", "size": "full", "rows": rows, "environment": {"device": "cpu"}}
    slow, trace = (line for line in text(results).splitlines() if " × " in line or " s " in line)
    assert "2 ×" in slow
    assert "1.5–2.5" in slow
    assert "≤ 1.05 × missed" in slow
    assert "≤ 2 s" in trace
    assert "missed" not in trace
    assert "missed" not in text(results | {"size": "small"})


def test_output(tmp_path, monkeypatch, capsys):
    rows = [benchmarks.Row("one / other", 1.0, 1.0, 1.0, "×")]
    monkeypatch.setitem(benchmarks.BENCHMARKS, "core", (lambda size: rows,))
    path = tmp_path / "core.json"
    assert benchmark.cli(["benchmark", "--what=core", "--size=small", f"--output={path}"]) == 0
    assert "one / other" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"] == [rows[0]._asdict()]


BAD = {
    "--what=prunning": "--what must be one of core, pruning, quantization, experts, "
    "deploy, training, scaling, microcontroller, got 'prunning'; did you mean pruning?",
    "--size=big": "--size must be one of small, full, got 'big'",
    "--output=/no/such/place.json": "--output must be a file in a directory that exists, "
    "got /no/such/place.json",
    "core": "arguments must be flags, got 'core'; write --name=value",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_flags(argument, capsys):
    assert benchmark.cli(["benchmark", "--what=core", argument]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {BAD[argument]}\n")
