"""The shipped networks and losses once more in PyTorch, with the same params: what `benchmarks.step` measures ours against.

Images are NCHW tensors in channels_last, PyTorch's fast layout. A layer is made of the params that Flax initialised, so that
counts are equal and losses can be compared. Where the padding of a strided convolution is not the same on both sides, PyTorch
has to pad in a step of its own: with `EXACT` it does, to compare losses; without, for timing, a layer pads alike on both
sides, as one would write it for PyTorch, to the same shapes and with the same work.
"""

import functools
import itertools
import math

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from avb_jax import networks
from avb_jax.networks import encoders

EXACT = False
ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "silu": F.silu, "tanh": torch.tanh}


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(torch.get_default_device())


def linear(params: dict) -> nn.Linear:
    inputs, outputs = params["kernel"].shape
    layer = nn.Linear(inputs, outputs, bias="bias" in params)
    layer.weight.data = tensor(params["kernel"]).T.contiguous()
    if "bias" in params:
        layer.bias.data = tensor(params["bias"])
    return layer


class Conv(nn.Conv2d):
    """SAME padding."""

    def __init__(self, params: dict, stride: int):
        k, _, inputs, outputs = params["kernel"].shape
        super().__init__(inputs, outputs, k, stride, (k - 1) // 2, bias="bias" in params)
        self.weight.data = tensor(params["kernel"]).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        if "bias" in params:
            self.bias.data = tensor(params["bias"])

    def forward(self, x):
        if not EXACT:
            return super().forward(x)
        (k, _), (s, _) = self.kernel_size, self.stride
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:]]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, self.bias, s)


class ConvTranspose(nn.ConvTranspose2d):
    """Twice the resolution."""

    def __init__(self, params: dict):
        k, _, inputs, outputs = params["kernel"].shape
        super().__init__(inputs, outputs, k, 2, (k - 1) // 2, output_padding=1)
        flipped = np.array(params["kernel"])[::-1, ::-1].copy()
        self.weight.data = tensor(flipped).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
        self.bias.data = tensor(params["bias"])

    def forward(self, x):
        if not EXACT:
            return super().forward(x)
        k = self.kernel_size[0]
        whole = F.conv_transpose2d(x, self.weight, self.bias, 2)
        first = k - 1 - (k + 1) // 2  # for k >= 3
        return whole[:, :, first : first + 2 * x.shape[2], first : first + 2 * x.shape[3]]


def norm(params: dict) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(params["scale"]), momentum=0.01)
    layer.weight.data, layer.bias.data = tensor(params["scale"]), tensor(params["bias"])
    return layer


def flat(h: torch.Tensor) -> torch.Tensor:
    """Features in Flax's order, rows and columns before channels: no copy in channels_last."""
    return h.permute(0, 2, 3, 1).reshape(len(h), -1)


