"""Adaptive contrast: what T is to learn shrinks, the KL term stays what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import Model, Players, Posterior, StandardNormal, UserError, contrast, networks, objectives, players
from avb_jax.distributions import Gaussian, normal_kl, normal_log_prob
from avb_jax.methods import avb
from tests import gaussian
from tests.conftest import small_model

COUNT = 200_000
STANDARD = Players(*[optax.identity()] * 3)


class TellingEncoder(gaussian.LinearEncoder):
    """The Gaussian encoder of the known game, telling moments that are off by `shift` and `scale`."""

    shift: float = 0.0
    scale: float = 1.0

    shares_x = True

    @nn.compact
    def __call__(self, x, noise):
        params = [self.param(name, nn.initializers.constant(v), (2,)) for name, v in (("m", 0.8), ("c", -0.3), ("log_s", -0.5))]
        mean, std = params[0] * x + params[1], jnp.exp(params[2])
        moments = mean + self.shift, jnp.broadcast_to(self.scale * std, mean.shape)
        # Params that only the moments depend on: a gradient through these would show.
        extra = self.param("extra", nn.initializers.zeros, (2,))
        return Posterior(mean + std * noise, moments[0] + extra, moments[1] * jnp.exp(extra))


class Zero(nn.Module):
    """T = 0, with a param that does nothing."""

    @nn.compact
    def __call__(self, x, z):
        return self.param("nothing", nn.initializers.zeros, ()) + jnp.zeros(len(x))


class ExactUnderContrast(nn.Module):
    """T* = log q(z|x) - log r(z|x) at z = mean + std z_tilde, for the moments that `TellingEncoder` tells."""

    shift: float
    scale: float

    @nn.compact
    def __call__(self, x, z):
        mean, log_s = 0.8 * x - 0.3, -0.5
        std = self.scale * jnp.exp(log_s)
        there = mean + self.shift + std * z
        log_q = normal_log_prob(there, mean, log_s)
        return jnp.sum(log_q - normal_log_prob(z) + jnp.log(std), axis=-1)


@pytest.fixture(scope="module")
def points():
    return jnp.tile(jnp.array([[0.5, -1.0], [1.0, 0.2], [-0.7, 0.4], [0.0, 1.5]]), (COUNT // 4, 1))


def _game(encoder, adversary, **options):
    model = Model(
        Players(encoder, gaussian.LinearDecoder(), adversary), StandardNormal(2), Gaussian(gaussian.SIGMA), 2,
        **{"contrast": "adaptive", **options},
    )  # fmt: skip
    return model, players.init(jax.random.key(0), model, STANDARD, jnp.zeros((4, 2)))


def _terms(model, state, x, key=1):
    draws = players.draw(jax.random.key(key), model, x)
    return objectives.negative_elbo_adversarial(
        state.params, state.params.adversary, state.batch_stats, draws, model=model
    )


def test_with_a_gaussian_encoder_nothing_is_left_for_t(points):
    """T* = 0: the ELBO is the analytic one, its T-free part the closed-form KL, and the adversary's gradient vanishes."""
    model, state = _game(TellingEncoder(), Zero())
    _, (terms, z, _) = _terms(model, state, points)
    expected = gaussian.analytic_negative_elbo(state.params.encoder, state.params.decoder, points[:4])
    assert abs(terms.elbo.mean() + expected) < 4 * terms.elbo.std() / np.sqrt(COUNT)
    mean = 0.8 * points - 0.3
    np.testing.assert_allclose(terms.kl_contrast, normal_kl(mean, jnp.full_like(mean, np.exp(-0.5))), rtol=1e-5)
    assert abs(jnp.mean(terms.kl - terms.kl_contrast)) < 4 * jnp.std(terms.kl - terms.kl_contrast) / np.sqrt(COUNT)
    np.testing.assert_allclose((z.mean(), z.std()), (0, 1), atol=0.01)


def test_the_objective_does_not_depend_on_r_where_t_is_optimal(points):
    """Not even draw by draw: T* + log r - log p is log q - log p for every r, however wrong its moments."""
    x, elbos = points[:1000], []
    for shift, scale in ((0.0, 1.0), (0.4, 1.0), (0.0, 2.0), (-1.0, 0.7)):
        model, state = _game(TellingEncoder(shift=shift, scale=scale), ExactUnderContrast(shift, scale))
        elbos.append(_terms(model, state, x)[1][0].elbo)
    exact = gaussian.model()
    state = players.init(jax.random.key(0), exact, STANDARD, points[:4])
    for elbo in elbos:
        np.testing.assert_allclose(elbo, _terms(exact, state, x)[1][0].elbo, rtol=1e-4, atol=1e-4)


