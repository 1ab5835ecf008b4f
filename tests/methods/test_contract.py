"""Every method through its contract: signatures, what it can do, compilation, evaluation mode, a user's own modules."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpyro import distributions as dist

import avb_jax
from avb_jax import AdversaryOutput, Method, Players, UserError, distributions, networks
from avb_jax.training.loop import train
from tests.conftest import ADVERSARIAL, METHODS, method_of, small_method, small_modules

KEY = jax.random.key(2)
OPTIONAL = ("encode", "decode", "log_joint", "elbo", "adversary", "fresh_adversary")
CANNOT = {  # what a method has no function for
    "avb": (),
    "vae": ("adversary", "fresh_adversary"),
    "aae": ("elbo",),
    "bigan": ("log_joint", "elbo", "adversary", "fresh_adversary"),
    "gan": ("encode", "log_joint", "elbo", "adversary", "fresh_adversary"),
    "vaegan": ("log_joint", "elbo", "adversary", "fresh_adversary"),
}
OBSERVED = {  # the Info's fields; all are per example but beta
    "avb": "elbo reconstruction kl kl_contrast beta adversary_loss adversary_accuracy adversary_saturation",
    "vae": "elbo reconstruction kl beta",
    "aae": "reconstruction kl_aggregated_posterior beta adversary_loss adversary_accuracy adversary_saturation",
    "bigan": "adversary_loss adversary_accuracy adversary_saturation",
    "gan": "adversary_loss adversary_accuracy adversary_saturation",
    "vaegan": "feature_distance kl beta adversary_loss adversary_accuracy adversary_saturation",
}
PLAYERS = {name: [*(["encoder"] if name != "gan" else []), "decoder"] for name in METHODS}
PLAYERS = {name: PLAYERS[name] + (["adversary"] if name in ADVERSARIAL else []) for name in METHODS}


def arguments(function):
    """Names and defaults."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", METHODS)
def test_signatures_are_the_same_and_what_it_cannot_is_none(name):
    method, avb = small_method(name), small_method("avb")
    assert method.name == name
    assert method.prior.event_shape == (3,)
    assert {field for field in OPTIONAL if getattr(method, field) is None} == set(CANNOT[name])
    for field in ("init", "train_step", "sample", *(set(OPTIONAL) - set(CANNOT[name]))):
        assert arguments(getattr(method, field)) == arguments(getattr(avb, field)), field
    accepted = {name: p.kind for name, p in inspect.signature(METHODS[name]).parameters.items()}
    assert [p for p, kind in accepted.items() if kind is not inspect.Parameter.KEYWORD_ONLY] == PLAYERS[name]
    everything = inspect.signature(avb_jax.avb).parameters.keys()
    own = {"vaegan": {"feature_weight", "generator_divergence"}, "gan": {"generator_divergence"}}
    own["bigan"] = own["gan"]
    assert accepted.keys() - everything <= own.get(name, set())


def evaluations(method: Method, state, x):
    """Name -> (the players whose variables it reads, what it returns), of all that a method can do apart from training."""
    z = jnp.ones((len(x), 3))
    every = {
        "sample": ("decoder", lambda: method.sample(KEY, state, 5)),
        "decode": ("decoder", lambda: method.decode(state, z).mean),
        "log_joint": ("decoder", lambda: method.log_joint(state, x, z)),
        "encode": ("encoder", lambda: method.encode(KEY, state, x)),
        "encode several": ("encoder", lambda: method.encode(KEY, state, x, 4)),
        "elbo": (" ".join(set(PLAYERS[method.name])), lambda: method.elbo(KEY, state, x)),
        "adversary": ("encoder adversary", lambda: method.adversary(KEY, state, x, 4)),
    }
    return {name: entry for name, entry in every.items() if getattr(method, name.split()[0]) is not None}


