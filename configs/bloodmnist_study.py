r"""BloodMNIST over three seeds: the mixture of `configs/bloodmnist.py` beside what it has to beat.

    python -m launch.study --config=bloodmnist_study --workdir=/tmp/blood \
        --config.data.dir=bloodmnist.npz

The file is a part of MedMNIST (Yang et al., MedMNIST v2, arXiv 2110.14795); none of it was run yet.
Each seed trains its own parent. The best by validation are then run with `--test`, once.
"""

from configs import bloodmnist

SEEDS = (0, 1, 2)
SINGLE = {"effort": "finetune"}
STUDY = {
    "one network of half the MACs": {**SINGLE, "budget.macs": 0.5},
    "one network of a quarter of the MACs": {**SINGLE, "budget.macs": 0.25},
    "mixture behind a gate": {},
    "cascade": {
        "mixture.kind": "cascade",
        "experts.count": 2,
        "experts.diversity": "width",
        "budget.macs": 0.25,
    },
}
get_config = bloodmnist.get_config