def test_no_gradient_flows_through_the_moments(points):
    model, state = _game(TellingEncoder(shift=0.1, scale=1.3), ExactUnderContrast(0.1, 1.3))
    draws = players.draw(jax.random.key(1), model, points[:100])

    def loss(params):
        value, _ = objectives.negative_elbo_adversarial(
            params, state.params.adversary, state.batch_stats, draws, model=model
        )
        return value

    gradient = jax.grad(loss)(state.params).encoder
    assert not gradient["extra"].any()
    assert all(gradient[name].any() for name in ("m", "c", "log_s"))


@pytest.mark.parametrize("moment_gradients", [False, True])
def test_its_gradients_are_those_of_the_analytic_elbo(points, moment_gradients):
    model, state = _game(TellingEncoder(), Zero(), moment_gradients=moment_gradients)
    parts = points.reshape(-1, 1000, 2)

    def gradient(key, x):
        draws = players.draw(key, model, x)
        loss = lambda params: objectives.negative_elbo_adversarial(  # noqa: E731
            params, state.params.adversary, state.batch_stats, draws, model=model
        )[0]
        return jax.grad(loss)(state.params)

    estimates = jax.vmap(gradient)(jax.random.split(jax.random.key(2), len(parts)), parts)
    exact = jax.grad(gaussian.analytic_negative_elbo, argnums=(0, 1))(state.params.encoder, state.params.decoder, points[:4])
    for got, expected in zip((estimates.encoder, estimates.decoder), exact, strict=True):
        for name in ({"m", "c", "log_s"} if "m" in expected else {"w"}):
            error = got[name].std(axis=0) / np.sqrt(len(parts))
            np.testing.assert_array_less(abs(got[name].mean(axis=0) - expected[name]), 4 * error + 1e-6)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 2.0)])
def test_moment_gradients_are_those_of_the_analytic_elbo_whatever_r(points, shift, scale):
    """On average, and as without them; with moments that are off, too, T* being what it then is."""
    parts = points.reshape(-1, 1000, 2)
    results = []
    for flow in (False, True):
        model, state = _game(TellingEncoder(shift=shift, scale=scale), ExactUnderContrast(shift, scale), moment_gradients=flow)

        def gradient(key, x, model=model, state=state):
            draws = players.draw(key, model, x)
            loss = lambda params: objectives.negative_elbo_adversarial(  # noqa: E731
                params, state.params.adversary, state.batch_stats, draws, model=model
            )[0]
            return jax.grad(loss)(state.params).encoder

        results.append(jax.vmap(gradient)(jax.random.split(jax.random.key(2), len(parts)), parts))
    expected = jax.grad(gaussian.analytic_negative_elbo)(state.params.encoder, state.params.decoder, points[:4])
    for got in results:
        for name in ("m", "c", "log_s"):
            error = got[name].std(axis=0) / np.sqrt(len(parts))
            np.testing.assert_array_less(abs(got[name].mean(axis=0) - expected[name]), 4 * error + 1e-5)
    without, flowing = results
    assert flowing["extra"].any()
    assert not without["extra"].any()


def test_with_moment_gradients_t_does_not_move_location_and_scale(points):
    """Whatever T says, where z is mean + std * v with a v of its own: only v hears T."""
    gradients = []
    for adversary in (Zero(), ExactUnderContrast(3.0, 0.2)):
        model, state = _game(TellingEncoder(), adversary, moment_gradients=True)
        draws = players.draw(jax.random.key(1), model, points[:100])
        loss = lambda params: objectives.negative_elbo_adversarial(  # noqa: E731
            params, state.params.adversary, state.batch_stats, draws, model=model  # noqa: B023
        )[0]
        gradients.append(jax.grad(loss)(state.params).encoder)
    for name in ("m", "c", "log_s"):
        np.testing.assert_allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5)


def test_moments_that_the_encoder_does_not_tell_are_estimated(points):
    """Many draws give those of the Gaussian; few give an r of their own, which is still a function of x alone."""
    x = points[:4]
    model, state = _game(gaussian.LinearEncoder(), Zero(), moment_draws=100_000)
    noise = jax.random.normal(jax.random.key(3), (5, 4, 2))

    def contrasted(model, noise):
        return contrast.encode(model, state.params.encoder, {}, x, noise, train=True)[0]

    drawn = contrasted(model, noise)
    mean, std = 0.8 * x - 0.3, jnp.full((4, 2), np.exp(-0.5))
    np.testing.assert_allclose(drawn.seen, (drawn.z - mean) / std, atol=0.02)
    np.testing.assert_allclose(drawn.kl, normal_kl(mean, std), atol=0.02)
    few = dataclasses.replace(model, moment_draws=3)
    np.testing.assert_array_equal(contrasted(few, noise).kl, contrasted(few, -noise).kl)


