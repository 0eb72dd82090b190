"""The contestants of benchmarks/training.py that run on JAX: NumPyro, and the matrix products through XLA."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from contestants import FLOORS, LR, MIN_SCALE, NUMPYRO, PIXELS, Size, binary_images
from contestants_deep import Deep
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from turns import LeftOut, Turn

Layer = tuple[jax.Array, jax.Array]
VARIANTS = 8  # of the inputs of the products, so that none is the same from step to step


def layer(key: jax.Array, fan_in: int, fan_out: int) -> Layer:
    """Glorot-uniform weights and zero bias."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(key, (fan_in, fan_out), minval=-limit, maxval=limit), jnp.zeros(fan_out)


def network(key: jax.Array, layers: list[tuple[int, int]], out: int, gated: bool) -> list[Any]:
    """Parameters of hidden layers, pairs of them where gated, and of the linear one after them."""
    hidden: list[Any] = []
    for fan_in, fan_out in layers:
        key, a, b = jax.random.split(key, 3)
        hidden.append((layer(a, fan_in, fan_out), layer(b, fan_in, fan_out)) if gated else layer(a, fan_in, fan_out))
    return [*hidden, layer(key, layers[-1][1], out)]


def apply(parameters: list[Any], x: jax.Array, gated: bool) -> jax.Array:
    """The network's value."""

    def linear(of: Layer, h: jax.Array) -> jax.Array:
        return h @ of[0] + of[1]

    for part in parameters[:-1]:
        x = linear(part[0], x) * jax.nn.sigmoid(linear(part[1], x)) if gated else jnp.tanh(linear(part, x))
    return linear(parameters[-1], x)


def on(device: str) -> None:
    """Compute there, in whole float32, or not at all."""
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the second, without a word, where its plugin is not installed
        raise LeftOut(f"JAX has no {device} here {error}".strip()) from error
    if backend != {"cpu": "cpu", "cuda": "gpu"}[device]:
        raise LeftOut(f"JAX computes on {backend} here, not on {device}")
    if device == "cuda":
        jax.config.update("jax_default_matmul_precision", "highest")


def numpyro_svi(size: Size, device: str, rows: int) -> Callable[[Turn], Any]:
    """``SVI.update`` in ``lax.scan`` over the minibatches of an epoch, under one ``jit``; ``RenyiELBO`` is its IWAE."""
    on(device)
    numpyro.enable_validation(False)
    encoder_key, decoder_key, key = jax.random.split(jax.random.PRNGKey(0), 3)
    decoder = network(decoder_key, size.decoder, PIXELS, size.gated)
    encoder = network(encoder_key, size.encoder, 2 * size.latents, size.gated)
    encoder[-1] = (encoder[-1][0], encoder[-1][1].at[size.latents :].set(math.log(math.expm1(1.0))))

    def model(x: jax.Array) -> None:
        parameters = numpyro.param("decoder", decoder)
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(size.latents), 1.0).to_event(1))
            logits = apply(parameters, z, size.gated)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        parameters = numpyro.param("encoder", encoder)
        with numpyro.plate("data", x.shape[0]):
            loc, raw = jnp.split(apply(parameters, x, size.gated), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw) + MIN_SCALE).to_event(1))

    elbo = RenyiELBO(alpha=0, num_particles=size.particles) if size.particles > 1 else Trace_ELBO()
    return scanned(SVI(model, guide, numpyro.optim.Adam(LR), elbo), key, size.batch, rows)