@pytest.mark.parametrize(
    ("name", "conv"), [*((name, False) for name in METHODS), pytest.param("vaegan", True, marks=pytest.mark.slow)]
)
def test_a_step_compiles_once_counts_and_moves_every_player(name, conv, images):
    """All is finite and of its shape, in what a step observes and in what evaluates; a batch of another size is no obstacle."""
    chex.clear_trace_counter()
    rate = 0.01 if conv else 0.1  # at 0.1 the feature distance of convolutions takes log std beyond what float32 holds
    method = small_method(name, conv=conv, optimizers=optax.sgd(rate))
    start = state = method.init(jax.random.key(0), images)
    assert start.ema is None
    assert [player for player, params in start.params._asdict().items() if params is not None] == PLAYERS[name]
    assert [player for player, held in start.opt_state._asdict().items() if held is not None] == PLAYERS[name]
    step = jax.jit(chex.assert_max_traces(method.train_step, n=1))
    for i in range(2):  # a T that starts at 0 has no gradient for the others in the first step
        assert int(state.step) == i
        state, info = step(jax.random.fold_in(jax.random.key(1), i), state, images)
    chex.assert_tree_all_finite((state, info))
    chex.assert_trees_all_equal_shapes_and_dtypes(start, state)
    for player in PLAYERS[name]:
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), getattr(start.params, player), getattr(state.params, player))
        assert any(jax.tree.leaves(moved)), player
    assert " ".join(info._fields) == OBSERVED[name]
    for field, value in info._asdict().items():
        chex.assert_shape([] if value is None else value, () if field == "beta" else (8,))
    shapes = {
        "sample": (5, 6, 6),
        "decode": (7, 6, 6),
        "log_joint": (7,),
        "encode": (7, 3),
        "encode several": (4, 7, 3),
        "elbo": (7,),
        "adversary": (7,),
    }
    for field, (_, evaluate) in evaluations(method, state, images[:7]).items():
        result = evaluate()
        chex.assert_tree_all_finite(result)
        chex.assert_shape(jax.tree.leaves(result)[0], shapes[field])
    samples = method.sample(KEY, state, 5)
    assert ((samples >= 0) & (samples <= 1)).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_what_evaluates_does_so_by_running_statistics(name, images):
    """A network in training mode would not read them: what is not a number there shows in all that reads that player."""
    method = small_method(name, batch_norm=True)
    state = method.init(jax.random.key(0), images)

    @jax.jit
    def evaluate(state):
        return {field: result() for field, (_, result) in evaluations(method, state, images).items()}

    read = {field: players for field, (players, _) in evaluations(method, state, images).items()}
    chex.assert_tree_all_finite(evaluate(state))
    for player in PLAYERS[name]:
        broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), getattr(state.collections, player))
        for field, result in evaluate(state._replace(collections=state.collections._replace(**{player: broken}))).items():
            finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result))
            assert finite == (player not in read[field].split()), (player, field)


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("avb", "vae")), "gan"])
@pytest.mark.slow
def test_a_state_holds_all_of_it(name, images, tmp_path):
    """A run that is taken up again from its checkpoint is the run that was not interrupted."""
    method = small_method(name, ema_decay=0.9, optimizers=optax.adam(1e-2))
    run = functools.partial(train, method, np.asarray(images), batch_size=4, log_every=2, checkpoint_every=2, parallel="jit")
    run(steps=2, workdir=tmp_path)
    resumed, whole = run(steps=4, workdir=tmp_path), run(steps=4)
    chex.assert_trees_all_close(resumed, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bigan", "gan"])
@pytest.mark.slow
def test_the_adversary_has_steps_of_its_own(name, images):
    """Three of them leave its optimiser's count at 3 and the others' at 1."""
    method = small_method(name, adversary_steps=3)
    state, _ = jax.jit(method.train_step)(jax.random.key(1), method.init(jax.random.key(0), images), images)
    assert [int(held[0].count) for held in state.opt_state if held is not None] == [1] * (1 if name == "gan" else 2) + [3]


@pytest.mark.parametrize("name", ["avb", "vae", "vaegan"])
def test_reduce_is_given_every_gradient_and_statistic(name, images):
    """`transforms.over_devices` rests on it: with all of them set to 0, nothing moves but the step."""
    settings = {"adversary_steps": 2} if name in ADVERSARIAL else {}
    method = small_method(name, batch_norm=True, optimizers=optax.sgd(1.0), **settings)
    state = method.init(jax.random.key(0), images)
    nothing = jax.jit(lambda *inputs: method.train_step(*inputs, lambda tree: jax.tree.map(jnp.zeros_like, tree)))
    after, _ = nothing(jax.random.key(1), state, images)
    chex.assert_trees_all_equal(after.params, state.params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(after.collections))


def test_players_start_from_keys_of_their_own(images):
    """One module in all three places would start from three params."""

    class Any(nn.Module):
        shape: tuple

        @nn.compact
        def __call__(self, *inputs):
            return jnp.zeros((len(inputs[0]), *self.shape)) + self.param("p", nn.initializers.normal(), ())

    method = own_method(Any((3,)), Any((6, 6, 1)), Any(()))
    state = method.init(jax.random.key(0), images)
    assert len({float(player["p"]) for player in state.params}) == 3


@pytest.mark.parametrize("name", ["avb", "vae", "aae", "vaegan"])
def test_beta_warms_up(name, images):
    method = small_method(name, beta=2.0, beta_warmup=4)
    state = method.init(jax.random.key(0), images)
    step = jax.jit(method.train_step)
    betas = [float(step(KEY, state._replace(step=jnp.array(at)), images)[1].beta) for at in (0, 1, 3, 10)]
    np.testing.assert_allclose(betas, [0.5, 1.0, 2.0, 2.0])


def test_one_optimiser_serves_all_players_or_each_has_its_own(images):
    """And a player whose own is at rate 0 stays where it is, while the others move."""
    by_its_state = optax.GradientTransformation(
        lambda params: jnp.ones(()), lambda gradients, rate, params: (jax.tree.map(lambda g: -rate * g, gradients), rate)
    )
    method = small_method("avb", optimizers=by_its_state)
    state, step = method.init(jax.random.key(0), images), jax.jit(method.train_step)
    for still in Players._fields:
        rates = Players(*[jnp.float32(name != still) for name in Players._fields])
        after, _ = step(jax.random.key(1), state._replace(opt_state=rates), images)
        for name in Players._fields:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), getattr(after.params, name), getattr(state.params, name))
            assert all(jax.tree.leaves(same)) == (name == still), (still, name)
    three = small_method("avb", optimizers=Players(*[optax.sgd(1.0)] * 3))
    both = [
        step(jax.random.key(1), m.init(jax.random.key(0), images), images)[0]
        for m, step in ((method, step), (three, jax.jit(three.train_step)))
    ]
    chex.assert_trees_all_equal(both[0].params, both[1].params)


