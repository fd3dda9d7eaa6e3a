"""The whole method, stage by stage: parent, phase 1, phase 2, controls, evaluation, deployment.

job = recipes.prepare(config, workdir)   # checks everything, writes nothing but config.json
results = recipes.run(job)               # resumes, and leaves the report in the work directory
"""

from hybrid_jax.recipes.checks import check_config as check_config
from hybrid_jax.recipes.collapse import collapse as collapse
from hybrid_jax.recipes.config import ExpertSpec as ExpertSpec
from hybrid_jax.recipes.config import default_config as default_config
from hybrid_jax.recipes.config import expert_specs as expert_specs
from hybrid_jax.recipes.config import flatten as flatten
from hybrid_jax.recipes.config import nearest_key as nearest_key
from hybrid_jax.recipes.deployed import Experts as Experts
from hybrid_jax.recipes.evaluation import evaluate as evaluate
from hybrid_jax.recipes.job import Job as Job
from hybrid_jax.recipes.job import Network as Network
from hybrid_jax.recipes.parent import parent as parent
from hybrid_jax.recipes.phase1 import compress as compress
from hybrid_jax.recipes.phase2 import Gate as Gate
from hybrid_jax.recipes.phase2 import fine_tune as fine_tune
from hybrid_jax.recipes.phase2 import learn_gate as learn_gate
from hybrid_jax.recipes.pipeline import export as export
from hybrid_jax.recipes.pipeline import make as make
from hybrid_jax.recipes.pipeline import prepare as prepare
from hybrid_jax.recipes.pipeline import resume as resume
from hybrid_jax.recipes.pipeline import run as run
from hybrid_jax.recipes.programs import Models as Models
from hybrid_jax.recipes.programs import Programs as Programs
from hybrid_jax.recipes.programs import lower as lower