def scanned(svi: SVI, key: jax.Array, batch_size: int, rows: int) -> Callable[[Turn], Any]:
    """Epochs of ``SVI.update`` in ``lax.scan`` under one ``jit``."""
    data = jnp.asarray(binary_images(rows))
    state = svi.init(key, data[:batch_size])
    steps = rows // batch_size

    @jax.jit
    def epoch(state: Any, data: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        order = jax.random.permutation(key, rows)[: steps * batch_size].reshape(steps, batch_size)
        state, losses = jax.lax.scan(lambda s, batch: svi.update(s, data[batch]), state, order)
        return state, losses.sum()

    def train(turn: Turn) -> None:
        nonlocal state, key
        while True:
            key, now = jax.random.split(key)
            state, total = epoch(state, data, now)
            if turn(float(total) / (steps * batch_size)):
                return

    return train


def xla_floor(size: Size, device: str, rows: int) -> Callable[[Turn], Any]:
    """The matrix products of every layer and of both its gradients, in ``lax.scan`` over the steps of an epoch."""
    on(device)
    shapes = size.products()
    keys = jax.random.split(jax.random.PRNGKey(0), 3 * len(shapes)).reshape(len(shapes), 3, -1)
    weights = [jax.random.normal(k[0], (i, o)) for k, (_, i, o, _) in zip(keys, shapes, strict=True)]
    inputs = [
        (jax.random.normal(k[1], (VARIANTS, n, i)), jax.random.normal(k[2], (VARIANTS, n, o)))
        for k, (n, i, o, _) in zip(keys, shapes, strict=True)
    ]

    def products(weights: list[jax.Array], inputs: list[Any], at: jax.Array) -> list[Any]:
        out = []
        for (x, dy), w, (_, _, _, flows) in zip(inputs, weights, shapes, strict=True):
            x, dy = x[at], dy[at]
            out.append((x @ w, x.T @ dy, dy @ w.T if flows else None))
        return out

    @jax.jit
    def epoch(weights: list[jax.Array], inputs: list[Any]) -> list[Any]:
        def step(_: list[Any], at: jax.Array) -> tuple[list[Any], None]:
            return products(weights, inputs, at), None

        first = products(weights, inputs, jnp.zeros((), int))
        return jax.lax.scan(step, first, jnp.arange(1, rows // size.batch) % VARIANTS)[0]

    def train(turn: Turn) -> None:
        while True:
            jax.block_until_ready(epoch(weights, inputs))
            if turn(None):
                return

    return train


def numpyro_deep(size: Deep, device: str, rows: int) -> Callable[[Turn], Any]:
    """The same of a model of several layers, or of convolutions (contestants_deep.py)."""
    on(device)
    numpyro.enable_validation(False)
    up_key, down_key, key = jax.random.split(jax.random.PRNGKey(0), 3)
    up, down, apply_up, apply_down = (dense_parts if size.hidden else convolutional_parts)(size, up_key, down_key)

    def normal(parameters: jax.Array) -> Any:
        loc, raw = jnp.split(parameters, 2, -1)
        return dist.Normal(loc, jax.nn.softplus(raw) + MIN_SCALE).to_event(1)

    def model(x: jax.Array) -> None:
        parameters = numpyro.param("down", down)
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample(f"z{len(down)}", dist.Normal(jnp.zeros(size.layers[-1]), 1.0).to_event(1))
            for i in range(len(down) - 1, 0, -1):
                z = numpyro.sample(f"z{i}", normal(apply_down(parameters[i], z)))
            numpyro.sample("x", dist.Bernoulli(logits=apply_down(parameters[0], z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        parameters = numpyro.param("up", up)
        with numpyro.plate("data", x.shape[0]):
            below = x
            for i, of in enumerate(parameters):
                below = numpyro.sample(f"z{i + 1}", normal(apply_up(of, below)))

    return scanned(SVI(model, guide, numpyro.optim.Adam(LR), Trace_ELBO()), key, size.batch, rows)


def dense_parts(size: Deep, up_key: jax.Array, down_key: jax.Array) -> tuple[Any, Any, Any, Any]:
    """Parameters of the networks upwards and downwards, and what applies them."""
    up, down = [], []
    for i, hidden in enumerate(size.hidden):
        below, latents = ([PIXELS, *size.layers][i], size.layers[i])
        widths, outs = [below, *hidden], [latents, *hidden[::-1]]
        a, b = jax.random.fold_in(up_key, i), jax.random.fold_in(down_key, i)
        up.append(scales_of_one(network(a, list(pairwise(widths)), 2 * latents, False)))
        of = network(b, list(pairwise(outs)), 2 * below if i else below, False)
        down.append(scales_of_one(of) if i else of)
    return up, down, lambda p, x: apply(p, x, False), lambda p, x: apply(p, x, False)


def scales_of_one(parameters: list[Any]) -> list[Any]:
    """A network whose outputs are locations and raw scales, which begin at 1."""
    weight, bias = parameters[-1]
    return [*parameters[:-1], (weight, bias.at[len(bias) // 2 :].set(math.log(math.expm1(1.0))))]


def convolutional_parts(size: Deep, up_key: jax.Array, down_key: jax.Array) -> tuple[Any, Any, Any, Any]:
    """Likewise of the convolutional pair; kernels ``(out, in, 3, 3)``, begun uniformly as PyTorch's."""
    (latents,) = size.layers
    layout = ("NCHW", "OIHW", "NCHW")

    def kernel(key: jax.Array, fan_in: int, fan_out: int, limit: float | None = None) -> Layer:
        limit = 1 / math.sqrt(9 * fan_in) if limit is None else limit
        a, b = jax.random.split(key)
        weight = jax.random.uniform(a, (fan_out, fan_in, 3, 3), minval=-limit, maxval=limit)
        return weight, jax.random.uniform(b, (fan_out,), minval=-limit, maxval=limit)

    def convolved(of: Layer, x: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
        pad = [(1, 1)] * 2 if dilation == 1 else [(1, 2)] * 2  # a transposed convolution of stride 2 doubles the size
        found = jax.lax.conv_general_dilated(
            x, of[0], (stride, stride), pad, lhs_dilation=(dilation, dilation), dimension_numbers=layout
        )
        return found + of[1][:, None, None]

    a, b = jax.random.split(up_key, 6), jax.random.split(down_key, 3)
    channels = [(1, 32), (32, 64), (64, 64), (64, 64)]
    up = [kernel(k, *c) for k, c in zip(a, channels, strict=False)]
    up += [layer(a[4], 64 * 14 * 14, 32), layer(a[5], 32, 2 * latents)]
    # PyTorch takes the fan-in of a transposed kernel to be its outputs'
    down = [layer(b[0], latents, 64 * 14 * 14), kernel(b[1], 64, 32, 1 / math.sqrt(9 * 32))]
    head, _ = kernel(b[2], 32, 1, math.sqrt(6 / (9 * 33)))
    down.append((head, jnp.zeros(1)))

    def apply_up(of: list[Layer], x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 1, 28, 28)
        for part, stride in zip(of[:4], (1, 2, 1, 1), strict=True):
            x = jax.nn.relu(convolved(part, x, stride))
        x = jax.nn.relu(x.reshape(len(x), -1) @ of[4][0] + of[4][1])
        return x @ of[5][0] + of[5][1]

    def apply_down(of: list[Layer], z: jax.Array) -> jax.Array:
        x = jax.nn.relu(z @ of[0][0] + of[0][1]).reshape(-1, 64, 14, 14)
        x = jax.nn.relu(convolved(of[1], x, dilation=2))
        return convolved(of[2], x).reshape(len(x), -1)

    return [scales_of_one(up)], [down], apply_up, apply_down


DEEP: dict[str, Callable[..., Callable[[Turn], Any]]] = {NUMPYRO: numpyro_deep}
CONTESTANTS: dict[str, Callable[..., Callable[[Turn], Any]]] = {NUMPYRO: numpyro_svi, FLOORS[1]: xla_floor}
