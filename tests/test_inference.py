"""AVB for given densities: what is known of them in closed form or by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from flax import linen as nn
from numpyro import distributions as dist
from scipy import stats

from avb_jax import Players, UserError, inference, networks
from avb_jax.networks.encoders import STANDARD_DRAWS
from avb_jax.training.loop import initial_state

KEY = jax.random.key(11)


def gaussian(z):
    """N((0.3, -0.2), [[1, .9], [.9, 1.2]]), times e^1.5."""
    d, precision = z - jnp.array([0.3, -0.2]), np.linalg.inv([[1.0, 0.9], [0.9, 1.2]])
    return 1.5 - 0.5 * d @ precision @ d - np.log(2 * np.pi) - 0.5 * np.log(1.2 - 0.81)


def torus(z):
    """A tube about the circle of radius 2: angle uniform, density of the radius r * exp(-((r - 2) / 0.3)^2 / 2), z_3 normal."""
    radius = jnp.sqrt(z[0] ** 2 + z[1] ** 2 + 1e-12)
    return -0.5 * ((radius - 2) / 0.3) ** 2 - 0.5 * (z[2] / 0.3) ** 2


def rosenbrock(z):
    """z_1 ~ N(0, 1) and z_2 - z_1^2 ~ N(0, 0.5^2), independent; its integral is 1."""
    return -0.5 * z[0] ** 2 - 0.5 * ((z[1] - z[0] ** 2) / 0.5) ** 2 - np.log(2 * np.pi * 0.5)


CURVED = {"steps": 4000, "sampler_rate": 5e-4}


@pytest.fixture(scope="module")
def gaussian_fit():
    sizes = {"noise_dim": 4, "widths": (32,), "adversary_widths": (64, 64)}
    rates = {"sampler_rate": 1e-3, "adversary_rate": 2e-3}
    return inference.fit(gaussian, 2, steps=2500, batch_size=256, quiet=True, **sizes, **rates)


def test_a_gaussian_is_fitted(gaussian_fit):
    """The moments are the density's, and the bound its integral's logarithm, 1.5."""
    mean, covariance = np.array([0.3, -0.2]), np.array([[1.0, 0.9], [0.9, 1.2]])
    z = np.asarray(gaussian_fit.sample(KEY, 20_000))
    np.testing.assert_allclose(z.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.1)
    away, ratio = z.mean(axis=0) - mean, np.linalg.solve(covariance, np.cov(z.T))
    kl = 0.5 * (np.trace(ratio) + away @ np.linalg.solve(covariance, away) - 2 - np.linalg.slogdet(ratio)[1])
    assert kl < 0.02  # nats, from the Gaussian of the draws' moments to the density
    assert abs(gaussian_fit.bound - 1.5) < 0.05
    assert gaussian_fit.bound_error < 0.01


def test_its_adversary_is_the_log_ratio_to_the_contrast(gaussian_fit):
    """For the Gaussian, log q - log r is known: KL(q, r) is -log sqrt(1 - correlation^2)."""
    correlation = 0.9 / np.sqrt(1.2)
    expected = -0.5 * np.log(1 - correlation**2)
    np.testing.assert_allclose(gaussian_fit.diagnostics.kl_contrast, expected, atol=0.1)
    t = gaussian_fit.adversary(gaussian_fit.sample(KEY, 5000))
    assert abs(t.mean() - gaussian_fit.diagnostics.kl_contrast) < 0.05


@pytest.fixture(scope="module")
def untrained():
    """A fit without training, of a sampler and a T that were moved by hand, and what its training was called with."""
    called = {}

    def train(method, dataset, **options):
        state = initial_state(method, dataset, options["seed"], None)
        moved = {"mean": jnp.array([0.05, -0.1]), "log_std": jnp.array([-0.05, 0.03])}  # times the sampler's speed of 10
        t = jax.tree.map(lambda a: a - 1 if a.shape == (1,) else 1.5 * a, state.ema.params.adversary)  # by its last bias
        params = state.ema.params
        params = params._replace(encoder={**params.encoder, **moved}, adversary=t)
        called.update(options, dataset=dataset)
        return state._replace(ema=state.ema._replace(params=params))

    def density_method(log_density, dim, sampler, adversary, **settings):
        called.update(settings, dim=dim, sampler=sampler)
        return build(log_density, dim, sampler, adversary, **settings)

    options = {"steps": 3, "batch_size": 7, "seed": 5, "noise_dim": 3, "adversary_steps": 2, "gaussian_share": 0.3}
    build = inference.density_method
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "train", train)
        patch.setattr(inference, "density_method", density_method)
        fit = inference.fit(gaussian, 2, sampler_rate=0.02, adversary_rate=0.04, clip=5.0, widths=(16,), **options)
    return fit, called


def test_what_a_fit_reports_follows_from_its_draws(untrained):
    """The bound, its error, T's diagnostics, and r: by NumPy from draws, T and r as the caller has them."""
    fit, _ = untrained
    z = np.float64(fit.sample(KEY, 50_000))
    mean, std = (np.float64(moment) for moment in fit.contrast)
    error = 1 / np.sqrt(STANDARD_DRAWS)  # of r's moments, in standard deviations
    assert (abs(mean - z.mean(axis=0)) < 4 * error * std).all()
    np.testing.assert_allclose(std, z.std(axis=0), rtol=4 * error)
    assert abs(mean[1] + 1) < 0.3
    assert std[1] > 1.5 * std[0]
    r = mean + std * np.random.default_rng(0).standard_normal(z.shape)
    t, t_of_r = (np.float64(fit.adversary(jnp.asarray(draws, jnp.float32))) for draws in (z, r))
    assert 0.2 < (t > 0).mean() < 0.8  # or else little depends on it
    d = z - [0.3, -0.2]
    log_density = 1.5 + stats.multivariate_normal.logpdf(d, cov=[[1.0, 0.9], [0.9, 1.2]])
    bound = log_density - t - stats.norm.logpdf(z, mean, std).sum(axis=1)
    np.testing.assert_allclose(fit.bound_error, bound.std() / np.sqrt(inference.PAIRS), rtol=0.1)
    assert abs(fit.bound - bound.mean()) < 4 * np.hypot(fit.bound_error, bound.std() / np.sqrt(len(z)))
    loss = np.logaddexp(0, -t) + np.logaddexp(0, t_of_r)
    accuracy = np.mean([t > 0, t_of_r < 0], axis=0)
    found = fit.diagnostics
    for value, own in ((found.adversary_loss, loss), (found.adversary_accuracy, accuracy), (found.kl_contrast, t)):
        assert abs(value - own.mean()) < 4 * own.std() * np.sqrt(1 / inference.PAIRS + 1 / len(z))
    far = fit.adversary(jnp.asarray(mean + std * np.outer([100, 200, 300], [1.0, 0.5]), jnp.float32))
    np.testing.assert_allclose(far[0] - 2 * far[1] + far[2], 100**2 * 1.25, rtol=0.01)  # T + log r, its square part, is linear


