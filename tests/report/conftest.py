"""Results as runs leave them: a mixture of four experts, PTQ for three targets, a regression."""

import numpy as np
import pytest

IMAGES = 360
PARENT_MS = 0.412
# name, role, right of 360, parameters (stored, run), bytes, MACs, bits², ratio and its quartiles
ROWS = (
    ("dense", "parent", 354, 78_000, 78_000, 312_000, 3_200_000, 1024, (1.0, 0.98, 1.02)),
    ("dense int8", "parent_int8", 354, 78_000, 78_000, 81_200, 3_200_000, 64, (0.55, 0.52, 0.57)),
    ("expert 0", "expert", 348, 21_000, 21_000, 14_100, 810_000, 16, (0.31, 0.30, 0.33)),
    ("expert 1", "expert", 346, 20_800, 20_800, 13_900, 802_000, 16, (0.30, 0.29, 0.32)),
    ("expert 2", "expert", 351, 21_100, 21_100, 14_300, 815_000, 16, (0.31, 0.30, 0.34)),
    ("expert 3", "expert", 343, 20_900, 20_900, 14_000, 806_000, 16, (1.08, 1.03, 1.12)),
    ("mixture", "mixture", 352, 84_900, 22_000, 57_900, 821_000, 16.9, (0.35, 0.33, 0.38)),
    ("top-2", "control", 353, 84_900, 43_000, None, 1_630_000, 16.6, None),
    ("average", "control", 353, 83_800, 83_800, None, 3_233_000, 16, None),
    ("equal-size net", "control", 352, 70_000, 70_000, 58_100, 2_900_000, 16, (0.9, 0.88, 0.93)),
    ("equal-cost net", "control", 350, 21_800, 21_800, 14_700, 830_000, 16.6, (0.34, 0.33, 0.35)),
    ("random gate", "bound", 347, 84_900, 22_000, None, 821_000, 16.9, None),
    ("oracle gate", "bound", 360, 84_900, 22_000, None, 821_000, 16.9, None),
)
EQUAL = {"equal-size net": "bytes", "equal-cost net": "bops"}
RIVALS = ("average", "random gate", *EQUAL)
SITES = ("Conv_0", *(f"Block_{i}/Conv_{j}" for i in range(3) for j in range(2)), "Dense_0")
ENVIRONMENT = {
    "machine": "x86_64, 2 cores", "date": "2026-11-30", "device": "cpu", "jax": "0.10.2",
    "flax": "0.12.8", "python": "3.11",
}  # fmt: skip


def a_file(name, target, size, accuracy, ratio, **facts):
    """A file as JSON holds it; `ratio` is the median and its quartiles, or None."""
    times = {}
    if ratio:
        middle, *quartiles = ratio
        times = {
            "milliseconds": PARENT_MS * middle,
            "milliseconds_quartiles": [PARENT_MS * q for q in quartiles],
            "ratio": middle,
            "ratio_quartiles": quartiles,
        }
    return {
        "artifact": f"deploy/{name.replace(' ', '_')}.{target}", "bytes": size,
        "accuracy": accuracy, "agreement": 1.0, "max_difference": 3.1e-6, **times, **facts,
    }  # fmt: skip


