"""Every method through its contract: signatures, compilation, schedules, averages, a user's own modules."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import Bernoulli, Model, Players, StandardNormal, UserError, fit, networks
from avb_jax.data import from_arrays
from avb_jax.methods import METHODS, avb
from tests.conftest import small_model

# What a method has, and what it has when it has the player or the likelihood for it.
ALWAYS = ("init", "train_step", "sample")
WITH_ENCODER = ("sample_posterior", "reconstruct")
ADVERSARIAL = [name for name, functions in METHODS.items() if functions.PLAYERS.adversary]
REFERENCE = {name: inspect.signature(getattr(avb, name)) for name in (*ALWAYS, *WITH_ENCODER, "elbo_terms")}


@pytest.mark.parametrize("method", METHODS)
def test_signatures_are_the_same(method):
    functions = METHODS[method]
    for name in (*ALWAYS, *(WITH_ENCODER if functions.PLAYERS.encoder else ())):
        assert inspect.signature(getattr(functions, name)) == REFERENCE[name], name
    if functions.PLAYERS.encoder is None:
        assert not any(hasattr(functions, name) for name in WITH_ENCODER)
    if hasattr(functions, "elbo_terms"):
        assert inspect.signature(functions.elbo_terms) == REFERENCE["elbo_terms"]
        assert functions.PLAYERS.decoder == "likelihood"
    assert set(functions.__all__) <= {*REFERENCE, "PLAYERS"}


@pytest.mark.parametrize(
    ("method", "conv"),
    [*((method, False) for method in METHODS), pytest.param("vaegan", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_shapes(method, conv, images, sgd):
    """Of what a step returns, and of what is drawn; each of its players has moved, and all is finite."""
    functions, model = METHODS[method], small_model(method, conv=conv)
    state = functions.init(jax.random.key(0), model, sgd, images)
    for name, kind in functions.PLAYERS._asdict().items():
        assert (getattr(state.params, name) is None) == (kind is None)
    after = state
    for i in range(2):  # a T that starts at 0 has no gradient for the others in the first step
        slowly = Players(*[optax.sgd(0.1)] * 3)
        after, info = functions.train_step(jax.random.key(1 + i), after, images, model=model, optimizers=slowly)
    chex.assert_tree_all_finite(after)
    for name, kind in functions.PLAYERS._asdict().items():
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), getattr(state.params, name), getattr(after.params, name))
        assert kind is None or any(jax.tree.leaves(moved)), name
    for name, value in info._asdict().items():
        if value is not None:
            chex.assert_shape(value, () if name == "beta" else (8,))
            chex.assert_tree_all_finite(value)
    assert (info.elbo is not None) == hasattr(functions, "elbo_terms")
    key = jax.random.key(2)
    drawn = functions.sample(key, after, model, 5)
    chex.assert_shape(drawn, (5, 6, 6))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    if functions.PLAYERS.encoder:
        chex.assert_shape(functions.sample_posterior(key, after, model, images), (8, 3))
        chex.assert_shape(functions.reconstruct(key, after, model, images), (8, 6, 6))
    if hasattr(functions, "elbo_terms"):
        chex.assert_shape(functions.elbo_terms(key, after, images, model=model).elbo, (8,))


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_all_of_it(method, images, tmp_path):
    """A run that is taken up again is the run that was not interrupted."""
    model, adam = small_model(method, ema_decay=0.9), Players(*[optax.adam(1e-2)] * 3)
    train = functools.partial(
        fit, METHODS[method], model, adam, from_arrays(np.asarray(images)), batch_size=4, log_every=2, checkpoint_every=2,
        quiet=True, name=method,
    )  # fmt: skip
    train(steps=2, workdir=tmp_path)
    resumed, whole = train(steps=4, workdir=tmp_path), train(steps=4)
    chex.assert_trees_all_close(resumed, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_compiles_once(method, images, sgd):
    chex.clear_trace_counter()
    model, functions = small_model(method, ema_decay=0.9, beta_warmup=2), METHODS[method]
    state = functions.init(jax.random.key(0), model, sgd, images)
    step = jax.jit(
        chex.assert_max_traces(lambda k, s, b: functions.train_step(k, s, b, model=model, optimizers=sgd), n=1)
    )
    for i in range(3):
        state, _ = step(jax.random.fold_in(jax.random.key(1), i), state, images)
    assert int(state.step) == 3


def test_players_start_from_keys_of_their_own(images, sgd):
    """One module in all three places would start from three params."""

    class Any(nn.Module):
        shape: tuple

        @nn.compact
        def __call__(self, *inputs):
            return jnp.zeros((len(inputs[0]), *self.shape)) + self.param("p", nn.initializers.normal(), ())

    model = Model(Players(Any((3,)), Any((6, 6, 1)), Any(())), StandardNormal(3), Bernoulli(), 2)
    state = avb.init(jax.random.key(0), model, sgd, images)
    assert len({float(player["p"]) for player in state.params}) == 3


def test_beta_warms_up(images, sgd):
    model = small_model("vae", beta=2.0, beta_warmup=4)
    state = METHODS["vae"].init(jax.random.key(0), model, sgd, images)
    betas = [float(model.beta_at(jnp.array(step))) for step in (0, 1, 3, 10)]
    np.testing.assert_allclose(betas, [0.5, 1.0, 2.0, 2.0])
    _, info = METHODS["vae"].train_step(jax.random.key(1), state, images, model=model, optimizers=sgd)
    np.testing.assert_allclose(info.beta, 0.5)


def test_average_follows_by_hand(images, sgd):
    # Step t (from 0) has decay min(0.15, (1 + t) / (10 + t)): 0.1, then 0.15.
    model = small_model("avb", ema_decay=0.15, batch_norm=True)
    state = avb.init(jax.random.key(0), model, sgd, images)
    expected = state.params, state.batch_stats
    for t, decay in enumerate((0.1, 0.15)):
        state, _ = avb.train_step(jax.random.key(t), state, images, model=model, optimizers=sgd)
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, (state.params, state.batch_stats))
    chex.assert_trees_all_close(tuple(state.average), expected, rtol=1e-5, atol=1e-6)
    assert avb.init(jax.random.key(0), small_model("avb"), sgd, images).average is None


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_adversary_steps_update_the_adversary_first_and_alone(method, images):
    """Three adversary steps leave its optimiser's count at 3 and the others' at 1."""
    model, optimizers = small_model(method, adversary_steps=3), Players(*[optax.adam(1e-3)] * 3)
    state = METHODS[method].init(jax.random.key(0), model, optimizers, images)
    state, _ = METHODS[method].train_step(jax.random.key(1), state, images, model=model, optimizers=optimizers)
    assert [int(o[0].count) for o in state.opt_state if o is not None] == [1] * (1 if method == "gan" else 2) + [3]


def test_x_side_of_the_adversary_is_computed_once(images, sgd):
    """Compiled, a step with an x-net 50 times as wide costs one forward and one backward pass of it, not two forwards."""

    def flops(width):
        x_net = networks.MLP((width,), input_rank=2)
        adversary = networks.InnerProductAdversary(x_net, networks.MLP((4,)), 4)
        base = small_model("avb")
        model = Model(base.networks._replace(adversary=adversary), base.prior, base.likelihood, base.noise_dim)
        state = avb.init(jax.random.key(0), model, sgd, images)
        step = jax.jit(lambda k, s, b: avb.train_step(k, s, b, model=model, optimizers=sgd))
        return step.lower(jax.random.key(0), state, images).compile().cost_analysis()["flops"]

    extra = (flops(2000) - flops(1000)) / 1000
    # Per unit of width and example: 36 inputs in and 4 outputs forward, each product 2 flops; the backward pass needs
    # the weights' gradients again (36 + 4) and the hidden unit's (4).
    forward, backward = 2 * (36 + 4), 2 * (36 + 4 + 4)
    per_example = extra / len(images)
    assert forward + backward <= per_example < 1.5 * forward + backward, per_example


class OwnEncoder(nn.Module):
    """A user's module without `train`."""

    @nn.compact
    def __call__(self, x, noise):
        return nn.Dense(3)(jnp.concatenate([x.reshape(len(x), -1), noise], -1))


