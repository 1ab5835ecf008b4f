"""One file per method, to be read with the paper next to it: its settings, its losses, its `train_step`, its Info.

The constructors (`avb`, `vae`, ...) are exported by `avb_jax`; the pure losses are functions of these modules.
"""
