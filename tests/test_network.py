"""Networks of three libraries as players: Linen as it is, NNX and Equinox through their adapters, the same once trained."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import avb_jax
from avb_jax import Network, Players, UserError, distributions, networks
from avb_jax.evaluation import ELBO
from avb_jax.network import as_network, call, from_linen
from avb_jax.training.checkpoints import key_data
from avb_jax.training.loop import train
from avb_jax.transforms import with_ema
from tests.conftest import small_method, small_modules

X, NOISE, Z = (jax.random.normal(jax.random.key(k), (8, size)) for k, size in enumerate((36, 3, 3)))
IMAGES = jax.random.uniform(jax.random.key(7), (8, 6, 6))
WIDTH = 5


class LinenEncoder(nn.Module):
    """Dense, batch normalisation, Dense, of (x, noise)."""

    @nn.compact
    def __call__(self, x, noise, train):
        h = nn.Dense(WIDTH, name="hidden")(jnp.concatenate([x.reshape(len(x), -1), noise], axis=-1))
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(h)
        return nn.Dense(3, name="out")(nn.tanh(h))


class NNXEncoder(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(39, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x, noise):
        h = self.norm(self.hidden(jnp.concatenate([x.reshape(len(x), -1), noise], axis=-1)))
        return self.out(nnx.tanh(h))


class LinenDecoder(nn.Module):
    """z -> logits [B, 6, 6, 1]."""

    @nn.compact
    def __call__(self, z):
        return nn.Dense(36, name="out")(nn.tanh(nn.Dense(WIDTH, name="hidden")(z))).reshape(-1, 6, 6, 1)


class EquinoxDecoder(eqx.Module):
    """The same for one code, with arrays that are no params."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear
    activation: callable
    order: jax.Array

    def __init__(self, key):
        self.hidden, self.out = eqx.nn.Linear(3, WIDTH, key=key), eqx.nn.Linear(WIDTH, 36, key=jax.random.split(key)[0])
        self.activation, self.order = jnp.tanh, jnp.arange(36)[::-1]

    def __call__(self, z):
        return self.out(self.activation(self.hidden(z)))[self.order][self.order].reshape(6, 6, 1)


class LinenAdversary(nn.Module):
    """Sum of a layer of x times a layer of z, which shares x."""

    shares_x = True

    @nn.compact
    def __call__(self, x, z):
        f = nn.Dense(WIDTH, name="f")(x.reshape(len(x), -1))
        return jnp.sum(f * nn.Dense(WIDTH, name="g")(z), axis=-1)


