"""Generators trained against a critic, and the likelihood that they can be given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae import registry
from pyro_vae.baselines.adam import Adam
from pyro_vae.baselines.base import Baseline, How, Progress
from pyro_vae.baselines.density import annealed_figures, fit_guide, require_mean
from pyro_vae.baselines.rbm import Count, Decay, Rate
from pyro_vae.data import Data
from pyro_vae.errors import UserError
from pyro_vae.networks.base import linear
from pyro_vae.programs.latents import sample
from pyro_vae.registry import register
from pyro_vae.spec import build, parse_block

BETAS = (0.0, 0.99)
WARNING = (
    "this is the likelihood of normal noise of one fitted scale around the generator's images, for which no generator was "
    "trained: it says how far test images lie from what can be generated, and little of how samples look (Theis et al. 2016, Wu "
    "et al. 2017)"
)


class Critic(nn.Module):
    """A network of the library and a line on its features."""

    def __init__(self, block: str, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        chosen = parse_block("encoders", block)
        self.network = registry.get("encoders", chosen.name)(event_shape, **chosen.options)
        self.line = linear(self.network.out_shape[0], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of being real ``(n,)``, and features ``(n, F)``, of x ``(n, *event_shape)`` in [0, 1]."""
        features = self.network(2 * x - 1)
        return self.line(features).squeeze(-1), features


@register("baselines", "gan")
class GAN(Baseline):
    """The non-saturating loss with a penalty on the critic's gradient at data, and the generator's weights averaged.

    Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661; the penalty (R1) and the average of Mescheder, Geiger & Nowozin 2018,
    https://arxiv.org/abs/1801.04406. Its likelihood is that of p(x | z) = N(G(z), s^2 I) by annealed importance sampling with s
    fitted, as Wu et al. 2017, https://arxiv.org/abs/1611.04273, have it: a number to be read with the warning that comes with it.

    Args:
        event_shape: of one image.
        latent_dim: of z ~ N(0, I).
        decoder: the generator, under a head with a sigmoid.
        critic: an encoder, under a line.
        encoder, posterior: of the guide with which s is fitted.
        epochs: passes of the two against each other.
        guide_epochs: passes of the fit of guide and s.
        batch_size, lr: of Adam, for both.
        r1: weight of the penalty.
        average: decay of the generator's averaged weights.
    """

    formula = "x = G(z), z ~ N(0, I); then p(x | z) = N(G(z), s^2 I)"
    data = "grey"
    reconstructs = False

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        latent_dim: Count = 10,
        decoder: str = "mlp:hidden=[512,512]",
        critic: str = "mlp:hidden=[512,256]",
        encoder: str = "mlp:hidden=[512,512]",
        posterior: str = "diagonal-normal",
        epochs: Count = 50,
        guide_epochs: Count = 20,
        batch_size: Count = 128,
        lr: Rate = 5e-4,
        r1: Decay = 1.0,
        average: Annotated[float, Field(ge=0, lt=1)] = 0.999,
    ) -> None:
        super().__init__(event_shape)
        self.latent_dim, self.epochs, self.guide_epochs, self.batch_size = latent_dim, epochs, guide_epochs, batch_size
        self.lr, self.r1, self.average = lr, r1, average
        likelihood = {"name": "normal", "scale": "shared", "mean": "sigmoid"}
        model = {"latent_dim": latent_dim, "prior": "standard-normal", "likelihood": likelihood, "decoder": decoder}
        self.program: Any = build(model, {"posterior": posterior, "encoder": encoder}, event_shape)
        self.generator = nn.ModuleList([self.program.decoder, self.program.likelihood])
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.critic = Critic(critic, event_shape)
        self.critic_adam = Adam(self.critic.parameters(), BETAS)
        self.generator_adam = Adam(self.moved(), BETAS)

    def moved(self) -> list[nn.Parameter]:
        """What is trained against the critic."""
        return [*self.program.decoder.parameters(), *self.program.likelihood.head.parameters()]

    @property
    def passes(self) -> int:
        """Of the two against each other."""
        return self.epochs

    def require(self, data: Data) -> None:
        """Images in [0, 1]."""
        super().require(data)
        if data.levels is None:
            raise UserError(f"a {type(self).__name__} makes images of known levels in [0, 1], and {data.name} has none")

    def start(self, data: Data, generator: torch.Generator) -> None:
        """The generator at the mean image."""
        self.program.likelihood.start_at(data.mean_image(), None)
        self.averaged.load_state_dict(self.generator.state_dict())

    def image(self, z: Tensor) -> Tensor:
        """G(z)."""
        loc: Tensor = self.program.likelihood.location_and_scale(self.program.decoder(z))[0]
        return loc

    def train_pass(self, number: int, data: Data, generator: torch.Generator) -> dict[str, float]:
        """An epoch: a step of the critic and one of the generator for every minibatch."""
        losses, steps = [], number * self.num_batches(data)
        for x in self.batches(data, generator):
            fake, more = self.made(x, generator)
            real = x.clone().requires_grad_()
            logits, _ = self.critic(real)
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            penalty = slope.flatten(1).square().sum(1).mean()
            said = [softplus(self.critic(part.detach())[0]).mean() for part in fake]
            of_critic = softplus(-logits).mean() + sum(said) / len(said) + self.r1 / 2 * penalty
            self.critic_adam.descend(of_critic, self.lr)
            loss = sum((softplus(-self.critic(part)[0]).mean() for part in fake), torch.zeros(())) / len(fake) + more()
            self.generator_adam.descend(loss, self.lr)
            steps += 1
            decay = min(self.average, steps / (steps + 10))  # shorter at first: the start is forgotten
            with torch.no_grad():
                for kept, now in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
                    kept.lerp_(now, 1 - decay)
            losses.append(torch.stack([of_critic.detach(), loss.detach()]))
        critic, own = torch.stack(losses).mean(0).tolist()
        return {"critic": critic, "generator": own}

    def made(self, x: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Any]:
        """Images for the critic, and what else the generator's loss has."""
        return [self.image(torch.randn(len(x), self.latent_dim, generator=generator))], lambda: 0.0

    def finish(self, data: Data, path: Path | None, seed: int, visible: bool) -> float:
        """A guide for the averaged generator, and the scale s, as the run ``program`` in the directory."""
        self.generator.load_state_dict(self.averaged.state_dict())
        return fit_guide(
            self.program, data, self.guide_epochs, None if path is None else path / "program", seed, visible
        )

    def figures(self, data: Data, how: How, progress: Progress) -> dict[str, Any]:
        """By annealing with bounds from both sides, under normal noise of the fitted scale."""
        found = annealed_figures(self.program, data, how, progress)
        with torch.no_grad():
            _, scale = self.program.likelihood.location_and_scale(self.program.decoder(torch.zeros(1, self.latent_dim)))
        return {**found, "scale": float(scale), "warnings": [WARNING, *found["warnings"]]}

    def sample(self, num: int, seed: int, *, mean: bool = True) -> Tensor:
        """G(z) at draws of z, whatever ``mean``: it was trained to make images without noise."""
        return sample(self.program, num, mean=True, seed=seed)


