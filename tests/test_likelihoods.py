"""Data of every kind with a NumPyro likelihood of its kind, and what a likelihood refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import distributions as dist

import avb_jax
from avb_jax import data, distributions, models, networks
from avb_jax.training.checks import check_values
from avb_jax.training.loop import initial_state, train
from avb_jax.training.programs import Programs

KEY = jax.random.key(4)
EXAMPLES = 40


def reals(rng):
    return 3.0 * rng.standard_normal((EXAMPLES, 5)) - 7.0


def counts(rng):
    return rng.poisson(4.0, (EXAMPLES, 6))


def categories(rng):
    return rng.integers(0, 4, (EXAMPLES, 3))


def one_hot(rng):
    return np.eye(4)[categories(rng)]


def binary(rng):
    return rng.random((EXAMPLES, 4, 4)) < 0.3


def grey(rng):
    return rng.random((EXAMPLES, 4, 4))


def levels(rng):
    return rng.integers(0, 256, (EXAMPLES, 4, 4, 3)).astype(np.uint8)


def normal(output):
    return dist.Normal(output[..., 0], jnp.exp(output[..., 1])).to_event(1)


def poisson(output):
    return dist.Poisson(jax.nn.softplus(output[..., 0])).to_event(1)


def categorical(output):
    return dist.Categorical(logits=output).to_event(1)


def multinomial(output):
    return dist.Multinomial(1, logits=output).to_event(1)


def validated(output):
    return dist.Bernoulli(logits=output[..., 0], validate_args=True).to_event(2)


LIKELIHOODS = {
    "real": (reals, (5, 2), normal),
    "counts": (counts, (6, 1), poisson),
    "categories": (categories, (3, 4), categorical),
    "one-hot": (one_hot, (3, 4), multinomial),
    "binary": (binary, (4, 4, 1), validated),
    "grey": (grey, (4, 4, 1), distributions.bernoulli),
    "256 levels": (levels, (4, 4, 3, 2), distributions.discretized_logistic()),
    "continuous pixels": (levels, (4, 4, 3, 2), distributions.gaussian()),
}


def method_for(name, output_shape, likelihood):
    """A small method for any x, of two latents."""
    decoder = networks.MLPDecoder(output_shape[:-1], output_shape[-1], (8,))
    common = {"prior": distributions.standard_normal(2), "likelihood": likelihood, "optimizers": optax.adam(1e-2)}
    rank = len(output_shape) if likelihood is multinomial else len(output_shape) - 1
    trunk = networks.MLP((8,), input_rank=rank)
    if name == "vae":
        return avb_jax.vae(networks.GaussianEncoder(trunk, 2, head_scale=0.01), decoder, noise_dim=2, **common)
    adversary = networks.InnerProductAdversary(networks.MLP((8,), input_rank=rank), networks.MLP((8,)), 4)
    return avb_jax.avb(networks.BlackBoxEncoder(trunk, 2), decoder, adversary, noise_dim=3, **common)


def test_categories_are_drawn_since_they_have_no_mean():
    """NumPyro's mean of them is no number."""
    of_x = dist.Categorical(logits=jnp.zeros((50, 3, 4))).to_event(1)
    assert not models.has_mean(of_x)
    assert set(np.unique(models.images_of(KEY, of_x))) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param("vae", kind, marks=[pytest.mark.slow] * (kind not in ("counts", "real"))) for kind in LIKELIHOODS),
        ("avb", "categories"),
    ],
)
@pytest.mark.slow
def test_every_kind_of_data_is_trained_on(name, kind):
    """The ELBO rises in some steps on a plain array; the joint density is the likelihood's and the prior's."""
    make, shape, likelihood = LIKELIHOODS[kind]
    examples = make(np.random.default_rng(0))
    method = method_for(name, shape, likelihood)
    first = initial_state(method, data.from_arrays(examples), 1, None)
    last = train(method, examples, steps=60, batch_size=20, parallel="jit", state=first)
    x = jnp.asarray(examples / 255 if examples.dtype == np.uint8 else examples, jnp.float32)
    before, after = (jax.jit(method.elbo)(KEY, state, x).elbo for state in (first, last))
    assert before.shape == after.shape == (EXAMPLES,)
    assert np.isfinite(after).all()
    assert after.mean() > before.mean()
    z = jax.random.normal(KEY, (EXAMPLES, 2))
    of_x = likelihood(networks.MLPDecoder(shape[:-1], shape[-1], (8,)).apply({"params": last.params.decoder}, z))
    joint = of_x.log_prob(x.astype(int) if kind == "categories" else x) + jax.scipy.stats.norm.logpdf(z).sum(axis=1)
    np.testing.assert_allclose(method.log_joint(last, x, z), joint, rtol=1e-4, atol=1e-4)
    assert np.isfinite(joint).all()