class NNXAdversary(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.f, self.g = nnx.Linear(36, WIDTH, rngs=rngs), nnx.Linear(3, WIDTH, rngs=rngs)

    def __call__(self, x, z):
        return jnp.sum(self.f(x.reshape(len(x), -1)) * self.g(z), axis=-1)


class EquinoxAdversary(eqx.Module):
    """The same for one x and z [S, Z]."""

    f: eqx.nn.Linear
    g: eqx.nn.Linear

    def __init__(self, key):
        self.f, self.g = eqx.nn.Linear(36, WIDTH, key=key), eqx.nn.Linear(3, WIDTH, key=jax.random.split(key)[0])

    def __call__(self, x, z):
        return jax.vmap(self.g)(z) @ self.f(x.ravel())


def to_nnx(variables, network):
    """Linen params and statistics in the places that the NNX network has for them."""
    params, others = (network[kind] for kind in ("params", "others"))
    for layer, values in variables["params"].items():
        for name, value in values.items():
            params[layer][name].set_value(value)
    for layer, values in variables.get("batch_stats", {}).items():
        for name, value in values.items():
            others[layer][name].set_value(value)
    return {"params": params, "others": others}


def to_equinox(variables, network):
    """Linen params in the places that the Equinox network has for them, whose matrices are transposed."""
    module = network["params"]
    for layer, values in variables["params"].items():
        where = lambda m, layer=layer: (getattr(m, layer).weight, getattr(m, layer).bias)  # noqa: E731
        module = eqx.tree_at(where, module, (values["kernel"].T, values["bias"]))
    return {**network, "params": module}


LINEN = Players(LinenEncoder(), LinenDecoder(), LinenAdversary())
ADAPTED = {  # player: (its network, how it is given a Linen one's variables)
    "nnx encoder": ("encoder", networks.from_nnx(lambda rngs: NNXEncoder(rngs)), to_nnx),
    "nnx adversary": ("adversary", networks.from_nnx(lambda rngs: NNXAdversary(rngs), shares_x=True), to_nnx),
    "equinox decoder": ("decoder", networks.from_equinox(EquinoxDecoder), to_equinox),
    "equinox adversary": ("adversary", networks.from_equinox(EquinoxAdversary, shares_x=True), to_equinox),
}


def method_of(players):
    """AVB by gradient descent, two updates of T and two draws a step."""
    return avb_jax.avb(
        *players,
        prior=distributions.standard_normal(3),
        likelihood=distributions.bernoulli,
        optimizers=optax.sgd(0.1),
        noise_dim=3,
        adversary_steps=2,
        noise_draws=2,
    )


@pytest.fixture(scope="module")
def trained():
    """AVB of three Linen modules: its State at the start and after three steps, what they observe, and what it evaluates."""
    return run(method_of(LINEN), None)


def run(method, start):
    """(State at the start, State after three steps, the last Info, an ELBO and samples)."""
    start, step = start or method.init(jax.random.key(0), IMAGES), jax.jit(method.train_step)
    state = start
    for i in range(3):
        state, info = step(jax.random.key(i), state, IMAGES)
    evaluated = jax.jit(
        lambda state: (method.elbo(jax.random.key(4), state, IMAGES), method.sample(jax.random.key(5), state, 4))
    )
    return start, state, info, evaluated(state)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.slow
def test_another_library_s_player_trains_as_the_linen_one(name, trained):
    """From the same params and statistics: what steps observe, all that is learnt, what evaluates in evaluation mode."""
    player, network, convert = ADAPTED[name]
    start, expected, expected_info, expected_evaluated = trained
    method = method_of(LINEN._replace(**{player: network}))
    assert network.name == {"nnx": "NNX", "equinox": "Equinox"}[name.split()[0]] + player.capitalize()

    def converted(state):
        """The State with the player's variables as its own library holds them."""
        variables = {"params": getattr(state.params, player), **getattr(state.collections, player)}
        own = convert(variables, network.init(jax.random.key(1)))
        params = state.params._replace(**{player: own.pop("params")})
        return state._replace(params=params, collections=state.collections._replace(**{player: own}))

    fresh = method.init(jax.random.key(0), IMAGES)
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, converted(start)._replace(opt_state=fresh.opt_state))
    _, after, info, evaluated = run(method, converted(start)._replace(opt_state=fresh.opt_state))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (info, evaluated), (expected_info, expected_evaluated))
    wanted = converted(expected)
    jax.tree.map(close, (after.params, after.collections), (wanted.params, wanted.collections))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), getattr(after.params, player), getattr(fresh.params, player))
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("player", ["nnx encoder", "equinox decoder"])
def test_an_adapted_network_starts_from_its_key(player):
    _, network, _ = ADAPTED[player]
    one, again, other = (network.init(jax.random.key(k)) for k in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert all(leaf.size for leaf in jax.tree.leaves(one))
    differ = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (one["params"], other["params"])), strict=True)]
    assert any(differ)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(one["params"]))


def test_nnx_statistics_change_in_training_alone():
    """And are read in evaluation alone."""
    _, network, _ = ADAPTED["nnx encoder"]
    variables = network.init(jax.random.key(0))
    out, after = network.apply(variables, X, NOISE, train=False)
    chex.assert_trees_all_equal(after, {"others": variables["others"]})
    alone, _ = network.apply(variables, X[:1], NOISE[:1], train=False)
    np.testing.assert_allclose(out[:1], alone, rtol=1e-5)
    copies = jax.tree.map(jnp.copy, variables)
    trained, after = network.apply(variables, X, NOISE, train=True)
    chex.assert_trees_all_equal(variables, copies)  # it is a function of them
    assert not np.allclose(trained, out)
    assert not np.allclose(after["others"]["norm"]["mean"].get_value(), variables["others"]["norm"]["mean"].get_value())


class WithDropout(nnx.Module):
    """Random numbers of a module's own."""

    def __init__(self, rngs):
        self.layer, self.drop = nnx.Linear(3, 36, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, z):
        return self.drop(self.layer(z)).reshape(-1, 6, 6, 1)


