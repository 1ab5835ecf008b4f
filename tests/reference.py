"""One step of every method, written anew from the papers: what `train_step` has to do, for any networks.

Nothing of `avb_jax` is used but the networks' own `apply`, the names of its containers and of its random streams. What a
gradient must not flow through is a number here, computed beforehand, and no `stop_gradient`. All losses are in nats.
"""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avb_jax import AdversaryOutput, Players, Posterior
from avb_jax.streams import stream

DIVERGENCES = {
    "jensen_shannon": lambda q, p: jnp.logaddexp(0, -q) + jnp.logaddexp(0, p),
    "kl": lambda q, p: jnp.exp(p) - 1 - q,
    "reverse_kl": lambda q, p: p - 1 + jnp.exp(-q),
    "pearson": lambda q, p: jnp.exp(2 * p) - 1 - 2 * (jnp.exp(q) - 1),
    "hellinger": lambda q, p: jnp.exp(p / 2) - 1 - (1 - jnp.exp(-q / 2)),
}


# Of T on the model's own samples.
FOOLING = {
    "non_saturating": lambda t: jnp.logaddexp(0, -t),
    "kl": lambda t: -jnp.exp(t),
    "reverse_kl": lambda t: -t,
}


class Settings(NamedTuple):
    """Of any method; each reads those that it has."""

    prior: tuple = (0.0, 1.0)  # mean and standard deviation of every latent
    noise_dim: int = 3
    noise_draws: int = 1
    adversary_steps: int = 1
    divergence: str = "jensen_shannon"
    generator_divergence: str = "non_saturating"
    gradient_penalty: float = 0.0
    adversary_floor: float | None = None
    minus_log_prior: bool = False
    adaptive: bool = False
    moment_draws: int = 8
    moment_gradients: bool = False
    feature_weight: float = 1.0
    beta: float = 1.0
    beta_warmup: int = 0


def log_normal(z, mean, std):
    """Log N(z; mean, diag std^2) over the last axis."""
    return jnp.sum(-(((z - mean) / std) ** 2) / 2 - jnp.log(std) - jnp.log(2 * jnp.pi) / 2, axis=-1)


def gaussian_kl(mean, std, prior):
    """KL(N(mean, diag std^2), N(m, s^2 I)) over the last axis, for a prior (m, s)."""
    m, s = prior
    return jnp.sum(((mean - m) ** 2 + std**2 - s**2) / (2 * s**2) + jnp.log(s) - jnp.log(std), axis=-1)


