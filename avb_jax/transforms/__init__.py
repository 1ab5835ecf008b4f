"""What changes any method alike: each takes a `Method` and gives a `Method`, as optax wraps optimisers."""

from avb_jax.transforms.devices import over_devices
from avb_jax.transforms.ema import with_ema
from avb_jax.transforms.seeds import of_seed, over_seeds

__all__ = ["of_seed", "over_devices", "over_seeds", "with_ema"]
