"""The whole method in one call, made of stages that each go from state to state.

result = recipes.compress((module, variables), (images, labels), workdir='run')
result = recipes.run(config, 'run')  # the same, of a configuration

`efforts` has the method on one page.
"""

from etils import epy

# Each is imported when it is first asked for: a mistake in the configuration is told before JAX is.
with epy.lazy_api_imports(globals()):
    from hybrid_jax.quantization import CannotBeMet as CannotBeMet
    from hybrid_jax.recipes.budget import Budget as Budget
    from hybrid_jax.recipes.config import ExpertSpec as ExpertSpec
    from hybrid_jax.recipes.config import check_read as check_read
    from hybrid_jax.recipes.config import expert_specs as expert_specs
    from hybrid_jax.recipes.cut import Cut as Cut
    from hybrid_jax.recipes.cut import Model as Model
    from hybrid_jax.recipes.efforts import EFFORTS as EFFORTS
    from hybrid_jax.recipes.pipeline import Result as Result
    from hybrid_jax.recipes.pipeline import compress as compress
    from hybrid_jax.recipes.pipeline import export as export
    from hybrid_jax.recipes.pipeline import of_config as of_config
    from hybrid_jax.recipes.pipeline import run as run
    from hybrid_jax.recipes.schema import default_config as default_config
    from hybrid_jax.recipes.schema import flag_values as flag_values
    from hybrid_jax.recipes.schema import flatten as flatten
    from hybrid_jax.recipes.schema import override as override
    from hybrid_jax.recipes.schema import read as read
    from hybrid_jax.recipes.sections import Config as Config
    from hybrid_jax.recipes.state import Stage as Stage
    from hybrid_jax.recipes.state import State as State
    from hybrid_jax.recipes.task import Task as Task
    from hybrid_jax.recipes.usage import help_text as help_text
    from hybrid_jax.recipes.usage import table as table