@register("baselines", "vae-gan")
class VAEGAN(GAN):
    """A VAE whose reconstruction is measured in the critic's features, and whose decoder is its generator.

    Encoder: KL + E; decoder: weight E + the loss of a gan, on draws and on reconstructions. E = 1/2 sum_j (f_j(x) - f_j(x'))^2 /
    v_j is taken over the critic's features, v_j their variance over some ten minibatches: how the critic
    scales them does not matter, nor how few rows a batch has.

    Larsen et al. 2016, https://arxiv.org/abs/1512.09300.

    Args:
        event_shape: of one image.
        weight: of E against the critic, in the decoder's loss.
        options: those of a gan; the guide's encoder is trained from the start.
    """

    spread: Tensor
    formula = "x = G(z), z ~ q(z | x) or N(0, I), E in the critic's features; then p(x | z) = N(G(z), s^2 I)"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        latent_dim: Count = 10,
        decoder: str = "mlp:hidden=[512,512]",
        critic: str = "mlp:hidden=[512,256]",
        encoder: str = "mlp:hidden=[512,512]",
        posterior: str = "diagonal-normal",
        epochs: Count = 50,
        guide_epochs: Count = 20,
        batch_size: Count = 128,
        lr: Rate = 5e-4,
        r1: Decay = 1.0,
        average: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        weight: Decay = 0.01,
    ) -> None:
        self.weight = weight
        super().__init__(
            event_shape, latent_dim=latent_dim, decoder=decoder, critic=critic, encoder=encoder, posterior=posterior,
            epochs=epochs, guide_epochs=guide_epochs, batch_size=batch_size, lr=lr, r1=r1, average=average,
        )  # fmt: skip
        require_mean(self.program, event_shape, "a vae-gan")
        self.register_buffer("spread", torch.zeros(self.critic.line.in_features))  # v
        self.encoder_adam = Adam([*self.program.encoder.parameters(), *self.program.posterior.parameters()], BETAS)

    def made(self, x: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Any]:
        """Draws and reconstructions; the encoder takes its step with the features that the critic has then."""
        with torch.no_grad():
            variance = self.critic(x)[1].var(0, correction=0)
            first = not bool(self.spread.any())
            self.spread.lerp_(variance, 1.0 if first else 0.1 * len(x) / self.batch_size)
        q, prior = self.program.q(x), self.program.p(x)
        noise = torch.randn(len(x), self.latent_dim, generator=generator)
        z = q.mean + q.stddev * noise
        kl = (q.log_prob(z) - prior.log_prob(z)).mean()
        self.encoder_adam.descend(kl + self.distance(x, self.image(z)), self.lr)
        fake = [self.image(part) for part in (z.detach(), torch.randn(len(x), self.latent_dim, generator=generator))]
        return fake, lambda: self.weight * self.distance(x, fake[0])

    def distance(self, x: Tensor, other: Tensor) -> Tensor:
        """E, mean over images."""
        with torch.no_grad():
            features = self.critic(x)[1]
        least = 1e-6 * self.spread.mean() + 1e-30  # of features that never vary
        return (0.5 * (features - self.critic(other)[1]).square() / (self.spread + least)).sum(1).mean()