def test_how_a_fit_trains(untrained):
    """The sampler, and optimisers that fall to 0 along a cosine over all updates of each player, with clipped gradients."""
    called = untrained[1]
    assert (called["noise_dim"], called["adversary_steps"], called["dim"]) == (2 * 2 + 3, 2, 2)
    assert (called["sampler"].gaussian_share, called["sampler"].widths) == (0.3, (16,))
    assert (called["steps"], called["batch_size"], called["seed"]) == (3, 7, 5)
    assert called["dataset"].train.shape == (7, 0)
    for player, rate, updates in (("encoder", 0.02, 3), ("adversary", 0.04, 6)):
        adam = getattr(called["optimizers"], player)
        state, taken = adam.init(jnp.zeros(())), []
        for _ in range(updates + 1):
            step, state = adam.update(jnp.ones(()), state)
            taken.append(float(step))
        expected = -0.5 * rate * (1 + np.cos(np.pi * np.arange(updates + 1) / updates))
        np.testing.assert_allclose(taken, expected, rtol=1e-3, atol=1e-8)
        state = adam.update(jnp.ones(()), adam.init(jnp.zeros(())))[1]
        step = float(adam.update(jnp.asarray(100.0), state)[0])  # of which 5 are left; b1 = 0.5, b2 = 0.999
        first, second = (0.5 * 0.5 + 0.5 * 5) / 0.75, (0.999 * 0.001 + 0.001 * 25) / (1 - 0.999**2)
        np.testing.assert_allclose(step, expected[1] * first / np.sqrt(second), rtol=1e-3)


