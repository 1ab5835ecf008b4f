"""Every config builds, and every field of a config changes something."""

import contextlib
import importlib
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax.traverse_util import flatten_dict

import avb_jax
from avb_jax import UserError, build, families, networks
from avb_jax.methods import update
from experiments import compare, launch, suites
from experiments.configs.fields import texts

ROOT = pathlib.Path(__file__).parents[2]
# Of those that train players on a data set.
CONFIGS = {
    path.stem: importlib.import_module(f"experiments.configs.{path.stem}")
    for path in sorted((ROOT / "experiments" / "configs").glob("[a-z]*.py"))
    if path.stem not in ("common", "fields", "evaluate", "eight_schools")
}
ALL = [(name, variant) for name, module in CONFIGS.items() for variant in module.VARIANTS]
LONG = {(name, "") for name in CONFIGS} | {("celeba", "vae"), ("celeba", "small")}  # 7 to 30 seconds to trace


@pytest.mark.parametrize(("name", "variant"), [pytest.param(*each, marks=[pytest.mark.slow] * (each in LONG)) for each in ALL])
def test_every_config_builds(name, variant):
    """Networks, likelihood, optimisers and one abstract step of each method; nothing is computed."""
    config = CONFIGS[name].get_config(variant)
    size = config.data.get("size")
    shape = (size, size, 3) if size else {"four_points": (2, 2), "digits": (8, 8), "mnist": (28, 28)}[config.data.name]
    config.method = config.method if variant else ",".join(build.METHODS)
    x = jnp.zeros((4, *shape))
    for method in build.methods(config, shape).values():

        def step(method=method):
            return method.train_step(jax.random.key(0), method.init(jax.random.key(0), x), x)

        state, info = jax.eval_shape(step)
        assert hasattr(info, "elbo") == (method.elbo is not None)
        assert state.step.shape == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_contract_fields(name):
    config = CONFIGS[name].get_config()
    for field in ("steps", "batch_size", "seed", "num_seeds", "latent_dim", "method", "parallel"):
        assert field in config
    assert {"name", "dir"} <= set(config.data)
    with pytest.raises(AttributeError):
        config.stepz = 1
    with pytest.raises(UserError, match="no such variant"):
        CONFIGS[name].get_config("nope")


# What each field does to four steps of training on its own config in small. Each value differs from the base's.
BASE = {
    "steps": 4,
    "batch_size": 8,
    "log_every": 2,
    "num_seeds": 1,
    "noise_dim": 3,
    "adversary_steps": 1,
    "ema_decay": 0.1,
    "beta_warmup": 0,
    "data.name": "digits",
    "data.binarize": "none",
    "network.activation": "relu",
    "parallel": "jit",
    "optimizer.schedule": "cosine",
    "likelihood": "gaussian",
    "optimizer.encoder_rate": 1e-3,
    "optimizer.decoder_rate": 1e-3,
    "optimizer.adversary_rate": 1e-3,
    "latent_dim": 3,
    "likelihood_std": None,
    "likelihood_scale": "pixel",
    "contrast.kind": "gaussian",
    "contrast.bases": 2,
    "contrast.widths": (3,),
    "network.minus_log_prior": False,
    "network.head_scale": 1.0,
    "encoder.smallest_std": 0.1,
}
SMALL = {
    "synthetic": {"network.widths": (8,), "network.adversary_features": 4},
    "mnist": {
        "network.widths": (8,),
        "network.channels": 2,
        "network.kernel_size": 3,
        "network.z_widths": (8,),
        "network.adversary_features": 4,
    },
    "celeba": {
        "data.name": "drawn_faces",
        "data.size": 8,
        "network.channels": 2,
        "network.units": 1,
        "network.adversary_channels": 2,
        "network.adversary_kernel_size": 3,
        "network.adversary_widths": (8,),
        "data.flip": False,
    },
}
# What a field's text may be, where a test is to choose another.
CHOICES = {
    "method": build.METHODS,
    "precision": families.PRECISIONS,
    "parallel": ("jit", "pmap"),  # where every device draws noise of its own
    "likelihood": ("gaussian", "bernoulli"),
    "likelihood_scale": families.SCALES,
    "divergence": build.DIVERGENCES,
    "generator_divergence": build.GENERATOR_DIVERGENCES,
    "contrast.kind": build.CONTRASTS,
    "encoder.kind": build.ENCODERS,
    "network.adversary": families.ADVERSARIES,
    "posterior.kind": build.POSTERIORS,
    "network.activation": families.ACTIVATIONS,
    "optimizer.schedule": build.SCHEDULES,
    "data.name": ("digits", "four_points", "drawn_faces"),
    "data.binarize": ("none", "dynamic"),
    "importance.initial": ("encoder", "prior"),
    "ais.initial": ("encoder", "prior"),
}


