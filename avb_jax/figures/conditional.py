"""Figures of conditional draws (`avb_jax.conditional`): digits of a class, and images of which the left half is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from avb_jax import conditional
from avb_jax.data.dataset import Dataset, to_pixels
from avb_jax.figures.images import Grid
from avb_jax.method import Method
from avb_jax.models import images_of
from avb_jax.networks import MLP
from avb_jax.streams import stream
from avb_jax.types import Array, State, UserError

DRAWS = 8  # of each class, and of each half
BY_ENCODER = 4  # of each half, by the encoder
ROWS = 8  # images whose half is known
BATCH, STEPS = 128, 1000  # of the classifier's training


def classifier(key: Array, data: Dataset, steps: int = STEPS):
    """A small classifier of the training examples, x [B, *x] -> log probabilities [B, classes].

    It sees intensities, as the means of p(x|z) are, where the methods see binary images drawn from them.

    Raises:
      UserError: the data set has no labels.
    """
    if data.train_labels is None:
        raise UserError(f"figure='conditional': {data.name} has no labels to train a classifier on; take digits or mnist")
    classes, rank = int(data.train_labels.max()) + 1, len(data.x_shape)
    network = nn.Sequential([MLP((128, 128), nn.relu, rank), nn.Dense(classes), nn.log_softmax])
    optimizer = optax.adam(1e-3)
    stored, labels = jnp.asarray(data.train), jnp.asarray(data.train_labels)

    @jax.jit
    def train(key: Array):
        params = network.init(stream(key, "params"), jnp.zeros((1, *data.x_shape)))

        def loss(params, x, label):
            return -jnp.mean(jnp.take_along_axis(network.apply(params, x), label[:, None], axis=1))

        def step(carry, key):
            params, opt_state = carry
            which = jax.random.randint(stream(key, "batch"), (BATCH,), 0, len(stored))
            x = to_pixels(key, stored[which], "none" if data.binarize == "dynamic" else data.binarize)
            updates, opt_state = optimizer.update(jax.grad(loss)(params, x, labels[which]), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(stream(key, "steps"), steps))[0][0]

    params = train(key)
    return lambda x: network.apply(params, x)


def of_classes(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """A row for each class: mean images at codes from p(z | class), the class as a small classifier sees it."""
    log_probabilities = classifier(stream(key, "classifier"), data)

    @jax.jit  # once for all classes
    def row(key: Array, state: State, label: Array) -> Array:
        condition = conditional.of_class(log_probabilities, label)
        return method.decode(state, conditional.sample(key, method, state, condition, count=DRAWS).z).mean

    labels = range(int(data.train_labels.max()) + 1)
    drawn = np.concatenate([row(jax.random.fold_in(key, label), state, label) for label in labels])
    return Grid(drawn, DRAWS, "draws given each class, as a small classifier sees it", [str(label) for label in labels])


def inpainting(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Rows of a test image, its left half, draws from the posterior of the whole given that half, and what the encoder says.

    It is asked with the half (`conditional.by_encoder`), then for a reconstruction of the whole; without an encoder these
    columns are missing.
    """
    x = to_pixels(stream(key, "pixels"), jnp.asarray(data.test[:ROWS]), data.binarize)
    mask = (jnp.arange(x.shape[2]) < x.shape[2] // 2).astype(x.dtype)
    mask = jnp.broadcast_to(mask.reshape(1, -1, *[1] * (x.ndim - 3)), x.shape[1:])

    @jax.jit  # once for all images
    def completed(key: Array, state: State, x: Array) -> Array:
        z = conditional.sample(key, method, state, conditional.known(x, mask), count=DRAWS).z
        if method.encode is not None:
            z = jnp.concatenate([z, conditional.by_encoder(stream(key, "encoder"), method, state, x, mask, count=BY_ENCODER)])
        return jnp.where(mask > 0, x, method.decode(state, z).mean)

    draws = jnp.stack([completed(jax.random.fold_in(key, i), state, one) for i, one in enumerate(x)])
    columns, heads = [x[:, None], jnp.where(mask > 0, x, 0.5)[:, None], draws], ["data", "half", "drawn", *[""] * (DRAWS - 1)]
    if method.encode is not None:
        heads += ["encoder", *[""] * (BY_ENCODER - 1)]
        z = method.encode(stream(key, "encode"), state, x).z
        columns.append(images_of(stream(key, "images"), method.decode(state, z))[:, None])
        heads.append("whole")
    rows = jnp.concatenate(columns, axis=1)
    shown = np.asarray(rows).reshape(-1, *x.shape[1:])
    return Grid(shown, rows.shape[1], "test images completed from a half", (), heads)
