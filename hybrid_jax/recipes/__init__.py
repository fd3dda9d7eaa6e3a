"""The whole method, stage by stage: parent, phase 1, phase 2, controls, evaluation, deployment.

job = recipes.prepare(config, workdir)   # checks everything, writes nothing but config.json
results = recipes.run(job)               # resumes, and leaves the report in the work directory
"""

from hybrid_jax.recipes.checks import check_config
from hybrid_jax.recipes.collapse import collapse
from hybrid_jax.recipes.config import (
    ExpertSpec,
    default_config,
    expert_specs,
    flatten,
    nearest_key,
)
from hybrid_jax.recipes.evaluation import evaluate
from hybrid_jax.recipes.job import Job, Network
from hybrid_jax.recipes.parent import parent
from hybrid_jax.recipes.phase1 import Experts, compress
from hybrid_jax.recipes.phase2 import Gate, fine_tune, learn_gate
from hybrid_jax.recipes.pipeline import export, make, prepare, resume, run
from hybrid_jax.recipes.programs import Models, Programs, lower

__all__ = [
    "ExpertSpec",
    "Experts",
    "Gate",
    "Job",
    "Models",
    "Network",
    "Programs",
    "check_config",
    "collapse",
    "compress",
    "default_config",
    "evaluate",
    "expert_specs",
    "export",
    "fine_tune",
    "flatten",
    "learn_gate",
    "lower",
    "make",
    "nearest_key",
    "parent",
    "prepare",
    "resume",
    "run",
]
