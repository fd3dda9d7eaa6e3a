"""Training of one network or a stack of experts: steps, loop, checkpoints, losses, evaluation."""

from hybrid_jax.core import copy
from hybrid_jax.training.batchnorm import reestimate_batchnorm
from hybrid_jax.training.checkpoints import Checkpoints
from hybrid_jax.training.evaluation import evaluate, predict_logits
from hybrid_jax.training.loop import fit
from hybrid_jax.training.losses import cross_entropy, distillation_loss, squared_error
from hybrid_jax.training.objectives import (
    OBJECTIVES,
    Objective,
    check_objective,
    class_probability,
    classification,
    example_loss,
    loss_of,
    objective,
    regression,
)
from hybrid_jax.training.precision import compute_in
from hybrid_jax.training.progress import progress, track
from hybrid_jax.training.records import read_records, write_record
from hybrid_jax.training.sharding import (
    data_mesh,
    fitting_mesh,
    own_rows,
    place_state,
    replicate,
    shard_batch,
)
from hybrid_jax.training.state import TrainState, create_state, stack_states
from hybrid_jax.training.statistics import running_statistics
from hybrid_jax.training.steps import make_stacked_step, make_step, of_views
