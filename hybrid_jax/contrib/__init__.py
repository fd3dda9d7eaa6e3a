"""Methods of research that buy no byte and no millisecond on a device.

Here are sparse training, lottery tickets, sparsity inside of a kernel, and dispatch by capacity:
files for ONNX, LiteRT, C and StableHLO hold dense kernels, and a device runs one expert. They are
tested as all else is and promised nothing more; no config names them, and nothing imports them.
"""

from hybrid_jax.contrib.capacity import capacity, expert_choice
from hybrid_jax.contrib.dispatch import gathered
from hybrid_jax.contrib.granularity import GRANULARITIES, blocks, kernels, n_m
from hybrid_jax.contrib.lottery import Ticket, instability, lottery_tickets
from hybrid_jax.contrib.packing import pack_masks, unpack_masks
from hybrid_jax.contrib.rewiring import RewireState, rewire, rigl, set_
from hybrid_jax.contrib.straight_through import StraightThroughState, straight_through
from hybrid_jax.contrib.synflow import synaptic_flow, synflow, synflow_masks
