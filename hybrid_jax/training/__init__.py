"""Training of one network or a stack of experts: steps, loop, checkpoints, losses, evaluation."""

from hybrid_jax.core import weighted_mean as weighted_mean
from hybrid_jax.training.batchnorm import reestimate_batchnorm as reestimate_batchnorm
from hybrid_jax.training.checkpoints import Checkpoints as Checkpoints
from hybrid_jax.training.evaluation import evaluate as evaluate
from hybrid_jax.training.evaluation import predict_logits as predict_logits
from hybrid_jax.training.loop import fit as fit
from hybrid_jax.training.losses import classification as classification
from hybrid_jax.training.losses import cross_entropy as cross_entropy
from hybrid_jax.training.losses import distillation_loss as distillation_loss
from hybrid_jax.training.precision import compute_in as compute_in
from hybrid_jax.training.progress import progress as progress
from hybrid_jax.training.progress import track as track
from hybrid_jax.training.records import read_records as read_records
from hybrid_jax.training.records import write_record as write_record
from hybrid_jax.training.sharding import data_mesh as data_mesh
from hybrid_jax.training.sharding import replicate as replicate
from hybrid_jax.training.sharding import shard_batch as shard_batch
from hybrid_jax.training.state import TrainState as TrainState
from hybrid_jax.training.state import copy as copy
from hybrid_jax.training.state import create_state as create_state
from hybrid_jax.training.state import expert_state as expert_state
from hybrid_jax.training.state import stack_states as stack_states
from hybrid_jax.training.steps import make_stacked_step as make_stacked_step
from hybrid_jax.training.steps import make_step as make_step