@pytest.mark.slow
def test_a_torus_is_fitted():
    """All the way round, as thick as it should be, and the bound its integral's logarithm. One to two minutes."""
    fit = inference.fit(torus, 3, quiet=True, **CURVED)
    z = np.asarray(fit.sample(KEY, 20_000))
    sectors = np.histogram(np.arctan2(z[:, 1], z[:, 0]), 8, (-np.pi, np.pi))[0] / len(z)
    np.testing.assert_allclose(sectors, 1 / 8, rtol=0.1)  # sampling alone: 2%, one standard error

    r, step = np.linspace(0, 5, 100_001, retstep=True)
    density = r * np.exp(-0.5 * ((r - 2) / 0.3) ** 2)
    mass = density.sum() * step
    mean = (r * density).sum() * step / mass
    std = np.sqrt(((r - mean) ** 2 * density).sum() * step / mass)
    radius = np.hypot(z[:, 0], z[:, 1])
    np.testing.assert_allclose(radius.mean(), mean, atol=0.03)
    np.testing.assert_allclose(radius.std(), std, rtol=0.12)
    np.testing.assert_allclose(z[:, 2].mean(), 0, atol=0.03)
    np.testing.assert_allclose(z[:, 2].std(), 0.3, rtol=0.06)
    gap = fit.bound - np.log(2 * np.pi * mass * 0.3 * np.sqrt(2 * np.pi))
    assert -0.1 < gap < 0.05


@pytest.mark.slow
def test_a_rosenbrock_density_is_fitted():
    """Both arms of the banana, none of them too long, and the bound its integral's logarithm, 0. One to two minutes."""
    fit = inference.fit(rosenbrock, 2, quiet=True, **CURVED)
    z = np.asarray(fit.sample(KEY, 20_000))
    away = z[:, 1] - z[:, 0] ** 2
    np.testing.assert_allclose(z[:, 0].mean(), 0, atol=0.1)
    np.testing.assert_allclose(z[:, 0].std(), 1, rtol=0.1)
    np.testing.assert_allclose(away.mean(), 0, atol=0.05)
    np.testing.assert_allclose(away.std(), 0.5, rtol=0.12)
    assert abs(np.corrcoef(z[:, 0], away)[0, 1]) < 0.1
    assert np.abs(z).max() < 25  # of 20,000 draws of the density, one is past |z_1| = 5 or z_2 = 25 with a chance of 1%
    assert -0.1 < fit.bound < 0.05


@pytest.fixture
def conjugate():
    """A NumPyro model of data y and their scale: a conjugate normal mean, and a rate > 0 of which the data say nothing."""

    def model(y, scale=1.0):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        rate = numpyro.sample("rate", dist.Gamma(3.0, 1.0))
        numpyro.deterministic("double", 2 * rate)
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


Y = np.array([0.2, 0.4, 0.6])


def test_the_density_of_a_numpyro_model(conjugate, monkeypatch):
    """Where `fit` sees it: log p(y, mean, rate) + log rate, the Jacobian of rate = exp(u); nothing is left out or added."""
    called, z = {}, np.random.default_rng(0).standard_normal((50, 2))

    def fit(log_density, dim, **options):
        called.update(options, dim=dim, values=jax.vmap(log_density)(jnp.asarray(z, jnp.float32)))
        return inference.Fit(None, lambda key, count: jnp.asarray(z[:count]), *[None] * 7)

    monkeypatch.setattr(inference, "fit", fit)
    fitted = inference.fit_numpyro(conjugate, jnp.asarray(Y), model_kwargs={"scale": 2.0}, seed=3, steps=9)
    draws = fitted.sample(KEY, 40)
    assert (called["dim"], called["seed"], called["steps"]) == (2, 3, 9)
    mean, rate = z[:, 0], np.exp(z[:, 1])
    expected = stats.norm.logpdf(mean, 0, 2) + stats.gamma.logpdf(rate, 3) + z[:, 1]
    expected += stats.norm.logpdf(Y, mean[:, None], 2).sum(axis=1)
    np.testing.assert_allclose(called["values"], expected, rtol=1e-5)
    for name, values in (("mean", mean), ("rate", rate), ("double", 2 * rate)):
        np.testing.assert_allclose(draws[name], values[:40], rtol=1e-5)


