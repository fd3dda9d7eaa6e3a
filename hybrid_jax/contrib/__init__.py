"""Methods of research that buy no byte and no millisecond on a device.

Here are sparse training, lottery tickets, sparsity inside of a kernel, and dispatch by capacity:
files for ONNX, LiteRT, C and StableHLO hold dense kernels, and a device runs one expert. They are
tested as all else is and promised nothing more; no config names them, and nothing imports them.
"""

from hybrid_jax.contrib.capacity import capacity as capacity
from hybrid_jax.contrib.capacity import expert_choice as expert_choice
from hybrid_jax.contrib.dispatch import gathered as gathered
from hybrid_jax.contrib.granularity import GRANULARITIES as GRANULARITIES
from hybrid_jax.contrib.granularity import blocks as blocks
from hybrid_jax.contrib.granularity import kernels as kernels
from hybrid_jax.contrib.granularity import n_m as n_m
from hybrid_jax.contrib.lottery import Ticket as Ticket
from hybrid_jax.contrib.lottery import barrier as barrier
from hybrid_jax.contrib.lottery import errors_between as errors_between
from hybrid_jax.contrib.lottery import instability as instability
from hybrid_jax.contrib.lottery import interpolate as interpolate
from hybrid_jax.contrib.lottery import lottery_tickets as lottery_tickets
from hybrid_jax.contrib.packing import pack_masks as pack_masks
from hybrid_jax.contrib.packing import unpack_masks as unpack_masks
from hybrid_jax.contrib.rewiring import RewireState as RewireState
from hybrid_jax.contrib.rewiring import rewire as rewire
from hybrid_jax.contrib.rewiring import rigl as rigl
from hybrid_jax.contrib.rewiring import set_ as set_
from hybrid_jax.contrib.straight_through import StraightThroughState as StraightThroughState
from hybrid_jax.contrib.straight_through import straight_through as straight_through
from hybrid_jax.contrib.synflow import synaptic_flow as synaptic_flow
from hybrid_jax.contrib.synflow import synflow as synflow
from hybrid_jax.contrib.synflow import synflow_masks as synflow_masks