def unflat(h: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return h.reshape(len(h), height, width, -1).permute(0, 3, 1, 2)


def layers(params: dict, prefix: str, make) -> nn.ModuleList:
    """What `make` makes of params `prefix_0`, `prefix_1`, ..., in order."""
    names = sorted((n for n in params if n.rpartition("_")[0] == prefix), key=lambda n: int(n.rpartition("_")[2]))
    return nn.ModuleList([make(params[name]) for name in names])


class MLP(nn.Module):
    """`networks.MLP`."""

    def __init__(self, module, params):
        super().__init__()
        self.layers, self.activation = layers(params, "Dense", linear), ACTIVATIONS[module.activation.__name__]

    def forward(self, x, noise=None):
        h = x if noise is None else torch.cat([x, noise], -1)
        for layer in self.layers:
            h = self.activation(layer(h))
        return h


class Flat(nn.Module):
    """Of images, given as one vector."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x, noise=None):
        return self.trunk(flat(x), noise)


class ConvNet(nn.Module):
    """`networks.ConvNet`."""

    def __init__(self, module, params, sizes):
        super().__init__()
        strides = iter(1 if a == b else 2 for a, b in itertools.pairwise(sizes))
        self.convs = layers(params, "Conv", lambda p: Conv(p, next(strides)))
        self.norms, self.noises = layers(params, "BatchNorm", norm), layers(params, "noise", linear)
        self.activation = ACTIVATIONS[module.activation.__name__]

    def forward(self, x, noise=None):
        h = 2.0 * x - 1.0
        for i, layer in enumerate(self.convs):
            h = layer(h)
            h = self.norms[i](h) if self.norms else h
            h = h if noise is None else h + self.noises[i](noise)[:, :, None, None]
            h = self.activation(h)
        return flat(h)


class ConvDecoder(nn.Module):
    """`networks.ConvDecoder`, to logits or means [B, C, H, W]."""

    def __init__(self, module, params, sizes):
        super().__init__()
        self.sizes, self.first = sizes[::-1], linear(params["Dense_0"])
        self.activation = ACTIVATIONS[module.activation.__name__]
        kept, doubled = (iter([params[n] for n in sorted(params) if n.startswith(k)]) for k in ("Conv_", "ConvTranspose_"))
        pairs = itertools.pairwise(self.sizes)
        self.layers = nn.ModuleList([Conv(next(kept), 1) if a == b else ConvTranspose(next(doubled)) for a, b in pairs])

    def forward(self, z):
        h = self.activation(unflat(self.first(z), *self.sizes[0]))
        for i, (layer, (height, width)) in enumerate(zip(self.layers, self.sizes[1:], strict=True)):
            h = layer(h)[:, :, :height, :width]
            h = h if i + 1 == len(self.layers) else self.activation(h)
        return h


class ResidualUnit(nn.Module):
    """`networks.resnet.ResidualUnit`."""

    def __init__(self, module, params):
        super().__init__()
        self.first, self.second = Conv(params["Conv_0"], 1), Conv(params["Conv_1"], 1)
        self.norms, self.scale = layers(params, "BatchNorm", norm), nn.Parameter(tensor(params["scale"]))
        self.shift = linear(params["shift"]) if "shift" in params else None
        self.activation = ACTIVATIONS[module.activation.__name__]

    def forward(self, h, shift=None):
        r = self.norms[0](h) if self.norms else h
        r = self.first(self.activation(r))
        r = self.norms[1](r) if self.norms else r
        r = r if shift is None else r + self.shift(shift)[:, :, None, None]
        return h + self.scale * self.second(self.activation(r))


class ResNet(nn.Module):
    """`networks.ResNet`."""

    def __init__(self, module, params, sizes):
        super().__init__()
        strides = iter(1 if a == b else 2 for a, b in itertools.pairwise(sizes))
        self.convs = layers(params, "Conv", lambda p: Conv(p, next(strides)))
        self.residuals = layers(params, "ResidualUnit", lambda p: ResidualUnit(module, p))
        self.norms, self.activation = layers(params, "BatchNorm", norm), ACTIVATIONS[module.activation.__name__]

    def forward(self, x, noise=None):
        h, units = 2.0 * x - 1.0, len(self.residuals) // len(self.convs)
        for i, layer in enumerate(self.convs):
            h = layer(h)
            for unit in range(units):
                h = self.residuals[i * units + unit](h, noise if unit == 0 else None)
        return flat(self.activation(self.norms[0](h) if self.norms else h))


class ResNetDecoder(nn.Module):
    """`networks.ResNetDecoder`, to means [B, C, H, W]."""

    def __init__(self, module, params, sizes):
        super().__init__()
        self.sizes, self.first = sizes[::-1], linear(params["Dense_0"])
        self.convs = layers(params, "Conv", lambda p: Conv(p, 1))
        self.residuals = layers(params, "ResidualUnit", lambda p: ResidualUnit(module, p))
        self.activation = ACTIVATIONS[module.activation.__name__]

    def forward(self, z):
        h, units = unflat(self.first(z), *self.sizes[0]), len(self.residuals) // len(self.convs)
        for i, (layer, (height, width)) in enumerate(zip(self.convs, self.sizes[1:], strict=True)):
            for unit in range(units):
                h = self.residuals[i * units + unit](h)
            before = tuple(h.shape[2:])
            h = layer(self.activation(h))
            if before != (height, width):  # our channels are [2, 2, C], PyTorch's [C, 2, 2]
                b, c, *_ = h.shape
                h = h.reshape(b, 2, 2, c // 4, *before).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, *(2 * n for n in before))
                h = h[:, :, :height, :width].contiguous(memory_format=torch.channels_last)
        return h


class GlobalScale(nn.Module):
    """`networks.GlobalScale`: (means, a raw scale)."""

    def __init__(self, module, params, sizes):
        super().__init__()
        self.decoder = decoder_of(module.decoder, params["decoder"], sizes)
        self.raw, self.speed = nn.Parameter(tensor(params["raw_scale"])), module.speed

    def forward(self, z):
        return self.decoder(z), self.speed * self.raw


class MLPDecoder(nn.Module):
    """`networks.MLPDecoder`, to logits [B, 1, H, W]."""

    def __init__(self, module, params):
        super().__init__()
        self.hidden, self.out, self.shape = MLP(module, params["MLP_0"]), linear(params["Dense_0"]), module.x_shape

    def forward(self, z):
        return unflat(self.out(self.hidden(z)), *self.shape[:2])


def trunk_of(module, params, sizes) -> nn.Module:
    if isinstance(module, networks.MLP):
        return Flat(MLP(module, params))
    return {networks.ConvNet: ConvNet, networks.ResNet: ResNet}[type(module)](module, params, sizes)


def decoder_of(module, params, sizes) -> nn.Module:
    if isinstance(module, networks.MLPDecoder):
        return MLPDecoder(module, params)
    kinds = {
        networks.ConvDecoder: ConvDecoder,
        networks.ResNetDecoder: ResNetDecoder,
        networks.GlobalScale: GlobalScale,
    }
    return kinds[type(module)](module, params, sizes)


class Encoder(nn.Module):
    """(x, noise [S, B, N]) -> z [S, B, Z], and the mean and the standard deviation [B, Z] where there are some."""

    def __init__(self, module, params, sizes):
        super().__init__()
        self.trunk, self.kind, self.module = trunk_of(module.trunk, params["trunk"], sizes), type(module), module
        if self.kind is networks.BlackBoxEncoder:
            self.head = linear(params["Dense_0"])
            return
        self.mean, self.log_std = linear(params["mean"]), linear(params["log_std"])
        if self.kind is networks.SemiImplicitEncoder:
            self.of_x, self.of_u = linear(params["of_x"]), linear(params["of_u"])
            self.joint = layers(params.get("joint", {}), "Dense", linear)
            self.activation = ACTIVATIONS[module.activation.__name__]
        if self.kind is networks.MomentEncoder:
            self.weights, bases = linear(params["weights"]), params["bases"]
            stacked = [bases["hidden"][name] for name in sorted(bases["hidden"])] + [bases["out"], bases["linear"]]
            self.kernels = nn.ParameterList([nn.Parameter(tensor(p["kernel"])) for p in stacked])  # [bases, in, out]
            self.biases = nn.ParameterList([nn.Parameter(tensor(p["bias"])) for p in stacked[:-1]])
            self.register_buffer("standard", None)  # the draws that the bases are standardised by

    def u(self, eps):
        """The bases [bases, N, Z] of noise [bases, N, K]."""
        h, dim = eps, self.module.latent_dim
        *hidden, out, direct = self.kernels
        for kernel, bias in zip(hidden, self.biases, strict=False):
            h = torch.tanh(torch.baddbmm(bias[:, None], h, kernel))
        return torch.baddbmm(self.biases[-1][:, None], h, out) + torch.bmm(eps[..., :dim], direct)

    def forward(self, x, noise):
        if self.kind is networks.BlackBoxEncoder:
            draws = len(noise)
            features = self.trunk(x.repeat(draws, 1, 1, 1) if draws > 1 else x, noise.reshape(-1, noise.shape[-1]))
            return self.head(features).reshape(*noise.shape[:2], -1), None, None
        features = self.trunk(x)
        if self.kind is networks.SemiImplicitEncoder:
            n, u = noise.split([self.module.latent_dim, noise.shape[-1] - self.module.latent_dim], dim=-1)
            h = self.activation(self.of_x(features) + self.of_u(u))
            for layer in self.joint:
                h = self.activation(layer(h))
            std = torch.sqrt(torch.exp(2.0 * self.log_std(h)) + self.module.smallest_std**2)
            return self.mean(h) + std * n, None, None
        mean, std = self.mean(features), torch.exp(self.log_std(features))
        if self.kind is networks.GaussianEncoder:
            return mean + std * noise, mean, std
        dim, count, share = self.module.latent_dim, self.module.bases, self.module.gaussian_share
        w = (1.0 + self.weights(features.detach())).reshape(-1, count, dim)
        w = w / torch.linalg.norm(w, dim=1, keepdim=True)
        eps = noise[..., dim:].reshape(-1, count, (noise.shape[-1] - dim) // count).transpose(0, 1)
        standard = self.u(self.standard.transpose(0, 1))
        mean_u, var_u = standard.mean(1, keepdim=True), standard.var(1, unbiased=False, keepdim=True)
        u = ((self.u(eps) - mean_u) / torch.sqrt(var_u + 1e-8)).transpose(0, 1).reshape(*noise.shape[:2], count, dim)
        v = math.sqrt(share) * noise[..., :dim] + math.sqrt(1.0 - share) * (w * u).sum(-2)
        return mean + std * v, mean, std


class InnerProductAdversary(nn.Module):
    """`networks.InnerProductAdversary`."""

    def __init__(self, module, params, sizes):
        super().__init__()
        self.x_net, self.z_net = trunk_of(module.x_net, params["x_net"], sizes), MLP(module.z_net, params["z_net"])
        self.f, self.g = linear(params["f"]), linear(params["g"])

    def forward(self, x, z):
        f, g = self.f(self.x_net(x)), self.g(self.z_net(z))
        return (f * g).sum(-1) / math.sqrt(f.shape[-1])


class JointAdversary(nn.Module):
    """`networks.JointAdversary`."""

    def __init__(self, module, params, sizes):
        super().__init__()
        self.x_net, self.z_net = trunk_of(module.x_net, params["x_net"], sizes), MLP(module.z_net, params["z_net"])
        self.f, self.g, self.t = (linear(params[name]) for name in ("f", "g", "t"))
        self.joint = layers(params["joint"], "Dense", linear)
        self.mixture = nn.ModuleDict({name: linear(p) for name, p in params.get("mixture", {}).items()})
        self.frequencies, self.activation = module.frequencies, ACTIVATIONS[module.activation.__name__]

    def forward(self, x, z):
        waves = [wave(frequency * z) for frequency in self.frequencies for wave in (torch.sin, torch.cos)]
        of_x = self.x_net(x)
        f, g = self.f(of_x), self.g(self.z_net(torch.cat([z, *waves], dim=-1)))
        h = torch.cat([f * g, f + g], dim=-1)
        for layer in self.joint:
            h = self.activation(layer(h))
        t = self.t(h)[..., 0]
        if not self.mixture:
            return t
        mean, log_std = (self.mixture[name](of_x).reshape(len(of_x), -1, z.shape[-1]) for name in ("mean", "log_std"))
        log_density = -0.5 * (((z[..., None, :] - mean) * torch.exp(-log_std)) ** 2 + 2.0 * log_std).sum(-1)
        return t + torch.logsumexp(torch.log_softmax(self.mixture["log_weight"](of_x), -1) + log_density, -1)


class ConvAdversary(nn.Module):
    """`networks.ConvAdversary`, on all pairs."""

    def __init__(self, module, params, sizes):
        super().__init__()
        strides = iter(1 if a == b else 2 for a, b in itertools.pairwise(sizes))
        self.convs = layers(params, "Conv", lambda p: Conv(p, next(strides)))
        self.norms, self.z = layers(params, "BatchNorm", norm), layers(params, "z", linear)
        self.hidden, self.z_hidden = layers(params, "hidden", linear), layers(params, "z_hidden", linear)
        self.t, self.activation = linear(params["t"]), ACTIVATIONS[module.activation.__name__]

    def forward(self, x, z):
        pairs, z = z.shape[:2], z.reshape(-1, z.shape[-1])
        h = 2.0 * x.repeat(pairs[0], 1, 1, 1) - 1.0
        for i, layer in enumerate(self.convs):
            h = layer(h)
            h = self.norms[i](h) if self.norms else h
            h = self.activation(h + self.z[i](z)[:, :, None, None])
        h = flat(h)
        for layer, of_z in zip(self.hidden, self.z_hidden, strict=True):
            h = self.activation(layer(h) + of_z(z))
        return self.t(h)[:, 0].reshape(pairs)


def adversary_of(module, params, sizes) -> nn.Module:
    kinds = {
        networks.InnerProductAdversary: InnerProductAdversary,
        networks.JointAdversary: JointAdversary,
        networks.ConvAdversary: ConvAdversary,
    }
    return kinds[type(module)](module, params, sizes)


def mirror(modules, params, sizes, noise_dim: int) -> dict[str, nn.Module]:
    """The players of our modules and params, by name."""
    encoder = Encoder(modules.encoder, params.encoder, sizes)
    if encoder.kind is networks.MomentEncoder:
        bases = modules.encoder.bases
        shape = (encoders.STANDARD_DRAWS, bases, (noise_dim - modules.encoder.latent_dim) // bases)
        encoder.standard = tensor(jax.random.normal(jax.random.key(0), shape))
    made = {"encoder": encoder, "decoder": decoder_of(modules.decoder, params.decoder, sizes)}
    if params.adversary is not None:
        made["adversary"] = adversary_of(modules.adversary, params.adversary, sizes)
    return made


def images(x: torch.Tensor) -> torch.Tensor:
    """Ours, [B, H, W] or [B, H, W, C], as PyTorch's."""
    return x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2)