def test_an_encoder_that_ignores_its_noise_has_finite_moment_gradients():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return self.param("m", nn.initializers.ones, (2,)) * x

    model, state = _game(Constant(), Zero(), moment_gradients=True)
    draws = players.draw(jax.random.key(1), model, jnp.ones((4, 2)))
    loss = lambda params: objectives.negative_elbo_adversarial(  # noqa: E731
        params, state.params.adversary, state.batch_stats, draws, model=model
    )[0]
    assert np.isfinite(jax.grad(loss)(state.params).encoder["m"]).all()


@pytest.mark.parametrize("noise_dim", [3 + 2 * 2, 3 + 2 * 3 + 1])
def test_noise_that_the_bases_cannot_share_is_told(noise_dim):
    encoder = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, bases=2)
    with pytest.raises(UserError, match=f"noise_dim={noise_dim}: MomentEncoder needs .* set it to 9 plus a multiple of 2"):
        encoder.init(jax.random.key(1), jnp.zeros((4, 6, 6)), jnp.zeros((4, noise_dim)))


def moments_of(posterior):
    return posterior.z, posterior.mean, posterior.std


@pytest.fixture(scope="module")
def moment_encoder():
    encoder = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, bases=2, widths=(8,), gaussian_share=0.3)
    x = jax.random.uniform(jax.random.key(0), (4, 6, 6))
    params = encoder.init(jax.random.key(1), x, jnp.zeros((4, 3 + 2 * 5)))["params"]  # 3 and 2 numbers per basis
    # Away from the initial values, where all bases weigh the same and are nearly linear.
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return encoder, jax.tree.map(lambda p, k: p + 0.3 * jax.random.normal(k, p.shape), params, keys), x


def test_the_moment_encoder_has_the_moments_that_it_tells(moment_encoder):
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (100_000, 4, 13))
    z, mean, std = moments_of(encoder.apply({"params": params}, x, noise))
    # Its networks are standardised over 512 draws: their moments are known to one part in about 20.
    np.testing.assert_allclose((z.mean(axis=0) - mean) / std, 0, atol=4 / np.sqrt(512))
    np.testing.assert_allclose(z.std(axis=0) / std, 1, atol=4 / np.sqrt(2 * 512))


def test_the_moment_encoder_is_no_gaussian(moment_encoder):
    """Its latents are correlated given x, and a share of it is; with the whole share Gaussian it is the VAE's."""
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (100_000, 4, 13))
    z, mean, std = moments_of(encoder.apply({"params": params}, x, noise))
    v = ((z - mean) / std)[:, 0]
    correlation = np.corrcoef(v.T) - np.eye(3)
    assert abs(correlation).max() > 0.1
    assert abs(correlation).max() < 0.7 + 0.05
    z, mean, std = moments_of(dataclasses.replace(encoder, gaussian_share=1.0).apply({"params": params}, x, noise))
    np.testing.assert_allclose(z, mean + std * noise[..., :3], rtol=1e-5, atol=1e-5)


def test_the_moment_encoder_starts_as_the_gaussian_of_its_moments():
    """It is a linear image of its noise, uncorrelated over latents, but for some 1% of its variance."""
    x = jax.random.uniform(jax.random.key(0), (4, 6, 6))
    for more in (0, 5):
        encoder = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, gaussian_share=0.0)
        noise = jax.random.normal(jax.random.key(3), (50_000, 4, 3 + 4 * (3 + more)))
        z, mean, std = moments_of(encoder.init_with_output(jax.random.key(1), x, noise)[0])
        v = ((z - mean) / std)[:, 0]
        np.testing.assert_allclose(np.corrcoef(v.T), np.eye(3), atol=0.05)
        _, residual, *_ = np.linalg.lstsq(noise[:, 0], v - v.mean(axis=0))
        assert (residual < 0.02 * len(v)).all()


def test_what_weighs_the_bases_does_not_train_the_trunk(moment_encoder):
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (7, 4, 13))

    def shape(params):
        z, mean, std = moments_of(encoder.apply({"params": params}, x, noise))
        return jnp.sum(jnp.sin((z - mean) / std))

    gradient = jax.grad(shape)(params)
    reached = {name for name, part in gradient.items() if any(abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(part))}
    assert reached == set(networks.MomentEncoder.SHAPE)