def another(field, value):
    """Some other value that the field may have."""
    if isinstance(value, str):
        choices = list(CHOICES[field])
        return choices[(choices.index(value.partition(",")[0]) + 1) % len(choices)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (value[0] + 1, *value[1:]) if value else (3,)
    if value is None:
        return 0.01
    if field == "beta_warmup":
        return value + 2  # over one step there is no rise
    if field == "contrast.inflation":
        return 1.2
    return value + 1 if isinstance(value, int) else 0.9 * value or 0.1


# What has to be so for a field to matter.
NEEDS = {
    "feature_weight": {"method": "vaegan"},
    "inner_draws": {"method": "sivi"},
    "importance_weighted": {"noise_draws": 2},
    "generator_divergence": {"method": "gan"},
    "hmc.burn_in": {"method": "uivi"},
    "hmc.chain_steps": {"method": "uivi"},
    "hmc.leapfrog_steps": {"method": "uivi"},
    "hmc.step_size": {"method": "uivi"},
    "network.adversary_components": {"network.adversary": "joint"},
    "encoder.widths": {"encoder.kind": "semi_implicit"},
    "encoder.smallest_std": {"encoder.kind": "semi_implicit"},
    "encoder.noise_scale": {"encoder.kind": "semi_implicit"},
    "posterior.kind": {"method": "vae"},
    "posterior.flows": {"method": "vae", "posterior.kind": "planar"},
    "posterior.widths": {"method": "vae", "posterior.kind": "realnvp"},
    ("mnist", "network.widths"): {"network.family": "mlp"},
    ("mnist", "network.encoder_widths"): {"network.family": "mlp"},
}
# Fields whose effect lies outside a training's numbers, or in a choice that no config here makes.
ELSEWHERE = ("data.dir", "check_images", "log_every", "checkpoint_every", "evaluation.", "network.family")
ELSEWHERE += ("rematerialize", "profile", "patience", "start_from")
ELSEWHERE += ("data.crop", "data.held_out", "data.split_seed", "data.cache")  # of a user's photographs
ELSEWHERE += ("contrast.moment_draws", "adversary_floor")  # of a black box, and of a T that has gone far


def outcome(config):
    """A fingerprint of four steps: every param, raw and averaged, of every seed."""
    dataset = build.dataset(config)
    method = build.method(config, config.method.split(",")[0], dataset.x_shape)
    state = avb_jax.fit(
        method,
        dataset,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        num_seeds=config.num_seeds,
        parallel=config.parallel,
        log_every=config.log_every,
        quiet=True,
    )
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves((state.params, state.ema))])


def small(name, **changes):
    config = CONFIGS[name].get_config()
    config.update_from_flattened_dict({**BASE, **SMALL[name], **changes})
    return config


def flat(config):
    """Every field with its value, (name, value)."""
    return flatten_dict(config.to_dict(), sep=".").items()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_field_changes_something(name):
    bases = {"{}": outcome(small(name))}
    np.testing.assert_array_equal(bases["{}"], outcome(small(name)))  # and nothing changes without a change
    without = []
    for field, _ in flat(CONFIGS[name].get_config()):
        if field.startswith(ELSEWHERE) or (name, field) == ("celeba", "data.binarize"):
            continue  # photographs are never binarised
        needs = NEEDS.get((name, field), NEEDS.get(field, {}))
        base = bases.setdefault(str(needs), None)
        if base is None:
            base = bases[str(needs)] = outcome(small(name, **needs))
        config = small(name, **needs)
        config.update_from_flattened_dict({field: another(field, dict(flat(config))[field])})
        changed = outcome(config)
        if changed.shape == base.shape and np.allclose(changed, base, rtol=1e-6, atol=0):
            without.append(field)
    assert not without


