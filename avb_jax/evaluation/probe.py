"""What codes know of the classes: a linear classifier on them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avb_jax.evaluation.encoding import codes
from avb_jax.evaluation.estimator import Estimator, Number
from avb_jax.settings import check_counts
from avb_jax.streams import stream
from avb_jax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class LinearProbe(Estimator):
    """The accuracy, on held-out examples, of a linear classifier of codes z ~ q(z|x), trained on codes of training examples.

    It is a multinomial logistic regression on standardised codes, with a little weight decay.

    Attributes:
      examples: of training, from the first.
      steps: of Adam, on all of them at once.
      decay: half the weight of the squared weights.

    Raises:
      UserError: a setting out of range; where it runs, data without labels.
    """

    examples: int = 5000
    steps: int = 500
    decay: float = 1e-4

    name: ClassVar[str] = "linear_probe"
    requires: ClassVar[tuple[str, ...]] = ("encode",)

    def __post_init__(self):
        check_counts(examples=self.examples, steps=self.steps, chunk=self.chunk, images=self.images)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        data, key = subject.data, stream(subject.key, self.name)
        if data.train_labels is None or data.test_labels is None:
            raise UserError(f"LinearProbe: {data.name} has no labels; give a Dataset with train_labels and test_labels")
        train, test = (
            codes(subject.method, subject.state, getattr(data, split)[:count], stream(key, split), subject.binarize)["z"][:, 0]
            for split, count in (("train", self.examples), ("test", self.images))
        )
        mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
        labels, truth = (np.asarray(of[: len(z)], np.int32) for of, z in ((data.train_labels, train), (data.test_labels, test)))
        weights, bias = self._fit(jnp.asarray((train - mean) / std), jnp.asarray(labels), int(labels.max()) + 1)
        right = np.argmax((test - mean) / std @ np.asarray(weights) + np.asarray(bias), axis=1) == truth
        accuracy = float(right.mean())
        error = float(np.sqrt(accuracy * (1.0 - accuracy) / len(right)))
        return {("accuracy", self.name): Number(accuracy, len(right), error, None, "", right.astype(np.float32))}

    def _fit(self, z: Array, labels: Array, classes: int) -> tuple[Array, Array]:
        optimizer = optax.adam(optax.cosine_decay_schedule(0.1, self.steps))
        params = jnp.zeros((z.shape[1], classes)), jnp.zeros(classes)

        def loss(params: tuple[Array, Array]) -> Array:
            weights, bias = params
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(z @ weights + bias, labels)
            return cross_entropy.mean() + self.decay * jnp.sum(jnp.square(weights))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=self.steps)[0][0])()