def _row(entry, seed):
    name, role, right, total, active, size, macs, bits, ratio = entry
    rng = np.random.default_rng([seed, *name.encode()])
    correct = np.ones(IMAGES, int)
    correct[rng.choice(IMAGES, IMAGES - right, replace=False)] = 0
    return {
        "name": name, "role": role, "accuracy": right / IMAGES, "correct": correct.tolist(),
        "parameters_total": total, "parameters_active": active, "macs": macs, "bops": macs * bits,
        "memory": 16_400 if role == "parent" else 4_100, "rival": name in RIVALS,
        "equal": EQUAL.get(name),
        "files": size and {"onnx": a_file(name, "onnx", size, right / IMAGES, ratio)},
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_results():
    """make_results(seed) -> results of a mixture, a fresh dictionary each time."""

    def make(seed=0):
        rng = np.random.default_rng(seed)
        return {
            "config": {"seed": seed, "data": {"name": "digits"}, "experts": {"count": 4}},
            "dataset": {
                "name": "digits",
                "num_classes": 10,
                "class_names": [str(n) for n in range(10)],
                "sizes": {"train": 1257, "validation": 180, "test": IMAGES},
                "mean": [0.25],
                "std": [0.5],
            },
            "rows": [_row(entry, seed) for entry in ROWS],
            "confusion": {
                "expert 2": (35 * np.eye(10, dtype=int) + np.eye(10, k=3, dtype=int)).tolist()
            },
            "layers": [
                {
                    "model": f"expert {e}",
                    "site": f"params/{site}/kernel",
                    "width": int(dense * keep),
                    "dense_width": dense,
                    "sparsity": 0.5 * (e % 2),
                    "weight_bits": 8 if site in ("Conv_0", "Dense_0") else 4,
                    "activation_bits": 8 if site in ("Conv_0", "Dense_0") else 4,
                }
                for e in range(4)
                for site in SITES
                for dense, keep in [(10, 1.0) if site == "Dense_0" else (32, 0.5 + 0.1 * e)]
            ],
            "gate": {
                "usage": rng.dirichlet(np.full(4, 0.7), 10).tolist(),
                "per_epoch": [0.4, 0.9, 1.1, 1.2],
            },
            "disagreement": (0.03 * (1 - np.eye(4))).tolist(),
            "history": {
                stage: [
                    {
                        "step": s,
                        "loss": 2.3 * np.exp(-s / scale) + 0.02,
                        "accuracy": 1 - 0.9 * np.exp(-s / scale),
                    }
                    for s in range(0, steps, 20)
                ]
                for stage, steps, scale in (
                    ("parent", 400, 60),
                    ("experts", 600, 90),
                    ("gate", 200, 40),
                    ("joint", 200, 70),
                )
            },
            "environment": ENVIRONMENT,
            "command": "python -m launch.compress --config=configs/digits.py",
            "seconds": {"parent": 41.2, "experts": 75.0, "gate": 9.5},
        }

    return make


@pytest.fixture
def ptq():
    """A network of 100 classes, quantized without training, for three targets."""
    rng = np.random.default_rng(0)
    right = rng.random(1000) < 0.71

    def correct(lost):
        own = right.copy()
        own[np.flatnonzero(right)[:lost]] = False
        return own.astype(int).tolist()

    def row(name, role, lost, sizes, ratio):
        accuracy = float(right.sum() - lost) / 1000
        files = {
            target: a_file(name, target, size, accuracy, ratio, kernel_bits=[4, 8])
            for target, size in zip(("onnx", "tflite", "c"), sizes, strict=True)
        }
        for facts in (files["c"],):
            facts |= {"flash": facts["bytes"], "ram": 48_200 if role == "parent" else 12_600}
        return {
            "name": name, "role": role, "accuracy": accuracy, "correct": correct(lost),
            "parameters_total": 272_000, "parameters_active": 272_000, "macs": 40_800_000,
            "bops": 40_800_000 * 32, "files": files,
            "memory": 196_000 if role == "parent" else 49_000,
        }  # fmt: skip

    parent = row("ResNet-20", "parent", 0, (1_090_000, 1_092_000, 1_088_000), (1.0, 0.97, 1.03))
    int8 = row("int8", "parent_int8", 2, (282_000, 285_000, 274_000), (0.42, 0.40, 0.45))
    small = row("W4A8 GPTQ", "single", 6, (146_000, 285_000, 139_000), (0.43, 0.41, 0.46))
    small["files"]["tflite"] |= {"ratio": 0.44, "kernel_bits": [8]}
    counts = np.diag(rng.integers(4, 9, 100)) + (rng.random((100, 100)) < 0.02)
    counts[3, 5] = 9
    return {
        "rows": [parent, int8, small],
        "confusion": {name: counts.tolist() for name in ("int8", "W4A8 GPTQ")},
        "dataset": {"name": "CIFAR-100", "sizes": {"test": 1000}},
        "environment": ENVIRONMENT,
        "config": {"effort": "ptq", "seed": 0},
    }


@pytest.fixture
def regression():
    """A network that predicts one number, scored by R², and two that were made of it."""
    rng = np.random.default_rng(0)
    errors = rng.exponential(0.1, 200)

    def row(name, role, value, size, factor, ratio):
        return {
            "name": name, "role": role, "accuracy": value, "correct": (-factor * errors).tolist(),
            "parameters_total": size / 4, "macs": 1_200_000, "memory": 9_000,
            "files": {"onnx": a_file(name, "onnx", size, value, ratio)},
        }  # fmt: skip

    return {
        "metric": "R²",
        "rows": [
            row("net", "parent", 0.8731, 96_000, 1.0, (1.0, 0.98, 1.01)),
            row("net int8", "parent_int8", 0.8702, 25_000, 1.02, (0.6, 0.58, 0.63)),
            row("pruned", "single", 0.8123, 9_000, 1.3, (0.4, 0.38, 0.43)),
        ],
        "environment": ENVIRONMENT,
    }