REFUSED = {
    "pixels in 0..255": (
        (16, 1, distributions.bernoulli),
        lambda: np.arange(320.0).reshape(20, 16) % 256,
        "scale them to .0, 1.",
    ),
    "below 0": (
        (16, 1, distributions.bernoulli),
        lambda: np.full((20, 16), -0.1),
        "from -0.1 to -0.1, and the likelihood Bern",
    ),
    "grey, validated": (
        (16, 1, lambda o: dist.Bernoulli(logits=o[..., 0]).to_event(1)),
        lambda: np.full((20, 16), 0.4),
        "make",
    ),
    "levels": ((16, 2, distributions.discretized_logistic()), lambda: np.full((20, 16), 1.5), r"is of Unit.*such as \[0, 1\]"),
    "halves": ((16, 1, poisson), lambda: np.full((20, 16), 2.5), "from 2.5 to 2.5, and the likelihood Poisson .*whole numbers"),
    "uint8": ((16, 1, poisson), lambda: np.full((20, 16), 3, np.uint8), "not as uint8"),
    "a fifth of 4": ((16, 4, categorical), lambda: np.tile(np.arange(5)[:, None], (4, 16)), "from 0 to 4, and .* Categorical"),
    "negative": ((16, 1, lambda o: dist.LogNormal(o[..., 0], 1.0).to_event(1)), lambda: -np.ones((20, 16)), "LogNormal"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.slow
def test_values_that_a_likelihood_does_not_have_are_refused(case):
    """Before the first step, in one line with the range, the distribution and a remedy."""
    (size, numbers, likelihood), make, message = REFUSED[case]
    method = method_for("vae", (size, numbers), likelihood)
    if case in ("grey, validated",):
        assert dist.Bernoulli(logits=0.0)._validate_args  # NumPyro's default, which a session can change
    with pytest.raises(avb_jax.UserError, match=message) as error:
        train(method, make(), steps=3, batch_size=4)
    assert "\n" not in str(error.value)


def test_one_bad_value_is_found_anywhere():
    """In the last of several chunks, whatever the others are, and also of several seeds and of an iterator."""
    examples = np.zeros((1200, 16))
    examples[-1, 3] = 2.0
    method = method_for("vae", (16, 1), distributions.bernoulli)
    for given in (examples, iter([examples[-4:]])):
        with pytest.raises(avb_jax.UserError, match="from 0 to 2"):
            train(method, given, steps=1, batch_size=4, num_seeds=2)
    grey_first = np.zeros((1200, 4, 4))
    grey_first[0] = 0.5
    with pytest.raises(avb_jax.UserError, match=r"from 0 to 0\.5"):
        train(method_for("vae", (4, 4, 1), validated), grey_first, steps=1, batch_size=4)


@pytest.mark.slow
def test_what_is_prepared_counts():
    """Intensities that the device makes binary are nothing to refuse, nor are images where there is no density."""
    grey_images = data.from_arrays(np.full((20, 4, 4), 0.4), binarize="dynamic")
    method = method_for("vae", (4, 4, 1), validated)
    check_values(method, grey_images, initial_state(method, grey_images, 0, None), 0, None, Programs())
    adversary = networks.ImageAdversary(networks.MLP((8,), input_rank=2))
    decoder = networks.MLPDecoder((4, 4), 1, (8,))
    gan = avb_jax.gan(decoder, adversary, prior=distributions.standard_normal(2), optimizers=optax.adam(1e-3))
    train(gan, np.full((20, 4, 4), -3.0), steps=1, batch_size=4, parallel="jit")
