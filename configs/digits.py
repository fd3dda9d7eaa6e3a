"""The whole method on scikit-learn's handwritten digits: 8×8 scans that come with the package.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998; 1,797 scans,
of which 359 are test and 15 % of the others validation.

    python -m launch.compress --config=configs/digits.py --workdir=/tmp/digits
"""

from ml_collections import ConfigDict

from hybrid_jax import recipes


def get_config() -> ConfigDict:
    """Returns the configuration: but for one key the defaults are those of the digits."""
    config = recipes.default_config()
    # One expert is compiled instead of four: at this size that is what takes the time.
    config.experts.method = "map"
    return config