@pytest.mark.slow
def test_numpyro_models_come_back_in_their_own_space(conjugate):
    """The posterior's moments, and the evidence, of y ~ N(0, 4 I + 4 1 1')."""
    fit = inference.fit_numpyro(
        conjugate, jnp.asarray(Y), model_kwargs={"scale": 2.0}, steps=1500, sampler_rate=2e-3, quiet=True
    )
    assert abs(fit.bound - stats.multivariate_normal.logpdf(Y, cov=4 * np.eye(3) + 4)) < 0.02
    draws = fit.sample(KEY, 20_000)
    assert set(draws) == {"mean", "rate", "double"}
    assert draws["mean"].shape == (20_000,)
    variance = 1 / (1 / 4 + 3 / 4)
    np.testing.assert_allclose((draws["mean"].mean(), draws["mean"].std()), (variance * 0.3, np.sqrt(variance)), atol=0.1)
    assert (draws["rate"] > 0).all()
    np.testing.assert_allclose((draws["rate"].mean(), draws["rate"].var()), (3, 3), rtol=0.15)
    np.testing.assert_allclose(draws["double"], 2 * draws["rate"], rtol=1e-5)


def test_densities_that_are_refused():
    with pytest.raises(UserError, match="must return one number for one z"):
        inference.fit(lambda z: z, 2)
    with pytest.raises(UserError, match="not finite at z = 0"):
        inference.fit(lambda z: jnp.log(z[0]), 1)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("dim", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("adversary_steps", 0, "at least 1"),
        ("noise_dim", -1, "at least 0"),
        ("sampler_rate", 0.0, "above 0"),
        ("adversary_rate", -1e-3, "above 0"),
        ("clip", 0.0, "above 0"),
        ("gaussian_share", 1.5, r"in \[0, 1\]"),
    ],
)
def test_options_that_are_refused(field, value, remedy):
    options = {"dim": 2, field: value}
    with pytest.raises(UserError, match=f"^{field}={value}: must be {remedy}"):
        inference.fit(gaussian, **options)


def test_discrete_sites_are_refused():
    def model():
        numpyro.sample("which", dist.Categorical(jnp.ones(2) / 2))

    with pytest.raises(UserError, match="latent site 'which' is discrete"):
        inference.fit_numpyro(model, steps=10, quiet=True)


class Bent(nn.Module):
    """A sampler that does not give its moments, of one pair at a time."""

    @nn.compact
    def __call__(self, x, noise):
        assert x.shape == (len(noise), 0)
        return 0.5 * noise + nn.tanh(nn.Dense(2)(noise))


