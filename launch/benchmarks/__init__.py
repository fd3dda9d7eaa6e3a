"""What `python -m launch.benchmark` measures: functions (size) -> rows, by the name of their part.

`BENCHMARKS[what]` are the benchmarks of a part, `SIZES[name]` what they run on.
"""

from launch.benchmarks import (
    core,
    deploy,
    experts,
    microcontroller,
    pruning,
    quantization,
    scaling,
    training,
)
from launch.benchmarks.measure import SIZES, Row, Size

BENCHMARKS = {
    "core": core.BENCHMARKS,
    "pruning": pruning.BENCHMARKS,
    "quantization": quantization.BENCHMARKS,
    "experts": experts.BENCHMARKS,
    "deploy": deploy.BENCHMARKS,
    "training": training.BENCHMARKS,
    "scaling": scaling.BENCHMARKS,
    "microcontroller": microcontroller.BENCHMARKS,
}

__all__ = ["BENCHMARKS", "SIZES", "Row", "Size"]
