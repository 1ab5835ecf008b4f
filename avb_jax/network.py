"""A network as the methods use it: a pair of pure functions, whatever library it was written in.

Flax Linen modules are taken as they are; `from_nnx` and `from_equinox` adapt those of Flax NNX and Equinox, neither of which is
imported here.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax.types import Array, PyTree, UserError


class Network(NamedTuple):
    """One player's network.

    The encoder's inputs are (x [B, ...], noise [B, N]), the decoder's (z [B, Z],), the adversary's (x [B, ...], z [B, Z]).
    With `shares_x` an encoder takes noise [S, B, N], and an adversary z [S, B, Z], next to x [B, ...], so that what it computes
    of x it computes once.
    """

    init: Callable[..., dict]  # (key, *inputs) -> variables {'params': ..., and further collections}
    apply: Callable[..., tuple[Any, dict]]  # (variables, *inputs, train=) -> (output, the collections after it)
    shares_x: bool = False
    name: str = "network"  # for messages
    semi_implicit: bool = False  # an encoder whose `Posterior` has conditional moments
    bounds_log_q: bool = False  # an encoder whose `Posterior` has a log_q that is on average too large
    pointwise: bool = False  # an adversary whose T at one z does not depend on any other z of the batch


def as_network(network: Any) -> Network | None:
    """The network of a player; None stays None.

    Raises:
      UserError: neither a `Network` nor a Linen module.
    """
    if network is None or isinstance(network, Network):
        return network
    if isinstance(network, nn.Module):
        return from_linen(network)
    raise UserError(
        f"network={type(network).__name__}: give a flax.linen module, a Network(init, apply), or from_nnx or from_equinox of a "
        "function that makes a module"
    )


def from_linen(module: nn.Module) -> Network:
    """A Linen module; one whose `__call__` takes `train` is called with it.

    `shares_x`, `semi_implicit`, `bounds_log_q` and `pointwise` are its attributes, where it has them.
    Collections other than params, such as batch statistics, change in training alone.
    """
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def apply(variables: dict, *inputs: Array, train: bool) -> tuple[Any, dict]:
        options = {"train": train} if takes_train else {}
        collections = {name: value for name, value in variables.items() if name != "params"}
        if not (train and collections):
            return module.apply(variables, *inputs, **options), collections
        return module.apply(variables, *inputs, mutable=list(collections), **options)

    def init(key: Array, *inputs: Array) -> dict:
        return dict(module.init(key, *inputs, **({"train": False} if takes_train else {})))

    flags = {name: getattr(module, name, False) for name in ("shares_x", "semi_implicit", "bounds_log_q", "pointwise")}
    return Network(init, apply, name=type(module).__name__, **flags)


def from_nnx(make: Callable, *, shares_x: bool = False) -> Network:
    """A Flax NNX module.

    Its params (`nnx.Param`) are params; every other variable (batch statistics, counts of random numbers) is a collection and
    changes in training alone, for which the module is put into its training mode.

    Args:
      make: rngs -> the module.
      shares_x: see `Network`.

    Example::

        class Decoder(nnx.Module):
            def __init__(self, rngs):
                self.layer = nnx.Linear(2, 16, rngs=rngs)

            def __call__(self, z):
                return self.layer(z).reshape(-1, 4, 4, 1)

        decoder = avb_jax.networks.from_nnx(lambda rngs: Decoder(rngs))
    """
    from flax import nnx

    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, *_ = nnx.split(abstract, nnx.Param, ...)

    def init(key: Array, *inputs: Array) -> dict:
        del inputs
        _, params, others = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        return {"params": params, "others": others}

    def apply(variables: dict, *inputs: Array, train: bool) -> tuple[Any, dict]:
        module = nnx.merge(graph, variables["params"], variables["others"], copy=True)  # the caller's stay as they are
        if train:
            module.train()
        else:
            module.eval()
        output = module(*inputs)
        if not train:
            return output, {"others": variables["others"]}
        return output, {"others": nnx.split(module, nnx.Param, ...)[2]}

    return Network(init, apply, shares_x, type(abstract).__name__)


def from_equinox(make: Callable, *, shares_x: bool = False) -> Network:
    """An Equinox module that maps one example, as Equinox's layers do; it is vmapped over the batch.

    Its floating-point arrays are params; its other arrays are a collection that never changes.

    Args:
      make: key -> the module.
      shares_x: see `Network`; the module then maps x of one example and its noise or z [S, ...].

    Raises:
      UserError: a module with state of its own (`eqx.nn.StateIndex`), as batch normalisation has.

    Example::

        class Encoder(eqx.Module):
            layer: eqx.nn.Linear

            def __init__(self, key):
                self.layer = eqx.nn.Linear(16 + 4, 2, key=key)

            def __call__(self, x, noise):
                return self.layer(jnp.concatenate([x.ravel(), noise]))

        encoder = avb_jax.networks.from_equinox(Encoder)
    """
    import equinox as eqx

    # What is no array (functions, sizes) is the same for every key.
    abstract = eqx.filter_eval_shape(make, jax.random.key(0))
    if any(map(_is_state, jax.tree.leaves(abstract, is_leaf=_is_state))):
        raise UserError(
            f"network={type(abstract).__name__}: has state of its own (eqx.nn.StateIndex), which is not carried; use a layer "
            "without, such as LayerNorm for BatchNorm"
        )
    static = eqx.filter(abstract, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), inverse=True)

    def init(key: Array, *inputs: Array) -> dict:
        del inputs
        params, others = eqx.partition(eqx.filter(make(key), eqx.is_array), eqx.is_inexact_array)
        return {"params": params} | ({"others": others} if jax.tree.leaves(others) else {})

    def apply(variables: dict, *inputs: Array, train: bool) -> tuple[Any, dict]:
        del train
        collections = {name: value for name, value in variables.items() if name != "params"}
        module = eqx.combine(variables["params"], *collections.values(), static)
        axes = tuple(1 if shares_x and i == 1 else 0 for i in range(len(inputs)))
        return jax.vmap(module, in_axes=axes, out_axes=1 if shares_x else 0)(*inputs), collections

    return Network(init, apply, shares_x, type(abstract).__name__)


def _is_state(leaf: Any) -> bool:
    """Whether it is the place of a state in an Equinox module."""
    import equinox as eqx

    return isinstance(leaf, eqx.nn.StateIndex)


def in_bfloat16(network: Any) -> Network:
    """The network computing in bfloat16, with params, collections and outputs in float32.

    Params and inputs are cast on the way in, so that gradients, optimisers and losses stay in float32. (Flax's batch
    normalisation takes its statistics in float32 whatever it normalises.) For hardware that multiplies bfloat16: GPUs and TPUs.

    Raises:
      UserError: as `as_network`.
    """
    network = as_network(network)

    def apply(variables: dict, *inputs: Array, train: bool) -> tuple[Any, dict]:
        variables = {**variables, "params": _cast(variables.get("params", {}), jnp.bfloat16)}
        output, collections = network.apply(variables, *_cast(inputs, jnp.bfloat16), train=train)
        return _cast(output, jnp.float32), _cast(collections, jnp.float32)

    return network._replace(apply=apply)


def rematerialized(network: Any) -> Network:
    """The network computed twice: in the backward pass again, in the place of keeping its activations (`jax.checkpoint`).

    Raises:
      UserError: as `as_network`.
    """
    network = as_network(network)

    def apply(variables: dict, *inputs: Array, train: bool) -> tuple[Any, dict]:
        return jax.checkpoint(lambda *arguments: network.apply(*arguments, train=train))(variables, *inputs)

    return network._replace(apply=apply)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Its floating-point arrays as `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def call(network: Network, params: PyTree, collections: dict, *inputs: Array, train: bool) -> tuple[Any, dict]:
    """Runs a network; returns its output and its collections after it."""
    return network.apply({"params": params, **collections}, *inputs, train=train)