class OwnDecoder(nn.Module):
    """One with batch statistics of its own."""

    @nn.compact
    def __call__(self, z, train=True):
        return nn.Dense(36)(nn.BatchNorm(use_running_average=not train)(z)).reshape(-1, 6, 6, 1)


class OwnAdversary(nn.Module):
    """One that does not factor."""

    outputs: int = 0

    @nn.compact
    def __call__(self, x, z):
        h = nn.relu(nn.Dense(16)(jnp.concatenate([x.reshape(len(x), -1), z], -1)))
        return nn.Dense(self.outputs)(h) if self.outputs else nn.Dense(1)(h)[:, 0]


def test_a_user_s_own_modules_drop_in():
    data = from_arrays(np.random.default_rng(0).random((16, 6, 6)))
    model = Model(Players(OwnEncoder(), OwnDecoder(), OwnAdversary()), StandardNormal(3), Bernoulli(), noise_dim=2)
    optimizers = Players(*[optax.adam(1e-3)] * 3)
    state = fit(avb, model, optimizers, data, steps=4, batch_size=8, log_every=2, quiet=True)
    chex.assert_tree_all_finite(state)
    assert state.batch_stats.decoder["batch_stats"]["BatchNorm_0"]["mean"].any()


def test_a_network_of_the_wrong_shape_is_named(images, sgd):
    good = Players(OwnEncoder(), OwnDecoder(), OwnAdversary())
    prior, likelihood = StandardNormal(3), Bernoulli()

    def step(modules, prior=prior):
        model = Model(modules, prior, likelihood, 2)
        avb.train_step(jax.random.key(0), avb.init(jax.random.key(0), model, sgd, images), images, model=model, optimizers=sgd)

    step(good)
    with pytest.raises(UserError, match=r"encoder: returned shape \(8, 3\), expected \(8, 5\)"):
        step(good, StandardNormal(5))
    with pytest.raises(UserError, match=r"adversary: returned shape \(16, 2\), expected \(16,\)"):
        step(good._replace(adversary=OwnAdversary(2)))
    with pytest.raises(UserError, match=r"decoder: returned shape \(8, 5, 5, 1\), expected \(8, 6, 6, 1\)"):
        step(good._replace(decoder=networks.MLPDecoder((5, 5), 1, (4,))))
    with pytest.raises(UserError, match=r"optimizers\.adversary=None"):
        avb.init(jax.random.key(0), Model(good, prior, likelihood, 2), sgd._replace(adversary=None), images)


@pytest.mark.parametrize(
    "options", [{"beta": -1.0}, {"beta_warmup": -1}, {"adversary_steps": 0}, {"ema_decay": 1.0}, {"noise_dim": 0}]
)
def test_a_model_s_fields_are_checked(options):
    fields = {"noise_dim": 2, **options}
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        Model(Players(), StandardNormal(2), Bernoulli(), **fields)
