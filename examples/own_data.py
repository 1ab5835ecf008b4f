"""A data set of one's own, here measurements of wines, trained on and evaluated: `python examples/own_data.py`."""

import jax
import numpyro.distributions as dist
import optax
import sklearn.datasets

import avb_jax
from avb_jax import distributions, evaluation, networks

x = sklearn.datasets.load_wine().data
x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype("float32")  # [178, 13]
likelihood = lambda output: dist.Normal(output[..., 0], 0.05 + jax.nn.softplus(output[..., 1])).to_event(1)  # noqa: E731
encoder, decoder = networks.GaussianEncoder(networks.MLP((64,)), 2, head_scale=0.01), networks.MLPDecoder((13,), 2, (64,))
prior = distributions.standard_normal(2)
method = avb_jax.vae(encoder, decoder, prior=prior, likelihood=likelihood, optimizers=optax.adam(1e-3), noise_dim=2)
state = avb_jax.fit(method, x[:150], steps=2000, batch_size=64)
report = avb_jax.evaluate(method, state, x[150:], [evaluation.ELBO(), evaluation.Quadrature(), evaluation.Moments()])
print(report.to_markdown())
