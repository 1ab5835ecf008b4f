"""One file per method, all with the same signatures; `METHODS` finds them by name."""

from avb_jax.methods import avb, vae

METHODS = {"avb": avb, "vae": vae}