def test_an_nnx_module_s_random_numbers_go_on_in_training():
    """Their count is carried in the State, and evaluation draws none; averages leave counts and keys as they are."""
    method = with_ema(method_of(LINEN._replace(decoder=networks.from_nnx(lambda rngs: WithDropout(rngs)))), 0.9)
    state, step = method.init(jax.random.key(0), IMAGES), jax.jit(method.train_step)
    counts = lambda tree: [int(a) for a in jax.tree.leaves(tree.decoder) if jnp.issubdtype(a.dtype, jnp.unsignedinteger)]  # noqa: E731
    start = counts(state.collections)
    for i in range(2):
        state, _ = step(jax.random.key(i), state, IMAGES)
    assert max(counts(state.collections)) > max(start)
    samples = [method.sample(jax.random.key(0), state, 2) for _ in range(2)]
    np.testing.assert_array_equal(*samples)


class Plain(nn.Module):
    """Takes no `train` and has statistics all the same."""

    @nn.compact
    def __call__(self, z):
        count = self.variable("counts", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("counts") and not self.is_initializing():
            count.value = count.value + 1.0
        return nn.Dense(2)(z) + 0 * count.value


class Trains(nn.Module):
    """Shows what it is given as `train`."""

    @nn.compact
    def __call__(self, z, *, train=True):
        return z + (1.0 if train else 0.0)


def test_a_linen_module_is_taken_as_it_is():
    """`train` where it takes it, `shares_x` where it says so, collections that change in training alone."""
    network = from_linen(Trains())
    assert [float(call(network, {}, {}, jnp.zeros(()), train=train)[0]) for train in (True, False)] == [1.0, 0.0]
    assert not network.shares_x
    assert network.name == "Trains"
    assert as_network(LinenAdversary()).shares_x
    assert as_network(networks.InnerProductAdversary(networks.MLP(), networks.MLP())).shares_x
    network = from_linen(Plain())
    variables = network.init(jax.random.key(0), Z)
    params = variables.pop("params")
    outputs = [call(network, params, variables, Z, train=train) for train in (True, False)]
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    assert [float(collections["counts"]["calls"]) for _, collections in outputs] == [1.0, 0.0]


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_run_of_a_network_with_random_numbers_resumes_and_is_evaluated(tmp_path, parallel):
    """Keys are among its collections, and keys are no numbers to NumPy or to a checkpoint."""
    method = method_of(LINEN._replace(decoder=networks.from_nnx(lambda rngs: WithDropout(rngs))))
    run = functools.partial(train, method, np.asarray(IMAGES), batch_size=4, log_every=2, checkpoint_every=2, parallel=parallel)
    run(steps=2, workdir=tmp_path)
    resumed, whole = run(steps=4, workdir=tmp_path), run(steps=4)
    chex.assert_trees_all_close(key_data(resumed), key_data(whole), rtol=1e-5, atol=1e-6)
    report = avb_jax.evaluate(method, resumed, np.asarray(IMAGES), [ELBO(draws=1)], workdir=tmp_path, quiet=True)
    assert np.isfinite(report["elbo", "adversary"].mean)


@pytest.mark.slow
def test_a_run_with_other_libraries_players_resumes(tmp_path):
    """Their variables are pytrees of their own kinds, which a checkpoint holds as well."""
    method = with_ema(method_of(Players(*(ADAPTED[name][1] for name in ADAPTED if name != "nnx adversary"))), 0.9)
    run = functools.partial(train, method, np.asarray(IMAGES), batch_size=4, log_every=2, checkpoint_every=2, parallel="jit")
    run(steps=2, workdir=tmp_path)
    resumed, whole = run(steps=4, workdir=tmp_path), run(steps=4)
    chex.assert_trees_all_close(resumed, whole, rtol=1e-5, atol=1e-6)


def test_two_functions_are_a_network():
    """Without any library."""
    decoder = Network(
        lambda key, z: {"params": {"w": jax.random.normal(key, (3, 36))}},
        lambda variables, z, train: ((z @ variables["params"]["w"]).reshape(-1, 6, 6, 1), {}),
    )
    assert as_network(decoder) is decoder
    assert as_network(None) is None
    method = method_of(small_modules("avb")._replace(decoder=decoder))
    start = method.init(jax.random.key(0), IMAGES)
    state, info = jax.jit(method.train_step)(jax.random.key(1), start, IMAGES)
    chex.assert_tree_all_finite((state, info))
    assert (state.params.decoder["w"] != start.params.decoder["w"]).any()


class WithState(eqx.Module):
    """Equinox's batch normalisation, whose state a network would have to carry."""

    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        del key
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, z):
        return self.norm(z)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda: as_network(lambda z: z), "network=function: give a flax.linen module, a Network"),
        (lambda: as_network(3), "network=int: give"),
        (lambda: as_network(LinenDecoder), "network=_?[A-Za-z]+: give"),
        (lambda: as_network(NNXAdversary(nnx.Rngs(0))), "network=NNXAdversary: give .* from_nnx or from_equinox"),
        (lambda: as_network(EquinoxDecoder(jax.random.key(0))), "network=EquinoxDecoder: give .* from_equinox of a function"),
        (lambda: small_method("avb", encoder=lambda trunk, latents: jnp.tanh), "give a flax.linen module"),
        (lambda: networks.from_equinox(WithState), "WithState: .*state of its own"),
    ],
)
def test_what_is_no_network_is_named(give, message):
    with pytest.raises(UserError, match=message):
        give()


