"""The contestants of benchmarks/training.py that run on JAX: NumPyro, and the matrix products through XLA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from contestants import FLOORS, LR, MIN_SCALE, NUMPYRO, PIXELS, Size, binary_images
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
    svi = SVI(model, guide, numpyro.optim.Adam(LR), elbo)
    data = jnp.asarray(binary_images(rows))
    state = svi.init(key, data[: size.batch])
    steps = rows // size.batch

    @jax.jit
    def epoch(state: Any, data: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        order = jax.random.permutation(key, rows)[: steps * size.batch].reshape(steps, size.batch)
        state, losses = jax.lax.scan(lambda s, batch: svi.update(s, data[batch]), state, order)
        return state, losses.sum()

    def train(turn: Turn) -> None:
        nonlocal state, key
        while True:
            key, now = jax.random.split(key)
            state, total = epoch(state, data, now)
            if turn(float(total) / (steps * size.batch)):
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


CONTESTANTS: dict[str, Callable[..., Callable[[Turn], Any]]] = {NUMPYRO: numpyro_svi, FLOORS[1]: xla_floor}
