"""One file per method, all with the same signatures; `METHODS` finds them by name.

Every method has `init`, `train_step` and `sample`; those with an encoder `sample_posterior` and `reconstruct`, those that
estimate an ELBO `elbo_terms`. `PLAYERS` says what kind each player of the method is, None for one that it lacks:

  encoder    'implicit': any sampler, that under adaptive contrast tells its moments; 'black_box': any; 'gaussian': tells the
             moments of N(mean, diag std^2); 'density': tells those, or log q
  decoder    'likelihood': parameters of p(x|z); 'deterministic': an image
  adversary  'pairs': T(x, z); 'latents': T(z); 'images': T(x)
"""

from avb_jax.methods import aae, avb, bigan, gan, vae, vaegan

METHODS = {"avb": avb, "vae": vae, "aae": aae, "bigan": bigan, "gan": gan, "vaegan": vaegan}
