"""What a training is refused for before its first step, and stopped for after it, each with what to do about it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

from avb_jax.data.dataset import Dataset
from avb_jax.data.iterator import Batches
from avb_jax.distributions import base_distribution
from avb_jax.method import Method, prior_at
from avb_jax.streams import stream
from avb_jax.training import blocks, memory
from avb_jax.training.programs import Programs
from avb_jax.transforms import of_seed
from avb_jax.types import Array, Diverged, State, UserError

NATS = 1e5  # per number of an example, beyond which a loss says nothing
CHECKED = 10_000  # examples whose values are looked at before a training


def check_arguments(data, steps, batch_size, seed, num_seeds, log_every, checkpoint_every) -> int:
    """Refuses what is no count or out of range, and an iterator of batches of another size; returns the batch size."""
    if isinstance(data, Batches):
        if batch_size not in (None, data.shape[0]):
            raise UserError(f"batch_size={batch_size}: the iterator gives batches of {data.shape[0]}; leave it out")
        batch_size = data.shape[0]
    elif batch_size is None:
        raise UserError("batch_size=None: give the number of examples per step")
    counts = {"batch_size": batch_size, "num_seeds": num_seeds, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for field, value in {**counts, "steps": steps, "seed": seed}.items():
        if value is None:
            continue
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise UserError(f"{field}={value!r}: must be a whole number")
        if value < (field in counts):
            raise UserError(f"{field}={value}: must be at least {int(field in counts)}")
    if seed >= 2**32:
        raise UserError(f"seed={seed}: must be below 2**32, since JAX's keys take no more of it")
    return batch_size


def check_values(
    method: Method, data: Dataset | Batches, state: State, seed: int, num_seeds: int | None, programs: Programs
) -> None:
    """Refuses data that the likelihood gives no probability to; up to `CHECKED` examples, evenly spaced, are looked at.

    A Bernoulli distribution that does not validate its arguments, such as `distributions.bernoulli`, takes all of [0, 1].

    Raises:
      UserError: some values are outside the support of p(x|z).
    """
    if method.decode is None or (method.log_joint is None and method.log_likelihood is None):
        return
    key, name = stream(jax.random.key(seed), "values"), getattr(data, "name", "data")

    def one_code(state: State, key: Array) -> dist.Distribution:
        state = state if num_seeds is None else of_seed(state, 0)
        prior = prior_at(method, state)
        return method.decode(state, jnp.zeros((1, 0)) if prior is None else prior.sample(jax.random.fold_in(key, 0), (1,)))

    def is_bernoulli(of_x: dist.Distribution) -> bool:
        return isinstance(base_distribution(of_x), dist.BernoulliLogits | dist.BernoulliProbs)

    def look(state: State, key: Array, chunk: int, stored: Array) -> tuple[Array, Array, Array]:
        """The least and the greatest value, and whether all are possible."""
        x, of_x = data.prepare(jax.random.fold_in(key, chunk), stored), one_code(state, key)
        within = jnp.all(of_x.support(x))
        if is_bernoulli(of_x):
            # The log-probability of an intensity is a cross-entropy, or -inf where arguments are validated.
            within |= jnp.all((x >= 0) & (x <= 1)) & jnp.all(jnp.isfinite(of_x.log_prob(x)))
        return x.min(), x.max(), within

    kept = programs.keep("check of values", look, jax.devices()[:1], num_seeds)
    stored = data.first if isinstance(data, Batches) else data.train
    chosen = np.linspace(0, len(stored) - 1, min(len(stored), CHECKED)).astype(int)
    low, high, fits = np.inf, -np.inf, True
    for i, chunk in enumerate(np.array_split(chosen, -(-len(chosen) // 500)), start=1):
        least, greatest, possible = kept(state, key, i, jnp.asarray(stored[chunk]))
        low, high, fits = min(low, float(least)), max(high, float(greatest)), fits and bool(possible)
    if not fits:
        remedy, abstract = "scale them, or choose another likelihood", jax.eval_shape(one_code, state, key)
        found = base_distribution(abstract)
        if is_bernoulli(abstract):
            remedy = "scale them to [0, 1] and use distributions.bernoulli, or make them 0 and 1"
        elif abstract.support.is_discrete:
            remedy = "give whole numbers that it has, not as uint8, which is scaled to [0, 1]; or choose another likelihood"
        elif getattr(found.support, "upper_bound", None) is not None:
            remedy = "scale them to what it has, such as [0, 1], or choose another likelihood"
        raise UserError(
            f"{name}: x has values from {low:g} to {high:g}, and the likelihood {type(found).__name__.lstrip('_')} is of "
            f"{found.support}: {remedy}"
        )


def check_state(state: State, expected: State, num_seeds: int | None) -> None:
    """Refuses a State that is not the method's own, by the first array that differs from the abstract State `expected`.

    Raises:
      UserError: it has other arrays, or shapes or types of them, than `method.init` makes.
    """

    def arrays(tree: State) -> dict:
        return {jax.tree_util.keystr(at): (leaf.shape, leaf.dtype) for at, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    there, own = arrays(state), arrays(expected)
    for name in sorted({*there, *own}):
        if there.get(name) != own.get(name):
            given, wanted = (" ".join(map(str, found.get(name, ("no such array",)))) for found in (there, own))
            raise UserError(
                f"state: {name} is {given}, and the method has {wanted}; give a State of this method and num_seeds={num_seeds}"
            )


def check_memory(compiled: blocks.Blocks, keys: Array, state: State, data: Dataset | Batches, length, batch_size, num_seeds):
    """Refuses, before anything is compiled, steps that cannot fit into the devices' memory.

    Raises:
      UserError: they need more than there is.
    """
    seeds = () if num_seeds is None else (num_seeds,)
    if isinstance(data, Batches):
        batches = jax.ShapeDtypeStruct((*seeds, length, *data.shape), data.first.dtype)
    else:
        batches = jax.ShapeDtypeStruct((*seeds, length, batch_size), np.int32)
    there = memory.available(compiled.devices)
    least = compiled.needed(keys, state, batches)
    if there is not None and least > there:
        raise UserError(
            f"batch_size={batch_size}: the steps need {least / 2**30:,.1f} GiB at least, and there are {there / 2**30:,.1f}; "
            "use a smaller batch, and accumulate gradients (optimizer.accumulate; optax.MultiSteps), or smaller networks, or "
            "compute activations again (rematerialize; networks.rematerialized)"
        )


def check_finite(name: str, step: int, numbers: dict[str, np.ndarray], finite: dict[str, Array]) -> None:
    """Stops a run with a loss that is not finite, or one of whose players is not after the last update.

    Raises:
      Diverged: some mean, or something that belongs to a player, is not finite.
    """
    sound = {field: np.isfinite(values) for field, values in numbers.items()}
    sound |= {f"something of the {player}'s params or optimiser": np.asarray(values) for player, values in finite.items()}
    for field, values in sound.items():
        if not values.all():
            seeds = ", ".join(str(seed) for seed in np.flatnonzero(~values))
            which = f" (seed number {seeds})" if np.ndim(values) else ""
            raise Diverged(
                f"{name}: {field} is not finite by step {step}{which}; lower the learning rates or clip the gradients "
                "(optimizer.clip), and take a new workdir, with an earlier State if you like (state; restore_from in configs)"
            )


def beyond_reason(name: str, step: int, numbers: dict[str, np.ndarray], data: Dataset | Batches) -> str:
    """A line about nats that are finite and mean nothing, more than `NATS` for each number of an example; '' without any.

    Where x has no numbers there is no such measure: densities may be steep where their fit starts.
    """
    size = math.prod(data.x_shape if isinstance(data, Dataset) else data.shape[1:]) or math.inf
    for field in ("elbo", "reconstruction", "kl"):
        if field in numbers and (worst := np.abs(numbers[field]).max()) > NATS * size:
            return (
                f"warning: {name}: {field} is of the order of {worst:.0e} nats by step {step}: the training has run away, or "
                "the likelihood does not fit the data; lower the rates, clip the gradients, or scale the data"
            )
    return ""
