"""The deterministic autoencoder, given a density after it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pyro_vae import registry
from pyro_vae.baselines.adam import Adam
from pyro_vae.baselines.base import Baseline, How, Progress
from pyro_vae.baselines.density import codes, figures_of, fit_guide, fit_prior, require_mean
from pyro_vae.baselines.rbm import Count, Decay, Rate, falling
from pyro_vae.data import Data
from pyro_vae.errors import UserError
from pyro_vae.programs.latents import sample
from pyro_vae.registry import register
from pyro_vae.spec import build, read_block
from pyro_vae.training.run import SPEC


@register("baselines", "autoencoder")
class Autoencoder(Baseline):
    """Trained on reconstruction alone; then a prior is fitted to its codes, and a guide trained for its decoder.

    The reconstruction is -log p(x | z) at z = f(x), the mean of the guide; no noise, no prior. What comes of it is an ordinary
    program, whose decoder was never told of a density: the two stages of Ghosh et al. 2020, https://arxiv.org/abs/1903.12436.

    Args:
        event_shape: of one datum.
        latent_dim: length of a code.
        likelihood: p(x | z); with a normal one the reconstruction error is squared, its scale learned.
        encoder, decoder, posterior: as in a guide and a model.
        prior: what is fitted to the codes; ``standard-normal`` has nothing to fit.
        epochs: passes on reconstruction; 0 where an autoencoder was trained before (--from).
        prior_epochs: passes over the codes, of a prior that is fitted by gradients.
        guide_epochs: passes with the decoder fixed.
        batch_size, lr, weight_decay: of the passes on reconstruction; the rate falls linearly to zero.
    """

    formula = "x ~ p(x | z = f(x)); then p(z) p(x | z)"
    data = "binary or grey"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        latent_dim: Count = 20,
        likelihood: str = "bernoulli",
        encoder: str = "mlp:hidden=[500,500]",
        decoder: str = "mlp:hidden=[500,500]",
        posterior: str = "diagonal-normal",
        prior: str = "gaussian-mixture:components=50",
        epochs: Annotated[int, Field(ge=0, le=100_000)] = 50,
        prior_epochs: Count = 20,
        guide_epochs: Count = 50,
        batch_size: Count = 128,
        lr: Rate = 1e-3,
        weight_decay: Decay = 0.0,
    ) -> None:
        super().__init__(event_shape)
        self.epochs, self.prior_epochs, self.guide_epochs = epochs, prior_epochs, guide_epochs
        self.batch_size, self.lr = batch_size, lr
        model = {"latent_dim": latent_dim, "prior": prior, "likelihood": likelihood, "decoder": decoder}
        self.program: Any = build(model, {"posterior": posterior, "encoder": encoder}, event_shape)
        self.data = self.kind_of({"likelihood": likelihood})
        require_mean(self.program, event_shape, "an autoencoder")
        own: Any = self.program.prior
        if own.scores_guide or own.support.is_discrete:
            raise UserError(
                f"a prior is fitted to the codes of an autoencoder, and {prior.split(':')[0]!r} is "
                f"{'made of the guide' if own.scores_guide else 'discrete'}: choose gaussian-mixture or standard-normal"
            )
        self.adam = Adam(self.program.parameters(), weight_decay=weight_decay)

    @classmethod
    def kind_of(cls, options: dict[str, Any]) -> str:
        """By the likelihood."""
        name = read_block("likelihoods", options.get("likelihood", "bernoulli")).name
        kind = registry.get("likelihoods", name).data  # type: ignore[attr-defined]
        if kind in ("lattice", "count"):
            raise UserError(
                f"an autoencoder describes bits, or numbers, and {name!r} levels: choose bernoulli or normal"
            )
        return "binary" if kind == "binary" else "grey"

    def require(self, data: Data) -> None:
        """As many rows as the mixture that is fitted to their codes has components."""
        super().require(data)
        most = len(getattr(self.program.prior, "logits", ()))
        if len(data.train) < most:
            raise UserError(
                f"a mixture of {most:,} components is fitted to the codes of {len(data.train):,} rows: give fewer"
            )

    @property
    def passes(self) -> int:
        """On reconstruction."""
        return self.epochs

    def start(self, data: Data, generator: torch.Generator) -> None:
        """The likelihood at the mean, and of data that are no images at their spread."""
        if self.epochs:
            some = data.observed("train", rows=range(min(1000, len(data.train)))).flatten(1)
            spread = float(some.std(0).mean()) if data.levels is None else None
            self.program.likelihood.start_at(data.mean_image(), spread)

    def begin_with(self, other: Baseline) -> None:
        """Take the encoder and decoder of another, whose prior may be of another family."""
        if not isinstance(other, Autoencoder) or self.epochs:
            raise UserError("an autoencoder begins with another, --from DIR, and then has epochs=0 of its own")
        for name in ("encoder", "decoder", "likelihood", "posterior"):
            ours, theirs = getattr(self.program, name), getattr(other.program, name)
            if repr(ours) != repr(theirs):
                raise UserError(f"the {name} of the autoencoder of --from is another: give the same options")
            ours.load_state_dict(theirs.state_dict())

    def loss(self, x: Tensor) -> Tensor:
        """-log p(x | z = f(x)), mean nats per image."""
        program = self.program
        loss: Tensor = -program.likelihood(program.decoder(program.q(x).mean)).log_prob(x).mean()
        return loss

    def train_pass(self, number: int, data: Data, generator: torch.Generator) -> dict[str, float]:
        """An epoch on reconstruction."""
        rate, losses = falling(self.lr, number, self.epochs, self.num_batches(data)), []
        for i, x in enumerate(self.batches(data, generator)):
            loss = self.loss(x)
            self.adam.descend(loss, rate(i))
            losses.append(loss.detach())
        return {"reconstruction": float(torch.stack(losses).mean())}

    def finish(self, data: Data, path: Path | None, seed: int, visible: bool) -> float:
        """The prior of its codes, and the guide of its decoder, as the run ``program`` in the directory."""
        where = None if path is None else path / "program"
        if where is None or not (where / SPEC).is_file():  # else it is in the run
            fit_prior(self.program.prior, codes(self.program, data), self.prior_epochs, seed)
        return fit_guide(self.program, data, self.guide_epochs, where, seed, visible)

    def figures(self, data: Data, how: How, progress: Progress) -> dict[str, Any]:
        """Of the program, beside the reconstruction that it was trained for."""
        with torch.no_grad():
            x = data.observed(how.split, rows=how.rows(data))
            loss = torch.stack([self.loss(part) * len(part) for part in x.split(1000)]).sum() / len(x)
        return {**figures_of(self.program, data, how, progress), "reconstruction_at_guide_mean": float(loss)}

    def sample(self, num: int, seed: int, *, mean: bool = True) -> Tensor:
        """Pixels at draws of the prior."""
        return sample(self.program, num, mean=mean, seed=seed)