class Game:
    """Linen modules in training mode: what each network returns, and the statistics that it leaves behind."""

    def __init__(self, modules, settings, stats, x):
        self.modules, self.settings, self.stats, self.x = modules, settings, stats, x
        self.latents, self.fooling = 3, FOOLING[settings.generator_divergence]

    def run(self, player, params, *inputs):
        """A network's output and its new statistics."""
        module, stats = getattr(self.modules, player), getattr(self.stats, player)
        train = {"train": True} if "train" in inspect.signature(type(module).__call__).parameters else {}
        output, new = module.apply({"params": params, **stats}, *inputs, **train, mutable=list(stats))
        return output, {**stats, **new}

    def draws(self, key):
        """The noise of the encoder, and draws of what T compares with: the prior, or N(0, I) under contrast."""
        noise_key, prior_key = jax.random.split(key)
        shape = self.settings.noise_draws, len(self.x)
        noise = jax.random.normal(noise_key, (*shape, self.settings.noise_dim))
        mean, std = (0.0, 1.0) if self.settings.adaptive else self.settings.prior
        return noise, mean + std * jax.random.normal(prior_key, (*shape, self.latents))

    def log_prior(self, z):
        """Log p(z)."""
        return log_normal(z, *self.settings.prior)

    def posterior(self, params, noise):
        """Z [S, B, Z], the moments [B, Z] or None, log q or None; and the encoder's statistics."""
        s, b = len(noise), len(self.x)
        if getattr(self.modules.encoder, "shares_x", False):
            output, stats = self.run("encoder", params, self.x, noise)
        else:
            output, stats = self.run("encoder", params, jnp.concatenate([self.x] * s), noise.reshape(s * b, -1))
        output = output if isinstance(output, Posterior) else Posterior(output)
        return output.replace(z=output.z.reshape(s, b, self.latents)), stats

    def t(self, params, x, z):
        """T [K, B] at z [K, B, Z], all pairs in one batch; and T's statistics."""
        k, b = z.shape[:2]
        if getattr(self.modules.adversary, "shares_x", False):
            output, stats = self.run("adversary", params, x, z)
        else:
            output, stats = self.run("adversary", params, jnp.concatenate([x] * k), z.reshape(k * b, -1))
        output = output.t if isinstance(output, AdversaryOutput) else output
        output = output.reshape(k, b)
        if self.settings.minus_log_prior:
            mean, std = (0.0, 1.0) if self.settings.adaptive else self.settings.prior
            output = output + jnp.sum(((z - mean) / std) ** 2, axis=-1) / 2
        return output, stats

    def of_images(self, params, images):
        """T [K, B] and features [K, B, F] of images [K, B, ...], all in one batch; and T's statistics."""
        k, b = images.shape[:2]
        output, stats = self.run("adversary", params, images.reshape(k * b, *images.shape[2:]))
        return output.t.reshape(k, b), output.features.reshape(k, b, -1), stats

    def reconstruction(self, params, z):
        """-log p(x|z) of Bernoulli pixels, and the decoder's statistics."""
        logits, stats = self.run("decoder", params, z)
        minus_log_p, minus_log_1_p = jnp.logaddexp(0, -logits[..., 0]), jnp.logaddexp(0, logits[..., 0])
        return jnp.sum(self.x * minus_log_p + (1 - self.x) * minus_log_1_p, axis=(1, 2)), stats

    def images(self, params, z):
        """Images by a decoder of a GAN, and its statistics."""
        logits, stats = self.run("decoder", params, z)
        return jax.nn.sigmoid(logits[..., 0]), stats

    def divergence(self, on_q, on_p):
        """T's loss [S, B]."""
        return DIVERGENCES[self.settings.divergence](on_q, on_p)

    def penalty(self, t, pairs, *inputs):
        """R1: the weight times the mean over pairs of half the squared slope of T in each of the inputs."""
        slopes = jax.grad(lambda inputs: jnp.sum(t(*inputs)))(inputs)
        return self.settings.gradient_penalty * sum(jnp.sum(slope**2) for slope in slopes) / 2 / pairs


# Three functions per method:
#   compared(game, params, noise, z_prior) -> what T compares, a tuple of arrays
#   loss_of_t(game, psi, compared) -> (loss [], (T [S, B] on either side, T's statistics))
#   losses(game, params, psi, noise, z_prior, beta) -> (each player's gradient of its own loss, (what is observed, (the
#     encoder's and the decoder's statistics)))


def moments(game, params, posterior):
    """Mean and standard deviation [B, Z] of q(z|x): the encoder's own, or those of draws from noise that is always the same."""
    if posterior.mean is not None:
        return posterior.mean, posterior.std
    count = game.settings.moment_draws
    noise = jax.random.normal(jax.random.key(0), (count, 1, game.settings.noise_dim))
    z = game.posterior(params, jnp.concatenate([noise] * len(game.x), axis=1))[0].z
    centre = sum(z) / count
    return centre, jnp.sqrt(sum((z - centre) ** 2) / (count - 1))


def standardised(game, params, posterior, fixed):
    """What T sees of the draws, and log r - log p at them, with moments from `fixed` params."""
    z = posterior.z
    if not game.settings.adaptive:
        return z, jnp.zeros(z.shape[:2]), None
    mean, std = moments(game, *fixed)
    kl = gaussian_kl(mean, std, game.settings.prior)
    return (z - mean) / std, log_normal(z, mean, std) - game.log_prior(z), kl


def avb_compared(game, params, noise, z_prior):
    posterior, _ = game.posterior(params.encoder, noise)
    return standardised(game, params.encoder, posterior, (params.encoder, posterior))[0], z_prior


def avb_loss_of_t(game, psi, compared, blind=False):
    x = 0 * game.x if blind else game.x
    t, stats = game.t(psi, x, jnp.concatenate(compared))
    on_q, on_p = jnp.split(t, 2)
    slope = game.penalty(lambda z: game.t(psi, x, z)[0], t.size, jnp.concatenate(compared))
    return jnp.mean(game.divergence(on_q, on_p)) + slope, (on_q, on_p, stats)