def test_in_bfloat16_params_gradients_statistics_and_outputs_stay_in_float32():
    """The same function to bfloat16's three digits, and computed in bfloat16: no float32 product is left."""
    exact, rounded = as_network(LinenEncoder()), networks.in_bfloat16(LinenEncoder())
    variables = exact.init(jax.random.key(0), X, NOISE)
    chex.assert_trees_all_equal(variables, rounded.init(jax.random.key(0), X, NOISE))

    def run(network, params):
        return network.apply({**variables, "params": params}, X, NOISE, train=True)

    (z, after), (z_rounded, after_rounded) = run(exact, variables["params"]), run(rounded, variables["params"])
    gradient = jax.grad(lambda params: jnp.sum(run(rounded, params)[0] ** 2))(variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves((z_rounded, after_rounded, gradient))} == {jnp.dtype("float32")}
    chex.assert_trees_all_close((z, after), (z_rounded, after_rounded), rtol=0.05, atol=0.05)
    assert np.abs(z - z_rounded).max() > 1e-4
    program = str(jax.make_jaxpr(lambda params: run(rounded, params)[0])(variables["params"]))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("bf16" in line for line in products)


@pytest.mark.slow
def test_a_bfloat16_training_s_curve_is_the_float32_one_s_within_noise():
    """A hundred steps on easy images: the last twenty ELBOs differ by less than two seeds' do."""
    x = (np.random.default_rng(0).random((64, 1, 1)) < 0.5).astype(np.float32) * np.ones((64, 6, 6), np.float32)

    def curve(seed, convert):
        made = small_modules("avb")
        method = avb_jax.avb(
            *map(convert, made),
            prior=distributions.standard_normal(3),
            likelihood=distributions.bernoulli,
            optimizers=optax.adam(1e-2),
            noise_dim=3,
        )
        elbos = []

        class Kept(avb_jax.Callback):
            def report(self, step, numbers, examples_per_second):
                elbos.append(float(numbers["elbo"]))

        train(method, x, steps=100, batch_size=16, seed=seed, log_every=20, parallel="jit", callbacks=[Kept()])
        return np.array(elbos)

    exact, rounded, other = curve(0, as_network), curve(0, networks.in_bfloat16), curve(1, as_network)
    assert exact[-1] > exact[0] + 5
    assert 0 < abs(rounded[-1] - exact[-1]) < max(1.0, 2 * abs(other[-1] - exact[-1]))


def test_a_rematerialised_network_is_the_same_and_keeps_less():
    network, again = as_network(LinenEncoder()), networks.rematerialized(LinenEncoder())
    variables = network.init(jax.random.key(0), X, NOISE)

    def loss(network, params):
        z, after = network.apply({**variables, "params": params}, X, NOISE, train=True)
        return jnp.sum(z**2), after

    results = [jax.jit(jax.grad(functools.partial(loss, n), has_aux=True))(variables["params"]) for n in (network, again)]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    programs = [str(jax.make_jaxpr(jax.grad(lambda p, n=n: loss(n, p)[0]))(variables["params"])) for n in (network, again)]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]
    assert programs[1].count("tanh") == programs[0].count("tanh") + 1  # once more in the backward pass
