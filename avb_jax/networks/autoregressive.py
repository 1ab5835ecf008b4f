"""Autoregressive networks of images: each pixel's distribution from the pixels above it and to its left.

`GatedPixelCNN` (van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders") and `RowLSTM` (van den Oord,
Kalchbrenner & Kavukcuoglu 2016, "Pixel recurrent neural networks") are one interface: teacher forcing of whole images in
`__call__`, and `draw`, which makes images pixel by pixel in one compiled loop and computes nothing twice. Both may look at
features [B, H, W, F] of something else at every pixel, such as a code z (`ModelDecoder`); the colours of a pixel are
independent of each other given the pixels before it. `models.autoregressive` makes a likelihood of either.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax.networks.conv import conv
from avb_jax.types import Array

Draw = Callable[[Array, Array], Array]  # (key, output [B, 1, 1, (C,) P]) -> pixels [B, 1, 1, (C)]


class GatedPixelCNN(nn.Module):
    """Gated PixelCNN: a stack of convolutions of the rows above, and one along the row, which reads the first.

    Maps x [B, H, W] or [B, H, W, C] in [0, 1], and features [B, H, W, F] or None, to [B, *x, parameters]. A pixel sees
    `kernel_size` // 2 rows and columns through the first layer, and one more of each through every further one.
    """

    x_shape: Sequence[int]  # (H, W) or (H, W, C)
    parameters: int = 1  # numbers per pixel and colour
    channels: int = 32
    layers: int = 5
    kernel_size: int = 7  # of the first layer; 3 of the others

    def setup(self):
        into, double = _inputs_of(self), 2 * self.channels
        reach = [self._reach(i) + (i > 0) for i in range(self.layers)]
        width = [2 * self._reach(i) + 1 for i in range(self.layers)]
        self.above = [_Kernel((r, w, c, double)) for r, w, c in zip(reach, width, into, strict=True)]
        self.along = [_Kernel((1, r, c, double)) for r, c in zip(reach, into, strict=True)]
        self.across = [nn.Dense(double) for _ in into]
        self.out = [nn.Dense(self.channels) for _ in into]
        self.condition = [nn.Dense(2 * double, use_bias=False) for _ in into]
        self.head = _Head(self.x_shape, self.parameters, 2 * self.channels)

    def __call__(self, x: Array, features: Array | None = None) -> Array:
        features = _or_none(features)
        v = h = _inputs(x, self.x_shape)
        for i in range(self.layers):
            of_v, of_h = self._conditions(i, features)
            past_v, past_h = (v[:, :-1], h[:, :, :-1]) if i == 0 else (v, h)
            reach = self._reach(i)
            before = self.above[i](past_v, ((reach, 0), (reach, reach))) + of_v
            v = _gate(before)
            h = self._along(i, self.along[i](past_h, ((0, 0), (reach, 0))), before, of_h, h)
        return self.head(h)

    def draw(self, key: Array, count: int, features: Array | None, draw: Draw) -> Array:
        """Images [count, *x], pixel by pixel; `draw` makes a pixel of its output.

        The stack of the rows above is computed row by row, that along a row pixel by pixel; what later ones need of it is kept.
        """
        (height, width), into, features = self.x_shape[:2], _inputs_of(self), _or_none(features)
        above = [jnp.zeros((count, self._reach(i), width, into[i])) for i in range(self.layers)]
        empty = [jnp.zeros((count, 1, self._reach(i), into[i])) for i in range(self.layers)]

        def row(above: list, given: tuple) -> tuple[list, Array]:
            key, features = given
            features = None if features is None else features[:, None]
            conditions = [self._conditions(i, features) for i in range(self.layers)]
            contexts, kept, v = [], [], None
            for i in range(self.layers):
                seen = above[i] if i == 0 else jnp.concatenate([above[i], v], axis=1)
                before = self.above[i](seen, ((0, 0), (self._reach(i),) * 2)) + conditions[i][0]
                v, context = _gate(before), (before, jnp.broadcast_to(conditions[i][1], before.shape))
                contexts.append(context)
                kept.append(seen[:, 1:])

            def pixel(left: list, given: tuple) -> tuple[list, Array]:
                key, contexts = given
                h, after = None, []
                for i, (before, of_h) in enumerate(contexts):
                    seen = left[i] if i == 0 else jnp.concatenate([left[i], h], axis=2)
                    h = self._along(i, self.along[i](seen, ((0, 0), (0, 0))), before[:, None], of_h[:, None], h)
                    after.append(seen[:, :, 1:])
                value = draw(key, self.head(h))
                after[0] = jnp.concatenate([after[0], _inputs(value, self.x_shape)], axis=2)
                return after, value

            by_pixel = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), contexts)
            _, values = jax.lax.scan(pixel, empty, (jax.random.split(key, width), by_pixel))
            values = jnp.moveaxis(values[:, :, :, 0], 0, 2)  # [B, 1, W, (C)]
            kept[0] = jnp.concatenate([kept[0], _inputs(values, self.x_shape)], axis=1)
            return kept, values[:, 0]

        by_row = None if features is None else jnp.moveaxis(features, 1, 0)
        _, rows = jax.lax.scan(row, above, (jax.random.split(key, height), by_row))
        return jnp.moveaxis(rows, 0, 1)

    def _reach(self, i: int) -> int:
        """Rows above, and columns to either side, that a layer sees of its input, next to its own where it sees that."""
        return self.kernel_size // 2 if i == 0 else 1

    def _conditions(self, i: int, features: Array | None) -> tuple:
        return (jnp.zeros(()), jnp.zeros(())) if features is None else jnp.split(self.condition[i](features), 2, axis=-1)

    def _along(self, i: int, of_row: Array, before: Array, of_h: Array, h: Array | None) -> Array:
        new = self.out[i](_gate(of_row + self.across[i](before) + of_h))
        return new if i == 0 else h + new


class RowLSTM(nn.Module):
    """Row LSTM: states go down from row to row, and see the three pixels above; along a row there are masked convolutions.

    Maps as `GatedPixelCNN`. A pixel sees a triangle of all the rows above it.
    """

    x_shape: Sequence[int]
    parameters: int = 1
    channels: int = 32
    layers: int = 2
    kernel_size: int = 3  # columns that a layer sees along its row, its own among them but in the first

    def setup(self):
        into = _inputs_of(self)
        self.along = [_Kernel((1, self.kernel_size, c, 4 * self.channels)) for c in into]
        self.down = [_Kernel((1, 3, self.channels, 4 * self.channels)) for _ in into]
        self.condition = [nn.Dense(4 * self.channels, use_bias=False) for _ in into]
        self.head = _Head(self.x_shape, self.parameters, 2 * self.channels)

    def __call__(self, x: Array, features: Array | None = None) -> Array:
        features = _or_none(features)
        h = _inputs(x, self.x_shape)
        for i in range(self.layers):
            past = h[:, :, :-1] if i == 0 else h
            of_row = self.along[i](past, ((0, 0), (self.kernel_size - (i > 0), 0)))
            of_row = of_row + (0.0 if features is None else self.condition[i](features))

            def row(state: tuple, of_row: Array, i: int = i) -> tuple[tuple, Array]:
                state = _recur(state, of_row + self._down(i, state[0]))
                return state, state[0]

            zero = jnp.zeros((len(x), of_row.shape[2], self.channels))
            self._down(i, zero)  # params come into being outside of the loop
            _, new = jax.lax.scan(row, (zero, zero), jnp.moveaxis(of_row, 1, 0))
            new = jnp.moveaxis(new, 0, 1)
            h = new if i == 0 else h + new
        return self.head(h)

    def draw(self, key: Array, count: int, features: Array | None, draw: Draw) -> Array:
        """As `GatedPixelCNN.draw`."""
        (height, width), into, features = self.x_shape[:2], _inputs_of(self), _or_none(features)
        zero = jnp.zeros((count, width, self.channels))
        empty = [jnp.zeros((count, 1, self.kernel_size - (i > 0), into[i])) for i in range(self.layers)]

        def row(states: list, given: tuple) -> tuple[list, Array]:
            key, features = given
            contexts = []
            for i in range(self.layers):
                of_z = 0.0 if features is None else self.condition[i](features)
                contexts.append((states[i][1], self._down(i, states[i][0]) + of_z))

            def pixel(left: list, given: tuple) -> tuple[list, tuple]:
                key, contexts = given
                h, after, states = None, [], []
                for i, (c, of_rest) in enumerate(contexts):
                    seen = left[i] if i == 0 else jnp.concatenate([left[i], h], axis=2)
                    gates = self.along[i](seen, ((0, 0), (0, 0)))[:, 0, 0] + of_rest
                    state = _recur((None, c), gates)
                    new = state[0][:, None, None]
                    h = new if i == 0 else h + new
                    after.append(seen[:, :, 1:])
                    states.append(state)
                value = draw(key, self.head(h))
                after[0] = jnp.concatenate([after[0], _inputs(value, self.x_shape)], axis=2)
                return after, (value, states)

            by_pixel = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), contexts)
            _, (values, states) = jax.lax.scan(pixel, empty, (jax.random.split(key, width), by_pixel))
            states = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), states)
            return states, jnp.moveaxis(values[:, :, 0, 0], 0, 1)

        by_row = None if features is None else jnp.moveaxis(features, 1, 0)
        start = [(zero, zero)] * self.layers
        _, rows = jax.lax.scan(row, start, (jax.random.split(key, height), by_row))
        return jnp.moveaxis(rows, 0, 1)

    def _down(self, i: int, h: Array) -> Array:
        return self.down[i](h[:, None], ((0, 0), (1, 1)))[:, 0]


class _Head(nn.Module):
    """What a pixel's distribution is made of, from its features [B, H, W, F]: [B, H, W, (C,) parameters]; it starts at 0."""

    x_shape: Sequence[int]
    parameters: int
    width: int

    @nn.compact
    def __call__(self, h: Array) -> Array:
        h = nn.relu(nn.Dense(self.width)(nn.relu(h)))
        out = nn.Dense(_colours(self.x_shape) * self.parameters, kernel_init=nn.initializers.zeros)(h)
        return out.reshape(*h.shape[:3], *self.x_shape[2:], self.parameters)