@pytest.mark.parametrize(
    "field",
    [
        "precision",
        "contrast.kind",
        "encoder.kind",
        "network.adversary",
        "network.family",
        "network.activation",
        "likelihood",
        "method",
        "optimizer.schedule",
        "data.name",
        "posterior.kind",
        "divergence",
    ],
)
def test_names_are_checked(field):
    config = small("synthetic", **{field: "nonsense"})
    with pytest.raises(UserError, match=f"{field}='nonsense': must be one of "):
        build.methods(config, (2, 2)), build.dataset(config)


def test_numbers_are_checked():
    for changes in (
        {"contrast.bases": -1},
        {"contrast.gaussian_share": 1.5},
        {"contrast.shape_rate": 0.0},
        {"optimizer.encoder_rate": 0.0},
        {"optimizer.accumulate": 0},
        {"likelihood_std": -1.0},
        {"network.head_scale": 0.0},
        {"beta": -1.0},
        {"ema_decay": 1.0},
        {"posterior.flows": 0},
        {"encoder.smallest_std": -0.1},
        {"encoder.noise_scale": 0.0},
        {"encoder.widths": ()},
        {"encoder.widths": (8, 0)},
        {"network.z_widths": (0,)},
        {"latent_dim": 0},
        {"noise_dim": 0},
        {"noise_draws": 0},
        {"optimizer.b1": 2.0},
        {"optimizer.clip": -1.0},
        {"network.adversary_components": -1},
        {"feature_weight": -1.0},
    ):
        (name,) = changes
        config = small("mnist", **{"method": "vaegan" if name == "feature_weight" else "avb", **changes})
        pattern = {"likelihood_std": "likelihood std", "ema_decay": "decay"}.get(name, name)
        with pytest.raises(UserError, match=pattern):
            build.methods(config, (8, 8))
    with pytest.raises(UserError, match="method='avb,vae,avb': avb is named 2 times"):
        build.methods(small("mnist", method="avb,vae,avb"), (8, 8))


