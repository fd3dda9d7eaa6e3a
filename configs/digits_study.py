r"""The digits of the first command over five splits: what at this size can be told apart.

    python -m launch.study --config=digits_study --workdir=/tmp/digits --test

Two cores, 3 to 6 minutes for each seed.
"""

from configs import digits

SEEDS = (0, 1, 2, 3, 4)
SEEDED = ("seed", "data.seed")
STUDY = {"digits": {}}
get_config = digits.get_config