class Blank(nn.Module):
    """Features of an example without numbers, which no dense layer takes in every release of JAX."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return jnp.ones((len(x), 3))


@pytest.fixture
def bent():
    """A method for the Gaussian of that sampler and a T that starts off 0, with SGD at rate 1."""
    adversary = networks.InnerProductAdversary(Blank(), networks.MLP((4,)), 3)
    return inference.density_method(gaussian, 2, Bent(), adversary, optimizers=optax.sgd(1.0), noise_dim=2, adversary_steps=1)


def test_a_density_is_a_method(bent):
    """Its joint density is the density, its draws those of the sampler, and its ELBO log p~ - log r - T, by hand."""
    x = jnp.zeros((5, 0))
    state = jax.jit(bent.init)(KEY, x)
    z = jax.random.normal(KEY, (5, 2))
    np.testing.assert_allclose(bent.log_joint(state, x, z), [gaussian(one) for one in z], rtol=1e-6)
    assert bent.sample(KEY, state, 7).shape == (7, 2)
    assert bent.encode(KEY, state, x, 3).z.shape == (3, 5, 2)
    assert (bent.decode, bent.prior, state.params.decoder) == (None, None, None)
    terms, of_t = bent.elbo(KEY, state, x), bent.adversary(KEY, state, x)
    np.testing.assert_array_equal(terms.reconstruction, 0)
    np.testing.assert_allclose(of_t.kl, terms.kl, rtol=1e-6)
    noise_key, r_key = jax.random.split(KEY)
    z = Bent().apply({"params": state.params.encoder}, x, jax.random.normal(noise_key, (5, 2)))
    eight = jax.random.normal(jax.random.key(0), (8, 1, 2))[:, 0]  # the draws behind r's moments
    more = Bent().apply({"params": state.params.encoder}, jnp.zeros((8, 0)), eight)
    mean, std = more.mean(axis=0), more.std(axis=0, ddof=1)
    t, t_of_r = (of_network(state, v) for v in ((z - mean) / std, jax.random.normal(r_key, (5, 2))))
    log_r = stats.norm.logpdf(z, mean, std).sum(axis=1)
    np.testing.assert_allclose(terms.elbo, [gaussian(one) for one in z] - log_r - t, rtol=1e-4)
    np.testing.assert_allclose(of_t.t, t, rtol=1e-4)
    np.testing.assert_allclose(of_t.loss, np.logaddexp(0, -t) + np.logaddexp(0, t_of_r), rtol=1e-4)


def of_network(state, v):
    """T [N] by hand at standardised v [N, 2]: the network's output and |v|^2 / 2."""
    adversary = networks.InnerProductAdversary(Blank(), networks.MLP((4,)), 3)
    output = adversary.apply({"params": state.params.adversary}, jnp.zeros((len(v), 0)), v)
    return np.float64(output) + 0.5 * np.square(np.float64(v)).sum(axis=1)


def test_a_step_follows_the_bound(bent):
    """The sampler's update is the gradient of the mean bound with T and r's moments held; T's, that of eq. 3.3."""
    x = jnp.zeros((6, 0))
    state = bent.init(KEY, x)
    after, info = jax.jit(bent.train_step)(KEY, state, x)
    noise_key, r_key = jax.random.split(KEY)
    noise, v_of_r = jax.random.normal(noise_key, (6, 2)), jax.random.normal(r_key, (6, 2))
    adversary = networks.InnerProductAdversary(Blank(), networks.MLP((4,)), 3)
    more = Bent().apply(
        {"params": state.params.encoder}, jnp.zeros((8, 0)), jax.random.normal(jax.random.key(0), (8, 1, 2))[:, 0]
    )
    mean, std = more.mean(axis=0), more.std(axis=0, ddof=1)

    def t_of(params, v):
        return adversary.apply({"params": params}, x, v) + 0.5 * jnp.sum(v**2, axis=1)

    def loss(params):
        z = Bent().apply({"params": params}, x, noise)
        log_r = jnp.sum(jax.scipy.stats.norm.logpdf(z, mean, std), axis=1)
        return jnp.mean(t_of(state.params.adversary, (z - mean) / std) + log_r - jax.vmap(gaussian)(z))

    v = (Bent().apply({"params": state.params.encoder}, x, noise) - mean) / std

    def loss_of_t(params):
        return jnp.mean(jax.nn.softplus(-t_of(params, v)) + jax.nn.softplus(t_of(params, v_of_r)))

    np.testing.assert_allclose(-info.elbo.mean(), loss(state.params.encoder), rtol=1e-5)
    np.testing.assert_allclose(info.adversary_loss.mean(), loss_of_t(state.params.adversary), rtol=1e-5)
    gradients = Players(jax.grad(loss)(state.params.encoder), None, jax.grad(loss_of_t)(state.params.adversary))
    expected = jax.tree.map(lambda p, g: p - g, state.params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after.params, expected)


def test_a_fit_continues_in_its_workdir(tmp_path):
    """A finished one is read back; a shorter run is another schedule, and so another fit."""
    options = {"steps": 4, "batch_size": 8, "widths": (4,), "adversary_widths": (4,), "quiet": True, "workdir": tmp_path}
    first, again = (inference.fit(gaussian, 2, **options) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.state, again.state)
    assert first.bound == again.bound
    assert first.method.log_joint is not None
    assert '"step": 4' in (tmp_path / "metrics.jsonl").read_text()
    assert list((tmp_path / "tensorboard" / "avb").iterdir())