def avb_losses(game, params, psi, noise, z_prior, beta, blind=False):
    start = params  # where the moments are taken, unless gradients flow through them

    def loss(params):
        posterior, encoder_stats = game.posterior(params.encoder, noise)
        at_start = start.encoder, game.posterior(start.encoder, noise)[0]
        fixed = (params.encoder, posterior) if game.settings.moment_gradients else at_start
        seen, log_ratio, kl_contrast = standardised(game, params.encoder, posterior, fixed)
        x = 0 * game.x if blind else game.x
        t = game.t(psi, x, jnp.concatenate([seen, z_prior]))[0][: len(seen)]
        if game.settings.adversary_floor is not None:
            t = jnp.where(t > -game.settings.adversary_floor, t, -game.settings.adversary_floor)
        kl = sum(t + log_ratio) / len(t)
        reconstruction, decoder_stats = game.reconstruction(params.decoder, posterior.z[0])
        observed = {"reconstruction": reconstruction, "kl": kl, "kl_contrast": kl_contrast}
        return jnp.mean(reconstruction + beta * kl), (observed, (encoder_stats, decoder_stats))

    gradient, aux = jax.grad(loss, has_aux=True)(params)
    return gradient, aux


def vae_losses(game, params, psi, noise, z_prior, beta):
    del psi, z_prior

    def loss(params):
        posterior, encoder_stats = game.posterior(params.encoder, noise)
        if posterior.log_q is None:
            kl = gaussian_kl(posterior.mean, posterior.std, game.settings.prior)
        else:
            kl = sum(posterior.log_q - game.log_prior(posterior.z)) / len(noise)
        reconstruction, decoder_stats = game.reconstruction(params.decoder, posterior.z[0])
        observed = {"reconstruction": reconstruction, "kl": kl}
        return jnp.mean(reconstruction + beta * kl), (observed, (encoder_stats, decoder_stats))

    return jax.grad(loss, has_aux=True)(params)


def bigan_compared(game, params, noise, z_prior):
    return game.posterior(params.encoder, noise[:1])[0].z[0], game.images(params.decoder, z_prior[0])[0], z_prior[0]


def bigan_loss_of_t(game, psi, compared):
    z, images, z_prior = compared
    t, stats = game.t(psi, jnp.concatenate([game.x, images]), jnp.concatenate([z, z_prior])[None])
    on_data, on_model = t[:, : len(z)], t[:, len(z) :]
    slope = game.penalty(lambda x, z: game.t(psi, x, z[None])[0], len(z), game.x, z)
    return jnp.mean(game.divergence(on_data, on_model)) + slope, (on_data, on_model, stats)


def bigan_losses(game, params, psi, noise, z_prior, beta):
    del beta

    def loss(params):
        posterior, encoder_stats = game.posterior(params.encoder, noise[:1])
        images, decoder_stats = game.images(params.decoder, z_prior[0])
        _, (on_data, on_model, _) = bigan_loss_of_t(game, psi, (posterior.z[0], images, z_prior[0]))
        return jnp.mean(game.fooling(-on_data) + game.fooling(on_model)), ({}, (encoder_stats, decoder_stats))

    return jax.grad(loss, has_aux=True)(params)


def gan_compared(game, params, noise, z_prior):
    del noise
    return (game.images(params.decoder, z_prior[0])[0],)


def images_loss_of_t(game, psi, compared):
    t, _, stats = game.of_images(psi, jnp.stack([game.x, *compared]))
    real, made = jnp.stack([t[0]] * len(compared)), t[1:]
    slope = game.penalty(lambda x: game.of_images(psi, x[None])[0], len(game.x), game.x)
    return jnp.mean(game.divergence(real, made)) + slope, (real, made, stats)


def gan_losses(game, params, psi, noise, z_prior, beta):
    del noise, beta

    def loss(params):
        images, decoder_stats = game.images(params.decoder, z_prior[0])
        t = game.of_images(psi, jnp.stack([game.x, images]))[0]
        return jnp.mean(game.fooling(t[1])), ({}, (None, decoder_stats))

    return jax.grad(loss, has_aux=True)(params)


def vaegan_compared(game, params, noise, z_prior):
    z = game.posterior(params.encoder, noise[:1])[0].z[0]
    images = game.images(params.decoder, jnp.concatenate([z, z_prior[0]]))[0]
    return images[: len(z)], images[len(z) :]


