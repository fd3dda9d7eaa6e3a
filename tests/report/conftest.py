"""Results of a run as recipes leave them: four experts of a small ResNet on the digits."""

import numpy as np
import pytest

IMAGES = 360
# name, kind, correct of 360, parameters (total, active), bytes, macs, bops, latency ratio
ROWS = (
    ("dense", "dense", 354, 78_000, 78_000, 312_000, 3_200_000, 3_200_000 * 1024, 1.0),
    ("expert 0", "expert", 348, 21_000, 21_000, 14_100, 810_000, 810_000 * 16, 0.61),
    ("expert 1", "expert", 346, 20_800, 20_800, 13_900, 802_000, 802_000 * 16, 0.60),
    ("expert 2", "expert", 351, 21_100, 21_100, 14_300, 815_000, 815_000 * 16, 0.63),
    ("expert 3", "expert", 343, 20_900, 20_900, 14_000, 806_000, 806_000 * 16, 1.08),
    ("average of all experts", "control", 353, 83_800, 83_800, 56_300, 3_233_000, 51_728_000, 2.4),
    ("random gate", "control", 347, 84_900, 22_000, 57_900, 821_000, 13_900_000, None),
    ("oracle gate", "control", 360, 84_900, 22_000, 57_900, 821_000, 13_900_000, None),
    ("equal-bytes net", "control", 352, 70_000, 70_000, 58_100, 2_900_000, 46_400_000, 0.98),
    ("equal-BOPs net", "control", 350, 21_800, 21_800, 14_700, 830_000, 13_800_000, 0.62),
    ("mixture top-1", "mixture", 352, 84_900, 22_000, 57_900, 821_000, 13_900_000, 0.70),
    ("mixture top-2", "mixture", 353, 84_900, 43_000, 57_900, 1_630_000, 27_000_000, 1.31),
)
SITES = ("Conv_0", *(f"Block_{i}/Conv_{j}" for i in range(3) for j in range(2)), "Dense_0")


def _row(entry, seed):
    name, kind, right, total, active, size, macs, bops, latency = entry
    rng = np.random.default_rng([seed, *name.encode()])
    correct = np.ones(IMAGES, int)
    correct[rng.choice(IMAGES, IMAGES - right, replace=False)] = 0
    return {
        "name": name, "kind": kind, "accuracy": right / IMAGES,
        "delta": (right - ROWS[0][2]) / IMAGES, "correct": correct.tolist(),
        "parameters_total": total, "parameters_active": active, "bytes": size, "macs": macs,
        "bops": bops, "latency_ratio": latency, "note": "",
    }  # fmt: skip


@pytest.fixture
def make_results():
    """make_results(seed) -> results, a fresh dictionary each time."""

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
                "entropy": 1.2,
                "per_epoch": [0.4, 0.9, 1.1, 1.2],
            },
            "disagreement": (0.03 * (1 - np.eye(4))).tolist(),
            "exports": [
                {
                    "target": "packed",
                    "model": "mixture",
                    "artifact": "deploy/mixture.safetensors",
                    "reference": "dense",
                    "bytes": 57_900,
                    "reference_bytes": 312_000,
                    "kernel_bits": [4, 8],
                    "max_difference": 3.1e-6,
                    "agreement": 1.0,
                    "images": IMAGES,
                    "larger": False,
                    "slower": [],
                    "latency": {"1": {"p50": 1e-4, "p95": 2e-4, "ratio": 0.7}},
                    "memory": {},
                }
            ],
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
            "environment": {"jax": "0.10.2", "flax": "0.12.8", "device": "cpu", "python": "3.11"},
            "command": "python -m launch.compress --config=configs/digits.py",
            "seconds": {"parent": 41.2, "experts": 75.0, "gate": 9.5},
        }

    return make