class _Kernel(nn.Module):
    """A convolution of given padding, with a bias."""

    shape: Sequence[int]

    @nn.compact
    def __call__(self, x: Array, pads: Sequence) -> Array:
        kernel = self.param("kernel", nn.initializers.he_normal(), tuple(self.shape))
        return conv(x, kernel, pads=pads) + self.param("bias", nn.initializers.zeros, (self.shape[-1],))


def _or_none(features: Array | None) -> Array | None:
    """Features of no numbers say nothing."""
    return None if features is None or not features.shape[-1] else features


def _colours(x_shape: Sequence[int]) -> int:
    return x_shape[2] if len(x_shape) == 3 else 1


def _inputs_of(network: nn.Module) -> list[int]:
    """Channels that each layer reads."""
    return [_colours(network.x_shape) + 1, *[network.channels] * (network.layers - 1)]


def _inputs(x: Array, x_shape: Sequence[int]) -> Array:
    """In [-1, 1], and 1 next to it, by which pixels differ from what lies outside the image: [B, H, W, C + 1]."""
    x = 2.0 * (x if len(x_shape) == 3 else x[..., None]) - 1.0
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def _gate(a: Array) -> Array:
    signal, gate = jnp.split(a, 2, axis=-1)
    return jnp.tanh(signal) * nn.sigmoid(gate)


def _recur(state: tuple, gates: Array) -> tuple[Array, Array]:
    """The LSTM's next hidden state and cell."""
    take, forget, show, new = jnp.split(gates, 4, axis=-1)
    cell = nn.sigmoid(forget + 1.0) * state[1] + nn.sigmoid(take) * jnp.tanh(new)
    return nn.sigmoid(show) * jnp.tanh(cell), cell