ODD = {
    int: (0, -1),
    float: (0.0, -1.0, float("nan"), float("inf")),
    str: ("", "odd"),
    tuple: ((), (0,), (-1,)),
    type(None): (-1.0,),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_no_odd_value_of_a_field_ends_in_a_trace(name):
    """It is refused in a line before anything is compiled, or may be had."""
    shape = {"synthetic": (2, 2), "mnist": (8, 8), "celeba": (16, 16, 3)}[name]
    refused = 0
    for field, value in flat(small(name)):
        for odd in ODD.get(type(value), ()):
            config = small(name, **NEEDS.get((name, field), NEEDS.get(field, {})))
            try:
                config.update_from_flattened_dict({field: odd})
            except (TypeError, ValueError):
                continue  # of another type than the field's
            try:
                if field.startswith("data."):
                    build.dataset(config)
                for method in build.methods(config, shape).values():
                    jax.eval_shape(lambda method=method: method.init(jax.random.key(0), jnp.zeros((2, *shape))))
            except UserError as error:
                refused += "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{field}={odd!r}: {type(error).__name__}: {error}") from error
    assert refused > 50


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_each_player_s_rate_falls_over_its_own_updates(accumulate):
    """Of Adam under a gradient whose average stays, an update is the rate; its moments are those of the clipped average."""
    rates = {"encoder": 1e-3, "decoder": 2e-3, "adversary": 3e-3}
    fields = {f"optimizer.{player}_rate": rate for player, rate in rates.items()}
    fields |= {"optimizer.clip": 1.0, "optimizer.b1": 0.5, "optimizer.b2": 0.9, "optimizer.schedule": "cosine"}
    fields |= {"optimizer.accumulate": accumulate, "steps": 4 * accumulate, "adversary_steps": 3}
    optimizers = build.optimizers(small("synthetic", **fields))
    for player, rate in rates.items():
        optimizer, params = getattr(optimizers, player), jnp.zeros(4)
        state, count, moved = optimizer.init(params), 12 if player == "adversary" else 4, []
        for _ in range(count + 1):
            for part in range(accumulate):  # of an average of -10
                gradient = jnp.full(4, -10.0 + (part - (accumulate - 1) / 2))
                update, state = optimizer.update(gradient, state, params)
                assert part + 1 == accumulate or float(update[0]) == 0
            moved.append(float(update[0]))
            if len(moved) == 1:
                (adam,) = (s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))
                np.testing.assert_allclose((adam.mu[0], adam.nu[0]), (-0.5 * 0.5, 0.1 * 0.25), rtol=1e-5)
        np.testing.assert_allclose(moved, 0.5 * rate * (1 + np.cos(np.pi * np.arange(count + 1) / count)), rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_the_shape_rate_scales_the_steps_of_the_shape_alone():
    moved = {}
    for rate in (1.0, 0.25):
        config = small("synthetic", **{"contrast.shape_rate": rate})
        method, optimizers = build.method(config, "avb", (2, 2)), build.optimizers(config)
        state = jax.jit(method.init)(jax.random.key(0), jnp.zeros((8, 2, 2)))
        gradients = state.params._replace(encoder=jax.tree.map(jnp.ones_like, state.params.encoder))
        after = update.apply_gradients(state, gradients, optimizers).params.encoder
        moved[rate] = jax.tree.map(lambda a, b: np.asarray(a - b), after, state.params.encoder)
    for name, part in moved[0.25].items():
        factor = 0.25 if name in ("weights", "bases") else 1.0
        jax.tree.map(lambda a, b, f=factor: np.testing.assert_allclose(a, f * b, rtol=1e-3), part, moved[1.0][name])
    assert set(moved[1.0]) > {"weights", "bases"}


def test_a_family_that_a_config_has_no_fields_for_is_refused():
    with pytest.raises(UserError, match=r"network.family='resnet': this config has no network.units"):
        build.method(small("mnist", **{"network.family": "resnet"}), "avb", (8, 8))


def test_a_mixture_has_components():
    with pytest.raises(UserError, match=r"network.adversary_components=0: must be at least 1 with 'mixture'"):
        build.method(small("synthetic", **{"network.adversary": "mixture"}), "avb", (2, 2))


def test_each_posterior_is_built(monkeypatch):
    made = []
    monkeypatch.setattr(avb_jax, "vae", lambda encoder, decoder, **settings: made.append((encoder, settings)) or (lambda: None))
    for kind, encoder in build.POSTERIORS.items():
        config = small("synthetic", **{"posterior.kind": kind, "noise_dim": 4, "ema_decay": None})
        build.method(config, "vae", (2, 2))
        assert type(made[-1][0]) is encoder
        assert made[-1][1]["noise_dim"] == 3 + (4 if kind == "auxiliary" else 0)


def test_precision_and_rematerialisation_are_every_network_s(monkeypatch):
    """Of each method, by the messages of a network that is asked to be so."""
    asked = []
    for name in ("in_bfloat16", "rematerialized"):
        monkeypatch.setattr(networks, name, lambda network, name=name: asked.append(name) or network)
    players = {"avb": 3, "vae": 2, "iwae": 2, "sivi": 2, "uivi": 2, "iwhvi": 3, "aae": 3, "bigan": 3, "gan": 2, "vaegan": 3}
    for method, count in players.items():
        for fields, expected in (({"precision": "bfloat16"}, "in_bfloat16"), ({"rematerialize": True}, "rematerialized")):
            if expected == "in_bfloat16" and method in ("sivi", "uivi", "iwhvi"):
                continue  # whose densities need float32
            made = []
            monkeypatch.setattr(avb_jax, method, lambda *given, made=made, **_: made.extend(given) or (lambda: None))
            asked.clear()
            build.method(small("synthetic", ema_decay=None, **fields), method, (2, 2))
            assert len(made) == count
            assert set(asked) == {expected}
            # A decoder, three adversaries to choose from, an encoder; and IWHVI's reverse model.
            assert len(asked) == 4 + (method != "gan") + (method == "iwhvi")


def test_densities_are_computed_in_float32():
    for fields in (
        {"method": "vae", "posterior.kind": "iaf"},
        {"method": "sivi"},
        {"method": "uivi"},
        {"method": "iwhvi"},
        {"encoder.kind": "semi_implicit"},
        {"method": "pixelcnn"},
        {"method": "vae", "pixels.kind": "pixelcnn", "likelihood": "bernoulli"},
    ):
        with pytest.raises(UserError, match=r"precision='bfloat16': .* computes .*; use precision='float32'"):
            build.methods(small("synthetic", precision="bfloat16", **fields), (2, 2))


def test_under_pmap_networks_normalise_over_all_devices(monkeypatch):
    made = []
    monkeypatch.setattr(avb_jax, "avb", lambda *players, **settings: made.append(players) or (lambda: None))
    for parallel, axis in (("pmap", "devices"), ("sharded", None)):
        build.method(small("mnist", parallel=parallel, ema_decay=None), "avb", (8, 8))
        encoder, _, adversary = made[-1]
        assert isinstance(encoder.trunk, networks.ConvNet)
        assert encoder.trunk.axis_name == adversary.x_net.axis_name == axis


@pytest.mark.parametrize("name", [*CONFIGS, "evaluate", "eight_schools"])
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections' own
def test_help_explains_every_field(name, capsys):
    """What the command is, its flags, its configs, and each field with its value and a sentence."""
    with pytest.raises(SystemExit) as ended:
        launch.parse(name, [name, "--help"], flags.FlagValues())
    shown, config = capsys.readouterr().out, importlib.import_module(f"experiments.configs.{name}").get_config()
    assert ended.value.code == 0
    assert "--workdir" in shown
    assert f"python -m experiments.{name}" in shown
    for field, value in flat(config):
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(f"{field}="))
        assert f"{field}={value}" in line
        assert len(line.split(None, 1)) == 2, f"{field} has no sentence"