def test_x_side_of_the_adversary_is_computed_once(images):
    """Compiled, a step with an x-net 50 times as wide costs one forward and one backward pass of it, not two forwards."""

    def flops(width):
        x_net = networks.MLP((width,), input_rank=2)
        adversary = networks.InnerProductAdversary(x_net, networks.MLP((4,)), 4)
        method = own_method(*small_modules("avb")._replace(adversary=adversary), noise_dim=3, optimizers=optax.sgd(1.0))
        state = method.init(jax.random.key(0), images)
        return jax.jit(method.train_step).lower(jax.random.key(0), state, images).compile().cost_analysis()["flops"]

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
    """One with batch statistics of its own, which is given z by another name."""

    @nn.compact
    def __call__(self, code, train=True):
        return nn.Dense(36)(nn.BatchNorm(use_running_average=not train)(code)).reshape(-1, 6, 6, 1)


class OwnAdversary(nn.Module):
    """One that does not factor."""

    outputs: int = 0

    @nn.compact
    def __call__(self, x, z):
        h = nn.relu(nn.Dense(16)(jnp.concatenate([x.reshape(len(x), -1), z], -1)))
        return nn.Dense(self.outputs)(h) if self.outputs else nn.Dense(1)(h)[:, 0]


class WithFeatures(nn.Module):
    """One of pairs that returns features as well, of however many z [..., B, Z] next to x [B, ...] if it shares x."""

    shares_x: bool = False

    @nn.compact
    def __call__(self, x, z):
        h = nn.Dense(4)(x.reshape(len(x), -1)) + nn.Dense(4)(z)
        return AdversaryOutput(nn.Dense(1)(h)[..., 0], h)


def own_method(encoder, decoder, adversary, **settings) -> Method:
    """AVB of three modules of 6x6 images and 3 latents."""
    defaults = {"noise_dim": 2, "optimizers": optax.adam(1e-3), "prior": distributions.standard_normal(3)}
    settings = {**defaults, "likelihood": distributions.bernoulli, **settings}
    return avb_jax.avb(encoder, decoder, adversary, **settings)


