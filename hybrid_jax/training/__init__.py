"""Training of one network or a stack of experts: steps, loop, checkpoints, losses, evaluation."""

from hybrid_jax.core import weighted_mean
from hybrid_jax.training.batchnorm import reestimate_batchnorm
from hybrid_jax.training.checkpoints import Checkpoints
from hybrid_jax.training.evaluation import evaluate, predict_logits
from hybrid_jax.training.loop import fit
from hybrid_jax.training.losses import (
    classification,
    cross_entropy,
    distillation_loss,
)
from hybrid_jax.training.precision import compute_in
from hybrid_jax.training.progress import progress, track
from hybrid_jax.training.records import read_records, write_record
from hybrid_jax.training.sharding import data_mesh, replicate, shard_batch
from hybrid_jax.training.state import TrainState, copy, create_state, expert_state, stack_states
from hybrid_jax.training.steps import make_stacked_step, make_step

__all__ = [
    "Checkpoints",
    "TrainState",
    "classification",
    "compute_in",
    "copy",
    "create_state",
    "cross_entropy",
    "data_mesh",
    "distillation_loss",
    "evaluate",
    "expert_state",
    "fit",
    "make_stacked_step",
    "make_step",
    "predict_logits",
    "progress",
    "read_records",
    "reestimate_batchnorm",
    "replicate",
    "shard_batch",
    "stack_states",
    "track",
    "weighted_mean",
    "write_record",
]