@pytest.mark.parametrize("name", [*CONFIGS, "evaluate", "eight_schools"])
def test_every_variant_is_explained(name):
    """In the config's docstring, which `--help` prints: what it is, and how long it takes."""
    module = importlib.import_module(f"experiments.configs.{name}")
    entries = re.findall(r"^    ('{2}|\w+)  +(.*(?:\n {8,}.*)*)", module.__doc__, re.M)
    assert sorted(variant.strip("'") for variant, _ in entries) == sorted(module.VARIANTS)
    for variant, text in entries:
        assert re.search("minute|second", text), variant


@pytest.mark.parametrize("name", ["sample", "encode", "report", "compare"])
def test_help_of_the_commands_without_a_config(name, capsys):
    """How it is called, and every flag with a sentence."""
    module, values = importlib.import_module(f"experiments.{name}"), flags.FlagValues()
    with pytest.raises(SystemExit) as ended:
        launch.parse_own(module.__doc__, module.define, [name, "--help"], values)
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python -m experiments.{name} --" in shown
    for flag in values:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  --{flag} "))
        assert len(line.split(None, 1)) == 2, f"{flag} has no sentence"
    with pytest.raises(SystemExit) as ended:
        launch.parse_own(module.__doc__, module.define, [name, "--bogus=1"], flags.FlagValues())
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Unknown command line flag 'bogus'\n"
    given, others = [name, "here"], name == "report"
    with contextlib.nullcontext() if others else pytest.raises(SystemExit):
        assert launch.parse_own(module.__doc__, module.define, given, flags.FlagValues(), others=others) == given
    assert capsys.readouterr().err == ("" if others else "error: 'here': not a flag; --help lists them\n")


def test_help_lists_what_can_be_compared():
    shown = compare.listed().split()
    for name, suite in suites.SUITES.items():
        assert name in shown
        for entry in suite.entries:
            assert (entry if entry in suite.methods else f"[{entry}]") in shown


def test_help_into_a_pipe_that_closes_is_no_error():
    command = f"{sys.executable} -m experiments.sample --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_every_sentence_is_of_a_field():
    there = {field for module in CONFIGS.values() for field, _ in flat(module.get_config())}
    assert set(texts()) <= there