@pytest.mark.parametrize("adversary", [OwnAdversary(), WithFeatures(), WithFeatures(shares_x=True)])
@pytest.mark.slow
def test_a_user_s_own_modules_drop_in(adversary, images):
    method = own_method(OwnEncoder(), OwnDecoder(), adversary)
    state = train(method, np.asarray(images), steps=4, batch_size=8, log_every=2, parallel="jit")
    chex.assert_tree_all_finite(state)
    assert state.collections.decoder["batch_stats"]["BatchNorm_0"]["mean"].any()


@pytest.mark.slow
def test_a_user_s_own_distributions_drop_in(images):
    """Counts under a mixture for a prior: no closed form anywhere."""
    prior = dist.MixtureSameFamily(
        dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.array([[-1.0] * 3, [1.0] * 3]), 0.5).to_event(1)
    )
    likelihood = lambda output: dist.Poisson(0.1 + nn.softplus(output[..., 0])).to_event(2)  # noqa: E731
    x = jnp.round(5 * images)
    for method in (
        own_method(OwnEncoder(), OwnDecoder(), OwnAdversary(), prior=prior, likelihood=likelihood),
        method_of("vae", small_modules("vae"), prior=prior, likelihood=likelihood, optimizers=optax.adam(1e-3), noise_dim=3),
    ):
        state = method.init(KEY, x)
        after, info = jax.jit(method.train_step)(KEY, state, x)
        chex.assert_tree_all_finite((after, info))
        assert (method.sample(KEY, state, 4) > 0).all()


def test_a_network_of_the_wrong_shape_is_named(images):
    good = Players(OwnEncoder(), OwnDecoder(), OwnAdversary())

    def step(players, **settings):
        method = own_method(*players, **settings)
        jax.eval_shape(lambda key, x: method.train_step(key, method.init(key, x), x), KEY, images)

    step(good)
    with pytest.raises(UserError, match=r"encoder: returned shape \(8, 3\), expected \(8, 5\)"):
        step(good, prior=distributions.standard_normal(5))
    with pytest.raises(UserError, match=r"adversary: returned shape \(16, 2\), expected \(16,\)"):
        step(good._replace(adversary=OwnAdversary(2)))
    with pytest.raises(UserError, match=r"output \(8, 5, 5, 1\) a distribution of .* event shape \(5, 5\); x .* \(6, 6\)"):
        step(good._replace(decoder=networks.MLPDecoder((5, 5), 1, (4,))))
    with pytest.raises(UserError, match=r"the bernoulli likelihood needs \[B, \*x, 1\]"):
        step(good._replace(decoder=networks.MLPDecoder((6, 6), 2, (4,))))
    with pytest.raises(UserError, match=r"batch shape \(8, 6, 6\) and event shape \(\).*`\.to_event\(n\)`"):
        step(good, likelihood=lambda output: dist.Bernoulli(logits=output[..., 0]))
    with pytest.raises(UserError, match=r"optimizers\.adversary=None"):
        step(good, optimizers=Players(optax.sgd(1.0), optax.sgd(1.0)))
    with pytest.raises(UserError, match=r"network=function: give a flax\.linen module, a Network"):
        step(good._replace(decoder=lambda z: z))
    for prior, what in ((3.0, "float"), (dist.Normal(0, 1), r"Normal of batch shape \(\) and event shape \(\)")):
        with pytest.raises(UserError, match=f"prior={what}: give one NumPyro distribution over vectors"):
            step(good, prior=prior)


OUT_OF_RANGE = {
    "beta": -1.0,
    "beta_warmup": -1,
    "adversary_steps": 0,
    "noise_dim": 0,
    "noise_draws": 0,
    "adversary_floor": -1.0,
    "feature_weight": -1.0,
}


@pytest.mark.parametrize("name", METHODS)
def test_settings_out_of_range_are_named(name):
    for field in OUT_OF_RANGE.keys() & inspect.signature(METHODS[name]).parameters:
        with pytest.raises(UserError, match=f"{field}={OUT_OF_RANGE[field]}: must be"):
            small_method(name, **{field: OUT_OF_RANGE[field]})