def log_normal(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


def log(std):
    return torch.log(std) if isinstance(std, torch.Tensor) else math.log(std)


def reconstruction(out, x, std: float | None) -> torch.Tensor:
    """-log p(x|z) [B] of Bernoulli logits (std 0), or of Gaussian means."""
    if std == 0:
        return F.binary_cross_entropy_with_logits(out, x, reduction="none").sum((1, 2, 3))
    if std is None:
        out, raw = out
        std = torch.exp(math.log(0.01) * (1 - torch.sigmoid(raw)))  # between 0.01 and 1
    return (0.5 * ((x - out) / std) ** 2 + log(std) + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))


@functools.cache
def noise_of_moments(draws: int, dim: int) -> torch.Tensor:
    """The same for every x and step."""
    return tensor(jax.random.normal(jax.random.key(0), (draws, 1, dim)))


def losses(players: dict, x, noise, z_prior, config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The encoder's and decoder's loss and T's, of a VAE or of AVB, plain or with adaptive contrast; T runs once for both."""
    options, draws, dim = config.contrast, len(noise), config.latent_dim
    estimated = "adversary" in players and options.kind == "gaussian" and config.encoder.kind == "semi_implicit"
    if estimated:  # the draws of the moments, in the same call
        fixed = noise_of_moments(options.moment_draws, noise.shape[-1])
        noise = torch.cat([noise, fixed.expand(-1, noise.shape[1], -1)])
    z, mean, std = players["encoder"](x, noise)
    if estimated:
        z, of_moments = z[:draws], z[draws:]
        mean, std = of_moments.mean(0), of_moments.var(0).clamp(min=1e-6).sqrt()
    likelihood_std = 0 if config.likelihood == "bernoulli" else config.likelihood_std
    rec = reconstruction(players["decoder"](z[0]), x, likelihood_std)
    if "adversary" not in players:
        kl = 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * torch.log(std)).sum(-1)
        return (rec + kl).mean(), None
    compared, other, ratio, offset = z, z_prior, 0.0, [0.0, 0.0]
    if options.kind == "gaussian":
        std = std.clamp(min=1e-3)
        mean, std = (mean, std) if options.moment_gradients else (mean.detach(), std.detach())
        compared, other = (z - mean) / std, options.inflation * z_prior[..., :dim]
        ratio = log_normal(z, mean, std) - log_normal(z, 0.0, 1.0)
        if options.prior_share:
            from_prior = z_prior[..., -1:] < math.sqrt(2) * torch.erfinv(torch.tensor(2 * options.prior_share - 1))
            other = torch.where(from_prior, (z_prior[..., dim:-1] - mean) / std, other)
            sides = torch.stack([compared, other]).detach()
            log_wide = math.log(1 - options.prior_share) + log_normal(sides, 0.0, options.inflation)
            log_p = math.log(options.prior_share) + log_normal(mean + std * sides, 0.0, 1.0) + torch.log(std).sum(-1)
            offset = torch.logaddexp(log_wide, log_p) - log_normal(sides, 0.0, 1.0)
    both = torch.cat([compared, other])
    t = players["adversary"](x, both)
    if config.network.minus_log_prior:
        t = t + 0.5 * (both**2).sum(-1)
    t_q, t_p = t.chunk(2)
    floored = t_q if config.adversary_floor is None else t_q.clamp(min=-config.adversary_floor)
    kl = (floored + ratio).mean(0)
    return (rec + kl).mean(), (F.softplus(offset[0] - t_q) + F.softplus(t_p - offset[1])).mean()