def test_its_posterior_depends_on_its_own_example_alone(moment_encoder):
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (7, 4, 13))
    together = encoder.apply({"params": params}, x, noise)
    alone = encoder.apply({"params": params}, x[2:3], noise[:, 2:3])
    for whole, part in zip(moments_of(together), moments_of(alone), strict=True):
        np.testing.assert_allclose(whole[..., 2:3, :], part, rtol=1e-5, atol=1e-6)


def test_several_draws_are_the_mean_of_single_ones(images):
    """The KL term and T's loss over S draws are those of each draw; the first one is decoded."""
    model = small_model("avb", noise_draws=4)
    state = avb.init(jax.random.key(0), model, STANDARD, images)
    draws = players.draw(jax.random.key(1), model, images)
    _, (terms, z, _) = objectives.negative_elbo_adversarial(
        state.params, state.params.adversary, state.batch_stats, draws, model=model
    )
    _, (said, _) = objectives.adversary_loss(state.params.adversary, state.batch_stats, draws, z, model=model)
    singles = []
    for s in range(4):
        one = draws._replace(noise=draws.noise[s : s + 1], z_prior=draws.z_prior[s : s + 1])
        _, (term, z, _) = objectives.negative_elbo_adversarial(
            state.params, state.params.adversary, state.batch_stats, one, model=model
        )
        _, (told, _) = objectives.adversary_loss(state.params.adversary, state.batch_stats, one, z, model=model)
        singles.append((term, told))
    np.testing.assert_allclose(terms.kl, np.mean([term.kl for term, _ in singles], axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(terms.reconstruction, singles[0][0].reconstruction, rtol=1e-5)
    for field in said._fields:
        np.testing.assert_allclose(
            getattr(said, field), np.mean([getattr(told, field) for _, told in singles], axis=0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("floor", [0.5, 3.0])
def test_a_floor_under_t_costs_at_most_its_exponential(points, floor):
    """Under the optimal T, the KL rises, by no more than e^-c; where T is off it is -c at least, and without a gradient."""
    exact = gaussian.model()
    state = players.init(jax.random.key(0), exact, STANDARD, points[:4])
    floored = dataclasses.replace(exact, adversary_floor=floor)
    rise = _terms(floored, state, points)[1][0].kl - _terms(exact, state, points)[1][0].kl
    assert (rise >= 0).all()
    assert 0 < rise.mean() < np.exp(-floor)
    off = state._replace(params=state.params._replace(adversary={**state.params.adversary, "offset": jnp.array(-1e3)}))
    np.testing.assert_array_equal(_terms(floored, off, points[:100])[1][0].kl, -floor)
    generative = lambda params: _terms(floored, off._replace(params=params), points[:100])[1][0].kl.sum()  # noqa: E731
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(generative)(off.params).encoder))


def test_a_t_that_saturates_is_told():
    model, state = _game(gaussian.LinearEncoder(), gaussian.ExactLogRatio(), contrast="none")
    draws = players.draw(jax.random.key(1), model, jnp.zeros((50, 2)))
    far = {**state.params.adversary, "offset": jnp.array(1e3)}
    for params, expected in ((far, 1.0), (state.params.adversary, None)):
        _, (said, _) = objectives.adversary_loss(params, state.batch_stats, draws, 2 * draws.z_prior, model=model)
        if expected is None:
            z = jnp.stack([2 * draws.z_prior[0], draws.z_prior[0]])
            t = model.networks.adversary.apply({"params": params}, draws.x, z)
            expected = np.mean(abs(t) > objectives.SATURATED, axis=0)
            assert 0 < expected.mean() < 1
        np.testing.assert_array_equal(said.saturation, expected)


@pytest.mark.parametrize(
    ("field", "value"), [("contrast", "adaptve"), ("noise_draws", 0), ("moment_draws", 1), ("adversary_floor", -1.0)]
)
def test_options_out_of_range(field, value):
    with pytest.raises(UserError, match=f"{field}={value!r}: must be"):
        small_model("avb", **{field: value})


def test_moments_of_a_wrong_shape_are_told():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return Posterior(noise, jnp.zeros(2), jnp.ones(2))

    model, state = _game(Wrong(), Zero())
    with pytest.raises(UserError, match=r"encoder's moments: returned shape \(2,\), expected \(4, 2\)"):
        _terms(model, state, jnp.zeros((4, 2)))