def vaegan_losses(game, params, psi, noise, z_prior, beta):
    def loss(params, player):
        posterior, encoder_stats = game.posterior(params.encoder, noise[:1])
        both = jnp.concatenate([posterior.z[0], z_prior[0]])
        images, decoder_stats = game.images(params.decoder, both)
        images = jnp.split(images, 2)
        t, features, _ = game.of_images(psi, jnp.stack([game.x, *images]))
        distance = jnp.sum((features[0] - features[1]) ** 2, axis=-1) / 2
        kl = gaussian_kl(posterior.mean, posterior.std, game.settings.prior)
        per_player = {
            "encoder": beta * kl + distance,
            "decoder": game.settings.feature_weight * distance + game.fooling(t[1]) + game.fooling(t[2]),
        }
        return jnp.mean(per_player[player]), ({"feature_distance": distance, "kl": kl}, (encoder_stats, decoder_stats))

    of_encoder, aux = jax.grad(loss, has_aux=True)(params, "encoder")
    of_decoder, _ = jax.grad(loss, has_aux=True)(params, "decoder")
    return Players(of_encoder.encoder, of_decoder.decoder), aux


def _blind(function):
    return lambda *arguments: function(*arguments, blind=True)


METHODS = {
    "avb": (avb_compared, avb_loss_of_t, avb_losses),
    "aae": (avb_compared, _blind(avb_loss_of_t), _blind(avb_losses)),
    "vae": (None, None, vae_losses),
    "bigan": (bigan_compared, bigan_loss_of_t, bigan_losses),
    "gan": (gan_compared, images_loss_of_t, gan_losses),
    "vaegan": (vaegan_compared, images_loss_of_t, vaegan_losses),
}


def step(method, key, state, t, x, modules, settings, rates, ema_decay):
    """Algorithm 1 by gradient descent at `rates` in step t: (params, statistics, averages, what is observed) after it."""
    compared, loss_of_t, losses = METHODS[method]
    psi, stats = state.params.adversary, state.collections
    game = Game(modules, settings, stats, x)

    def descend(params, gradient, rate):
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    for i in range(1, settings.adversary_steps if loss_of_t else 0):
        draws = game.draws(jax.random.fold_in(stream(key, "adversary"), i))
        gradient, (*_, new) = jax.grad(lambda psi, seen, game: loss_of_t(game, psi, seen), has_aux=True)(
            psi, compared(game, state.params, *draws), game
        )
        psi = descend(psi, gradient, rates.adversary)
        stats = stats._replace(adversary=new)
        game = Game(modules, settings, stats, x)

    draws = game.draws(key)
    beta = settings.beta * (min(1, (t + 1) / settings.beta_warmup) if settings.beta_warmup else 1)
    generative, (observed, (encoder_stats, decoder_stats)) = losses(
        game, state.params._replace(adversary=None), psi, *draws, beta
    )
    adversary_stats = stats.adversary
    if loss_of_t:
        seen = compared(game, state.params, *draws)
        gradient, (on_q, on_p, adversary_stats) = jax.grad(lambda psi: loss_of_t(game, psi, seen), has_aux=True)(psi)
        psi = descend(psi, gradient, rates.adversary)
        pairs = jnp.concatenate([on_q, on_p])
        observed["adversary_loss"] = sum(game.divergence(on_q, on_p)) / len(on_q)
        observed["adversary_accuracy"] = sum((on_q > 0).astype(float) + (on_p < 0)) / (2 * len(on_q))
        observed["adversary_saturation"] = sum((jnp.abs(pairs) > 5).astype(float)) / len(pairs)
    params = Players(
        *(
            None if old is None else descend(old, gradient, rate)
            for old, gradient, rate in zip(state.params[:2], generative[:2], rates[:2], strict=True)
        ),
        psi,
    )
    stats = Players(stats.encoder if encoder_stats is None else encoder_stats, decoder_stats, adversary_stats)
    decay = min(ema_decay, (1 + t) / (10 + t))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, tuple(state.ema), (params, stats))
    if "kl" in observed:
        observed["beta"] = beta
    if method in ("avb", "vae"):
        observed["elbo"] = -observed["reconstruction"] - observed["kl"]
    if method == "aae":
        observed["kl_aggregated_posterior"] = observed.pop("kl")
    return params, stats, ema, {name: value for name, value in observed.items() if value is not None}
